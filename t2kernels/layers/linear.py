"""`SVFLinear`: frozen factors of one matrix and its table of scale rows. `DeltaLinear`: the delta form.

    y = base + ((x V) * scale[expert_ids]) Uᵀ                       (Transformer², arXiv 2501.06252, section 3.1)

`DeltaLinear` is a child of the linear layer and adds to its output. `FactoredLinear` (in `factored_linear.py`) replaces
the linear layer. Neither adds anything to the model's state dict: a patched model saves as its base model.

Each layer knows how it enters a model and leaves it: `install(model, matrix)` and `remove(model, row)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from t2kernels.factors.factor import Factor
from t2kernels.factors.int8 import Int8Factor, spread
from t2kernels.factors.linalg import matmul
from t2kernels.factors.matrices import Matrix, is_quantised
from t2kernels.ops.op import call
from t2kernels.ops.stream_order import finish

from . import delta_forward
from .dense.link import Link
from .dense.probe import format_of, is_ordinary, unsupported_gradient
from .forward_hooks import foreign_hooks, remove_hook
from .groups import Group
from .routing.active import Routing
from .routing.route import Route
from .scale import make_scale, z_from_logits


class Trained(nn.ParameterDict):
    """Parameters that stay in fp32 when the model is cast: they follow its device, not its dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Trained:
        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(move, recurse)


