"""`explain`: the kernels that a patched model runs for a batch, layer by layer, and why; from the planner, untimed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from t2kernels import InputError
from t2kernels.experts.bank import ExpertBank
from t2kernels.factors.matrices import stored_bytes
from t2kernels.layers.linear import DeltaLinear, SVFLinear
from t2kernels.ops import dispatch
from t2kernels.ops.device import Device
from t2kernels.ops.planner import Call, Choice, bytes_moved


@dataclass(frozen=True)
class Line:
    """Calls that run in the same way. A call is for one matrix, or for a group of matrices that read the same input.

    kind: last parts of the matrices' names
    count: number of calls
    form: "factored" or "delta"
    M, N: shapes [M_i, N] of the matrices
    C: columns of the factors of each
    factors: dtype of the factors
    choice: implementation and path, each with a reason
    moved: bytes that one call is predicted to read and write, base layers included
    dense: the same for the dense layers of the unpatched model
    way: how the layers call it: "one call, in place", "one call", "after each layer" or "each matrix"
    why_way: why in this way
    """

    kind: str
    count: int
    form: str
    M: tuple[int, ...]
    N: int
    C: tuple[int, ...]
    factors: torch.dtype
    choice: Choice
    moved: int
    dense: int
    way: str = "one call"
    why_way: str = ""


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`; `str` makes a table of it.

    title: the question
    lines: in model order
    advice: cheaper alternatives, if any
    """

    title: str
    lines: tuple[Line, ...]
    advice: tuple[str, ...] = ()

    @property
    def moved(self) -> int:
        """Predicted bytes that all layers read and write."""
        return sum(line.count * line.moved for line in self.lines)

    @property
    def dense(self) -> int:
        """The same for the dense layers of the unpatched model."""
        return sum(line.count * line.dense for line in self.lines)

    def __str__(self) -> str:
        head = ("matrices", "form", "M x N", "columns", "factors", "runs", "in", "each moves", "each dense", "why")
        rows = [
            (
                f"{line.count} {line.kind}",
                line.form,
                f"{'+'.join(map(str, line.M))} x {line.N}",
                "+".join(map(str, line.C)),
                str(line.factors).removeprefix("torch."),
                f"{line.choice.impl} {line.choice.path}",
                line.way,
                _size(line.moved),
                _size(line.dense),
                line.choice.why_path,
            )
            for line in self.lines
        ]
        widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in (head, *rows)]
        ratio = (
            f"all layers: {_size(self.moved)} predicted to move, {self.moved / self.dense:.2f}x the dense layers "
            f"({_size(self.dense)})"
        )
        impls = [
            f"{impl}: {why}"
            for impl, why in dict.fromkeys((line.choice.impl, line.choice.why_impl) for line in self.lines)
        ]
        ways = [f"{way}: {why}" for way, why in dict.fromkeys((line.way, line.why_way) for line in self.lines) if why]
        return "\n".join((self.title, "", *table, "", ratio, *impls, *ways, *self.advice))

    __repr__ = __str__


def explain(
    model: nn.Module,
    batch: int | Mapping[str, Any] | torch.Tensor = 1,
    experts: str | Mapping[str, float] | Sequence[Any] | None = (),
    machine: Device | None = None,
) -> Explanation:
    """The kernel that every layer of a patched model runs for a forward of `batch`, why, and the bytes it moves.

    batch: a number of tokens; or input_ids [B, S], or the output of a tokenizer: B * S tokens
    experts: as in `bank.ids`: one name (or None, the base model) for all, or a list with one per sequence; (): unknown
    machine: another device than the model's
    Raises ValueError if the model is not patched, or for another kind of batch; KeyError for an unknown expert.
    """
    bank: ExpertBank | None = getattr(model, "t2_bank", None)
    if bank is None:
        raise InputError("the model is not patched; explain needs patch_model(model) first")
    B, S = _sizes(batch)
    machine = machine or dispatch.device_of(bank.device)
    dtype = getattr(model, "dtype", None) or torch.get_default_dtype()
    one, tokens = _shares(experts, B, S)
    counts: dict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
    for layers in _together(bank):
        first, _ = layers[0]
        M, C = tuple(layer.U.shape[-2] for layer, _ in layers), tuple(layer.Vt.shape[-2] for layer, _ in layers)
        N, delta = first.Vt.shape[-1], first.form == "delta"
        call = Call(B * S, N, M, C, dtype, first.Vt.dtype, one, tokens, base=delta, grad=bool(bank.in_training))
        choice = dispatch.choose(call, machine)
        weights = sum(_weight_bytes(model, layer, names, dtype) for layer, names in layers)
        dense = weights + dtype.itemsize * B * S * (N * len(layers) + sum(M))
        moved = bytes_moved(call, choice.path) + (dense if delta else 0)
        kind = " + ".join(_kind(names) for _, names in layers)
        how = _way(layers, bool(bank.in_training), choice.impl, machine)
        counts[first.form, M, N, C, first.Vt.dtype, choice, moved, dense, *how][kind] += len(layers[0][1])
    lines = tuple(Line(", ".join(kinds), sum(kinds.values()), *rest) for rest, kinds in counts.items())
    size = f"{_plural(B, 'sequence')} of {_plural(S, 'token')}" if S > 1 else _plural(B, "token")
    title = f"{type(model).__name__} on {machine.name}: {size}, {_experts_in_words(experts)}"
    return Explanation(title, lines, tuple(_advice(lines, one, bank)))


