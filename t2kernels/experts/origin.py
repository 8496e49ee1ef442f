"""`Origin`: what a patched model remembers of the factors it stands on, so that experts can be checked against it and stamped with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from t2kernels.factors.factor import Factor
from t2kernels.factors.identity import combine_fingerprints, fingerprint, sketch
from t2kernels.factors.int8 import Int8Factor
from t2kernels.layers.scale import truncation_error

from .expert import Expert


@dataclass
class Origin:
    """All by matrix name.

    sigmas: [R] fp32 (shorter where only the leading components are known); sketches: [R] likewise; fingerprints: sha256 of the factors
    ranks: min(M, N); base_model: name or path of the model, for messages
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
        """Note the factors of one matrix; fingerprint and sketch are computed unless given."""
        self.sigmas[name] = factor.sigma.float().cpu().clone()
        self.sketches[name] = (sketch(factor) if sketched is None else sketched).cpu().clone()
        self.fingerprints[name] = fingerprint(factor) if print_ is None else print_
        self.ranks[name] = min(factor.U.shape[0], factor.V.shape[0])

    @property
    def manifest(self) -> dict:
        return {"base_model": self.base_model, "revision": self.revision}

    @property
    def fingerprint(self) -> str:
        return combine_fingerprints(self.fingerprints)

    def __contains__(self, name: object) -> bool:
        return name in self.sigmas

    def stamp(self, z: Mapping[str, Tensor], manifest: Mapping) -> Expert:
        """An expert that says which factors it belongs to."""
        return Expert.trained_on(self, z, **manifest)

    def check(self, expert: Expert) -> None:
        """Raises ExpertMismatch where the expert is for other matrices or other factors."""
        expert.check(self.sigmas, self.sketches, self.fingerprints, self.ranks)

    def truncation_error(self, name: str, z: Tensor, k: int) -> float:
        """The share of the expert's change to a matrix (spectral norm) that is lost if only the first k components are kept.

        Where singular values beyond the known ones would be needed, the last known one bounds them from above.
        """
        if len(z) <= k:
            return 0.0
        sigma = self.sigmas[name]
        if len(sigma) < len(z):
            sigma = torch.cat([sigma, sigma[-1:].expand(len(z) - len(sigma))])
        return truncation_error(z, sigma, k)
