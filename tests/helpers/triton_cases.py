"""Problems for the Triton kernels, their answers in fp64 and what plain torch makes of them."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
E = 5
MIXES = ["one", "distinct", "uniform", "zipf", "skewed"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(x, w) for x in FLOATS for w in (x, torch.int8)] + [
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
]


def draw_ids(mix, n):
    weights = {
        "one": [0, 0, 1, 0, 0],
        "uniform": [1] * 5,
        "zipf": [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5],
        "skewed": [96, 1, 1, 1, 1],
    }
    if mix == "distinct":
        return (torch.arange(n) % E).to(DEVICE)
    return torch.multinomial(torch.tensor(weights[mix], dtype=torch.float), max(n, 1), replacement=True)[:n].to(
        DEVICE, torch.int32
    )


def among_nans(t, dtype):
    """t on the device with NaN before and after it: what is read there by mistake shows, even where it is multiplied by
    zero."""
    if dtype == torch.int8:
        return t.to(dtype).to(DEVICE)
    room = torch.full((t.numel() + 512,), torch.nan, dtype=dtype, device=DEVICE)
    room[256:-256] = t.reshape(-1)
    return room[256:-256].view(t.shape)


def factor(rows, columns, dtype):
    w = torch.randn(rows, columns) / columns**0.5
    if dtype == torch.int8:
        w = (w * (127 / w.abs().max())).round()
    return among_nans(w, dtype)


def problem(T, N, Rs, Ms, x_dtype, w_dtype, base=True, bias=True):
    C = sum(Rs)
    x = among_nans(torch.randn(T, N), x_dtype)
    V, Us = factor(C, N, w_dtype).t(), [factor(M, R, w_dtype) for M, R in zip(Ms, Rs, strict=True)]
    scale = among_nans(torch.randn(E, C), torch.float32)
    if w_dtype == torch.int8:
        scale /= V.float().abs().max() ** 2 * 4  # the column scales of int8 factors are part of scale
    bases = [among_nans(torch.randn(T, M), x_dtype) if base else None for M in Ms]
    biases = [among_nans(torch.randn(M), x_dtype) if bias else None for M in Ms]
    return x, V, Us, scale, bases, biases


def exact(x, V, Us, scale, ids, bases, biases):
    """Token by token in fp64 from the definition."""
    ys, column = [], 0
    for U, base, bias in zip(Us, bases, biases, strict=True):
        part = slice(column, column + U.shape[1])
        column = part.stop
        rows = [
            U.double() @ ((V[:, part].double().t() @ x[t].double()) * scale[e, part].double())
            for t, e in enumerate(ids.tolist())
        ]
        y = torch.stack(rows) if rows else x.new_zeros(0, U.shape[0], dtype=torch.float64)
        ys.append(y + (0 if base is None else base.double()) + (0 if bias is None else bias.double()))
    return ys


def eager(x, V, Us, scale, ids, bases, biases):
    """What plain torch does in x's dtype, factors converted to it: the yardstick."""
    g = (
        (x @ V.to(x.dtype)) * scale[ids.long()]
        if V.dtype == torch.int8
        else (x @ V.to(x.dtype)) * scale[ids.long()].to(x.dtype)
    )
    ys = []
    for g_i, U, base, bias in zip(g.to(x.dtype).split([U.shape[1] for U in Us], 1), Us, bases, biases, strict=True):
        y = g_i @ U.to(x.dtype).t()
        y = y if base is None else y + base
        ys.append(y if bias is None else y + bias)
    return ys


def check(got, plain, want, x_dtype):
    for y, eager_y, exact_y in zip(got, plain, want, strict=True):
        assert y.dtype == x_dtype
        assert y.shape == exact_y.shape
        # fp32 sums differ in order alone, so neither is the more exact: 2. In 16 bits the kernel rounds less often than
        # eager does.
        room = 2 if x_dtype == torch.float32 else 1.1
        error, allowed = (y.double() - exact_y).norm(), room * (eager_y.double() - exact_y).norm()
        assert error <= allowed, f"error {error:.3e}, eager's {allowed / room:.3e}"


def gradients(dys, x, V, Us, scale, ids, dtype):
    """dx and dscale of the definition, by autograd in a dtype: fp64 is the truth, x's dtype is what eager torch
    does."""
    x, scale = (
        x.detach().to(dtype).requires_grad_(),
        scale.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_(),
    )
    g = (x @ V.to(dtype)) * scale[ids.long()].to(dtype)
    ys = [g_i @ U.to(dtype).t() for g_i, U in zip(g.split([U.shape[1] for U in Us], 1), Us, strict=True)]
    return torch.autograd.grad(ys, [x, scale], [dy.to(dtype) for dy in dys])
