"""`Classifier`: the question is answered by an expert that was trained to answer it (arXiv 2501.06252, section 3.2, "classification expert")."""

from __future__ import annotations

from torch import nn

from t2kernels.experts.names import CLASSIFIER

from .prompt import Prompt
from .question import Question


class Classifier(Prompt):
    """`Prompt`, with the expert `classifier` of the bank answering.

    classifier: its name. question: None: the one in its manifest, where `t2 train --task classify --classes ...` writes it
    Raises ValueError: no such expert, no question, a label whose expert is not in the bank.
    """

    def __init__(
        self, model: nn.Module, tokenizer, question: Question | None = None, classifier: str = CLASSIFIER, **settings
    ):
        bank = getattr(model, "t2_bank", None)
        if question is None and bank is not None and classifier in bank:
            recorded = bank[classifier].manifest.get("question")
            if recorded is None:
                raise ValueError(
                    f"the manifest of expert {classifier!r} holds no question: pass question=, the one that it was trained on"
                )
            question = Question(**recorded)
        if question is None:
            raise ValueError(
                f"no expert {classifier!r} in the bank to take the question from; add it, or pass question="
            )
        super().__init__(model, tokenizer, question, asked=classifier, **settings)
