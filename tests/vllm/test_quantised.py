"""Delta form on quantised bases that vLLM's CPU kernels run (compressed-tensors): int8 weights a channel with int8
activations a token, in fp32, and int4 weights in groups, for which they want bf16. The experts' path sees the
activations as they are.
"""

import copy
import shutil

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import t2kernels as t2
from t2kernels import tiny
from t2kernels.integrations.vllm import engine_args
from t2kernels.layers.scale import make_scale
from tests.vllm.worlds import PROMPTS, answers_of, ask, checkpoint_with, engine

SCHEME = {"num_bits": 8, "type": "int", "symmetric": True}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**SCHEME, "strategy": "channel", "dynamic": False},
            "input_activations": {**SCHEME, "strategy": "token", "dynamic": True},
        }
    },
}


def rounded(W):
    """int8 [M, N] and steps [M, 1] of a weight."""
    step = W.abs().amax(1, keepdim=True) / 127
    return (W / step).round().to(torch.int8), step


class Reference(nn.Module):
    """y = dequantised(W) dequantised(x) + U diag(sigma (z - 1)) Vᵀ x, with x rounded a token.

    noise: relative, on x before it is rounded: what another order of summing in fp32 may do
    """

    noise = 0.0

    def __init__(self, W, factor, z):
        super().__init__()
        W8, step = rounded(W)
        self.W = W8.float() * step
        scale = make_scale(z, factor.sigma, "delta")
        self.dW = (factor.U * scale) @ factor.V.t()

    def forward(self, x):
        near = x * (1 + Reference.noise * torch.randn_like(x))
        step = near.abs().amax(-1, keepdim=True) / 127
        return ((near / step).round() * step) @ self.W.t() + x @ self.dW.t()


def rounded_otherwise(model, ids):
    """The next token's logits of a bf16 model whose embeddings are off by what bf16 rounds away: every rounding after
    that falls otherwise.
    """
    x = model.get_input_embeddings()(ids).float()
    return model(inputs_embeds=(x * (1 + 2**-9 * torch.randn_like(x))).to(model.dtype)).logits[0, -1].float()


def is_a_tie(model, ids, token) -> bool:
    """Whether `token` could as well have been the greedy next one: its logit is below the largest by no more than
    rounding noise moves logits.
    """

    def logits(noise):
        Reference.noise = noise
        try:
            with torch.no_grad():
                return model(torch.tensor([ids])).logits[0, -1]
        finally:
            Reference.noise = 0.0

    exact = logits(0)
    moved = max((logits(1e-6) - exact).abs().max().item() for _ in range(8))
    return (exact.max() - exact[token]).item() <= 2 * moved


def checkpoint_of(world, out, tensors_of, config):
    """The checkpoint with its linear layers' tensors replaced. tensors_of: {ending: tensor} of a weight"""
    for f in world.model.iterdir():
        shutil.copy(f, out)
    tensors = {}
    for name, t in load_file(out / "model.safetensors").items():
        whole = not name.endswith("_proj.weight")
        tensors |= (
            {name: t}
            if whole
            else {name.removesuffix("weight") + ending: new for ending, new in tensors_of(t.float()).items()}
        )
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    checkpoint_with(out, quantization_config=config)
    return out


