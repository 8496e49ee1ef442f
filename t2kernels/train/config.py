"""`SVFConfig`: the training arguments of transformers, plus the settings of REINFORCE on experts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from t2kernels import InputError
from t2kernels.rollout.checks import check_setting
from t2kernels.rollout.engines import parse_spec

from .arguments import UnsupportedSettingError, unsupported
from .processes import unsupported_environment

PARAMETRISATIONS: tuple[str, ...] = ("raw", "sigmoid")
ADVANTAGES: tuple[str, ...] = ("none", "batch", "group", "grpo", "leave_one_out")
LOSS_TYPES: tuple[str, ...] = ("sum", "grpo", "dapo", "dr_grpo")
POLICY_LOSSES: tuple[str, ...] = ("expected", "log")
KL_DIRECTIONS: tuple[str, ...] = ("reverse", "forward")
METRICS: tuple[str, ...] = ("accuracy", "reward", "completion_length")
"""What an evaluation reports. With several experts, also "EXPERT_accuracy" and so on."""


@dataclass
class SVFConfig(TrainingArguments):
    """Settings of `SVFTrainer`. The defaults are a recipe that works; `SVFConfig.paper()` is the authors' release.

    What is learned
    parametrisation: "raw", z = 1 + p; "sigmoid", the release's z = sigmoid(p) with the trace of W kept (needs
        form="factored", rank=None)

    Rollouts
    max_new_tokens: tokens of the longest completion; None: the task's, else 64
    num_generations: completions of each prompt (G)
    rollout: the engine that draws: "transformers", the model in training; "vllm", an engine of its own on this machine;
        "vllm:URL,URL", running servers. A step publishes the policy to it, as one row of numbers
    rollout_options: for the engine (docs/howto/vllm-rollouts.md): "factors", "model", "rows", "timeout", and arguments
        of vLLM's LLM
    max_staleness: updates that a policy may be behind when its completions are trained on. k: those of the next k
        updates are drawn while this one trains; 0: on-policy, one after the other
    importance_cap: a token that another policy drew counts pi / mu, mu the sampler's own probability, but at most this
        much; None: not cut. It applies where an engine tells its probabilities, as "vllm" does
    temperature: of the sampling *and* of every log-probability and KL, so that the gradient is that of the expected
        reward under the distribution that was sampled from. 0: greedy rollouts with log-probabilities at
        temperature 1, as in the release; that is not a policy gradient.

    From rewards to advantages
    reward_range: [low, high] that rewards are cut to; None: no cut, the paper's +1 / -1. [0, 1] turns the tasks'
        +1 / -1 into 1 / 0. Without a baseline a wrong answer then teaches nothing, instead of pushing down all of its
        tokens, right ones included. Accuracy always means reward > 0 before the cut.
    advantage: "none", A = r (the paper); "batch", (r - mean) / std over the batch; "group", r - mean over the G
        completions of a prompt; "grpo", the same divided by their std; "leave_one_out", r - mean over the other G - 1
    advantage_clip: A is cut to [-clip, clip]

    Loss
    kl_coef: weight of the full-vocabulary KL between the expert and the base model (row 0), summed over a completion; 0
        saves a forward
    kl_direction: "reverse", KL(pi || base); "forward", KL(base || pi), the release's
    loss_type: what a token counts: "sum", each the same, over the number of completions; "grpo", over the length of its
        completion as well; "dapo", over all tokens of the batch; "dr_grpo", over `max_new_tokens`. The KL is weighed
        alike
    num_iterations: updates from each batch of rollouts. The steps between draw nothing, and the prompts that the data
        loader gives for them are left out
    clip: for num_iterations > 1: the ratio of new and old probability of a token counts up to 1 - clip and 1 + clip
    policy_loss: for tasks with check="choice", where the policy is over the options of a row (`train.options`):
        "expected", -E_pi[r]; "log", -log E_pi[r]
    written_coef: for the same tasks, weight of -log of the probability that the model writes any of the options. It
        teaches the expert to answer with an option when it is asked to write; 0: only the choice is learned
    supervised: train on the right answers, the column "answer", instead of on rewards of completions: the cross-entropy
        of the answer's tokens and the end token. loss_type says what a token counts. Evaluations are as always. For
        tasks with check="choice" it is policy_loss="log" with written_coef=1, the same cross-entropy
    loss_batch_size: rows of one forward and backward, of similar length; None: all at once. It does not change
        gradients. Smaller pieces take less memory, and the longest row of a piece pads only that piece.

    loss_memory: bytes that the activations of a piece may take. What a token takes is measured once, and pieces get
        fewer rows than loss_batch_size where these would not fit. None: a quarter of a GPU's memory, 4 GB on a CPU
    share_prefix: read what the rows of a piece start with once, their instruction or the prompt of a group, and not for
        each row. It changes gradients by rounding only. Needs a model whose cache holds keys and values; no effect
        with gradient checkpointing and with several processes
    logits_memory: bytes that all logits of the loss may take at once. The head runs on as many positions as fit, and
        again in the backward pass. It does not change gradients.

    What is kept
    keep_best: end with the expert that was best in an evaluation, by metric_for_best_model, not with the last. Needs
        evaluations (eval_strategy) and no checkpoints; where there are some, each holds the best so far
    history: a JSONL file that every log is written to; None: none

    Arguments of transformers with another default here: learning_rate .02, 150 steps of 128 prompts, warm-up over 7 %
    of the steps, the last 30 % down to 5 % in a straight line, gradient norm cut at 1 (each expert by itself), nothing
    saved, no progress bar, best model by accuracy. DistributedDataParallel neither looks for unused parameters (there
    are none) nor sends buffers (the frozen factors are the same everywhere).

    Raises ValueError for a value that is not one of these, and for an argument of transformers that would have no
    effect here (`train.arguments` lists them, with the reasons).
    """

    parametrisation: str = field(default="raw", metadata={"help": "raw or sigmoid"})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of the longest completion; by default the task's, else 64."}
    )
    num_generations: int = field(default=1, metadata={"help": "Completions of each prompt."})
    temperature: float = field(
        default=1.0, metadata={"help": "Of the sampling and of the log-probabilities; 0 is greedy."}
    )
    reward_range: list[float] | None = field(
        default_factory=lambda: [0.0, 1.0], metadata={"help": "Rewards are cut to [low, high]."}
    )
    advantage: str = field(default="none", metadata={"help": "none, batch, group or leave_one_out"})
    advantage_clip: float | None = field(default=None, metadata={"help": "Advantages are cut to [-clip, clip]."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL to the base model."})
    kl_direction: str = field(
        default="reverse", metadata={"help": "reverse, KL(pi || base), or forward, KL(base || pi)"}
    )
    loss_type: str = field(default="sum", metadata={"help": "sum, grpo, dapo or dr_grpo"})
    num_iterations: int = field(default=1, metadata={"help": "Updates from each batch of rollouts."})
    clip: float | None = field(default=None, metadata={"help": "Ratios count up to 1 - clip and 1 + clip."})
    policy_loss: str = field(default="expected", metadata={"help": "For choices: expected or log"})
    written_coef: float = field(default=0.02, metadata={"help": "For choices: weight of -log P(an option is written)"})
    supervised: bool = field(default=False, metadata={"help": "Train on the column answer, not on rewards."})
    loss_batch_size: int | None = field(default=32, metadata={"help": "Rows of one forward and backward."})
    loss_memory: int | None = field(default=None, metadata={"help": "Bytes of the activations of one piece."})
    share_prefix: bool = field(default=True, metadata={"help": "Read what rows start with once."})
    logits_memory: int = field(default=2**28, metadata={"help": "Bytes of all logits of the loss at once."})

    keep_best: bool = field(default=False, metadata={"help": "End with the expert of the best evaluation."})
    history: str | None = field(default=None, metadata={"help": "A JSONL file for every log."})

    rollout: str = field(default="transformers", metadata={"help": "transformers, vllm, or vllm:URL,URL"})
    rollout_options: dict[str, Any] | None = field(default=None, metadata={"help": "Arguments of the engine."})
    max_staleness: int = field(default=0, metadata={"help": "Updates between drawing and training; 0: on-policy."})
    importance_cap: float | None = field(default=2.0, metadata={"help": "The largest weight of a sampled token."})

    learning_rate: float = field(
        default=0.02, metadata={"help": "Of Adam; about the largest move of a raw z in one step."}
    )
    max_steps: int = field(default=150, metadata={"help": "Updates; -1: num_train_epochs decides."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Prompts a step."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Prompts of one batch in evaluation."})
    lr_scheduler_type: str = field(default="warmup_stable_decay", metadata={"help": "Any scheduler of transformers."})
    warmup_steps: float = field(default=0.07, metadata={"help": "Steps, or a share of all steps if below 1."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "The norm of an expert's gradient is cut to this."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    save_strategy: str = field(
        default="no", metadata={"help": "no, steps, epoch or best; the experts stay in memory either way."}
    )
    metric_for_best_model: str | None = field(default="accuracy", metadata={"help": "accuracy or reward"})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "False for the progress bar of transformers."})
    use_cache: bool = field(
        default=True, metadata={"help": "Rollouts use a KV cache; forwards with gradients never do."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "False: every forward uses every parameter of an expert."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "False: the factors are frozen, so they are not sent in each forward."}
    )
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "False: text cannot be pinned."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "False: the reward needs the columns."})

    saving = False  # set by the trainer while it writes a checkpoint

    def __post_init__(self) -> None:
        for name, allowed in (
            ("parametrisation", PARAMETRISATIONS),
            ("advantage", ADVANTAGES),
            ("kl_direction", KL_DIRECTIONS),
            ("loss_type", LOSS_TYPES),
            ("policy_loss", POLICY_LOSSES),
        ):
            check_setting(getattr(self, name) in allowed, name, getattr(self, name), " or ".join(map(repr, allowed)))
        for name in (
            "max_new_tokens",
            "num_generations",
            "num_iterations",
            "loss_batch_size",
            "loss_memory",
            "logits_memory",
        ):
            value = getattr(self, name)
            check_setting(value is None or value >= 1, name, value, "at least 1")
        check_setting(
            self.temperature >= 0 and math.isfinite(self.temperature),
            "temperature",
            self.temperature,
            "0 (greedy) or more",
        )
        rate = float(self.learning_rate)
        check_setting(rate >= 0 and math.isfinite(rate), "learning_rate", self.learning_rate, "0 or more")
        for name in ("kl_coef", "written_coef"):
            value = getattr(self, name)
            check_setting(value >= 0 and math.isfinite(value), name, value, "0 or more")
        check_setting(
            self.advantage_clip is None or self.advantage_clip > 0,
            "advantage_clip",
            self.advantage_clip,
            "more than 0, or None",
        )
        check_setting(self.clip is None or 0 < self.clip < 1, "clip", self.clip, "between 0 and 1, or None")
        if self.num_iterations > 1 and self.clip is None:
            raise InputError(
                f"num_iterations={self.num_iterations} trains on completions of an older policy: set clip, such as 0.2"
            )
        check_setting(self.max_staleness >= 0, "max_staleness", self.max_staleness, "0 (on-policy) or more")
        check_setting(
            self.importance_cap is None or self.importance_cap >= 1,
            "importance_cap",
            self.importance_cap,
            "at least 1, or None",
        )
        parse_spec(self.rollout)
        if self.max_staleness and self.num_iterations > 1:
            raise InputError(
                f"max_staleness={self.max_staleness} with num_iterations={self.num_iterations}: both train on "
                "completions of an older policy; choose one"
            )
        if self.reward_range is not None:
            self.reward_range = [float(v) for v in self.reward_range]
            good = len(self.reward_range) == 2 and self.reward_range[0] < self.reward_range[1]
            check_setting(good, "reward_range", self.reward_range, "[low, high], or None")
        if self.advantage in ("group", "grpo", "leave_one_out"):
            check_setting(
                self.num_generations > 1,
                "num_generations",
                self.num_generations,
                f"at least 2 for advantage={self.advantage!r}",
            )
            if self.temperature == 0:
                raise InputError(
                    f"advantage={self.advantage!r} compares samples of a prompt, and at temperature=0 all are the same"
                )
        if self.supervised and self.num_generations > 1:
            raise InputError(
                f"num_generations={self.num_generations} with supervised=True: a prompt has one right answer, so "
                "leave it out"
            )
        if self.keep_best and self.eval_strategy == "no":
            raise InputError('keep_best=True compares evaluations: set eval_strategy="steps" and eval_steps')
        metric = self.metric_for_best_model
        check_setting(
            metric is None or metric.endswith(METRICS), "metric_for_best_model", metric, " or ".join(map(repr, METRICS))
        )
        if reason := unsupported(self) or unsupported_environment():
            raise UnsupportedSettingError(reason)
        self._checkpointing()
        super().__post_init__()

    def _checkpointing(self) -> None:
        """Make gradient checkpointing non-reentrant: its recomputation has to know the experts of its forward."""
        # transformers 5.23 calls it activation_checkpointing, and warns about the older name.
        new = "activation_checkpointing" if hasattr(self, "activation_checkpointing") else "gradient_checkpointing"
        on = getattr(self, new) or self.gradient_checkpointing
        kwargs = dict(getattr(self, f"{new}_kwargs") or self.gradient_checkpointing_kwargs or {})
        if on and kwargs.setdefault("use_reentrant", False):
            raise InputError(
                "use_reentrant=True would recompute with the wrong experts: leave it out, or set it to False"
            )
        if on:
            for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
                setattr(self, name, None)
            setattr(self, new, True)
            setattr(self, f"{new}_kwargs", kwargs)

    @property
    def should_save(self) -> bool:
        """True if this process writes checkpoints. If not, transformers does not create the output directory.

        Without a strategy it is True only while a checkpoint is written that a callback has asked for.
        """
        return super().should_save and (self.save_strategy != "no" or self.saving)

    @classmethod
    def choices(cls, output_dir: str | None = None, **changes: Any) -> SVFConfig:
        """The settings for tasks with check="choice". `changes` replace single settings.

        The gradient is exact there, so small batches do: 60 steps of 32 prompts at a learning rate of .01. No KL: it
        would hold the choice to that of the base model, which is often one label for every text. The loss is
        -log E[r]: the gradient of -E[r] vanishes where the policy is sure of one label, and a run may end there. Beside
        its larger gradients, written_coef is .1: at .02 an expert chose as well and wrote a label half as often.
        """
        settings = {"max_steps": 60, "per_device_train_batch_size": 32, "learning_rate": 0.01, "kl_coef": 0.0}
        settings |= {"policy_loss": "log", "written_coef": 0.1}
        return cls(output_dir, **{**settings, **changes})

    @classmethod
    def sft(cls, output_dir: str | None = None, **changes: Any) -> SVFConfig:
        """The settings for supervised training: `supervised` with those of `choices`, whose gradient is as exact.
        `changes` replace single settings."""
        return cls.choices(output_dir, **{"supervised": True, **changes})

    @classmethod
    def paper(cls, output_dir: str | None = None, **changes: Any) -> SVFConfig:
        """The settings of the authors' release. `changes` replace single settings.

        Sigmoid z with the trace kept; Adam at 2e-3 without a schedule; gradient norm cut at 1e-3; 256 prompts a step
        with one greedy completion each; reward +1 / -1 without a baseline; no KL; the expert that was best on the
        validation set, so an eval_dataset is needed.

        It learns far slower than the defaults: Adam at 2e-3 on p moves z by about 1e-3 a step, a twentieth of theirs.
        """
        settings = {
            "parametrisation": "sigmoid",
            "learning_rate": 2e-3,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "max_grad_norm": 1e-3,
            "per_device_train_batch_size": 256,
            "temperature": 0.0,
            "reward_range": None,
            "kl_coef": 0.0,
            "kl_direction": "forward",
            "eval_strategy": "steps",
            "eval_steps": 10,
            "save_strategy": "steps",
            "save_steps": 10,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
        }
        return cls(output_dir, **{**settings, **changes})
