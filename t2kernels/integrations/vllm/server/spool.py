"""`Spool`: the server's own copies of its experts' files. The originals may change or go while they are served."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Container
from pathlib import Path

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
        """Copy an expert's file. used: addresses whose copies must stay.

        Returns the address of the copy. Raises ExpertError if the file is not an expert, OSError if it cannot be read
        or written (disk full).
        """
        new = self.path / f".{uuid.uuid4().hex}"
        try:
            shutil.copyfile(file, new)
            # Of the copy, because the file may be changing. The name covers the whole file, the digest only z: two
            # experts with the same z may have different questions for "auto".
            with open(new, "rb") as f:
                name = hashlib.file_digest(f, "sha256").hexdigest()[:16]
            z = digest(new)
            kept = new.rename(self.path / f"{name}.safetensors")
        except ExpertError as e:
            raise ExpertError(str(e).replace(str(new), str(file))) from None
        finally:
            new.unlink(missing_ok=True)
        where = f"{kept}#{z}"
        self._kept.pop(where, None)
        self._kept[where] = None
        for old in [a for a in self._kept if a not in used and a != where][: max(0, len(self._kept) - KEPT)]:
            del self._kept[old]
            Path(old.rpartition("#")[0]).unlink(missing_ok=True)
        return where
