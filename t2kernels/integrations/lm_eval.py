"""SVF experts in lm-eval (the Language Model Evaluation Harness), one for all documents or one for each document.

    python -m t2kernels.integrations.lm_eval run --tasks gsm8k \\
        --model t2kernels --model_args pretrained=DIR,expert=experts/math

This module takes the arguments of the command `lm_eval`, which by itself knows only its own models. In a program, call
`register()` and then `lm_eval.simple_evaluate(model="t2kernels", model_args=...)`, or pass an `SVFLM` as the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import t2kernels as t2
from t2kernels import InputError, MissingFileError, PackageError
from t2kernels.experts.files import find_file
from t2kernels.experts.names import BASE

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise PackageError(
        f"t2kernels.integrations.lm_eval needs lm-eval: pip install 't2kernels[lm-eval]' ({error})"
    ) from error

NAME = "t2kernels"
"""The model's name in lm-eval."""
TINY = "tiny"
"""The built-in model."""


class SVFLM(HFLM):
    """lm-eval's `hf` model, patched, with experts.

    pretrained: as for `hf`, or "tiny", the built-in model
    expert: for documents that name none. The name of one of `experts`, a file, or with "tiny" the name of one of its
        experts; in a program also a function from document to name. None or "base": the base model
    experts: files of experts that documents may name, separated by ";", each PATH or NAME=PATH
    expert_column: the column of a document that holds the name of its expert, for tasks whose documents have one
    targets, rank, form, factors: as for `patch_model`; rank "all" is None
    kwargs: as for `hf`

    Raises FileNotFoundError for an expert without a file, and what `patch_model` and `bank.add` raise. An evaluation
    raises ValueError, before any forward, for a document that names an unknown expert.
    """

    bank: t2.ExpertBank
    expert: str | Callable[[dict[str, Any]], str | None] | None
    expert_column: str

    def __init__(
        self,
        pretrained: Any,
        expert: str | Callable[[dict[str, Any]], str | None] | None = None,
        experts: str | Sequence[str] = "",
        expert_column: str = "expert",
        targets: str = "all",
        rank: int | float | str | None = "auto",
        form: str = "auto",
        factors: str | None = None,
        **kwargs: Any,
    ):
        tiny = pretrained == TINY
        files = _files(experts)
        if isinstance(expert, str) and expert not in (BASE, *files):
            built_in = t2.tiny.experts() if tiny else {}
            found = find_file(expert) or built_in.get(expert)
            if found is None:
                known = ", ".join([BASE, *files, *built_in])
                raise MissingFileError(f"expert={expert}: neither a file nor one of {known}")
            expert = Path(found).stem
            files[expert] = Path(found)
        super().__init__(pretrained=str(t2.tiny.path()) if tiny else pretrained, **kwargs)
        # lm-eval sets max_length, but a max_new_tokens in the model's own settings would take precedence.
        self.model.generation_config.max_new_tokens = None
        rank = None if rank == "all" else rank
        self.bank = t2.patch_model(self.model, targets=targets, rank=rank, form=form, factors=factors)
        for name, file in files.items():
            self.bank.add(name, file)
        self.expert, self.expert_column = expert, expert_column

    def expert_of(self, doc: object) -> str | None:
        """The name of the expert that answers a document, None for the base model.

        Raises ValueError if there is no expert of that name.
        """
        name = doc.get(self.expert_column) if isinstance(doc, dict) else None
        if name is None:
            name = self.expert(doc) if callable(self.expert) else self.expert
        if name in (None, BASE):
            return None
        if name not in self.bank:
            raise InputError(
                f"a document asks for the expert {name!r}, and there is none of that name; given are "
                f"{', '.join([BASE, *self.bank.names])}: name its file in experts=, or another column in expert_column="
            )
        return name

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy answer) of each request's continuation, by the request's expert."""
        return self._by_expert(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each request's whole text, by the request's expert."""
        return self._by_expert(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that each request's expert generates."""
        return self._by_expert(super().generate_until, requests, disable_tqdm)

    def _by_expert(self, answer: Callable[..., list[Any]], requests: Sequence[Any], disable_tqdm: bool) -> list[Any]:
        """Answer the requests of one expert after another. lm-eval sorts and batches what it is given."""
        groups: dict[str | None, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self.expert_of(request.doc), []).append(i)
        out: list[Any] = [None] * len(requests)
        for name, at in groups.items():
            with self.bank.use(name):
                for i, found in zip(at, answer([requests[i] for i in at], disable_tqdm=disable_tqdm), strict=True):
                    out[i] = found
        return out


def _files(experts: str | Sequence[str]) -> dict[str, Path]:
    """{name: file} of PATH or NAME=PATH entries. Raises FileNotFoundError."""
    files: dict[str, Path] = {}
    if not experts:
        return files
    for entry in experts.split(";") if isinstance(experts, str) else experts:
        name, equals, path = entry.strip().partition("=")
        name, path = (name, path) if equals else (Path(name).stem, name)
        file = find_file(path)
        if file is None:
            raise MissingFileError(f"experts: no file {path!r} for the expert {name!r}")
        files[name] = file
    return files


def register() -> None:
    """Make `model="t2kernels"` known to lm-eval in this process. Idempotent."""
    import lm_eval.models  # noqa: F401  its own models first: the registry looks for them only while it is empty
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        module = "t2kernels.integrations.lm_eval" if __name__ == "__main__" else __name__
        model_registry.register(NAME, target=f"{module}:SVFLM")


def main() -> None:
    """The command `lm_eval` with this model registered."""
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
