"""A base layer whose gradient is missing or wrong is found out before anything is trained on it."""

import contextlib

import pytest
import torch
from torch import nn

import t2kernels as t2
from t2kernels.experts.trainables import GradientError
from t2kernels.layers.dense.probe import unsupported_gradient
from tests.helpers.families import build


def asked(module, dtype=torch.float32):
    return unsupported_gradient(module, 96, dtype, torch.device("cpu"))


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, kind):
        ctx.save_for_backward(W)
        ctx.kind = kind
        return x @ W.t()

    @staticmethod
    def backward(ctx, dy):
        (W,) = ctx.saved_tensors
        right = dy @ W
        wrong = {
            "right": right,
            "zero": torch.zeros_like(right),
            "noise": torch.randn_like(right),
            "nan": right * float("nan"),
            "none": None,
            "sign": -right,
            "shifted": right.roll(1, -1),
            "half": right / 2,
            "threefold": right * 3,
        }
        return wrong[ctx.kind], None, None


class Layer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(64, 96), requires_grad=False)

    def forward(self, x):
        return Wrong.apply(x, self.weight, self.kind)


@pytest.mark.parametrize("kind", ["zero", "noise", "nan", "none", "sign", "shifted", "half", "threefold"])
def test_a_wrong_gradient_is_named(kind):
    assert "gradient" in asked(Layer(kind))


def test_a_right_gradient_passes():
    assert asked(Layer("right")) is None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert asked(nn.Linear(96, 64).to(dtype), dtype) is None


def of_a_batch(hook):
    """This hook refuses inputs that are not [B, S, N]."""

    def wrapped(module, args, *rest):
        return hook(module, args, *rest) if args[0].dim() == 3 else 1 / 0

    return wrapped


@pytest.mark.parametrize(
    "add, right",
    [
        (lambda layer: layer.register_forward_hook(lambda module, args, out: out.detach()), False),
        (lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0].detach(),)), False),
        (lambda layer: layer.register_forward_hook(lambda module, args, out: None), True),
        (lambda layer: layer.register_forward_hook(of_a_batch(lambda module, args, out: None)), True),
    ],
)
def test_hooks_of_a_base_layer_are_asked_too(add, right):
    model = build("llama")
    add(model.model.layers[1].mlp.up_proj)
    bank = t2.patch_model(model, form="delta", rank=8)
    with contextlib.nullcontext() if right else pytest.raises(GradientError, match="up_proj"):
        bank.start_training("t")


def test_no_gradient_at_all_is_named():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    class Fails(nn.Linear):
        def forward(self, x):
            with torch.inference_mode():
                return super().forward(x)

    assert "no gradient" in asked(Detached(96, 64))
    assert asked(Fails(96, 64)) is not None


@pytest.mark.parametrize("kind, right", [("weight", True), ("dynamic", False), ("4 bit weights", False)])
def test_torchao(kind, right):
    q = pytest.importorskip("torchao.quantization")
    config = {
        "weight": lambda: q.Int8WeightOnlyConfig(),
        "dynamic": lambda: q.Int8DynamicActivationInt8WeightConfig(),
        "4 bit weights": lambda: q.Int8DynamicActivationIntxWeightConfig(),
    }[kind]()
    holder = nn.Sequential(nn.Linear(96, 64, bias=False)).to(torch.bfloat16)
    q.quantize_(holder, config)
    assert (asked(holder[0], torch.bfloat16) is None) == right


def test_bitsandbytes_nf4_on_a_cpu():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(128, 128, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16).to("cpu")
    assert unsupported_gradient(layer, 128, torch.bfloat16, torch.device("cpu")) is not None


def test_the_generator_is_left_alone():
    layer = nn.Linear(96, 64)
    state = torch.get_rng_state()
    asked(layer)
    assert layer.training
    assert torch.equal(state, torch.get_rng_state())