def _together(bank: ExpertBank) -> Iterator[list[tuple[SVFLinear, tuple[str, ...]]]]:
    """The bank's layers with their names, the members of a group in one list; alone where the group does not work, and
    while experts train."""

    def together(pair: tuple[SVFLinear, tuple[str, ...]]) -> int:
        layer, _ = pair
        shares = layer.group and not bank.in_training and layer.group.unshared() is None
        return id(layer.group if shares else layer)

    for _, found in groupby(bank.layers, together):
        yield list(found)


def _way(
    layers: Sequence[tuple[SVFLinear, tuple[str, ...]]], training: bool, impl: str, machine: Device
) -> tuple[str, str]:
    """`Line.way` and `Line.why_way` of layers that `_together` found."""
    first, _ = layers[0]
    if training:
        return "each matrix", "with gradients no two layers share a product; without, as if nothing were in training"
    parted = first.group.unshared() if first.group and len(layers) == 1 else None
    apart = f", of each layer alone: {parted}" if parted else ""
    if first.form == "factored":
        return "one call", apart.removeprefix(", ")
    if not isinstance(first, DeltaLinear):
        return "each matrix", "a stack is called by its mixture-of-experts layer"
    group = first.group if len(layers) > 1 and first.group else first.alone()
    if reason := group.unshared():
        return "after each layer", f"{reason}; its change is added to what the layer returns"
    if not group.overwrites():
        return "one call", f"a dense layer may keep what it returns, so y is a new tensor{apart}"
    if not dispatch.adds_in_place(impl, machine):
        return "one call", f"{impl} writes y into a new tensor{apart}"
    return "one call, in place", f"products and changes of layers that read the same input are made at once{apart}"


def _advice(lines: Sequence[Line], one: bool, bank: ExpertBank) -> Iterator[str]:
    factored = [line for line in lines if line.form == "factored"]
    if one and not bank.in_training:
        yield "one expert for everything: unpatch_model(model, expert=...) merges it; then only dense weights are read"
    if sum(x.count * x.moved for x in factored) > sum(x.count * x.dense for x in factored):
        yield "factored layers move more than dense ones would: form='delta' with a rank, or factors='int8', reads less"


def _kind(names: Sequence[str]) -> str:
    """The last part of a matrix's name; for the slices of a stack, the name of the stack."""
    return (names[0] if len(names) == 1 else names[0].rpartition(".")[0]).rpartition(".")[2]


def _weight_bytes(model: nn.Module, layer: SVFLinear, names: Sequence[str], dtype: torch.dtype) -> int:
    """Bytes of one dense weight: as stored in delta form, in the model's dtype in factored form, which dropped it."""
    if layer.form == "factored":
        return layer.U.shape[-2] * layer.Vt.shape[-1] * dtype.itemsize
    if len(names) == 1:
        return stored_bytes(layer.dense_module(model).weight)
    return stored_bytes(getattr(layer.dense_module(model), names[0].rsplit(".", 2)[1])) // len(names)


def _sizes(batch: int | Mapping[str, Any] | torch.Tensor) -> tuple[int, int]:
    if isinstance(batch, int) and not isinstance(batch, bool) and batch > 0:
        return batch, 1
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if isinstance(ids, torch.Tensor) and ids.dim() == 2:
        return ids.shape[0], ids.shape[1]
    raise InputError(
        f"batch is {type(batch).__name__}; wanted a number of tokens, input_ids [B, S], or the output of the tokenizer"
    )


def _shares(experts: Any, B: int, S: int) -> tuple[bool, tuple[tuple[int, int], ...] | None]:
    """(whether all tokens have one expert, ((expert, its tokens), ...) or None if unknown)."""
    if experts is None or isinstance(experts, (str, Mapping)):
        return True, None
    experts = [repr(e) for e in experts]
    if experts and len(experts) != B:
        raise InputError(f"{len(experts)} experts for {B} sequences; wanted one for each, one name for all, or ()")
    counts = Counter(experts)
    return len(counts) == 1, tuple((i, n * S) for i, n in enumerate(counts.values())) or None


def _experts_in_words(experts: Any) -> str:
    if experts is None or isinstance(experts, (str, Mapping)):
        return "the base model" if experts is None else f"all with expert {experts!r}"
    return f"{_plural(len({repr(e) for e in experts}), 'distinct expert')}" if len(experts) else "any experts"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"
