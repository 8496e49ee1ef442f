"""Files of experts that were damaged, odd manifests, names that become files, and forks of a bank in use."""

import json
import os
import random
import struct
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import t2kernels as t2
from t2kernels import storage
from t2kernels.experts import sakana
from t2kernels.experts.names import check_name
from t2kernels.train import trainer_state
from tests.helpers.families import build

NAMES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
BAD = ("", ".", "..", "../x", "/abs", "a/b", "a\\b", "a\0b", "x" * 300, "x" * 65, "\ud800", " ", "a b", "-rf", "math\n")
ODD = (None, [], {}, "", 0, -5, True, "x", 1.5, [None], {"a": 1}, 2**64, 10**400, "\ud800")


@pytest.fixture
def expert():
    torch.manual_seed(0)
    z = {n: 1 + 0.1 * torch.randn(8) for n in NAMES}
    facts = {"name": "math", "base_model": "m", "fingerprints": dict.fromkeys(NAMES, "0" * 64), "task": "math"}
    return t2.Expert(z, facts, {n: torch.randn(8) for n in NAMES})


@pytest.fixture
def bank():
    torch.manual_seed(0)
    return t2.patch_model(build("llama"), form="delta", rank=4, rows=4, targets="mlp")


def draw(bank):
    return bank.expert({n: 1 + 0.1 * torch.randn(k) for n, k in bank.matrices.items()})


