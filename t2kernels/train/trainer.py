"""`SVFTrainer`: experts of a patched model, trained by REINFORCE through the very modules that serve them."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from t2kernels import InputError, UnknownNameError
from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.expert import Expert
from t2kernels.experts.names import check_files
from t2kernels.layers.dense.head import head_of
from t2kernels.layers.routing.route import Route
from t2kernels.rollout.modes import frozen
from t2kernels.rollout.patched import bank_of
from t2kernels.rollout.rewards import Reward, Scorer
from t2kernels.storage import temporary_beside, write_json

from . import trainer_state as checkpoint
from .config import SVFConfig
from .data import by_expert, problems, validation_of
from .policy.scores import AtHead
from .reinforce import ReinforceTrainer, check_arguments
from .steering.best import BestExperts
from .steering.history import History
from .trainer_methods import unsupported_part

STATE, ARGUMENTS = "trainer_state.json", "svf_config.json"


class SVFTrainer(ReinforceTrainer):
    """Trains one expert, or several at once, on a model that `patch_model` has patched.

    An expert is W' = U diag(sigma * z) Vᵀ (Transformer², arXiv 2501.06252, section 3.1). Only its z is trained, over
    the support of each layer. Rollouts, log-probabilities and the KL's reference (row 0) all run through the one
    model; no weight is copied.

        trainer = SVFTrainer(model, SVFConfig("out"), tasks.load("math"), processing_class=tokenizer)
        trainer.train()
        trainer.save_expert("math", "experts/math")          # it is in the model's bank as well

    train_dataset: a task, a list of dicts or a `datasets.Dataset`. A column "prompt" (text, or chat messages) and the
        columns that the reward takes; a column "expert" gives each row its own expert.
    eval_dataset: the same; None: the validation split of the tasks
    reward: reward(prompts, completions, **columns) -> list of numbers, as TRL calls it; a list of rewards;
        {expert: one of these}; None: the task's
    experts: the name of the one expert (default: the task's name, or "expert"), or {name: train_dataset} for several
    reward_weights: one for each reward of a list
    init: the Expert to start from, or {name: Expert} ("raw" only); None: the base model
    processing_class: the model's tokenizer
    The rest as in transformers.Trainer.

    Several experts in a batch train as each would alone: rows are rolled out, scored, normalised and averaged with
    those of their own expert, gradient norms are cut one by one, and a step does not move an expert that it does not
    see.

    After `train()`: `experts` {name: Expert}, also in the bank. Every other weight is as before, with its
    requires_grad.
    Raises ValueError before any work: not patched, no reward, a reward that fails or returns the wrong number of
    values or NaN, no prompts, a name that is taken, a tokenizer that cannot pad.
    """

    model: PreTrainedModel
    model_wrapped: nn.Module
    optimizer: Optimizer | None
    lr_scheduler: LRScheduler | None

    def __init__(
        self,
        model: nn.Module,
        args: SVFConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        reward: Reward | Sequence[Reward] | Mapping[str, Reward | Sequence[Reward]] | None = None,
        experts: str | Mapping[str, Any] | None = None,
        reward_weights: Sequence[float] | None = None,
        init: Expert | Mapping[str, Expert] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        bank = bank_of(model)
        self.bank: ExpertBank = bank
        # What is not set is filled in, in a copy: the same settings may train on another model.
        args = copy(check_arguments(SVFConfig() if args is None else args, kwargs))
        data, tasks = by_expert(train_dataset, experts)
        train = problems(data, "train", "train_dataset")
        names = train.experts
        if eval_dataset is None and tasks and set(tasks) == set(names):
            eval_dataset = validation_of(tasks, needed=args.eval_strategy != "no" or args.eval_on_start)
        elif eval_dataset is not None and len(names) == 1 and not isinstance(eval_dataset, Mapping):
            eval_dataset = {names[0]: eval_dataset}
        check_files(names)
        for name in names:
            if name in bank:
                raise InputError(
                    f"the bank has an expert named {name!r}; choose another name, or remove it and pass it as init"
                )
        self.init: dict[str, Expert | None] = (
            dict.fromkeys(names, init) if isinstance(init, Expert) or init is None else dict(init)
        )
        if unknown := set(self.init) - set(names):
            raise InputError(f"init has {sorted(unknown)}, but the experts in training are {names}")
        if args.max_new_tokens is None and tasks:
            args.max_new_tokens = max(getattr(t, "max_new_tokens", 64) for t in tasks.values())
        rewards = reward if isinstance(reward, Mapping) else dict.fromkeys(names, reward)
        scorers = {}
        for name in names:
            own = rewards.get(name)
            scorers[name] = Scorer.of(tasks.get(name) if own is None else own, reward_weights)
        self.tasks: dict[str, str | None] = {name: getattr(task, "name", None) for name, task in tasks.items()}
        evaluation = problems(eval_dataset, "validation", "eval_dataset")
        if evaluation is not None and (unknown := set(evaluation.experts) - set(names)):
            raise InputError(
                f"eval_dataset has problems of {sorted(map(str, unknown))}, but the experts in training are {names}"
            )
        choosers = {name: task for name, task in tasks.items() if getattr(task, "check", None) == "choice"}
        super().__init__(model, args, train, evaluation, scorers, processing_class, choosers, **kwargs)
        if args.history is not None:
            self.add_callback(History(args.history))
        self.best: BestExperts = BestExperts()
        self.experts: dict[str, Expert] = {}
        self._names: list[str] = names
        self._seen: set[str | None] = set()  # experts of the batches since the last optimiser step
        self._tokenizer: Any = processing_class
        self._chosen: dict[str, int] = {}  # the step that load_best_model_at_end picked

    # --- training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer.train. Experts of an earlier train() of this trainer leave the bank first.

        resume_from_checkpoint: a folder; True: the last one in output_dir; None: `args.resume_from_checkpoint`; False:
            none
        After a failure `experts` holds the experts as far as they got. Raises ValueError for parametrisation="sigmoid"
        on partial supports, ExpertMismatch for a checkpoint of other factors.
        """
        for name in set(self.experts) & set(self.bank.names):
            self.bank.remove(name)
        self.experts, self._chosen, self.best = {}, {}, BestExperts()
        self.optimizer = self.lr_scheduler = None  # their parameters are gone
        set_seed(self.args.seed)  # again: the start must not depend on what ran since the trainer was made
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        finished, at_start, tokenizer = False, self.args.eval_on_start, self.processing_class
        # A run that resumes was evaluated at its start already.
        self.args.eval_on_start = at_start and not resume_from_checkpoint
        with self._only_experts_train():
            try:
                for name in self._names:
                    self.bank.start_training(name, self.args.parametrisation, self.init.get(name))
                # Trainer.train writes the special tokens of a tokenizer into the model's configs, where another thread
                # may be reading. `_begin` gives it back.
                self.processing_class, self._tokenizer = None, tokenizer
                result = super().train(resume_from_checkpoint, **kwargs)
                if self.args.keep_best and self.state.global_step not in self._history(self._names[0]):
                    self.evaluate()
                finished = True
            finally:
                self.processing_class = tokenizer
                self.args.eval_on_start = at_start
                for name in [n for n in self._names if n in self.bank.in_training]:
                    if (step := self.best.restore(name, self.bank.trained_parameters(name))) is not None:
                        self._chosen[name] = step
                    self.experts[name] = self.bank.stop_training(name, **self._manifest(name))
                    if not finished:
                        self.bank.remove(name)
        return result

    @contextlib.contextmanager
    def _only_experts_train(self) -> Iterator[None]:
        """Freeze every weight, and restore the model afterwards."""
        model = self.model
        try:
            with frozen(model):
                yield
        finally:
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            vars(model).pop("_is_accelerate_prepared", None)
            self.model_wrapped = self.model = model

    def _begin(self) -> None:
        self.processing_class = self._tokenizer
        if not hasattr(self.model_wrapped, "_is_accelerate_prepared"):
            mark = "Accelerator marks a prepared model by _is_accelerate_prepared"
            raise unsupported_part(mark, "a second train() must prepare the model again", "the model has no such mark")
        super()._begin()

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As `ReinforceTrainer.training_step`. Experts that the batch has no row of get no gradient."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            # A gradient of zero is not enough: Adam would go on moving the expert by its momentum.
            for name in self._names:
                if name not in self._seen:
                    for p in self.bank.trained_parameters(name).values():
                        p.grad = None
            self._seen.clear()
        return loss

    def routing(self, experts: Sequence[str | None]) -> dict[str, Tensor]:
        """`expert_ids` of the rows. A name that is not in the bank means the base model."""
        names = [e if e in self.bank else None for e in experts]
        return {"expert_ids": self.bank.ids(names[0] if len(set(names)) == 1 else names)}

    def policy(self, name: str) -> Expert | None:
        """The expert as it is now, or None for a name that is not in the bank. Factors are not named again in it."""
        if name not in self.bank:
            return None
        return self.bank[name]

    def reference(self) -> contextlib.AbstractContextManager[object]:
        """The base model."""
        return self.bank.routing.hold(None)

    def at_head(self, experts: Sequence[str | None]) -> AtHead:
        """As `ReinforceTrainer.at_head`: z of the head, if it is patched."""
        head, ids = head_of(self.model) or self.model, self.routing(experts)["expert_ids"]

        def at(rows: Tensor | None) -> contextlib.AbstractContextManager[object]:
            route = None if rows is None else Route(ids if ids.dim() == 0 else ids[rows])
            return self.bank.routing.within(head, route)

        return at

    def _counts(self, experts: Sequence[str | None]) -> Counter[str | None]:
        counts = super()._counts(experts)
        self._seen |= set(counts)
        return counts

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Cut the norm of each expert's gradient by itself. Returns the norm over all of them before the cut."""
        clip: Any = self.accelerator.clip_grad_norm_
        if self.accelerator.scaler is not None:  # fp16: gradients may be unscaled once a step, not once an expert
            self.accelerator.unscale_gradients()
            clip = nn.utils.clip_grad_norm_
        norms = [
            clip(list(self.bank.trained_parameters(name).values()), self.args.max_grad_norm) for name in self._names
        ]
        return torch.linalg.vector_norm(torch.stack([torch.as_tensor(n) for n in norms]))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `ReinforceTrainer.evaluate`. With keep_best, the best experts so far are remembered."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.args.keep_best and eval_dataset is None and metric_key_prefix == "eval" and self.state.global_step:
            sign = -1 if self.args.greater_is_better is False else 1
            for name in set(self._names) & set(self.bank.in_training):
                value = self._history(name, self._metric).get(self.state.global_step)
                if value is not None:
                    parameters = self.bank.trained_parameters(name)
                    self.best.offer(name, sign * value, self.state.global_step, parameters)
        return metrics

    @property
    def _metric(self) -> str:
        return (self.args.metric_for_best_model or "accuracy").removeprefix("eval_")

    # --- experts

    def save_expert(self, name: str, path: str | os.PathLike[str]) -> Path:
        """Write one expert, as it is now, to `path`(.safetensors). Returns the path of the file.

        Raises KeyError for a name that was not trained, OSError if the file cannot be written.
        """
        return self._expert(name).save(path)

    def _expert(self, name: str) -> Expert:
        if name in self.experts:
            return self.experts[name]
        if name not in self.bank.in_training or name not in self._names:
            raise UnknownNameError(f"no expert {name!r} was trained here; there are {list(self.experts) or 'none yet'}")
        return self.bank.expert(self.bank[name].z, **self._manifest(name))

    def _manifest(self, name: str) -> dict[str, Any]:
        """The facts about its training that an expert's file records."""
        args, history = self.args, self._history(name)
        step = self._chosen.get(name, self.state.global_step)
        facts = {
            "name": name,
            "task": self.tasks.get(name),
            "reward": self.scorers[name].name,
            "parametrisation": args.parametrisation,
            "supervised": args.supervised or None,
            "steps": step,
            "batch": args.per_device_train_batch_size
            * args.num_generations
            * args.gradient_accumulation_steps
            * args.world_size,
            "learning_rate": args.learning_rate,
            "kl_coef": args.kl_coef,
            "seed": args.seed,
            "accuracy_before": history.get(0),
            "accuracy_after": history.get(step),
            "evaluated_on": sum(row["expert"] == name for row in self.eval_dataset) if history else None,
        }
        return {k: v for k, v in facts.items() if v is not None}

    def _history(self, name: str, metric: str = "accuracy") -> dict[int, float]:
        """{step: metric of an expert} over the evaluations so far."""
        key = f"eval_{metric}" if len(self._names) == 1 else f"eval_{name}_{metric}"
        return {entry["step"]: entry[key] for entry in self.state.log_history if key in entry}

    # --- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.is_world_process_zero():
            return
        folder = Path(output_dir or self.args.output_dir)
        training = [n for n in self._names if n in self.bank.in_training]
        parameters = {n: self.bank.trained_parameters(n) for n in training}
        checkpoint.save(
            folder, {n: self._expert(n) for n in training or self.experts}, parameters, self.args.parametrisation
        )
        self.best.save(folder)
        write_json(folder / ARGUMENTS, self.args.to_dict())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, but atomic: written under a temporary name, then renamed."""
        run = Path(self._get_output_dir(trial))
        place = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        parts = [temporary_beside(place).name]
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(parts)
        temporary = run / parts[0]
        if trial is None:
            self.store_flos()
        self.args.saving = True
        try:
            self.save_model(str(temporary), _internal_call=True)
            if self.state.best_global_step:
                best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                if best == place or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(temporary))
                self._save_scaler(str(temporary))
                self._save_rng_state(str(temporary))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for part in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(part, ExportableState):
                        self.state.stateful_callbacks[type(part).__name__] = part.state()
                self.state.save_to_json(str(temporary / STATE))
                checkpoint.seal(temporary)
                if place.exists():
                    shutil.rmtree(place)
                os.replace(temporary, place)
            if self.args.should_save:
                rotate_checkpoints(
                    output_dir=str(run),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=False,
                )
        finally:
            self.args.saving = False
            if self.is_world_process_zero():
                shutil.rmtree(temporary, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint.verify(resume_from_checkpoint)
        for name in self._names:
            self._load_expert(resume_from_checkpoint, name)
        self.best = BestExperts.load(resume_from_checkpoint, {n: self.bank.trained_parameters(n) for n in self._names})

    def _load_expert(self, folder: str | os.PathLike[str], name: str) -> None:
        checkpoint.load(folder, name, self.bank.trained_parameters(name), self.args.parametrisation, self.bank.check)

    def _load_best_model(self) -> None:
        """Load each expert from its own best checkpoint among those that still exist."""
        metric = self._metric
        sign = 1 if self.args.greater_is_better else -1
        fallback = int(Path(self.state.best_model_checkpoint).name.rpartition("-")[2])
        for name in self._names:
            best, step = -math.inf, fallback
            for at, value in self._history(name, metric).items():
                folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{at}"
                if sign * value > best and folder.is_dir():
                    best, step = sign * value, at
            self._load_expert(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}", name)
            self._chosen[name] = step
