"""`t2 generate`: prompts and experts in one mixed batch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from t2kernels import InputError
from t2kernels.cli import models, strategies
from t2kernels.cli.console import check_text, out
from t2kernels.evaluation import answers
from t2kernels.experts.names import BASE, MIX, Name, write_mixture
from t2kernels.rollout import chat as forms

if TYPE_CHECKING:
    from t2kernels import ExpertBank


@strategies.with_strategy_options
def generate(
    prompts: list[str] = typer.Argument(help="One or more prompts.", show_default=False),
    expert: list[str] = typer.Option(
        [], "--expert", "-e", help="An expert's path or name, or 'base'. May be repeated."
    ),
    mix: list[str] = typer.Option([], help="A mixture of experts, NAME=WEIGHT,... May be repeated."),
    adapt: str = strategies.AdaptOption,
    strategy_options: dict[str, Any] = strategies.EACH,
    pair: bool = typer.Option(
        False,
        "--pair",
        metavar="",
        help="Answer the i-th prompt with the i-th expert, not every prompt with every expert.",
    ),
    model: str = models.ModelOption,
    max_new_tokens: int = typer.Option(64, min=1, help="Tokens of the longest answer."),
    temperature: float = typer.Option(0.0, min=0, help="Sampling temperature; 0 is greedy."),
    chat: bool = models.ChatOption,
    system: str = models.SystemOption,
    as_json: bool = typer.Option(False, "--json", metavar="", help="Print JSON lines instead of a table."),
    targets: str = models.TargetsOption,
    rank: str = models.RankOption,
    form: str = models.FormOption,
    factors: str = models.FactorsOption,
    dtype: str = models.DtypeOption,
    device: str = models.DeviceOption,
) -> None:
    """Answer prompts with experts in one mixed batch, in which every row has its own expert.

    [dim]$[/] t2 generate "47+8+6?" --expert base --expert math --expert code

    [dim]$[/] t2 generate "47+8+6?" "rsxt(gcafd)?" --expert math --expert code --pair

    [dim]$[/] t2 generate "47+8+6?" --mix math=.7,code=.3

    [dim]$[/] t2 generate "47+8+6?" "rsxt(gcafd)?" --adapt classify
    """
    if adapt and (mix or pair):
        raise InputError(
            "--adapt chooses the expert of each prompt: it takes no --mix and no --pair; give the experts with --expert"
        )
    for prompt in prompts:
        check_text(prompt)
    if adapt:
        strategies.check(adapt, strategy_options)
    loaded = models.load(model, dtype, device)
    forms.prompt_form(loaded.tokenizer, chat, system)  # refuse before the model is patched
    bank = models.patch(loaded, targets, rank, form, factors)
    if adapt:
        named = [models.add_expert(bank, name, model) for name in expert]
        how = models.prompt_form(loaded, chat, system, named)
        asked = [how.apply(prompt) for prompt in prompts]
        chosen = strategies.strategy(adapt, loaded, expert, strategy_options, chat, system).choose(asked)
        rows = [(i, _label(name), name) for i, name in enumerate(chosen)]
    else:
        rows = _asked_for(len(prompts), expert, mix, pair, bank, model)
        how = models.prompt_form(loaded, chat, system, bank.names)
        asked = [how.apply(prompt) for prompt in prompts]
    written = answers(
        loaded.model,
        loaded.tokenizer,
        [asked[i] for i, _, _ in rows],
        [name for _, _, name in rows],
        max_new_tokens,
        batch=len(rows),
        temperature=temperature,
    )
    if as_json:
        for (i, label, _), text in zip(rows, written, strict=True):
            print(json.dumps({"prompt": prompts[i], "expert": label, "text": text}, ensure_ascii=False))
        return
    shown = Table("prompt", "expert", "answer", title=f"one batch of {len(rows)}", title_justify="left")
    for (i, label, _), text in zip(rows, written, strict=True):
        shown.add_row(Text(prompts[i]), Text(label), Text(text))  # Text: in rich's markup :b: is an emoji
    out.print(shown)


def _asked_for(
    count: int, expert: list[str], mix: list[str], pair: bool, bank: ExpertBank, model: str
) -> list[tuple[int, str, Name]]:
    """(prompt, label, expert) for --expert and --mix; the base model if neither is given. Raises ValueError."""
    chosen: list[Name] = [models.add_expert(bank, name, model) for name in expert]
    chosen += [models.parse_mix(text, bank, model) for text in mix]
    named = list(zip([*expert, *mix] or [BASE], chosen or [None], strict=True))
    if not pair:
        return [(i, label, name) for i in range(count) for label, name in named]
    if count != len(named):
        raise InputError(f"--pair: {count} prompts and {len(named)} experts; wanted one expert for each prompt")
    return [(i, label, name) for i, (label, name) in enumerate(named)]


def _label(name: Name) -> str:
    return write_mixture(name).removeprefix(MIX) if isinstance(name, Mapping) else name or BASE
