"""Experts on the hub, with a stand-in for its HTTP API."""

import re

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http

import t2kernels as t2
from t2kernels import HubError, tiny
from t2kernels.experts.exchange.hub import address, card
from tests.helpers.commandline import t2_, wide  # noqa: F401
from tests.helpers.hub import Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in, with a cache and a token of its own, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.close()


@pytest.fixture
def math():
    return t2.Expert.load(tiny.experts()["math"])


def test_an_expert_goes_to_the_hub_and_comes_back(hub, math, monkeypatch):
    assert math.push_to_hub("user/math") == f"{hub.url}/user/math"
    files = hub.files("user/math")
    assert {"expert.safetensors", "README.md"} <= set(files)
    assert files["expert.safetensors"] == tiny.experts()["math"].read_bytes()
    back = t2.Expert.load("user/math")
    assert back == math
    assert back.manifest == math.manifest
    math.truncate(3).push_to_hub("user/math", "short")
    assert t2.Expert.load("user/math:short") == t2.Expert.load("user/math:short.safetensors") == math.truncate(3)
    assert hub.files("user/math")["README.md"] == files["README.md"]
    first = list(hub.repos["user/math"])[1]
    changed = t2.Expert({n: z + 0.1 for n, z in math.z.items()}, math.manifest)
    changed.push_to_hub("user/math")
    assert t2.Expert.load("user/math") == changed
    assert t2.Expert.load("user/math", revision=first) == math


def test_without_a_network_the_cache_is_used_and_the_rest_fails_at_once(hub, math, monkeypatch):
    math.push_to_hub("user/math")
    t2.Expert.load("user/math")
    hub.close()
    waits = []
    monkeypatch.setattr(_http.time, "sleep", waits.append)
    assert t2.Expert.load("user/math") == math
    with pytest.raises(HubError, match=r"user/other:expert\.safetensors.*cannot be reached.*not downloaded before"):
        t2.Expert.load("user/other")
    with pytest.raises(HubError, match=r"not uploaded, .*cannot be reached"):
        math.push_to_hub("user/other")
    assert not waits, "the hub's client would try for half a minute"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert t2.Expert.load("user/math") == math
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        t2.Expert.load("user/math:short")


def test_what_the_hub_does_not_have_or_refuses(hub, math, monkeypatch):
    hub.commit("user/empty", {"README.md": b"text"})
    with pytest.raises(HubError, match=r"user/none:expert\.safetensors"):
        t2.Expert.load("user/none")
    with pytest.raises(HubError, match=r"user/empty:expert\.safetensors"):
        t2.Expert.load("user/empty")
    with pytest.raises(HubError, match="nowhere"):
        t2.Expert.load("user/empty", revision="nowhere")
    hub.commit("user/pickle", {"expert.safetensors": b"\x80\x04."})
    with pytest.raises(t2.ExpertError, match="pickle"):
        t2.Expert.load("user/pickle")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="not uploaded"):
        math.push_to_hub("user/math")
    assert "user/math" not in hub.repos
    for repo, file in [("math", "expert"), ("a/b/c", "expert"), ("user/math", "../expert"), ("user/math", "")]:
        with pytest.raises(t2.T2Error, match="wanted a repository"):
            math.push_to_hub(repo, file)


def test_paths_stay_paths(tmp_path, hub, math):
    math.save(tmp_path / "experts" / "math")
    assert t2.Expert.load("experts/math") == math
    (tmp_path / "user").mkdir()
    for missing in ("experts/other", "user/math", "./a/b", "/a/b", "a/b/c", "other", "~/a"):
        with pytest.raises(t2.ExpertError):
            t2.Expert.load(missing)
    assert not hub.requests
    assert address("user/math") is None
    assert address("user/math:a") == ("user/math", "a.safetensors")
    assert address("other/math") == ("other/math", "expert.safetensors")
    assert address("other/math:sub/a.safetensors") == ("other/math", "sub/a.safetensors")
    assert [address(t) for t in ("a:b", "a/b:../c", "a/b:/c", "a/b:c/../d", "mix:a=1", "a/b:")] == [None] * 6


def test_the_card_says_what_the_manifest_knows(math):
    text = card({**math.manifest, "base_model": "org/base"}, math.ranks, "user/math", "expert.safetensors")
    assert text.startswith("---\n")
    assert 'base_model: "org/base"' in text
    assert "| task | math |" in text
    assert "| accuracy | 99.7% on 1,000 problems; the base model 62.4% |" in text
    assert "| numbers | 3,584 in 28 matrices |" in text
    assert "| rank | 128 |" in text
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert code.count("\n") == 5
    compile(code, "card", "exec")
    assert "bank.add(\"mine\", 'user/math')" in code
    odd = card({"name": "a|b\n<script>", "base_model": 'x"\n---'}, {"m": 3}, "user/odd", "b.safetensors")
    assert "<script>" not in odd
    assert "user/odd:b.safetensors" in odd
    compile(re.search(r"```python\n(.*?)```", odd, re.S)[1], "card", "exec")
    assert odd.split("---\n")[1].count("base_model") == 0


def test_the_command_line_pushes_and_takes_experts_of_the_hub(hub, math):
    assert f"{hub.url}/user/math" in t2_("push", "math", "user/math")
    t2_("push", "mix:math=.5,code=.5", "user/experts", "--file", "both")
    both = t2.Expert.load("user/experts:both")
    assert torch.equal(
        both.z["model.layers.0.mlp.up_proj"],
        t2.Expert.mix([(math, 0.5), (t2.Expert.load(tiny.experts()["code"]), 0.5)]).z["model.layers.0.mlp.up_proj"],
    )
    text = t2_("generate", "12+7=", "-e", "user/math", "-e", "user/experts:both", "--max-new-tokens", "4")
    assert "math" in text
    assert "both" in text
    hub.close()
    assert "cannot be reached" in t2_("generate", "12+7=", "-e", "user/none", code=1)
    assert "cannot be reached" in t2_("push", "math", "user/none", code=1)
