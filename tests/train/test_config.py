"""Settings that a trainer fills in from its task stay out of the user's settings."""

from dataclasses import replace

import t2kernels as t2
from t2kernels import tiny
from t2kernels.train import SVFConfig, SVFTrainer


def trainer(config, task):
    model, tokenizer = tiny.load()
    t2.patch_model(model, form="delta", rank=4)
    return SVFTrainer(model, config, task, experts="mine", processing_class=tokenizer)


def test_the_same_settings_serve_tasks_of_other_lengths(tmp_path):
    config = SVFConfig(str(tmp_path), use_cpu=True)
    math = t2.tasks.load("math")
    code = replace(t2.tasks.load("code"), max_new_tokens=math.max_new_tokens + 3)
    assert trainer(config, math).args.max_new_tokens == math.max_new_tokens
    assert trainer(config, code).args.max_new_tokens == code.max_new_tokens
    assert config.max_new_tokens is None


def test_a_length_that_is_given_stays(tmp_path):
    assert (
        trainer(SVFConfig(str(tmp_path), max_new_tokens=3, use_cpu=True), t2.tasks.load("math")).args.max_new_tokens
        == 3
    )