def test_every_prompt_with_every_expert_on_int8_weights(world, tmp_path):
    checkpoint = checkpoint_of(
        world, tmp_path, lambda W: dict(zip(("weight", "weight_scale"), rounded(W), strict=True)), CONFIG
    )
    factors, models, wanted = t2.Factors.load(world.factors), {}, {}
    for e in (0, 1, 2, 3):
        model, tokenizer = tiny.load()
        models[e] = model
        z = t2.Expert.load(world.experts[e]).z if e else {n: torch.ones(f) for n, f in factors.ranks.items()}
        for name in factors:
            parent, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(parent),
                leaf,
                Reference(model.get_submodule(name).weight.detach(), factors[name], z[name]),
            )
        for p, answer in zip(PROMPTS, answers_of(model, tokenizer), strict=True):
            wanted[p, e] = answer
    unrounded = [pair for pair, answer in wanted.items() if answer == world.answers[pair[1], pair[0]]]
    assert len(unrounded) < len(wanted), "rounding changes nothing here: that would not show which base was served"
    with engine(checkpoint, **engine_args(factors=world.factors, rows=3)) as llm:
        outputs = ask(llm, world, list(wanted))
    same = 0
    for ((prompt, e), answer), out in zip(wanted.items(), outputs, strict=True):
        got = list(out.outputs[0].token_ids)
        at = next((i for i, (a, b) in enumerate(zip(got, answer, strict=True)) if a != b), None)
        same += at is None
        # An activation on the edge between two of 255 steps may fall to either side; from there on the answers are of
        # two models.
        assert at is None or is_a_tie(models[e], tokenizer(prompt)["input_ids"] + got[:at], got[at]), (prompt, e, at)
    assert same >= len(wanted) * 3 // 4


GROUP = 32
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**SCHEME, "num_bits": 4, "strategy": "group", "group_size": GROUP, "dynamic": False},
        }
    },
}


def int4(W):
    """Whole numbers from -8 to 7 [M, N], and steps [M, N/32] in bf16."""
    groups = W.unflatten(1, (-1, GROUP))
    step = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    return (groups / step).round().clamp(-8, 7).flatten(1), step[..., 0].bfloat16()


def packed(W):
    """As compressed-tensors keeps them: eight numbers in an int32."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    whole, step = int4(W)
    return {
        "weight_packed": pack_to_int32(whole.to(torch.int8), 4),
        "weight_scale": step,
        "weight_shape": torch.tensor(W.shape),
    }


def test_every_prompt_with_every_expert_on_int4_weights(world, tmp_path):
    """Answers in bf16: where one differs from the fp32 reference's, the two tokens must lie closer than bf16 moves the
    reference's logits.
    """
    checkpoint = checkpoint_of(world, tmp_path, packed, INT4)
    factors, models = t2.Factors.load(world.factors), {}
    for e in (0, 1, 2, 3):
        models[e], tokenizer = tiny.load()
        z = t2.Expert.load(world.experts[e]).z if e else {}
        with torch.no_grad():
            for name in factors:
                weight = models[e].get_submodule(name).weight
                whole, step = int4(weight)
                weight.copy_(whole * step.float().repeat_interleave(GROUP, 1))
                if e:
                    weight += (factors[name].U * make_scale(z[name], factors[name].sigma, "delta")) @ factors[
                        name
                    ].V.t()
    wanted = {
        (p, e): answer for e in models for p, answer in zip(PROMPTS, answers_of(models[e], tokenizer), strict=True)
    }
    unrounded = [pair for pair, answer in wanted.items() if answer == world.answers[pair[1], pair[0]]]
    assert len(unrounded) < len(wanted) // 2, "rounding changes little here: that would not show which base was served"
    arguments = engine_args(factors=world.factors, rows=3, dtype="bfloat16")
    with engine(checkpoint, **arguments) as llm:
        outputs = ask(llm, world, list(wanted))
    coarse = {e: copy.deepcopy(model).bfloat16() for e, model in models.items()}
    same = 0
    for ((prompt, e), answer), out in zip(wanted.items(), outputs, strict=True):
        got = list(out.outputs[0].token_ids)
        at = next((i for i, (a, b) in enumerate(zip(got, answer, strict=True)) if a != b), None)
        same += at is None
        if at is None:
            continue
        ids = torch.tensor([tokenizer(prompt)["input_ids"] + got[:at]])
        with torch.no_grad():
            exact = models[e](ids).logits[0, -1]
            moved = max((rounded_otherwise(coarse[e], ids) - exact).abs().max() for _ in range(8))
        assert exact.max() - exact[got[at]] <= 2 * moved, (prompt, e, at)
    assert same >= len(wanted) // 2
