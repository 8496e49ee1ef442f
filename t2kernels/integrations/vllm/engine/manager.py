"""`ExpertManager`: vLLM's model runners call it instead of a LoRA manager. It finds the row of each token of a step.

It has the methods of vLLM's `WorkerLoRAManager` and knows nothing else of vLLM. The bank keeps experts in host memory
and gives them rows. Before each step, on the host, `set_active_adapters` brings the step's experts into rows, and
writes the row of every token into one buffer. The buffer never moves, so a captured CUDA graph can be replayed with any
experts.
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

from t2kernels import InputError, StateError
from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.exchange.lora import LoraAdapter
from t2kernels.experts.expert import Expert
from t2kernels.integrations.vllm.requests import DIGEST, load
from t2kernels.ops.op import unobserved

logger: logging.Logger = logging.getLogger(__name__)


class ExpertManager:
    """bank: the experts and the tables
    token_rows: [most tokens of a step] int32, on the device; 0 where there is no token
    host: experts kept in host memory; beyond that the least recently used is dropped, and read from its file when it is
        needed again
    max_error: as in `ExpertBank.add`
    """

    is_enabled: bool = True
    bank: ExpertBank
    token_rows: Tensor
    host: int
    max_error: float

    def __init__(self, bank: ExpertBank, token_rows: Tensor, host: int, max_error: float = 0.1):
        self.bank, self.token_rows, self.host, self.max_error = bank, token_rows, host, max_error
        self._known: OrderedDict[int, str] = OrderedDict()  # id -> address; the bank has the expert under str(id)
        self._rows: dict[int, int] = {0: 0}  # id -> row, of the last step's experts
        self._held: list[int] = []  # rows that are pinned for the last step
        self._stale = False  # True if an expert of the last step was replaced or removed since
        self._dummies: set[int] = set()  # ids of warm-up requests
        self._warm_up: set[str] = set()  # addresses of warm-up requests
        self.tokens: int = 0  # of the last step
        self.rows: Tensor = token_rows[:0]  # of its tokens
        self.plain: bool = False  # whether nobody watches what torch does in the step, and it runs on a CPU

    # --- before each step

    def set_active_adapters(self, wanted: Iterable[Any], mapping: Any | None) -> None:
        """Bring the experts of a step into rows and write the row of every token.

        wanted: requests with lora_int_id, lora_name, lora_path
        mapping: its index_mapping is the id of every token, 0 for the base model; None: only read the experts
        Raises ExpertError for an expert that cannot be read, RuntimeError for a step with more experts than rows.
        """
        if mapping is None:
            for request in wanted:
                self.add_adapter(request)
            return
        ids = np.fromiter(mapping.index_mapping, np.int64, len(mapping.index_mapping))
        starts = np.flatnonzero(
            np.diff(ids, prepend=-1)
        )  # tokens of one request are neighbours: look at runs, not tokens
        runs = ids[starts].tolist()
        active = set(runs) - {0}
        for request in wanted:
            self._add(request, active)
        if self._stale or active != self._rows.keys() - {0}:
            self._activate(active)
        rows = np.array([self._rows[i] for i in runs], np.int32)
        self._write(np.repeat(rows, np.diff(starts, append=len(ids))))

    def _activate(self, active: set[int]) -> None:
        """Pin rows for these ids, and release those of the step before."""
        unknown = active - self._known.keys()
        if unknown:
            raise StateError(
                f"requests with ids {sorted(unknown)} came without their experts: vLLM tells requests apart by name, "
                "and two of this step have one name and different experts; give them different names "
                "(t2kernels.integrations.vllm.expert does)"
            )
        self.bank.unpin(self._held)
        self._held, self._rows = [], {0: 0}
        order = sorted(active)
        self._held = self.bank.pin([str(i) for i in order])
        self._rows |= dict(zip(order, self._held, strict=True))
        self._stale = False

    def _write(self, rows: np.ndarray) -> None:
        """Copy the rows of a step's tokens to the device. The rest of what a CUDA graph may read is row 0."""
        count, before = len(rows), self.tokens
        if count > len(self.token_rows):
            raise StateError(
                f"a step has {count} tokens, and the buffer has room for {len(self.token_rows)}: "
                "max_num_batched_tokens was exceeded"
            )
        new = torch.from_numpy(rows)
        if self.token_rows.is_cuda:
            # A new page-locked tensor each time: the copy of the step before may still be queued on the stream.
            new = new.pin_memory()
        self.token_rows[:count].copy_(new, non_blocking=True)
        if count < before:
            self.token_rows[count:before].zero_()  # a graph's padding uses the base model
        self.tokens, self.rows = count, self.token_rows[:count]
        self.plain = unobserved(*5 * (self.token_rows,))

    # --- experts

    def add_adapter(self, request: Any) -> bool:
        """Read an expert into host memory.

        Raises ExpertError, ExpertMismatch or ValueError, and then nothing has changed.
        """
        return self._add(request, ())

    def _add(self, request: Any, active: Iterable[int]) -> bool:
        number, where = request.lora_int_id, request.lora_path
        if where in self._warm_up:
            self.add_dummy_lora(request)
            return True
        have = self._known.get(number)
        if have is not None and have != where and number not in self._dummies and not request.load_inplace:
            raise InputError(
                f"id {number} is the expert at {have}, and now came with {where}: an id belongs to one expert"
            )
        if have == where and (DIGEST.search(where) or not request.load_inplace):  # the same content
            self._known.move_to_end(number)
            return True
        expert = self.read(request.lora_name, where)
        self._let_go(number)
        self.bank.add(str(number), expert, self.max_error, replace=True)
        self._dummies.discard(number)
        self._known[number] = where
        self._known.move_to_end(number)
        self._stale |= number in self._rows  # it may get another row now
        logger.info("expert %r is id %d: %s", request.lora_name, number, where)
        busy = {number, *active, *self._rows}
        for old in [i for i in self._known if i not in busy][: max(0, len(self._known) - self.host)]:
            self.remove_adapter(old)
        return True

    def read(self, name: str, where: str) -> Expert | LoraAdapter:
        """The expert, or this rank's part of the adapter, at an address. name: for messages. Raises ExpertError."""
        return load(where)

    def _let_go(self, number: int) -> None:
        """Release the rows of the last step if one of them has an adapter that is about to leave: it is over."""
        if number in self._rows and str(number) in self.bank.adapters:
            self.bank.unpin(self._held)
            self._held, self._rows, self._stale = [], {0: 0}, True

    def remove_adapter(self, number: int) -> bool:
        """Drop an expert from host memory; False if it is not there.

        A running step keeps its row, a later request reads its file again.
        """
        if self._known.pop(number, None) is None:
            return False
        self._dummies.discard(number)
        self._let_go(number)
        self.bank.remove(str(number))
        self._stale |= number in self._rows
        return True

    def forget(self, where: str) -> None:
        """Drop the expert at an address from host memory, under all of its ids."""
        for number in [i for i, known in self._known.items() if known == where]:
            self.remove_adapter(number)

    def remove_all_adapters(self) -> None:
        """Remove the warm-up's experts only.

        vLLM calls this after every warm-up, and an idle rank of several may warm up while others serve.
        """
        for number in list(self._dummies):
            self.remove_adapter(number)

    def list_adapters(self) -> set[int]:
        """The ids in host memory."""
        return set(self._known)

    def pin_adapter(self, number: int) -> bool:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "experts cannot be pinned: bringing one into a row copies some kilobytes; raise rows instead"
        )

    def supports_tower_connector_lora(self) -> bool:
        """False: encoder towers have no experts."""
        return False

    # --- vLLM's warm-up, with experts that change nothing

    def add_dummy_lora(self, request: Any, rank: int = 0) -> bool:
        """Add an expert with z = 1 under a request's id; False if the id is in use.

        `rank` is LoRA's and means nothing here.
        """
        self._warm_up.add(request.lora_path)
        number = request.lora_int_id
        if (
            number in self._known
        ):  # the warm-up's ids start at 1, as do the server's: it then runs with the expert that has the id
            return False
        self.bank.add(str(number), Expert({}))
        self._known[number] = request.lora_path
        self._dummies.add(number)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """LoRA's rank in the warm-up: any."""
        return default_rank

    @contextlib.contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """vLLM runs its warm-up in this context; nothing needs a cache here."""
        yield


def most_tokens(config: Any) -> int:
    """The largest number of tokens in a step under a `VllmConfig`, with the padding of CUDA graphs."""
    return max(
        config.scheduler_config.max_num_batched_tokens, config.compilation_config.max_cudagraph_capture_size or 0
    )
