"""The protocol of an implementation of the op.

A new kernel is one file with a subclass of `Implementation`, and one line in `dispatch.IMPLEMENTATIONS`.

An implementation says what it cannot do in one vocabulary: `unsupported_device`, `unsupported` and `unsupported_layout`
return the reason in words, or None if there is none. `slower` does the same for calls that it could run, but that
`auto` should give to another implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from t2kernels.ops.device import Device
from t2kernels.ops.planner import Call, Choice, Path

Added = Sequence[Tensor | None]
"""Bases or biases of the members; None for members without."""


InPlace = Callable[[Tensor, Tensor, list[Tensor], Sequence[int] | None], bool]
"""(x, expert_ids, bases, starts): adds the change of each member to its base, in place. starts: None; or the columns at
which the members' bases begin in the only tensor of `bases`. False: these tensors lie in memory as it cannot take them,
and nothing was done."""


class Operands(NamedTuple):
    """The tensors of a call.

    x: [..., N]
    V: [N, C] the members' V side by side
    Us: U_i [M_i, C_i] of each member; C is the sum of the C_i
    scale: [E, C] fp32
    expert_ids: rows of scale; its shape is a leading part of x.shape[:-1]
    bases, biases: [..., M_i] and [M_i], or None, for each member
    """

    x: Tensor
    V: Tensor
    Us: list[Tensor]
    scale: Tensor
    expert_ids: Tensor
    bases: Added
    biases: Added


class Expansion(NamedTuple):
    """The operands of the second half of a call.

    g: [T, C] from `Implementation.shrink`; Us, bases, biases: as in `Operands`
    dtype, lead: dtype and leading sizes of the x that g was made from
    """

    g: Tensor
    Us: list[Tensor]
    bases: Added
    biases: Added
    dtype: torch.dtype
    lead: torch.Size


class Implementation(ABC):
    """One implementation of y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ + bias_i.

    `choice`, an argument of the methods that run something, is what `dispatch` chose; its path says which kernels.
    """

    name: ClassVar[str]
    merit: ClassVar[str] = "checked on"
    """Why `auto` takes it, followed by the name of the device."""
    strict: ClassVar[bool] = False
    """Whether `unsupported_layout` must be asked."""
    shares_g: ClassVar[bool] = True
    """Whether its g has the dtype and units of `precision.forward_precision`, so that others can expand it."""
    fused_paths: ClassVar[tuple[str, ...]] = ()
    """The paths on which `swiglu` exists."""

    @abstractmethod
    def unsupported_device(self, device: torch.device) -> str | None:
        """Why it cannot run for tensors on a device, or None."""

    def probe(self, device: torch.device, found: Device) -> Device:
        """`found`, completed by the facts about this implementation on the device."""
        reason = self.unsupported_device(device)
        return found if reason is None else found.without(self.name, reason)

    def unsupported(self, call: Call) -> str | None:
        """Why it cannot compute a call on any device, or None."""
        return "float64 is for checks, on impl='torch'" if call.x == torch.float64 else None

    def unsupported_layout(self, x: Tensor, V: Tensor | None, Us: list[Tensor]) -> str | None:
        """Why it cannot read tensors as they lie in memory, or None. For half of the op V is None or Us is empty."""
        return None

    def slower(self, call: Call, device: Device) -> str | None:
        """Why `auto` should not take it for a call, although it could run it; or None."""
        return None

    @abstractmethod
    def path(self, call: Call, device: Device) -> Path:
        """The path that it takes for a call."""

    @abstractmethod
    def forward(self, choice: Choice, given: Operands) -> list[Tensor]:
        """y_i [..., M_i] of each member."""

    @abstractmethod
    def shrink(self, choice: Choice, x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor) -> Tensor:
        """g = (x V) * scale[expert_ids], [T, C]: the first half."""

    @abstractmethod
    def expand(self, choice: Choice, given: Expansion) -> list[Tensor]:
        """y_i = base_i + g_i U_iᵀ + bias_i, [*lead, M_i] in dtype: the second half."""

    def prepare(self, V: Tensor, Us: list[Tensor], scale: Tensor) -> InPlace | None:
        """The op for a group whose tensors change in place only, with all that can be known before a call looked up.

        None: this implementation has nothing to look up.
        """
        return None

    def swiglu(self, given: Operands) -> Tensor:
        """silu(y_0) * y_1 [..., M] of two members, without writing either to memory. Exists on `fused_paths`."""
        raise NotImplementedError(f"impl={self.name!r} has no fused activation")

    def forward_saving(self, given: Operands) -> tuple[list[Tensor], Tensor]:
        """y_i of each member, and h = x V [T, C] for `backward`."""
        raise NotImplementedError(f"impl={self.name!r} has no backward")

    def backward(
        self, dys: list[Tensor], given: Operands, need_dx: bool, need_dscale: bool, h: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """p = dy U;  dx = (p * scale[expert_ids]) Vᵀ;  dscale[e] = sum over the tokens of e of (x V) * p, in fp32.

        h: x V as `forward_saving` returned it; None: computed again. A gradient that is not needed is empty, [0].
        """
        raise NotImplementedError(f"impl={self.name!r} has no backward")