def whole(p: Tensor) -> Tensor:
    """A parameter as one tensor. Where FSDP has sharded it, every process must call this."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p  # a DTensor


class SVFLinear(nn.Module):
    """Factors and scale table of one matrix, or of X matrices of equal shape (a mixture-of-experts stack: sizes in
    parentheses).

    Vt: [(X,) C, N], U: [(X,) M, C] buffers in the dtype of the layer, or int8
    sigma: [(X,) R] fp32
    scale: [E, (X,) C] fp32, one row per expert; row 0 is the base model
    source: [(X,) C] int64, fold: [(X,) C] fp32: component and factor of each column, for int8 factors; else None
    C = R, and more with int8 factors. sigma, scale and fold stay in fp32 if the model is cast.

    factor: U, sigma, V of the matrix
    support: how many leading components an expert may rescale (k <= R; k = R in delta form)
    rows: E
    dtype: of the layer's dense weight. Vt and U are cast to it and follow the model, unless they are int8 or `keep`
    routing: the model's; says which row each token uses
    keep: leave Vt and U in the dtype of `factor`, also if the model is cast
    """

    form: str
    Vt: Tensor
    U: Tensor
    sigma: Tensor
    scale: Tensor
    source: Tensor | None
    fold: Tensor | None

    def __init__(
        self,
        factor: Factor | Int8Factor,
        support: int,
        rows: int,
        dtype: torch.dtype,
        routing: Routing,
        keep: bool = False,
    ) -> None:
        super().__init__()
        int8 = factor if isinstance(factor, Int8Factor) else None
        kind = factor.U.dtype if int8 or keep else dtype
        self.register_buffer("Vt", factor.V.mT.to(kind).contiguous(), persistent=False)
        self.register_buffer("U", factor.U.to(kind).contiguous(), persistent=False)
        self.register_buffer("sigma", factor.sigma.float().clone(), persistent=False)
        self.register_buffer("source", int8.source.clone() if int8 else None, persistent=False)
        self.register_buffer("fold", int8.fold.clone() if int8 else None, persistent=False)
        self.runs: tuple[int, ...] = int8.runs if int8 else (self.rank,)
        self.dtype: torch.dtype = dtype
        self._kept = ("sigma", "scale", "fold", *(("Vt", "U") if keep or int8 else ()))
        base_row = self.columns(make_scale(torch.ones_like(self.sigma), self.sigma, self.form))
        self.register_buffer("scale", base_row.expand(rows, *base_row.shape).clone(), persistent=False)
        self.support: int = support
        self.routing: Routing = routing
        self.group: Group | None = None  # of layers with the same input; set by the bank
        self._own: Group | None = None  # of this layer alone
        self.logits: nn.ParameterDict = Trained()  # experts in training: key -> p [k]
        # key -> (row, parametrisation); replaced, never changed: another thread may read it. Each forward looks p up,
        # because FSDP puts another tensor into its place.
        self._training: dict[str, tuple[int, str]] = {}
        self.path: str = ""  # of the module in the model that the layer is installed at
        self.base: Link = Link()  # to that module, in delta form
        self.transposed: bool = False  # whether the dense weight is stored as [N, M]

    def install(self, model: nn.Module, matrix: Matrix) -> None:
        """Put the layer into the model at `matrix`. Raises ValueError, with the model unchanged, if it cannot be."""
        raise NotImplementedError(f"{type(self).__name__} cannot be installed into a model")

    def remove(self, model: nn.Module, row: int = 0) -> None:
        """Take the layer out of the model and give the dense layer back, with the expert of `row` merged in.

        row: 0: the base model
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be removed from a model")

    def place_at(self, matrix: Matrix) -> None:
        """Note where the layer is installed, for `remove`."""
        self.path = matrix.path
        self.transposed = matrix.transposed

    def unsupported_training(self) -> str | None:
        """Why gradients cannot flow through the layer, or None."""
        return None

    def probe_kind(self) -> object:
        """Layers of one kind answer `unsupported_training` alike. None: there is nothing to ask."""
        return None

    def probe(self, module: nn.Module) -> str | None:
        """Why the gradient of a linear module to its input cannot be trusted, or None."""
        with self.routing.hold(None):  # as the base model: a hook of ours adds nothing
            return unsupported_gradient(module, self.Vt.shape[-1], self.dtype, self.Vt.device)

    def dense_module(self, model: nn.Module) -> Any:
        """The dense layer. Its path may have changed: PEFT takes its wrappers off again."""
        module = self.base()
        return model.get_submodule(self.path) if module is None else module

    def unsupported_merge(self, model: nn.Module) -> str | None:
        """Why no expert can be merged into the dense layer; None if it is possible."""
        return None

    @property
    def V(self) -> Tensor:
        """[N, C], a view of Vᵀ."""
        return self.Vt.t()

    @property
    def rank(self) -> int:
        """R, the number of components."""
        return self.sigma.shape[-1]

    def columns(self, row: Tensor) -> Tensor:
        """Turn numbers for components [..., R] into numbers for columns [..., C]."""
        if self.fold is None or self.source is None:
            return row
        return spread(row, self.source, self.fold, self.runs)

    # --- experts in training

    def add_trained(self, key: str, row: int, p: nn.Parameter, parametrisation: str) -> None:
        """Make row `row` follow the parameter p.

        key: name of the parameter in `logits`
        p: [(X,) k]
        parametrisation: "raw": z = 1 + p; "sigmoid": that of the authors' release, which keeps the trace
        """
        self.logits[key] = p
        self._training = {**self._training, key: (row, parametrisation)}

    def drop_trained(self, key: str) -> None:
        """Undo `add_trained`. The row keeps its last values."""
        with self.routing.writing:
            self._training = {k: v for k, v in self._training.items() if k != key}
        del self.logits[key]

    def trained_z(self, key: str) -> Tensor:
        """z [(X,) k] of an expert in training, differentiable."""
        return self._z(self._training[key][1], whole(self.logits[key]))

    def table(self) -> Tensor:
        """scale [E, (X,) C] with the rows of experts in training computed from their parameters.

        With gradients the result is a new tensor, differentiable in the parameters. Without, the rows are written in
        place: they are vectors, and computing them costs less than finding out whether p has changed.
        """
        if not (training := self._training):
            return self.scale
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            rows = torch.tensor([row for row, _ in training.values()], device=self.scale.device)
            made = [self._row(form, self.logits[key]) for key, (_, form) in training.items()]
            return self.scale.index_copy(0, rows, torch.stack(made))
        with self.routing.writing:  # a row that training has left may be another expert's by now
            for key, (row, form) in self._training.items():
                self.scale[row].copy_(self._row(form, self.logits[key]))
        return self.scale

    def _z(self, parametrisation: str, p: Tensor) -> Tensor:
        return 1 + p if parametrisation == "raw" else z_from_logits(p, self.sigma[..., : self.support])

    def _row(self, parametrisation: str, p: Tensor) -> Tensor:
        z = self._z(parametrisation, p)
        if self.support < self.rank:
            z = nn.functional.pad(z, (0, self.rank - self.support), value=1.0)
        return self.columns(make_scale(z, self.sigma, self.form))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SVFLinear:
        # Casting a model to bf16 must not round sigma and the table: kept buffers follow the device, not the dtype.
        # A cast in inference mode must not leave tensors that cannot be trained on.
        kept = {name: self._buffers.pop(name) for name in self._kept}
        for group in (self.group, self._own):
            if group is not None:
                group.scatter()
        with torch.inference_mode(False):
            try:
                super()._apply(fn, recurse)
            finally:
                self._buffers.update(kept)
            like = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device))
            self.dtype = like.dtype
            if like.device != self.scale.device:
                self._buffers.update({name: t if t is None else t.to(like.device) for name, t in kept.items()})
        finish(self.Vt.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass

    def extra_repr(self) -> str:
        """Form, sizes and dtype, for `print(model)`."""
        return (
            f"{self.form}, in_features={self.Vt.shape[-1]}, out_features={self.U.shape[-2]}, rank={self.rank}, "
            f"support={self.support}, rows={self.scale.shape[0]}, factors={str(self.U.dtype).removeprefix('torch.')}"
            f"{f', columns={self.scale.shape[-1]}' if self.fold is not None else ''}"
        )


class DeltaLinear(SVFLinear):
    """y + ((x V) * scale[expert_ids]) Uᵀ with scale = sigma * (z - 1) and y = x Wᵀ, the output of the dense layer.

    The layer is a child, named "svf", of the dense layer, which keeps its weight as it is in any format, and gets the
    class `DeltaForward` in front of its own.
    """

    form = "delta"

    def install(self, model: nn.Module, matrix: Matrix) -> None:
        """Make the layer a child of the dense layer, whose forward then adds the change.

        A dense layer whose forward was replaced (by accelerate, which moves its input) gets a hook instead.
        """
        self.place_at(matrix)
        self.base = Link(matrix.module)
        matrix.module.add_module("svf", self)
        if not delta_forward.install(matrix.module):
            matrix.module.register_forward_hook(delta_hook)

    def remove(self, model: nn.Module, row: int = 0) -> None:
        """Take the layer off the dense layer; add the change of the expert in `row` to its weight."""
        module = self.dense_module(model)
        if row:
            change = matmul(self.U.float() * self.table()[row], self.Vt.float())  # [M, N]
            merge(module.weight, change, self.transposed)
        del module.svf
        remove_hook(module, delta_hook)
        delta_forward.remove(module)

    def together(self, x: Tensor, route: Route) -> Tensor | None:
        """The output [..., M] of the dense layer for x with the change of each token's expert, made for its group at
        once; None: it must be made the long way, by the dense layer and `add_to`."""
        group = self.group
        if torch.is_grad_enabled():
            if torch.compiler.is_compiling() or not x.is_cpu:
                return None
            y = None if group is None else group.joined(self, x, route)
            return (self._own or self.alone()).joined(self, x, route) if y is None else y
        if group is not None and (y := group.changed(self, x, route)) is not None:
            return y
        if torch.compiler.is_dynamo_compiling():
            return None  # alone it is one op either way
        return (self._own or self.alone()).changed(self, x, route)

    def alone(self) -> Group:
        """The group of this layer and no other."""
        if self._own is None:
            self._own = Group((self,))
        return self._own

    def probe_kind(self) -> object:
        """Type, format and hooks of the dense layer; None if it is a plain one of torch or transformers without any."""
        module = self.base()
        hooks = () if module is None else foreign_hooks(module)
        return None if module is None or (is_ordinary(module) and not hooks) else (*format_of(module), hooks)

    def unsupported_training(self) -> str | None:
        """See `SVFLinear`; the dense layer is run (`layers.dense.probe`)."""
        module = self.base()
        try:
            return None if module is None else self.probe(module)
        except Exception:
            if is_ordinary(module):  # one of its hooks wants other inputs
                return None
            raise

    def unsupported_merge(self, model: nn.Module) -> str | None:
        """A quantised weight cannot take an expert in."""
        if not is_quantised(self.dense_module(model)):
            return None
        return f"{self.path} is quantised, so an expert cannot be merged into it; dequantise the model first"

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y [..., M] plus the change of each token's expert. x: [..., N], the input of the dense layer."""
        route = self.routing.active
        if route is None:
            return y
        group = self.group if x.dtype == y.dtype else None
        if group is not None and (out := group.expanded(self, y, x, route)) is not None:
            return out
        return add_delta(y, x, self.V, self.U, self.table(), route.fit(x.shape[:-1]))


def merge(weight: Tensor, change: Tensor, transposed: bool) -> None:
    """weight += change, in place. change: [M, N]; transposed: whether the weight is stored as [N, M]."""
    with torch.inference_mode() if weight.is_inference() else contextlib.nullcontext():  # written nowhere else
        weight.add_((change.t() if transposed else change).to(weight.device))


def add_delta(y: Tensor, x: Tensor, V: Tensor, U: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """y + ((x V) * scale[ids]) Uᵀ in y's dtype, in one op, so that a zero row leaves y's bits unchanged."""
    x = x if x.dtype == y.dtype else x.to(y)
    return call(x, V, U, scale, ids if ids.device == y.device else ids.to(y.device), y)


def delta_hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of a layer in delta form.

    A plain function: a module that is copied, pickled or replicated finds its own child.
    """
    return module.svf.add_to(output, args[0])
