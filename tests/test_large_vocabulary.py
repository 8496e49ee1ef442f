"""Sampling, log-probabilities and experts with a vocabulary of 50,000 tokens: a small one hides faults."""

import copy
from collections import Counter

import pytest
import torch

import t2kernels as t2
from t2kernels.rollout.generation import Sampler, completion_logits, log_probs
from t2kernels.serve.engine.sampling import Sampling, draw
from t2kernels.train.loss import kl_divergence
from tests.helpers.large_vocabulary import VOCABULARY

PROMPTS = ["w17 w40000 w5", "w49999", "w300 w12 w31234 w8 w25000"]


@pytest.fixture(scope="module")
def logits(large_vocabulary):
    """[3, 50000] fp32: the next token of each prompt."""
    model, tokenizer = large_vocabulary
    with torch.no_grad():
        return model(**tokenizer(PROMPTS, padding=True, return_tensors="pt")).logits[:, -1]


def test_the_tokenizer_and_the_model_fit(large_vocabulary, logits):
    model, tokenizer = large_vocabulary
    assert len(tokenizer) == model.config.vocab_size == VOCABULARY
    assert tokenizer(PROMPTS[0]).input_ids == [17, 40000, 5]
    assert tokenizer.decode([17, 40000, 5]) == PROMPTS[0]
    assert logits.softmax(-1).max() > 20 / VOCABULARY  # not uniform, so that a wrong distribution shows


def drawn(row: torch.Tensor, count: int, **settings) -> Counter:
    """How often each token is drawn from one distribution."""
    way, found = Sampling(1.0, seed=20261128, **settings), Counter()
    for part in torch.arange(count).split(64):
        found.update(draw(row.expand(len(part), -1), [way] * len(part)).tolist())
    return found


def fits(found: Counter, wanted: dict[int, float]) -> bool:
    """Counts within five standard deviations of a multinomial: each of the tokens in `wanted`, and all others
    together."""
    n, rest = found.total(), 1 - sum(wanted.values())
    counts = [(found[token], q) for token, q in wanted.items()]
    counts.append((n - sum(count for count, _ in counts), rest))
    return all(abs(count - n * q) <= 5 * (n * q * (1 - q)) ** 0.5 + 1e-6 * n for count, q in counts)


def test_the_default_settings_draw_from_the_whole_softmax(logits):
    row = logits[0].clone()
    row[[3, 7_777, 49_999]] += 8  # some that are often drawn, also at the vocabulary's end
    row[10_000:20_000] = float("-inf")
    p = row.double().softmax(-1)
    found = drawn(row, 4096)
    assert not any(10_000 <= token < 20_000 for token in found)
    assert fits(found, {token: float(p[token]) for token in p.topk(5).indices.tolist()})
    assert not fits(found, {token: float(p[token]) / 2 for token in p.topk(5).indices.tolist()})
    # The many tokens that are drawn once or never are drawn evenly, too: each quarter of the vocabulary has its share.
    quarters = torch.arange(VOCABULARY) // (VOCABULARY // 4)
    shares = {quarter: float(p[quarters == quarter].sum()) for quarter in range(3)}
    assert fits(Counter(t // (VOCABULARY // 4) for t in found.elements()), shares)


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.3}, {"top_p": 0.99}, {"top_k": 50, "top_p": 0.2}])
def test_truncated_settings_draw_from_the_most_likely_tokens(logits, settings):
    row = logits[1].clone()
    row[[5, 123, 49_998]] += 9
    p, order = row.double().softmax(-1).sort(descending=True)
    kept = min(settings.get("top_k", VOCABULARY), int((p.cumsum(0) - p < settings.get("top_p", 1.0)).sum()))
    assert settings != {"top_p": 0.99} or kept > 1024  # more than are looked at first
    wanted = {int(t): float(q / p[:kept].sum()) for t, q in zip(order[:kept], p[:kept], strict=True)}
    found = drawn(row, 1024, **settings)
    assert set(found) <= set(wanted)
    assert fits(found, dict(list(wanted.items())[:5]))


def test_a_seed_survives_the_rounding_of_bf16(logits):
    """Of a model that rounds to bf16 differently in another batch: few tokens change, where a walk by probability loses
    a third."""
    row, n = logits[0] * 3, 512
    rounded = (row + torch.randn(n, VOCABULARY) * row.abs() * 2.0**-8).bfloat16().float()
    ways = [[Sampling(1.0, seed=i) for i in range(n)] for _ in range(2)]
    same = draw(row.bfloat16().float().expand(n, -1), ways[0]) == draw(rounded, ways[1])
    assert same.float().mean() > 0.95


def test_nothing_is_sorted_unless_top_p_asks(logits, monkeypatch):
    monkeypatch.setattr(torch, "sort", None)
    monkeypatch.setattr(torch.Tensor, "sort", None)
    seen = []
    real = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda t, k, *a, **kw: seen.append(k) or real(t, k, *a, **kw))
    draw(logits, [Sampling(1.0, seed=i) for i in range(3)])
    assert not seen
    draw(logits, [Sampling(1.0, seed=1, top_k=7), Sampling(1.0, seed=2), Sampling()])
    assert seen == [7]


