"""W = U diag(sigma) Vᵀ: compute the factors, keep them, recognise them."""

from .store import Factor, Factors, svd

__all__ = ["Factor", "Factors", "svd"]
