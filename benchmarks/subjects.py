"""Models to measure on: the built-in one, and random Llamas of any size whose exact factors are known.

A random W is U diag(sigma) Vᵀ with orthonormal U and V and a spectrum that falls as a trained one does; time depends on
shapes, not on values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

import t2kernels as t2
from t2kernels import tasks, tiny
from t2kernels.factors.factor import Factor, resolve_rank
from t2kernels.factors.matrices import find_matrices
from t2kernels.factors.store import Factors
from t2kernels.ops.tuning.sizes import MODELS

SIZES = {
    # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "nano": (64, 192, 2, 4, 2, 256),  # for trying a benchmark out
    "mid": (1024, 2816, 8, 16, 4, 8192),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936),  # the shapes; without the biases of q, k and v
    "llama-3-8b": MODELS["llama-3-8b"],
    "llama-3-70b": MODELS["llama-3-70b"],
}
NAMES = ("tiny", *SIZES)


class Subject(NamedTuple):
    """A model, its factors (cut to what was asked for), and prompts [B, S] with their mask; tokenizer where there is
    one."""

    name: str
    model: nn.Module
    factors: Mapping[str, Factor]
    ids: Tensor
    mask: Tensor
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def device(self) -> torch.device:
        return self.ids.device


def load(
    name: str,
    batch: int,
    length: int = 16,
    rank: int | float | None = None,
    dtype=torch.float32,
    device: torch.device | str = "cpu",
) -> Subject:
    """A subject with `batch` prompts: of the built-in tasks (tiny), or of `length` random tokens. rank: of the factors
    that are kept."""
    torch.manual_seed(0)
    if name == "tiny":
        model, tokenizer = tiny.load()
        tokenizer.padding_side = "left"
        problems = [tasks.load(task).split("test", batch) for task in ("math", "code", "reason")]
        encoded = tokenizer([problems[i % 3][i]["prompt"] for i in range(batch)], padding=True, return_tensors="pt").to(
            device
        )
        model = model.to(device, dtype)
        return Subject(
            name, model, t2.decompose(model, rank=rank), encoded["input_ids"], encoded["attention_mask"], tokenizer
        )
    hidden, inner, layers, heads, kv, vocabulary = SIZES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        factors = _made(model, rank)
        ids = torch.randint(2, vocabulary, (batch, length))
    model.generation_config.eos_token_id = None  # every answer has the length asked for
    return Subject(name, model, factors, ids, torch.ones_like(ids))


def _made(model: nn.Module, rank: int | float | None) -> Factors:
    """Give every matrix W = U diag(sigma) Vᵀ, a shape's U and V made once, signs and order new for each matrix. Returns
    what is kept of them."""
    kept, bases, prints = {}, {}, {}
    for i, (name, m) in enumerate(find_matrices(model, "all").items()):
        M, N = m.shape
        R = m.rank
        if (M, N) not in bases:
            bases[M, N] = torch.linalg.qr(torch.randn(M, R))[0], torch.linalg.qr(torch.randn(N, R))[0]
        U, V = bases[M, N]
        U = (U * (torch.randint(2, (R,)) * 2.0 - 1)).roll(i, 1)
        sigma = 2.0 * torch.arange(1, R + 1).float().pow(-0.4) * (R / N) ** 0.5
        m.module.weight.data.copy_((U * sigma) @ V.t())
        k = resolve_rank(rank, R)
        kept[name] = Factor(
            U[:, :k].to(m.module.weight.dtype).contiguous(),
            sigma[:k].clone(),
            V[:, :k].t().to(m.module.weight.dtype).contiguous().t(),
        )
        prints[name] = {"fingerprint": hashlib.sha256(f"random {i}".encode()).hexdigest()}
    return Factors(kept, {"matrices": prints})


def patched(subject: Subject, form: str, rank: int | float | None = None, rows: int = 72, factors=None):
    """Patch the subject's model in place; returns its bank."""
    return t2.patch_model(
        subject.model, rank=rank, form=form, rows=rows, factors=subject.factors if factors is None else factors
    )


def add_experts(bank, count: int, strength: float = 0.5, seed: int = 0) -> list[str]:
    """`count` experts with random z, each rescaling every component that its layers let it. Returns their names."""
    g = torch.Generator().manual_seed(seed)
    names = [f"expert{i}" for i in range(count)]
    for name in names:
        z = {m: (1 + strength * torch.randn(k, generator=g)).clamp_min(0) for m, k in bank.matrices.items()}
        bank.add(name, bank.expert(z))
    return names


def materialise(model: nn.Module, factors: Mapping[str, Factor], expert: t2.Expert) -> None:
    """W' = W + U diag(sigma (z - 1)) Vᵀ, in fp32, into the weights of a dense model that holds W: what an expert is, by
    the equation."""
    with torch.no_grad():
        for name, z in expert.z.items():
            U, sigma, V = factors[name].cut(len(z))
            W = model.get_submodule(name).weight
            W.copy_(W.float() + (U.float() * (sigma * (z.to(sigma) - 1))) @ V.float().t())
