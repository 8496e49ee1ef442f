"""The only module that writes files. A file is whole or absent: written beside its place, synced, then renamed.

A process that is killed while it writes leaves a temporary file. A writer locks its own, so the next write into the
same folder recognises the others and removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from t2kernels import InputError

TEMPORARY: str = ".tmp"  # the ending of temporary files; no reader opens one
GRACE: float = 60.0  # seconds since its last write after which an unlocked temporary file counts as left behind


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a safetensors file.

    tensors: {name: tensor}, on any device
    metadata: stored in the header as JSON under "t2kernels"
    Returns the path. Raises OSError; an older file at `path` is then unchanged.
    """
    header = {"t2kernels": json.dumps(dict(metadata), sort_keys=True)} if metadata is not None else None
    # The header also gets the format key that transformers looks for, so that any safetensors reader takes the file.
    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return _replace(path, lambda temporary: save_file(ready, temporary, metadata={"format": "pt", **(header or {})}))


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as JSON. Returns the path. Raises OSError; an older file at `path` is then unchanged."""
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    return _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read the JSON object in a file.

    what: what the file should be, for the message
    Raises ValueError that names the file if it holds anything else, OSError if it cannot be opened.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(f"{path} is not {what}: {e}") from None
    except RecursionError:
        raise InputError(f"{path} is not {what}: its JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not {what}: it holds a JSON {type(value).__name__}, not an object")
    return value


def header(path: str | Path) -> dict[str, Any] | None:
    """Read the metadata that `write_tensors` put into the header; None if there is none.

    Raises SafetensorError on a broken file, ValueError if the metadata is not JSON.
    """
    with safe_open(path, framework="pt") as f:
        text = (f.metadata() or {}).get("t2kernels")
    try:
        return None if text is None else json.loads(text)
    except RecursionError:
        raise InputError(f"{path}: the JSON in its header is nested too deeply") from None


def why_unreadable(path: str | Path) -> str:
    """Say in words why a file cannot be read as safetensors, from its first bytes."""
    with open(path, "rb") as f:
        start = f.read(8)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return "it is a pickle (a torch.save file), which is never loaded here"
    if len(start) < 8:
        return f"it has only {len(start)} bytes"
    return "it is truncated, damaged, or in another format"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder. One that is still written is locked and stays."""
    for file in folder.glob(f".*{TEMPORARY}"):
        # An OSError means that it is locked, that another process was faster, or that there are no locks here.
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > GRACE:
                with open(file, "rb") as f:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    file.unlink()


def _replace(path: str | Path, write: Callable[[Path], Any]) -> Path:
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        with open(temporary, "xb") as f:
            with contextlib.suppress(OSError):  # some file systems have no locks; there leftovers stay
                fcntl.flock(f, fcntl.LOCK_EX)
            write(temporary)
            os.fsync(f.fileno())
            os.replace(temporary, path)
    except (OSError, SafetensorError) as e:  # safetensors reports a full disk as its own error
        code = getattr(e, "errno", None) or (errno.ENOSPC if "No space left" in str(e) else errno.EIO)
        raise OSError(
            code,
            f"could not write {path} ({e}); an older file there is untouched. Free space or choose another place",
        ) from e
    finally:
        with contextlib.suppress(OSError):  # as where the folder could not be made
            temporary.unlink(missing_ok=True)
    return path
