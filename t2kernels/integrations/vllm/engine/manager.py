"""`ExpertManager`: what vLLM's model runners call instead of a LoRA manager. Request ids to rows, and rows to the tokens of a step.

It has the methods of vLLM's `WorkerLoRAManager` and knows nothing else of vLLM. Experts wait in the bank (host memory), which has their rows
too; before each step, on the host, `set_active_adapters` brings the step's experts into rows and writes the row of every token into one buffer
that never moves, so that a captured CUDA graph replays with whatever experts the step has.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.expert import Expert
from t2kernels.integrations.vllm import requests

logger = logging.getLogger(__name__)


class ExpertManager:
    """bank: with a table of rows; token_rows: [most tokens of a step] int32, on the device, 0 where there is no token
    host: experts kept; the least recently used beyond that is forgotten, and read from its file when it is asked for again
    max_error: as in `ExpertBank.add`
    """

    is_enabled = True

    def __init__(self, bank: ExpertBank, token_rows: Tensor, host: int, max_error: float = 0.1):
        self.bank, self.token_rows, self.host, self.max_error = bank, token_rows, host, max_error
        self._known: OrderedDict[int, str] = OrderedDict()  # id -> address; the bank has the expert under str(id)
        self._rows: dict[int, int] = {0: 0}  # of the experts of the last step
        self._held: list[int] = []
        self._stale = False  # whether an expert of the last step was replaced or removed since
        self._dummies: set[int] = set()  # ids of the warm-up that are no expert's
        self._warm_up: set[str] = set()  # paths that its requests have
        self.tokens = 0  # of the last step

    # --- what a step runs

    def set_active_adapters(self, wanted: Iterable[Any], mapping: Any | None) -> None:
        """Before each step. wanted: requests with lora_int_id, lora_name, lora_path; mapping.index_mapping: the id of every token, 0 for none.

        Raises ExpertError where an expert cannot be had, RuntimeError where the step has more experts than there are rows.
        """
        if mapping is None:
            for request in wanted:
                self.add_adapter(request)
            return
        ids = np.fromiter(mapping.index_mapping, np.int64, len(mapping.index_mapping))
        starts = np.flatnonzero(np.diff(ids, prepend=-1))  # a request's tokens lie side by side
        runs = ids[starts].tolist()
        active = set(runs) - {0}
        for request in wanted:
            self._add(request, active)
        if self._stale or active != self._rows.keys() - {0}:
            self._activate(active)
        rows = np.array([self._rows[i] for i in runs], np.int32)
        self._write(np.repeat(rows, np.diff(starts, append=len(ids))))

    def _activate(self, active: set[int]) -> None:
        unknown = active - self._known.keys()
        if unknown:
            raise RuntimeError(
                f"requests with ids {sorted(unknown)} came without their experts: vLLM tells requests apart by name, and two of this step have one "
                "name and different experts; give them different names (t2kernels.integrations.vllm.expert does)"
            )
        self.bank.unpin(self._held)
        self._held, self._rows = [], {0: 0}
        order = sorted(active)
        self._held = self.bank.pin([str(i) for i in order])
        self._rows |= dict(zip(order, self._held, strict=True))
        self._stale = False

    def _write(self, rows: np.ndarray) -> None:
        count, before = len(rows), self.tokens
        if count > len(self.token_rows):
            raise RuntimeError(
                f"a step has {count} tokens, the buffer of their rows {len(self.token_rows)}: max_num_batched_tokens was exceeded"
            )
        new = torch.from_numpy(rows)
        if self.token_rows.is_cuda:
            # A fresh page-locked tensor each time: the copy of the step before may still be waiting for its turn on the stream.
            new = new.pin_memory()
        self.token_rows[:count].copy_(new, non_blocking=True)
        if count < before:
            self.token_rows[count:before].zero_()  # what pads a graph is the base model's
        self.tokens = count

    # --- experts

    def add_adapter(self, request: Any) -> bool:
        """Read an expert and keep it in host memory; nothing changes where that fails. Raises ExpertError, ExpertMismatch, ValueError."""
        return self._add(request, ())

    def _add(self, request: Any, active: Iterable[int]) -> bool:
        number, where = request.lora_int_id, request.lora_path
        if where in self._warm_up:
            self.add_dummy_lora(request)
            return True
        have = self._known.get(number)
        if have is not None and have != where and number not in self._dummies and not request.load_inplace:
            raise ValueError(
                f"id {number} is the expert at {have}, and was asked for as {where}: an id belongs to one expert"
            )
        if have == where and (requests.DIGEST.search(where) or not request.load_inplace):  # the same content
            self._known.move_to_end(number)
            return True
        expert = self.read(request.lora_name, where)
        self.bank.add(str(number), expert, self.max_error, replace=True)
        self._dummies.discard(number)
        self._known[number] = where
        self._known.move_to_end(number)
        self._stale |= number in self._rows  # it may have another row now
        logger.info("expert %r is id %d: %s", request.lora_name, number, where)
        busy = {number, *active, *self._rows}
        for old in [i for i in self._known if i not in busy][: max(0, len(self._known) - self.host)]:
            self.remove_adapter(old)
        return True

    def read(self, name: str, where: str) -> Expert:
        """The expert of a request. Raises ExpertError."""
        return requests.load(where)

    def remove_adapter(self, number: int) -> bool:
        """Forget an expert. A step that is running keeps its row; a request that still has it has it read again."""
        if self._known.pop(number, None) is None:
            return False
        self._dummies.discard(number)
        self.bank.remove(str(number))
        self._stale |= number in self._rows
        return True

    def remove_all_adapters(self) -> None:
        """Called after every warm-up, also one in the middle of serving (an idle rank of several): only the warm-up's experts go."""
        for number in list(self._dummies):
            self.remove_adapter(number)

    def list_adapters(self) -> set[int]:
        return set(self._known)

    def pin_adapter(self, number: int) -> bool:
        raise NotImplementedError(
            "experts are not pinned: reading one into a row is a copy of some kilobytes; raise rows instead"
        )

    def supports_tower_connector_lora(self) -> bool:
        return False

    # --- vLLM's warm-up, with experts that change nothing

    def add_dummy_lora(self, request: Any, rank: int = 0) -> bool:
        self._warm_up.add(request.lora_path)
        number = request.lora_int_id
        if number in self._known:  # vLLM takes ids from 1 on, which an expert may have: the warm-up then runs with that
            return False
        self.bank.add(str(number), Expert({}))
        self._known[number] = request.lora_path
        self._dummies.add(number)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    @contextlib.contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield


def most_tokens(config: Any) -> int:
    """Of a step of an engine with this `VllmConfig`, and of the graph that pads it."""
    return max(
        config.scheduler_config.max_num_batched_tokens, config.compilation_config.max_cudagraph_capture_size or 0
    )
