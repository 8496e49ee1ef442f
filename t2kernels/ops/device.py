"""What the dispatcher knows of a device. `dispatch.device_of` finds it out, once for each device."""

from __future__ import annotations

from typing import NamedTuple

# Up to this many tokens Triton's two skinny kernels, whose tiles are made for streaming weights, are ahead of two
# library matmuls around a row scaling. Predicted for an H200 from a time model (crossover at 128 to 160 tokens).
# `t2 tune` replaces it by a measured number.
PAIR_TOKENS = 160
# Up to this many tokens `auto` prefers the CUDA kernel, for factors of 16 and of 8 bits. Every 16 rows of a factor read
# all of x again, from L2: above these numbers this traffic passes that of the factor. Computed; `t2 tune` replaces it
# by a measured number. The kernel itself takes 32.
DECODE_TOKENS = (16, 8)


class Device(NamedTuple):
    """One device, and the implementations of the op on it.

    kind, name: "cpu" or "cuda"; the name of the CPU's instruction set or of the GPU
    missing: ((implementation, why it cannot run here), ...)
    unchecked: ((implementation, why `auto` does not trust it here yet), ...)
    pair_tokens, decode_tokens: cut-overs of the Triton and CUDA kernels
    isa: instruction set of the C++ kernels on a CPU
    stream_tokens: (("DTYPE_OF_X DTYPE_OF_FACTORS", cut-over of the C++ kernels), ...) as `t2 tune` measured it here
    """

    kind: str = "cpu"
    name: str = "CPU"
    missing: tuple[tuple[str, str], ...] = ()
    unchecked: tuple[tuple[str, str], ...] = ()
    pair_tokens: int = PAIR_TOKENS
    decode_tokens: tuple[int, int] = DECODE_TOKENS
    isa: str = ""
    stream_tokens: tuple[tuple[str, int], ...] = ()

    def unsupported(self, impl: str) -> str | None:
        """Why an implementation cannot run on this device, or None."""
        return dict(self.missing).get(impl)

    def trusts(self, impl: str) -> bool:
        """True if `auto` may take an implementation here."""
        return all(name != impl for name, _ in (*self.missing, *self.unchecked))

    def without(self, impl: str, reason: str) -> Device:
        """The device, where an implementation cannot run."""
        return self._replace(missing=(*self.missing, (impl, reason)))

    def distrusting(self, impl: str, reason: str) -> Device:
        """The device, where `auto` does not take an implementation."""
        return self._replace(unchecked=(*self.unchecked, (impl, reason)))
