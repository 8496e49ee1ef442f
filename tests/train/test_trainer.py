"""The trainer: gradients against fp64, what moves and what does not, the same run after a resume; it learns."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections import defaultdict

import pytest
import torch
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import t2kernels as t2
from t2kernels.experts.expert import ExpertMismatch
from t2kernels.layers.scale import z_from_logits
from t2kernels.rollout.generation import completion_logits
from t2kernels.rollout.rewards import Scorer, advantages
from t2kernels.tiny.tokenizer import build
from t2kernels.train import SVFConfig, SVFTrainer
from t2kernels.train.loss import kl_divergence, reinforce_loss

TOKENIZER = build()
ROWS = [
    {"prompt": p, "answer": a}
    for p, a in (("1+2=", "3"), ("12+7=", "19"), ("a", "b"), ("rst(abc)=", "c"), ("7", "8"), ("kind(4+4)", "m"))
]


def small(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data.mul_(3).add_(
            torch.randn_like(p) * 0.05
        )  # larger, so that experts matter and completions end at different lengths
    model.model.embed_tokens.weight.data[2] *= 2.5  # </s> is likely
    return model


def letters(prompts, completions, **columns) -> list[float]:
    """A reward that tells completions apart: the share of letters, less a half."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(x.isalpha() for x in t) / max(1, len(t)) - 0.5 for t in texts]


def config(tmp_path, **changes) -> SVFConfig:
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 6,
        "max_new_tokens": 6,
        "reward_range": None,
        "use_cpu": True,
    }
    return SVFConfig(str(tmp_path), **{**settings, **changes})


def trainer(
    tmp_path,
    model=None,
    rows=ROWS,
    reward=letters,
    patch=None,
    callbacks=None,
    experts="a",
    eval_dataset=None,
    init=None,
    **changes,
):
    model = model or small()
    if not hasattr(model, "t2_bank"):
        t2.patch_model(model, **(patch or {"form": "delta", "rank": 5}))
    train = None if isinstance(experts, dict) else rows
    return SVFTrainer(
        model,
        config(tmp_path, **changes),
        train,
        eval_dataset,
        reward,
        experts,
        init=init,
        processing_class=TOKENIZER,
        callbacks=callbacks,
    )


def batch(tr: SVFTrainer) -> list[dict]:
    return [tr.train_dataset[i] for i in range(len(tr.train_dataset))]


def start(tr: SVFTrainer, scale: float = 0.3) -> dict[str, dict[str, torch.nn.Parameter]]:
    """Experts in training, moved away from the base model."""
    tr.model.requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for name in tr._names:
        tr.bank.start_training(name, tr.args.parametrisation)
        for p in tr.bank.trained_parameters(name).values():
            p.data += scale * torch.randn(p.shape, generator=generator)
    tr.current_gradient_accumulation_steps = 1
    return {name: tr.bank.trained_parameters(name) for name in tr._names}


def reference_gradient(base, rollout, parameters, parametrisation, temperature, kl_coef, direction):
    """d loss / d p in fp64: dense weights, one sequence at a time without padding, sums written out."""
    base = copy.deepcopy(base).double()
    p = {n: v.detach().double().requires_grad_() for n, v in parameters.items()}
    weights = {}
    for name, logits in p.items():
        U, sigma, Vh = torch.linalg.svd(base.get_submodule(name).weight.detach(), full_matrices=False)
        z = 1 + logits if parametrisation == "raw" else z_from_logits(logits, sigma)
        z = torch.cat([z, z.new_ones(len(sigma) - len(z))])
        weights[f"{name}.weight"] = (U * (sigma * z)) @ Vh
    loss = 0.0
    for i in range(len(rollout)):
        length = rollout.completion.shape[1]
        prompt = rollout.ids[i, :-length][rollout.mask[i, :-length].bool()]
        answer = rollout.ids[i, -length:][: int(rollout.completion[i].sum())]
        ids = torch.cat([prompt, answer])[None]
        pi = torch.log_softmax(functional_call(base, weights, (ids,)).logits[0] / temperature, -1)
        ref = torch.log_softmax(base(ids).logits[0] / temperature, -1).detach()
        for t, token in enumerate(answer.tolist(), len(prompt) - 1):
            a, b = (pi[t], ref[t]) if direction == "reverse" else (ref[t], pi[t])
            kl = sum(a.exp() * (a - b))
            loss = loss + (-rollout.advantages[i].double() * pi[t, token] + kl_coef * kl) / len(rollout)
    loss.backward()
    return loss.item(), {n: v.grad for n, v in p.items()}


