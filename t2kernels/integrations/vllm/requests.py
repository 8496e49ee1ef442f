"""Experts as vLLM's LoRA requests, and the addresses in those requests by which a worker finds an expert's file.

A LoRA adapter, the folder that PEFT saved, has an address as an expert's file has.

An address is `{path}#{digest}`, or `mix:[[weight, address], ...]`. vLLM keys its prefix cache by a request's name and
address. The digest is that of the expert's numbers, so a file that is replaced by another expert has another address,
and never gets the keys and values of the expert that was there before.
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

from t2kernels import InputError
from t2kernels.experts.exchange.lora import LoraAdapter
from t2kernels.experts.exchange.peft_files import CONFIG, WEIGHTS, is_adapter
from t2kernels.experts.expert import Expert, ExpertError
from t2kernels.experts.files import require_file
from t2kernels.experts.names import MIX

from .rollouts import memory

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

Source = str | os.PathLike[str]
"""An expert's file, or the folder of a LoRA adapter."""
Mixture = Mapping[str, float] | Mapping[Path, float]
"""{file: weight}."""

STACK = ".experts."
"""Part of the name of every matrix that is a slice of a mixture-of-experts stack."""
DIGEST = re.compile(r"#([0-9a-f]{16})$")
"""The end of an address: the digest."""
SETTLED = 10**9
"""Nanoseconds after which a file's modification time can be trusted."""
FIRST_ID = 1 << 20
"""The smallest id made here. vLLM's server and its warm-up give out smaller ones, from 1 on."""
IDS = 2**31 - FIRST_ID
"""How many ids there are: vLLM keeps them in 32 bits."""

_taken: dict[int, tuple[str, str]] = {}  # id -> (name, address), of this process
_read: set[str] = set()  # addresses whose files were read without an error
_addresses: dict[str, str] = {}  # name -> the first address that it was used for


def expert(name: str, source: Source | Mixture) -> LoRARequest:
    """An SVF expert, or a LoRA adapter, as `lora_request=` of `LLM.generate` and `AsyncLLM.generate`.

    name: how vLLM reports it; source: its file, the folder of a LoRA adapter that PEFT saved, or a mixture of experts
        {file: weight}, z = 1 + Σ weight (z_k - 1), made into a row on first use
    The id is a hash of name and z, so it is the same on every machine, whatever the file's path and header. Files are
    read here once, so that a broken one never reaches the engine.

    Raises ValueError (no name, a folder that is no LoRA adapter), ExpertError (no file, not an expert, weight not
    finite), ExpertMismatch (a mixture of experts of different factors).
    """
    if not isinstance(name, str) or not name:
        raise InputError(f"an expert's name is a non-empty string, not {name!r}")
    where = address(source)
    if where not in _read:
        load(where)
        _read.add(where)
    return request(name, where)


def request(name: str, where: str) -> LoRARequest:
    """The request for the expert at an address that the engine can read. name: as in `expert`"""
    from vllm.lora.request import LoRARequest

    # vLLM compares requests by name: it would take two experts under one name in one step for one.
    if _addresses.setdefault(name, where) != where:
        name = f"{name}@{hashlib.sha256(where.encode()).hexdigest()[:8]}"
    number = FIRST_ID + int.from_bytes(hashlib.sha256(f"{name}\n{_content(where)}".encode()).digest()[:8]) % IDS
    while _taken.setdefault(number, (name, where)) != (name, where):
        number = FIRST_ID + (number + 1 - FIRST_ID) % IDS
    return LoRARequest(name, number, where)


def address(source: Source | Mixture) -> str:
    """The address of a file, or of a mixture {file: weight}, with digests of the present contents.

    Raises ExpertError.
    """
    if isinstance(source, Mapping):
        if not source:
            raise ExpertError("a mixture of no experts; wanted {file: weight}")
        for path, weight in source.items():
            if not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ExpertError(f"the weight of {path} in a mixture is {weight!r}; wanted a finite number")
        return mixture([(address(path), float(weight)) for path, weight in source.items()])
    path = place_of(source)
    return f"{path}#{digest(path)}"


def place_of(source: Source) -> Path:
    """The absolute path of an expert's file, or of the folder of an adapter. Raises ExpertError if there is neither."""
    path = Path(source).expanduser()
    return (path if is_adapter(path) else require_file(source)).resolve()


