"""The history of a run: a JSONL file, one line a log, that is complete whenever the run ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from t2kernels import InputError, MissingFileError
from t2kernels.storage import FileError, parse_json, temporary_beside


class History(TrainerCallback):
    """Writes every log to a file, with its step. A run that resumes goes on in the same file, any other begins it anew.

    path: of the file
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = Path(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the file. A run that resumes keeps the lines up to its step."""
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step and self.path.is_file():
            kept = [row for row in read(self.path, torn=True) if row["step"] <= state.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(self.path)
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add a line."""
        if state.is_world_process_zero and self.path.is_file():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def read(path: str | os.PathLike[str], torn: bool = False) -> list[dict[str, Any]]:
    """The lines of a history file, in order.

    torn: pass over a last line without an end: its run was killed, or the disk was full, while it was written
    Raises MissingFileError; InputError for a line that is not a log's.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no history at {path}; expected the JSONL file of a run")
    rows = []
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, *([last] if last and not torn else [])], 1):
        try:
            row = parse_json(line)
        except FileError as e:
            raise InputError(f"{path}, line {number}: {e}; expected the JSON of a log") from None
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise InputError(f"{path}, line {number}: no step; expected the history file of a run")
        rows.append(row)
    return rows
