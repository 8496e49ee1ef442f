"""transformers' continuous batching with an expert and a sampling for each request.

    expert_ids[t] = row of the request that token t of the packed batch belongs to        [1, T] int32

The loop, the paged KV cache and the scheduler are transformers'. This file overrides methods below their public
surface. So it accepts only the versions it was tested with, and checks the signatures of all overridden methods before
anything runs.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from t2kernels import InputError
from t2kernels.serve.http.errors import EngineError

from .apart import as_bias, attending_apart, fits, spread

TESTED: tuple[str, ...] = ("5.24",)
"""Versions of transformers that this file was tested with."""
HUGE: float = 1e12
"""Largest key or value that is kept. Products of two of them over a head stay finite in bf16 and fp32."""
ROW: str = "expert_row"
"""Keyword of the row in a request's state. It stays there when the prompt is split or the request is evicted."""


@dataclass(frozen=True)
class BatchSettings:
    """Sizes of the batch and of the KV cache.

    page_size: tokens of a block of the KV cache
    kv_tokens: tokens that the cache holds
    batch_tokens: most tokens of one step; longer prompts are split
    batch_requests: most requests of one step
    """

    page_size: int = 16
    kv_tokens: int = 16384
    batch_tokens: int = 512
    batch_requests: int = 64

    def config(self, device: torch.device) -> Any:
        """transformers' `ContinuousBatchingConfig` of these sizes, for a model on `device`."""
        from transformers import ContinuousBatchingConfig

        return ContinuousBatchingConfig(
            page_size=self.page_size,
            num_blocks=-(-self.kv_tokens // self.page_size),
            max_batch_tokens=self.batch_tokens,
            max_requests_per_batch=self.batch_requests,
            # The prefix cache finds blocks by their tokens, so an expert would get keys and values of another one.
            allow_block_sharing=False,
            # Captured graphs sample all requests in one way, and the asynchronous loop has a second set of inputs.
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=device.type != "cpu",
        )


def check_transformers() -> None:
    """Raises EngineError if transformers has an untested version or an overridden method has another signature."""
    version = transformers.__version__
    tested = " or ".join(TESTED)
    if ".".join(version.split(".")[:2]) not in TESTED:
        raise EngineError(
            f"transformers {version}: its continuous batching is used below the public surface and was tested with "
            f"{tested} only; pip install 't2kernels[serve]', or use --engine vllm"
        )
    from transformers.generation.continuous_batching import continuous_api, input_outputs, model_runner

    batch = [
        "requests_in_batch",
        "logits_processors",
        "use_decode_fast_path",
        "num_q_tokens",
        "max_kv_read",
        "use_padding",
    ]
    for owner, name, expected in (
        (continuous_api.ContinuousBatchingManager, "_create_batch_processor", ["self"]),
        (continuous_api.OutputRouter, "deliver", ["self", "output"]),
        (continuous_api.OutputRouter, "deliver_batch", ["self", "outputs"]),
        (input_outputs.ContinuousBatchingIOs, "prepare_batch_tensors", ["self", *batch]),
        (input_outputs.ContinuousBatchingIOs, "get_model_kwargs", ["self", "use_padding"]),
        (model_runner.ModelRunner, "compute_batch", ["self", "model", "batch_data"]),
        (model_runner.ModelRunner, "_sample", ["self", "scores", "output_ids"]),
    ):
        found = list(inspect.signature(getattr(owner, name)).parameters) if hasattr(owner, name) else None
        if found != expected:
            raise EngineError(
                f"transformers {version}: {owner.__name__}.{name} has the arguments {found}, expected {expected}; "
                f"install transformers {tested}"
            )


def make_manager(
    model: nn.Module,
    settings: BatchSettings,
    sample: Callable[[Tensor, Sequence[str]], Tensor],
    deliver: Callable[[list[Any]], None],
) -> Any:
    """transformers' `ContinuousBatchingManager` for a patched model. Its `add_request` takes `expert_row`.

    model: patched
    sample: (logits [B, V] fp32, ids of the B requests) -> tokens [B]; called on the manager's thread
    deliver: called on that thread with the outputs of each step
    Raises EngineError for an untested version of transformers, ValueError for a model that is not patched.
    """
    check_transformers()
    if not hasattr(model, "t2_bank"):
        raise InputError("the model is not patched: call t2kernels.patch_model(model) first")
    from transformers import GenerationConfig
    from transformers.generation.continuous_batching import continuous_api, input_outputs, model_runner

    class ExpertIOs(input_outputs.ContinuousBatchingIOs):
        """Adds expert_ids to the inputs of the model. They have static storage, as all inputs have."""

        def prepare_batch_tensors(self, requests_in_batch, *args, **kwargs):
            self.apart = self.config._attn_implementation == "sdpa" and fits(requests_in_batch)
            mask = self.attention_mask
            if self.apart:
                self.attention_mask = None  # it need not be written
            try:
                super().prepare_batch_tensors(requests_in_batch, *args, **kwargs)
            finally:
                self.attention_mask = mask
            self.expert_ids.fill(requests_in_batch, self.num_q_tokens)

        def get_model_kwargs(self, use_padding=False):
            kwargs = {
                **super().get_model_kwargs(use_padding),
                "expert_ids": self.expert_ids.of_batch(self.num_q_tokens),
            }
            if self.apart:
                ends = [
                    self.cumulative_seqlens_k[kind][: self.num_q_tokens + 1] for kind in self.cache.cache_allocators
                ]
                longest = [self.max_length_k[kind] for kind in self.cache.cache_allocators]
                places = [spread(*each) for each in zip(kwargs["read_index"], ends, longest, strict=True)]
                kwargs["read_index"] = [index for index, _ in places]
                masks = [as_bias(seen, self.model_dtype) for _, seen in places]
                kinds = dict(zip(self.cache.cache_allocators, masks, strict=True))
                kwargs |= {"attention_mask": kinds if len(kinds) > 1 else masks[0], "is_causal": False}
            return kwargs

    class Runner(model_runner.ModelRunner):
        """Samples each request in its own way. Steps of one token for each request attend to each request apart."""

        def compute_batch(self, model, batch_data):
            self.largest.clear()
            with (
                attending_apart(model.config.get_text_config())
                if self.inputs_and_outputs.apart
                else contextlib.nullcontext()
            ):
                super().compute_batch(model, batch_data)

        def _sample(self, scores, output_ids):
            # Further rows of scores belong to requests whose prompt continues in a later step.
            requests = self.inputs_and_outputs.requests_in_batch
            names = [r.state.request_id for r in requests if r.has_new_token]
            self.lost |= overflown(self.largest, requests)  # perhaps in a part of a prompt that has no token yet
            scores = scores[0, : len(names)]
            if lost := self.lost.intersection(names):
                rows = torch.tensor([name in lost for name in names], device=scores.device)
                scores = scores.masked_fill(rows[:, None], float("nan"))
                self.lost -= lost
            output_ids[0, : len(names)].copy_(sample(scores, names))

    class Manager(continuous_api.ContinuousBatchingManager):
        """Gives the batch processor the two classes above."""

        def _create_batch_processor(self):
            processor = super()._create_batch_processor()
            for part, known, ours in (
                ("inputs_and_outputs", input_outputs.ContinuousBatchingIOs, ExpertIOs),
                ("model_runner", model_runner.ModelRunner, Runner),
            ):
                found = getattr(processor, part)
                if type(found) not in (known, ours):
                    raise EngineError(
                        f"continuous batching uses {type(found).__name__}; it was tested with {known.__name__} only"
                    )
                found.__class__ = ours
            runner = processor.model_runner
            runner.largest, runner.lost = [], set()
            processor.cache.update = finite_update(processor.cache.update, runner.largest)
            processor.inputs_and_outputs.expert_ids = ExpertIds(processor.cache.max_batch_tokens, self.model.device)
            return processor

    class Deliver(continuous_api.OutputRouter):
        """Passes outputs on to `deliver`."""

        def deliver(self, output):
            deliver([output])

        def deliver_batch(self, outputs):
            deliver(outputs)

    manager = Manager(
        model,
        GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1),
        settings.config(model.device),
    )
    manager.output_router = Deliver()
    manager.logit_processor.supported_keys[ROW] = int
    return manager


