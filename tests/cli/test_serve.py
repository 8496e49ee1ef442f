"""`t2 serve`: which engine it starts with what, and what it refuses before it loads a model."""

import logging
import socket
import sys
from types import ModuleType

import pytest
import torch

import t2kernels as t2
from t2kernels import tiny
from t2kernels.cli.verbs import serve
from tests.helpers.commandline import t2_, wide  # noqa: F401


@pytest.fixture
def vllm(monkeypatch):
    """A vLLM that is installed, and what its server was started with."""
    calls = []
    launch = ModuleType("t2kernels.integrations.vllm.server.launch")
    launch.serve = lambda *args, **kwargs: calls.append((args, kwargs))
    server = ModuleType("t2kernels.integrations.vllm.server")
    server.launch = launch
    monkeypatch.setitem(sys.modules, server.__name__, server)
    monkeypatch.setattr(serve, "vllm_is_installed", lambda: True)
    return calls


@pytest.mark.parametrize("engine", [(), ("--engine", "vllm")])
def test_vllm_is_taken_where_it_is(vllm, engine, tmp_path):
    tiny_experts = tiny.experts()
    (tmp_path / "math.safetensors").write_bytes(tiny_experts["math"].read_bytes())
    t2_("serve", "tiny", *engine)
    t2_(
        "serve",
        "some/model",
        "--experts",
        tmp_path,
        "--factors",
        "f",
        "--rank",
        8,
        "--form",
        "delta",
        "--rows",
        5,
        "--option=--x=1",
        "--port",
        7,
        *engine,
    )
    common = {"host": "127.0.0.1", "api_key": None}
    assert vllm[0] == ((str(tiny.path()), tiny_experts), {**common, "port": 8000, "factors": None, "options": ()})
    named = {"math": tmp_path / "math.safetensors"}
    assert vllm[1] == (("some/model", named), {**common, "port": 7, "factors": "f", "options": ("--x=1",), "rows": 5})


@pytest.mark.parametrize(
    "option", ["--kv-tokens=500", "--route=prompt", "--drain=3", "--dtype=bf16", "--max-upload=2", "--targets=mlp"]
)
def test_vllm_is_not_given_what_it_would_ignore(vllm, option):
    assert f"{option.partition('=')[0]} is for --engine transformers" in t2_("serve", "tiny", option, code=1)
    assert not vllm


def test_what_cannot_be_served_is_said_at_once(tmp_path):
    for args, words in (
        (["--engine", "other"], "expected one of auto, transformers, vllm"),
        (["--engine", "vllm"], "vllm is not installed"),
        (["--experts", tmp_path / "nowhere"], "no such directory"),
        (["--option=--x"], "--option is for --engine vllm"),
        (["--log-level", "loud"], "--log-level loud: expected one of debug, info, warning, error"),
        (["--chat-template", tmp_path / "nothing"], "No such file"),
    ):
        assert words in t2_("serve", "tiny", *args, code=1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another with --host and --port" in t2_("serve", "tiny", "--port", taken.getsockname()[1], code=1)
    (tmp_path / "bad.safetensors").write_bytes(b"no expert")
    assert "bad.safetensors" in t2_("serve", "tiny", "--port", 0, "--experts", tmp_path, code=1)


def test_an_expert_of_another_model_is_named_before_the_model_is_patched(tmp_path, monkeypatch):
    pytest.importorskip("fastapi")
    other = t2.Expert({"model.layers.0.mlp.up_proj": torch.ones(3), "model.layers.99.mlp.up_proj": torch.ones(3)})
    other.manifest["base_model"] = "somebody/another-model"
    other.save(tmp_path / "other")
    monkeypatch.setattr(serve.models, "patch", lambda *args, **kwargs: pytest.fail("it was patched"))
    said = t2_("serve", "tiny", "--port", 0, "--engine", "transformers", "--experts", tmp_path, code=1)
    assert "other.safetensors" in said
    assert "trained on somebody/another-model" in said
    assert "the model is 'tiny'" in said


def test_levels_of_the_log():
    server = pytest.importorskip("t2kernels.serve.server")
    loggers = [logging.getLogger(name) for name in ("t2kernels", "uvicorn")]
    kept = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    try:
        for i, level in enumerate(server.LEVELS):
            server.log_to_stderr(level)
            log = logging.getLogger("t2kernels.serve")
            shown = [x for x in server.LEVELS if log.isEnabledFor(getattr(logging, x.upper()))]
            assert shown == list(server.LEVELS[i:])
            assert not logging.getLogger("uvicorn.access").isEnabledFor(logging.DEBUG)
    finally:
        for logger, logger.handlers, least, logger.propagate in kept:
            logger.setLevel(least)
