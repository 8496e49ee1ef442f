"""`Spool`: the server's own copies of its experts' files. The originals may change or go while they are served."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Container
from pathlib import Path

from t2kernels import InputError, MissingFileError
from t2kernels.experts.exchange.peft_files import CONFIG, WEIGHTS
from t2kernels.experts.expert import ExpertError
from t2kernels.integrations.vllm.requests import digest

KEPT = 1024
"""Copies that are kept. Beyond that the oldest unused one is deleted."""


class Spool:
    """A private directory of copies, named by their content. It is deleted with the object."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="t2kernels-experts-")
        self.path: Path = Path(self._folder.name)
        self._kept: dict[str, None] = {}  # addresses, oldest first

    def take(self, file: Path, used: Container[str]) -> str:
        """Copy an expert's file, or the folder of a LoRA adapter. used: addresses whose copies must stay.

        Returns the address of the copy. Raises ExpertError if the file is not an expert, InputError if the folder is no
        LoRA adapter, MissingFileError if it lacks a file, OSError if one cannot be read or written (disk full).
        """
        new = self.path / f".{uuid.uuid4().hex}"
        try:
            if file.is_dir():
                new.mkdir()
                for part in (CONFIG, WEIGHTS):
                    if not (file / part).is_file():
                        raise MissingFileError(f"{file} holds no {part}; wanted the folder of a LoRA adapter of PEFT")
                    shutil.copyfile(file / part, new / part)
            else:
                shutil.copyfile(file, new)
            # Of the copy, because the file may be changing. The name covers the whole file, the digest only z: two
            # experts with the same z may have different questions for "auto".
            name, z = _name(new), digest(new)
            kept = self.path / (name if file.is_dir() else f"{name}.safetensors")
            if not (kept.is_dir() and new.is_dir()):  # the same adapter is there already
                new.rename(kept)
        except (ExpertError, InputError) as e:
            raise type(e)(str(e).replace(str(new), str(file))) from None
        finally:
            _delete(new)
        where = f"{kept}#{z}"
        self._kept.pop(where, None)
        self._kept[where] = None
        for old in [a for a in self._kept if a not in used and a != where][: max(0, len(self._kept) - KEPT)]:
            del self._kept[old]
            _delete(Path(old.rpartition("#")[0]))
        return where


def _name(of: Path) -> str:
    """16 hexadecimal digits of the digest of a file, or of those in a folder."""
    whole = hashlib.sha256()
    for part in sorted(of.iterdir()) if of.is_dir() else [of]:
        with open(part, "rb") as f:
            whole.update(hashlib.file_digest(f, "sha256").digest())
    return whole.hexdigest()[:16]


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