def finite_update(update: Callable[..., Any], largest: list[Tensor]) -> Callable[..., Any]:
    """The cache's `update`, which never stores keys or values beyond `HUGE`: those of such a token are 0.

    Where the requests of a step lie in one packed row, a mask separates them: keys of others have weight 0. But 0 * NaN
    is NaN, so one request whose expert overflows would spoil the answers of all.

    largest: takes the largest key, or value, of each token of the step, [1, T] for each call; NaN where there is one
    """

    def finite(t: Tensor) -> Tensor:  # [1, H, T, D]
        most = t.abs().amax((1, 3))
        largest.append(most)
        return torch.where(most[:, None, :, None] < HUGE, t, 0)

    def checked(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(finite(key_states), finite(value_states), *args, **kwargs)

    return checked


def overflown(largest: Sequence[Tensor], requests: Sequence[Any]) -> set[str]:
    """The ids of the requests of a step that had a key or value beyond `HUGE`. Their answers cannot be right.

    largest: of `finite_update`; requests: of the step, in order, each with `query_length` tokens
    """
    if not largest:
        return set()
    wrong = ~(torch.stack(list(largest)).amax(0)[0] < HUGE)
    if not bool(wrong.any()):
        return set()
    pieces = wrong.split([r.query_length for r in requests])
    return {r.state.request_id for r, piece in zip(requests, pieces, strict=True) if piece.any()}


class ExpertIds:
    """The row of each token of a packed batch, in storage that never moves.

    ids: [batch_tokens] int32 on the model's device; filled: how many of them the last batch wrote
    """

    ids: Tensor
    filled: int

    def __init__(self, batch_tokens: int, device: torch.device) -> None:
        self.ids = torch.zeros(batch_tokens, dtype=torch.int32, device=device)
        self.filled = 0

    def fill(self, requests: Sequence[Any], tokens: int) -> None:
        """Write the row of each token: `query_length` tokens per request, in order. The rest gets row 0.

        requests: of the batch, each with its row in `state.logit_processor_kwargs`
        tokens: of the batch; equal to the number of requests in the usual step, where each request has one token
        Host work grows with requests, not with tokens (benchmarks/host_work.py).
        """
        per_token = np.array([r.state.logit_processor_kwargs[ROW] for r in requests], np.int32)
        if tokens != len(requests):
            per_token = np.repeat(per_token, [r.query_length for r in requests])
        count = len(per_token)
        if self.filled > count:
            self.ids[count : self.filled].zero_()
        self.ids[:count].copy_(torch.from_numpy(per_token))
        self.filled = count

    def of_batch(self, tokens: int) -> Tensor:
        """The ids of a batch: [1, tokens] int32, a view."""
        return self.ids[:tokens].unsqueeze(0)


def longest_request(manager: Any) -> int:
    """Most tokens (prompt and completion) that the KV cache of a running manager can hold for one request."""
    from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

    return infer_max_single_request_tokens(manager.batch_processor.cache)


def free_share(manager: Any) -> float:
    """The free share of the KV cache, from 0 to 1. A manager that has ended has no cache, and 1 is free."""
    processor = manager.batch_processor  # read once: the manager forgets it at the end of a drain
    return 1.0 if processor is None else float(processor.cache.compute_free_capacity())
