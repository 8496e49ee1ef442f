"""`experts`: a block in which another trainer, or a loop of one's own, trains experts of a patched model."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from t2kernels import InputError, StateError, UnknownNameError
from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.expert import Expert, ExpertError
from t2kernels.experts.names import check_files
from t2kernels.rollout.modes import frozen
from t2kernels.rollout.patched import bank_of
from t2kernels.train.processes import DEEPSPEED, lone_launch, under_deepspeed

from .packed import pack, unpack

logger: logging.Logger = logging.getLogger(__name__)

Collator = Callable[[list[Any]], dict[str, Any]]
"""Makes a batch of a list of examples, as a DataLoader and a Trainer call it."""


@contextlib.contextmanager
def experts(
    model: nn.Module,
    names: str | Sequence[str],
    init: Expert | Mapping[str, Expert] | None = None,
    parametrisation: str = "raw",
) -> Iterator[TrainedExperts]:
    """Train experts of a patched model with any trainer, or with a loop of one's own.

        with train.experts(model, "mine") as trained:
            Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
        trained["mine"].save("experts/mine")

    model: that `patch_model` has patched
    names: of one expert, which every forward in the block uses; or of several, and then each forward names those of its
        rows: `TrainedExperts.collator` makes batches that do, from a column, and a loop passes `experts=[...]` to the
        model
    init: the Expert to start from, or {name: Expert} ("raw" only); None: the base model
    parametrisation: "raw", z = 1 + p, or "sigmoid" (`ExpertBank.start_training`)

    In the block every other weight is frozen, and `model.save_pretrained`, which `Trainer` and TRL call for a
    checkpoint, writes the experts only; `train(resume_from_checkpoint=...)` goes on from it to the same bits. After it
    the experts are ordinary ones of the bank, and requires_grad, modes and gradient checkpointing of the model are as
    before. If the block raises, no training is left open and the bank has none of the experts; the mapping keeps them
    as far as they got.

    Raises StateError if the model has experts in training already, for a trainer that uses DeepSpeed, for one process
    of accelerate in the place of several, or if no gradient but zero has reached the experts by the end of the block;
    InputError for a model that is not patched, a name that is taken or refused, or an `init` that does not fit.
    """
    bank = bank_of(model)
    given = [names] if isinstance(names, str) else list(names)
    if not given or len(set(given)) < len(given):
        raise InputError(f"names={names!r}; wanted the name of an expert, or a list of different names")
    starts = dict.fromkeys(given, init) if isinstance(init, Expert) or init is None else dict(init)
    if unknown := set(starts) - set(given):
        raise InputError(f"init has {sorted(unknown)}, but the experts in training are {given}")
    if bank.in_training:
        raise StateError(
            f"{', '.join(map(repr, bank.in_training))} is in training already: call bank.stop_training, or name all "
            "experts that train together in one train.experts(model, [...])"
        )
    check_files(given)
    if reason := lone_launch():
        raise StateError(reason)
    trained = TrainedExperts(model, bank, given, parametrisation)
    finished = False
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(_released(model))
        stack.callback(lambda: trained.close(keep=finished))
        for name in given:
            bank.start_training(name, parametrisation, starts.get(name))
        stack.enter_context(trained.watching())
        stack.enter_context(bank.use(given[0]) if len(given) == 1 else contextlib.nullcontext())
        yield trained
        trained.check()
        finished = True


@contextlib.contextmanager
def _released(model: nn.Module) -> Iterator[None]:
    """Undo what accelerate does to a model in the block. It would not prepare it a second time."""
    before = "_is_accelerate_prepared" in vars(model)
    try:
        yield
    finally:
        if not before and vars(model).pop("_is_accelerate_prepared", None):
            extract_model_from_parallel(model, keep_fp32_wrapper=False)


class TrainedExperts(Mapping[str, Expert]):
    """{name: Expert} of `train.experts`: in the block with the values of the moment, after it as they ended.

    model, bank: of the training; order: the names; parametrisation: of z
    """

    def __init__(self, model: nn.Module, bank: ExpertBank, order: Sequence[str], parametrisation: str) -> None:
        self.model: nn.Module = model
        self.bank: ExpertBank = bank
        self.order: list[str] = list(order)
        self.parametrisation: str = parametrisation
        self._ended: dict[str, Expert] = {}
        self._reached: set[str] = set()  # experts that a gradient other than zero has reached
        self._start: dict[str, Expert] = {}
        self._loaded = False  # whether load_state_dict has just been given packed experts

    def __getitem__(self, name: str) -> Expert:
        if name in self._ended:
            return self._ended[name]
        if name not in self.order or name not in self.bank.in_training:
            raise UnknownNameError(f"no expert {name!r} was trained here; there are {self.order}")
        return self.bank[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def collator(self, make: Collator, column: str = "expert") -> Collator:
        """A collator that sends each row of a batch through its own expert.

        make: the collator of the other columns, which gets the rows without this one
        column: whose values are names of experts, or None for the base model

        The batch of `make` gets "expert_ids", [B] int32, which the model takes. For `transformers.Trainer`, with
        `remove_unused_columns=False`, and for loops. Raises UnknownNameError for a name that the bank does not have,
        InputError for a row without the column.
        """

        def collate(rows: list[Any]) -> dict[str, Any]:
            if any(column not in row for row in rows):
                raise InputError(
                    f"a row has no column {column!r}, only {sorted(rows[0])}: it names the row's expert. Trainer drops "
                    "columns that the model does not take, unless remove_unused_columns=False"
                )
            ids = self.bank.ids([row[column] for row in rows]).cpu()
            batch = make([{key: value for key, value in row.items() if key != column} for row in rows])
            batch["expert_ids"] = ids
            return batch

        return collate

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a checkpoint: `folder`/experts/NAME.safetensors, which can be served, and `folder`/model.safetensors,
        the numbers in training. Raises StateError after the block, OSError."""
        self._require_open()
        pack(folder, dict(self), self._parameters(), self.parametrisation)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint, to the same bits.

        state: what `safetensors.torch.load_file` reads from its model.safetensors; other tensors are left alone
        Raises StateError after the block; ExpertError or ExpertMismatch for a damaged checkpoint, one of other experts,
        factors or parametrisation.
        """
        self._require_open()
        unpack(state, self._parameters(), self.parametrisation, self.bank.check)

    def check(self) -> None:
        """Raise StateError if no gradient but zero has reached any of the experts; warn of each that none has."""
        for name, start in self._start.items():
            # Whoever replaces the parameters, as FSDP does, takes the hooks away.
            if name not in self._reached and self.bank[name] != start:
                self._reached.add(name)
        missing = [name for name in self.order if name not in self._reached]
        if not missing:
            return
        who = ", ".join(map(repr, missing))
        how = (
            "name the expert of each row, by TrainedExperts.collator or by model(..., experts=[...])"
            if len(self.order) > 1
            else "run the training inside the `with` block, on the very model that was given to it, and leave "
            "bank.use(None), torch.no_grad() and experts=None out of the forwards that train; rewards that are all "
            "equal give zero as well"
        )
        if len(missing) == len(self.order):
            raise StateError(f"nothing was trained: no gradient but zero reached {who}; {how}")
        logger.warning("no gradient but zero reached %s, which stays as it began: %s", who, how)

    def close(self, keep: bool) -> None:
        """End all training, also of an expert that is no longer finite. A second call has no effect.

        keep: whether the experts stay in the bank. Raises ExpertError, if they were to stay, for one that is not finite
        """
        failed: ExpertError | None = None
        for name in [n for n in self.order if n in self.bank.in_training]:
            try:
                self._ended[name] = self.bank.stop_training(name, name=name, parametrisation=self.parametrisation)
                finite = True
            except ExpertError as e:
                failed, finite = failed or e, False
                with torch.no_grad():
                    for p in self.bank.trained_parameters(name).values():
                        p.zero_()
                self.bank.stop_training(name)
            if not (keep and finite):
                self.bank.remove(name)
        if keep and failed is not None:
            raise ExpertError(f"{failed}; train with a smaller learning rate, or clip the gradient") from failed

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """In the block gradients are noticed, and the model saves and loads experts only."""
        self._start = {name: self.bank[name] for name in self.order}
        hooks: list[Any] = []
        for name in self.order:
            for p in self.bank.trained_parameters(name).values():
                hooks.append(p.register_hook(lambda grad, name=name: self._note(name, grad)))
        hooks.append(self.model.register_forward_pre_hook(_refuse_deepspeed))
        hooks.append(self.model.register_load_state_dict_pre_hook(self._before_load))
        hooks.append(self.model.register_load_state_dict_post_hook(self._after_load))
        saves = hasattr(self.model, "save_pretrained")
        if saves:
            self.model.save_pretrained = self._save_pretrained
        try:
            yield
        finally:
            if saves:
                del self.model.save_pretrained
            for hook in hooks:
                hook.remove()

    def _note(self, name: str, grad: Tensor) -> None:
        # In a forward without the expert its gradient is zero, not missing: its row is part of the table.
        if name not in self._reached and grad.count_nonzero():
            self._reached.add(name)

    def _parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        return {name: self.bank.trained_parameters(name) for name in self.order}

    def _require_open(self) -> None:
        if self._ended:
            raise StateError("the block of train.experts has ended: save an expert with trained[name].save(path)")

    def _save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        if is_main_process:
            self.save(Path(save_directory))

    def _before_load(self, module: nn.Module, state: dict[str, Tensor], *args: Any) -> None:
        self._loaded = unpack(state, self._parameters(), self.parametrisation, self.bank.check, remove=True)

    def _after_load(self, module: nn.Module, keys: Any) -> None:
        if self._loaded:
            keys.missing_keys.clear()  # the base model, which such a checkpoint does not have
            self._loaded = False

    def __repr__(self) -> str:
        return f"TrainedExperts({', '.join(self.order)})"


def _refuse_deepspeed(module: nn.Module, args: Any) -> None:
    if under_deepspeed():
        raise StateError(f"DeepSpeed trains this model: {DEEPSPEED}")
