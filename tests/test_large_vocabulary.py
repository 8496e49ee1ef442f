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


class Fixed:
    """A random number generator that returns one number."""

    def __init__(self, u: float):
        self.u = u

    def random(self) -> float:
        return self.u


def sampling(u: float, **settings) -> Sampling:
    way = Sampling(temperature=1.0, **settings)
    way.source = Fixed(u)
    return way


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
    """How often each token is drawn for `count` numbers u that are evenly spaced in [0, 1)."""
    found: Counter = Counter()
    for part in torch.arange(count).split(16):
        ways = [sampling((i + 0.5) / count, **settings) for i in part.tolist()]
        found.update(draw(row.expand(len(ways), -1).contiguous(), ways).tolist())
    return found


def test_the_default_settings_draw_from_the_whole_softmax(logits):
    """token = F^-1(u): of n evenly spaced u, a token gets n p of them, up to one, whatever the order of tokens in F."""
    n = 128
    row = logits[0].clone()
    row[[3, 7_777, 49_999]] += 8  # some that are often drawn, also at the vocabulary's end
    row[10_000:20_000] = float("-inf")
    p = row.double().softmax(-1)
    found = drawn(row, n)
    assert sum(found.values()) == n
    for token, count in found.items():
        assert p[token] > 0
        assert abs(count - n * p[token]) < 1 + 1e-3
    for token in p.topk(5).indices.tolist():
        assert found[token] > n * p[token] - 1 - 1e-3


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.3}, {"top_k": 50, "top_p": 0.2}])
def test_truncated_settings_draw_from_the_most_likely_tokens(logits, settings):
    n, row = 64, logits[1].clone()
    row[[5, 123, 49_998]] += 9
    p, order = row.double().softmax(-1).sort(descending=True)
    kept = min(settings.get("top_k", VOCABULARY), int((p.cumsum(0) - p < settings.get("top_p", 1.0)).sum()))
    wanted = {int(t): float(q / p[:kept].sum()) for t, q in zip(order[:kept], p[:kept], strict=True)}
    found = drawn(row, n, **settings)
    assert set(found) <= set(wanted)
    assert all(abs(found[token] - n * q) < 1 + 1e-3 for token, q in wanted.items())


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
