"""`Classifier`: an expert that is trained for it chooses (arXiv 2501.06252, section 3.2, "classification expert")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from t2kernels.experts.names import CLASSIFIER
from t2kernels.rollout.patched import bank_of

from .prompt import Prompt
from .question import Question


class Classifier(Prompt):
    """`Prompt`, with the expert `classifier` of the bank answering.

    question: None: the one in the expert's manifest, where `t2 train --task classify --classes ...` writes it
    classifier: the expert's name
    settings: as of `Prompt`
    Raises ValueError: no such expert, no question, a label whose expert is not in the bank.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        question: Question | None = None,
        classifier: str = CLASSIFIER,
        **settings: Any,
    ) -> None:
        if question is None:
            bank = bank_of(model)
            if classifier not in bank:
                raise ValueError(
                    f"no expert {classifier!r} in the bank to take the question from; add it, or pass question="
                )
            recorded = bank[classifier].manifest.get("question")
            if recorded is None:
                raise ValueError(
                    f"the manifest of expert {classifier!r} holds no question: pass the question of its training"
                )
            question = Question(**recorded)
        super().__init__(model, tokenizer, question, asked=classifier, **settings)


def make_classifier(
    model: nn.Module,
    tokenizer: Any,
    experts: Sequence[str] | Mapping[str, str],
    *,
    classifier: str | None,
    margin: float = 0.0,
    tiny: bool = False,
) -> Classifier:
    """The `Classifier` that asks the recorded question of `classifier`, or else which of `experts` fits.

    experts: as of `make_strategy`. If it is a mapping, labels of experts that it lacks keep the base model.
    Raises ValueError for classifier=None, the base model.
    """
    if classifier is None:
        raise ValueError("the base model is no classifier; strategy 'prompt' asks it")
    bank = bank_of(model)
    recorded = bank[classifier].manifest.get("question") if classifier in bank else None
    if recorded is None:
        question = Question.for_experts(experts, tokenizer, tiny)
    else:
        question = Question(**recorded)
        if isinstance(experts, Mapping):
            labels = {label: experts.get(name) for label, name in question.labels.items() if name is not None}
            question = replace(question, labels={**question.labels, **labels})
    return Classifier(model, tokenizer, question, classifier, margin=margin)
