"""`SVFLinear`: the frozen factors of one matrix, its table of scale rows, and the op, in either form.

    y = base + ((x V) * scale[expert_ids]) Uᵀ                                   (Transformer², arXiv 2501.06252, section 3.1)

`DeltaLinear` is a child of the layer that it adapts and adds to its output; `FactoredLinear` stands in for it. Neither puts anything
of its own into the model's state dict: a patched model saves as its base model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from t2kernels.experts.expert import make_scale, z_from_logits
from t2kernels.factors.int8 import Int8Factor, spread
from t2kernels.factors.store import Factor
from t2kernels.ops.op import call

from .active import Routing
from .groups import Group


class SVFLinear(nn.Module):
    """Factors and scale table of one matrix, or of X matrices of equal shape (sizes in parentheses: a mixture-of-experts stack).

    Vt [(X,) C, N], U [(X,) M, C], sigma [(X,) R] and scale [E, (X,) C]; C = R, and more with int8 factors, whose columns belong to the
    components `source` [(X,) C] with the factors `fold` [(X,) C]. sigma, scale and fold stay in fp32 whatever the model is cast to later.
    support: how many leading components an expert may rescale (k <= R; k = R in delta form)
    dtype: of the layer's dense weight. Vt and U are cast to it, and follow the model, unless the factors are int8 or `keep` says to leave them
    """

    form: str

    def __init__(
        self,
        factor: Factor | Int8Factor,
        support: int,
        rows: int,
        dtype: torch.dtype,
        routing: Routing,
        keep: bool = False,
    ):
        super().__init__()
        int8 = isinstance(factor, Int8Factor)
        kind = factor.U.dtype if int8 or keep else dtype
        self.register_buffer("Vt", factor.V.mT.to(kind).contiguous(), persistent=False)
        self.register_buffer("U", factor.U.to(kind).contiguous(), persistent=False)
        self.register_buffer("sigma", factor.sigma.float().clone(), persistent=False)
        self.register_buffer("source", factor.source.clone() if int8 else None, persistent=False)
        self.register_buffer("fold", factor.fold.clone() if int8 else None, persistent=False)
        self.runs = factor.runs if int8 else (self.rank,)
        self.dtype, self._kept = dtype, ("sigma", "scale", "fold", *(("Vt", "U") if keep or int8 else ()))
        base_row = self.columns(make_scale(torch.ones_like(self.sigma), self.sigma, self.form))
        self.register_buffer("scale", base_row.expand(rows, *base_row.shape).clone(), persistent=False)
        self.support, self.routing = support, routing
        self.group: Group | None = None  # of layers with the same input; set by the bank
        self.logits = nn.ParameterDict()  # experts in training: key -> p [k]
        self._training_rows: dict[str, tuple[int, str]] = {}  # key -> (row, parametrisation)
        self._written: dict[str, tuple[int, int]] = {}  # key -> state of p that stands in `scale`

    @property
    def V(self) -> Tensor:
        """[N, R], a view of Vᵀ, which is what lies in memory."""
        return self.Vt.t()

    @property
    def rank(self) -> int:
        return self.sigma.shape[-1]

    def columns(self, row: Tensor) -> Tensor:
        """What a number for each component [..., R] is for the columns [..., C]."""
        return row if self.fold is None else spread(row, self.source, self.fold, self.runs)

    def add_trained(self, key: str, row: int, p: nn.Parameter, parametrisation: str) -> None:
        """Let row `row` follow the trainable p [(X,) k]: z = 1 + p ("raw"), or the release's sigmoid with the trace kept ("sigmoid")."""
        _count_optimiser_steps()
        self.logits[key] = p
        self._training_rows[key] = (row, parametrisation)

    def drop_trained(self, key: str) -> None:
        del self.logits[key], self._training_rows[key]
        self._written.pop(key, None)

    def trained_z(self, key: str) -> Tensor:
        """z [(X,) k] of an expert in training, differentiable."""
        p = self.logits[key]
        return 1 + p if self._training_rows[key][1] == "raw" else z_from_logits(p, self.sigma[..., : self.support])

    def _trained_row(self, key: str) -> Tensor:
        z = self.trained_z(key)
        if self.support < self.rank:
            z = nn.functional.pad(z, (0, self.rank - self.support), value=1.0)
        return self.columns(make_scale(z, self.sigma, self.form))

    def table(self) -> Tensor:
        """scale [E, (X,) C] with the rows of experts in training up to date: differentiable where gradients are on, else written in place."""
        if not self._training_rows:
            return self.scale
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            rows = torch.tensor([row for row, _ in self._training_rows.values()], device=self.scale.device)
            return self.scale.index_copy(0, rows, torch.stack([self._trained_row(k) for k in self._training_rows]))
        for key, (row, _) in self._training_rows.items():
            state = self.logits[key]._version, _optimiser_steps
            if self._written.get(key) != state:
                self.scale[row].copy_(self._trained_row(key))
                self._written[key] = state
        return self.scale

    def _apply(self, fn, recurse=True):
        # Casting a model to bf16 must not round sigma and the table: what is kept follows its device, not its dtype.
        kept = {name: self._buffers.pop(name) for name in self._kept}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(kept)
        like = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device))
        self.dtype = like.dtype
        if like.device != self.scale.device:
            self._buffers.update({name: t if t is None else t.to(like.device) for name, t in kept.items()})
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, *args):
        pass

    def extra_repr(self) -> str:
        return (
            f"{self.form}, in_features={self.Vt.shape[-1]}, out_features={self.U.shape[-2]}, rank={self.rank}, "
            f"support={self.support}, rows={self.scale.shape[0]}, factors={str(self.U.dtype).removeprefix('torch.')}"
            f"{f', columns={self.scale.shape[-1]}' if self.fold is not None else ''}"
        )


