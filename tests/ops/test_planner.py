"""Choices on a table of cases: sizes, formats and devices in, implementation and path out. Nothing runs here."""

import pytest
import torch

from t2kernels.ops.device import Device
from t2kernels.ops.dispatch import IMPLEMENTATIONS, choose
from t2kernels.ops.planner import Call, bytes_moved, cheaper_form, could_be_dense, operations

NO_CUDA = ("cuda", "not built")
CPU = Device("cpu", "CPU", (("cpp", "not built"), ("triton", "needs a GPU"), NO_CUDA))
CPP = Device("cpu", "a CPU with AVX-512", (("triton", "needs a GPU"), NO_CUDA), isa="avx512")
FP32 = {"x": torch.float32, "factors": torch.float32}
CHECKED = Device("cuda", "a checked GPU", (NO_CUDA,))
UNCHECKED = Device("cuda", "another GPU", (NO_CUDA,), (("triton", "not checked on this GPU"),))
CUDA = Device("cuda", "a GPU with everything")
BF16 = "bfloat16 bfloat16"  # x and factors, as a table of `t2 tune` names them
HIDDEN, MLP, KV = 4096, 14336, 1024  # Llama-3-8B


def call(T, M=HIDDEN, N=HIDDEN, C=None, **more):
    return Call(T, N, (M,), (min(M, N) if C is None else C,), **more)