@pytest.mark.parametrize(
    ("patch", "parametrisation", "temperature", "kl_coef", "direction"),
    [
        ({"form": "delta", "rank": 5}, "raw", 1.0, 0.0, "reverse"),
        ({"form": "delta", "rank": 5}, "raw", 0.7, 0.5, "reverse"),
        ({"form": "factored", "rank": 7}, "raw", 1.0, 0.5, "forward"),
        ({"form": "factored", "rank": None}, "sigmoid", 1.3, 0.2, "forward"),
    ],
)
def test_gradient_is_that_of_the_dense_model_in_fp64(tmp_path, patch, parametrisation, temperature, kl_coef, direction):
    model = small()
    base = copy.deepcopy(model)
    tr = trainer(
        tmp_path,
        model,
        patch=patch,
        parametrisation=parametrisation,
        temperature=temperature,
        kl_coef=kl_coef,
        kl_direction=direction,
    )
    parameters = start(tr)["a"]
    rollout = tr.rollout(batch(tr))
    assert len(set(rollout.mask[:, : -rollout.completion.shape[1]].sum(1).tolist())) > 2  # prompts of unequal length
    assert len(set(rollout.completion.sum(1).tolist())) > 1  # completions too
    assert rollout.advantages.unique().numel() > 1
    loss = tr.compute_loss(model, rollout)
    loss.backward()
    expected, grads = reference_gradient(base, rollout, parameters, parametrisation, temperature, kl_coef, direction)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name, p in parameters.items():
        assert (p.grad - grads[name]).norm() < 2e-4 * grads[name].norm(), name


def test_pieces_of_a_batch_and_checkpointing_give_the_same_gradient(tmp_path):
    def gradient(**changes):
        torch.manual_seed(3)
        tr = trainer(tmp_path, temperature=0.0, **changes)
        parameters = start(tr)["a"]
        if tr.args.gradient_checkpointing:
            tr.model.activation_checkpointing_enable(tr.args.gradient_checkpointing_kwargs)
        tr.training_step(tr.model, {"rows": batch(tr)})
        return torch.cat([p.grad.flatten() for p in parameters.values()])

    whole = gradient()
    for changes in ({"loss_batch_size": 4}, {"gradient_checkpointing": True}):
        torch.testing.assert_close(gradient(**changes), whole, rtol=1e-4, atol=1e-6 * whole.norm().item())


def test_pieces_get_as_many_rows_as_fit_into_memory(tmp_path):
    tr = trainer(tmp_path)
    start(tr)
    rollout = tr.rollout(batch(tr))
    row = rollout.ids.shape[1] * tr.scorer.activation_bytes(tr.model, rollout, tr.routing)
    for memory, rows in ((None, 32), (int(2.5 * row), 2), (1, 1)):
        tr.args.loss_memory = memory
        assert tr._rows_of_a_piece(rollout) == rows
    tr.args.loss_batch_size = None
    tr.args.loss_memory = int(100 * row)
    assert tr._rows_of_a_piece(rollout) == len(rollout)


def test_rows_that_teach_nothing_cost_no_forward(tmp_path):
    right = lambda prompts, **k: [1.0 if p in ("1+2=", "a") else 0.0 for p in prompts]  # noqa: E731
    for kl_coef, rows in ((0.0, 2), (0.1, 6)):
        tr = trainer(tmp_path, reward=right, kl_coef=kl_coef)
        parameters = start(tr)["a"]
        parts = tr._parts(batch(tr))
        assert sum(map(len, parts)) == rows
        tr.compute_loss(tr.model, parts[0]).backward()
    tr = trainer(tmp_path, reward=lambda prompts, **k: [0.0] * len(prompts), kl_coef=0.0)
    parameters = start(tr)["a"]
    tr.training_step(tr.model, {"rows": batch(tr)})
    assert all(p.grad is not None and not p.grad.any() for p in parameters.values())  # as before: no gradient but zero


