"""`Prepared`: the op for one group of matrices whose factors and table stay where they are, for a call at every token.

What does not depend on x (the choice of an implementation, addresses, sizes, strides) is looked up once. A call of the
op looks it up again: about 20 us, five times the work of a small layer's delta at one token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .device import Device
from .impls.implementation import InPlace
from .op import call_group, unobserved_input

KEPT = 256  # sizes of x that are remembered
CPU = torch.device("cpu")


class Prepared:
    """y_i = base_i + ((x V) * scale[expert_ids])_i U_iᵀ of one group, in one call.

    V: [N, C] the members' V side by side; Us: U_i [M_i, C_i]; scale: [E, C] fp32. They may change in place only.
    """

    def __init__(self, V: Tensor, Us: list[Tensor], scale: Tensor) -> None:
        self.V: Tensor = V
        self.Us: list[Tensor] = Us
        self.scale: Tensor = scale
        self._plain: bool = all(type(t) is Tensor for t in (V, scale, *Us))
        self._device: Device | None = None
        self._runs: dict[tuple[torch.Size, torch.dtype, bool], InPlace | None] = {}

    def add(self, x: Tensor, expert_ids: Tensor, bases: list[Tensor]) -> list[Tensor]:
        """y_i [..., M_i] of each member. The memory of the bases may be used for them: nobody else may hold the bases.

        x: [..., N]; expert_ids: as in `svf_linear`; bases: base_i [..., M_i] in x's dtype
        """
        run = self._prepared(x, expert_ids)
        if run is not None and run(x, expert_ids, bases, None):
            return bases
        return call_group(x, self.V, self.Us, self.scale, expert_ids, bases, [])

    def add_within(self, x: Tensor, expert_ids: Tensor, y: Tensor, starts: Sequence[int]) -> bool:
        """Add the change of each member to its columns of y, in place. False: that cannot be, and nothing was done.

        x: [..., N]; expert_ids: as in `svf_linear`; y: [..., M] in x's dtype; starts: the first column of each member,
            rising; their M_i columns must not overlap, nor pass M
        """
        run = self._prepared(x, expert_ids)
        return run is not None and run(x, expert_ids, [y], starts)

    def prepared(self, x: Tensor, expert_ids: Tensor) -> InPlace | None:
        """What `add_within` runs for such an x and such ids, for calls that nobody watches; None: nothing is run."""
        return self._prepared(x, expert_ids)

    def _prepared(self, x: Tensor, expert_ids: Tensor) -> InPlace | None:
        if not (self._plain and unobserved_input(x, expert_ids)):
            return None
        device = dispatch.probe(CPU)  # where all unobserved inputs are
        if device is not self._device or len(self._runs) >= KEPT:
            self._device, self._runs = device, {}
        key = x.shape, x.dtype, expert_ids.numel() == 1
        if key not in self._runs:
            self._runs[key] = dispatch.prepare(x, self.V, self.Us, self.scale, expert_ids)
        return self._runs[key]