@pytest.mark.parametrize(
    "asked, machine, impl, path",
    [
        (call(1), CPU, "torch", "mm"),
        (call(1), UNCHECKED, "torch", "mm"),
        (call(1), CHECKED, "triton", "pair"),
        (call(1), CUDA, "cuda", "decode"),
        (call(16), CUDA, "cuda", "decode"),
        (call(17), CUDA, "triton", "pair"),
        (call(8, factors=torch.int8), CUDA, "cuda", "decode"),
        (call(9, factors=torch.int8), CUDA, "triton", "pair"),
        (call(32), CUDA._replace(decode_tokens=(32, 8)), "cuda", "decode"),
        (call(4000), CUDA, "triton", "mm"),
        (call(0), CUDA, "triton", "pair"),
        (call(1, grad=True), CUDA, "triton", "mm"),
        (call(1, layout=(("cuda", "U lies badly"),)), CUDA, "triton", "pair"),
        (call(1, x=torch.float32, factors=torch.float32), CUDA, "triton", "pair"),
        (call(1, x=torch.float16), CUDA, "triton", "pair"),  # bf16 factors of an fp16 model
        (call(1, C=252), CUDA, "triton", "pair"),
        (call(1, C=264), CUDA, "cuda", "decode"),
        (call(1, C=264, factors=torch.int8), CUDA, "triton", "pair"),
        (call(1, N=HIDDEN + 4), CUDA, "triton", "pair"),
        (Call(8, HIDDEN, (8,) * 9, (8,) * 9), CUDA, "triton", "mm"),
        (call(1, C=256, base=True), CUDA, "cuda", "decode"),
        (call(6000, one=True), CUDA, "triton", "dense"),
        (call(64), CHECKED, "triton", "pair"),
        (call(4000), CHECKED, "triton", "mm"),
        (call(1, C=256, base=True), CHECKED, "triton", "pair"),
        (call(4000, C=256, base=True), CHECKED, "triton", "mm"),
        (call(8, grad=True), CHECKED, "triton", "mm"),  # a backward wants x V
        # W' for one expert pays from max(M, N) tokens on, with a margin
        (call(4096, one=True), CPU, "torch", "mm"),
        (call(6000, one=True), CPU, "torch", "dense"),
        (call(6000, one=True), CHECKED, "triton", "dense"),
        (call(6000, one=False), CPU, "torch", "mm"),
        (call(6000, one=True, grad=True), CPU, "torch", "mm"),
        (call(6000, one=True, C=256, base=True), CPU, "torch", "mm"),
        (call(6000, M=MLP, one=True), CPU, "torch", "mm"),
        (call(25000, M=MLP, one=True), CPU, "torch", "dense"),
        (call(0, one=True), CPU, "torch", "mm"),
        (call(0), CHECKED, "triton", "pair"),
        (Call(8, HIDDEN, (8,) * 5, (8,) * 5), CHECKED, "triton", "mm"),
        (call(8, x=torch.float64), CUDA, "torch", "mm"),
        # the C++ kernels, where they were measured to be faster
        (call(1), CPP, "cpp", "stream"),
        (call(4, C=256, base=True), CPP, "cpp", "stream"),
        (call(8, factors=torch.int8), CPP, "cpp", "stream"),
        (call(64, x=torch.float32, factors=torch.int8), CPP, "cpp", "stream"),
        (call(1, grad=True), CPP, "torch", "mm"),
        (call(1, layout=(("cpp", "V lies badly"),)), CPP, "torch", "mm"),
        (call(5), CPP, "torch", "mm"),  # bf16 factors
        (Call(16, 576, (1536,) * 2, (36,) * 2, base=True), CPP, "cpp", "stream"),  # bf16 too, but a small call
        (Call(32, 576, (1536,) * 2, (64,) * 2, base=True), CPP, "cpp", "stream"),
        (Call(32, 576, (3072,), (128,), base=True), CPP, "torch", "mm"),  # for one member torch pays less
        (Call(32, 576, (1536,) * 2, (128,) * 2, base=True), CPP, "torch", "mm"),
        (Call(65, 576, (1536,) * 2, (8,) * 2, base=True), CPP, "torch", "mm"),
        (Call(5, 576, (1536,) * 2, (36,) * 2, base=True), CPP._replace(stream_tokens=((BF16, 4),)), "torch", "mm"),
        (call(9), CPP._replace(stream_tokens=((BF16, 9),)), "cpp", "stream"),
        (call(16, **FP32), CPP, "cpp", "stream"),
        (call(1024, **FP32), CPP, "cpp", "stream"),
        (call(1025, **FP32), CPP, "torch", "mm"),
        (Call(300, 64, (64,), (64,), one=True, **FP32), CPP, "torch", "dense"),
        (Call(300, 64, (64,), (64,), one=True, base=True, **FP32), CPP, "cpp", "stream"),
        (call(49, **FP32), CPP._replace(stream_tokens=(("float32 float32", 48),)), "torch", "mm"),
        (
            call(512, **FP32),
            CPP._replace(stream_tokens=(("float32 float32", 64),)),
            "cpp",
            "stream",
        ),  # no end was found
        (Call(64, 576, (1536,) * 2, (36,) * 2, base=True), CPP, "torch", "mm"),
        (Call(64, 576, (1536,) * 2, (36,) * 2, base=True), CPP._replace(isa="avx512_bf16"), "cpp", "stream"),
        (Call(64, 576, (1536,) * 2, (64,) * 2, base=True), CPP._replace(isa="avx512_bf16"), "cpp", "stream"),
        (Call(32, 576, (1536,) * 2, (256,) * 2, base=True), CPP._replace(isa="avx512_bf16"), "torch", "mm"),
        (Call(512, 576, (1536,) * 2, (256,) * 2, base=True), CPP._replace(isa="avx512_bf16"), "cpp", "stream"),
        (Call(512, 4096, (4096,), (64,), base=True), CPP._replace(isa="avx512_bf16"), "torch", "mm"),
        (Call(512, 576, (1536,), (300,), base=True), CPP._replace(isa="avx512_bf16"), "torch", "mm"),
        (Call(2049, 576, (1536,), (36,), base=True), CPP._replace(isa="avx512_bf16"), "torch", "mm"),
        (Call(65, 576, (1536,), (36,), base=True), CPP._replace(isa="avx512"), "torch", "mm"),
        (call(16), CPP._replace(isa="avx2"), "cpp", "stream"),
        (call(1), CPP._replace(unchecked=(("cpp", "slow"),)), "torch", "mm"),
        (call(0), CPP, "torch", "mm"),
        (call(1, x=torch.float64), CPP, "torch", "mm"),
        (call(1, x=torch.float32, factors=torch.float64), CPP, "torch", "mm"),
    ],
)
def test_cases(asked, machine, impl, path):
    choice = choose(asked, machine)
    assert (choice.impl, choice.path) == (impl, path)
    assert machine.name in choice.why


def test_a_dense_weight_is_made_for_those_experts_that_have_the_tokens():
    shares = ((0, 100), (3, 6000), (7, 5500), (9, 4500))
    assert choose(call(16100, tokens=shares), CPU).experts == (3, 7)
    assert choose(call(16100, tokens=shares[:1]), CPU).path == "mm"
    assert could_be_dense(call(16100))
    assert not could_be_dense(call(4000))


