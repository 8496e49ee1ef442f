"""What a device can run, found out once: what the planner needs to know of it."""

from __future__ import annotations

import functools

import torch

from .planner import Machine


def machine_of(device: torch.device) -> Machine:
    """The `Machine` of a device."""
    return _machine(device.type, device.index)


@functools.cache
def _machine(kind: str, index: int | None) -> Machine:
    missing = {"cuda": "this version of t2kernels has no CUDA kernel", "triton": "this version of t2kernels has no Triton kernel"}
    name = torch.cuda.get_device_name(index) if kind == "cuda" else kind
    return Machine(kind, name, tuple(missing.items()))
