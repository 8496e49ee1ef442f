"""What a device can run, found out once: what the planner needs to know of it."""

from __future__ import annotations

import functools
from importlib import metadata

import torch

from t2kernels.ops.tuning.tiles import read_cuda_table, read_table

from .impls import cpp_kernels, cuda_kernels
from .impls import triton as triton_kernels
from .planner import DECODE_TOKENS, PAIR_TOKENS, Machine


@torch.compiler.assume_constant_result  # a compiler need not look at how it is found out
def machine_of(device: torch.device) -> Machine:
    """The `Machine` of a device."""
    return _machine(device.type, device.index)


@functools.cache
def _machine(kind: str, index: int | None) -> Machine:
    device = torch.device(kind, index)
    missing = {}
    if no_cuda := cuda_kernels.why_not(device):
        missing["cuda"] = no_cuda
    if cpp := cpp_kernels.why_not(device):
        missing["cpp"] = cpp
    if why := triton_kernels.why_not(device):
        missing["triton"] = why
    name, unchecked, pair_tokens, decode_tokens, isa = kind, {}, PAIR_TOKENS, DECODE_TOKENS, ""
    if kind == "cpu":
        unchecked["triton"] = "its interpreter is for checks"
        if not cpp:
            isa = cpp_kernels.isa()
            name = f"{kind} ({isa})"
            if isa == "portable":
                unchecked["cpp"] = "without AVX2 it is slower than torch"
    elif kind == "cuda":
        name = torch.cuda.get_device_name(device)
        table = None if why else read_table(name, metadata.version("triton"))
        if table is None or not table.get("checked"):
            unchecked["triton"] = "its kernels have not been checked on this kind of GPU; `t2 tune` does that"
        else:
            pair_tokens = table.get("pair_tokens", pair_tokens)
        table = None if no_cuda else read_cuda_table(name)
        if table is None or not table.get("checked"):
            unchecked["cuda"] = "its kernel has not been checked on this kind of GPU; `t2 tune` does that"
        else:
            decode_tokens = tuple(table.get("decode_tokens", decode_tokens))
    return Machine(kind, name, tuple(missing.items()), tuple(unchecked.items()), pair_tokens, decode_tokens, isa)