def test_the_break_even_is_max_M_N_tokens():
    for M, N in ((HIDDEN, HIDDEN), (KV, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP)):
        T = max(M, N)
        assert operations(call(T, M, N)) == operations(call(T, M, N), "dense")
        assert operations(call(T + 1, M, N)) > operations(call(T + 1, M, N), "dense")


def test_asked_by_name_means_that_one():
    for machine in (CPU, CPP, CHECKED, UNCHECKED, CUDA):
        for impl in IMPLEMENTATIONS:
            choice = choose(call(8), machine, impl)
            assert choice.impl == impl
            assert choice.why_impl == "asked for"
    assert CPU.unsupported("triton") == "needs a GPU"
    assert UNCHECKED.unsupported("triton") is None  # it can be asked for; `auto` does not take it
    assert "not checked on this GPU" in choose(call(8), UNCHECKED).why_impl


def test_the_reads_of_Llama_3_8B():
    """Bytes of one layer over its dense bf16 weights: the figures of the two forms that the README states."""
    shapes = [
        (HIDDEN, HIDDEN),
        (KV, HIDDEN),
        (KV, HIDDEN),
        (HIDDEN, HIDDEN),
        (MLP, HIDDEN),
        (MLP, HIDDEN),
        (HIDDEN, MLP),
    ]
    dense = sum(2 * M * N for M, N in shapes)

    def read(C, factors, weight=0):
        total = 0
        for M, N in shapes:
            asked = call(0, M, N, C, factors=factors)
            total += bytes_moved(asked, "pair") + weight * M * N
        return total / dense

    assert read(None, torch.bfloat16) == pytest.approx(1.39, abs=0.005)
    assert read(None, torch.int8) == pytest.approx(0.70, abs=0.005)
    for k, ratio in ((128, 1.05), (256, 1.10), (512, 1.19)):
        assert read(k, torch.bfloat16, weight=2) == pytest.approx(ratio, abs=0.005)
    assert read(256, torch.int8, weight=1) == pytest.approx(0.55, abs=0.005)


def test_activations_count_too():
    asked = call(100, C=256, base=True)
    x, y, g = (2 * 100 * n for n in (HIDDEN, HIDDEN, 256))
    assert bytes_moved(asked, "pair") == 2 * 256 * 2 * HIDDEN + x + 2 * y + 2 * g
    assert bytes_moved(asked, "mm") - bytes_moved(asked, "pair") == 2 * g
    one = call(100, one=True)
    assert bytes_moved(one, "dense") - bytes_moved(one, "pair") == 2 * 2 * HIDDEN * HIDDEN - 2 * 2 * 100 * HIDDEN


@pytest.mark.parametrize(
    "M, N, k, weight, factors, form",
    [
        (HIDDEN, HIDDEN, HIDDEN, 2, 2, "factored"),
        (HIDDEN, HIDDEN, 256, 2, 2, "delta"),
        (HIDDEN, HIDDEN, 256, 2, 1, "factored"),  # int8 factors read 1.0x of bf16, the delta form 1.06x
        (MLP, HIDDEN, 1000, 2, 2, "factored"),
        (MLP, HIDDEN, 900, 2, 2, "delta"),
        (HIDDEN, HIDDEN, 256, 1, 1, "delta"),
        (HIDDEN, HIDDEN, 256, 0.5, 2, "delta"),
    ],
)
def test_the_cheaper_form(M, N, k, weight, factors, form):
    assert cheaper_form(M, N, k, weight, factors)[0] == form


@pytest.mark.parametrize(
    "asked, why",
    [
        (call(33), "33 tokens"),
        (call(6000, one=True), "6000 tokens"),
        (call(0), "0 tokens"),
        (call(1, grad=True), "no backward"),
        (call(1, C=100), "number of columns is 100"),
        (call(1, N=100), "N is 100"),
        (call(1, x=torch.float32), "x in float32"),
        (call(1, M=0, C=8), "no rows"),
        (call(1, layout=(("cuda", "U lies badly"),)), "U lies badly"),
        (Call(8, HIDDEN, (8,) * 9, (8,) * 9), "9 matrices"),
    ],
)
def test_the_decode_kernel_asked_for_by_name_runs_or_says_why_not(asked, why):
    assert choose(call(32), CUDA, "cuda").path == "decode"
    refused = choose(asked, CUDA, "cuda")
    assert (refused.impl, refused.path) == ("cuda", "refused")
    assert why in refused.why_path
