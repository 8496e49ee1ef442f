"""What a device can run, found out once: what the planner needs to know of it."""

from __future__ import annotations

import functools

import torch

from . import triton_kernels
from .planner import Machine


def machine_of(device: torch.device) -> Machine:
    """The `Machine` of a device."""
    return _machine(device.type, device.index)


@functools.cache
def _machine(kind: str, index: int | None) -> Machine:
    device = torch.device(kind, index)
    missing = {"cuda": "this version of t2kernels has no CUDA kernel"}
    if why := triton_kernels.why_not(device):
        missing["triton"] = why
    unchecked = {"triton": "its kernels have not been checked on this device; `t2 tune` does that"}
    name = torch.cuda.get_device_name(device) if kind == "cuda" else kind
    return Machine(kind, name, tuple(missing.items()), tuple(unchecked.items()))
