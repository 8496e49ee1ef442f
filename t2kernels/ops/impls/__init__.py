"""The implementations of the op: torch, C++, Triton, CUDA."""
