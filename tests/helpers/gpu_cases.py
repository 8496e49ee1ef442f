"""Problems of Llama-3-8B's size for the tests on a GPU, and their answers in fp64."""

import torch

from tests.helpers.triton_cases import E, factor

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
TOKENS = (1, 5, 8, 13, 32, 33, 128, 300)
# (N, ranks, out sizes): factored q,k,v (with residual columns) and down, delta q,k,v and down, and sizes that no wide
# load fits
GROUPS = {
    "qkv": (4096, [4224, 1056, 1056], [4096, 1024, 1024]),
    "down": (14336, [4096], [4096]),
    "qkv delta": (4096, [256] * 3, [4096, 1024, 1024]),
    "down delta": (14336, [128], [4096]),
    "odd": (1027, [257, 65], [1031, 515]),
}
PAIRS = [(BF16, BF16), (BF16, INT8), (BF16, FP16), (FP16, FP16), (FP16, INT8), (FP16, BF16), (FP32, FP32), (FP32, INT8)]


def problem(T, group, x_dtype, w_dtype, base=True):
    N, ranks, outs = group
    C = sum(ranks)
    x, V, scale = (
        torch.randn(T, N, device="cuda").to(x_dtype),
        factor(C, N, w_dtype).t(),
        torch.randn(E, C, device="cuda"),
    )
    Us = [factor(M, R, w_dtype) for M, R in zip(outs, ranks, strict=True)]
    if w_dtype == INT8:
        scale /= V.float().norm(dim=0) * Us[0].float().norm(dim=0).mean()
    bases = [torch.randn(T, M, device="cuda").to(x_dtype) if base else None for M in outs]
    return x, V, Us, scale, bases, [None] * len(outs)


def exact(x, V, Us, scale, ids, bases, biases):
    g = (x.double() @ V.double()) * scale.double()[ids.long()]
    parts = g.split([U.shape[1] for U in Us], 1)
    return [g_i @ U.double().t() + (0 if b is None else b.double()) for g_i, U, b in zip(parts, Us, bases, strict=True)]


def captured(f):
    """A CUDA graph of f, after a run that compiles and lets libraries allocate, and what f returned while it was
    captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = f()
    return graph, found