def test_several_updates_of_one_rollout_are_clipped(tmp_path):
    tr = trainer(tmp_path, max_steps=4, num_iterations=2, clip=0.2, rows=ROWS * 4, learning_rate=0.1, logging_steps=1)
    drawn, ratios = [], []
    rollout, loss = tr.rollout, tr.compute_loss

    def counting(rows):
        drawn.append(tr.state.global_step)
        return rollout(rows)

    def watching(model, inputs, **kwargs):
        old = inputs.old
        value = loss(model, inputs)
        with torch.no_grad():
            now = tr.scorer.score(model, inputs, tr.routing(inputs.experts)).log_probs
        ratios.append((now - inputs.old)[inputs.completion].abs().max().item())
        assert (old is None) == (tr.state.global_step % 2 == 0)
        return value

    tr.rollout, tr.compute_loss = counting, watching
    tr.train()
    assert drawn == [0, 2]
    assert ratios[0] < 1e-4 < ratios[1]
    assert ratios[2] < 1e-4 < ratios[3]
    with pytest.raises(ValueError, match="set clip"):
        config(tmp_path, num_iterations=2)


def test_masked_positions_never_count(tmp_path):
    logits = torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    values, kl = logits[..., 0].clone(), logits[..., 1].clone()
    A, w = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.5])
    by_hand = 0.5 * (-1.0 * values[0, :2].sum() + 0.1 * kl[0, :2].sum()) + 0.5 * (2.0 * values[1, 0] + 0.1 * kl[1, 0])
    values[~mask], kl[~mask] = float("nan"), float("inf")
    torch.testing.assert_close(reinforce_loss(values, mask, A, w, kl, 0.1), by_hand)

    tr = trainer(tmp_path)
    start(tr)
    rollout = tr.rollout(batch(tr))
    before = tr.compute_loss(tr.model, rollout).item()
    assert not rollout.completion.all()
    ends = rollout.tokens == TOKENIZER.eos_token_id
    assert (
        rollout.completion.sum(1) == torch.where(ends.any(1), ends.int().argmax(1) + 1, ends.shape[1])
    ).all()  # the end counts, no more
    tokens = rollout.ids[:, -rollout.completion.shape[1] :]
    tokens[~rollout.completion] = 17
    assert tr.compute_loss(tr.model, rollout).item() == pytest.approx(before, rel=1e-6)


def test_kl_by_hand_in_both_directions():
    log_p, log_q = torch.tensor([[[0.2, 0.8]]]).double().log(), torch.tensor([[[0.5, 0.5]]]).double().log()
    assert kl_divergence(log_p, log_q, "reverse").item() == pytest.approx(
        0.2 * math.log(0.4) + 0.8 * math.log(1.6), rel=1e-6
    )
    assert kl_divergence(log_p, log_q, "forward").item() == pytest.approx(
        0.5 * math.log(2.5) + 0.5 * math.log(0.625), rel=1e-6
    )


@pytest.mark.parametrize("optimiser", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_rollouts_are_of_the_expert_as_it_is_after_each_step(tmp_path, optimiser):
    """Fused optimisers do not raise a parameter's version: the row that rollouts read must follow all the same."""
    model = small()
    x = torch.tensor([[1, 20, 30, 40]])

    class Compare(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ids = tr.bank.ids("a")
            with torch.no_grad():
                written = model(x, expert_ids=ids).logits
            torch.testing.assert_close(written, model(x, expert_ids=ids).logits.detach(), rtol=1e-5, atol=1e-5)
            seen.append(written)

    seen = []
    tr = trainer(tmp_path, model, callbacks=[Compare()], max_steps=3, optim=optimiser, learning_rate=0.1)
    tr.train()
    assert len(seen) == 3
    assert not torch.allclose(seen[1], seen[2], atol=1e-4)


def test_advantages_by_hand():
    r = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.0, 2.0])
    same = ["a"] * 6
    assert torch.equal(advantages(r, same, 2), r)
    torch.testing.assert_close(advantages(r, same, 2, "group"), torch.tensor([1.0, -1.0, 0.0, 0.0, -1.0, 1.0]))
    torch.testing.assert_close(advantages(r, same, 3, "leave_one_out"), torch.tensor([1.0, -2.0, 1.0, 0.0, -1.5, 1.5]))
    normal = (r - r.mean()) / r.var(unbiased=False).sqrt()
    torch.testing.assert_close(advantages(r, same, 1, "batch"), normal)
    torch.testing.assert_close(advantages(r, same, 1, "batch", clip=0.5), normal.clamp(-0.5, 0.5))
    two = advantages(r, ["a", "b", "a", "b", "a", "b"], 1, "batch")
    for part in (slice(0, None, 2), slice(1, None, 2)):
        torch.testing.assert_close(two[part], advantages(r[part].clone(), ["x"] * 3, 1, "batch"))
    assert torch.equal(advantages(torch.ones(4), ["a"] * 4, 1, "batch"), torch.zeros(4))


