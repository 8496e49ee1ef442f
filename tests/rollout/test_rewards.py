"""Rewards in TRL's whole form: None, async functions, token ids, the trainer's state, and what they log."""

import asyncio
import functools
import math

import pytest
import torch

import t2kernels as t2
from t2kernels import InputError
from t2kernels.rollout.rewards import RewardContext, Scorer, advantages
from t2kernels.train import SVFConfig, SVFTrainer

ROWS = [{"prompt": f"{i}+{i}", "answer": str(2 * i)} for i in range(4)]
TEXTS = ["0", "2", "4", "6"]
CONTEXT = RewardContext([[1]] * 4)


def values(*numbers):
    return lambda **columns: list(numbers)


def test_none_is_left_out_of_the_sum_with_its_weight():
    scorer = Scorer.of([values(1, None, 3, None), values(10, 20, None, None)], [2.0, 0.5])
    found = scorer(ROWS, TEXTS, CONTEXT)
    assert found[:3].tolist() == [2 + 5, 10, 6]
    assert math.isnan(found[3])
    with pytest.raises(InputError, match="no reward applies to completion 3 of 4"):
        scorer(ROWS, TEXTS)
    with pytest.raises(InputError, match="returned nan for completion 1 of 4; wanted finite numbers, or None"):
        Scorer.of(values(1, math.nan, 1, 1))(ROWS, TEXTS, CONTEXT)
    with pytest.raises(InputError, match="3 values for 4 completions"):
        Scorer.of(values(1, None, 1))(ROWS, TEXTS, CONTEXT)


def test_completions_without_a_reward_are_in_no_mean():
    nan = math.nan
    r = torch.tensor([1.0, nan, 4.0, 2.0, nan, nan, nan, 5.0])
    there = ~r.isnan()
    for kind in ("group", "grpo", "leave_one_out"):
        got = advantages(r, ["a"] * 8, 4, kind)
        assert got[~there].tolist() == [0] * 4
        alone = torch.tensor([1.0, 4.0, 2.0])
        torch.testing.assert_close(got[[0, 2, 3]], advantages(alone, ["a"] * 3, 3, kind))
        assert got[7] == 0  # nothing to compare it with
    got = advantages(r, ["a", "b"] * 4, 1, "batch")
    torch.testing.assert_close(got[[0, 2]], torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(got[[3, 7]], torch.tensor([-1.0, 1.0]))
    assert got[~there].tolist() == [0] * 4
    assert advantages(r, ["a"] * 8, 1, "none").tolist() == [1, 0, 4, 2, 0, 0, 0, 5]
    assert advantages(torch.full((2,), nan), ["a"] * 2, 2, "grpo").tolist() == [0, 0]


def test_advantages_are_those_of_trl():
    """sum_then_normalize with scale_rewards="group" in trl/trainer/grpo_trainer.py, written out for one group."""
    r = torch.tensor([0.5, math.nan, 2.0, 3.5], dtype=torch.float64)
    there = [0.5, 2.0, 3.5]
    mean = sum(there) / 3
    std = (sum((x - mean) ** 2 for x in there) / 2) ** 0.5
    wanted = [0.0 if math.isnan(x) else (x - mean) / (std + 1e-4) for x in r.tolist()]
    assert advantages(r, ["a"] * 4, 4, "grpo").tolist() == pytest.approx(wanted)


def test_async_rewards_run_at_the_same_time():
    both, order = None, []

    def make(name, result):
        async def reward(completions, **columns):
            nonlocal both
            both = both or asyncio.Barrier(2)
            order.append(name)
            await both.wait()  # one that waited for the other to end would wait for ever
            return result

        return reward

    class Judge:
        async def __call__(self, prompts, completions, **columns):
            return [1.0, None, 1.0, 1.0]

    scorer = Scorer.of([make("a", [1, 2, 3, 4]), lambda **c: order.append("sync") or [0] * 4, make("b", [10] * 4)])
    assert scorer(ROWS, TEXTS).tolist() == [11, 12, 13, 14]
    assert order == ["sync", "a", "b"]

    async def inside():  # as in a notebook, whose thread has a loop that runs
        return Scorer.of([Judge(), functools.partial(make("c", [0] * 4)), make("d", [0] * 4)])(ROWS, TEXTS, CONTEXT)

    both = None
    found = asyncio.run(inside())
    assert found[[0, 2, 3]].tolist() == [1, 1, 1]
    assert math.isnan(found[1]) is False  # the others apply

    async def broken(**columns):
        raise ValueError("the judge is away")

    with pytest.raises(ValueError, match="the judge is away"):
        Scorer.of(broken)(ROWS, TEXTS)


def test_a_reward_gets_what_it_names():
    seen = {}

    def named(prompts, completions, completion_ids):
        seen["named"] = completion_ids
        return [0.0] * 4

    def every(prompts, completions, **columns):
        seen["every"] = columns
        return [0.0] * 4

    def plain(prompts, completions, answer):
        return [0.0] * 4

    rows = [{"prompt": r["prompt"]} for r in ROWS]
    Scorer.of([named, every])(rows, TEXTS, RewardContext([[i] for i in range(4)], "state"))
    assert seen["named"] == [[0], [1], [2], [3]]
    assert set(seen["every"]) == {"completion_ids", "trainer_state", "log_metric", "log_extra"}
    assert Scorer.of(plain)(ROWS, TEXTS, CONTEXT).tolist() == [0] * 4
    assert Scorer.of(every)(ROWS, TEXTS).tolist() == [0] * 4
    assert set(seen["every"]) == {"answer"}  # as before, where nobody gives more


def trained(tmp_path, reward, **settings):
    model, tokenizer = t2.tiny.load()
    t2.patch_model(model, form="delta", rank=4)
    task = t2.tasks.load("math")
    config = SVFConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, max_new_tokens=8, report_to="none",
        use_cpu=True, **settings,
    )  # fmt: skip
    tr = SVFTrainer(
        model, config, task.split("train", 8), task.split("validation", 6), reward=reward, experts="mine",
        processing_class=tokenizer,
    )  # fmt: skip
    tr.train()
    return tr, tokenizer


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_the_trainer_gives_and_takes_all_of_it(tmp_path, kl):
    calls = []

    async def reward(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **columns):
        calls.append((trainer_state.global_step, list(completions), completion_ids))
        log_metric("share", len(calls) / 8)
        log_extra("guess", [text[-1:] for text in completions])
        return [None if i == 0 else float(i) for i in range(len(prompts))]

    tr, tokenizer = trained(tmp_path, reward, kl_coef=kl, reward_range=None, num_generations=1)
    probes, steps = calls[:2], calls[2:]
    assert [ids for _, _, ids in probes] == [[[], []]] * 2
    assert [step for step, _, _ in steps] == [0, 1]
    for _, texts, ids in steps:
        assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    logs = [entry for entry in tr.state.log_history if "loss" in entry]
    assert [entry["share"] for entry in logs] == [3 / 8, 4 / 8]  # the tries before are not logged
    assert [entry["reward"] for entry in logs] == [2, 2]  # of 1, 2 and 3
    assert [entry["accuracy"] for entry in logs] == [1, 1]
    assert tr.measures.extra["guess"] == [text[-1:] for text in steps[-1][1]]
    assert all(math.isfinite(entry["loss"]) for entry in logs)
    tr.measures.metric("share", 5.0)
    metrics = tr.evaluate()
    assert metrics["eval_share"] == 5 / 8
    assert metrics["eval_reward"] == 3  # of 1 to 5
    assert tr.measures.since_log["share"] == [5.0]


