"""Strategies of `t2kernels.adapt` as the command line names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from t2kernels.experts.names import CLASSIFIER

from . import models

if TYPE_CHECKING:
    from t2kernels.adapt import Question, Strategy

KINDS = ("prompt", "classify", "router", "confidence", "likelihood", "few-shot")

AdaptOption = typer.Option(
    None,
    help="Choose the expert of each prompt: prompt, classify, router, confidence, likelihood or few-shot; docs/reference/adaptation.md says how.",
    show_default=False,
)
ClassifierOption = typer.Option(
    CLASSIFIER, help="The expert that answers for --adapt classify and router, by path or name."
)
ExamplesOption = typer.Option(
    None, help="A .jsonl file with prompt and answer, for --adapt few-shot.", show_default=False
)
MarginOption = typer.Option(
    0.0, help="Nats by which --adapt prompt and classify must prefer an expert; below it the base model answers."
)


def strategy(
    kind: str,
    loaded: models.Loaded,
    experts: Sequence[str],
    classifier: str = CLASSIFIER,
    examples: Path | None = None,
    margin: float = 0.0,
    seed: int = 0,
) -> Strategy:
    """The strategy `kind` on a patched model, over experts by path or name (the built-in model's by default), which it puts into the bank.

    Raises ValueError before any forward: an unknown kind, no experts, no examples for few-shot.
    """
    from t2kernels import adapt, tasks

    check(kind, examples)
    if not experts and loaded.name != models.TINY:
        raise ValueError(f"--adapt {kind} needs experts to choose from: give each with --expert")
    model, tokenizer, bank = loaded.model, loaded.tokenizer, loaded.model.t2_bank
    names = [
        n
        for n in (models.add_expert(bank, e, loaded.name) for e in experts or ("math", "code", "reason"))
        if n is not None
    ]
    if kind in ("confidence", "likelihood"):
        return adapt.ZeroShot(model, tokenizer, names, by=kind)
    if kind == "few-shot":
        task = tasks.from_jsonl(examples)
        rows = [row for split in ("train", "validation", "test") for row in task.rows(split, None, 0)]
        if loaded.name == models.TINY:  # its answers end in the answer, with or without the working before it
            task = tasks.Task(task.name, task.rows, tasks.tiny.final, 32)
        few = adapt.Examples(
            model, tokenizer, rows, task, gold=lambda row: ("=" if loaded.name == models.TINY else "") + row["answer"]
        )
        return adapt.FewShot(model, tokenizer, few, names, adapt.CEMConfig(seed=seed))
    if kind == "prompt":
        return adapt.Prompt(model, tokenizer, question(loaded, names), margin)
    asked = models.add_expert(bank, classifier, loaded.name)
    if asked is None:
        raise ValueError(f"--adapt {kind}: the base model is no classifier; --adapt prompt asks it")
    known = bank[asked].manifest.get("question") is not None
    judge = adapt.Classifier(model, tokenizer, None if known else question(loaded, names), asked, margin=margin)
    return judge if kind == "classify" else adapt.Router(judge)


def check(kind: str, examples: Path | None) -> None:
    """What can be known before a model is loaded. Raises ValueError or FileNotFoundError."""
    if kind not in KINDS:
        raise ValueError(f"--adapt {kind}: wanted one of {', '.join(KINDS)}")
    if kind == "few-shot" and examples is None:
        raise ValueError("--adapt few-shot needs --examples FILE.jsonl, with a prompt and its answer a line")
    if kind == "few-shot" and not examples.is_file():
        raise FileNotFoundError(f"--examples {examples}: no such file")


def question(loaded: models.Loaded, names: Sequence[str]) -> Question:
    """What a model is asked: the built-in one its own question, any other in English."""
    from t2kernels.adapt import Question

    return (
        Question.tiny(names)
        if loaded.name == models.TINY
        else Question.about(names, chat=bool(loaded.tokenizer.chat_template))
    )
