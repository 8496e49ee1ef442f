"""Eval mode of a model that several threads use: none of them leaves it before the last one is done."""

import threading

import torch
from torch import nn

from t2kernels.rollout.modes import eval_mode


def test_modes_are_restored_by_the_last_thread():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    model.train()
    model[1].eval()
    entered, leave, seen = threading.Barrier(2, timeout=30), threading.Event(), []

    def other():
        with eval_mode(model):
            entered.wait()
            assert leave.wait(30)
            seen.extend(module.training for module in model.modules())

    thread = threading.Thread(target=other)
    with eval_mode(model):
        thread.start()
        entered.wait()
    assert not model[0].training  # this thread is done, the other is not
    leave.set()
    thread.join(30)
    assert seen == [False, False, False]
    assert [module.training for module in model.modules()] == [True, True, False]


def test_nested_blocks_and_errors_restore_too():
    model = nn.Sequential(nn.Dropout())
    model.train()
    with eval_mode(model):
        try:
            with eval_mode(model):
                raise KeyError("x")
        except KeyError:
            pass
        assert not model.training
        assert torch.equal(model(torch.ones(100)), torch.ones(100))
    assert model.training
    assert model[0].training
