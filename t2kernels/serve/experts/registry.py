"""`ExpertRegistry`: the served experts, by name and version.

A name stands for one version of an expert. A request takes the version that its name stands for when it arrives, and
keeps it to its end. Each version is an expert of its own in the bank. It leaves the bank when neither a name nor a
request uses it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.exchange.lora import LoraAdapter
from t2kernels.experts.expert import Expert, ExpertError
from t2kernels.experts.names import AUTO, BASE, MIX, Name, check_name, parse_mixture, same_file, write_mixture
from t2kernels.factors.identity import ExpertMismatch
from t2kernels.serve.http.errors import APIError, bad

from .counters import RowCounters

logger: logging.Logger = logging.getLogger(__name__)

MIXED = "mix"
REMOVED = "removed"
RESERVED = (BASE, AUTO, MIXED, REMOVED, "none")
"""Names that mean something else, in requests or as a label of metrics."""
MOST_IN_A_MIXTURE = 16


@dataclass(eq=False)
class Version:
    """One version of an expert.

    name: in requests; key: its name in the bank; digest: hash of its values; numbers: how many values it has
    manifest: of its file; created: Unix time; users: number of names and requests that use it
    """

    name: str
    key: str
    digest: str
    numbers: int
    manifest: dict[str, Any]
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0

    @property
    def adapter(self) -> bool:
        """Whether it is a LoRA adapter."""
        return self.manifest.get("kind") == "lora"


@dataclass
class Chosen:
    """The expert of a request.

    label: for metrics and answers; expert: for the bank; fingerprint: names the versions in the answer
    held: versions that stay in the bank until `ExpertRegistry.release`
    """

    label: str
    expert: Name
    fingerprint: str
    held: list[Version]


class ExpertRegistry:
    """The experts that requests can name.

    bank: of the served model; base: names of the base model, besides "base"
    """

    bank: ExpertBank
    base: dict[str, None]
    current: dict[str, Version]
    """The version that each name stands for."""
    epoch: int
    """Grows whenever a name changes its meaning."""
    counts: RowCounters
    """Loads and evictions by label."""

    def __init__(self, bank: ExpertBank, base: Sequence[str] = ()) -> None:
        self.bank = bank
        self.base = dict.fromkeys((*base, BASE))
        self.current = {}
        self.epoch = 0
        self._made = 0
        self.counts = RowCounters(bank, lambda key: self.label(key.partition("@")[0]), MIXED)

    def label(self, name: str) -> str:
        """The label of a name in metrics: the name itself while it is served, "mix" for mixtures, else "removed"."""
        return name if name in self.current or name in (BASE, MIXED) else REMOVED

    # --- choosing

    def choose(self, model: str) -> Chosen:
        """The expert that `model` of a request names, held for the caller.

        model: a name of the base model, of an expert, or a mixture such as "mix:math=0.5,code=0.5"
        Raises APIError 404 or 400.
        """
        if model in self.base:
            return Chosen(BASE, None, BASE, [])
        if model.startswith(MIX):
            return self._mixture(model)
        version = self._find(model)
        return self._hold(Chosen(model, version.key, f"{model}-{version.digest}", [version]))

    def of_names(self, name: Name) -> Chosen:
        """Like `choose`, for the choice of a strategy: None, an expert's name, or {name: weight}."""
        if isinstance(name, dict):
            return self._mixture(write_mixture(name))
        return self.choose(BASE if name is None else name)

    def share(self, chosen: Chosen) -> Chosen:
        """Hold the same expert for one more request."""
        return self._hold(replace(chosen, held=list(chosen.held)))

    def release(self, chosen: Chosen) -> None:
        """Let go of the expert of a request that has ended. Later calls do nothing."""
        for version in chosen.held:
            self._drop(version)
        chosen.held = []

    def _mixture(self, model: str) -> Chosen:
        try:
            weights = parse_mixture(model)
        except ValueError as error:
            raise bad(f"model {error}", "model") from None
        if len(weights) > MOST_IN_A_MIXTURE:
            raise bad(f"model {model!r}: {len(weights)} experts, at most {MOST_IN_A_MIXTURE} are mixed", "model")
        # The base model's share is what the weights leave: 1 + sum of weight (z - 1).
        parts = [(self._find(name), weight) for name, weight in weights.items() if name not in self.base]
        fingerprint = "+".join(f"{v.name}-{v.digest}*{weight:g}" for v, weight in parts) or BASE
        return self._hold(Chosen(MIXED, {v.key: weight for v, weight in parts}, fingerprint, [v for v, _ in parts]))

    def _find(self, name: str) -> Version:
        if name not in self.current:
            known = ", ".join([*list(self.base)[:1], *self.current])
            raise APIError(404, f"the model {name!r} does not exist; there are {known}", "model_not_found", "model")
        return self.current[name]

    def _hold(self, chosen: Chosen) -> Chosen:
        for version in chosen.held:
            version.users += 1
        return chosen

    def _drop(self, version: Version) -> None:
        version.users -= 1
        if not version.users:
            self.discard(version.key)

    def discard(self, key: str) -> None:
        """Take a version out of the bank, if it is there. Its counts stay with its name's label."""
        if key in self.bank:
            self.bank.remove(key)
        self.counts.fold(key, self.label(key.partition("@")[0]))

    # --- adding and removing

    def check_name(self, name: str) -> str:
        """The name, if an expert may have it. Raises APIError 400."""
        try:
            taken = check_name(name) in (*self.base, *RESERVED) or name.endswith(".safetensors")
        except ValueError:
            taken = True
        if taken:
            raise bad(
                f"{name!r} cannot name an expert: expected up to 64 letters, digits, '.', '_' or '-', the first a "
                f"letter or digit, without .safetensors, and not {', '.join({**self.base, **dict.fromkeys(RESERVED)})}",
                "name",
            )
        return name

    def check_new(self, name: str, replace: bool) -> None:
        """Raises APIError 409 if the name is taken and may not be replaced, or if it is another's but for its case."""
        if other := same_file(name, self.current):
            raise differs_in_case(name, f"there is an expert {other!r}")
        if name in self.current and not replace:
            raise APIError(
                409, f"there is an expert {name!r}; remove it first, or add replace=true", "expert_exists", "name"
            )

    def new_key(self, name: str) -> str:
        """A new key for the bank. It is hidden in metrics until `publish` or `discard`."""
        self._made += 1
        key = f"{name}@{self._made}"
        self.counts.hide(key)
        return key

    def admit(self, name: str, expert: Expert | LoraAdapter) -> Version:
        """Add an expert or an adapter to the bank, under no name that requests can use. May be called on any thread.

        Raises APIError 400 if it is not an expert of this model.
        """
        key = self.new_key(name)
        try:
            self.bank.add(key, expert)
        except (ExpertError, ValueError) as error:
            self.counts.show(key)
            message = str(error).replace(key, name)
            if isinstance(error, ExpertMismatch):
                raise bad(f"expert {name!r} is of another model: {message}", code="expert_of_another_model") from None
            raise bad(f"expert {name!r} cannot be used: {message}", code="bad_expert") from None
        if isinstance(expert, LoraAdapter):
            manifest = {"kind": "lora", "base_model": expert.base_model, "rank": max(expert.ranks.values())}
        else:
            manifest = dict(expert.manifest)
        return Version(name, key, expert.digest()[:12], expert.numel, manifest)

    def publish(self, version: Version) -> None:
        """Let the name stand for this version from now on."""
        before = self.current.get(version.name)
        replaced = "" if before is None else f" in place of {before.digest}"
        kind = "LoRA adapter" if version.adapter else "expert"
        said = (kind, version.name, version.digest, version.numbers, replaced)
        logger.info("%s %s is served: version %s, %d numbers%s", *said)
        version.users += 1
        self.current[version.name] = version
        self.counts.show(version.key)
        self.epoch += 1
        if before is not None:
            self._drop(before)

    def remove(self, name: str) -> None:
        """Stop serving a name. Requests that use it keep it to their end. Raises APIError 404."""
        version = self._find(name)
        del self.current[name]
        logger.info("expert %s is removed: version %s", name, version.digest)
        self.epoch += 1
        self.counts.fold(name, REMOVED)
        self._drop(version)


def differs_in_case(name: str, taken: str) -> APIError:
    """The error for a name that differs from another only in case. taken: the sentence that says what has the other."""
    why = "names that differ only in case are one file on some file systems"
    return APIError(
        409, f"{taken}, and {name!r} differs from it only in case: {why}; choose another name", "expert_exists", "name"
    )
