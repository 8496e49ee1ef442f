"""The part of `t2 demo` on a real model: English prompts, answered by the base and by experts in one batch."""

from __future__ import annotations

import time
from typing import Any

from rich.markup import escape
from rich.table import Table

from t2kernels import PackageError
from t2kernels.cli import models
from t2kernels.cli.console import out
from t2kernels.cli.learning import learn
from t2kernels.experts.names import BASE
from t2kernels.rollout.chat import PromptForm, prompt_form

from .verbs.train import compare

LIVE = "tickets"
TEXTS: dict[str, tuple[str, ...]] = {
    "questions": ("Which river runs through Vienna?", "How many bones are in a hand?"),
    "reviews": ("all noise and no music", "two hours that i would gladly spend again"),
}
"""{expert that comes with the model: texts to ask it about}"""


def real_model(quick: bool) -> None:
    """Load SmolLM2, answer a mixed batch with the experts that come with it, and train one more on support tickets.

    Without the packages that hold the model it says so and ends.
    """
    from t2kernels.tiny import smollm2

    try:
        smollm2.gguf()
    except PackageError as e:
        out.print(f"left out: {e}", markup=False)
        return
    start = time.perf_counter()
    loaded = models.load(smollm2.NAME)
    bank = models.patch(loaded)
    out.print(
        f"{smollm2.MODEL}, {loaded.model.num_parameters():,} parameters, ready in {time.perf_counter() - start:.0f} s; "
        f"an expert is {sum(bank.matrices.values()):,} numbers; {bank.describe()}"
    )
    mixed(loaded)
    live(loaded, 2 if quick else 12)


def mixed(loaded: models.Loaded) -> None:
    """Ask each text's question of the base model and of its expert, all in one batch, and print what they write."""
    from t2kernels import tiny
    from t2kernels.evaluation import answers
    from t2kernels.tiny import smollm2

    shipped = tiny.experts(loaded.name)
    rows: list[tuple[str, str, str | None]] = []
    for name in (name for name in TEXTS if name in shipped):
        loaded.model.t2_bank.add(name, shipped[name])
        rows += [(text, smollm2.ask(name, text), expert) for text in TEXTS[name] for expert in (None, name)]
    chats = [PromptForm(chat=True).apply(asked) for _, asked, _ in rows]
    written = answers(loaded.model, loaded.tokenizer, chats, [expert for _, _, expert in rows], 12)
    shown = Table("text", "expert", "answer", box=None, pad_edge=False)
    for (text, _, expert), said in zip(rows, written, strict=True):
        shown.add_row(escape(text), expert or BASE, escape(" ".join(said.split())))
    out.print(shown)


def live(loaded: models.Loaded, steps: int) -> None:
    """Train an expert on the support tickets of this package, and print its accuracy before and after."""
    from t2kernels import tasks, tiny

    task: Any = tasks.classification(tiny.tickets())
    task = prompt_form(loaded.tokenizer, task=task).of_task(task)
    start = time.perf_counter()
    expert = learn(loaded, task, LIVE, max_steps=steps, per_device_train_batch_size=16)
    seconds = time.perf_counter() - start
    compare(loaded, task, task.split("test"), LIVE)
    out.print(
        f"{steps} steps on {len(task.split('train'))} labelled tickets in {seconds:.0f} s moved {expert.numel:,} "
        "numbers; the policy is over the labels, so nothing had to be written"
    )
