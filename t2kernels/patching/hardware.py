"""GPUs by name, with the published numbers that `budget.plan` calculates with."""

from __future__ import annotations

from typing import NamedTuple

from t2kernels import UnknownNameError


class Gpu(NamedTuple):
    """One GPU as its data sheet states it.

    memory: bytes; bandwidth: of the memory, bytes a second; peak: bf16 operations a second, without sparsity
    source: of the numbers
    """

    name: str
    memory: float
    bandwidth: float
    peak: float
    source: str


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80e9, 2.039e12, 312e12, "NVIDIA A100 data sheet, SXM 80 GB"),
        Gpu("h100", 80e9, 3.35e12, 989.5e12, "NVIDIA H100 data sheet, SXM"),
        Gpu("h200", 141e9, 4.8e12, 989.5e12, "NVIDIA H200 data sheet, SXM"),
        Gpu("l40s", 48e9, 0.864e12, 362e12, "NVIDIA L40S data sheet"),
    )
}


def gpu_by_name(name: str) -> Gpu:
    """Raises UnknownNameError that lists the names."""
    if name.lower() not in GPUS:
        raise UnknownNameError(f"no GPU {name!r} is known; there are {', '.join(GPUS)}")
    return GPUS[name.lower()]
