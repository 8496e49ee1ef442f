"""LoRA adapters beside experts in one engine, and experts as LoRA adapters in an engine without the plugin."""

import pytest
import torch

import t2kernels as t2
from t2kernels import tiny
from t2kernels.integrations.vllm import engine_args, expert
from tests.vllm.worlds import LONG, NEW, PROMPTS, answers_of, ask, engine, materialise

RANK = 4


@pytest.fixture(scope="module")
def adapters(world, tmp_path_factory):
    """{number: (folder, {prompt: answer of W + B A})} of adapters of different matrices."""
    folder, shapes, made = tmp_path_factory.mktemp("adapters"), t2.Factors.load(world.factors), {}
    for a in range(4):
        g = torch.Generator().manual_seed(200 + a)
        pairs = {}
        for i, name in enumerate(shapes):
            if a == 0 or i % 4 != a:  # the first changes all matrices, the others leave some of a group out
                M, N = shapes.shape(name)
                B = torch.randn(M, RANK + a, generator=g) * 0.3 * float(shapes.sigmas[name][0]) / M**0.5
                pairs[name] = B, torch.randn(RANK + a, N, generator=g) / N**0.5
        where = t2.LoraAdapter(pairs).save(folder / f"a{a}")
        model, tokenizer = tiny.load()
        with torch.no_grad():
            for name, (B, A) in pairs.items():
                model.get_submodule(name).weight += B @ A
        made[a] = where, dict(zip(PROMPTS, answers_of(model, tokenizer), strict=True))
    assert len({tuple(of[PROMPTS[0]]) for _, of in made.values()}) == 4
    return made


@pytest.fixture(scope="module")
def llm(world):
    with engine(world.model, **engine_args(factors=world.factors, rows=9)) as llm:
        yield llm


def tokens(outputs):
    return [list(out.outputs[0].token_ids) for out in outputs]


def test_four_experts_and_four_adapters_in_one_batch_equal_each_alone(llm, world, adapters):
    for prompt in PROMPTS:
        experts = [(prompt, e) for e in range(1, 5)]
        others = [(prompt, expert(f"a{a}", where)) for a, (where, _) in adapters.items()]
        mixed = [pair for both in zip(experts, others, strict=True) for pair in both]
        wanted = [
            of
            for e, a in zip(range(1, 5), adapters.values(), strict=True)
            for of in (world.answers[e, prompt], a[1][prompt])
        ]
        assert tokens(ask(llm, world, mixed)) == wanted
        assert [tokens(ask(llm, world, [pair]))[0] for pair in mixed] == wanted
    assert tokens(ask(llm, world, [(p, 0) for p in PROMPTS])) == [world.answers[0, p] for p in PROMPTS]


def test_more_of_them_than_rows_take_turns(world, adapters):
    with engine(world.model, **engine_args(factors=world.factors, rows=3, host=3)) as llm:
        pairs, wanted = [], []
        for prompt in PROMPTS[:3]:
            for e, (a, (where, answers)) in enumerate(adapters.items()):
                pairs += [(prompt, e), (prompt, expert(f"a{a}", where))]
                wanted += [world.answers[e, prompt], answers[prompt]]
        assert tokens(ask(llm, world, pairs)) == wanted
        for number in llm.llm_engine.list_loras():
            llm.llm_engine.remove_lora(number)
        assert tokens(ask(llm, world, pairs)) == wanted


def test_the_prefix_cache_tells_the_contents_of_a_folder_apart(llm, world, adapters, tmp_path):
    for where, answers in (adapters[0], adapters[1]):
        t2.LoraAdapter.load(where).save(tmp_path / "mine")
        outputs = [ask(llm, world, [(LONG, expert("mine", tmp_path / "mine"))])[0] for _ in range(2)]
        assert [o.num_cached_tokens for o in outputs] == [0, 32]
        assert tokens(outputs) == [answers[LONG]] * 2


def test_adapters_that_do_not_fit_are_refused_and_the_engine_goes_on(llm, world, adapters, tmp_path):
    from vllm.exceptions import VLLMValidationError

    pair = torch.ones(8, 2), torch.ones(2, 8)
    for name, match in (
        ("model.layers.99.mlp.up_proj", "no matrix of the factors"),
        (next(iter(t2.Factors.load(world.factors))), "the model has"),
    ):
        folder = t2.LoraAdapter({name: pair}).save(tmp_path / match.replace(" ", "-"))
        with pytest.raises(VLLMValidationError, match=match):
            ask(llm, world, [(PROMPTS[0], expert("bad", folder))])
    with pytest.raises(t2.ExpertError, match="mixtures of experts only"):
        expert("mixed", {world.experts[1]: 0.5, adapters[0][0]: 0.5})
    assert tokens(ask(llm, world, [(PROMPTS[0], 1)])) == [world.answers[1, PROMPTS[0]]]


def test_an_exported_expert_in_an_engine_without_the_plugin(world, tmp_path):
    """fp32: the same answers, and log-probabilities within 1e-4 of those of U diag(sigma * z) Vᵀ."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    factors, requests, wanted, models = t2.Factors.load(world.factors), [], [], []
    for e in (1, 2):
        short = t2.Expert.load(world.experts[e]).truncate(16)
        folder = short.to_lora(factors).save(tmp_path / f"lora{e}")
        requests.append(LoRARequest(f"lora{e}", e, str(folder)))
        model, tokenizer = tiny.load()
        materialise(
            model,
            factors,
            t2.Expert({n: torch.cat([z, torch.ones(factors.ranks[n] - len(z))]) for n, z in short.z.items()}),
        )
        models.append(model)
        wanted += answers_of(model, tokenizer, PROMPTS)
    assert wanted[: len(PROMPTS)] != wanted[len(PROMPTS) :]
    with engine(world.model, enable_lora=True, max_loras=2, max_lora_rank=16) as llm:
        # No prompt_logprobs: vLLM 0.32's LoRA kernels for the CPU die of them.
        sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0)
        who = [r for r in requests for _ in PROMPTS]
        outputs = llm.generate(PROMPTS * 2, sampling, lora_request=who, use_tqdm=False)
    assert tokens(outputs) == wanted
    for out, model in zip(outputs, (m for m in models for _ in PROMPTS), strict=True):
        (answer,) = out.outputs
        start, ids = len(out.prompt_token_ids), torch.tensor([[*out.prompt_token_ids, *answer.token_ids]])
        with torch.no_grad():
            exact = model(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
        found = [place[t].logprob for place, t in zip(answer.logprobs, answer.token_ids, strict=True)]
        torch.testing.assert_close(torch.tensor(found), exact, rtol=0, atol=1e-4)
