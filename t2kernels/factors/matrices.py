"""The matrices of a model that are adapted: their names, and reading one as a dense [M, N] tensor.

One walk serves every model family. The differences between families are in the tables below, not in code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from t2kernels import InputError

# Path components that say whether a block is attention or MLP. The last one found in a module's path decides.
ATTENTION: frozenset[str] = frozenset(
    "attn attention self_attn self_attention cross_attn encoder_attn EncDecAttention SelfAttention linear_attn".split()
)
MLP: frozenset[str] = frozenset(
    "mlp mlps ffn feed_forward feedforward experts shared_expert shared_experts block_sparse_moe DenseReluDense fc1 "
    "fc2 intermediate".split()
)
# Left out unless they are named: heads, routers, and matrices that models read through `.weight` instead of calling.
SKIP_LEAF: frozenset[str] = frozenset(
    "lm_head embed_out score classifier qa_outputs router gate shared_expert_gate dt_proj".split()
)
# Towers and projectors get image patches or audio frames, which do not fit one row index per sequence of the text. The
# small matrices of other adapters are trained, not factored; so are whole layers that PEFT trains (`modules_to_save`).
SKIP_PART: frozenset[str] = frozenset(
    "vision_tower vision_model visual vision_encoder image_encoder audio_tower audio_encoder multi_modal_projector "
    "mm_projector embed_vision embed_audio connector lora_A lora_B original_module modules_to_save".split()
)
# The stacks of a mixture-of-experts layer: [experts, M, N], or [experts, N, M] if the class says is_transposed.
STACKS: tuple[str, ...] = ("gate_up_proj", "up_proj", "down_proj")

WIDE: int = 512  # of min(M, N): below, the factors of all components are small, and a sixteenth is few

Targets = str | Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Matrix:
    """One adapted matrix W [M, N] (out_features, in_features) of a model: y = x Wᵀ.

    name: key of the matrix in experts and factors: the module's path; for a slice of a mixture-of-experts stack with
        `.{tensor}.{index}` behind it
    tensor: the parameter's key in the model's state dict
    shape: (M, N)
    kind: "attention", "mlp" or "other"
    module: the module that holds the parameter
    index: the slice of a stack, or None
    transposed: True if the parameter is stored as [N, M] (Conv1D, gpt-oss)
    """

    name: str
    tensor: str
    shape: tuple[int, int]
    kind: str
    module: nn.Module = field(repr=False, compare=False)
    index: int | None = None
    transposed: bool = False

    @property
    def path(self) -> str:
        """The module's path in the model."""
        return self.tensor.rpartition(".")[0]

    @property
    def adapted(self) -> bool:
        """True if another adapter (a LoRA of PEFT) wraps the module and may merge itself into the weight."""
        return self.path.rpartition(".")[2] == "base_layer"

    @property
    def rank(self) -> int:
        """R = min(M, N), the number of singular components."""
        return min(self.shape)

    @property
    def stored(self) -> Any:
        """The parameter as the module holds it, in any format; of a slice, the whole stack. None if there is none."""
        return getattr(self.module, self.tensor.rpartition(".")[2], None)

    def orient(self, stored: Tensor) -> Tensor:
        """W [M, N] from the stored parameter or checkpoint tensor."""
        w = stored if self.index is None else stored[self.index]
        return w.t() if self.transposed else w

    def read(self) -> Tensor:
        """W [M, N] in floating point, dequantised if the module holds another format.

        Raises ValueError if there is no readable weight, or if it is on the meta device.
        """
        stored = self.stored
        if not isinstance(stored, Tensor):
            raise InputError(
                f"{self.name}: {type(self.module).__name__} has no readable weight; "
                "pass factors decomposed from the original checkpoint"
            )
        if stored.is_meta:
            raise InputError(
                f"{self.name}: its weight is on the meta device (not loaded, or offloaded); "
                "load it, or pass factors of the checkpoint"
            )
        with torch.no_grad():
            return self.orient(_dense(stored, self.module))


def is_quantised(module: nn.Module) -> bool:
    """True if the module's weight is not a plain floating-point tensor."""
    return not is_plain(getattr(module, "weight", None))


def is_plain(weight: Any) -> bool:
    """True for a floating-point tensor of more than one byte a number, of no subclass but `nn.Parameter`."""
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.element_size() > 1


def stored_bytes(t: Any) -> int:
    """Bytes of a weight as it is stored; for a quantised tensor, of its packed numbers and their scales."""
    if hasattr(t, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(t, part)) for part in t.__tensor_flatten__()[0])
    return t.numel() * t.element_size()


