"""The table files of `t2 tune`, one a kind of GPU or CPU: checks that passed there, the fastest tiles, cut-overs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from t2kernels import InputError
from t2kernels.storage import read_json, write_json

from .tiles import Tiles, key

TABLES = Path(__file__).parent / "tuned"
Timed = tuple[str, int, int, int, torch.dtype, torch.dtype]
"""(kernel, T, rows, K, x_dtype, w_dtype), as in `tiles.tiles`."""


def user_folder() -> Path:
    """The folder of the tables that `t2 tune` writes: t2kernels/tuned under XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2kernels" / "tuned"


def table_path(device_name: str, triton_version: str, folder: Path = TABLES) -> Path:
    """The file of a GPU's Triton table, for one major.minor of Triton: another compiler is another machine."""
    return Path(folder) / f"{_file_name(device_name)}-triton{'.'.join(triton_version.split('.')[:2])}.json"


def cuda_table_path(device_name: str, folder: Path = TABLES) -> Path:
    """The file of the CUDA kernel's table on a GPU."""
    return Path(folder) / f"{_file_name(device_name)}-cuda.json"


def cpu_table_path(device_name: str, folder: Path = TABLES) -> Path:
    """The file of the C++ kernels' table on a CPU."""
    return Path(folder) / f"{_file_name(device_name)}-cpu.json"


def read_table(device_name: str, triton_version: str, folder: Path | None = None) -> dict[str, Any] | None:
    """The table of a GPU and a Triton: the user's own, else the package's; None if there is none.

    {"tiles": {key: {T: Tiles}}, "checked": {...}, "pair_tokens": int, ...}
    Raises ValueError for a file that is not a table.
    """
    return _read((table_path(device_name, triton_version, f) for f in _folders(folder)), "tiles", dict)


def read_cuda_table(device_name: str, folder: Path | None = None) -> dict[str, Any] | None:
    """{"checked": {...}, "decode_tokens": [int, int], ...} of the CUDA kernel on a GPU, as `read_table` finds it."""
    return _read((cuda_table_path(device_name, f) for f in _folders(folder)), "decode_tokens", list)


def read_cpu_table(device_name: str, folder: Path | None = None) -> dict[str, Any] | None:
    """{"stream_tokens": {"DTYPE_OF_X DTYPE_OF_FACTORS": int}, ...} of the C++ kernels, as `read_table` finds it."""
    return _read((cpu_table_path(device_name, f) for f in _folders(folder)), "stream_tokens", dict)


def write_cpu_table(device_name: str, stream_tokens: Mapping[str, int], folder: Path = TABLES, **facts: Any) -> Path:
    """Write the C++ kernels' table of a CPU; returns its path.

    stream_tokens: {"float32 int8": up to how many tokens they are the fastest}; facts: the checks and the times
    """
    path = cpu_table_path(device_name, folder)
    return write_json(path, {"device": device_name, **facts, "stream_tokens": dict(stream_tokens)})


def write_table(
    device_name: str, triton_version: str, best: Mapping[Timed, Tiles], folder: Path = TABLES, **facts: Any
) -> Path:
    """Write the Triton table of a GPU; returns its path.

    best: the fastest tiles of each launch that was timed; facts: other fields of the table, such as the checks
    """
    found: dict[str, dict[str, tuple]] = {}
    for (kernel, T, rows, K, x_dtype, w_dtype), t in best.items():
        found.setdefault(key(kernel, rows, K, x_dtype, w_dtype), {})[str(T)] = astuple(t)
    path = table_path(device_name, triton_version, folder)
    return write_json(path, {"device": device_name, "triton": triton_version, **facts, "tiles": found})


def write_cuda_table(device_name: str, decode_tokens: tuple[int, int], folder: Path = TABLES, **facts: Any) -> Path:
    """Write the CUDA kernel's table of a GPU; returns its path.

    decode_tokens: up to how many tokens it is the fastest, for factors of 16 and of 8 bits; facts: the checks and the
        times
    """
    path = cuda_table_path(device_name, folder)
    return write_json(path, {"device": device_name, **facts, "decode_tokens": list(decode_tokens)})


def _file_name(device_name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in device_name)


def _folders(folder: Path | None) -> list[Path]:
    return [folder] if folder else [user_folder(), TABLES]


def _read(paths: Iterable[Path], field: str, kind: type) -> dict[str, Any] | None:
    for path in paths:
        if path.is_file():
            found = read_json(path, "a table of `t2 tune` (delete it, and run `t2 tune` again)")
            if isinstance(found.get(field), kind):
                return found
            raise InputError(
                f"{path} is not a table of `t2 tune`: {field!r} is missing. Delete it, and run `t2 tune` again"
            )
    return None
