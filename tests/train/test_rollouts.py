"""Completions from an engine of another program: the same gradient, old versions, importance weights, failures."""

from __future__ import annotations

import logging
import threading
from itertools import pairwise

import pytest
import torch

import t2kernels as t2
from t2kernels import InputError, StateError, UnknownNameError
from t2kernels.experts.expert import Expert
from t2kernels.rollout import engines
from t2kernels.rollout.generation import completion_logits, log_probs
from t2kernels.train import SVFConfig, SVFTrainer
from t2kernels.train.loss import importance_ratio, reinforce_loss
from t2kernels.train.steering.gap import Gap
from t2kernels.train.steering.measures import Measures
from t2kernels.train.steering.watch import Watch
from tests.train.test_trainer import ROWS, TOKENIZER, letters, small, start

PATCH = {"form": "delta", "rank": 5}


class Fake(engines.RolloutEngine):
    """Draws with a model of its own, under the versions that were published to it."""

    def __init__(self, context: engines.EngineContext) -> None:
        with torch.random.fork_rng():  # the draws of the run go on as they would without it
            self.model = small()
        self.bank = t2.patch_model(self.model, **PATCH)
        self.context = context
        self.published: dict[str, Expert] = {}
        self.log: list[tuple] = []
        self.shift = 0.0  # added to the log-probabilities that it tells
        self.fail_at: str | None = None
        self.threads: set[int] = set()

    def publish(self, policy: str, expert: Expert) -> int:
        if policy == self.fail_at:
            raise StateError(f"replica http://b:2 does not answer about {policy!r}")
        assert policy not in self.published, "a name is used once"
        self.published[policy] = expert
        self.bank.add(policy, expert)
        self.log.append(("publish", policy))
        return 4 * expert.numel

    def draw(self, ids, mask, policies, how):
        self.threads.add(threading.get_ident())
        self.log.append(("draw", tuple(dict.fromkeys(policies)), how.seed))
        routing = {"expert_ids": self.bank.ids(list(policies))}
        out = self.context.sampler.draw(self.model, ids, mask, how.temperature, how.samples, **routing)
        rows = {"expert_ids": routing["expert_ids"].repeat_interleave(how.samples)}
        with torch.no_grad():
            logits = completion_logits(self.model, out, **rows)
        taken = log_probs(logits, how.temperature).gather(2, out.tokens[..., None])[..., 0]
        out.sampled = torch.where(out.completion, taken + self.shift, 0)
        return out

    def drop(self, policies) -> None:
        for policy in policies:
            self.bank.remove(policy)
            self.log.append(("drop", policy))

    def close(self) -> None:
        self.log.append(("close",))


@pytest.fixture
def fakes(monkeypatch):
    """The engines that were opened under the name "fake"."""
    opened: list[Fake] = []
    monkeypatch.setitem(engines._MADE_BY, "fake", lambda context: opened.append(Fake(context)) or opened[-1])
    return opened


def make(tmp_path, experts="a", reward=letters, callbacks=None, **changes) -> SVFTrainer:
    model = small()
    t2.patch_model(model, **PATCH)
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 6, "max_new_tokens": 6, "reward_range": None, "use_cpu": True,
        "rollout": "fake", "logging_steps": 1, "num_train_epochs": 100,
    }  # fmt: skip
    train = None if isinstance(experts, dict) else ROWS
    return SVFTrainer(
        model, SVFConfig(str(tmp_path), **{**settings, **changes}), train, None, reward, experts,
        processing_class=TOKENIZER, callbacks=callbacks,
    )  # fmt: skip


def gradient(tr: SVFTrainer) -> torch.Tensor:
    parameters = start(tr)["a"]
    torch.manual_seed(11)
    tr.training_step(tr.model, {"rows": [tr.train_dataset[i] for i in range(len(ROWS))]})
    return torch.cat([p.grad.flatten() for p in parameters.values()])


def z_of(tr: SVFTrainer, name: str = "a") -> torch.Tensor:
    return torch.cat(list(tr.experts[name].z.values()))


@pytest.mark.parametrize("changes", [{}, {"kl_coef": 0.0, "num_generations": 3, "advantage": "group"}])
def test_the_gradient_is_that_of_rollouts_of_the_model_itself(tmp_path, fakes, changes):
    """An engine with the same policy tells the same log-probabilities: then the ratio is 1."""
    own = gradient(make(tmp_path, rollout="transformers", **changes))
    other = gradient(make(tmp_path, **changes))
    assert own.abs().max() > 1e-3
    torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-6)
    assert [entry[0] for entry in fakes[0].log] == ["publish", "draw"]