def test_rewards_are_summed_with_weights_and_cut_to_their_range(tmp_path):
    def ones(prompts, completions, answer, **columns):
        assert answer == [row["answer"] for row in ROWS]
        return [1.0 if i % 2 else -1.0 for i in range(len(prompts))]

    scorer = Scorer.of([ones, lambda **k: [0.5] * 6], [2.0, 1.0])
    assert scorer(ROWS, [""] * 6).tolist() == [-1.5, 2.5] * 3
    rewarded = lambda prompts, **k: [1.0 if i % 2 else -1.0 for i in range(len(prompts))]  # noqa: E731
    tr = trainer(tmp_path, reward=rewarded, reward_range=[0, 1])
    start(tr)
    assert tr.rollout(batch(tr)).advantages.tolist() == [0.0, 1.0] * 3
    assert tr.measures.since_log["accuracy"] == [0.0, 1.0] * 3


def test_several_samples_of_a_prompt_stay_together(tmp_path):
    seen = []

    def reward(prompts, completions, **columns):
        seen.append(list(prompts))
        return letters(prompts, completions)

    tr = trainer(tmp_path, reward=reward, num_generations=3, advantage="group")
    start(tr)
    rollout = tr.rollout(batch(tr)[:2])
    assert seen[-1] == ["1+2="] * 3 + ["12+7="] * 3
    torch.testing.assert_close(rollout.advantages.view(2, 3).sum(1), torch.zeros(2), atol=1e-6, rtol=0)
    assert len({tuple(row) for row in rollout.tokens.tolist()}) > 2  # they were sampled, not copied


def test_the_rollout_is_of_the_expert_and_ignores_the_models_own_sampling(tmp_path):
    model = small()
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    kept = model.generation_config
    tr = trainer(tmp_path, model)
    start(tr, scale=2.0)
    ids, mask = tr.sampler.encode([r["prompt"] for r in ROWS], torch.device("cpu"))
    mine = tr.sampler.draw(model, ids, mask, 0.0, **tr.routing(["a"] * 6))
    base = tr.sampler.draw(model, ids, mask, 0.0, **tr.routing([None] * 6))
    mixed = tr.sampler.draw(model, ids, mask, 0.0, **tr.routing(["a", None] * 3))
    assert not torch.equal(mine.tokens[:, :4], base.tokens[:, :4])
    assert model.generation_config is kept
    for i, want in enumerate([mine, base] * 3):
        n = int(want.completion[i].sum())
        assert torch.equal(mixed.tokens[i, :n], want.tokens[i, :n])


