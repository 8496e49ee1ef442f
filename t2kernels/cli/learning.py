"""One training run of the command line: a bar or lines that show it, and what is kept when it is stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2kernels.cli import models
from t2kernels.cli.console import bar, err
from t2kernels.tasks.judging import CHOICE

SHOWN: dict[str, str] = {
    "reward": "reward {:+.2f}", "accuracy": "right {:.0%}", "kl": "KL {:.2f}", "loss": "loss {:.3f}"
}  # fmt: skip
"""{number of a log: how it is shown}. The loss says something where there is no reward."""


class Stopped(KeyboardInterrupt):
    """A run was stopped from the keyboard.

    expert: as far as it got, or the best of its evaluations; step: the last; of: how many there were to be
    """

    def __init__(self, expert: Any, step: int, of: int) -> None:
        super().__init__()
        self.of: int = of
        self.expert: Any = expert
        self.step: int = step


def learn(
    loaded: models.Loaded,
    task: Any,
    name: str,
    init: Any = None,
    validation: Sequence[Mapping[str, Any]] | None = None,
    **settings: Any,
) -> Any:
    """Train an expert of a patched model on a task. Returns the expert, which is in the bank too.

    A terminal shows a progress bar; any other output gets a line a step.
    init: the Expert to start from; settings: fields of `SVFConfig`, or of
        `SVFConfig.choices` for a task of choices, or of `SVFConfig.sft` with supervised=True
    validation: held-out problems, for evaluations; None: those of the task
    Raises Stopped if the user stops it.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from t2kernels.train import SVFConfig, SVFTrainer

    settings = {"report_to": "none", "logging_steps": 1, "use_cpu": loaded.model.device.type == "cpu", **settings}
    make = SVFConfig.choices if getattr(task, "check", None) == CHOICE else SVFConfig
    make = SVFConfig.sft if settings.get("supervised") else make
    config = make(**settings)
    resume = (
        get_last_checkpoint(config.output_dir)
        if config.save_strategy != "no" and Path(config.output_dir).is_dir()
        else None
    )
    with bar(*(f"{{task.fields[{key}]}}" for key in SHOWN)) as progress:
        row = progress.add_task(f"training {name}", total=config.max_steps, **dict.fromkeys(SHOWN, ""))
        trainer = SVFTrainer(
            loaded.model, config, task, None if validation is None else list(validation), experts=name, init=init,
            processing_class=loaded.tokenizer, callbacks=[_watcher(progress, row)],
        )  # fmt: skip
        try:
            trainer.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            if name not in trainer.experts:
                raise
            raise Stopped(trainer.experts[name], trainer.state.global_step, config.max_steps) from None
    return trainer.experts[name]


def _watcher(progress: Any, row: Any) -> Any:
    """A callback that shows logs: on the bar the means over 5 steps, since a single batch is noisy; in lines each."""
    from transformers import TrainerCallback

    live = err.is_terminal

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            progress.update(row, completed=state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            logs = logs or {}
            if "eval_accuracy" in logs:
                what = "base model" if not state.global_step else f"step {state.global_step}"
                err.print(f"{what}: {logs['eval_accuracy']:.1%} ± {logs['eval_accuracy_se']:.1%} of held-out problems")
            elif live:
                recent = [entry for entry in state.log_history[-5:] if "loss" in entry]
                progress.update(row, **shown(recent))
            elif "loss" in logs:
                err.print(f"step {state.global_step} of {state.max_steps}: {', '.join(shown([logs]).values())}")

    return Watch()


def shown(logs: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """{number: the text of its mean over some logs}, for the numbers that are in all of them."""
    return {
        key: text.format(sum(entry[key] for entry in logs) / len(logs))
        for key, text in SHOWN.items()
        if logs and all(key in entry for entry in logs) and not (key == "loss" and "reward" in logs[0])
    }
