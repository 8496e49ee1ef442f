"""The only module that writes files. A file is whole or absent: written beside its place, synced, then renamed.

A safetensors file that has a manifest also has a digest: sha256 of everything else in the file. `verify` compares them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import struct
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from t2kernels import T2Error, printable

TEMPORARY: str = ".tmp"  # a file with this ending was left by a killed process; no reader opens one
MANIFEST_KEY: str = "t2kernels"
DIGEST_KEY: str = "t2kernels.digest"
DEEPEST: int = 64  # levels of a JSON value. Python's own limit would raise RecursionError, here or in a later copy
DAY: int = 86_400
LONGEST: int = 100_000_000  # bytes of a header that safetensors reads
CHANGED: str = "its bytes are not those that were written: their sha256 is not the digest in its header"
# The names that safetensors gives to the types of torch.
_TYPES: dict[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}


class FileError(T2Error, ValueError):
    """A file that cannot be read: damaged, changed after it was written, or of another kind."""


class WriteError(T2Error, OSError):
    """A file that could not be written. An older file in its place is unchanged."""


# --- writing


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> str:
    """Write a safetensors file. The same content gives the same bytes.

    tensors: {name: tensor}, on any device
    metadata: stored in the header as JSON, with the digest of the file
    Returns the digest ("" without metadata). Raises OSError; an older file at `path` is then unchanged.
    """
    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # The format key is the one that transformers looks for, so that any safetensors reader takes the file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}, **_table(ready)}
    digest = ""
    if metadata is not None:
        header["__metadata__"][MANIFEST_KEY] = json.dumps(dict(metadata), sort_keys=True)
        hashed = _hash(header)
        for name in list(header)[1:]:
            hashed.update(_bytes(ready[name]))
        digest = header["__metadata__"][DIGEST_KEY] = hashed.hexdigest()
    _replace(path, lambda temporary: save_file(temporary, header, ready))
    return digest


def save_file(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the bytes of a safetensors file: the header, then the tensors in the order of the header.

    safetensors' own `save_file` orders the metadata at random and makes files that only their owner may read.
    """
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in header:
            if name != "__metadata__":
                f.write(_bytes(tensors[name]))


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as JSON. Returns the path. Raises OSError; an older file at `path` is then unchanged."""
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    return _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def temporary_beside(path: Path) -> Path:
    """A new name in the folder of `path` for a file, or a folder, that is renamed to it when it is whole.

    The name holds the id of this process. What dead processes left in the folder is removed.
    """
    _sweep(path.parent)
    # Shortened, because the name of a file may have 255 bytes.
    return path.with_name(f".{path.name[:40]}.{os.getpid()}.{_machine()}{uuid.uuid4().hex[:8]}{TEMPORARY}")


def _replace(path: str | Path, write: Callable[[Path], Any]) -> Path:
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError) as e:  # ValueError: a path with NUL or a lone surrogate
        raise WriteError(
            getattr(e, "errno", None) or errno.EINVAL,
            f"could not write {printable(path)} ({e}); an older file there is untouched. "
            "Free space or choose another place",
        ) from e
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError, ValueError):  # the error above is the one to be read
                temporary.unlink(missing_ok=True)
    return path


def _sweep(folder: Path) -> None:
    """Remove the temporary files and folders of dead processes."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") and entry.name.endswith(TEMPORARY):
                with contextlib.suppress(OSError, ValueError):  # a name of another kind, or removed by another writer
                    _, pid, made = entry.name.removesuffix(TEMPORARY).rsplit(".", 2)
                    if _left_behind(int(pid), made, entry.stat(follow_symlinks=False).st_mtime):
                        shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def _left_behind(pid: int, made: str, changed: float) -> bool:
    """Whether the process that wrote a temporary file is dead.

    made: the last part of the name; its first 8 of 16 letters name the machine
    changed: when the file was last written to, in seconds
    """
    now = time.time()
    if len(made) == 16 and made[:8] != _machine():  # process ids of another machine, or container, say nothing here
        return now - changed > DAY
    try:
        process = psutil.Process(pid)
        return process.status() == psutil.STATUS_ZOMBIE or process.create_time() > changed + 2
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _machine() -> str:
    """8 letters that are the same for all processes that see each other's ids."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


# --- reading


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read the JSON object in a file.

    what: what the file should be, for the message
    Raises FileError that names the file if it holds anything else, OSError if it cannot be opened.
    """
    try:
        value = parse_json(Path(path).read_bytes())
    except FileError as e:
        raise FileError(f"{path} is not {what}: {e}") from None
    if not isinstance(value, dict):
        raise FileError(f"{path} is not {what}: it holds a JSON {type(value).__name__}, not an object")
    return value


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises FileError for a text that is not JSON in UTF-8, and for one that is not fit for use: nested more than
    DEEPEST deep, or with half of a surrogate pair, which no file name and no message can hold.
    """
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise FileError(f"its JSON is nested more than {DEEPEST} deep") from None
    except ValueError as e:  # among them UnicodeDecodeError, and numbers of more than 4300 digits
        raise FileError(str(e)) from None
    left: list[tuple[Any, int]] = [(value, 0)]
    while left:
        item, depth = left.pop()
        if depth > DEEPEST:
            raise FileError(f"its JSON is nested more than {DEEPEST} deep")
        if isinstance(item, dict):
            left += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            left += [(part, depth + 1) for part in item]
        elif isinstance(item, str) and item != printable(item):
            raise FileError(f"its JSON holds half of a surrogate pair in {printable(item)[:40]!r}")
    return value


def header(path: str | Path) -> dict[str, Any] | None:
    """Read the metadata that `write_tensors` put into the header; None if there is none.

    Raises SafetensorError on a broken file, FileError for metadata that is not a JSON object.
    """
    with safe_open(path, framework="pt") as f:
        text = (f.metadata() or {}).get(MANIFEST_KEY)
    return None if text is None else _manifest(text)


def _manifest(text: str) -> dict[str, Any]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise FileError(f"the manifest in its header is a JSON {type(value).__name__}, not an object")
    return value


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and metadata of a file that `write_tensors` wrote, compared with its digest.

    The file is opened once, so that a writer that replaces it at this moment does no harm.
    Returns no tensors, and None, for a safetensors file without such metadata. Raises as `verify`.
    """
    with open(path, "rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        text = f.read(length) if length < LONGEST else b""
        if MANIFEST_KEY.encode() not in text:
            with safe_open(path, framework="pt"):  # another safetensors file, which may be huge, or none
                return {}, None
        data = start + text + f.read()
    tensors = load(data)  # checks the structure
    found = json.loads(text)
    facts = found.get("__metadata__") or {}
    if MANIFEST_KEY not in facts:
        return {}, None
    if (wanted := _written_digest(facts)) is not None:
        hashed = _hash(found)
        hashed.update(memoryview(data)[8 + length :])
        if hashed.hexdigest() != wanted:
            raise FileError(CHANGED)
    return tensors, _manifest(facts[MANIFEST_KEY])


def verify(path: str | Path) -> str | None:
    """Read a whole safetensors file and compare it with the digest in its header.

    Returns the digest, None if the file has none (older versions wrote none). Raises FileError if they differ,
    SafetensorError on a broken file, OSError.
    """
    with safe_open(path, framework="pt"):
        pass  # checks the structure
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        found = json.loads(f.read(length))
        wanted = _written_digest(found.get("__metadata__") or {})
        if wanted is None:
            return None
        hashed = _hash(found)
        while piece := f.read(1 << 22):
            hashed.update(piece)
    if hashed.hexdigest() != wanted:
        raise FileError(CHANGED)
    return wanted


def digest_of(path: str | Path) -> str:
    """sha256 of a file, 64 hexadecimal digits. Raises OSError."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def why_unreadable(path: str | Path) -> str:
    """Say in words why a file cannot be read as safetensors, from its first bytes."""
    with open(path, "rb") as f:
        start = f.read(8)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return "it is a pickle (a torch.save file), which is never loaded here"
    if len(start) < 8:
        return f"it has only {len(start)} bytes"
    return "it is truncated, damaged, or in another format"


def _table(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header's entries of tensors, in the order of the file: wide types first, so that each is aligned."""
    table: dict[str, Any] = {}
    start = 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
        t = tensors[name]
        kind = _TYPES.get(str(t.dtype).removeprefix("torch."))
        if kind is None:
            raise FileError(f"{name}: a safetensors file cannot hold {t.dtype}")
        stop = start + t.numel() * t.element_size()
        table[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [start, stop]}
        start = stop
    return table


def _written_digest(metadata: dict[str, str]) -> str | None:
    """Take the digest out of a header's metadata; None if it has none, as in files of older versions.

    Raises FileError if there is something else in its place: no version wrote that, so the key was damaged.
    """
    wanted = metadata.pop(DIGEST_KEY, None)
    other = metadata.keys() - {"format", MANIFEST_KEY}
    if wanted is None and MANIFEST_KEY in metadata and other:
        raise FileError(f"{CHANGED}, which has {printable(min(other))[:40]!r} in its place")
    return wanted


def _hash(header: Mapping[str, Any]) -> Any:
    """The hash of a header, which the tensors are then added to."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode())


def _bytes(t: Tensor) -> Any:  # a buffer
    return memoryview(t.flatten().view(torch.uint8).numpy())