def test_another_number_is_refused(expert, tmp_path):
    path = expert.save(tmp_path / "a")
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for at in (start, start + 5, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(t2.ExpertError, match=r"a\.safetensors: it is damaged.*sha256"):
            t2.Expert.load(path)
    path.write_bytes(whole.replace(b'\\"base_model\\": \\"m\\"', b'\\"base_model\\": \\"n\\"'))
    with pytest.raises(t2.ExpertError, match="sha256"):
        t2.Expert.load(path)


def test_a_file_without_a_digest_loads(expert, tmp_path):
    path = expert.save(tmp_path / "a")
    with safe_open(path, "pt") as f:
        metadata, tensors = dict(f.metadata()), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    del metadata[storage.DIGEST_KEY]
    save_file(tensors, path, metadata=metadata)
    assert t2.Expert.load(path) == expert
    assert t2.Expert.load(path).manifest == t2.Expert.load(expert.save(tmp_path / "b")).manifest


def test_a_file_whose_digest_lost_its_name_is_refused(expert, tmp_path):
    """Damage of both the digest's key and a number passed as a file of an older version."""
    path = expert.save(tmp_path / "a")
    whole = path.read_bytes().replace(b'"t2kernels.digest"', b'"t2ker?els.digest"')
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(t2.ExpertError, match=r"a\.safetensors: it is damaged"):
        t2.Expert.load(path)
    with pytest.raises(storage.FileError, match=r"t2ker\?els\.digest"):
        storage.verify(path)


def outcome(path):
    """The message that refuses a file; "" if it can be used. Anything but our own errors passes through."""
    try:
        loaded = t2.Expert.load(path)
        repr(loaded)
        loaded.check({n: torch.ones(8) for n in NAMES}, fingerprints=dict.fromkeys(NAMES, "1" * 64))
    except t2.ExpertMismatch:
        return ""
    except t2.ExpertError as e:
        return str(e).encode().decode()
    return ""


@pytest.mark.parametrize("key", ["name", "base_model", "fingerprint", "fingerprints", "created_by"])
def test_a_manifest_of_odd_kinds_is_refused_by_key(expert, tmp_path, key):
    refused = 0
    for value in (*ODD, {"a": {"b": [1]}}, [[[[]]]]):
        metadata = {"t2kernels": json.dumps({**expert.manifest, "format": 1, key: value})}
        save_file({f"{n}.z": v for n, v in expert.z.items()}, tmp_path / "a.safetensors", metadata=metadata)
        said = outcome(tmp_path / "a")
        refused += bool(said)
        assert not said or ("a.safetensors" in said and any(w in said for w in (key, "surrogate", "digits"))), said
    assert refused > 8


@pytest.mark.parametrize("seed", [20261128, 7, 99])
def test_no_mutation_gives_another_expert_or_a_bare_error(expert, tmp_path, seed):
    r, path = random.Random(seed), expert.save(tmp_path / "a")
    whole = path.read_bytes()
    for i in range(400):
        damaged = bytearray(whole)
        kind = r.randrange(4)
        if kind == 0:
            damaged = damaged[: r.randrange(len(damaged))]
        elif kind == 1:
            at = r.randrange(len(damaged))
            damaged[at:at] = bytes(r.randrange(256) for _ in range(r.choice([1, 8])))
        else:
            for _ in range(r.choice([1, 4, 32])):
                damaged[r.randrange(len(damaged))] = r.randrange(256)
        path.write_bytes(damaged)
        try:
            assert t2.Expert.load(path) == expert, (seed, i)
        except t2.ExpertError as e:
            str(e).encode()


def test_a_manifest_that_cannot_be_read_again_is_not_saved(expert, tmp_path):
    deep: list = []
    for _ in range(1000):
        deep = [deep]
    loop: list = []
    loop.append(loop)
    for value in (deep, loop, "\ud800", {1, 2}, object()):
        with pytest.raises(t2.ExpertError, match="not saved"):
            t2.Expert(expert.z, {"x": value}).save(tmp_path / "a")
    with pytest.raises(t2.ExpertError, match="not saved: fingerprints is"):
        t2.Expert(expert.z, {"fingerprints": [1]}).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_saving_twice_gives_the_same_bytes(expert, tmp_path):
    found = {expert.save(tmp_path / f"{i}").read_bytes() for i in range(50)}
    for seed in ("0", "1"):
        script = "import sys, t2kernels as t2; t2.Expert.load(sys.argv[1]).save(sys.argv[2])"
        command = [sys.executable, "-c", script, tmp_path / "0", tmp_path / "other"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        found.add((tmp_path / "other.safetensors").read_bytes())
    assert len(found) == 1


def test_a_file_that_is_replaced_while_it_is_read_is_one_of_the_two(expert, tmp_path):
    other = t2.Expert({n: v + 1 for n, v in expert.z.items()}, {**expert.manifest, "name": "a longer name"})
    expert.save(tmp_path / "a")
    done = threading.Event()

    def write():
        for i in range(150):
            (other, expert)[i % 2].save(tmp_path / "a")
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        assert t2.Expert.load(tmp_path / "a") in (expert, other)
    thread.join()


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_names_that_cannot_be_a_file_are_refused(bank, tmp_path, name):
    for use in (lambda: bank.add(name, draw(bank)), lambda: bank.start_training(name), lambda: check_name(name)):
        with pytest.raises(ValueError, match="cannot be called") as e:
            use()
        assert isinstance(e.value, t2.T2Error)
        str(e.value).encode()
    with pytest.raises(t2.T2Error, match="cannot be called"):
        trainer_state.save(tmp_path / "c", {name: draw(bank)}, {}, "raw")
    assert len(bank) == 0
    assert not list(tmp_path.iterdir())


def test_two_names_of_one_file_are_not_saved(bank, tmp_path):
    bank.add("Math", draw(bank))
    bank.add("math", draw(bank))
    with pytest.raises(t2.T2Error, match="'Math' and 'math' differ only in case"):
        bank.save(tmp_path)
    assert not list(tmp_path.iterdir())
    bank.remove("Math")
    bank.add("math@2", draw(bank))  # versions, as a server keeps them
    assert [p.name for p in bank.save(tmp_path)] == ["math.safetensors", "math@2.safetensors"]
    assert bank.ids({"math": 0.5, "math@2": 0.5}).shape == ()
    bank.save(tmp_path)  # over its own files
    bank.remove("math")
    bank.add("MATH", draw(bank))
    before = (tmp_path / "math.safetensors").read_bytes()
    with pytest.raises(t2.T2Error, match="'math' and 'MATH' differ only in case"):
        bank.save(tmp_path)
    assert (tmp_path / "math.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_that_was_changed_is_refused(bank, tmp_path):
    parameters = {n: torch.nn.Parameter(torch.randn(k)) for n, k in bank.matrices.items()}
    trainer_state.save(tmp_path, {"a": draw(bank)}, {"a": parameters}, "raw")
    path = tmp_path / trainer_state.PARAMETERS

    def load():
        found = {n: torch.nn.Parameter(torch.zeros_like(p)) for n, p in parameters.items()}
        trainer_state.load(tmp_path, "a", found, "raw", bank.check)
        return found

    assert all(torch.equal(p, parameters[n]) for n, p in load().items())
    with safe_open(path, "pt") as f:
        metadata, tensors = dict(f.metadata()), {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118
    first = next(iter(tensors))
    other = {**tensors, first: tensors[first] + 1}
    save_file(other, path, metadata=metadata)
    with pytest.raises(trainer_state.CheckpointError, match=r"parameters\.safetensors is damaged: .*sha256"):
        load()
    del metadata[storage.DIGEST_KEY]
    save_file(tensors, path, metadata=metadata)  # of an older version
    assert all(torch.equal(p, parameters[n]) for n, p in load().items())
    save_file({**tensors, first: tensors[first] * float("nan")}, path, metadata=metadata)
    with pytest.raises(trainer_state.CheckpointError, match="NaN"):
        load()
    for facts in (None, [], {}, {"experts": 3, "parametrisation": "raw"}, {"experts": ["a"]}, {"experts": [None]}):
        save_file(tensors, path, metadata={"t2kernels": json.dumps(facts)})
        with pytest.raises(t2.ExpertError, match=r"parameters\.safetensors"):
            load()


def test_release_files_of_expanded_or_broken_tensors_are_refused_at_once(tmp_path):
    path = tmp_path / "x.pt"
    huge = torch.zeros(1).expand(10**12)  # 4 TB if anything looked at its values
    sigmas = {f"model.layers.0.mlp.{n}": torch.ones(8) for n in sakana.MLP_ORDER}
    torch.save({f"learnable_params_module_list.{i}": huge for i in range(3)}, path)
    with pytest.raises(t2.ExpertError, match="expanded view of 4 bytes"):
        t2.Expert.from_sakana(path, sigmas)
    good = {"U": torch.eye(4), "S": torch.ones(4), "V": torch.eye(4)}
    key = "model.layers.0.mlp.up_proj.weight"

    def factors(**parts):
        torch.save({f"{key}.{k}": t for k, t in {**good, **parts}.items()}, path)
        return sakana.load_factors(path)

    assert factors()[key.removesuffix(".weight")].rank == 4
    whole = path.read_bytes()
    path.write_bytes(whole.replace(struct.pack("<4f", 1, 1, 1, 1), struct.pack("<4f", 1, 1, 2, 1)))
    with pytest.raises(t2.ExpertError, match=r"checksum of its part .* is wrong"):
        sakana.load_factors(path)
    for part in "USV":
        for bad in (float("nan"), float("inf")):
            with pytest.raises(t2.ExpertError, match=rf"{part} holds NaN or infinity"):
                factors(**{part: good[part] * bad})
    with pytest.raises(t2.ExpertError, match="expanded view"):
        factors(U=torch.zeros(1, 1).expand(10**6, 10**6))
    with pytest.raises(t2.ExpertError, match="wanted U"):
        factors(S=torch.ones(3))
    few = {
        f"weights_{k}_k_model_layers_0_mlp_{n}_weight": torch.ones(8 - k) for k in range(2) for n in sakana.MLP_ORDER
    }
    torch.save({**few, "adaptive_weights": torch.ones(2, 1)}, path)
    with pytest.raises(t2.ExpertError, match="differ in length"):
        t2.Expert.from_sakana(path, sigmas)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_the_bank_is_locked_does_not_hang(bank):
    bank.add("a", draw(bank))
    held, done = threading.Event(), threading.Event()

    def hold():
        with bank._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        ok = "a" in bank and bank.pin(["a"]) == [1]
        os._exit(0 if ok else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    with bank._lock:  # the thread that forks may hold the lock itself
        child = os.fork()
        if child == 0:
            bank.names  # noqa: B018
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
