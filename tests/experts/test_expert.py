import json
import math
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from t2kernels.experts.expert import Expert, ExpertError, ExpertMismatch
from t2kernels.experts.files import find_file, require_file
from t2kernels.factors.factor import Factor, svd
from t2kernels.factors.store import Factors
from t2kernels.layers.scale import make_scale, truncation_error, z_from_logits

SHAPES = {"layers.0.q": (24, 40), "layers.0.up": (64, 32), "layers.1.up": (32, 32)}


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(*s, generator=g) for n, s in SHAPES.items()}


def decomposed(seed=0, **kwargs):
    return Factors({n: svd(W, **kwargs) for n, W in weights(seed).items()})


def numbers(seed=0, k=None):
    g = torch.Generator().manual_seed(seed)
    return {n: 1 + 0.3 * torch.randn(k or min(s), generator=g) for n, s in SHAPES.items()}


@pytest.fixture(scope="module")
def factors():
    return decomposed()


@pytest.fixture
def expert(factors):
    return Expert(numbers(), {"name": "math", "base_model": "tiny"}, factors.sketches)


def rotated(f, i, j, angle):
    """Another basis of components i and j."""
    turn = torch.eye(f.rank)
    c, s = math.cos(angle), math.sin(angle)
    turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
    return Factor(f.U @ turn, f.sigma, f.V @ turn)


@pytest.mark.parametrize("name", ["math", "math.safetensors", "math.v2"])
def test_round_trip(expert, tmp_path, name):
    path = expert.save(tmp_path / "experts" / name)
    assert path.name == name.removesuffix(".safetensors") + ".safetensors"
    for given in (path, tmp_path / "experts" / name, str(path)):
        loaded = Expert.load(given)
        assert loaded == expert
        assert {n: t.dtype for n, t in loaded.z.items()} == dict.fromkeys(SHAPES, torch.float32)
        assert all(torch.equal(loaded.sketch[n], expert.sketch[n]) for n in SHAPES)
        assert loaded.manifest["name"] == "math"
        assert loaded.manifest["created_by"].startswith("t2kernels")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_file_is_owned_by_the_caller(expert, tmp_path):
    path = expert.save(tmp_path / "e")
    loaded = Expert.load(path)
    Expert({"other": torch.ones(3)}).save(path)
    assert loaded == expert


def test_bad_z_is_refused_by_name():
    for bad, why in [
        (torch.tensor([1.0, math.nan, 2.0]), "holds nan at component 1"),
        (torch.tensor([1.0, math.inf]), "holds inf at component 1"),
        (torch.ones(2, 2), r"torch.float32 \[2, 2\]; wanted a floating-point vector"),
        (torch.ones(3, dtype=torch.int64), "torch.int64"),
        ([1.0], "list"),
    ]:
        with pytest.raises(ExpertError, match=rf"layers\.0\.q: z (is )?{why}"):
            Expert({"layers.0.q": bad})
    with pytest.raises(ExpertError, match="its sketch has 2 components, z has 3"):
        Expert({"a": torch.ones(3)}, sketch={"a": torch.ones(2)})


