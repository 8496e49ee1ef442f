"""`Origin`: what a patched model knows of the factors that it was patched with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from t2kernels.factors.factor import Factor
from t2kernels.factors.identity import combine_fingerprints, fingerprint, sketch
from t2kernels.factors.int8 import Int8Factor


@dataclass
class Origin:
    """The identity of a model's factors: experts are checked against it and carry it in their manifest.

    base_model: name or path of the model
    revision: of the model on the hub
    sigmas: {matrix: [R] fp32}; shorter if only the leading components are known
    sketches: {matrix: [R]} (`factors.sketch`)
    fingerprints: {matrix: sha256 of its factors}
    ranks: {matrix: min(M, N)}
    """

    base_model: str | None = None
    revision: str | None = None
    sigmas: dict[str, Tensor] = field(default_factory=dict)
    sketches: dict[str, Tensor] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def record(
        self, name: str, factor: Factor | Int8Factor, print_: str | None = None, sketched: Tensor | None = None
    ) -> None:
        """Add the factors of one matrix.

        print_, sketched: their fingerprint and sketch, if known; else they are computed
        """
        self.sigmas[name] = factor.sigma.float().cpu().clone()
        self.sketches[name] = (sketch(factor) if sketched is None else sketched).cpu().clone()
        self.fingerprints[name] = fingerprint(factor) if print_ is None else print_
        self.ranks[name] = min(factor.U.shape[0], factor.V.shape[0])

    @property
    def manifest(self) -> dict[str, str | None]:
        """{"base_model", "revision"}, as `Factors.manifest` has them."""
        return {"base_model": self.base_model, "revision": self.revision}

    @property
    def fingerprint(self) -> str:
        """One fingerprint for all matrices."""
        return combine_fingerprints(self.fingerprints)

    def spectrum(self, name: str, length: int) -> Tensor:
        """[>= length] fp32 singular values of a matrix. The last known one stands for all that are not known."""
        sigma = self.sigmas[name]
        missing = length - len(sigma)
        return torch.cat([sigma, sigma[-1:].expand(missing)]) if missing > 0 else sigma

    def __contains__(self, name: object) -> bool:
        return name in self.sigmas