@pytest.mark.parametrize("max_new_tokens", [6, 20])  # in one stage, and in three
def test_what_is_drawn_is_what_the_loss_scores(tmp_path, max_new_tokens):
    """Greedy completions are the most likely tokens of `completion_logits`, whole or in pieces, and of `generate`."""
    model = small()
    tr = trainer(
        tmp_path,
        model,
        max_new_tokens=max_new_tokens,
        num_generations=2,
        temperature=0.0,
        experts={"a": ROWS[:3], "b": ROWS[3:]},
    )
    start(tr, scale=2.0)
    rows = batch(tr)
    rollout = tr.rollout(rows)
    prompts = [TOKENIZER.decode(ids[: -rollout.completion.shape[1]], skip_special_tokens=True) for ids in rollout.ids]
    assert prompts == [row["prompt"] for row in rows for _ in range(2)]
    encoded = TOKENIZER([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    plain = model.generate(
        **encoded, experts=["a"] * 3 + ["b"] * 3, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=2
    )
    plain = plain[:, encoded.input_ids.shape[1] :].repeat_interleave(2, 0)
    assert len(set(rollout.completion.sum(1).tolist())) > 1
    for i, n in enumerate(rollout.completion.sum(1).tolist()):
        assert torch.equal(rollout.tokens[i, :n], plain[i, :n])
    pieces = rollout.split(5)
    assert [len(p) for p in pieces] == [5, 5, 2]
    assert sum(p.completion.sum() for p in pieces) == rollout.completion.sum()
    assert sum(p.ids.numel() for p in pieces) < rollout.ids.numel()  # less padding
    for piece in (rollout, *pieces):
        with torch.no_grad():
            best = completion_logits(model, piece, **tr.routing(piece.experts)).argmax(-1)
        assert torch.equal(best[piece.completion], piece.tokens[piece.completion])


def test_two_experts_at_once_are_each_alone(tmp_path):
    rows = [{**row, "expert": "ab"[i % 2]} for i, row in enumerate(ROWS + ROWS[:2])]
    model = small()
    tr = trainer(
        tmp_path, model, rows=rows, experts=None, temperature=0.0, kl_coef=0.3, advantage="batch", max_grad_norm=0.01
    )
    parameters = start(tr)
    values = {name: [p.detach().clone() for p in ps.values()] for name, ps in parameters.items()}
    tr.training_step(model, {"rows": rows})
    tr._clip_grad_norm(model)
    for name in "ab":
        alone = trainer(tmp_path, experts=name, temperature=0.0, kl_coef=0.3, advantage="batch", max_grad_norm=0.01)
        mine = start(alone)[name]
        for p, v in zip(mine.values(), values[name], strict=True):
            p.data.copy_(v)
        alone.training_step(alone.model, {"rows": [r for r in rows if r["expert"] == name]})
        alone._clip_grad_norm(alone.model)
        for key, p in mine.items():
            torch.testing.assert_close(parameters[name][key].grad, p.grad, rtol=2e-4, atol=1e-7)
        assert torch.cat([p.grad.flatten() for p in mine.values()]).norm() == pytest.approx(0.01, rel=1e-3)


def test_an_expert_that_a_step_does_not_see_is_not_moved(tmp_path):
    rows = [
        {**row, "expert": name} for name in "aabb" for row in ROWS
    ]  # three batches of a's and b's in turn, without shuffling
    tr = trainer(
        tmp_path,
        rows=rows,
        experts=None,
        max_steps=4,
        per_device_train_batch_size=12,
        train_sampling_strategy="sequential",
        learning_rate=0.1,
    )
    seen = defaultdict(list)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for name in "ab":
                seen[name].append(
                    torch.cat([p.detach().flatten().clone() for p in tr.bank.trained_parameters(name).values()])
                )

    tr.add_callback(Watch())
    tr.train()
    a, b = seen["a"], seen["b"]
    assert a[0].any()
    assert not b[0].any()
    assert torch.equal(a[1], a[0])  # Adam's momentum would have moved it
    assert not torch.equal(b[1], b[0])
    assert not torch.equal(a[2], a[1])


def test_only_the_trained_rows_move_and_the_model_is_as_before(tmp_path):
    model = small()
    bank = t2.patch_model(model, form="delta", rank=5)
    bank.add("other", bank.expert({n: torch.full((5,), 1.5) for n in bank.matrices}))
    ids = bank.ids("other")
    model.model.norm.weight.requires_grad_(False)
    model.config.use_cache, model.config.pad_token_id = False, None
    model.train()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    tables = [layer.scale.clone() for layer, _ in bank.layers]
    x = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        base, other = model(x).logits, model(x, expert_ids=ids).logits
    tr = trainer(tmp_path, model, gradient_checkpointing=True)
    assert tr.args.gradient_checkpointing_kwargs["use_reentrant"] is False
    output = tr.train()
    assert output.global_step == 2
    row = int(bank.ids("a"))
    for (layer, _), before in zip(bank.layers, tables, strict=True):
        assert [r for r in range(bank.rows) if not torch.equal(layer.scale[r], before[r])] == [row]
    assert bank.in_training == []
    assert set(bank.names) == {"other", "a"}
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert (model.training, model.config.use_cache, model.config.pad_token_id) == (True, False, None)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(x).logits, base)
        assert torch.equal(model(x, expert_ids=ids).logits, other)
        assert not torch.equal(model(x, experts=["a"]).logits, base)
    assert tr.experts["a"] == bank["a"]
    facts = tr.experts["a"].manifest
    assert (facts["name"], facts["steps"], facts["reward"], facts["learning_rate"]) == ("a", 2, "letters", 0.02)
    saved = tr.save_expert("a", tmp_path / "mine")
    assert t2.Expert.load(saved) == tr.experts["a"]
    with pytest.raises(KeyError, match="no expert 'b'"):
        tr.save_expert("b", tmp_path / "b")
    first = tr.experts["a"]
    tr.train()  # anew, on the same trainer
    assert tr.experts["a"] == first


def test_after_a_failure_the_bank_is_free_and_what_was_learned_is_kept(tmp_path):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("judge is down")
        return letters(prompts, completions)

    tr = trainer(tmp_path, reward=reward, max_steps=10)
    with pytest.raises(RuntimeError, match="judge is down"):
        tr.train()
    assert tr.bank.names == []
    assert tr.experts["a"].manifest["steps"] == 2
    assert all(p.requires_grad for p in tr.model.parameters())


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("at", [3, 4])
def test_resume_gives_the_same_run_bit_for_bit(tmp_path, at):
    rows = ROWS * 4  # 24 rows in batches of 6: an epoch ends at step 4
    settings = {
        "max_steps": 2 * at,
        "save_strategy": "steps",
        "save_steps": at,
        "eval_strategy": "steps",
        "eval_steps": at,
        "logging_steps": 1,
    }
    settings |= {"eval_on_start": True, "kl_coef": 0.1, "advantage": "batch"}
    straight = trainer(tmp_path / "straight", rows=rows, eval_dataset=ROWS, **settings)
    straight.train()
    first = trainer(tmp_path / "cut", rows=rows, eval_dataset=ROWS, callbacks=[StopAt(at)], **settings)
    first.train()
    assert first.experts["a"] != straight.experts["a"]
    torch.manual_seed(99)
    second = trainer(tmp_path / "cut", rows=rows, eval_dataset=ROWS, **settings)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 2 * at
    assert second.experts["a"] == straight.experts["a"]
    numbers = [
        [
            {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
            for entry in tr.state.log_history[:-1]
        ]
        for tr in (second, straight)
    ]
    assert numbers[0] == numbers[1]
    assert second.experts["a"].manifest == straight.experts["a"].manifest


def test_checkpoints_hold_experts_only_and_fit_only_their_model(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    tr = trainer(tmp_path, **settings)
    tr.train()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]  # and no temporary
    files = {
        str(p.relative_to(tmp_path / "checkpoint-2")): p.stat().st_size
        for p in (tmp_path / "checkpoint-2").rglob("*")
        if p.is_file()
    }
    assert set(files) == {
        "experts/a.safetensors", "parameters.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "trainer_state.json", "svf_config.json", "digests.json",
    }  # fmt: skip
    assert sum(files.values()) < 100_000
    assert t2.Expert.load(tmp_path / "checkpoint-2/experts/a") == tr.experts["a"]
    assert json.loads((tmp_path / "checkpoint-2/svf_config.json").read_text())["kl_coef"] == 0.05
    checkpoint = str(tmp_path / "checkpoint-2")
    for wrong, message in (
        ({"model": small(1)}, "expert"),
        ({"patch": {"form": "delta", "rank": 4}}, "rank|components"),
        ({"experts": "b"}, "holds the experts a, not 'b'"),
    ):
        other = trainer(tmp_path / "other", **{"max_steps": 4, **wrong})
        with pytest.raises(ExpertMismatch, match=message):
            other.train(resume_from_checkpoint=checkpoint)
        assert other.bank.names == []
    with pytest.raises(t2.ExpertError, match="no checkpoint"):
        trainer(tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones(tmp_path, monkeypatch):
    tr = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    save, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:  # optimizer, scheduler and random state of the first
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        tr.train()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1/trainer_state.json").is_file()


def test_evaluation_counts_and_the_best_expert_is_kept(tmp_path):
    scripted = iter([0, 4, 5, 3])  # right answers of 6 at steps 0, 1, 2, 3

    class Graded:
        def __call__(self, prompts, completions, **columns):
            if not self.judging:
                return letters(prompts, completions)
            right = next(scripted)
            return [1.0] * right + [-1.0] * (len(prompts) - right)

    reward = Graded()
    reward.judging = False
    tr = trainer(
        tmp_path, reward=reward, eval_dataset=ROWS, max_steps=3, eval_strategy="steps", eval_steps=1,
        eval_on_start=True, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    evaluate = tr.evaluate

    def judged(*args, **kwargs):
        reward.judging = True
        try:
            return evaluate(*args, **kwargs)
        finally:
            reward.judging = False

    tr.evaluate = judged
    tr.train()
    entries = [e for e in tr.state.log_history if "eval_accuracy" in e]
    assert [round(e["eval_accuracy"] * 6) for e in entries] == [0, 4, 5, 3]
    assert entries[2]["eval_accuracy_se"] == pytest.approx((5 / 6 * 1 / 6 / 6) ** 0.5)
    assert entries[1]["eval_reward"] == pytest.approx(2 / 6)
    assert tr.experts["a"] == t2.Expert.load(tmp_path / "checkpoint-2/experts/a")
    facts = tr.experts["a"].manifest
    assert (facts["steps"], facts["accuracy_before"], facts["evaluated_on"]) == (2, 0.0, 6)
    assert facts["accuracy_after"] == pytest.approx(5 / 6)


def test_evaluation_is_by_expert(tmp_path):
    tr = trainer(
        tmp_path, rows=None, experts={"a": ROWS[:3], "b": ROWS[3:]}, eval_dataset={"a": ROWS[:4], "b": ROWS[4:]}
    )
    metrics = tr.evaluate()
    assert metrics["eval_accuracy"] * 6 == pytest.approx(
        metrics["eval_a_accuracy"] * 4 + metrics["eval_b_accuracy"] * 2
    )
    tr.train()
    assert set(tr.experts) == {"a", "b"}
    assert tr.experts["a"] != tr.experts["b"]


def test_a_task_brings_prompts_reward_and_length(tmp_path):
    from t2kernels import tasks

    task = tasks.load("math")
    model = small()
    t2.patch_model(model, form="delta", rank=2)
    tr = SVFTrainer(
        model, SVFConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=4), task, processing_class=TOKENIZER
    )
    assert tr._names == ["math"]
    assert (tr.sampler.max_new_tokens, len(tr.eval_dataset)) == (task.max_new_tokens, len(task.split("validation")))
    assert tr.train_dataset[0] == {**task.split("train", 1)[0], "expert": "math"}
    tr.train()
    assert tr.experts["math"].manifest["task"] == "math"
    assert not (tmp_path / "checkpoint-1").exists()


def test_chats_go_through_the_template(tmp_path):
    tokenizer = build()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions)
        return letters(prompts, completions)

    rows = [{"prompt": [{"role": "user", "content": c}]} for c in ("hi", "hello")]
    model = small()
    t2.patch_model(model, form="delta", rank=2)
    tr = SVFTrainer(model, config(tmp_path), rows, reward=reward, processing_class=tokenizer)
    ids, mask = tr.sampler.encode([r["prompt"] for r in rows], torch.device("cpu"))
    assert tokenizer.decode(ids[0][mask[0].bool()]) == "[user]hi[a]"
    start(tr)
    tr.rollout(batch(tr))
    assert seen["prompts"][0] == rows[0]["prompt"]
    assert seen["completions"][0][0]["role"] == "assistant"
    assert isinstance(seen["completions"][0][0]["content"], str)


def test_a_warning_where_there_is_nothing_to_learn(tmp_path, caplog):
    tr = trainer(
        tmp_path,
        reward=lambda prompts, **k: [-0.1 * (i + 1) for i in range(len(prompts))],
        max_steps=7,
        reward_range=[0, 1],
    )
    with caplog.at_level(logging.WARNING, logger="t2kernels"):
        tr.train()
    found = [r.getMessage() for r in caplog.records if "nothing to learn" in r.getMessage()]
    assert len(found) == 1
    assert "'a'" in found[0]
    assert "reward_range" in found[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": None}, "reward=None; wanted a callable"),
        ({"reward": lambda **k: [1.0]}, "returned 1 values for 2 completions"),
        ({"reward": lambda **k: [float("nan")] * len(k["prompts"])}, "returned nan for completion 0"),
        ({"reward": lambda **k: None}, "returned None for 2 completions"),
        ({"rows": [{"question": "x"}]}, "no 'prompt'; its columns are 'question'"),
        ({"rows": []}, "train_dataset is empty"),
        ({"rows": None}, "nothing to train on"),
        ({"parametrisation": "sigmoid"}, "sigmoid"),
        ({"parametrisation": "softmax"}, "wanted 'raw' or 'sigmoid'"),
        ({"advantage": "group"}, "num_generations=1; wanted at least 2"),
        ({"temperature": 0.0, "advantage": "group", "num_generations": 2}, "temperature=0"),
        ({"reward_range": [1, 0]}, "reward_range"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"eval_dataset": {"b": ROWS}}, "problems of ['b']"),
        ({"experts": {}}, "names none"),
    ],
)
def test_errors_before_any_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(tmp_path, **changes).train()


