"""The parts of a server that need no server: sampling, text, experts and their files, limits, requests of the API."""

import asyncio
import contextlib
import math
import shutil

import pytest
import torch

import t2kernels as t2

pytest.importorskip("fastapi")
from pydantic import ValidationError

from t2kernels import tiny
from t2kernels.serve.engine.sampling import Sampling, draw
from t2kernels.serve.experts.folder import ExpertFolder, load
from t2kernels.serve.experts.registry import ExpertRegistry
from t2kernels.serve.http.errors import APIError
from t2kernels.serve.http.limits import LimitBody, RequireKey
from t2kernels.serve.http.protocol import ChatRequest, CompletionRequest
from t2kernels.serve.http.text import Decoder

# --- sampling


def test_greedy_rows_are_not_touched_by_others():
    logits = torch.randn(50, 30)
    ways = [Sampling(0.0) if i % 2 else Sampling(1.0, seed=i) for i in range(50)]
    tokens = draw(logits, ways)
    assert torch.equal(tokens[1::2], logits[1::2].argmax(-1))
    assert not torch.equal(tokens[::2], logits[::2].argmax(-1))


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.5, 0.8, 0), (1.0, 1.0, 3), (1.0, 0.5, 4)]
)
def test_tokens_come_as_often_as_they_should(temperature, top_p, top_k):
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, 1.2, -3.0])
    p = torch.softmax(logits.double() / temperature, -1)
    order = sorted(range(6), key=lambda i: -p[i])
    kept, total = [], 0.0
    for i in order[: top_k or 6]:
        kept.append(i)
        total += float(p[i])
        if total >= top_p:
            break
    wanted = torch.zeros(6, dtype=torch.float64)
    wanted[kept] = p[kept] / p[kept].sum()
    n, ways = 20000, Sampling(temperature, top_p, top_k, seed=1)
    counts = torch.bincount(draw(logits.expand(n, -1), [ways] * n), minlength=6) / n
    assert (
        (counts - wanted).abs() <= 4 * (wanted * (1 - wanted) / n).sqrt() + 1e-12
    ).all()  # four standard errors; none of what is cut


def test_logprobs_are_the_models():
    logits, ways = torch.randn(3, 9), [Sampling(0.5, seed=1, logprobs=2), Sampling(), Sampling(0.0, logprobs=0)]
    tokens = draw(logits, ways)
    log_p = torch.log_softmax(logits, -1)
    own, top = ways[0].reported[0]
    assert own == pytest.approx(log_p[0, tokens[0]].item(), abs=1e-6)
    assert [t for t, _ in top] == log_p[0].topk(2).indices.tolist()
    assert [v for _, v in top] == pytest.approx(log_p[0].topk(2).values.tolist(), abs=1e-6)
    assert ways[2].reported == [(pytest.approx(log_p[2].max().item(), abs=1e-6), [])]