def broken_files(tmp_path, expert):
    good = expert.save(tmp_path / "good").read_bytes()
    meta = {"t2kernels": json.dumps({"format": 1})}

    def tensors(name, content, metadata=meta):
        save_file(content, tmp_path / name, metadata=metadata)

    (tmp_path / "short.safetensors").write_bytes(good[:-5])
    (tmp_path / "header.safetensors").write_bytes(good[:100])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)) * 8)
    torch.save({"a.z": torch.ones(3)}, tmp_path / "zip.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(Bomb()))
    tensors("nan.safetensors", {"m.a.z": torch.tensor([1.0, math.nan])})
    tensors("matrix.safetensors", {"m.a.z": torch.ones(2, 2)})
    tensors("half.safetensors", {"m.a.z": torch.ones(2).half()})
    tensors("scale.safetensors", {"m.a.z": torch.ones(2), "m.a.d": torch.ones(4)})
    tensors("orphan.safetensors", {"m.a.z": torch.ones(2), "m.b.sketch": torch.ones(4)})
    tensors("model.safetensors", {"m.a.weight": torch.ones(2)}, metadata={"format": "pt"})
    tensors(
        "newer.safetensors",
        {"m.a.z": torch.ones(2)},
        metadata={"t2kernels": json.dumps({"format": 2, "created_by": "t2kernels 9"})},
    )
    tensors("json.safetensors", {"m.a.z": torch.ones(2)}, metadata={"t2kernels": "{"})
    tensors("list.safetensors", {"m.a.z": torch.ones(2)}, metadata={"t2kernels": "[]"})


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def test_broken_files_are_refused_by_name(expert, tmp_path):
    broken_files(tmp_path, expert)
    for name, why in [
        ("short", "truncated"),
        ("header", "truncated"),
        ("empty", "0 bytes"),
        ("noise", "truncated, damaged, or in another format"),
        ("zip", "pickle.*never loaded.*from_sakana"),
        ("pickle", "pickle.*never loaded"),
        ("nan", r"m\.a: z holds nan at component 1"),
        ("matrix", r"m\.a: z is torch.float32 \[2, 2\]"),
        ("half", r"m\.a: z is torch.float16.*torch.float32"),
        ("scale", r"'m\.a\.d' is of a kind that this version does not know.*update t2kernels"),
        ("orphan", r"m\.b has a sketch but no z"),
        ("model", "safetensors but not an expert"),
        ("newer", "format 2, written by t2kernels 9; this version reads 1"),
        ("json", "not one that Expert.save writes"),
        ("list", "not one that Expert.save writes"),
        ("missing", "does not exist"),
        (".", "is a directory"),
    ]:
        with pytest.raises(ExpertError, match=why) as e:
            Expert.load(tmp_path / name)
        assert str(tmp_path) in str(e.value)


def test_an_experts_file_is_found_with_or_without_its_suffix(expert, tmp_path, monkeypatch):
    path = expert.save(tmp_path / "a.b")
    assert path.name == "a.b.safetensors"
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (path, str(path), tmp_path / "a.b", "~/a.b", "~/a.b.safetensors"):
        assert find_file(given) == require_file(given) == path
        assert Expert.load(given) == expert
    for given in ("", ".", tmp_path, tmp_path / "a", "~/c"):
        assert find_file(given) is None
        with pytest.raises(ExpertError, match=r"Expert\.save wrote"):
            require_file(given)


@pytest.mark.parametrize("step", ["save_file", "replace", "fsync"])
def test_a_failed_save_leaves_what_was_there(expert, tmp_path, monkeypatch, step):
    from t2kernels import storage

    path = expert.save(tmp_path / "e")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage if step == "save_file" else storage.os, step, fail)
    with pytest.raises(OSError, match=r"could not write .*e\.safetensors.*No space left.*untouched") as error:
        Expert({"other": torch.ones(3)}).save(path)
    assert error.value.errno == 28
    monkeypatch.undo()
    assert Expert.load(path) == expert
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]


