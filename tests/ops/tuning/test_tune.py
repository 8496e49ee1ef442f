"""`t2 tune`: what it checks, times and writes, and how `auto` uses it. The kernels run in Triton's interpreter."""

import json

import pytest
import torch
import transformers

from t2kernels import InputError
from t2kernels.cli.verbs.tune import shapes
from t2kernels.ops import dispatch
from t2kernels.ops.dispatch import ImplUnavailableError, choose, device_of
from t2kernels.ops.impls import cuda_kernels
from t2kernels.ops.impls.cuda_kernels import CUDA
from t2kernels.ops.impls.triton import TRITON
from t2kernels.ops.planner import Call
from t2kernels.ops.tuning import sizes
from t2kernels.ops.tuning.predict import candidates, resident, seconds
from t2kernels.ops.tuning.selfcheck import Case, E, selfcheck
from t2kernels.ops.tuning.tables import (
    read_cuda_table,
    read_table,
    table_path,
    user_folder,
    write_cuda_table,
    write_table,
)
from t2kernels.ops.tuning.tiles import Tiles, choices, tiles
from t2kernels.ops.tuning.tuner import CROSSOVER, Shape, WrongResultError, crossover, jobs, tune, tune_cuda

CPU = torch.device("cpu")
MISSING = device_of(CPU).unsupported("triton")
needs_triton = pytest.mark.skipif(MISSING is not None, reason=f"no Triton interpreter here: {MISSING}")
SMALL = ((40, (24, 8), (56, 20)),)
BF16 = ((torch.bfloat16, torch.int8),)
GOOD = [Case("bfloat16", "bfloat16", 1, 8, (8,), (8,), 0.5, "y")]


def test_plain_torch_passes_its_own_check():
    cases = selfcheck("cpu", "torch", (1, 9), SMALL)
    assert len(cases) == 6 * 2 * 2
    assert all(c.right for c in cases)
    assert max(c.error for c in cases) > 0.1  # and the yardstick is not far away


@needs_triton
def test_triton_passes():
    assert all(c.right for c in selfcheck("cpu", "triton", (5,), SMALL, BF16))


@needs_triton
@pytest.mark.parametrize(
    "name, spoil",
    [
        ("forward_pair", lambda ys: [y * 1.02 for y in ys]),
        ("forward_pair", lambda ys: [ys[0], y0_left_unwritten(ys[1])]),
        ("row_scaling", lambda g: g * 1.02),
        ("backward", lambda found: (found[0] * 1.02, found[1])),
        ("backward", lambda found: (found[0], found[1] * 1.02)),
    ],
)
def test_a_wrong_kernel_does_not(monkeypatch, name, spoil):
    from t2kernels.ops.impls.triton import launch_pair as launch
    from t2kernels.ops.impls.triton import matmul

    module = launch if name == "forward_pair" else matmul
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: spoil(real(*a, **k)))
    assert not all(c.right for c in selfcheck("cpu", "triton", (5,), SMALL, BF16))


def y0_left_unwritten(y):
    y = y.clone()
    y[0, 0] = float("nan")
    return y


def test_the_check_leaves_torch_as_it_was():
    before = torch.random.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    selfcheck("cpu", "torch", (1,), SMALL, BF16)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert torch.are_deterministic_algorithms_enabled() == before[1]
    assert E > 1


SHAPES = [
    Shape(64, (48, 16), (8, 8), True, torch.bfloat16, torch.bfloat16),
    Shape(32, (32,), (32,), False, torch.bfloat16, torch.int8),
]


