"""Factors that a forward writes: the kernels that read them may start before the kernel that wrote them has ended.

On sm_90 and later the kernels of ops/impls start under the kernel before them and load factors at once (programmatic
dependent launch); only what they load later waits for its end. Other streams wait for nothing. So whoever writes a
factor while a model runs calls `finish` before anything reads it.
"""

from __future__ import annotations

import torch


def finish(device: torch.device) -> None:
    """Wait until the current stream of a GPU has done what it was given. Nothing on a CPU: its writes are in order."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def capturing(device: torch.device) -> bool:
    """True while the current stream records a CUDA graph: nothing runs, and nothing may be waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