def find_matrices(model: nn.Module, targets: Targets = "all") -> dict[str, Matrix]:
    """The matrices that `targets` selects, by name, in model order.

    targets: "all" (every linear layer of the blocks), "mlp", "attention"; a regular expression that is searched in the
        names; a list of last path components ("q_proj"); or `callable(name, module) -> bool`
    Heads, embeddings, routers, vision and audio towers are left out. A list or a callable may select them; a regular
    expression does if it matches nothing else.
    Raises ValueError if nothing is selected (the message lists names), or if a head tied to the embedding is selected.
    """
    every = dict(_walk(model))
    usual = {n: m for n, m in every.items() if _usual(n, m, model)}
    if callable(targets):
        chosen = {n: m for n, m in every.items() if targets(n, m.module)}
    elif not isinstance(targets, str):
        leaves = frozenset(targets)
        chosen = {n: m for n, m in every.items() if m.path.rpartition(".")[2] in leaves or _leaf(n) in leaves}
    elif targets == "all":
        chosen = usual
    elif targets in ("mlp", "attention"):
        chosen = {n: m for n, m in usual.items() if m.kind == targets}
    else:
        try:
            pattern = re.compile(targets)
        except re.error as e:
            raise InputError(
                f"targets={targets!r} is not 'all', 'mlp', 'attention' or a valid regular expression: {e}"
            ) from None
        chosen = {n: m for n, m in usual.items() if pattern.search(n)} or {
            n: m for n, m in every.items() if pattern.search(n)
        }
    if not chosen:
        some = ", ".join(list(every)[:6]) or "no linear layer at all"
        raise InputError(
            f"targets={targets!r} selects no matrix of {type(model).__name__}; "
            f"it has {some}{', ...' if len(every) > 6 else ''}"
        )
    tied = _tied_head(model)
    for n, m in chosen.items():
        if m.module is tied:
            raise InputError(
                f"targets={targets!r} selects {n}, which is tied to the input embedding; adapting it would separate "
                "the two. Leave it out"
            )
    return chosen


def usual_rank(shapes: Iterable[tuple[int, int]]) -> float | None:
    """1/16 for a model with matrices of min(M, N) >= WIDE: the rank of `patch_model` and `t2 decompose` unless they are
    told; else None (all): a sixteenth of smaller ones is a few components."""
    return 1 / 16 if max(map(min, shapes), default=0) >= WIDE else None


def _walk(model: nn.Module) -> Iterator[tuple[str, Matrix]]:
    for path, module in model.named_modules():
        name = base_name(path)
        if isinstance(module, Conv1D):
            n, m = module.weight.shape
            yield name, Matrix(name, f"{path}.weight", (m, n), kind_of(path), module, transposed=True)
        elif _linear_like(module):
            yield name, Matrix(name, f"{path}.weight", (module.out_features, module.in_features), kind_of(path), module)
        elif is_expert_stack(module):
            for tensor in STACKS:
                stack = getattr(module, tensor, None)
                if not isinstance(stack, Tensor) or stack.dim() != 3:
                    continue
                count, a, b = stack.shape
                transposed = bool(getattr(module, "is_transposed", False))
                for e in range(count):
                    name = f"{base_name(path)}.{tensor}.{e}"
                    yield (
                        name,
                        Matrix(
                            name, f"{path}.{tensor}", (b, a) if transposed else (a, b), "mlp", module, e, transposed
                        ),
                    )


def is_expert_stack(module: nn.Module) -> bool:
    """True for a mixture-of-experts module in transformers' layout: 3-D weights, called by `ALL_EXPERTS_FUNCTIONS`."""
    marks = (hasattr(module, a) for a in ("is_transposed", "has_gate"))  # both; that both are there is checked later
    return hasattr(module, "down_proj") and any(marks)


def base_name(path: str) -> str:
    """The path that a module has in the base model, without the wrappers that PEFT puts around models and layers."""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of PEFT; any other model itself."""
    inner: Any = model
    while hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return inner


def kind_of(path: str) -> str:
    """ "attention", "mlp" or "other", from the path alone."""
    for part in reversed(path.split(".")):
        if part in ATTENTION:
            return "attention"
        if part in MLP:
            return "mlp"
    return "other"


def _linear_like(module: nn.Module) -> bool:
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (
        all(isinstance(s, int) for s in sizes)
        and not any(hasattr(module, wrapped) for wrapped in ("base_layer", "modules_to_save"))
        and not isinstance(module, nn.Bilinear)
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _usual(name: str, m: Matrix, model: nn.Module) -> bool:
    parts = m.path.split(".")
    in_block = any(p.isdigit() for p in parts)
    return (
        in_block and parts[-1] not in SKIP_LEAF and not SKIP_PART.intersection(parts) and m.module is not _head(model)
    )


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def _tied_head(model: nn.Module) -> nn.Module | None:
    head, get = _head(model), getattr(model, "get_input_embeddings", None)
    embedding = get() if get else None
    if head is None or embedding is None or getattr(head, "weight", None) is not getattr(embedding, "weight", 0):
        return None
    return head


def _dense(stored: Tensor, module: nn.Module) -> Tensor:
    if is_plain(stored):
        return stored.detach()
    if type(stored).__module__.startswith("bitsandbytes"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(stored, getattr(module, "state", None)).detach()
    if type(stored) not in (nn.Parameter, Tensor) and hasattr(
        stored, "dequantize"
    ):  # torchao and other tensor subclasses
        return stored.dequantize().detach()
    raise InputError(
        f"{type(module).__name__}: its {stored.dtype} weight cannot be converted to floating point; "
        "pass factors of the original checkpoint"
    )
