"""Which tiles are worth a timing: seconds predicted from bytes, thread blocks and what is in flight.

The prediction only ranks the tiles of one launch. Its constants are those of data sheets; none was measured here.
"""

from __future__ import annotations

import math
from collections import Counter

import torch

from .tiles import SMS, Tiles, cdiv, choices, shared_bytes, step_bytes

KEEP = 8
"""Tiles of one launch that are timed, the rule's among them."""
# Bytes a second of memory by major capability: A100, H100, B200; and how much faster the L2 cache is.
_MEMORY = {8: 1.6e12, 9: 3.35e12, 10: 8e12}
_L2 = 2.5
_LATENCY = (
    0.8e-6  # from asking for a tile to having it: bytes in flight below _MEMORY * _LATENCY do not fill the memory
)
_STEP = 0.1e-6  # of one step of a sum, beyond its bytes: a barrier and the address of the next
_REGISTERS, _FEW, _MOST = 65536, 64, 255  # of a multiprocessor; of a thread beside its sums, and at most
_ALIKE = 3  # tiles of one BR and split: the prediction may be wrong of all of them
_WARPS = 64  # of a multiprocessor


def resident(t: Tiles, kernel: str, x_dtype: torch.dtype, w_dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """Thread blocks that one multiprocessor holds at once, by shared memory, registers and warps; at least 1."""
    shared = (t.stages + (capability[0] >= 9)) * step_bytes(t, kernel, x_dtype, w_dtype) + 1024
    sums = (2 if kernel == "swiglu" else 1) * t.BR * t.BT // (32 * t.warps)
    registers = min(_MOST, _FEW + 2 * sums) * 32 * t.warps
    return max(1, min(shared_bytes(capability) // shared, _REGISTERS // registers, _WARPS // t.warps))


def seconds(
    t: Tiles,
    kernel: str,
    T: int,
    rows: int,
    K: int,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    capability: tuple[int, int],
) -> float:
    """Predicted seconds of a launch of shrink, expand or swiglu. Arguments as in `tiles.tiles`."""
    sms, memory = SMS.get(capability[0], 132), _MEMORY.get(capability[0], 3.35e12)
    factors = 2 if kernel == "swiglu" else 1
    blocks = cdiv(rows, t.BR) * cdiv(T, t.BT) * t.split
    places = sms * resident(t, kernel, x_dtype, w_dtype, capability)
    waves = blocks / places
    ahead = min(blocks, places) * factors * t.stages * t.BR * t.BK * w_dtype.itemsize
    reach = min(1.0, ahead / (memory * _LATENCY))
    read = factors * rows * K * w_dtype.itemsize / (memory * reach) * (math.ceil(waves) / waves if waves > 1 else 1)
    activations = blocks * K / t.split * t.BT * x_dtype.itemsize
    parts = 2 * t.split * T * rows * 4 if t.split > 1 else 0
    steps = cdiv(K, t.BK * t.split) * math.ceil(waves)
    return max(read, (activations + parts) / (_L2 * memory)) + steps * _STEP


def candidates(
    kernel: str, T: int, rows: int, K: int, x_dtype: torch.dtype, w_dtype: torch.dtype, capability: tuple[int, int]
) -> list[Tiles]:
    """The tiles that `t2 tune` times: the rule's choice first, then the best predicted, `KEEP` at most."""
    first, *others = choices(kernel, T, rows, K, x_dtype, w_dtype, capability)

    def predicted(t: Tiles) -> float:
        return seconds(t, kernel, T, rows, K, x_dtype, w_dtype, capability)

    different, alike, seen = [first], [], Counter([(first.BR, first.split)])
    for t in sorted(others, key=predicted):
        seen[t.BR, t.split] += 1
        (different if seen[t.BR, t.split] <= _ALIKE else alike).append(t)
    return [*different, *alike][:KEEP]
