"""`t2 generate`: prompts and experts in one mixed batch."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.table import Table
from rich.text import Text

from t2kernels.cli import models
from t2kernels.cli import strategies as adaptation
from t2kernels.cli.console import out
from t2kernels.evaluation import answers


def generate(
    prompts: list[str] = typer.Argument(help="One or more prompts.", show_default=False),
    expert: list[str] = typer.Option(
        [], "--expert", "-e", help="An expert's path or name, or 'base'. May be repeated."
    ),
    mix: list[str] = typer.Option([], help="A mixture of experts, NAME=WEIGHT,... May be repeated."),
    adapt: str = adaptation.AdaptOption,
    classifier: str = adaptation.ClassifierOption,
    examples: Path = adaptation.ExamplesOption,
    margin: float = adaptation.MarginOption,
    pair: bool = typer.Option(
        False, "--pair", help="The i-th prompt with the i-th expert only, not every prompt with every expert."
    ),
    model: str = models.ModelOption,
    max_new_tokens: int = typer.Option(64, help="Most tokens to write."),
    temperature: float = typer.Option(0.0, help="0 is greedy."),
    chat: bool = typer.Option(False, "--chat", help="Put each prompt into the model's chat template."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON lines instead of a table."),
    targets: str = models.TargetsOption,
    rank: str = models.RankOption,
    form: str = models.FormOption,
    factors: str = models.FactorsOption,
    dtype: str = models.DtypeOption,
    device: str = models.DeviceOption,
) -> None:
    """Answer prompts with experts, all in one mixed batch: every row of it has its own expert.

    [dim]$[/] t2 generate "47+8+6?" --expert base --expert math --expert code

    [dim]$[/] t2 generate "47+8+6?" "rsxt(gcafd)?" --expert math --expert code --pair

    [dim]$[/] t2 generate "47+8+6?" --mix math=.7,code=.3

    [dim]$[/] t2 generate "47+8+6?" "rsxt(gcafd)?" --adapt classify
    """
    if adapt:
        adaptation.check(adapt, examples)
    loaded = models.load(model, dtype, device)
    bank = models.patch(loaded, targets, rank, form, factors)
    if adapt and (mix or pair):
        raise ValueError(
            "--adapt chooses the expert of each prompt: it takes no --mix and no --pair; --expert says what to choose from"
        )
    if adapt:
        way = adaptation.strategy(adapt, loaded, expert, classifier, examples, margin)
        picked = way.choose(
            [
                _templated(loaded.tokenizer, prompt) if chat and adapt in ("confidence", "likelihood") else prompt
                for prompt in prompts
            ]
        )
        rows = [(prompt, (_label(name), name)) for prompt, name in zip(prompts, picked, strict=True)]
    else:
        rows = _asked_for(prompts, expert, mix, pair, bank, model)
    texts = [_templated(loaded.tokenizer, prompt) if chat else prompt for prompt, _ in rows]
    written = answers(
        loaded.model,
        loaded.tokenizer,
        texts,
        [e for _, (_, e) in rows],
        max_new_tokens,
        batch=len(rows),
        temperature=temperature,
    )
    if as_json:
        for (prompt, (label, _)), text in zip(rows, written, strict=True):
            print(json.dumps({"prompt": prompt, "expert": label, "text": text}, ensure_ascii=False))
        return
    shown = Table("prompt", "expert", "answer", title=f"one batch of {len(rows)}", title_justify="left")
    for (prompt, (label, _)), text in zip(rows, written, strict=True):
        shown.add_row(Text(prompt), Text(label), Text(text))  # as they are: in rich's markup :b: is an emoji
    out.print(shown)


def _asked_for(
    prompts: list[str], expert: list[str], mix: list[str], pair: bool, bank, model: str
) -> list[tuple[str, tuple]]:
    """(prompt, (label, expert)) for what --expert and --mix name; the base model where they name nothing."""
    chosen: list = [models.add_expert(bank, name, model) for name in expert] + [
        models.parse_mix(text, bank, model) for text in mix
    ]
    labels = [*expert, *mix] or [models.BASE]
    return pairs(prompts, list(zip(labels, chosen or [None], strict=True)), pair)


def _label(name) -> str:
    if isinstance(name, dict):
        return ",".join(f"{n}={weight:g}" for n, weight in name.items())
    return name or models.BASE


def pairs(prompts: list[str], experts: list, one_to_one: bool) -> list[tuple[str, object]]:
    """Which prompt is answered by which expert. Raises ValueError."""
    if not one_to_one:
        return [(prompt, expert) for prompt in prompts for expert in experts]
    if len(prompts) != len(experts):
        raise ValueError(
            f"--pair: {len(prompts)} prompts and {len(experts)} experts; wanted one expert for each prompt"
        )
    return list(zip(prompts, experts, strict=True))


def _templated(tokenizer, prompt: str) -> str:
    if not tokenizer.chat_template:
        raise ValueError("--chat: this model's tokenizer has no chat template")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
