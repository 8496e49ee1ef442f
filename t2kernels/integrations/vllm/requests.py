"""Experts as vLLM's LoRA requests, and the addresses in them by which a worker finds the numbers.

An address is `{path}#{digest}`, or `mix:[[weight, address], ...]`. vLLM keys its prefix cache by name and address; the digest makes that the
file's content, so that a file which was replaced is another expert, and its old keys and values are not taken for its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t2kernels.experts.expert import Expert, ExpertError
from t2kernels.experts.files import require_file
from t2kernels.experts.names import MIX

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

STACK = ".experts."  # in names of matrices that are slices of a mixture-of-experts stack
DIGEST = re.compile(r"#([0-9a-f]{16})$")
SETTLED = 10**9  # ns
FIRST_ID = 1 << 20  # below are those that vLLM's server and its warm-up give out, from 1 on
IDS = 2**31 - FIRST_ID  # vLLM keeps ids in 32 bits

_taken: dict[int, tuple[str, str]] = {}  # id -> (name, address), of this process
_read: set[str] = set()  # addresses that hold experts
_addresses: dict[str, str] = {}  # name -> the first address that it was used for


def expert(name: str, source: str | os.PathLike | Mapping[str | os.PathLike, float]) -> LoRARequest:
    """What `lora_request=` of `LLM.generate` and `AsyncLLM.generate` takes for an SVF expert.

    source: its file, or a mixture {file: weight}, z = 1 + Σ weight (z_k - 1), which is made into a row when it is first used
    The id is the same for the same name and content, on every machine. Files are read here once, so that a broken one never reaches the engine.

    Raises ExpertError (no file, not an expert, weight not finite), ExpertMismatch (a mixture of experts of different factors).
    """
    from vllm.lora.request import LoRARequest

    if not isinstance(name, str) or not name:
        raise ValueError(f"an expert's name is a non-empty string, not {name!r}")
    where = address(source)
    if where not in _read:
        load(where)
        _read.add(where)
    # vLLM compares requests by name: two contents under one name in one step would be taken for one.
    if _addresses.setdefault(name, where) != where:
        name = f"{name}@{hashlib.sha256(where.encode()).hexdigest()[:8]}"
    number = FIRST_ID + int.from_bytes(hashlib.sha256(f"{name}\n{_content(where)}".encode()).digest()[:8]) % IDS
    while _taken.setdefault(number, (name, where)) != (name, where):
        number = FIRST_ID + (number + 1 - FIRST_ID) % IDS
    return LoRARequest(name, number, where)


def address(source: str | os.PathLike | Mapping[str | os.PathLike, float]) -> str:
    """The address of a file, or of a mixture {file: weight}, with the digests of what the files hold now. Raises ExpertError."""
    if isinstance(source, Mapping):
        if not source:
            raise ExpertError("a mixture of no experts; wanted {file: weight}")
        for path, weight in source.items():
            if not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ExpertError(f"the weight of {path} in a mixture is {weight!r}; wanted a finite number")
        return mixture([(address(path), float(weight)) for path, weight in source.items()])
    path = require_file(source).resolve()
    return f"{path}#{digest(path)}"


def mixture(parts: Sequence[tuple[str, float]]) -> str:
    """The address of Σ weight (z_k - 1) of (address, weight); parts that are mixtures themselves are not known."""
    return MIX + json.dumps([[weight, part] for part, weight in sorted(parts)])


def digest(path: Path) -> str:
    """16 hexadecimal digits of the sha256 of a file. Raises ExpertError where it cannot be read."""
    try:
        s = os.stat(path)
        # A file system's clock may tick every few milliseconds: what was written just now may change without its time showing it.
        known = _digest if time.time_ns() - s.st_mtime_ns > SETTLED else _digest.__wrapped__
        return known(path, s.st_ino, s.st_size, s.st_mtime_ns)
    except OSError as e:
        raise ExpertError(f"{path} cannot be read: {e}") from e


@functools.lru_cache(4096)  # a request for each of many prompts does not read the file as often: 3 MB take 5 ms
def _digest(path: Path, *state: int) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def files(where: str) -> list[str]:
    """The paths, without digests, that an address stands for. Raises ExpertError for a mixture that is not written as `address` does."""
    return [DIGEST.sub("", part) for part, _ in _parts(where)]


def load(where: str) -> Expert:
    """The expert at an address. Raises ExpertError where a file is missing, no expert, or not what it was when its address was made."""
    loaded = []
    for part, weight in _parts(where):
        wanted = DIGEST.search(part)
        path = Path(DIGEST.sub("", part))
        if (path / "adapter_config.json").is_file():
            raise ExpertError(
                f"{path} is a LoRA adapter; an engine that serves SVF experts serves no LoRA adapters beside them"
            )
        found = Expert.load(path)
        if wanted and (now := digest(require_file(path))) != wanted[1]:
            raise ExpertError(
                f"{path} was replaced since it was asked for (sha256 {now}, then {wanted[1]}); ask for it again"
            )
        if stacks := [n for n in found.z if STACK in n]:
            raise ExpertError(
                f"{path} changes weights of mixture-of-experts layers ({stacks[0]}{', ...' if len(stacks) > 1 else ''}), which vLLM's fused kernels "
                "do not leave room for: serve it with patch_model, or train an expert without them"
            )
        loaded.append((found, weight))
    return Expert.mix(loaded) if where.startswith(MIX) else loaded[0][0]


def _parts(where: str) -> list[tuple[str, float]]:
    if not where.startswith(MIX):
        return [(where, 1.0)]
    try:
        return [(str(part), float(weight)) for weight, part in json.loads(where.removeprefix(MIX))]
    except (ValueError, TypeError) as e:
        raise ExpertError(f"{where[:80]!r} is no mixture: wanted mix:[[weight, path], ...] as JSON ({e})") from None


def _content(where: str) -> str:
    """An address without the places of the files: the same on every machine."""
    return "\n".join(
        f"{weight} {found[1] if (found := DIGEST.search(part)) else part}" for part, weight in _parts(where)
    )
