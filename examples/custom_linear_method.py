"""Experts in your own serving engine, if it has a class for each format of a linear layer (a "linear method").

    y = method.apply(layer, x)  +  ((x V) * scale[expert_ids]) Uᵀ

SGLang and vLLM are such engines. The engine's own method computes x Wᵀ, in whatever format W has (bf16, fp8, AWQ), and
one op adds the experts' change: the delta form. The engine must supply `expert_ids`, the row of each token of the
running batch, in a buffer that never moves.

    python examples/custom_linear_method.py
"""

import torch

import t2kernels.ops  # noqa: F401 (registers torch.ops.t2kernels.svf_linear)
from t2kernels.factors import svd

ROWS = 8  # of the table: row 0 is the base model, so 7 experts are loaded at once
TOKENS = 64  # of a step, at most


class Batch:
    """The scheduler fills `expert_ids` before each step. CUDA graphs read it from the same address every time."""

    expert_ids = torch.zeros(TOKENS, dtype=torch.int32)


class PlainMethod:
    """A stand-in for the engine's own linear method."""

    def apply(self, layer, x, bias=None):
        """x Wᵀ + bias."""
        return torch.nn.functional.linear(x, layer.weight, bias)


class SVFMethod:
    """Wraps the method of a layer. base: that method; rank: leading components that an expert may rescale."""

    def __init__(self, base, rank):
        self.base, self.rank = base, rank

    def process_weights_after_loading(self, layer):
        """Call once, after the checkpoint is loaded. A real engine reads factors that `t2 decompose` wrote."""
        factor = svd(layer.weight.data.float(), self.rank)
        layer.Vt = factor.V.T.contiguous().to(layer.weight.dtype)  # [R, N]
        layer.U = factor.U.contiguous().to(layer.weight.dtype)  # [M, R]
        layer.sigma = factor.sigma.float()
        layer.scale = torch.zeros(ROWS, self.rank)  # row 0 stays 0: the base model

    def load_expert(self, layer, row, z):
        """Write an expert's row in place, so that CUDA graphs stay valid. z: [k <= R], 1 where nothing changes."""
        layer.scale[row].zero_()
        layer.scale[row, : len(z)] = layer.sigma[: len(z)] * (z - 1)

    def apply(self, layer, x, bias=None):
        """The layer's output [T, M]. x: [T, N], the tokens of all requests of the step, packed."""
        base = self.base.apply(layer, x)
        expert_ids = Batch.expert_ids[: x.shape[0]]
        return torch.ops.t2kernels.svf_linear(x, layer.Vt.T, layer.U, layer.scale, expert_ids, base, bias, "auto")


class Linear(torch.nn.Module):
    """The engine's linear layer: it holds the weight, its method computes."""

    def __init__(self, n, m, method):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(m, n) / n**0.5, requires_grad=False)
        self.method = method

    def forward(self, x):
        return self.method.apply(self, x)


def main() -> float:
    """Run a two-layer model with three experts in one batch. Returns the largest error against dense weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(Linear(48, 96, PlainMethod()), torch.nn.SiLU(), Linear(96, 40, PlainMethod()))
    layers = [layer for layer in model if isinstance(layer, Linear)]
    for layer in layers:
        layer.method = SVFMethod(layer.method, rank=16)
        layer.method.process_weights_after_loading(layer)
    experts = {row: [1 + 0.3 * torch.randn(16) for _ in layers] for row in (1, 2, 3)}
    for row, zs in experts.items():
        for layer, z in zip(layers, zs, strict=True):
            layer.method.load_expert(layer, row, z)

    x = torch.randn(20, 48)
    Batch.expert_ids[:20] = torch.arange(20) % 4  # four requests of five tokens each; one uses the base model
    y = model(x)

    worst = 0.0
    for row in range(4):
        h = x[row::4].double()
        for i, layer in enumerate(layers):
            W = layer.weight.double()
            if row:
                W = W + (layer.U.double() * (layer.sigma.double() * (experts[row][i].double() - 1))) @ layer.Vt.double()
            h = h @ W.T
            h = torch.nn.functional.silu(h) if i == 0 else h
        worst = max(worst, float((y[row::4] - h).abs().max()))
    return worst


if __name__ == "__main__":
    print(f"4 requests, 3 experts: largest error {main():.1e}")
