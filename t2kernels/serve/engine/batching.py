"""transformers' continuous batching with an expert, and a way of sampling, for each request.

    expert_ids[t] = row of the request that token t of the packed batch belongs to        [1, T] int32

The loop, the paged cache and the scheduler are transformers'. What is added sits below its public surface, so the versions that it was tested
with are the only ones that are accepted, and what is replaced is looked at before anything runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor, nn

TESTED = ("5.24",)
ROW = "expert_row"
"""Under this name the row travels with a request's own state: through splits of its prompt, eviction from the cache and the way back."""


@dataclass(frozen=True)
class BatchSettings:
    """page_size: tokens of a block of the KV cache; kv_tokens: tokens that the cache holds; batch_tokens: most tokens of one step, and so
    the size of the pieces a long prompt is cut into; batch_requests: most requests of one step; share_prefixes: for tests only
    """

    page_size: int = 16
    kv_tokens: int = 16384
    batch_tokens: int = 512
    batch_requests: int = 64
    share_prefixes: bool = False


def check_transformers() -> None:
    """Raises RuntimeError on a version that this file was not tested with, or whose inner parts are not as they were there."""
    version = transformers.__version__
    if ".".join(version.split(".")[:2]) not in TESTED:
        raise RuntimeError(
            f"transformers {version}: its continuous batching is used below the public surface, and was tested with {', '.join(TESTED)} only; "
            "pip install 't2kernels[serve]', or --engine vllm"
        )
    from transformers.generation.continuous_batching import continuous_api, input_outputs, model_runner

    for owner, name, wanted in (
        (continuous_api.ContinuousBatchingManager, "_create_batch_processor", ["self"]),
        (continuous_api.OutputRouter, "deliver", ["self", "output"]),
        (continuous_api.OutputRouter, "deliver_batch", ["self", "outputs"]),
        (
            input_outputs.ContinuousBatchingIOs,
            "prepare_batch_tensors",
            [
                "self",
                "requests_in_batch",
                "logits_processors",
                "use_decode_fast_path",
                "num_q_tokens",
                "max_kv_read",
                "use_padding",
            ],
        ),
        (input_outputs.ContinuousBatchingIOs, "get_model_kwargs", ["self", "use_padding"]),
        (model_runner.ModelRunner, "_sample", ["self", "scores", "output_ids"]),
    ):
        got = list(inspect.signature(getattr(owner, name)).parameters) if hasattr(owner, name) else None
        if got != wanted:
            raise RuntimeError(
                f"transformers {version}: {owner.__name__}.{name} has the arguments {got}, wanted {wanted}: this version changed what is "
                f"replaced here; install another {' or '.join(TESTED)}"
            )


def make_manager(
    model: nn.Module,
    settings: BatchSettings,
    sample: Callable[[Tensor, Sequence[str]], Tensor],
    deliver: Callable[[list], None],
):
    """transformers' manager for a patched model; `manager.add_request(ids, ..., expert_row=row)`, or KeyError in the loop.

    sample: (logits [B, V] fp32, request ids of the B rows) -> tokens [B]; runs on the manager's thread
    deliver: called on that thread with the outputs of each step
    Raises RuntimeError for another version of transformers, ValueError for a model that is not patched.
    """
    check_transformers()
    if not hasattr(model, "t2_bank"):
        raise ValueError("the model is not patched: bank = t2kernels.patch_model(model) first")
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching import continuous_api, input_outputs, model_runner

    class ExpertIOs(input_outputs.ContinuousBatchingIOs):
        """Its storage of expert ids is static, as all of its inputs are."""

        def prepare_batch_tensors(self, requests_in_batch, *args, **kwargs):
            super().prepare_batch_tensors(requests_in_batch, *args, **kwargs)
            self.expert_ids.fill(requests_in_batch, self.num_q_tokens)

        def get_model_kwargs(self, use_padding=False):
            return {**super().get_model_kwargs(use_padding), "expert_ids": self.expert_ids.of_batch(self.num_q_tokens)}

    class Runner(model_runner.ModelRunner):
        def _sample(self, scores, output_ids):
            # Rows of scores beyond these belong to requests whose prompt goes on in a later step.
            names = [r.state.request_id for r in self.inputs_and_outputs.requests_in_batch if r.has_new_token]
            output_ids[0, : len(names)].copy_(sample(scores[0, : len(names)], names))

    class Manager(continuous_api.ContinuousBatchingManager):
        def _create_batch_processor(self):
            processor = super()._create_batch_processor()
            for part, known, ours in (
                ("inputs_and_outputs", input_outputs.ContinuousBatchingIOs, ExpertIOs),
                ("model_runner", model_runner.ModelRunner, Runner),
            ):
                found = getattr(processor, part)
                if type(found) not in (known, ours):
                    raise RuntimeError(
                        f"continuous batching runs with {type(found).__name__}; experts were tested with {known.__name__}"
                    )
                found.__class__ = ours
            processor.inputs_and_outputs.expert_ids = ExpertIds(processor.cache.max_batch_tokens, self.model.device)
            return processor

    class Deliver(continuous_api.OutputRouter):
        def deliver(self, output):
            deliver([output])

        def deliver_batch(self, outputs):
            deliver(outputs)

    manager = Manager(
        model,
        GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1),
        ContinuousBatchingConfig(
            page_size=settings.page_size,
            num_blocks=-(-settings.kv_tokens // settings.page_size),
            max_batch_tokens=settings.batch_tokens,
            max_requests_per_batch=settings.batch_requests,
            # Shared prefixes are found by their tokens alone, so one expert would be given what another one's keys and values were.
            allow_block_sharing=settings.share_prefixes,
            # Each request is sampled in its own way, which no captured graph does; and the asynchronous loop has a second set of inputs.
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=model.device.type != "cpu",
        ),
    )
    manager.output_router = Deliver()
    manager.logit_processor.supported_keys[ROW] = int
    return manager


class ExpertIds:
    """The row of each token of a packed batch, in storage that stays where it is.

    ids: [batch_tokens] int32 on the model's device
    """

    def __init__(self, batch_tokens: int, device: torch.device):
        self.ids = torch.zeros(batch_tokens, dtype=torch.int32, device=device)
        self.filled = 0

    def fill(self, requests: Sequence, tokens: int) -> None:
        """Write the rows of the requests of a batch, `query_length` tokens each, in their order; row 0 behind them.

        tokens: those of the batch. As many as requests means one each, which is the usual step. 0.03 ms for 512 tokens and 0.55 ms for
        8192, each of another request; 0.05 ms for 8192 of 512 requests (medians, one core of an AMD EPYC).
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
        """[1, tokens] int32, a view."""
        return self.ids[:tokens].unsqueeze(0)


def longest_request(manager) -> int:
    """Most tokens, prompt and completion together, that one request can have in the cache of a running manager."""
    from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

    return infer_max_single_request_tokens(manager.batch_processor.cache)


def free_share(manager) -> float:
    """What is free of the KV cache, from 0 to 1."""
    return float(manager.batch_processor.cache.compute_free_capacity())