def test_the_importance_ratio_is_that_of_fp64_and_is_cut(tmp_path, fakes):
    torch.manual_seed(0)
    log_pi, log_mu, A = torch.randn(3, 5) - 1, torch.randn(3, 5) - 1, torch.tensor([1.0, -2.0, 0.5])
    mask = torch.arange(5)[None] < torch.tensor([[5], [2], [4]])
    weights, poisoned = torch.full((3,), 1 / 3), torch.where(mask, log_mu, torch.nan)
    log_pi.requires_grad_()
    for cap in (None, 2.0):
        ratio = importance_ratio(log_pi, poisoned, mask, cap)
        loss = reinforce_loss(log_pi, mask, A, weights, importance=ratio)
        (found,) = torch.autograd.grad(loss, log_pi)
        wanted = torch.zeros(3, 5, dtype=torch.float64)
        for i in range(3):
            for t in range(5):
                if mask[i, t]:
                    rho = (log_pi[i, t].double() - log_mu[i, t].double()).exp().item()
                    wanted[i, t] = -A[i].item() * (rho if cap is None else min(rho, cap)) / 3
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)
    assert (importance_ratio(log_pi, log_mu, mask) > 2).any(), "nothing was cut"


def test_a_sampler_that_tells_other_probabilities_changes_the_gradient_by_the_ratio(tmp_path, fakes):
    same = gradient(make(tmp_path, kl_coef=0.0))
    tr = make(tmp_path, kl_coef=0.0)
    tr.begin_drawing()
    fakes[-1].shift = -0.5  # pi / mu = e^.5
    torch.testing.assert_close(gradient(tr), same * torch.tensor(0.5).exp(), rtol=1e-4, atol=1e-6)
    tr = make(tmp_path, kl_coef=0.0)
    tr.begin_drawing()
    fakes[-1].shift = -3.0
    torch.testing.assert_close(gradient(tr), same * 2.0, rtol=1e-4, atol=1e-6)


def test_a_run_is_that_of_rollouts_of_the_model_itself(tmp_path, fakes):
    own, other = make(tmp_path, rollout="transformers"), make(tmp_path)
    own.train()
    other.train()
    torch.testing.assert_close(z_of(other), z_of(own), rtol=1e-3, atol=1e-4)
    logs = [entry for entry in other.state.log_history if "sampler_gap" in entry]
    assert len(logs) == 4
    assert all(entry["sampler_gap"] < 1e-4 and entry["staleness"] == 0 for entry in logs)
    assert all(abs(entry["importance_max"] - 1) < 1e-3 and entry["importance_cut"] == 0 for entry in logs)
    assert "sampler_gap" not in own.state.log_history[0]
    kinds = [entry for entry in fakes[0].log if entry[0] != "draw"]
    wanted = [("publish", "a@0"), ("publish", "a@1"), ("drop", "a@0"), ("publish", "a@2"), ("drop", "a@1")]
    assert kinds == [*wanted, ("publish", "a@3"), ("drop", "a@2"), ("close",)]


def test_stale_rollouts_are_of_the_version_that_drew_them(tmp_path, fakes):
    tr = make(
        tmp_path,
        max_staleness=2,
        max_steps=6,
        per_device_train_batch_size=1,
        importance_cap=None,
        warmup_steps=0,
        num_generations=3,
    )
    taken, take = [], tr.rollout

    def rollout(rows):
        out = take(rows)
        taken.append((tr.state.global_step, tr.stale, out))
        return out

    tr.rollout = rollout
    tr.train()
    fake = fakes[0]
    assert [(step, stale) for step, stale, _ in taken] == [(0, 0), (1, 1), (2, 2), (3, 2), (4, 2), (5, 2)]
    assert threading.get_ident() not in fake.threads
    draws = [entry[1] for entry in fake.log if entry[0] == "draw"]
    assert draws == [("a@0",)] * 3 + [("a@1",), ("a@2",), ("a@3",)], "nothing is drawn beyond the last update"
    # What the sampler told is what a model with that version says; no version changed after it was published.
    model = small()
    bank = t2.patch_model(model, **PATCH)
    for step, stale, out in taken:
        policy = f"a@{step - stale}"
        if policy not in bank:
            bank.add(policy, fake.published[policy])
        with torch.no_grad():
            logits = completion_logits(model, out, expert_ids=bank.ids(policy))
        wanted = log_probs(logits).gather(2, out.tokens[..., None])[..., 0]
        torch.testing.assert_close(out.sampled[out.completion], wanted[out.completion], rtol=1e-4, atol=1e-4)
    seen = [torch.cat(list(e.z.values())) for e in fake.published.values()]
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))
    # A version goes when its last rollout was taken, and the newest one stays.
    assert [entry[1] for entry in fake.log if entry[0] == "drop"] == ["a@0", "a@1", "a@2"]
    logged = [entry["staleness"] for entry in tr.state.log_history if "staleness" in entry]
    assert logged == [0, 1, 2, 2, 2, 2]
    late = [entry["importance_max"] for entry in tr.state.log_history if entry.get("staleness") == 2]
    assert max(late) > 1.01, "the policy has moved on"