_optimiser_steps: int | None = None  # of the whole process; None: not counted yet


def _count_optimiser_steps() -> None:
    """Fused optimisers change parameters without raising their version (torch 2.13), so a version alone would leave old rows in the table."""
    global _optimiser_steps
    if _optimiser_steps is None:
        _optimiser_steps = 0
        register_optimizer_step_post_hook(_count_one)


def _count_one(optimizer, args, kwargs) -> None:
    global _optimiser_steps
    _optimiser_steps += 1


class DeltaLinear(SVFLinear):
    """y + ((x V) * scale[expert_ids]) Uᵀ with scale = sigma * (z - 1): what an expert adds to the output y of the layer it is a child of."""

    form = "delta"

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        route = self.routing.active
        if route is None:
            return y
        if (
            self.group is not None
            and x.dtype == y.dtype
            and (out := self.group.expanded(self, y, x, route)) is not None
        ):
            return out
        return add_delta(y, x, self.V, self.U, self.table(), route.fit(x.shape[:-1]))


def add_delta(y: Tensor, x: Tensor, V: Tensor, U: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """y + ((x V) * scale[ids]) Uᵀ in y's dtype, in one op, so that a zero row leaves y's bits alone."""
    x = x if x.dtype == y.dtype else x.to(y)
    return call(x, V, U, scale, ids if ids.device == y.device else ids.to(y.device), y)


def delta_hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of a layer in delta form. A plain function, so that a copied, pickled or replicated layer finds its own child."""
    return module.svf.add_to(output, args[0])


class FactoredLinear(SVFLinear):
    """y = ((x V) * scale[expert_ids]) Uᵀ + bias with scale = sigma * z; stands in for a layer whose weight was dropped."""

    form = "factored"

    def __init__(
        self,
        factor: Factor | Int8Factor,
        support: int,
        rows: int,
        dtype: torch.dtype,
        routing: Routing,
        original: nn.Module,
        transposed: bool,
        keep: bool = False,
    ):
        super().__init__(factor, support, rows, dtype, routing, keep)
        self.bias = getattr(original, "bias", None)
        self.transposed = transposed
        self._original = (original,)  # in a tuple: not a submodule
        self._requires_grad = original.weight.requires_grad
        self.in_features, self.out_features = factor.V.shape[0], factor.U.shape[0]
        self.register_buffer(
            "base_ids", torch.zeros((), dtype=torch.int32), persistent=False
        )  # for a forward without a route
        self.dense_rows: dict[int, Tensor] = {}  # row -> W' [M, N], for experts whose dense weights are kept

    def forward(self, x: Tensor) -> Tensor:
        route = self.routing.active
        ids = self.base_ids if route is None else route.fit(x.shape[:-1])
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        if self.dense_rows and (W := self.dense_rows.get(0 if route is None else route.row)) is not None:
            return nn.functional.linear(x, W.to(x.dtype), self.bias if self.bias is None else self.bias.to(x.dtype))
        ids = ids.to(x.device)
        if self.group is not None and (out := self.group.output(self, x, route, ids)) is not None:
            return out
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return call(x, self.V, self.U, self.table(), ids, None, bias)

    def _apply(self, fn, recurse=True):
        self.dense_rows = {row: fn(W) for row, W in self.dense_rows.items()}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "dense_rows": {}}  # a copied bank pins no row, so what is in one may change

    def dense(self, row: int = 0) -> Tensor:
        """W [M, N] = U diag(scale[row]) Vᵀ, computed in fp32, in the dtype of the layer that it stands in for."""
        return ((self.U.float() * self.scale[row]) @ self.Vt.float()).to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """The base model's weight as the original layer would hold it, rebuilt at each access: for code that looks at it, not for speed."""
        w = self.dense()
        return w.t().contiguous() if self.transposed else w

    def restore(self, row: int = 0) -> nn.Module:
        """The original layer with a dense weight again: the base model (row 0) or the expert of another row."""
        (original,) = self._original
        w = self.dense(row)
        original.weight = nn.Parameter(w.t().contiguous() if self.transposed else w, requires_grad=self._requires_grad)
        return original

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        if prefix + "weight" in state_dict:
            error_msgs.append(
                f"{prefix[:-1]} is patched in factored form, a dense weight cannot be loaded into it: unpatch_model(model) first"
            )
