"""`few_shot` in an engine: a stand-in answers each request with the built-in model, patched, so that the search must be
the library's own.
"""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

import t2kernels as t2
from t2kernels.adapt import CEMConfig, Examples, FewShot, search
from t2kernels.integrations.vllm import few_shot, requests
from t2kernels.integrations.vllm.settings import KEY
from t2kernels.rollout.generation import Sampler

NAMES = ["math", "code", "reason"]
FILES = {n: t2.tiny.experts()[n] for n in NAMES}
SUB = t2.tasks.load("sub")
SMALL = {"population": 6, "elite": 0.5, "iterations": 3, "mean": -0.3, "std": 0.4, "seed": 2}


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    n: int
    detokenize: bool


class Engine:
    """What `few_shot` calls of `vllm.LLM`. Its experts are those that it was sent, by id, until they are removed."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.bank = model, tokenizer, model.t2_bank
        self.calls, self.known = [], {}
        config = SimpleNamespace(
            additional_config={KEY: {}}, model_config=SimpleNamespace(quantization=None, max_model_len=128)
        )
        self.llm_engine = SimpleNamespace(vllm_config=config, remove_lora=self.known.pop)

    def get_tokenizer(self):
        return self.tokenizer

    def generate(self, prompts, sampling_params, *, lora_request, use_tqdm):
        assert len(prompts) == len(lora_request)
        self.calls.append((sampling_params, lora_request))
        self.known |= {r.lora_int_id: r.lora_path for r in lora_request if r}
        drawn, one = [None] * len(prompts), sampling_params
        for where in {r and r.lora_path for r in lora_request}:
            at = [i for i, r in enumerate(lora_request) if (r and r.lora_path) == where]
            ids, mask = self.left_padded([prompts[i]["prompt_token_ids"] for i in at])
            if where is not None:
                self.bank.add("one", requests.load(where), replace=True)
            rollout = Sampler(self.model, self.tokenizer, one.max_tokens).draw(
                self.model,
                ids,
                mask,
                one.temperature,
                one.n,
                expert_ids=self.bank.ids(["one" if where else None] * len(at)),
            )
            tokens = [row[there].tolist() for row, there in zip(rollout.tokens, rollout.completion, strict=True)]
            for j, i in enumerate(at):
                drawn[i] = SimpleNamespace(
                    outputs=[SimpleNamespace(token_ids=t) for t in tokens[j * one.n : (j + 1) * one.n]]
                )
        return drawn

    def left_padded(self, rows):
        out = self.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        return out["input_ids"], out["attention_mask"]


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = t2.tiny.load()
    bank = t2.patch_model(model, form="delta")
    for name, file in FILES.items():
        bank.add(name, file)
    return model, tokenizer


@pytest.fixture
def llm(tiny, monkeypatch):
    module, params = ModuleType("vllm.lora.request"), ModuleType("vllm")
    module.LoRARequest, params.SamplingParams = LoRARequest, SamplingParams
    for name, stub in (("vllm", params), ("vllm.lora", ModuleType("vllm.lora")), ("vllm.lora.request", module)):
        monkeypatch.setitem(sys.modules, name, stub)
    for kept in ("_taken", "_addresses"):
        monkeypatch.setattr(requests, kept, {})
    return Engine(*tiny)


def test_it_finds_what_the_library_finds(llm, tiny, tmp_path):
    rows, generations = SUB.split("train", 8, seed=3), []
    got = few_shot(
        llm, FILES, rows, SUB, tmp_path / "mine", name="mine", progress=lambda *a: generations.append(a), **SMALL
    )
    examples = Examples(*tiny, rows, SUB)
    config = CEMConfig(score="reward", **SMALL)
    want = FewShot(*tiny, examples, NAMES, config, name="mine", replace=True)
    tiny[0].t2_bank.remove("mine")
    assert torch.equal(got.found.alpha, want.found.alpha)
    assert got.found.scores == want.found.scores == [score for _, score in generations]
    assert len(set(got.found.scores)) > 1  # not a search in which all are alike
    assert got.found.answers == want.found.answers
    assert (got.gain, got.error) == (want.gain, want.error)
    # A generation is one call, the centre another, and the base model beside what was found the last.
    assert [len(requested) for _, requested in llm.calls] == [6 * 8, 6 * 8, 6 * 8, 8, 2 * 8]
    # It is served at once, and is the mixture that was found.
    assert got.request == requests.expert("mine", got.file)
    assert set(llm.known) == {got.request.lora_int_id}  # candidates do not stay in the engine
    saved = t2.Expert.load(tmp_path / "mine")
    for name, z in want.found.expert.z.items():
        torch.testing.assert_close(saved.z[name], z, rtol=1e-6, atol=1e-6)
    made = want.found.expert.manifest
    assert made.keys() == saved.manifest.keys() - {"created_by"}
    of_its_parts = (
        "fingerprint",
        "fingerprints",
    )  # it belongs to the factors that its experts were trained on, not to those of this bank
    assert {k: v for k, v in saved.manifest.items() if k in made and k not in of_its_parts} == {
        k: made[k] for k in made if k not in of_its_parts
    }
    assert saved.manifest["fingerprints"] == t2.Expert.load(FILES["math"]).manifest["fingerprints"]
    assert saved.sketch.keys() == saved.z.keys()
    tiny[0].t2_bank.check(saved)


def test_the_base_model_is_kept_where_nothing_is_gained(llm, tmp_path):
    rows = SUB.split("train", 2)

    def flat(prompts, completions, **columns):
        return [0.5] * len(prompts)

    small = {"population": 2, "iterations": 1, "max_new_tokens": 2}
    got = few_shot(llm, FILES, rows, flat, tmp_path / "a", **small)
    assert (got.request, got.gain, got.error) == (None, 0.0, 0.0)
    assert got.file.is_file()
    assert few_shot(llm, FILES, rows, flat, tmp_path / "a", caution=None, **small).request.lora_path.startswith(
        str(got.file)
    )


def test_sampled_answers(llm, tmp_path):
    rows, seen = SUB.split("train", 3), []

    def reward(prompts, completions, answer):
        seen.append((list(prompts), list(answer)))
        return [float(len(c)) for c in completions]

    few_shot(
        llm,
        FILES,
        rows,
        reward,
        tmp_path / "a",
        population=2,
        elite=1,
        iterations=2,
        samples=4,
        temperature=0.7,
        seed=5,
        max_new_tokens=3,
    )
    each = [row[k] for k in ("prompt", "answer") for row in rows for _ in range(4)]
    for prompts, answer in seen[1:3]:  # the first is the trial on empty answers
        assert prompts + answer == each[:12] * 2 + each[12:] * 2
    assert [(s.temperature, s.n, s.max_tokens) for s, _ in llm.calls] == [(0.7, 4, 3)] * 4


def test_chats_go_through_the_template(llm, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        tiny[1], "chat_template", "<s>{% for m in messages %}{{ m.content }}{% endfor %}", raising=False
    )
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in SUB.split("train", 3)]

    def reward(prompts, completions, answer):
        return [
            SUB.reward(prompts=["-"], completions=[c[0]["content"]], answer=[a])[0]
            for c, a in zip(completions, answer, strict=True)
        ]

    got = few_shot(llm, FILES, rows, reward, tmp_path / "a", max_new_tokens=22, **SMALL)
    found = search(Examples(*tiny, rows, reward, max_new_tokens=22), NAMES, config=CEMConfig(score="reward", **SMALL))
    assert torch.equal(got.found.alpha, found.alpha)
    assert got.found.scores == found.scores


@pytest.mark.parametrize(
    "change, message",
    [
        ({"experts": {}}, "at least one"),
        ({"experts": NAMES}, "wanted {name: file}"),
        ({"experts": {"a": FILES["math"], "b": FILES["math"]}}, "a file occurs twice"),
        ({"experts": {"a": "nowhere"}}, "does not exist"),
        ({"rows": []}, "there are no examples"),
        ({"rows": [{"answer": "1"}]}, "example 0"),
        ({"rows": [{"prompt": "1+" * 60, "answer": "1"}]}, "128 positions"),
        ({"reward": None}, "nothing else says"),
        ({"reward": lambda prompts, completions, **columns: [0.5] * 7}, "7 values for"),
        ({"score": "likelihood"}, "score='likelihood'; in an engine it is 'reward'"),
        ({"per": "layer"}, "per='layer'"),
        ({"mixing": "logits"}, "mixing='logits'"),
        ({"population": 0}, "population=0"),
    ],
)
def test_what_cannot_work_is_said_before_any_request(llm, tmp_path, change, message):
    settings = {"experts": FILES, "rows": SUB.split("train", 2), "reward": SUB} | change
    with pytest.raises((ValueError, t2.ExpertError), match=message):
        few_shot(llm, out=tmp_path / "a", **settings)
    assert not llm.calls
    assert not list(tmp_path.iterdir())


def test_an_engine_without_experts(llm, tmp_path):
    llm.llm_engine.vllm_config.additional_config = {}
    with pytest.raises(ValueError, match="serves no experts"):
        few_shot(llm, FILES, SUB.split("train", 2), SUB, tmp_path / "a")


def test_candidates_leave_the_engine_when_a_reward_fails(llm, tmp_path):
    def reward(prompts, completions, **columns):
        if any(completions):
            raise RuntimeError("no answer is right")
        return [0.0] * len(prompts)

    with pytest.raises(RuntimeError, match="no answer is right"):
        few_shot(llm, FILES, SUB.split("train", 2), reward, tmp_path / "a", **SMALL)
    assert not llm.known
