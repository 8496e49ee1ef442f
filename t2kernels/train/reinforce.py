"""`ReinforceTrainer`: REINFORCE (Transformer², arXiv 2501.06252, section 3.1) on the weights that require gradients."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl

from t2kernels import InputError, InputTypeError
from t2kernels.rollout.chat import as_completion
from t2kernels.rollout.generation import Rollout, Sampler
from t2kernels.rollout.rewards import Scorer, advantages

from .arguments import UnsupportedSettingError, refused_method, unsupported, unsupported_argument
from .config import SVFConfig
from .data import Problems
from .loss import reinforce_loss
from .processes import alone_by_mistake, gather, seed_by_rank
from .scores import AtHead, TokenScorer
from .trainer_methods import check_trainer, unsupported_part

logger: logging.Logger = logging.getLogger(__name__)

PATIENCE = 5
"""Batches in a row whose rewards are all equal, before a warning."""


class ReinforceTrainer(Trainer):
    """Samples completions, scores them, and follows the gradient of the expected reward less a KL penalty:

        ∇ E[r] = E[A ∇ log pi(y | x)]

    It does not know what is trained. `SVFTrainer` trains experts; a subclass with its own `routing` and `reference`
    trains other adapters with the same rollouts, loss and evaluation.

    model: a causal language model; args: the settings
    train_dataset, eval_dataset: `Problems`
    scorers: {expert, or None: its Scorer}, for the rows with that value in the column "expert"
    processing_class: the model's tokenizer
    The rest as in transformers.Trainer.

    Raises ValueError without a tokenizer, for rows without a scorer, for a reward that fails on empty completions, and
    for an argument of Trainer that would have no effect; TypeError for arguments of another trainer;
    UnsupportedTrainerError for a transformers whose Trainer is not the one that this class overrides.

    With several processes each has its own problems and its own random numbers. Logged means are over all of them.
    """

    args: SVFConfig
    control: TrainerControl
    loss_is_scaled_for_ga: bool | None

    predict: Any = refused_method("predict")
    evaluation_loop: Any = refused_method("evaluation_loop")
    prediction_step: Any = refused_method("prediction_step")
    hyperparameter_search: Any = refused_method("hyperparameter_search")
    push_to_hub: Any = refused_method("push_to_hub")

    def __init__(
        self,
        model: nn.Module,
        args: SVFConfig,
        train_dataset: Problems,
        eval_dataset: Problems | None,
        scorers: Mapping[str | None, Scorer],
        processing_class: Any,
        **kwargs: Any,
    ) -> None:
        check_trainer()
        check_arguments(args, kwargs)
        if processing_class is None:
            raise InputError("processing_class is missing: give the model's tokenizer")
        self.scorers: dict[str | None, Scorer] = dict(scorers)
        self.sampler: Sampler = Sampler(model, processing_class, args.max_new_tokens or 64)
        for part in (train_dataset, eval_dataset):
            self._probe(part)
        # Trainer writes its use_cache into the model's config. Let it write the value that is there: another thread may
        # be generating.
        args.use_cache, use_cache = getattr(getattr(model, "config", None), "use_cache", True), args.use_cache
        try:
            super().__init__(
                model=model,
                args=args,
                data_collator=_collate,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        finally:
            args.use_cache = use_cache
        # One process for each device: replicas of nn.DataParallel have no experts in training.
        args._n_gpu = min(args.n_gpu, 1)
        if args.n_gpu > 1:
            raise unsupported_part("TrainingArguments._n_gpu", "one process trains on one device", "it has no effect")
        if (reason := alone_by_mistake(self.accelerator.num_processes)) and args.process_index == 0:
            logger.warning("this process trains alone, but %s: start it with torchrun --nproc_per_node N", reason)
        self.remove_callback(PrinterCallback)  # Trainer adds it where there is no progress bar; it writes to stdout
        self.add_callback(_Begin(self._begin))
        sharded = getattr(self.accelerator.state, "fsdp_plugin", None) is not None  # the head has no weights by itself
        self.scorer: TokenScorer = TokenScorer(args.logits_memory, args.temperature, args.kl_direction, whole=sharded)
        self._measured: dict[str, list[float]] = defaultdict(list)
        self._equal: Counter[str | None] = Counter()

    # --- overridden by subclasses

    def routing(self, experts: Sequence[str | None]) -> dict[str, Tensor]:
        """Arguments of a forward that sends row i of a batch through experts[i]."""
        return {}

    def reference(self) -> contextlib.AbstractContextManager[object]:
        """A context in which the model is the reference of the KL."""
        raise NotImplementedError("a KL needs a reference: set kl_coef=0, or define reference()")

    def at_head(self, experts: Sequence[str | None]) -> AtHead:
        """A function of rows of a batch that gives a context. In it the head, called by itself, computes for each
        position what it does in a forward with `routing(experts)`; rows None: in a forward of the reference."""
        return lambda rows: contextlib.nullcontext()

    def _begin(self) -> None:
        """Called when model, optimiser and data of a run are ready, before its first step."""
        seed_by_rank(self.args.seed, self.accelerator.process_index, self.accelerator.num_processes)

    # --- a step

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Roll out, score, and run forward and backward. Returns the loss, a scalar."""
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        # No dropout: log-probabilities are those of the model that was sampled from. But models recompute activations
        # in training mode only.
        if model.training != bool(self.args.gradient_checkpointing):
            model.train(not model.training)
        rollout = self.rollout(inputs["rows"])
        pieces = rollout.split(self.args.loss_batch_size)
        total = torch.zeros((), dtype=torch.float32, device=self.args.device)
        for piece in pieces:
            with contextlib.nullcontext() if piece is pieces[-1] else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, piece) / self.current_gradient_accumulation_steps
                self.accelerator.backward(loss)
            total += loss.detach()
        if self.args.torch_empty_cache_steps and self.state.global_step % self.args.torch_empty_cache_steps == 0:
            clear_device_cache()
        return total

    @torch.no_grad()
    def rollout(self, rows: Sequence[Mapping[str, Any]]) -> Rollout:
        """Draw `num_generations` completions of each row's prompt and score them."""
        args, samples = self.args, self.args.num_generations
        prompts = [row["prompt"] for row in rows]
        ids, mask = self.sampler.encode(prompts, args.device)
        routing = self.routing([row.get("expert") for row in rows])
        out = self.sampler.draw(
            self.accelerator.unwrap_model(self.model), ids, mask, args.temperature, samples, **routing
        )
        rows = [row for row in rows for _ in range(samples)]
        out.experts = [row.get("expert") for row in rows]
        rewards = self.score(rows, self.sampler.decode(out, [row["prompt"] for row in rows]))
        cut = rewards if args.reward_range is None else rewards.clamp(*args.reward_range)
        parts = gather(
            list(zip(out.experts, rewards.tolist(), cut.tolist(), strict=True)), self.accelerator.num_processes
        )
        everyone = [one for part in parts for one in part]
        self._watch(everyone)
        start = sum(map(len, parts[: self.accelerator.process_index]))
        out.advantages = self._advantages(cut, out.experts, everyone, start).to(ids.device)
        # A mean for each expert, not over the batch: its gradient must not depend on the other rows of the batch.
        counts = self._counts([expert for expert, *_ in everyone])
        weights = [self.accelerator.num_processes / counts[e] for e in out.experts]
        out.weights = torch.tensor(weights, dtype=torch.float32, device=ids.device)
        lengths = out.completion.sum(1)
        self._note(out.experts, reward=rewards, accuracy=rewards > 0, completion_length=lengths)
        return out

    def score(self, rows: Sequence[Mapping[str, Any]], completions: Sequence[Any]) -> Tensor:
        """The reward of each completion, by the scorer of its row's expert. Returns [B] fp32 on the CPU."""
        rewards = torch.zeros(len(rows), dtype=torch.float32)
        for expert in dict.fromkeys(row.get("expert") for row in rows):
            at = [i for i, row in enumerate(rows) if row.get("expert") == expert]
            rewards[at] = self.scorers[expert]([rows[i] for i in at], [completions[i] for i in at])
        return rewards

    def compute_loss(
        self, model: nn.Module, inputs: Rollout, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """`reinforce_loss` of a rollout, a scalar."""
        scores = self.scorer.score(
            model,
            inputs,
            self.routing(inputs.experts),
            self.reference if self.args.kl_coef else None,
            self.at_head(inputs.experts),
        )
        if scores.kl is not None:
            self._note(inputs.experts, kl=scores.kl.detach().sum(1))
        return reinforce_loss(
            scores.log_probs, inputs.completion, inputs.advantages, inputs.weights, scores.kl, self.args.kl_coef
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's. "warmup_stable_decay" without arguments goes down to 5 % over the last 30 % of the steps."""
        kwargs = self.args.lr_scheduler_kwargs
        if kwargs is None and self.args.lr_scheduler_type == "warmup_stable_decay":
            decay = {"num_decay_steps": round(0.3 * num_training_steps), "decay_type": "linear", "min_lr_ratio": 0.05}
            self.args.lr_scheduler_kwargs = decay
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args.lr_scheduler_kwargs = kwargs

    def _counts(self, experts: Sequence[str | None]) -> Counter[str | None]:
        """How many rows each expert has in the batch of all processes."""
        return Counter(experts)

    def _advantages(
        self,
        cut: Tensor,
        experts: Sequence[str | None],
        everyone: Sequence[tuple[str | None, float, float]],
        start: int,
    ) -> Tensor:
        """[B] of this process, whose rows begin at `start` in `everyone`, the (expert, reward, cut reward) of all."""
        args = self.args
        if args.advantage != "batch":
            return advantages(cut, experts, args.num_generations, args.advantage, args.advantage_clip)
        names, _, values = zip(*everyone, strict=True)
        out = advantages(torch.tensor(values, dtype=torch.float32), names, 1, "batch", args.advantage_clip)
        return out[start : start + len(cut)]

    # --- evaluation

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer the evaluation problems greedily, each with its expert, and score the answers.

        Returns {prefix}_accuracy (share of rewards > 0), _accuracy_se (its binomial standard error), _reward (mean),
        _reward_se and _completion_length, over all problems. With several experts also {prefix}_{expert}_accuracy and
        so on for each. Raises ValueError without an evaluation set.
        """
        start = time.perf_counter()
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            raise InputError("evaluate() needs problems: pass eval_dataset here or to the trainer")
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        rows = [data[i] for i in range(rank, len(data), world)]
        results = [one for part in gather(self._answer(rows), world) for one in part]
        by_expert: dict[str | None, list] = defaultdict(list)
        for expert, *values in results:
            by_expert[expert].append(values)
        metrics = _statistics([values for _, *values in results], metric_key_prefix)
        if len(by_expert) > 1:
            for expert, values in by_expert.items():
                metrics |= _statistics(values, f"{metric_key_prefix}_{expert}")
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - start, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _answer(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str | None, float, int]]:
        """(expert, reward, completion length) of a greedy completion for each row, in no particular order."""
        model, size, out = self.accelerator.unwrap_model(self.model), self.args.per_device_eval_batch_size, []
        rows = sorted(rows, key=lambda row: len(str(row["prompt"])))  # equal lengths together: less padding
        for at in range(0, len(rows), size):
            batch = rows[at : at + size]
            prompts, experts = [row["prompt"] for row in batch], [row.get("expert") for row in batch]
            ids, mask = self.sampler.encode(prompts, self.args.device)
            drawn = self.sampler.draw(model, ids, mask, 0.0, **self.routing(experts))
            rewards = self.score(batch, self.sampler.decode(drawn, prompts))
            out += zip(experts, rewards.tolist(), drawn.completion.sum(1).tolist(), strict=True)
        return out

    # --- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's. A training log also gets the means since the last log: reward, accuracy, completion_length
        and kl, and the same for each of several experts. They are over all processes, which all must call it."""
        if "loss" in logs:
            parts = gather([dict(self._measured)], self.accelerator.num_processes)
            everyone: dict[str, list[float]] = defaultdict(list)
            for (part,) in parts:
                for key, values in part.items():
                    everyone[key] += values
            logs |= {key: math.fsum(values) / len(values) for key, values in everyone.items()}
            self._measured.clear()
        super().log(logs, start_time)

    def _note(self, experts: Sequence[str | None], **values: Tensor) -> None:
        several = len(self.scorers) > 1
        for key, v in values.items():
            v = v.tolist()
            self._measured[key] += v
            if several:
                for e, one in zip(experts, v, strict=True):
                    self._measured[f"{e}_{key}"].append(one)

    def _watch(self, everyone: Sequence[tuple[str | None, float, float]]) -> None:
        """Warn once for each expert if all its rewards were equal, within a batch, for PATIENCE batches in a row.

        everyone: (expert, reward, cut reward) of the batch, of all processes
        """
        for expert in dict.fromkeys(e for e, *_ in everyone):
            rewards = [reward for e, reward, _ in everyone if e == expert]
            cut = [value for e, _, value in everyone if e == expert]
            equal = len(cut) > 1 and len(set(cut)) == 1
            self._equal[expert] = self._equal[expert] + 1 if equal else 0
            if self._equal[expert] != PATIENCE or not self.is_world_process_zero():
                continue
            who = "" if expert is None else f" of expert {expert!r}"
            same = len(set(rewards)) == 1
            why = "" if same else f"; they do differ before the cut to reward_range={self.args.reward_range}"
            logger.warning(
                "every reward%s in the last %d batches was %g: there is nothing to learn from%s",
                who,
                PATIENCE,
                cut[0],
                why,
            )

    def _probe(self, data: Problems | None) -> None:
        """Try each reward on two rows with empty completions, so that a broken one fails before any long work."""
        for name, rows in ({} if data is None else data.parts).items():
            rows = [dict(rows[i]) for i in range(min(2, len(rows)))]
            rows = rows if name is None else [{**row, "expert": name} for row in rows]
            for row in rows:
                if row.get("expert") not in self.scorers:
                    raise InputError(
                        f"no reward for rows of expert {row.get('expert')!r}; there are some for {list(self.scorers)}"
                    )
            self.score(rows, [as_completion("", row["prompt"]) for row in rows])


class _Begin(TrainerCallback):
    """Calls `begin` when a run begins."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin()


def check_arguments(args: SVFConfig, kwargs: Mapping[str, object]) -> SVFConfig:
    """Return `args`. Raises TypeError if they are of another trainer, UnsupportedSettingError as `unsupported` says.

    kwargs: the other arguments of Trainer
    """
    if not isinstance(args, SVFConfig):
        raise InputTypeError(f"args is a {type(args).__name__}; wanted an SVFConfig")
    if reason := unsupported(args) or unsupported_argument(kwargs):
        raise UnsupportedSettingError(reason)
    return args


def _collate(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {"rows": rows}


def _statistics(values: Sequence[Any], prefix: str) -> dict[str, float]:
    """Means and standard errors of (reward, length) pairs."""
    rewards, lengths = (torch.tensor(column, dtype=torch.float64) for column in zip(*values, strict=True))
    n = len(rewards)
    accuracy = (rewards > 0).double().mean().item()
    return {
        f"{prefix}_accuracy": accuracy,
        f"{prefix}_accuracy_se": (accuracy * (1 - accuracy) / n) ** 0.5,
        f"{prefix}_reward": rewards.mean().item(),
        f"{prefix}_reward_se": (rewards.var(unbiased=False) / n).sqrt().item(),
        f"{prefix}_completion_length": lengths.mean().item(),
    }