# --- text


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8, so that characters take several."""

    def decode(self, tokens, **_):
        return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_text_comes_whole_in_whatever_pieces(size):
    text = "a→ü🙂bé and then some plain text 🙂"
    tokens, decoder = list(text.encode()), Decoder(Bytes())
    parts = [decoder.feed(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    assert "".join(parts) + decoder.finish() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("stops", "wanted", "stopped"),
    [(["END"], "some E EN ", True), (["zz", "EN "], "some E ", True), (["ENDE"], None, False)],
)
def test_text_ends_before_the_first_stop_string(size, stops, wanted, stopped):
    text = "some E EN END more EN"
    tokens, decoder, out = list(text.encode()), Decoder(Bytes(), stops), ""
    for i in range(0, len(tokens), size):
        out += decoder.feed(tokens[i : i + size])
        assert (wanted or text).startswith(out)  # nothing is said that is taken back later
    out += decoder.finish()
    assert (out, decoder.stopped) == (wanted or text, stopped)


# --- experts


@pytest.fixture
def experts(tmp_path):
    model, _ = tiny.load()
    bank = t2.patch_model(model, rank=4, rows=4)
    return ExpertRegistry(bank, ("tiny",))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "experts").mkdir()
    return ExpertFolder(tmp_path / "experts")


def small(bank, seed=0, **manifest):
    torch.manual_seed(seed)
    return bank.expert({n: 1 + 0.1 * torch.randn(k) for n, k in bank.matrices.items()}, **manifest)


def test_a_name_changes_its_meaning_at_once_and_requests_keep_what_they_took(experts):
    bank, old, new = experts.bank, small(experts.bank, 1), small(experts.bank, 2)
    experts.publish(experts.admit("math", old))
    first, again = experts.choose("math"), experts.choose("math")
    mixed = experts.choose("mix:math=0.25,tiny=0.5")
    experts.publish(experts.admit("math", new))
    second = experts.choose("math")
    assert first.expert == again.expert != second.expert
    assert first.fingerprint != second.fingerprint
    assert mixed.expert == {first.expert: 0.25}
    name = next(iter(bank.matrices))
    assert torch.equal(bank[first.expert].z[name], old.z[name])
    assert torch.equal(bank[second.expert].z[name], new.z[name])
    experts.remove("math")
    with pytest.raises(APIError, match="does not exist"):
        experts.choose("math")
    assert len(bank) == 2
    experts.release(second)
    experts.release(first)
    experts.release(mixed)
    assert len(bank) == 1
    experts.release(again)
    experts.release(again)
    assert len(bank) == 0


def test_loads_and_evictions_stay_with_names_and_names_that_go_do_not_pile_up(experts):
    """Three rows. What is counted adds up to what the bank counts, and is kept for no more names than there are."""
    bank = experts.bank

    def loaded(chosen):
        bank.ids(chosen.expert)
        return chosen

    def ran(model):
        experts.release(loaded(experts.choose(model)))

    for i in range(4):
        experts.publish(experts.admit(f"e{i}", small(bank, i)))
    assert experts.counts.loads == {f"e{i}": 1 for i in range(3)}
    ran("e3")
    ran("mix:e0=0.5,e1=0.5")
    ran("mix:e0=0.5,e1=0.25")
    assert experts.counts.loads == {**{f"e{i}": 1 for i in range(4)}, "mix": 2}
    assert experts.counts.evictions == {"e0": 1, "e1": 1, "e2": 1}
    held = experts.choose("e0")
    experts.publish(experts.admit("e0", small(bank, 7)))
    loaded(held)  # the older version, while its name stands for another
    ran("e0")
    assert experts.counts.loads["e0"] == 3
    experts.release(held)
    assert experts.counts.loads["e0"] == 3
    held = experts.choose("e1")
    experts.remove("e1")
    assert (experts.counts.loads["e1"], experts.counts.loads["removed"]) == (0, 1)
    loaded(held)  # for a request that goes on
    assert (experts.counts.loads["e1"], experts.counts.loads["removed"]) == (0, 2)
    experts.release(held)
    new = experts.admit("new", small(bank, 8))
    loads = bank.loads
    bank.ids(new.key)
    assert bank.loads == loads  # it has a row
    assert "new" not in experts.counts.loads
    assert experts.counts.loads["removed"] == 2  # never less than what it was: it is a counter
    experts.discard(new.key)
    assert experts.counts.loads["removed"] == 3
    for i in range(20):
        for name in (f"f{i}", f"f{i}", "e2"):
            experts.publish(experts.admit(name, small(bank, i)))
            ran(name)
        experts.remove(f"f{i}")
        assert sum(experts.counts.loads.values()) == bank.loads
        assert sum(experts.counts.evictions.values()) == bank.evictions
    assert set(experts.counts.loads) == {"e0", "e2", "e3", "mix", "removed"}
    assert len(experts.counts) <= 5 + len(bank)
    assert not experts.counts.hidden


@pytest.mark.parametrize(
    "name",
    [
        "",
        "base",
        "tiny",
        "auto",
        "mix",
        "none",
        "removed",
        "../x",
        "a/b",
        ".x",
        "x" * 65,
        "ü",
        "a b",
        "x.safetensors",
        "mix:a=1",
        7,
        None,
    ],
)
def test_names_that_are_none(experts, name):
    with pytest.raises(APIError, match="cannot name an expert"):
        experts.check_name(name)


@pytest.mark.parametrize(
    "model", ["mix:", "mix:math", "mix:math=x", "mix:math=nan", "mix:math=1e9", "mix:math=.5,math=.5", "mix:=1"]
)
def test_mixtures_that_are_none(experts, model):
    experts.publish(experts.admit("math", small(experts.bank)))
    with pytest.raises(APIError, match="wanted mix:NAME=WEIGHT"):
        experts.choose(model)
    assert experts.current["math"].users == 1


def test_files_are_inside_the_folder_or_refused(experts, files, tmp_path):
    inside = small(experts.bank).save(files.path / "good")
    outside = small(experts.bank).save(tmp_path / "outside")
    (files.path / "link.safetensors").symlink_to(outside)
    (files.path / "folder.safetensors").mkdir()
    assert files.file("good.safetensors") == inside
    for name in (
        "../outside.safetensors",
        "/etc/passwd",
        str(outside),
        "good",
        ".safetensors",
        "",
        "a\0.safetensors",
        "sub/good.safetensors",
        "x" * 5000 + ".safetensors",
    ):
        with pytest.raises(APIError, match="bare name"):
            files.file(name)
    with pytest.raises(APIError, match="links are not followed"):
        files.file("link.safetensors")
    for name in ("absent.safetensors", "folder.safetensors"):
        with pytest.raises(APIError) as missing:
            files.file(name)
        assert missing.value.status_code == 404
    (files.path / "folder.safetensors").rmdir()
    with pytest.raises(ValueError, match=r"link\.safetensors: .*links are not followed"):  # when the server starts, too
        files.load_all(experts)


def test_a_folder_with_two_names_that_differ_only_in_case_is_not_served(experts, files):
    small(experts.bank).save(files.path / "math")
    small(experts.bank).save(files.path / "Math")
    if len(list(files.path.iterdir())) == 1:
        pytest.skip("this file system ignores case")
    with pytest.raises(ValueError, match=r"'Math'.*'math' differs from it only in case"):
        files.load_all(experts)


def test_what_is_no_expert_of_this_model_changes_nothing(experts, files):
    other, _ = tiny.load()
    other.model.layers[0].mlp.up_proj.weight.data.normal_()
    stranger = small(t2.patch_model(other, rank=4)).save(files.path / "stranger")
    good = small(experts.bank).save(files.path / "good")
    cut = files.path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:1000])
    pickle = files.path / "pickle.safetensors"
    torch.save({"z": torch.ones(3)}, pickle)
    for path, words in ((stranger, "of another model"), (cut, "truncated|damaged"), (pickle, "pickle")):
        with pytest.raises(APIError, match=words) as refused:
            load(experts, "x", path)
        assert refused.value.status_code == 400
        assert str(files.path) not in refused.value.message
        assert "x@" not in refused.value.message
    assert (len(experts.bank), experts.current, experts.epoch) == (0, {}, 0)
    shutil.rmtree(files.path)


# --- before the API


def ask(app, path="/v1/x", headers=(), body=(b"",)):
    """The status and the body that an ASGI application answers with."""
    said = []

    async def main():
        parts = [{"type": "http.request", "body": b, "more_body": i + 1 < len(body)} for i, b in enumerate(body)]

        async def receive():
            return parts.pop(0)  # IndexError: more was read than was sent

        async def send(message):
            said.append(message)

        await app({"type": "http", "path": path, "method": "POST", "headers": list(headers)}, receive, send)

    asyncio.run(main())
    return said[0]["status"], said[-1]["body"]


async def reads_all(scope, receive, send):
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.mark.parametrize(
    "given", [None, b"Bearer wrong", b"secret", b"Basic secret", b"Bearer ", b"Bearer secret2", b"Bearer \xff"]
)
def test_without_the_key_nothing_is_answered(given):
    app = RequireKey(reads_all, "secret")
    headers = [] if given is None else [(b"authorization", given)]
    status, body = ask(app, headers=headers)
    assert status == 401
    assert b"invalid_api_key" in body
    assert ask(app, headers=[(b"authorization", b"bearer secret")])[0] == 200
    assert ask(app, "/health", headers)[0] == 200
    assert ask(app, "/metrics", headers)[0] == 200


def test_bodies_are_limited_by_what_they_announce_and_by_what_comes():
    app = LimitBody(reads_all, most=10, uploads=20)
    assert ask(app, body=(b"12345", b"67890")) == (200, b"10")
    assert ask(app, headers=[(b"content-length", b"11")])[0] == 413
    assert ask(app, headers=[(b"content-length", b"-1")])[0] == 413
    assert ask(app, "/v1/experts", body=(b"1" * 20,)) == (200, b"20")
    with pytest.raises(APIError) as refused:  # which the application's handler turns into an answer
        ask(app, body=(b"12345", b"678901"))
    assert refused.value.status_code == 413


def test_a_body_that_is_too_long_is_read_before_it_is_refused():
    """Or the connection would be reset under the answer."""
    left = []
    app = LimitBody(reads_all, most=10, uploads=20)
    for headers in ([(b"content-length", b"40")], []):
        parts = [b"1" * 8] * 5  # bytes of a body, in pieces

        async def receive(parts=parts):
            body = parts.pop()
            return {"type": "http.request", "body": body, "more_body": bool(parts)}

        async def send(message):
            left.append(len(parts))  # noqa: B023 (called before the next round)

        with contextlib.suppress(APIError):
            asyncio.run(app({"type": "http", "path": "/v1/x", "method": "POST", "headers": headers}, receive, send))
        assert parts == []
    assert set(left) == {0}


# --- requests


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1}, {"temperature": math.nan}, {"top_p": 0}, {"n": 0}, {"max_tokens": 0}, {"stop": ["a", ""]},
        {"logit_bias": {"1": 101}}, {"logit_bias": {"a": 1}}, {"frequency_penalty": 2.5}, {"presence_penalty": -3},
        {"repetition_penalty": 0}, {"min_p": 1.5}, {"top_k": -2}, {"tools": [{}]}, {"tool_choice": "required"},
        {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}},
        {"guided_json": {}, "guided_regex": "a"}, {"guided_regex": "a", "ignore_eos": True},
        {"logprobs": False, "top_logprobs": 2}, {"top_logprobs": 21, "logprobs": True}, {"messages": []},
        {"stream_options": {"include_usage": True}}, {"surprise": 1}, {"functions": [{}]}, {"prompt_logprobs": 1},
        {"reasoning_effort": "low"}, {"use_beam_search": True}, {"echo": True}, {"store": True}, {"suffix": "x"},
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused(fields):
    good = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    ChatRequest(
        **good,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        tools=[],
        user="u",
        response_format={"type": "text"},
    )
    with pytest.raises(ValidationError):
        ChatRequest(**{**good, **fields})


def test_prompts_of_completions():
    def prompts(prompt):
        return CompletionRequest(model="m", prompt=prompt).prompts()

    assert prompts("ab") == ["ab"]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]]
    assert prompts([[1], [2, 3]]) == [[1], [2, 3]]
    for wrong in (
        {"prompt": []},
        {"prompt": "x", "max_tokens": -1},
        {"prompt": "x", "suffix": "y"},
        {"prompt": "x", "best_of": 3},
    ):
        with pytest.raises(ValidationError):
            CompletionRequest(model="m", **wrong)


def test_messages_are_text():
    def chat(*messages):
        return ChatRequest(model="m", messages=list(messages)).chat()

    assert (
        chat({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})[0]["content"]
        == "ab"
    )
    for wrong in (
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        {"role": "user"},
        {"content": "x"},
    ):
        with pytest.raises(APIError):
            chat(wrong)
