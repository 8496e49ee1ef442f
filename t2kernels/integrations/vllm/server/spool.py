"""`Spool`: a server's own copies of the files of its experts, so that what happens to a file does not happen to those who are using it."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Container
from pathlib import Path

from t2kernels.integrations.vllm.requests import digest

KEPT = 1024  # copies; beyond that the oldest that no entry names goes


class Spool:
    """A private directory of copies by content, gone with the object."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="t2kernels-experts-")
        self.path = Path(self._folder.name)
        self._kept: dict[str, None] = {}  # addresses, oldest first

    def take(self, file: Path, used: Container[str]) -> str:
        """The address of a copy of a file. used: addresses that must stay. Raises OSError where it cannot be read, or written (disk full)."""
        new = self.path / f".{uuid.uuid4().hex}"
        try:
            shutil.copyfile(file, new)
            name = digest(new)  # of the copy: the file may be changing
            kept = new.rename(self.path / f"{name}.safetensors")
        finally:
            new.unlink(missing_ok=True)
        where = f"{kept}#{name}"
        self._kept.pop(where, None)
        self._kept[where] = None
        for old in [a for a in self._kept if a not in used and a != where][: max(0, len(self._kept) - KEPT)]:
            del self._kept[old]
            Path(old.rpartition("#")[0]).unlink(missing_ok=True)
        return where
