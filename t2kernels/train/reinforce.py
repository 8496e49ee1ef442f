"""`ReinforceTrainer`: REINFORCE (Transformer², arXiv 2501.06252, section 3.1) on the weights that require gradients."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl

from t2kernels import InputError, InputTypeError
from t2kernels.rollout.chat import as_completion
from t2kernels.rollout.generation import Rollout, Sampler
from t2kernels.rollout.rewards import Scorer

from .arguments import UnsupportedSettingError, refused_method, unsupported, unsupported_argument
from .config import SVFConfig
from .data import Problems
from .loss import importance_ratio, reinforce_loss
from .policy.answers import right_answers
from .policy.options import Choices
from .policy.rolling import RolloutTrainer
from .policy.scores import TokenScorer
from .processes import alone_by_mistake, gather, seed_by_rank
from .steering.gap import Gap
from .steering.measures import Measures, statistics
from .steering.watch import Watch
from .trainer_methods import check_trainer, unsupported_part

logger: logging.Logger = logging.getLogger(__name__)


class ReinforceTrainer(RolloutTrainer):
    """Samples completions, scores them, and follows the gradient of the expected reward less a KL penalty:

        ∇ E[r] = E[A ∇ log pi(y | x)]

    It does not know what is trained. `SVFTrainer` trains experts; a subclass with its own `routing` and `reference`
    trains other adapters with the same rollouts, loss and evaluation.

    model: a causal language model; args: the settings
    train_dataset, eval_dataset: `Problems`
    scorers: {expert, or None: its Scorer}, for the rows with that value in the column "expert"
    processing_class: the model's tokenizer
    choosers: {expert: an object with `options(row)` and `norm`, as a task has}, for experts whose rows are not answered
        in writing, but by the likeliest option: for all of them, or for none
    The rest as in transformers.Trainer.

    Raises ValueError without a tokenizer, for rows without a scorer, for a reward that fails on empty completions, and
    for an argument of Trainer that would have no effect; TypeError for arguments of another trainer;
    UnsupportedTrainerError for a transformers whose Trainer is not the one that this class overrides.

    With several processes each has its own problems and its own random numbers. Logged means are over all of them.
    """

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
        choosers: Mapping[str | None, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_trainer()
        check_arguments(args, kwargs)
        if processing_class is None:
            raise InputError("processing_class is missing: give the model's tokenizer")
        self.scorers: dict[str | None, Scorer] = dict(scorers)
        self.choosers: dict[str | None, Any] = dict(choosers or {})
        if self.choosers and (written := set(self.scorers) - set(self.choosers)):
            raise InputError(
                f"the rows of {sorted(map(str, self.choosers))} are answered by options and those of "
                f"{sorted(map(str, written))} in writing: train them with a trainer each"
            )
        self.sampler: Sampler = Sampler(model, processing_class, args.max_new_tokens or 64)
        for part in (train_dataset, eval_dataset):
            self._probe(part)
        if args.supervised and not self.choosers:
            right_answers(self.sampler, [train_dataset[0]], torch.device("cpu"))
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
        # Several processes have to run the same forwards, and their rows start differently.
        how = {"whole": sharded, "share": args.share_prefix and self.accelerator.num_processes == 1}
        self.scorer: TokenScorer = TokenScorer(args.logits_memory, args.temperature, args.kl_direction, **how)
        self.option_scorer: TokenScorer = TokenScorer(args.logits_memory, 1.0, args.kl_direction, **how)
        speaks = self.is_world_process_zero() and not args.supervised  # a sure policy is what right answers ask for
        self.measures: Measures = Measures(Watch(speaks), len(self.scorers) > 1)
        self.gap: Gap = Gap(args.importance_cap)
        self._kept: list[list[Rollout]] = []  # of the steps since the last rollout, for num_iterations
        self._micro: tuple[int, int] = (-1, 0)  # (step, batches of it so far)

    def _begin(self) -> None:
        """Called when model, optimiser and data of a run are ready, before its first step."""
        self._kept, self._micro = [], (-1, 0)
        self.begin_drawing()
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
        parts = self._parts(inputs["rows"])
        total = torch.zeros((), dtype=torch.float32, device=self.args.device)
        for piece in parts:
            with contextlib.nullcontext() if piece is parts[-1] else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, piece) / self.current_gradient_accumulation_steps
                self.accelerator.backward(loss)
            total += loss.detach()
        self.gap.end_of_batch(self.measures, self.stale)
        self.measures.end_of_batch()
        if self.args.torch_empty_cache_steps and self.state.global_step % self.args.torch_empty_cache_steps == 0:
            clear_device_cache()
        return total

    def _parts(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Rollout | Choices]:
        """What a step computes the loss of, in pieces: new rollouts, those of the last step, or choices."""
        if self.choosers:
            return self.choices(rows)
        again, step = self.args.num_iterations, self.state.global_step
        self._micro = (step, self._micro[1] + 1 if self._micro[0] == step else 0)
        if step % again == 0 and self._micro[1] == 0:
            self._kept.clear()
        if self._micro[1] < len(self._kept):
            return self._kept[self._micro[1]]
        rollout = self.answers(rows) if self.args.supervised else self.rollout(rows)
        if not self.args.kl_coef and rollout.advantages is not None:
            # No work for rows that teach nothing; one of each expert, so that each gets a gradient.
            first = [rollout.experts.index(e) for e in dict.fromkeys(rollout.experts)]
            useful = rollout.advantages != 0
            useful[first] = True
            rollout = rollout.take(useful.nonzero()[:, 0])
        parts = rollout.split(self._rows_of_a_piece(rollout))
        if again > 1:
            self._kept.append(parts)
        return parts

    def _rows_of_a_piece(self, rollout: Rollout) -> int:
        """`loss_batch_size`, or fewer where the activations of so many rows would not fit into `loss_memory`."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        memory = args.loss_memory
        if memory is None:
            cuda = args.device.type == "cuda"
            memory = torch.cuda.get_device_properties(args.device).total_memory // 4 if cuda else 2**32
        with self.compute_loss_context_manager():
            row = rollout.ids.shape[1] * self.scorer.activation_bytes(model, rollout, self.routing)
        return max(1, min(args.loss_batch_size or len(rollout), int(memory / max(row, 1))))

    def compute_loss(
        self, model: nn.Module, inputs: Rollout | Choices, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """`reinforce_loss` of a rollout or `options_loss` of choices, a scalar."""
        if isinstance(inputs, Choices):
            return self.options_loss(model, inputs)
        args = self.args
        scores = self.scorer.score(
            model,
            inputs,
            self.routing(inputs.experts),
            self.reference if args.kl_coef else None,
            self.at_head(inputs.experts),
        )
        kl, mask = scores.kl, inputs.completion
        if kl is not None:
            self.measures.note(inputs.experts, kl=kl.detach().sum(1))
        self.measures.note(inputs.experts, entropy=scores.entropy.sum(1) / mask.sum(1).clamp(min=1))
        if args.num_iterations > 1 and inputs.old is None:
            inputs.old = scores.log_probs.detach()  # the first update is by the policy that drew
        importance = None
        if inputs.sampled is not None:
            now = scores.log_probs if inputs.old is None else inputs.old
            self.gap.add(now, inputs.sampled, mask)
            importance = importance_ratio(now, inputs.sampled, mask, args.importance_cap)
        return reinforce_loss(
            scores.log_probs, mask, inputs.advantages, inputs.weights, kl, args.kl_coef, inputs.old, args.clip,
            importance,
        )  # fmt: skip

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
        with self.measures.apart():
            results = [one for part in gather(self._answer(rows), world) for one in part]
            noted = self.measures.means(world)
        by_expert: dict[str | None, list] = defaultdict(list)
        for expert, *values in results:
            by_expert[expert].append(values)
        metrics = statistics([values for _, *values in results], metric_key_prefix)
        if len(by_expert) > 1:
            for expert, values in by_expert.items():
                metrics |= statistics(values, f"{metric_key_prefix}_{expert}")
        metrics |= {f"{metric_key_prefix}_{name}": mean for name, mean in noted.items()}
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
            routing = self.routing(experts)
            if self.choosers:
                out += zip(experts, self.chosen(model, batch, routing), [0] * len(batch), strict=True)
                continue
            ids, mask = self.sampler.encode(prompts, self.args.device)
            drawn = self.sampler.draw(model, ids, mask, 0.0, **routing)
            tokens = drawn.completion_ids()
            rewards = self.score(batch, self.sampler.read(tokens, prompts), tokens)
            out += zip(experts, rewards.tolist(), drawn.completion.sum(1).tolist(), strict=True)
        return out

    # --- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's. A training log also gets the means since the last log: reward, accuracy, completion_length,
        kl, entropy and same_text (the share of the batch's most common text), and the same for each of several experts.
        They are over all processes, which all must call it."""
        if "loss" in logs:
            logs |= self.measures.means(self.accelerator.num_processes)
        super().log(logs, start_time)

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
            self.score(rows, [as_completion("", row["prompt"]) for row in rows], [[]] * len(rows))


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
