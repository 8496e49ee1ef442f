"""SVF experts in lm-eval (the Language Model Evaluation Harness), one for everything or one for each document.

    python -m t2kernels.integrations.lm_eval run --model t2kernels --model_args pretrained=DIR,expert=experts/math --tasks gsm8k

It takes the arguments of `lm_eval`, which itself only finds models that it brings along. In a program: `register()`, then
`lm_eval.simple_evaluate(model="t2kernels", model_args=...)`, or an `SVFLM` as the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import t2kernels as t2
from t2kernels.experts.files import find_file
from t2kernels.experts.names import BASE

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as e:
    raise ImportError(f"t2kernels.integrations.lm_eval needs lm-eval: pip install 't2kernels[lm-eval]' ({e})") from e

NAME = "t2kernels"


class SVFLM(HFLM):
    """lm-eval's model of transformers, patched, with experts.

    pretrained: as of `hf`, or "tiny", the built-in model
    expert: what answers documents that name none: an expert's name among `experts`, a path, or with "tiny" one that comes with it; a function
        from document to name in a program; None, or "base": the base model
    experts: files of experts that documents may name, separated by ";", each PATH or NAME=PATH
    expert_column: the column of a document that names its expert, in tasks whose documents have one
    targets, rank, form, factors: as of `patch_model`
    Everything else is of `hf`.

    Raises ValueError or FileNotFoundError for experts that are not there; for a document's label without an expert before anything runs.
    """

    def __init__(
        self,
        pretrained: Any,
        expert: str | Callable[[dict], str | None] | None = None,
        experts: str | Sequence[str] = "",
        expert_column: str = "expert",
        targets: str = "all",
        rank: int | float | str | None = None,
        form: str = "auto",
        factors: str | None = None,
        **kwargs,
    ):
        shipped = t2.tiny.experts() if pretrained == "tiny" else {}
        files = dict(map(_named, experts.split(";") if isinstance(experts, str) else experts)) if experts else {}
        if isinstance(expert, str) and expert not in (BASE, *files):
            found = find_file(expert) or shipped.get(expert)
            if found is None:
                known = ", ".join([BASE, *files, *shipped])
                raise FileNotFoundError(f"expert={expert}: neither a file nor one of {known}")
            expert = Path(found).stem
            files[expert] = str(found)
        for name, path in files.items():
            if find_file(path) is None:
                raise FileNotFoundError(f"experts: no file {path!r} for the expert {name!r}")
        if pretrained == "tiny":
            pretrained = str(t2.tiny.path())
        super().__init__(pretrained=pretrained, **kwargs)
        self.model.generation_config.max_new_tokens = (
            None  # lm-eval says max_length, and the model's own max_new_tokens would count instead
        )
        rank = None if rank in (None, "all") else rank
        self.bank = t2.patch_model(
            self.model, targets=targets, form=form, factors=factors, **({} if rank is None else {"rank": rank})
        )
        for name, path in files.items():
            self.bank.add(name, find_file(path))
        self.expert, self.expert_column = expert, expert_column

    def expert_of(self, doc: object) -> str | None:
        """The name of the expert that answers a document, None for the base model. Raises ValueError for a label without an expert."""
        label = doc.get(self.expert_column) if isinstance(doc, dict) else None
        if label is None:
            label = self.expert(doc) if callable(self.expert) else self.expert
        if label in (None, BASE):
            return None
        if label not in self.bank:
            raise ValueError(
                f"a document asks for the expert {label!r}, and there is none of that name; given are {', '.join([BASE, *self.bank.names])}: "
                "name its file in experts=, or another column in expert_column="
            )
        return label

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        return self._by_expert(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        return self._by_expert(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests, disable_tqdm: bool = False):
        return self._by_expert(super().generate_until, requests, disable_tqdm)

    def _by_expert(self, answer: Callable, requests: Sequence, disable_tqdm: bool) -> list:
        """The requests of each expert in turn: lm-eval sorts and cuts what it is given into batches of its own."""
        groups: dict[str | None, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self.expert_of(request.doc), []).append(i)
        out: list = [None] * len(requests)
        for name, at in groups.items():
            with self.bank.use(name):
                for i, found in zip(at, answer([requests[i] for i in at], disable_tqdm=disable_tqdm), strict=True):
                    out[i] = found
        return out


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.strip().partition("=")
    return (name, path) if equals else (Path(name).stem, name)


def register() -> None:
    """Make `model="t2kernels"` known to lm-eval, in this process."""
    import lm_eval.models  # noqa: F401  its own models first: the registry looks for them only while it is empty
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(
            NAME, target=f"{__name__ if __name__ != '__main__' else 't2kernels.integrations.lm_eval'}:SVFLM"
        )


def main() -> None:
    """The command `lm_eval`, which knows this model."""
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