def mixture(parts: Sequence[tuple[str, float]]) -> str:
    """The address of Σ weight (z_k - 1) of (address, weight). A part is an expert's address, not that of a mixture."""
    return MIX + json.dumps([[weight, part] for part, weight in sorted(parts)])


def digest(path: Path) -> str:
    """16 hexadecimal digits of the digest of the expert in a file, or of the adapter in a folder.

    Raises ExpertError if there is none, or it cannot be read.
    """
    try:
        state = state_of(path)
        # A file system's clock may tick every few milliseconds: a second write may leave the time as it is.
        known = _digest if time.time_ns() - state[-1] > SETTLED else _digest.__wrapped__
        return known(path, *state)
    except OSError as e:
        raise ExpertError(f"{path} cannot be read: {e}") from e


def state_of(path: Path) -> tuple[int, ...]:
    """Inode, size and modification time [ns] of an expert's file, which change when the file does; the same of both
    files of an adapter, the newer one last. Raises OSError."""
    if is_adapter(path):
        a, b = sorted((os.stat(path / file) for file in (CONFIG, WEIGHTS)), key=lambda s: s.st_mtime_ns)
        return a.st_ino, a.st_size, a.st_mtime_ns, b.st_ino, b.st_size, b.st_mtime_ns
    s = os.stat(path if path.exists() else path.with_name(path.name + ".safetensors"))
    return s.st_ino, s.st_size, s.st_mtime_ns


@functools.lru_cache(4096)  # many prompts with one expert read its file once: 3 MB take 5 ms
def _digest(path: Path, *state: int) -> str:
    return _short(_load(path))


def _load(path: Path) -> Expert | LoraAdapter:
    return LoraAdapter.load(path) if is_adapter(path) else Expert.load(path)


def _short(of: Expert | LoraAdapter) -> str:
    if isinstance(of, Expert):
        return of.digest()[:16]
    whole = hashlib.sha256()
    for name, pair in sorted(of.pairs.items()):
        whole.update(f"{name} {[list(t.shape) for t in pair]}".encode())
        for t in pair:
            whole.update(t.contiguous().numpy().data)
    return whole.hexdigest()[:16]


def files(where: str) -> list[str]:
    """The paths of files in an address, without digests. Raises ExpertError for a mixture that is not `mixture`'s."""
    return [DIGEST.sub("", part) for part, _ in _parts(where) if not part.startswith(memory.MEMORY)]


def resident(where: str) -> bool:
    """Whether this process holds what an address has in memory (`rollouts.memory`). Raises as `files`."""
    return all(memory.is_kept(part) for part, _ in _parts(where) if part.startswith(memory.MEMORY))


def load(where: str) -> Expert | LoraAdapter:
    """The expert, or the adapter, at an address.

    Raises ExpertError for a file that is missing, not an expert, or replaced since its address was made, and for a
    mixture with an adapter in it; InputError for a folder that is no LoRA adapter.
    """
    loaded = []
    for part, weight in _parts(where):
        wanted = DIGEST.search(part)
        path = Path(DIGEST.sub("", part))
        held = part.startswith(memory.MEMORY)
        found = memory.find(part) if held else _load(path)
        if wanted and not held and (now := _short(found)) != wanted[1]:
            raise ExpertError(
                f"{path} was replaced since it was asked for (digest {now}, then {wanted[1]}); ask for it again"
            )
        if isinstance(found, LoraAdapter):
            if where.startswith(MIX):
                raise ExpertError(
                    f"{path} is a LoRA adapter, and vLLM gets mixtures of experts only; mix them with patch_model"
                )
            return found
        if stacks := [n for n in found.z if STACK in n]:
            more = ", ..." if len(stacks) > 1 else ""
            raise ExpertError(
                f"{path} changes weights of mixture-of-experts layers ({stacks[0]}{more}), and vLLM's fused kernels "
                "leave no room for that: serve it with patch_model, or train an expert without them"
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
    """An address without the paths of its files."""
    return "\n".join(
        f"{weight} {found[1] if (found := DIGEST.search(part)) else part}" for part, weight in _parts(where)
    )
