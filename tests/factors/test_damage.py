"""Files of factors that were damaged or changed after they were written are refused, by name; so are odd manifests."""

import json
import os
import random
import shutil
import stat
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from t2kernels import T2Error, storage
from t2kernels.factors import Factors, svd
from t2kernels.factors.decomposition import decompose
from t2kernels.factors.identity import FactorsError
from tests.helpers.families import build

NAME = "layers.0.up"
SEEDS = (20261128, 7, 99)
ODD = (None, [], {}, "", 0, -5, True, "x", 1.5, 1e400, [None], {"a": 1}, 2**64, 10**400, "../x", "\ud800")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer()])


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(scope="module", params=[None, "int8"], ids=["fp32", "int8"])
def source(request, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("factors") / "f"
    decompose(model, out, format=request.param, workers=1)
    return out


@pytest.fixture
def copy(source, tmp_path):
    return shutil.copytree(source, tmp_path / "f")


def values(path):
    """Every number that the library takes from a directory."""
    factors = Factors.load(path)
    found = {}
    for name, factor in factors.items():
        found |= {f"{name}.{part}": t.clone() for part, t in factor.tensors().items()}
        found |= {f"{name}.s": factors.sigmas[name].clone(), f"{name}.k": factors.sketches[name].clone()}
        found[f"{name}.dense"] = factor.dense()
        assert factors.shape(name) == tuple(found[f"{name}.dense"].shape)
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())


