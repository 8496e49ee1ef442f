"""Delta form, one process: greedy answers in mixed batches are those of materialised models."""

import pytest
import torch

import t2kernels as t2
from t2kernels.integrations.vllm import engine_args, expert
from tests.vllm.worlds import LONG, PROMPTS, answers_of, ask, engine, materialise, wrong


@pytest.fixture(scope="module")
def llm(world):
    with engine(world.model, **engine_args(factors=world.factors, rows=3)) as llm:
        yield llm


def test_every_prompt_with_every_expert_in_two_slots(llm, world):
    pairs = world.pairs()
    assert len(pairs) == 36
    assert not wrong(ask(llm, world, pairs), world, pairs)


def test_two_experts_and_the_base_model_in_one_batch(llm, world):
    pairs = [(PROMPTS[0], 1), (PROMPTS[0], 0), (PROMPTS[0], 2), (PROMPTS[1], 1)]
    assert not wrong(ask(llm, world, pairs), world, pairs)


def test_the_prefix_cache_is_hit_by_the_same_expert_only(llm, world):
    llm.reset_prefix_cache()
    cached = []
    for e in (0, 1, 2, 1, 0, 3, 2):
        (out,) = ask(llm, world, [(LONG, e)])
        assert list(out.outputs[0].token_ids) == world.answers[e, LONG]
        cached.append(out.num_cached_tokens)
    assert cached == [0, 0, 0, 32, 32, 0, 32]


def test_a_replaced_file_is_another_expert(llm, world, tmp_path):
    """Under the same name and path: the old keys and values must not be taken for its own."""
    path = tmp_path / "mine.safetensors"
    for e in (4, 5):
        path.write_bytes(world.experts[e].read_bytes())
        outputs = [ask(llm, world, [(LONG, expert("mine", path))])[0] for _ in range(2)]
        assert [o.num_cached_tokens for o in outputs] == [0, 32]
        assert all(list(o.outputs[0].token_ids) == world.answers[e, LONG] for o in outputs)


def test_both_contents_of_one_name_in_one_batch(llm, world, tmp_path):
    path, pairs = tmp_path / "twice.safetensors", []
    for e in (1, 2):
        path.write_bytes(world.experts[e].read_bytes())
        kept = tmp_path / f"kept{e}.safetensors"
        kept.write_bytes(path.read_bytes())
        pairs.append(expert("twice", kept))
    outputs = ask(llm, world, [(PROMPTS[0], r) for r in pairs])
    assert [list(o.outputs[0].token_ids) for o in outputs] == [world.answers[e, PROMPTS[0]] for e in (1, 2)]


def test_a_mixture_is_a_row(llm, world):
    from t2kernels import tiny

    mixture = {world.experts[1]: 0.5, world.experts[2]: 0.25}
    model, tokenizer = tiny.load()
    mixed = t2.Expert.mix([(t2.Expert.load(path), weight) for path, weight in mixture.items()])
    materialise(model, t2.Factors.load(world.factors), mixed)
    outputs = ask(llm, world, [(p, expert("mix", mixture)) for p in PROMPTS[:3]])
    assert [list(o.outputs[0].token_ids) for o in outputs] == answers_of(model, tokenizer, PROMPTS[:3])


def test_bad_experts_are_refused_and_the_engine_goes_on(llm, world, tmp_path):
    from vllm.exceptions import LoRAAdapterNotFoundError, VLLMValidationError
    from vllm.lora.request import LoRARequest

    def refused(path, error, match):
        with pytest.raises(error, match=match):
            ask(llm, world, [(PROMPTS[0], LoRARequest("bad", 77, str(path)))])

    refused(tmp_path / "nowhere", LoRAAdapterNotFoundError, "nowhere")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(world.experts[1].read_bytes()[:2000])
    refused(cut, VLLMValidationError, "is not an expert")
    with pytest.raises(t2.ExpertError, match="is not an expert"):
        expert("cut", cut)
    good = t2.Expert.load(world.experts[1])
    other = t2.Expert({n.replace("model.layers.0", "model.layers.9"): z for n, z in good.z.items()}).save(
        tmp_path / "other"
    )
    refused(other, VLLMValidationError, "for another model")
    foreign = {n: s.flip(0) for n, s in good.sketch.items()}
    strange = t2.Expert(good.z, {"name": "strange"}, foreign).save(tmp_path / "strange")
    refused(strange, VLLMValidationError, "trained with a different decomposition")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "lora", LoRAAdapterNotFoundError, "lora")  # without its weights
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"")
    refused(tmp_path / "lora", VLLMValidationError, "type None; only LORA")
    pairs = [(PROMPTS[0], 1), (PROMPTS[1], 0)]
    assert not wrong(ask(llm, world, pairs), world, pairs)


def test_a_truncated_rank_is_refused_beyond_its_bound(world, tmp_path):
    """Where the request comes in, from the spectra alone."""
    from types import SimpleNamespace

    from vllm.exceptions import VLLMValidationError

    from t2kernels.integrations.vllm.engine.check import check_request

    arguments = engine_args(factors=world.factors, rows=3, rank=16)
    config = SimpleNamespace(additional_config=arguments["additional_config"])
    with pytest.raises(VLLMValidationError, match="would be lost"):
        check_request(config, expert("e1", world.experts[1]))
    short = t2.Expert.load(world.experts[1]).truncate(16)
    check_request(config, expert("short", short.save(tmp_path / "short")))
    assert torch.equal(
        short.z["model.layers.0.mlp.up_proj"], t2.Expert.load(world.experts[1]).z["model.layers.0.mlp.up_proj"][:16]
    )
