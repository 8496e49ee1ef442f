"""t2kernels."""