def test_a_completion_without_a_reward_teaches_nothing(tmp_path):
    def some(prompts, completions, **columns):
        return [float(len(c) % 3) if i % 2 else None for i, c in enumerate(completions)]

    def none(prompts, completions, **columns):
        return [None] * len(prompts)

    tr, _ = trained(tmp_path, some, kl_coef=0.0, reward_range=None)
    assert all(torch.isfinite(z).all() for z in tr.experts["mine"].z.values())
    tr, _ = trained(tmp_path, none, kl_coef=0.0)
    assert all((z == 1).all() for z in tr.experts["mine"].z.values())
    assert math.isnan(tr.evaluate()["eval_reward"])


def test_options_need_a_number_each(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("text,label,split\n" + "".join(f"text {i},{'ab'[i % 2]},train\n" for i in range(8)))
    model, tokenizer = t2.tiny.load()
    t2.patch_model(model, form="delta", rank=4)
    task = t2.tasks.classification(path)
    tr = SVFTrainer(
        model, SVFConfig.choices(str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True), task,
        reward=lambda completions, **c: [None] * len(completions), experts="mine", processing_class=tokenizer,
    )  # fmt: skip
    with pytest.raises(InputError, match="no reward applies to an option"):
        tr.train()


def test_a_column_that_the_first_row_lacks_reaches_the_reward():
    """Which row of a batch comes first is chance: the reward would depend on the order of the data."""
    rows = [{"prompt": "a"}, {"prompt": "b", "weight": 3.0}]

    def heavy(prompts, completions, weight=None, **columns):
        return [0.0] * len(prompts) if weight is None else [w or 1.0 for w in weight]

    assert Scorer.of(heavy)(rows, ["", ""]).tolist() == [1.0, 3.0]
    assert Scorer.of(heavy)(rows[::-1], ["", ""]).tolist() == [3.0, 1.0]


@pytest.mark.parametrize("values", [[1e300, 0.0], [10**60, 0], [10**400, 0], {1.0, 0.5}, {1.0: 0, 0.5: 0}, "10"])
def test_rewards_that_would_become_other_numbers_are_refused(values):
    """1e300 is finite and infinite in fp32; a set has no order."""
    with pytest.raises(InputError, match=r"wanted finite numbers|wanted one number for each|not a number"):
        Scorer.of(lambda **columns: values)([{"prompt": "a"}, {"prompt": "b"}], ["", ""])


@pytest.mark.parametrize("weight", [math.nan, math.inf, 1e38])
def test_a_weight_that_makes_the_sum_infinite_is_refused(weight):
    """A sum of NaN counts as a completion without a reward, which teaches nothing."""
    with pytest.raises(InputError, match=r"wanted finite numbers|does not fit fp32"):
        Scorer.of(lambda **columns: [100.0], [weight])([{"prompt": "a"}], [""])
