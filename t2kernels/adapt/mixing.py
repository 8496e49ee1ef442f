"""`Mixer`: many mixtures of a few experts as rows of the bank's table, by one small matrix product.

    "delta"        z' - 1 = Σ_k alpha_k (z_k - 1)
    "z"            z' = Σ_k alpha_k z_k                    the paper (arXiv 2501.06252, section 3.2)
    "normalised"   z' = Σ_k alpha_k z_k / Σ_k alpha_k      the base model where Σ alpha is 0
    "logits"       z' = m Σ sigma / Σ(sigma m), m = Σ_k alpha_k p_k    the authors' release, p the logits of an expert

The first three are the same where Σ alpha = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from t2kernels import InputError
from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.expert import Expert
from t2kernels.rollout.checks import check_setting

GRANULARITIES: tuple[str, ...] = ("expert", "layer", "matrix")
MIXINGS: tuple[str, ...] = ("delta", "z", "normalised", "logits")
RELEASE_START = 0.1
"""The release's p before training. Its trace normalisation turns that into the base model."""
EDGE = 1e-3
"""A sigmoid is cut to [EDGE, 1 - EDGE], so that it has a logit. A sum closer to 0 than EDGE does not divide."""


class Mixer:
    """alpha [P, E, G] -> z' - 1 of P mixtures, [P, C], C columns of the bank's table.

    experts: E names in the bank, or {name: Expert}
    per: an alpha of an expert holds for all of it ("expert", G = 1), for a block ("layer") or for a matrix ("matrix")
    mixing: one of the above; "z" and "logits" rescale every component, so the support must have them all
    logits: {name: {matrix: p [R]}} for "logits". For other experts p is computed from z as logit(z sigmoid(.1)), since
        the release starts at z = 1; that is right up to the one factor per matrix that trace normalisation removes.

    Raises ValueError: no experts, an unknown word, a support without some components; KeyError: an expert that is not
    in the bank.
    """

    def __init__(
        self,
        bank: ExpertBank,
        experts: Sequence[str] | Mapping[str, Expert],
        per: str = "expert",
        mixing: str = "delta",
        logits: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        for value, allowed, what in ((per, GRANULARITIES, "per"), (mixing, MIXINGS, "mixing")):
            check_setting(value in allowed, what, value, ", ".join(map(repr, allowed)))
        if isinstance(experts, str) or not len(experts):
            raise InputError(
                f"experts={experts!r}; wanted a list of names in the bank, or {{name: Expert}}, with at least one"
            )
        self.names: list[str] = list(experts)
        if len(set(self.names)) < len(self.names):
            raise InputError(f"experts={self.names}: a name occurs twice")
        self.bank: ExpertBank = bank
        self.per: str = per
        self.mixing: str = mixing
        found = experts if isinstance(experts, Mapping) else {name: bank[name] for name in self.names}
        rows = [bank.vector(e) for e in found.values()]
        self.vectors: Tensor = torch.stack(rows).to(bank.device)  # [E, C]
        self._spans = bank.spans
        if mixing in ("z", "logits"):
            self._need_all_components()
        if mixing == "logits":
            self._sigma = torch.cat([bank.sigma(n) for n in self._spans]).to(bank.device)
            self.vectors = torch.stack(
                [self._logits(row, (logits or {}).get(n)) for n, row in zip(self.names, self.vectors, strict=True)]
            )
        self.groups: list[list[slice]] = self._group()

    @property
    def shape(self) -> tuple[int, int]:
        """(E, G)."""
        return len(self.names), len(self.groups)

    def __call__(self, alpha: Tensor) -> Tensor:
        """z' - 1 [P, C] of alpha [P, E, G]. Raises ValueError for another shape."""
        if alpha.dim() != 3 or tuple(alpha.shape[1:]) != self.shape:
            raise InputError(f"alpha is {list(alpha.shape)}; wanted [P, {self.shape[0]}, {self.shape[1]}]")
        alpha = alpha.to(self.vectors)
        if self.mixing == "normalised":
            total = alpha.sum(1, keepdim=True)
            kept = total.abs() > EDGE
            alpha = torch.where(kept, alpha / torch.where(kept, total, 1), 0)
        out = self.vectors.new_zeros(len(alpha), self.vectors.shape[1])
        for g, parts in enumerate(self.groups):
            for part in parts:
                torch.mm(alpha[:, :, g], self.vectors[:, part], out=out[:, part])
        if self.mixing == "z":
            for g, parts in enumerate(self.groups):
                for part in parts:
                    out[:, part] += alpha[:, :, g].sum(1, keepdim=True) - 1
        elif self.mixing == "logits":
            for span in self._spans.values():
                m, sigma = out[:, span], self._sigma[span]
                total = (sigma * m).sum(1, keepdim=True)
                # All alphas 0: the release divides 0 by 0. Here that is the base model.
                kept = total.abs() > EDGE * sigma.sum()
                out[:, span] = torch.where(kept, m * (sigma.sum() / torch.where(kept, total, 1)) - 1, 0)
        return out

    def expert(self, alpha: Tensor, **manifest: Any) -> Expert:
        """The expert of alpha [E, G]. Its manifest records the mixture, and the facts in `manifest`."""
        return self.bank.from_vector(
            self(alpha[None])[0], **recorded(self.names, alpha, self.per, self.mixing), **manifest
        )

    def _group(self) -> list[list[slice]]:
        """The columns of each of the G alphas of an expert, in as few slices as possible."""
        keys: dict[object, list[slice]] = {}
        for name, span in self._spans.items():
            key = {"expert": 0, "matrix": name, "layer": next((p for p in name.split(".") if p.isdigit()), "")}[
                self.per
            ]
            parts = keys.setdefault(key, [])
            if parts and parts[-1].stop == span.start:
                parts[-1] = slice(parts[-1].start, span.stop)
            else:
                parts.append(span)
        return list(keys.values())

    def _need_all_components(self) -> None:
        partial = next((n for n in self._spans if self.bank.matrices[n] < self.bank.origin.ranks[n]), None)
        if partial:
            raise InputError(
                f"mixing={self.mixing!r} rescales every component, but {partial} has {self.bank.matrices[partial]} of "
                f"{self.bank.origin.ranks[partial]} in its support: patch with rank=None, or use mixing='delta'"
            )

    def _logits(self, row: Tensor, known: Mapping[str, Tensor] | None) -> Tensor:
        if known is None:
            start = torch.sigmoid(torch.tensor(RELEASE_START, dtype=torch.float32))
            return torch.logit(((1 + row) * start).clamp(EDGE, 1 - EDGE))
        out = torch.full_like(row, RELEASE_START)
        for name, p in known.items():
            if name not in self._spans or self.bank.matrices[name] != p.numel():
                raise InputError(
                    f"logits of {name} are {list(p.shape)}; wanted one for each component of a matrix of the model"
                )
            out[self._spans[name]] = p.to(out)
        return out


def recorded(names: Sequence[str], alpha: Tensor, per: str, mixing: str) -> dict[str, Any]:
    """The facts about a mixture of alpha [E, G] that its manifest records."""
    made_of = {name: [round(v, 6) for v in row] for name, row in zip(names, alpha.tolist(), strict=True)}
    return {"mixed": made_of, "mixing": mixing, "per": per}
