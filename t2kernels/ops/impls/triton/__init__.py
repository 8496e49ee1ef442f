"""impl="triton": Triton kernels for NVIDIA GPUs. This file imports without Triton.

Dtypes. Products are made in x's dtype, sums in fp32. `scale` is multiplied in fp32. g and y are rounded once each. The
pairs that differ:

- int8 factors are converted to x's dtype, exactly.
- fp16 factors with bf16 x: products in fp16, x and g times 2^-5, the sum times 2^5, so that nothing below 65504 * 32
  (about 2e6) overflows. An x or g below 2^-9 loses its last bits (an error of 2^-20 at most).
- bf16 factors with fp16 x are converted to fp16; any factors with fp32 x are converted to fp32, without tf32.

A row of `scale` that is zero returns base bit for bit.

Factors are read along their contiguous size: V as the view of a contiguous Vᵀ [C, N], U_i as contiguous [M_i, C_i].
Others are copied first.
"""

from __future__ import annotations

import importlib.util
import os
from importlib import metadata
from typing import ClassVar

import torch
from torch import Tensor

from t2kernels.ops.device import Device
from t2kernels.ops.impls.implementation import Expansion, Implementation, InPlace, Operands
from t2kernels.ops.impls.torch_kernels import ScaleRows, Torch
from t2kernels.ops.planner import Call, Choice, Path, dense_path
from t2kernels.ops.tuning.tables import read_table
from t2kernels.ops.tuning.tiles import MEMBERS


class Triton(Torch):
    """The Triton kernels: two skinny launches for few tokens, torch's matmuls around a Triton pass for many."""

    name = "triton"
    fused_paths: ClassVar[tuple[str, ...]] = ("pair",)

    @property
    def row_scaling(self) -> ScaleRows:
        """The row scaling between the two products."""
        from .matmul import row_scaling

        return row_scaling

    def prepare(self, V: Tensor, Us: list[Tensor], scale: Tensor) -> InPlace | None:
        """See `Implementation`: the kernels write new tensors."""
        return None

    def unsupported_device(self, device: torch.device) -> str | None:
        """See `Implementation`."""
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 't2kernels[gpu]'"
        if device.type == "cpu":
            if os.environ.get("TRITON_INTERPRET") != "1":
                return "Triton needs a GPU; on the CPU there is only its interpreter, for tests (TRITON_INTERPRET=1)"
            return None
        if device.type != "cuda":
            return f"the Triton kernels are written for NVIDIA GPUs, not for {device.type}"
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} finds no GPU here"
        if torch.version.hip:
            return "the Triton kernels are written for NVIDIA GPUs, and this torch is built for AMD"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "TRITON_INTERPRET=1 is set: Triton runs on the CPU only"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            name, (major, minor) = torch.cuda.get_device_name(device), capability
            return f"the Triton kernels need compute capability 8.0 (A100) or later; {name} has {major}.{minor}"
        return None

    def probe(self, device: torch.device, found: Device) -> Device:
        """See `Implementation`; `auto` trusts it on a GPU whose table says that it was checked there."""
        if device.type == "cpu":
            found = found.distrusting(self.name, "its interpreter is for checks")
        if reason := self.unsupported_device(device):
            return found.without(self.name, reason)
        if device.type != "cuda":
            return found
        table = read_table(found.name, metadata.version("triton"))
        if table is None or not table.get("checked"):
            reason = "its kernels have not been checked on this kind of GPU; `t2 tune` does that"
            return found.distrusting(self.name, reason)
        return found._replace(pair_tokens=table.get("pair_tokens", found.pair_tokens))

    def unsupported(self, call: Call) -> str | None:
        """See `Implementation`."""
        return Implementation.unsupported(self, call)

    def path(self, call: Call, device: Device) -> Path:
        """See `Implementation`."""
        if dense := dense_path(call):
            return dense
        if call.grad:
            return Path("mm", "two matmuls around a row scaling")
        if len(call.M) > MEMBERS:
            return Path("mm", f"more than {MEMBERS} matrices: library matmuls around a row scaling")
        if call.T > device.pair_tokens:
            return Path("mm", f"more than {device.pair_tokens} tokens: library matmuls around a row scaling")
        return Path("pair", f"at most {device.pair_tokens} tokens: skinny kernels")

    def forward(self, choice: Choice, given: Operands) -> list[Tensor]:
        """See `Implementation`."""
        if choice.path == "pair":
            from .launch_pair import forward_pair

            return forward_pair(*given)
        return super().forward(choice, given)

    def shrink(self, choice: Choice, x: Tensor, V: Tensor, scale: Tensor, expert_ids: Tensor) -> Tensor:
        """See `Implementation`."""
        if choice.path == "pair":
            from .launch_pair import shrink

            return shrink(x, V, scale, expert_ids)
        return super().shrink(choice, x, V, scale, expert_ids)

    def expand(self, choice: Choice, given: Expansion) -> list[Tensor]:
        """See `Implementation`."""
        if choice.path == "pair":
            from .launch_pair import expand

            return [y.reshape(*given.lead, y.shape[-1]) for y in expand(*given[:5])]
        return super().expand(choice, given)

    def swiglu(self, given: Operands) -> Tensor:
        """See `Implementation`."""
        from .launch_pair import forward_swiglu

        return forward_swiglu(*given)

    def backward(
        self, dys: list[Tensor], given: Operands, need_dx: bool, need_dscale: bool, h: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Implementation`."""
        from .matmul import backward

        return backward(dys, *given[:5], need_dx, need_dscale, h)


TRITON = Triton()
