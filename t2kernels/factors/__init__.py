"""W = U diag(sigma) Vᵀ: compute the factors, keep them, recognise them."""

from .factor import Factor, svd
from .store import Factors

__all__ = ["Factor", "Factors", "svd"]