def test_a_seed_gives_the_same_token_alone_and_in_a_batch(logits):
    settings = [{}, {"top_p": 0.9}, {"top_k": 40}]
    alone = [int(draw(logits[i : i + 1], [Sampling(1.0, seed=i, **s)])) for i, s in enumerate(settings)]
    together = draw(logits, [Sampling(1.0, seed=i, **s) for i, s in enumerate(settings)])
    assert together.tolist() == alone
    mixed = draw(logits, [Sampling(0.0), Sampling(1.0, seed=1, top_p=0.9), Sampling(0.0)])
    assert mixed.tolist() == [int(logits[0].argmax()), alone[1], int(logits[2].argmax())]


def test_reported_log_probabilities(logits):
    way = Sampling(1.0, seed=3, logprobs=5)
    token = int(draw(logits[2:], [way]))
    exact = logits[2].double().log_softmax(-1)
    ((own, likeliest),) = way.reported
    assert own == pytest.approx(float(exact[token]), abs=1e-5)
    assert [t for t, _ in likeliest] == exact.topk(5).indices.tolist()
    assert [v for _, v in likeliest] == pytest.approx(exact.topk(5).values.tolist(), abs=1e-5)


# --- rollouts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_are_scored_by_the_logits_that_they_were_drawn_from(large_vocabulary, temperature):
    model, tokenizer = large_vocabulary
    sampler = Sampler(model, tokenizer, max_new_tokens=5)
    ids, mask = sampler.encode(PROMPTS, torch.device("cpu"))
    rollout = sampler.draw(model, ids, mask, temperature, samples=2)
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        found = completion_logits(model, rollout)
        hook.remove()
        positions = (rollout.mask.cumsum(1) - 1).clamp(min=0)
        whole = model(input_ids=rollout.ids, attention_mask=rollout.mask, position_ids=positions).logits
    length = rollout.completion.shape[1]
    assert seen == [length]  # the head is most of the work: it sees the completions only
    assert found.shape == (6, length, VOCABULARY)
    wanted = whole[:, -length - 1 : -1]
    at = rollout.completion
    torch.testing.assert_close(found[at], wanted[at], atol=1e-4, rtol=1e-4)
    if temperature == 0:
        assert found.argmax(-1)[at].equal(rollout.tokens[at])


def test_log_probabilities_and_kl_are_those_of_fp64(logits):
    for temperature in (0.7, 1.0):
        exact = (logits.double() / temperature).log_softmax(-1)
        torch.testing.assert_close(log_probs(logits, temperature).double(), exact, atol=1e-5, rtol=0)
    a, b = logits[:1], logits[1:2]
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    for direction, wanted in (("reverse", (p.exp() * (p - q)).sum(-1)), ("forward", (q.exp() * (q - p)).sum(-1))):
        torch.testing.assert_close(
            kl_divergence(log_probs(a), log_probs(b), direction).double(), wanted, atol=1e-4, rtol=0
        )
        assert float(kl_divergence(log_probs(a), log_probs(a), direction)) == 0


# --- experts


def patched(large_vocabulary, **settings):
    model = copy.deepcopy(large_vocabulary[0])
    bank = t2.patch_model(model, rows=4, **settings)
    for name in ("a", "b"):
        bank.add(name, bank.expert({n: 1 + 0.5 * torch.randn(k) for n, k in bank.matrices.items()}))
    return model, bank


@torch.no_grad()
def test_the_base_row_is_the_dense_model_bit_for_bit_in_delta_form(large_vocabulary):
    dense, tokenizer = large_vocabulary
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    wanted = dense(**inputs).logits
    model, _ = patched(large_vocabulary, rank=8, form="delta")
    assert model(**inputs).logits.equal(wanted)
    assert model(**inputs, experts=[None, None, None]).logits.equal(wanted)
    mixed = model(**inputs, experts=["a", None, "b"]).logits
    assert mixed[1].equal(wanted[1])
    assert not mixed[0].equal(wanted[0])
    assert not mixed[2].equal(wanted[2])


@pytest.mark.parametrize("form", ["delta", "factored"])
@torch.no_grad()
def test_a_mixed_batch_is_the_merged_models(large_vocabulary, form):
    tokenizer = large_vocabulary[1]
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    model, bank = patched(large_vocabulary, rank=8 if form == "delta" else None, form=form)
    experts = {name: bank[name] for name in ("a", "b")}
    names = ["a", "b", None]
    mixed = model(**inputs, experts=names).logits
    greedy = model.generate(**inputs, experts=names, max_new_tokens=6, do_sample=False)
    for i, name in enumerate(names):
        merged = patched(large_vocabulary, rank=8 if form == "delta" else None, form=form)[0]
        t2.unpatch_model(merged, experts.get(name))
        wanted = merged(**inputs).logits[i]
        seen = inputs.attention_mask[i].bool()
        torch.testing.assert_close(mixed[i][seen], wanted[seen], atol=2e-3, rtol=1e-3)
        assert greedy[i].equal(merged.generate(**inputs, max_new_tokens=6, do_sample=False)[i])