def test_more_errors(tmp_path):
    with pytest.raises(ValueError, match="not patched"):
        SVFTrainer(small(), config(tmp_path), ROWS, reward=letters, processing_class=TOKENIZER)
    model = small()
    bank = t2.patch_model(model, form="delta", rank=5)
    with pytest.raises(ValueError, match="tokenizer"):
        SVFTrainer(model, config(tmp_path), ROWS, reward=letters)
    bank.add("a", bank.expert({"model.layers.0.mlp.up_proj": torch.full((5,), 1.5)}))
    with pytest.raises(ValueError, match="has an expert named 'a'"):
        trainer(tmp_path, model)
    tr = trainer(tmp_path, model, experts="c", init=bank["a"], max_steps=1, learning_rate=0.0)
    tr.train()  # a rate of 0: it stays where it started
    assert torch.equal(tr.experts["c"].z["model.layers.0.mlp.up_proj"], bank["a"].z["model.layers.0.mlp.up_proj"])
    with pytest.raises(ValueError, match="64 positions"):
        trainer(tmp_path, model, experts="d", rows=[{"prompt": "1" * 80}] * 6).train()
    bare = build()
    bare.pad_token = None
    tr = SVFTrainer(model, config(tmp_path, max_steps=1), ROWS, reward=letters, experts="e", processing_class=bare)
    assert bare.pad_token_id == bare.eos_token_id  # falls back
    tr.train()
    bare = build()
    bare.pad_token = bare.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no pad token and no end-of-text token"):
        SVFTrainer(model, config(tmp_path), ROWS, reward=letters, experts="f", processing_class=bare)


