"""The command line, `t2`: one file for each verb.

The verbs import torch and transformers when they run, so that help is instant.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from .console import Commands, verb
from .verbs import decompose, demo, env, evaluate, export, generate, inspect, plan, serve, train, tune

app: typer.Typer = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "train": train.train,
    "eval": evaluate.evaluate,
    "generate": generate.generate,
    "decompose": decompose.decompose,
    "inspect": inspect.inspect,
    "plan": plan.plan,
    "export": export.export,
    "push": export.push,
    "serve": serve.serve,
    "tune": tune.tune,
    "env": env.env,
}
for _name, _verb in VERBS.items():
    app.command(_name)(verb(_verb))


@app.callback(
    epilog="[dim]Start with[/] t2 demo[dim]; it needs nothing but two CPU cores and takes about three minutes.[/]"
)
def main(
    debug: bool = typer.Option(
        False,
        "--debug",
        metavar="",
        help="Show the traceback of an error, not only its message. It may stand anywhere.",
    ),
) -> None:
    """SVF experts of Transformer²: train them by RL, keep many in a table, and batch them in one forward.

    An expert is one number for each singular value of a model's weights. Verbs use the built-in tiny model unless
    --model names another.
    """