def edit(path, change, keep_digest=True):
    """Rewrite a file with other tensors under the header that it had."""
    with safe_open(path, "pt") as f:
        metadata, tensors = dict(f.metadata()), {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118
    if not keep_digest:
        metadata.pop(storage.DIGEST_KEY)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def make_old(path):
    """Turn a directory into one that was written before there were digests."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("spectra")
    for record in manifest["matrices"].values():
        record.pop("digest")
    (path / "manifest.json").write_text(json.dumps(manifest))
    for file in path.glob("*.safetensors"):
        edit(file, lambda tensors: None, keep_digest=False)


def poke(part, damage):
    """Change of one number: "nan" (of int8 factors: another number), or "sign"."""

    def change(tensors):
        flat = tensors[f"{NAME}.{part}"].view(-1)
        flat[3] = float("nan") if damage == "nan" and flat.is_floating_point() else -flat[3] + (flat[3] == 0)

    return change


@pytest.mark.parametrize("old", [False, True], ids=["digest", "fingerprint"])
@pytest.mark.parametrize("part", ["U", "Vt", "sigma"])
@pytest.mark.parametrize("damage", ["nan", "sign", "zeros"])
def test_changed_numbers_are_refused(copy, old, part, damage):
    before = values(copy)
    if old:
        make_old(copy)
    assert same(values(copy), before)  # a directory without digests loads
    path = copy / f"{NAME}.safetensors"
    if damage == "zeros":
        edit(path, lambda tensors: tensors[f"{NAME}.{part}"].view(-1)[:8].zero_())
    else:
        edit(path, poke(part, damage))
    with pytest.raises(FactorsError, match=f"{NAME}.safetensors is damaged"):
        Factors.load(copy)[NAME]


@pytest.mark.parametrize("old", [False, True], ids=["digest", "fingerprint"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rank", rank) for rank in (-5, 0, 3, 1000, None, 10**20)),
        ("shape", [3, 4]),
        ("runs", [16]),
        ("fingerprint", "0" * 64),
        ("file", "../x.safetensors"),
        ("file", "spectra.safetensors"),
        ("dtype", "bfloat16"),
    ],
)
def test_a_changed_record_is_refused(copy, old, key, value):
    if old:
        make_old(copy)
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    if key == "runs" and "runs" in manifest["matrices"][NAME]:
        value = manifest["matrices"][NAME]["runs"][:-1]
    manifest["matrices"][NAME][key] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(FactorsError, match=r"manifest\.json|safetensors"):
        values(copy)


def test_json_that_is_no_manifest_is_refused(copy):
    path = copy / "manifest.json"
    for depth in (100, 1000, 100_000):
        path.write_text('{"format": 1, "matrices": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(FactorsError, match=r"manifest\.json is not a manifest of factors: .*nested more than 64"):
            Factors.load(copy)
    for text, why in (
        ("9" * 5000, "digits"),
        ("[]", "list"),
        ('{"format": "\\ud800"}', "surrogate"),
        ("{", "Expecting"),
    ):
        path.write_text(text)
        with pytest.raises(FactorsError, match=f"not a manifest of factors: .*{why}"):
            Factors.load(copy)


def test_missing_runs_are_refused(model, tmp_path):
    decompose(model, tmp_path / "f", format="int8")
    path = tmp_path / "f" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["matrices"][NAME]["runs"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(FactorsError, match=r"runs is .* in it and missing in the manifest"):
        Factors.load(tmp_path / "f")[NAME]


def test_spectra_are_compared(copy):
    for old in (False, True):
        if old:
            make_old(copy)
        whole = (copy / "spectra.safetensors").read_bytes()
        edit(copy / "spectra.safetensors", poke("sigma", "sign"))
        with pytest.raises(FactorsError, match="spectra"):
            Factors.load(copy).sigmas[NAME]
        (copy / "spectra.safetensors").write_bytes(whole)


@pytest.mark.parametrize("old", [False, True], ids=["digest", "fingerprint"])
def test_decompose_makes_a_damaged_matrix_again(copy, model, old):
    format = "int8" if "int8" in (copy / "manifest.json").read_text() else None
    before = values(copy)
    if old:
        make_old(copy)
    for change in (poke("sigma", "nan"), poke("U", "sign"), poke("sketch", "nan")):
        (copy / "manifest.json").unlink()
        edit(copy / f"{NAME}.safetensors", change)
        with pytest.warns(UserWarning, match=f"{NAME} is decomposed again"):
            decompose(model, copy, format=format, workers=1)
        assert same(values(copy), before)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_mutation_gives_other_values_or_a_bare_error(copy, source, model, seed):
    """Random bytes, headers, manifests and numbers. T2Error, or the values that were written."""
    old, r = seed == 7, random.Random(seed)
    if old:
        make_old(copy)
    files = {
        p: p.read_bytes()
        for p in copy.iterdir()
        if p.name in ("manifest.json", "spectra.safetensors", f"{NAME}.safetensors")
    }
    before = values(copy)
    for i in range(150):
        path = r.choice(list(files))
        path.write_bytes(mutated(files[path], r))
        try:
            assert same(values(copy), before), (seed, i, path.name)
        except T2Error as e:
            str(e).encode()  # it can be printed
        path.write_bytes(files[path])


def mutated(data, r):
    kind = r.choice(["bytes", "bytes", "cut", "json", "json", "json", "number"])
    n = 0 if data[:1] == b"{" else 8 + struct.unpack("<Q", data[:8])[0]
    if kind == "cut":
        return data[: r.randrange(len(data))]
    if kind == "json":
        value = json.loads(data[8:n] if n else data)
        inside = value.get("__metadata__", {}) if n else {}
        if storage.MANIFEST_KEY in inside and r.random() < 0.7:
            manifest = json.loads(inside[storage.MANIFEST_KEY])
            inside[storage.MANIFEST_KEY] = json.dumps(mutated_json(manifest, r))
        else:
            value = mutated_json(value, r)
        text = json.dumps(value).encode()
        return struct.pack("<Q", len(text)) + text + data[n:] if n else text
    out = bytearray(data)
    if kind == "number" and n:
        at = n + 4 * r.randrange((len(out) - n) // 4)
        out[at : at + 4] = struct.pack("<f", r.choice([float("nan"), float("inf"), 0.0, -1.0, 1e30]))
    else:
        for _ in range(r.choice([1, 8, 64])):
            out[r.randrange(len(out))] = r.randrange(256)
    return bytes(out)


def mutated_json(value, r):
    """One value, somewhere in it, replaced or removed."""
    places = []

    def walk(item):
        for key in item if isinstance(item, dict) else range(len(item)):
            places.append((item, key))
            if isinstance(item[key], (dict, list)):
                walk(item[key])

    walk(value)
    if not places or r.random() < 0.03:
        return r.choice([*ODD, nested(300)]) if r.random() < 0.9 else [value]
    item, key = r.choice(places)
    if r.random() < 0.25:
        del item[key]
    else:
        item[key] = r.choice([*ODD, nested(300), [item[key]]])
    return value


def test_the_same_content_gives_the_same_bytes(tmp_path):
    script = (
        "import sys, torch; from t2kernels.storage import write_tensors; "
        "g = torch.Generator().manual_seed(0); t = {n: torch.rand(5, generator=g) for n in 'abcdef'}; "
        "write_tensors(sys.argv[1], t, {k: len(k) for k in {'x', 'yy', 'zzz', 'w'}})"
    )
    found = set()
    for seed in ("0", "1"):
        subprocess.run(
            [sys.executable, "-c", script, tmp_path / seed], check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        found.add((tmp_path / seed).read_bytes())
    for i in range(50):
        g = torch.Generator().manual_seed(0)
        tensors = {n: torch.rand(5, generator=g) for n in "abcdef"}
        order = random.Random(i).sample(sorted(tensors), len(tensors))
        storage.write_tensors(tmp_path / "again", {n: tensors[n] for n in order}, {"w": 1, "yy": 2, "zzz": 3, "x": 1})
        found.add((tmp_path / "again").read_bytes())
    assert len(found) == 1


def test_others_may_read_the_files_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        Factors({"m": svd(torch.randn(4, 3))}).save(tmp_path / "f")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "f").iterdir()} == {0o644}


def test_leftovers_of_dead_processes_are_removed_and_no_others(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, mine, other = (
        tmp_path / f".x.json.{n}{storage.TEMPORARY}"
        for n in (f"{dead.pid}.0123abcd", f"{os.getpid()}.0123abcd", "notes")
    )
    elsewhere = tmp_path / f".x.json.{dead.pid}.{'0' * 16}{storage.TEMPORARY}"  # of another machine: still at work
    for path in (left, mine, other, elsewhere):
        path.write_bytes(b"half")
    storage.write_json(tmp_path / "y.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        p.name for p in (mine, other, elsewhere, tmp_path / "y.json")
    )
    os.utime(mine, (1e9, 1e9))  # before this process began: another one had its number
    os.utime(elsewhere, (1e9, 1e9))
    storage.write_json(tmp_path / "y.json", {})
    assert not mine.exists()
    assert not elsewhere.exists()


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / ("x" * 300), tmp_path / "file" / "x", tmp_path / "a\0b", tmp_path / "\ud800"):
        with pytest.raises(OSError, match=r"could not write .*an older file there is untouched") as e:
            storage.write_json(path, {})
        assert isinstance(e.value, T2Error)


def test_svd_of_huge_and_tiny_weights():
    torch.manual_seed(0)
    A = torch.randn(6, 4, dtype=torch.float64)
    wanted = torch.linalg.svdvals(A)
    for size in (1e30, 1e-30, 1e-37):
        torch.testing.assert_close(svd(A * size).sigma.double() / size, wanted, rtol=1e-6, atol=0)
    for W in (torch.full((4, 4), 3e38), A * 1e200):
        with pytest.raises(T2Error, match=r"largest singular value is .* more than fp32 holds"):
            svd(W)
    factor = svd(torch.diag(torch.tensor([3e38, 1e38])))  # its squares overflow, its sigma does not
    torch.testing.assert_close(factor.dense(), torch.diag(torch.tensor([3e38, 1e38])), rtol=1e-6, atol=0)


def test_factors_that_are_not_finite_are_not_written(tmp_path):
    U, sigma, V = svd(torch.randn(4, 3))
    with pytest.raises(FactorsError, match="m: its factors hold NaN"):
        Factors({"m": (U.index_fill(0, torch.tensor(1), float("nan")), sigma, V)}).save(tmp_path / "f")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", "x"), ("hidden_act", "sil"), ("rope_parameters", [["default"]]), ("architectures", [3]),
        ("hidden_size", -40), ("head_dim", {}), ("vocab_size", 2**64), ("dtype", "x"), ("tie_word_embeddings", [1]),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_model_is_named(field, value, tmp_path):
    """transformers checks few fields of a config; others fail within the model, as KeyError, TypeError and so on."""
    build("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(T2Error, match=r"config\.json is not a config|has no model for"):
        decompose(str(tmp_path), rank=2)