def test_the_papers_settings(tmp_path):
    args = SVFConfig.paper(str(tmp_path), max_steps=20)
    assert (args.parametrisation, args.learning_rate, args.max_grad_norm, args.per_device_train_batch_size) == (
        "sigmoid",
        2e-3,
        1e-3,
        256,
    )
    assert (args.temperature, args.reward_range, args.kl_coef, args.advantage, args.weight_decay) == (
        0.0,
        None,
        0.0,
        "none",
        0.0,
    )
    model = small()
    t2.patch_model(model, form="factored")
    args.per_device_train_batch_size, args.max_new_tokens = 6, 4
    tr = SVFTrainer(model, args, ROWS, ROWS, letters, processing_class=TOKENIZER)
    tr.train()
    assert tr.experts["expert"].manifest["parametrisation"] == "sigmoid"


def test_it_learns(tmp_path):
    """Rewarded for digits, an expert of 112 numbers makes a random model write them."""

    def digits(prompts, completions, **columns):
        return [1.0 if c[:1].isdigit() else -1.0 for c in completions]

    tr = trainer(
        tmp_path, rows=ROWS * 20, reward=digits, patch={"form": "delta", "rank": 8}, reward_range=[0, 1], max_steps=40,
        per_device_train_batch_size=32, max_new_tokens=1, learning_rate=0.1,
    )  # fmt: skip
    tr.train()
    logs = [e["accuracy"] for e in tr.state.log_history if "accuracy" in e]
    assert logs[-1] > logs[0] + 0.25, logs


def test_it_learns_arithmetic_on_the_tiny_model(tmp_path):
    from t2kernels import tasks, tiny

    model, tokenizer = tiny.load()
    t2.patch_model(model, form="delta", rank=64)
    task = tasks.load("math")
    args = SVFConfig(str(tmp_path), max_steps=14, per_device_train_batch_size=64, learning_rate=0.03)
    tr = SVFTrainer(model, args, task, task.split("test", 300), processing_class=tokenizer)
    before = tr.evaluate()["eval_accuracy"]
    tr.train()
    after = tr.evaluate()["eval_accuracy"]
    assert after > before + 0.2, (before, after)  # its standard error is .03


def test_metrics_reach_the_reporter_that_was_asked_for(tmp_path, monkeypatch):
    """report_to of transformers, with TensorBoard files as the reporter; TFRecords hold the tags as plain text."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    tr = trainer(tmp_path, report_to=["tensorboard"], logging_steps=1)
    tr.train()
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("events.out.tfevents.*"))
    for tag in (b"train/loss", b"train/reward", b"train/kl"):
        assert tag in written
