"""Settings that are filled in from the model: the learning rate and the longest completion."""

import math

import pytest

import t2kernels as t2
from t2kernels import tiny
from t2kernels.train import SVFConfig, SVFTrainer
from t2kernels.train.config import default_learning_rate
from t2kernels.train.reinforce import ReinforceTrainer


def trainer(config, targets="all"):
    model, tokenizer = tiny.load()
    bank = t2.patch_model(model, targets=targets, form="delta", rank=4)
    task = t2.tasks.load("math")
    shared = {
        "experts": "mine",
        "processing_class": tokenizer,
        "reward": lambda completions, **_: [1.0] * len(completions),
    }
    return SVFTrainer(model, config, task, **shared), bank


def test_the_rate_falls_with_the_root_of_the_number_of_matrices():
    assert default_learning_rate(28) == pytest.approx(0.02)
    assert default_learning_rate(4 * 28) == pytest.approx(0.01)
    assert default_learning_rate(7) == pytest.approx(0.04)
    with pytest.raises(ValueError, match="changes at least 1"):
        default_learning_rate(0)


def test_a_trainer_takes_the_rate_of_its_own_model(tmp_path):
    config = SVFConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, max_new_tokens=3, use_cpu=True,
        lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=0,
    )  # fmt: skip
    whole, bank = trainer(config)
    assert len(bank.matrices) == 28
    assert whole.args.learning_rate == 0.02
    part, bank = trainer(config, targets=["q_proj", "v_proj"])
    assert part.args.learning_rate == pytest.approx(0.02 * math.sqrt(28 / len(bank.matrices)))
    assert part.args.learning_rate > 0.03
    assert config.learning_rate is None  # the settings are not written to
    part.train()
    assert part.experts["mine"].manifest["learning_rate"] == part.args.learning_rate
    moved = max((z - 1).abs().max().item() for z in part.experts["mine"].z.values())
    assert 0.5 * part.args.learning_rate < moved < 1.5 * part.args.learning_rate


@pytest.mark.parametrize("rate", [0.0, 0.003])
def test_a_rate_that_is_given_stays(tmp_path, rate):
    config = SVFConfig(str(tmp_path), learning_rate=rate, max_new_tokens=3, use_cpu=True)
    assert trainer(config)[0].args.learning_rate == rate
    assert SVFConfig.paper(str(tmp_path)).learning_rate == 2e-3
    assert SVFConfig.choices(str(tmp_path)).learning_rate == 0.01


def test_the_longest_completion_is_the_tasks(tmp_path):
    config = SVFConfig(str(tmp_path), use_cpu=True)
    made, _ = trainer(config)
    assert made.args.max_new_tokens == t2.tasks.load("math").max_new_tokens
    assert config.max_new_tokens is None


def test_other_adapters_need_a_rate(tmp_path):
    model, tokenizer = tiny.load()
    with pytest.raises(ValueError, match="learning_rate is None: set it"):
        ReinforceTrainer(model, SVFConfig(str(tmp_path), use_cpu=True), None, None, {}, tokenizer)
