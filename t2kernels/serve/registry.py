"""The experts of a server: their names, their versions, and the folder of their files.

A name stands for a version of an expert; a request takes the version that its name stands for when it comes, and keeps it to its end, whatever
happens to the name. In the bank each version is an expert of its own, and leaves it with its last request.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.expert import Expert, ExpertError
from t2kernels.experts.names import AUTO, BASE, MIX, Name, check_name, parse_mixture, write_mixture
from t2kernels.factors.identity import ExpertMismatch
from t2kernels.serve.http.errors import APIError, bad
from t2kernels.storage import printable

MIXED = "mix"
REMOVED = "removed"
RESERVED = (BASE, AUTO, MIXED, REMOVED, "none")
"""Names that mean something else, in requests or as a label of metrics."""
MOST_IN_A_MIXTURE = 16


@dataclass(eq=False)
class Version:
    """One expert as it was given: key is its name in the bank, digest says what is in it, users counts requests and names that hold it."""

    name: str
    key: str
    digest: str
    numbers: int
    manifest: dict
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0


@dataclass
class Chosen:
    """What a request runs with. label: for metrics and answers; fingerprint: which versions; held: until `Experts.release`"""

    label: str
    expert: Name
    fingerprint: str
    held: list[Version]


class Experts:
    """bank: of the served model; folder: where files are read from and uploads go, None: neither; base: names of the base model"""

    def __init__(self, bank: ExpertBank, folder: Path | None = None, base: tuple[str, ...] = ()):
        self.bank, self.folder = bank, None if folder is None else Path(folder)
        self.base = dict.fromkeys((*base, BASE))
        self.current: dict[str, Version] = {}
        self.epoch = 0  # grows whenever a name changes its meaning
        self._made = 0
        self._unnamed: set[str] = set()  # keys of versions that no name stands for yet
        self._loads: Counter[str] = Counter()  # by key while a version is in the bank, then by label
        self._evictions: Counter[str] = Counter()
        bank.watch(lambda name: self._count(self._loads, name), lambda name: self._count(self._evictions, name))

    # --- what is counted

    def label(self, name: str) -> str:
        """What a name counts as in metrics: itself while it stands for something, "mix" for mixtures, else "removed"."""
        return name if name in self.current or name in (BASE, MIXED) else REMOVED

    @property
    def loads(self) -> Counter[str]:
        """How often experts were written into a row, by label; their sum is that of the bank, less versions that have no name yet."""
        return self._by_label(self._loads)

    @property
    def evictions(self) -> Counter[str]:
        """How often experts gave up their row to another one, by label."""
        return self._by_label(self._evictions)

    @staticmethod
    def _count(counts: Counter[str], name: Name) -> None:
        counts[name if isinstance(name, str) else MIXED] += 1

    def _by_label(self, counts: Counter[str]) -> Counter[str]:
        out: Counter[str] = Counter()
        for key, count in dict(counts).items():  # a copy: other threads count
            if key not in self._unnamed:
                out[self.label(key.partition("@")[0])] += count
        return out

    def leave(self, key: str) -> None:
        """Take a version out of the bank, if it is there; what it counted stays with its name, or with all that were removed."""
        if key in self.bank:
            self.bank.remove(key)
        self._unnamed.discard(key)
        self._fold(key, self.label(key.partition("@")[0]))

    def _fold(self, key: str, into: str) -> None:
        for counts in (self._loads, self._evictions):
            if count := counts.pop(key, 0):
                counts[into] += count

    # --- choosing

    def choose(self, model: str) -> Chosen:
        """What `model` of a request names: the base model, an expert, or "mix:math=0.5,code=0.5". Raises APIError 404 or 400."""
        if model in self.base:
            return Chosen(BASE, None, BASE, [])
        if model.startswith(MIX):
            return self._mixture(model)
        version = self._find(model)
        return self._hold(Chosen(model, version.key, f"{model}-{version.digest}", [version]))

    def of_names(self, name: Name) -> Chosen:
        """The same for what a strategy chose: None, an expert's name, or a mixture of names."""
        if isinstance(name, dict):
            return self._mixture(write_mixture(name))
        return self.choose(BASE if name is None else name)

    def share(self, chosen: Chosen) -> Chosen:
        """The same for one more request."""
        return self._hold(replace(chosen, held=list(chosen.held)))

    def release(self, chosen: Chosen) -> None:
        """The request has ended; once."""
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
            self.leave(version.key)

    # --- adding and removing

    def check_name(self, name: str) -> str:
        """Raises APIError 400 for what cannot be the name of an expert."""
        try:
            reserved = check_name(name) in (*self.base, *RESERVED) or name.endswith(".safetensors")
        except ValueError:
            reserved = True
        if reserved:
            raise bad(
                f"{name!r} cannot name an expert: wanted up to 64 letters, digits, '.', '_' or '-', the first a letter or digit, without "
                f".safetensors, and not {', '.join({**self.base, **dict.fromkeys(RESERVED)})}",
                "name",
            )
        return name

    def check_new(self, name: str, replace: bool) -> None:
        """Raises APIError 409 if the name is taken and may not be replaced."""
        if name in self.current and not replace:
            raise APIError(
                409, f"there is an expert {name!r}; remove it first, or add replace=true", "expert_exists", "name"
            )

    def new_key(self, name: str) -> str:
        """A name for the bank that nothing has had; until `leave`, or `publish` of what has it, it is in no metrics."""
        self._made += 1
        key = f"{name}@{self._made}"
        self._unnamed.add(key)
        return key

    def admit(self, name: str, expert: Expert) -> Version:
        """Take an expert into the bank, without a name that requests could use yet; it may be called on any thread.

        Raises APIError 400: not an expert of this model.
        """
        key = self.new_key(name)
        try:
            self.bank.add(key, expert)
        except ExpertMismatch as error:
            self._unnamed.discard(key)
            raise bad(
                f"expert {name!r} is of another model: {_without(error, key, name)}", code="expert_of_another_model"
            ) from None
        except ValueError as error:
            self._unnamed.discard(key)
            raise bad(f"expert {name!r} cannot be used: {_without(error, key, name)}", code="bad_expert") from None
        return Version(name, key, _digest(expert), expert.numel, dict(expert.manifest))

    def publish(self, version: Version) -> None:
        """From now on the name stands for this version."""
        before = self.current.get(version.name)
        version.users += 1
        self.current[version.name] = version
        self._unnamed.discard(version.key)
        self.epoch += 1
        if before is not None:
            self._drop(before)

    def discard(self, version: Version) -> None:
        """Undo `admit`."""
        self.leave(version.key)

    def remove(self, name: str) -> None:
        """Requests that have it keep it to their end. Raises APIError 404."""
        version = self._find(name)
        del self.current[name]
        self.epoch += 1
        self._fold(name, REMOVED)
        self._drop(version)

    # --- files

    def load_folder(self) -> None:
        """Every .safetensors file of the folder, by its name. Raises ExpertError or ValueError, with the file's name, for one that is none."""
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                self.load_file(path.stem, self.file(path.name))
            except APIError as error:
                raise ValueError(f"{path}: {error.message}") from None

    def load_file(self, name: str, path: Path) -> None:
        """`read`, `admit` and `publish`."""
        self.publish(self.admit(self.check_name(name), self.read(path)))

    def file(self, name: str) -> Path:
        """A file of the folder by its bare name. Raises APIError: 400 for anything that is not in it, 404 if it is not there."""
        folder = self.home()
        path = folder / name
        if (
            not name
            or Path(name).name != name
            or name.startswith(".")
            or not name.endswith(".safetensors")
            or "\0" in name
            or len(name) > 255
            or name != printable(name)
        ):
            raise bad(
                f"file {printable(name)[:80]!r}: wanted the bare name of a .safetensors file inside the experts folder",
                "file",
                "bad_file_name",
            )
        if path.resolve().parent != folder.resolve():
            raise bad(
                f"file {name!r} leads out of the experts folder: links are not followed; copy the file into it",
                "file",
                "bad_file_name",
            )
        if not path.is_file():
            raise APIError(404, f"there is no file {name!r} in the experts folder", "file_not_found", "file")
        return path

    def home(self) -> Path:
        """The folder. Raises APIError 400 without one."""
        if self.folder is None:
            raise bad("this server has no folder for experts: start it with --experts DIR", code="no_experts_folder")
        return self.folder

    @staticmethod
    def read(path: Path) -> Expert:
        """Raises APIError 400 for a file that holds no expert."""
        try:
            return Expert.load(path)
        except ExpertError as error:
            raise bad(str(error).replace(str(path), path.name), code="bad_expert") from None


def _digest(expert: Expert) -> str:
    """Twelve hexadecimal digits of what the expert does."""
    hashed = hashlib.sha256()
    for name in sorted(expert.z):
        hashed.update(name.encode() + b"\0" + expert.z[name].contiguous().numpy().tobytes())
    return hashed.hexdigest()[:12]


def _without(error: Exception, key: str, name: str) -> str:
    return str(error).replace(key, name)