@needs_triton
def test_tune_times_candidates_and_writes_what_was_fastest(tmp_path, monkeypatch):
    from t2kernels.ops.impls.triton import launch_pair as launch

    calls, tried = [], []
    real = launch.forward_pair
    monkeypatch.setattr("t2kernels.ops.tuning.tuner.CROSSOVER", (4, 8))
    monkeypatch.setattr(
        "t2kernels.ops.tuning.tuner.candidates",
        lambda kernel, *a: [tiles(kernel, *a), Tiles(16, 16, 32, 1, 4, 2), Tiles(32, 16, 32, 1, 4, 2)],
    )

    def pair(*a):
        if len(a) == 8:
            tried.append(a[7])
        return real(*a)

    monkeypatch.setattr(launch, "forward_pair", pair)

    def timer(f):
        calls.append(f())
        return 1.0 if tried and tried[-1][len(tried) % 2].BR == 32 else 2.0

    path = tune(SHAPES, "cpu", (3,), tmp_path, timer, check=lambda: GOOD)
    table = json.loads(path.read_text())
    assert table["checked"]["cases"] == 1
    assert table["checked"]["worst"] == 0.5
    assert set(table["pair_and_mm_us"]) == {"4", "8"}
    assert len(table["tiles"]) == 4  # shrink and expand of both shapes
    assert "expand/bf16/bf16/64x8" in table["tiles"]
    found = table["tiles"]["shrink/bf16/int8/32x32"]["3"]
    assert Tiles(*found) in (
        Tiles(16, 16, 32, 1, 4, 2),
        Tiles(32, 16, 32, 1, 4, 2),
        tiles("shrink", 3, 32, 32, torch.bfloat16, torch.int8, (9, 0)),
    )
    read = read_table("Triton's interpreter", table["triton"], tmp_path)
    assert tiles("shrink", 3, 32, 32, torch.bfloat16, torch.int8, (9, 0), table=read) == Tiles(*found)


@needs_triton
def test_nothing_is_timed_or_written_where_a_check_fails(tmp_path):
    def timer(f):
        raise AssertionError("timed")

    bad = GOOD[0]._replace(error=float("nan"))
    for cases, said in (([*GOOD, bad], "1 of 2 checks fail"), ([], "none ran")):
        with pytest.raises(WrongResultError, match=said):
            tune(SHAPES, "cpu", (1,), tmp_path, timer, check=lambda cases=cases: cases)
    assert not list(tmp_path.iterdir())


def test_no_triton_nothing_to_tune(monkeypatch, tmp_path):
    monkeypatch.setattr(TRITON, "unsupported_device", lambda device: "no Triton here")
    with pytest.raises(ImplUnavailableError, match="no Triton here"):
        tune(SHAPES, "cpu", (1,), tmp_path)


def test_the_crossover_is_where_the_pair_first_loses():
    assert crossover({32: (1, 2), 64: (2, 2), 96: (3, 2), 128: (1, 2)}) == 64
    assert crossover({32: (3, 2), 64: (1, 2)}) == 0
    assert crossover(dict.fromkeys(CROSSOVER, (1, 2))) == CROSSOVER[-1]


def asked():
    """A GPU, probed again."""
    dispatch.probe.cache_clear()
    try:
        return device_of(torch.device("cuda", 0))
    finally:
        dispatch.probe.cache_clear()


