"""Warnings: of one text for all, of a KL that runs off, of an entropy that is gone; and none of a run that is well."""

import logging

import pytest

from t2kernels.train.steering.watch import PATIENCE, Watch


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.WARNING, logger="t2kernels")
    return lambda: [r.getMessage() for r in caplog.records]


def batches(watch, texts, right, count=PATIENCE, prompts=None):
    for _ in range(count):
        shares = watch.texts(["a"] * len(texts), prompts or list(range(len(texts))), texts, right)
    return shares


def test_one_text_for_nearly_all_is_told_once(told):
    watch = Watch(True)
    texts, right = ["positive"] * 31 + ["negative"], [i % 2 == 0 for i in range(32)]
    assert batches(watch, texts, right, PATIENCE - 1) == {"a": 31 / 32}
    assert told() == []
    batches(watch, texts, right, 10)
    (message,) = told()
    assert "31 of 32 completions of expert 'a' were 'positive'" in message
    assert "were one from the start" in message
    assert "learning_rate" in message
    assert "keep_best" in message


@pytest.mark.parametrize(
    ("texts", "right", "prompts"),
    [
        (["yes"] * 32, [True] * 32, None),  # it is the right answer
        (["yes"] * 32, [False] * 32, ["same"] * 32),  # samples of one prompt
        (["yes"] * 4, [False] * 4, None),  # too few
        (["yes"] * 20 + ["no"] * 12, [False] * 32, None),
    ],
)
def test_one_text_that_is_no_collapse(told, texts, right, prompts):
    batches(Watch(True), texts, right, 20, prompts)
    assert told() == []


def test_a_collapse_is_told_from_a_bad_start(told):
    watch = Watch(True)
    batches(watch, ["yes"] * 16 + ["no"] * 16, [False] * 32, 1)
    batches(watch, ["yes"] * 32, [False] * 32)
    assert "have collapsed into one" in told()[0]


def test_a_batch_between_starts_the_count_again(told):
    watch = Watch(True)
    for _ in range(4):
        batches(watch, ["yes"] * 32, [False] * 32, PATIENCE - 1)
        batches(watch, ["yes"] * 16 + ["no"] * 16, [False] * 32, 1)
    assert told() == []


def test_a_kl_that_runs_off(told):
    watch = Watch(True)
    for kl in (0, 0, 1.6, 2.0, 2.2, 2.7, 2.4, 2.5, 2.1, 1.9, 2.0):
        watch.levels("a", {"kl": kl})
    assert told() == []
    watch.levels("a", {"kl": 5.5})
    assert told() == []  # once may be chance
    watch.levels("a", {"kl": 5.9})
    (message,) = told()
    assert "5.9 nats" in message
    for kl in (9, 12, 20):
        watch.levels("a", {"kl": kl})
    assert len(told()) == 1


def test_an_entropy_that_is_gone_while_answers_are_wrong(told):
    watch = Watch(True)
    for entropy in [2.0] * PATIENCE + [0.01] * 10:
        watch.levels("right", {"entropy": entropy, "accuracy": 1.0})
    assert told() == []
    for entropy in [2.0] * PATIENCE + [0.01] * 10:
        watch.levels("wrong", {"entropy": entropy, "accuracy": 0.5})
    (message,) = told()
    assert "'wrong'" in message
    assert "50 % right" in message


def test_other_processes_say_nothing(told):
    batches(Watch(False), ["yes"] * 32, [False] * 32, 20)
    assert told() == []