def test_accumulated_batches_and_epochs_are_drawn_ahead_in_order(tmp_path, fakes):
    tr = make(
        tmp_path, max_staleness=1, max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        num_generations=2,
    )  # fmt: skip
    tr.train()  # an epoch is 3 batches of 2: two updates, the second of a single batch
    assert tr.state.global_step == 5
    draws = [entry for entry in fakes[0].log if entry[0] == "draw"]
    assert len({seed for *_, seed in draws}) == len(draws)
    logged = [entry["staleness"] for entry in tr.state.log_history if "staleness" in entry]
    assert logged == [0, 1, 0, 1, 0], "at the start of an epoch nothing is ahead: its first update is on-policy"


def test_experts_train_from_one_engine_each_with_its_own_row(tmp_path, fakes):
    def digits(prompts, completions, **columns):
        return [-r for r in letters(prompts, completions)]

    two = {"a": ROWS, "b": ROWS}
    tr = make(tmp_path, experts=two, reward={"a": letters, "b": digits}, per_device_train_batch_size=12)
    tr.train()
    published = [entry[1] for entry in fakes[0].log if entry[0] == "publish"]
    assert sorted(published) == sorted(f"{e}@{s}" for e in "ab" for s in range(4))
    assert len(fakes) == 1
    apart = z_of(tr, "a") - z_of(tr, "b")
    assert apart.abs().max() > 0.02
    own = make(
        tmp_path, experts=two, reward={"a": letters, "b": digits}, per_device_train_batch_size=12,
        rollout="transformers",
    )  # fmt: skip
    own.train()
    for name in "ab":
        torch.testing.assert_close(z_of(tr, name), z_of(own, name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_replica_that_fails_ends_the_step_by_name_and_training_resumes(tmp_path, fakes, monkeypatch, ahead):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_staleness": ahead}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    broken = make(tmp_path / "broken", **settings)
    made = engines._MADE_BY["fake"]

    def failing(context):
        engine = made(context)
        engine.fail_at = "a@3" if not ahead else "a@2"
        return engine

    monkeypatch.setitem(engines._MADE_BY, "fake", failing)
    with pytest.raises(StateError, match="replica http://b:2 does not answer about 'a@"):
        broken.train()
    assert fakes[-1].log[-1] == ("close",)
    assert broken.state.global_step in (2, 3)
    monkeypatch.setitem(engines._MADE_BY, "fake", made)
    again = make(tmp_path / "broken", **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    if not ahead:  # ahead, the first batches after a resume are drawn by a newer policy
        assert torch.equal(z_of(again), z_of(whole))


def test_the_gap_is_measured_and_warned_about_once(tmp_path, fakes, caplog):
    measures, gap = Measures(Watch(True), False), Gap(2.0)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    pi = torch.tensor([[-1.0, -2.0, 9.0], [-0.5, 9.0, 9.0]])
    mu = torch.tensor([[-1.2, -1.7, -9.0], [-1.5, torch.nan, torch.nan]])
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            gap.add(pi, mu, mask)
            found = gap.end_of_batch(measures, 0)
    assert found["sampler_gap"] == pytest.approx((0.2 + 0.3 + 1.0) / 3, rel=1e-6)
    assert found["importance_max"] == pytest.approx(torch.tensor(1.0).exp().item(), rel=1e-6)
    assert found["importance_cut"] == pytest.approx(1 / 3)
    assert caplog.text.count("they do not run one policy") == 1
    assert gap.end_of_batch(measures, 0) == {}
    quiet = Watch(True)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        for _ in range(8):
            quiet.sampler(0.5, 2.0, 0.01, stale=2)
            quiet.sampler(0.01, 1.1, 0.0, stale=0)
    assert not caplog.text


def test_errors_before_any_work(tmp_path):
    with pytest.raises(UnknownNameError, match=r"no engine 'vlm'; there are .*transformers"):
        SVFConfig(str(tmp_path), rollout="vlm")
    with pytest.raises(InputError, match="ends after the colon"):
        SVFConfig(str(tmp_path), rollout="transformers:")
    with pytest.raises(InputError, match="importance_cap"):
        SVFConfig(str(tmp_path), importance_cap=0.5)
    with pytest.raises(InputError, match="max_staleness=1 with num_iterations=2"):
        SVFConfig(str(tmp_path), max_staleness=1, num_iterations=2, clip=0.2)
    with pytest.raises(InputError, match="cannot draw while it changes"):
        make(tmp_path, rollout="transformers", max_staleness=1).train()