def test_auto_uses_triton_only_on_a_gpu_with_a_table_that_says_checked(tmp_path, monkeypatch):
    """A GPU that is not there, by the functions that ask for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(TRITON, "unsupported_device", lambda device: None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.6.0")
    call = Call(8, 64, (64,), (64,))

    assert choose(call, asked()).impl == "torch"
    assert "t2 tune" in choose(call, asked()).why
    write_table("Some GPU", "3.6.0", {}, user_folder())
    assert choose(call, asked()).impl == "torch"
    write_table("Some GPU", "3.6.0", {}, user_folder(), checked={"cases": 3}, pair_tokens=64)
    found = asked()
    assert choose(call, found)[::2] == ("triton", "pair", None)
    assert choose(call._replace(T=65), found).path == "mm"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.7.0")  # another compiler is another machine
    assert choose(call, asked()).impl == "torch"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.6.1")
    assert choose(call, asked()).impl == "triton"


def test_auto_uses_the_cuda_kernel_only_on_a_gpu_with_a_table_of_it_that_says_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(TRITON, "unsupported_device", lambda device: "no Triton here")
    monkeypatch.setattr(CUDA, "unsupported_device", lambda device: None)
    call = Call(8, 64, (64,), (64,))

    assert choose(call, asked()).impl == "torch"
    assert "no cuda: its kernel has not been checked" in choose(call, asked()).why
    assert choose(call, asked(), "cuda").path == "decode"  # by name it runs
    write_cuda_table("Some GPU", (16, 8), user_folder())
    assert choose(call, asked()).impl == "torch"
    write_cuda_table("Some GPU", (12, 4), user_folder(), checked={"cases": 3})
    assert choose(call, asked())[::2] == ("cuda", "decode", None)
    assert asked().decode_tokens == (12, 4)
    assert choose(call._replace(T=13), asked()).impl == "torch"
    monkeypatch.setattr(CUDA, "unsupported_device", lambda device: "built without CUDA")
    assert "built without CUDA" in choose(call, asked()).why


def test_tune_cuda_checks_then_times_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(CUDA, "unsupported_device", lambda device: None)
    monkeypatch.setattr(TRITON, "unsupported_device", lambda device: None)
    monkeypatch.setattr(cuda_kernels, "forward", lambda x, *a: ("cuda", x.shape[0], a[0].dtype))
    launch = pytest.importorskip("t2kernels.ops.impls.triton.launch_pair")
    monkeypatch.setattr(launch, "forward_pair", lambda x, *a: ("triton", x.shape[0], a[0].dtype))

    def timer(f):
        kernel, T, dtype = f()
        return 1.0 if kernel == "triton" else 0.5 if T <= (16 if dtype == torch.bfloat16 else 4) else 2.0

    shapes_ = [
        *SHAPES,
        Shape(33, (32,), (32,), False, torch.bfloat16, torch.bfloat16),
    ]  # a size that the kernel does not take is left out
    path = tune_cuda(shapes_, "cpu", tmp_path, timer, check=lambda: GOOD)
    found = read_cuda_table("Triton's interpreter", tmp_path)
    assert path.parent == tmp_path
    assert (found["decode_tokens"], found["checked"]["cases"]) == ([16, 4], 1)
    assert found["decode_and_pair_us"]["2"]["8"] == [5e5, 1e6]
    with pytest.raises(WrongResultError, match="1 of 1 checks fail"):
        tune_cuda(SHAPES, "cpu", tmp_path, timer, check=lambda: [GOOD[0]._replace(error=float("nan"))])
    monkeypatch.setattr(TRITON, "unsupported_device", lambda device: "none")
    assert tune_cuda(SHAPES, "cpu", tmp_path, timer, check=lambda: GOOD)
    assert read_cuda_table("Triton's interpreter", tmp_path)["decode_tokens"] == [
        16,
        8,
    ]  # nothing to compare with: as computed


def test_a_damaged_table_is_named(tmp_path):
    table_path("X", "3.6.0", tmp_path).write_text("{")
    with pytest.raises(ValueError, match=r"X-triton3\.6\.json is not a table"):
        read_table("X", "3.6.0", tmp_path)
    assert read_table("Y", "3.6.0", tmp_path) is None


SHAPE = "expand/bf16/bf16/64x32"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tiles": []}, "tiles"),
        ({"tiles": {"expand/64x32": {"1": [32, 16, 64, 1, 4, 3]}}}, "expand/64x32"),
        ({"tiles": {SHAPE: {}}}, SHAPE),
        ({"tiles": {SHAPE: {"many": [32, 16, 64, 1, 4, 3]}}}, "many"),
        ({"tiles": {SHAPE: {"0": [32, 16, 64, 1, 4, 3]}}}, "'0'"),
        *[
            ({"tiles": {SHAPE: {"16": sizes}}}, f"{SHAPE}'\\]\\['16'")
            for sizes in (
                None,
                [32, 16, 64, 1, 4],
                [32, 16, 64, 1, 4, 3, 1],
                [0, 16, 64, 1, 4, 3],
                [-32, 16, 64, 1, 4, 3],
                [48, 16, 64, 1, 4, 3],
                [32, 16, 64, 1, 3, 3],
                [32, 16, 64, 1, 4, True],
                [32.0, 16, 64, 1, 4, 3],
                ["32", 16, 64, 1, 4, 3],
                [2**40, 16, 64, 1, 4, 3],
            )
        ],
        ({"tiles": {"shrink/bf16/fp8/8x8": {"1": [32, 16, 64, 1, 4, 3]}}}, "shrink/bf16/fp8/8x8"),
        ({"checked": 3}, "checked"),
        ({"pair_tokens": None}, "pair_tokens"),
        ({"pair_tokens": -1}, "pair_tokens"),
    ],
)
def test_an_entry_that_no_kernel_can_use_is_named(change, named, tmp_path):
    path = write_table("X", "3.6.0", {}, tmp_path, checked={"cases": 1}, pair_tokens=0)
    good = json.loads(path.read_text()) | {"tiles": {SHAPE: {"1": [32, 16, 64, 1, 4, 3], "64": [32, 64, 1, 8, 8, 5]}}}
    path.write_text(json.dumps(good))
    assert read_table("X", "3.6.0", tmp_path) == good
    path.write_text(json.dumps(good | change))
    with pytest.raises(InputError, match=f"X-triton3\\.6\\.json is not a table.*{named}.*wanted.*t2 tune"):
        read_table("X", "3.6.0", tmp_path)


@pytest.mark.parametrize("tokens", [None, 16, [16], [16, 8, 4], [16, -1], [16, 8.0], ["16", 8], [True, 8]])
def test_a_cut_over_of_the_cuda_kernel_that_is_no_pair_of_integers_is_named(tokens, tmp_path):
    path = write_cuda_table("X", (16, 8), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decode_tokens": tokens}))
    with pytest.raises(InputError, match=r"X-cuda\.json is not a table.*decode_tokens.*wanted two integers"):
        read_cuda_table("X", tmp_path)


def test_the_shapes_of_a_model_are_its_calls():
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=30,
    )
    found = shapes(config, [16], True, torch.bfloat16, [torch.bfloat16])
    factored = {(s.N, s.M, s.C) for s in found if not s.base}
    assert factored == {
        (64, (64, 32, 32), (64, 32, 32)),
        (64, (64,), (64,)),
        (64, (96, 96), (64, 64)),
        (96, (64,), (64,)),
    }
    delta = {(s.N, s.M, s.C) for s in found if s.base}
    assert (64, (64, 32, 32), (16, 16, 16)) in delta
    assert (64, (32,), (16,)) in delta
    assert (96, (64,), (16,)) in delta
    assert len(found) == len(set(found))


def few(kernel, *a):
    return [tiles(kernel, *a), Tiles(16, 16, 32, 1, 4, 2), Tiles(32, 16, 32, 1, 4, 2)]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("t2kernels.ops.tuning.tuner.CROSSOVER", (4,))
    monkeypatch.setattr("t2kernels.ops.tuning.tuner.candidates", few)


def stopping(after):
    """A timer that is interrupted at a call, and the number of calls of it."""
    calls = []

    def timer(f):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(f)
        return 1.0 + len(calls) % 3

    return timer, calls


@needs_triton
def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, small):
    checks = []

    def check():
        checks.append(1)
        return GOOD

    whole, calls = stopping(None)
    assert json.loads(tune(SHAPES, "cpu", (1, 2), tmp_path / "whole", whole, check=check).read_text())["jobs"] == [5, 5]
    first, _ = stopping(9)
    with pytest.raises(KeyboardInterrupt):
        tune(SHAPES, "cpu", (1, 2), tmp_path, first, check=check)
    (path,) = tmp_path.glob("*.json")
    half = json.loads(path.read_text())
    assert half["jobs"] == [1, 5]
    assert half["checked"]["cases"] == 1
    assert sum(len(v) for v in half["tiles"].values()) == 2
    rest, more = stopping(None)
    tune(SHAPES, "cpu", (1, 2), tmp_path, rest, check=check)
    assert len(checks) == 2  # checked once a table
    assert len(more) == len(calls) - 6  # what the first job timed is not timed again
    table = json.loads(path.read_text())
    assert table["jobs"] == [5, 5]
    assert table["tiles"].keys() == json.loads(next((tmp_path / "whole").iterdir()).read_text())["tiles"].keys()
    again, repeated = stopping(None)
    tune(SHAPES, "cpu", (1, 2), tmp_path, again, check=check)
    assert (len(repeated), len(checks)) == (len(calls), 3)  # a table that is finished is made anew


@needs_triton
def test_other_shapes_stay_in_the_table(tmp_path, small):
    for shape in SHAPES:
        path = tune([shape], "cpu", (1,), tmp_path, stopping(None)[0], check=lambda: GOOD)
    assert len(json.loads(path.read_text())["tiles"]) == 4


@needs_triton
def test_a_time_limit_leaves_a_table_of_what_was_done(tmp_path, small, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("t2kernels.ops.tuning.tuner.time.monotonic", lambda: now[0])

    def timer(f):
        now[0] += 1
        return 1.0

    path = tune(SHAPES, "cpu", (1, 2), tmp_path, timer, check=lambda: GOOD, seconds=13)
    table = json.loads(path.read_text())
    assert table["jobs"] == [3, 5]  # two jobs of six timings, then the cut-over; the other two jobs are left
    assert table["pair_tokens"] == 4
    assert read_table("Triton's interpreter", table["triton"], tmp_path)


def test_members_of_a_group_come_last_and_nothing_twice():
    base = (True, torch.bfloat16, torch.bfloat16)
    group, k, o = Shape(64, (64, 16), (8, 8), *base), Shape(64, (16,), (8,), *base), Shape(64, (64,), (8,), *base)
    found = jobs([k, group, o, k, o], (1, 2))
    assert [(j.shape, j.T) for j in found] == [(group, 1), (group, 2), (k, 1), (o, 1), (k, 2), (o, 2)]
    assert [(j.shape, j.T) for j in jobs([k, o, o._replace(N=8)], (1,))] == [(k, 1), (o, 1), (o._replace(N=8), 1)]
    assert len(jobs([k, k._replace(base=False)], (1,))) == 1  # a base changes no tile


def test_candidates_are_a_tenth_of_what_there_is_for_llama_3_8b():
    config = transformers.LlamaConfig(**sizes.fields("llama-3-8b"))
    formats = [torch.bfloat16, torch.int8]
    every = jobs(shapes(config, [128, 256], True, torch.bfloat16, formats))
    launches = {job.timed(k): (k, job.T, *job.launches[k], job.shape) for job in every for k in job.launches}
    found = [candidates(k, T, rows, K, s.x, s.factors, (9, 0)) for k, T, rows, K, s in launches.values()]
    there = [choices(k, T, rows, K, s.x, s.factors, (9, 0)) for k, T, rows, K, s in launches.values()]
    assert sum(map(len, found)) < 1600
    assert sum(map(len, found)) < sum(map(len, there)) / 10
    assert all(f[0] == t[0] for f, t in zip(found, there, strict=True))  # the rule's


def test_a_tile_that_leaves_the_memory_idle_is_predicted_to_be_slow():
    given = ("shrink", 8, 512, 4096, torch.bfloat16, torch.bfloat16, (9, 0))
    one, eight = Tiles(64, 16, 128, 1, 4, 4), Tiles(64, 16, 128, 8, 4, 4)  # 8 and 64 blocks on 132 multiprocessors
    assert seconds(eight, *given) < seconds(one, *given) / 2
    least = 512 * 4096 * 2 / 3.35e12
    assert all(seconds(t, *given) > least for t in (one, eight))
    assert resident(one, "shrink", torch.bfloat16, torch.bfloat16, (9, 0)) >= 2
    assert resident(Tiles(128, 128, 64, 1, 8, 4), "shrink", torch.bfloat16, torch.bfloat16, (9, 0)) == 1


def test_only_some_matrices_of_a_model():
    config = transformers.LlamaConfig(**sizes.fields("llama-3-8b"))
    given = (config, [256], False, torch.bfloat16, [torch.bfloat16])
    found = shapes(*given, ["k_proj"])
    assert {s.M for s in found} == {(4096, 1024, 1024), (4096,), (1024,)}
    assert set(found) < set(shapes(*given))
    with pytest.raises(InputError, match=r"--only w9: .* it has q_proj, k_proj"):
        shapes(*given, ["w9"])
