"""`Settings`: what an engine knows about its experts, carried in vLLM's `additional_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from t2kernels import InputError
from t2kernels.factors.factor import resolve_rank

KEY = "t2kernels"
"""The key of `additional_config` that holds the settings."""
FORMS = ("delta", "factored")
LAYOUTS = ("auto", "replicate", "shard")


@dataclass(frozen=True)
class Settings:
    """factors: the directory that `t2 decompose` wrote (delta form); None: they are in the checkpoint (factored form)
    rank: leading components that an expert may rescale, as in `patch_model`; None: all
    max_error: largest truncation error of an expert, as in `ExpertBank.add`
    layout: of factors over tensor-parallel ranks, "replicate", "shard" or "auto"; delta form always replicates
    fingerprint: of the factors; vLLM's compile cache hashes these settings, so other factors get another graph

    Raises ValueError for a rank or a layout that does not exist.
    """

    factors: str | None = None
    rank: int | float | None = None
    max_error: float = 0.1
    layout: str = "auto"
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        resolve_rank(self.rank, 1)
        if self.layout not in LAYOUTS:
            raise InputError(f"layout={self.layout!r}; wanted one of {', '.join(map(repr, LAYOUTS))}")

    @classmethod
    def of(cls, config: Any) -> Settings | None:
        """The settings in a `VllmConfig`; None if it has none.

        Raises ValueError if the entry does not have the fields of `Settings`.
        """
        given = config.additional_config
        if not isinstance(given, Mapping) or KEY not in given:
            return None
        known = {f.name for f in fields(cls)}
        if not isinstance(given[KEY], Mapping) or not known.issuperset(given[KEY]):
            raise InputError(
                f"additional_config[{KEY!r}] is {given[KEY]!r}; wanted a mapping with {', '.join(sorted(known))}"
            )
        return cls(**given[KEY])