def test_save_refuses_what_no_file_can_hold(expert, tmp_path):
    with pytest.raises(ExpertError, match="no matrix at all"):
        Expert({}).save(tmp_path / "e")
    with pytest.raises(ExpertError, match="manifest is not JSON"):
        Expert({"a": torch.ones(2)}, {"model": object()}).save(tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_mix_against_fp64(factors):
    a, b = (
        Expert(numbers(1), sketch=factors.sketches),
        Expert({"layers.0.q": 2 * torch.ones(5), "layers.0.up": 0.5 * torch.ones(32)}),
    )
    mixed = Expert.mix({a: 0.7, b: -0.4})
    for name, v in mixed.z.items():
        wanted = 1 + 0.7 * (a.z[name].double() - 1)
        if name in b.z:
            wanted[: len(b.z[name])] -= 0.4 * (b.z[name].double() - 1)
        torch.testing.assert_close(v, wanted.float(), rtol=1e-7, atol=0)
    mixed.check(factors)
    with pytest.raises(ExpertMismatch):
        mixed.check(decomposed(seed=5))


def test_mix_of_equal_experts_counts_both(expert):
    copy = Expert(expert.z, expert.manifest, expert.sketch)
    assert copy == expert
    assert Expert.mix({expert: 0.5, copy: 0.5}) == expert
    assert Expert.mix({expert: 0.5}) != expert


def test_interpolate_ends(expert):
    other = Expert(numbers(2))
    assert expert.interpolate(other, 0.0) == expert
    assert expert.interpolate(other, 1.0) == other


def test_mix_refuses(expert):
    with pytest.raises(ExpertError, match="no experts given"):
        Expert.mix({})
    with pytest.raises(ExpertError, match="key of type str"):
        Expert.mix({"math": 1.0})
    with pytest.raises(ExpertError, match="weight nan"):
        Expert.mix({expert: math.nan})
    elsewhere = Expert(numbers(2), {"name": "code"}, decomposed(seed=5).sketches)
    with pytest.raises(
        ExpertMismatch,
        match=r"mix: expert 'code' and expert 'math'.*trained with a different "
        "decomposition of the model; 3 of 3 matrices differ",
    ):
        Expert.mix({expert: 0.5, elsewhere: 0.5})
    # The part that only the first one has does not count.
    Expert.mix({expert: 0.5, Expert({"layers.2.q": torch.ones(3)}, sketch={"layers.2.q": torch.ones(3)}): 0.5})


def test_truncate(expert):
    first = expert.truncate(4)
    assert first.ranks == dict.fromkeys(SHAPES, 4)
    assert torch.equal(first.z["layers.0.q"], expert.z["layers.0.q"][:4])
    assert first.sketch.keys() == expert.sketch.keys()
    with pytest.raises(ExpertError, match="k=0"):
        expert.truncate(0)


def test_truncation_error_is_the_spectral_norm_of_what_is_lost():
    W, z = weights()["layers.0.q"].double(), numbers()["layers.0.q"].double()
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    whole = (U * (sigma * (z - 1))) @ Vt
    part = (U[:, :6] * (sigma * (z - 1))[:6]) @ Vt[:6]
    wanted = torch.linalg.matrix_norm(whole - part, 2) / torch.linalg.matrix_norm(whole, 2)
    assert truncation_error(z, sigma, 6) == pytest.approx(wanted.item(), rel=1e-12)
    assert (
        truncation_error(z, sigma, 24)
        == truncation_error(torch.ones(24), sigma, 1)
        == truncation_error(z[:3], sigma, 3)
        == 0
    )
    with pytest.raises(ValueError, match="z has 24 components, sigma 6"):
        truncation_error(z, sigma[:6], 6)


def test_make_scale():
    sigma = torch.tensor([4.0, 2.0, 1.0])
    z = torch.tensor([1.5, 0.5], requires_grad=True)
    assert make_scale(z, sigma, "factored").tolist() == [6, 1, 1]
    assert make_scale(z, sigma, "delta").tolist() == [2, -1, 0]
    make_scale(z, sigma, "delta").sum().backward()
    assert z.grad.tolist() == [4, 2]
    with pytest.raises(ValueError, match="form='dense'"):
        make_scale(z, sigma, "dense")
    with pytest.raises(ValueError, match="does not fit sigma"):
        make_scale(torch.ones(4), sigma, "delta")


def test_z_from_logits_keeps_the_trace_and_differentiates():
    g = torch.Generator().manual_seed(0)
    p, sigma = torch.randn(9, generator=g).double().requires_grad_(), torch.rand(9, generator=g).double()
    z = z_from_logits(p, sigma)
    m = 1 / (1 + (-p.detach()).exp())
    torch.testing.assert_close(z.detach(), m * sigma.sum() / (sigma * m).sum())
    torch.testing.assert_close((sigma * z).sum().item(), sigma.sum().item())
    torch.testing.assert_close(z_from_logits(torch.full((9,), 0.1), sigma.float()), torch.ones(9))
    assert torch.autograd.gradcheck(lambda q: z_from_logits(q, sigma), (p,))
    with pytest.raises(ValueError, match="one shape"):
        z_from_logits(p, sigma[:3])


def test_check_passes_on_its_own_and_on_recomputed_factors(expert, factors):
    expert.check(factors)
    expert.check(factors.cut(4))
    W = weights()
    lapack = {n: torch.linalg.svd(w, full_matrices=False) for n, w in W.items()}  # fp32, other signs, another algorithm
    expert.check(Factors({n: Factor(U, s, Vh.t()) for n, (U, s, Vh) in lapack.items()}))
    expert.check(Factors({n: f.to(torch.bfloat16) for n, f in factors.items()}))
    expert.check(decomposed(rank=6))
    expert.check(dict(factors.sigmas), sketches=factors.sketches)


def test_check_refuses_other_weights(expert):
    with pytest.raises(
        ExpertMismatch,
        match=r"expert 'math' \(trained on tiny\).*3 of 3 matrices differ.*components \(\d+ by [\d.]+.*of its training",
    ):
        expert.check(decomposed(seed=5))
    with pytest.raises(ExpertMismatch):
        expert.truncate(2).check(decomposed(seed=5))


def test_check_refuses_weights_that_moved_a_little(expert):
    near = Factors({n: svd(W + 0.02 * weights(9)[n]) for n, W in weights().items()})
    with pytest.raises(ExpertMismatch):
        expert.check(near)


def test_check_refuses_names_and_lengths_of_another_model(expert, factors):
    with pytest.raises(
        ExpertMismatch,
        match=r"has 1 of 1 matrices that the model does not: layers\.7\.q \(the model's are layers\.0\.q",
    ):
        Expert({"layers.7.q": torch.ones(2)}).check(factors)
    with pytest.raises(ExpertMismatch, match=r"layers\.0\.q: z has 25 components, the matrix has 24"):
        Expert({"layers.0.q": torch.ones(25)}).check(factors)
    with pytest.raises(ExpertMismatch, match=r"the matrix has 3"):
        Expert({"layers.0.q": torch.ones(4)}).check({"layers.0.q": torch.ones(3)})
    Expert({"layers.0.q": torch.ones(4)}).check({"layers.0.q": torch.ones(3)}, ranks={"layers.0.q": 24})
    Expert(numbers()).check(decomposed(seed=5))  # made by hand: neither fingerprint nor sketch


def test_equal_fingerprint_passes_at_once(factors):
    stamped = {"fingerprints": dict(factors.fingerprints)}
    nonsense = {n: torch.full((f.rank,), 9.0) for n, f in factors.items()}
    Expert(numbers(), stamped, nonsense).check(factors)
    with pytest.raises(ExpertMismatch):
        Expert(numbers(), None, nonsense).check(factors)
    with pytest.raises(ExpertMismatch, match="1 of 1 matrices differ"):
        Expert(numbers(), stamped | {"fingerprints": stamped["fingerprints"] | {"layers.0.q": "0"}}, nonsense).check(
            factors
        )


def test_trained_on(factors, tmp_path):
    expert = Expert.trained_on(factors, numbers(k=6), name="math")
    assert expert.manifest["fingerprint"] == factors.fingerprint
    assert {n: len(s) for n, s in expert.sketch.items()} == dict.fromkeys(SHAPES, 6)
    Expert.load(expert.save(tmp_path / "e")).check(factors)
    with pytest.raises(ExpertMismatch):
        expert.check(decomposed(seed=5))
    bare = Expert(expert.z, expert.manifest)
    bare.check(factors)
    bare.check(dict(factors.sigmas))
    with pytest.raises(
        ExpertMismatch, match=r"cannot be verified: .*other factors of layers\.0\.q, .* no sketch to compare"
    ):
        bare.check(decomposed(seed=5))


def pair(z4, z5, angle=0.8, gap=1e-5):
    """An expert, and the same weights in another basis of the near-equal components 4 and 5."""
    f = svd(weights()["layers.0.q"])
    sigma = f.sigma.clone()
    sigma[5] = sigma[4] * (1 - gap)
    mine = Factors({"m": Factor(f.U, sigma, f.V)})
    z = 1 + 0.3 * torch.ones(24)
    z[4], z[5] = z4, z5
    theirs = Factors({"m": rotated(mine["m"], 4, 5, angle)})
    exact, got = mine["m"].dense(z), theirs["m"].dense(z)
    return Expert({"m": z}, None, mine.sketches), theirs, (got - exact).norm() / (exact - mine["m"].dense()).norm()


@pytest.mark.parametrize("angle", [0.1, 0.8, math.pi / 2, 3.0])
def test_a_turned_pair_with_equal_z_is_harmless_and_passes(angle):
    expert, theirs, harm = pair(1.6, 1.6, angle)
    assert harm < 1e-4
    expert.check(theirs)


@pytest.mark.parametrize("angle", [0.1, 0.8, math.pi / 2])
def test_a_turned_pair_with_different_z_is_refused(angle):
    expert, theirs, harm = pair(1.6, 0.8, angle)
    assert harm > 1e-2
    with pytest.raises(ExpertMismatch, match=r"m: \d components \(.*(4|5) by"):
        expert.check(theirs)


def test_a_turned_pair_that_the_expert_leaves_alone_passes():
    expert, theirs, harm = pair(1.0, 1.0)
    assert harm < 1e-4
    expert.check(theirs)


def test_a_turned_pair_of_distinct_singular_values_is_refused():
    expert, theirs, harm = pair(1.6, 1.6, gap=0.2)
    assert harm > 1e-2
    with pytest.raises(ExpertMismatch):
        expert.check(theirs)


def test_another_space_with_equal_z_is_refused():
    """Two components of near-equal sigma and equal z, one of them exchanged for a direction outside of their plane."""
    expert, _, _ = pair(1.6, 1.6)
    f = svd(weights()["layers.0.q"])
    sigma = f.sigma.clone()
    sigma[5] = sigma[4] * (1 - 1e-5)
    swapped = rotated(rotated(Factor(f.U, sigma, f.V), 4, 5, 0.5), 5, 20, 0.5)
    with pytest.raises(ExpertMismatch):
        expert.check(Factors({"m": swapped}))


def test_many_random_other_models_are_refused_even_by_a_few_components():
    """Sketches agree by chance now and then; 2 components in each of 3 matrices must still tell models apart."""
    expert = Expert(numbers(k=2), None, decomposed().sketches)
    for seed in range(1, 40):
        with pytest.raises(ExpertMismatch):
            expert.check(decomposed(seed=seed))


def test_nan_in_a_sketch_is_a_difference(expert, factors):
    with pytest.raises(ExpertMismatch):
        expert.check(factors, sketches={n: s * math.nan for n, s in factors.sketches.items()})


def test_repr(expert):
    assert repr(expert).startswith("Expert(3 matrices, 88 numbers, max |z - 1| = ")
    assert repr(expert).endswith("math, tiny)")
    assert expert.numel == 88
