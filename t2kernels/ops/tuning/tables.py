"""The table files of `t2 tune`, one a kind of GPU or CPU: checks that passed there, the fastest tiles, cut-overs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import torch

from t2kernels import InputError
from t2kernels.storage import read_json, write_json

from .tiles import DTYPES, KERNELS, Tiles, dtype_of, key

TABLES = Path(__file__).parent / "tuned"
Timed = tuple[str, int, int, int, torch.dtype, torch.dtype]
"""(kernel, T, rows, K, x_dtype, w_dtype), as in `tiles.tiles`."""
LARGEST: int = 1024
"""Of the sizes of a tile."""
_NAMES = [field.name for field in fields(Tiles)]
_TYPE = f"({'|'.join(DTYPES)})"
_SHAPE = re.compile(rf"({'|'.join(KERNELS)})/{_TYPE}/{_TYPE}/[1-9][0-9]*x[1-9][0-9]*")


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
    Raises ValueError for a file that is not a table, or with an entry that cannot be used, which it names.
    """
    return _read((table_path(device_name, triton_version, f) for f in _folders(folder)), "tiles")


def read_cuda_table(device_name: str, folder: Path | None = None) -> dict[str, Any] | None:
    """{"checked": {...}, "decode_tokens": [int, int], ...} of the CUDA kernel on a GPU, as `read_table` finds it."""
    return _read((cuda_table_path(device_name, f) for f in _folders(folder)), "decode_tokens")


def read_cpu_table(device_name: str, folder: Path | None = None) -> dict[str, Any] | None:
    """{"stream_tokens": {"DTYPE_OF_X DTYPE_OF_FACTORS": int}, ...} of the C++ kernels, as `read_table` finds it."""
    return _read((cpu_table_path(device_name, f) for f in _folders(folder)), "stream_tokens")


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


def timed(table: Mapping[str, Any]) -> dict[Timed, Tiles]:
    """The tiles of a table, as `write_table` takes them."""
    found: dict[Timed, Tiles] = {}
    for shape, by_tokens in table["tiles"].items():
        kernel, x, w, size = shape.split("/")
        rows, K = map(int, size.split("x"))
        found |= {(kernel, int(T), rows, K, dtype_of(x), dtype_of(w)): Tiles(*t) for T, t in by_tokens.items()}
    return found


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


def _read(paths: Iterable[Path], needed: str) -> dict[str, Any] | None:
    for path in paths:
        if path.is_file():
            found = read_json(path, "a table of `t2 tune` (delete it, and run `t2 tune` again)")
            wrong = None if needed in found else f"{needed!r} is missing"
            for entry, value, fits, wanted in _entries(found):
                if not fits:
                    wrong = f"{entry} is {str(value)[:60]!r}, wanted {wanted}"
                    break
            if wrong:
                raise InputError(f"{path} is not a table of `t2 tune`: {wrong}. Delete it, and run `t2 tune` again")
            return found
    return None


def _entries(table: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool, str]]:
    """(where, value, whether it can be used, what can) of each entry that is read. Stop at the first that cannot."""
    for name in {"checked", "tiles", "stream_tokens"} & table.keys():
        yield name, table[name], isinstance(table[name], dict), "an object"
    if "pair_tokens" in table:
        yield "pair_tokens", table["pair_tokens"], _are_integers([table["pair_tokens"]], 1), "an integer from 0"
    if "decode_tokens" in table:
        yield "decode_tokens", table["decode_tokens"], _are_integers(table["decode_tokens"], 2), "two integers from 0"
    for types, tokens in table.get("stream_tokens", {}).items():
        yield f"stream_tokens[{types[:40]!r}]", tokens, _are_integers([tokens], 1), "an integer from 0"
    for shape, by_tokens in table.get("tiles", {}).items():
        fits = bool(_SHAPE.fullmatch(shape)) and isinstance(by_tokens, dict) and bool(by_tokens)
        yield f"tiles[{shape[:60]!r}]", by_tokens, fits, "KERNEL/TYPE/TYPE/ROWSxK with {T: tiles}"
        for T, sizes in by_tokens.items():
            fits = bool(re.fullmatch("[1-9][0-9]{0,8}", T)) and _are_integers(sizes, len(_NAMES), 1, LARGEST)
            # Triton takes powers of two, but for the stages.
            fits = fits and all(n & (n - 1) == 0 for n in sizes[:-1])
            wanted = f"[{', '.join(_NAMES)}], integers from 1 to {LARGEST}, all but the last powers of two"
            yield f"tiles[{shape!r}][{T[:20]!r}]", sizes, fits, wanted


def _are_integers(value: Any, count: int, least: int = 0, most: int = 2**31) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(n) is int and least <= n <= most for n in value)
