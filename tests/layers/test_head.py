"""The head of a frozen model on the CPU: no copy of its weights, no bit changed, nothing left behind."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import t2kernels as t2
from t2kernels.layers.dense.head import head_of
from t2kernels.rollout.generation import Sampler, completion_logits

PROMPTS = ["w17 w40000 w5", "w49999", "w300 w12 w31234 w8 w25000"]


class Products(TorchDispatchMode):
    """Notes the batched products whose second operand has the head's size once a row."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight.numel()
        self.copies = 0
        self.heads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        sizes = [a.numel() for a in args if isinstance(a, torch.Tensor)]
        if function is torch.ops.aten.bmm.default and sizes[1] > self.weight:
            self.copies += 1
        self.heads += function is torch.ops.aten.mm.default and sizes[1] == self.weight
        return function(*args, **(kwargs or {}))


def run(model, tokenizer, train: bool):
    sampler = Sampler(model, tokenizer, max_new_tokens=3)
    ids, mask = sampler.encode(PROMPTS, torch.device("cpu"))
    with Products(head_of(model).weight) as seen:
        rollout = sampler.draw(model, ids, mask, 0.0)
        with torch.set_grad_enabled(train):
            completion_logits(model, rollout)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch", [None, {"form": "delta", "rank": 4}, {"form": "factored", "rank": None}])
def test_the_head_is_never_copied(large_vocabulary, dtype, patch):
    model, tokenizer = copy.deepcopy(large_vocabulary[0]).to(dtype), large_vocabulary[1]
    if patch:
        t2.patch_model(model, **patch)
    for train in (False, True):
        seen = run(model, tokenizer, train)
        assert seen.heads > 1
        assert seen.copies == 0
    # The mode sees the copies where nobody prevents them.
    plain = copy.deepcopy(large_vocabulary[0]).to(dtype)
    with torch.no_grad(), Products(plain.lm_head.weight) as seen:
        plain(**tokenizer(PROMPTS, padding=True, return_tensors="pt"), logits_to_keep=2)
    assert seen.copies == 1


def test_a_patched_half_precision_model_gives_the_same_bits_in_forwards_of_the_user(large_vocabulary):
    dense, tokenizer = copy.deepcopy(large_vocabulary[0]).bfloat16(), large_vocabulary[1]
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    for keep in (1, 3):
        with torch.no_grad():
            wanted = dense(**inputs, logits_to_keep=keep).logits
            model = copy.deepcopy(dense)
            t2.patch_model(model, form="delta", rank=4)
            with Products(model.lm_head.weight) as seen:
                found = model(**inputs, logits_to_keep=keep).logits
        assert seen.copies == 0
        assert found.equal(wanted)


def test_unpatching_leaves_no_hook(large_vocabulary):
    model, tokenizer = copy.deepcopy(large_vocabulary[0]), large_vocabulary[1]
    run(model, tokenizer, False)
    assert not model.lm_head._forward_pre_hooks
    t2.patch_model(model, form="delta", rank=4)
    run(model, tokenizer, False)
    assert len(model.lm_head._forward_pre_hooks) == 1
    t2.unpatch_model(model)
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("form", ["delta", "factored"])
def test_a_head_that_is_patched_itself(large_vocabulary, form):
    model, tokenizer = copy.deepcopy(large_vocabulary[0]), large_vocabulary[1]
    bank = t2.patch_model(model, ["lm_head"], rank=4 if form == "delta" else None, form=form)
    bank.add("a", bank.expert({"lm_head": 1 + 0.5 * torch.randn(bank.matrices["lm_head"])}))
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = model(**inputs, experts="a").logits[:, -2:]
        torch.testing.assert_close(model(**inputs, experts="a", logits_to_keep=2).logits, whole, rtol=1e-4, atol=1e-4)
    t2.unpatch_model(model)
    assert not model.lm_head._forward_pre_hooks
