"""`ColocatedEngine`: a vLLM engine on this machine that draws for a trainer. vLLM gives it a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from t2kernels import InputError, StateError
from t2kernels.experts.expert import Expert
from t2kernels.integrations.vllm import requests
from t2kernels.integrations.vllm.engine.check import check_request
from t2kernels.integrations.vllm.support import takes_seeds
from t2kernels.rollout.engines import Draw, RolloutEngine
from t2kernels.rollout.generation import Rollout, Sampler

from . import memory
from .unpadded import tokens_of, whole_names


class ColocatedEngine(RolloutEngine):
    """llm: a `vllm.LLM` made with `engine_args` and logprobs_mode="processed_logprobs"; `close` ends it
    sampler: the trainer's; folder: something that lives as long as the engine, such as a directory of its factors
    """

    def __init__(self, llm: Any, sampler: Sampler, folder: Any = None) -> None:
        self.llm: Any = llm
        self.sampler: Sampler = sampler
        self._folder: Any = folder
        self._requests: dict[str, Any] = {}  # policy -> its LoRARequest
        self._seen: set[str] = set()  # experts whose factors the engine has compared

    def publish(self, policy: str, expert: Expert) -> int:
        """As `RolloutEngine.publish`: each worker takes the row, and answers with the digest of what it has."""
        whole = whole_names(policy, self._seen)
        data = memory.pack(expert, whole)
        where, wanted = memory.address_of(policy, expert), expert.digest()
        memory.keep(where, expert)
        request = requests.request(policy, where)
        if whole:
            self._check(request)
        answers = self.llm.collective_rpc("t2_take_row", args=(where, data))
        for rank, answer in enumerate(answers):
            if answer != wanted:
                raise StateError(f"worker {rank} of the engine took {policy!r} with digest {answer}, not {wanted}")
        self._requests[policy] = request
        return len(data) * len(answers)

    def _check(self, request: Any) -> None:
        """Raise InputError if the engine has other factors than the policy."""
        from vllm.exceptions import VLLMValidationError

        try:
            check_request(self.llm.llm_engine.vllm_config, request)
        except VLLMValidationError as e:
            memory.drop(request.lora_path)
            raise InputError(f"the engine cannot draw with the policy in training: {e}") from None

    def draw(self, ids: Tensor, mask: Tensor, policies: Sequence[str | None], how: Draw) -> Rollout:
        """As `RolloutEngine.draw`, in one batch of the engine."""
        from vllm import SamplingParams

        prompts, n = tokens_of(ids, mask), how.samples
        seeded = takes_seeds(self.llm.llm_engine.vllm_config)
        greedy = how.temperature == 0  # vLLM draws one greedy sample; the others are the same
        settings = [
            SamplingParams(
                n=1 if greedy else n, temperature=how.temperature, top_p=1.0, top_k=0, logprobs=0, detokenize=False,
                max_tokens=self.sampler.max_new_tokens, ignore_eos=True, stop_token_ids=list(self.sampler.ends),
                seed=None if greedy or not seeded else how.seed + i * n,
            )
            for i in range(len(prompts))
        ]  # fmt: skip
        outputs = self.llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts],
            settings,
            lora_request=[None if p is None else self._requests[p] for p in policies],
            use_tqdm=False,
        )
        drawn = [sorted(out.outputs, key=lambda o: o.index) * (n if greedy else 1) for out in outputs]
        flat = [one for some in drawn for one in some]
        return Rollout.of(
            [tokens for tokens in prompts for _ in range(n)],
            [list(one.token_ids) for one in flat],
            self.sampler.pad,
            ids.device,
            [[places[t].logprob for places, t in zip(one.logprobs, one.token_ids, strict=True)] for one in flat],
        )

    def drop(self, policies: Sequence[str]) -> None:
        """As `RolloutEngine.drop`."""
        for policy in policies:
            where = self._requests.pop(policy).lora_path
            memory.drop(where)
            self.llm.collective_rpc("t2_drop_row", args=(where,))

    def close(self) -> None:
        """End the engine's processes."""
        for request in self._requests.values():
            memory.drop(request.lora_path)
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self._folder
