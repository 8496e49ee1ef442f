"""`t2 eval`: what is measured of experts and of ways to choose one, and what is refused before a model is loaded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import t2kernels as t2
from t2kernels.cli import models
from t2kernels.cli.verbs import evaluate
from t2kernels.evaluation import Meter, answers, measure, scores
from t2kernels.rollout import chat as chat_module
from t2kernels.tasks.base import Task
from tests.helpers.commandline import t2_, wide  # noqa: F401

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def loaded():
    """The built-in model with the experts math and code."""
    loaded = models.load("tiny")
    bank = t2.patch_model(loaded.model)
    for name in ("math", "code"):
        bank.add(name, t2.tiny.experts()[name])
    return loaded


def mixed(n: int) -> tuple[Task, list[dict]]:
    """n problems of math and n of code in turn, each with its family as the category."""
    pairs = zip(t2.tasks.load("math").split("test", n), t2.tasks.load("code").split("test", n), strict=True)
    rows = [{**row, "category": name} for pair in pairs for name, row in zip(("math", "code"), pair, strict=True)]
    return replace(t2.tasks.load("code"), name="mixed", rows=lambda *_: rows), rows


def by_prompt(prompts):
    return ["code" if "(" in prompt else "math" for prompt in prompts]


def test_a_way_to_choose_is_an_arm_like_an_expert(loaded):
    task, rows = mixed(20)

    class Strategy:
        choose = staticmethod(by_prompt)

    arms = {
        "base": None,
        "math": "math",
        "code": "code",
        "routed": by_prompt,
        "object": Strategy(),
        "mix": {"math": 0.5, "code": 0.5},
    }
    arms["by category"] = [row["category"] for row in rows]
    found = measure(loaded.model, loaded.tokenizer, task, rows, arms, batch=64)
    arm = found.arms
    assert list(arm) == list(arms)
    for label in ("routed", "object", "by category"):
        assert arm[label].routes == {"code": {"code": 20}, "math": {"math": 20}}
        assert arm[label].parts["math"] == arm["math"].parts["math"]
        assert arm[label].parts["code"] == arm["code"].parts["code"]
        assert arm[label].score.right == arm["math"].parts["math"].right + arm["code"].parts["code"].right
    assert arm["routed"].seconds > 0 == arm["by category"].seconds
    assert arm["math"].routes is None
    assert arm["base"].score == scores(loaded.model, loaded.tokenizer, task, rows, [None])[0]
    assert found.meter.seconds > 0
    assert all(score.of == 20 for score in arm["base"].parts.values())


def test_names_that_cannot_be(loaded):
    task, rows = mixed(2)
    with pytest.raises(ValueError, match="few chose 1 experts for 4 prompts"):
        measure(loaded.model, loaded.tokenizer, task, rows, {"few": lambda prompts: ["math"]})
    with pytest.raises(KeyError, match="no expert named 'law' in the bank"):
        measure(loaded.model, loaded.tokenizer, task, rows, {"law": lambda prompts: ["law"] * len(prompts)})


def test_tokens_are_those_written(loaded):
    prompts = [row["prompt"] for row in t2.tasks.load("math").split("test", 6)]
    meter = Meter()
    written = answers(loaded.model, loaded.tokenizer, prompts, None, 26, batch=4, meter=meter)
    assert meter.tokens == sum(len(text) + 1 for text in written)  # a token for each character, and the end of text
    assert meter.seconds > 0


def test_stop_text_ends_an_answer(loaded):
    prompts = [row["prompt"] for row in t2.tasks.load("code").split("test", 4)]
    full = answers(loaded.model, loaded.tokenizer, prompts, ["code"] * 4, 26)
    cut = answers(loaded.model, loaded.tokenizer, prompts, ["code"] * 4, 26, stop=(">",))
    assert [text[: text.index(">") + 1] if ">" in text else text for text in full] == cut
    assert cut != full


# --- the command


def test_tables_and_json(loaded, tmp_path):
    rows = t2.tasks.load("math").split("test", 12)
    said = answers(
        loaded.model, loaded.tokenizer, [row["prompt"] for row in rows], ["math"] * 12, 64
    )  # of a file all of it is the answer
    rows = [
        {"prompt": row["prompt"], "answer": text, "category": row["prompt"].count("+")}
        for row, text in zip(rows, said, strict=True)
    ]
    rows = [{**row, "expert": name} for name in ("math", "base") for row in rows]
    file, out = tmp_path / "sums.jsonl", tmp_path / "scores.json"
    file.write_text("".join(json.dumps({**row, "split": "test"}) + "\n" for row in rows))
    text = t2_("eval", "--task", file, "--experts", "math", "--by", "expert", "--json", out)
    found = json.loads(out.read_text())
    accuracy = found["accuracy"]["sums"]
    assert {label: row["of"] for label, row in accuracy.items()} == {"base": 24, "math": 24, "by expert": 24}
    assert accuracy["math"]["right"] == 24
    assert accuracy["by expert"]["right"] == 12 + accuracy["base"]["right"] / 2 < 24
    low, high = accuracy["math"]["interval"]
    assert low < accuracy["math"]["accuracy"] <= high
    parts = found["categories"]["sums"]["math"]
    assert sum(part["right"] for part in parts.values()) == accuracy["math"]["right"]
    routes = found["routes"]["sums"]["by expert"]["chosen"]
    assert (
        sum(counts.get("math", 0) for counts in routes.values())
        == sum(counts.get("base", 0) for counts in routes.values())
        == 12
    )
    assert found["time"]["sums"]["tokens_per_second"] == pytest.approx(
        found["time"]["sums"]["tokens"] / found["time"]["sums"]["seconds"]
    )
    assert found["tasks"]["sums"] == {"checker": "equality", "chat": False, "max_new_tokens": 64}
    assert "by category" in text
    assert "chosen: by expert" in text
    assert "tokens/s" in text


def test_several_tasks_and_files_even_of_one_name(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text('{"prompt": "1+1?", "answer": "2", "split": "test"}\n')
    out = tmp_path / "scores.json"
    files = [str(tmp_path / folder / "x.jsonl") for folder in ("a", "b")]
    t2_("eval", "--task", ",".join([*files, "math"]), "-n", "1", "--json", out)
    assert list(json.loads(out.read_text())["accuracy"]) == [*files, "math"]


def test_code_and_word_problems(tmp_path):
    """Datasets of the hub from copies, by a model that knows nothing of them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    t2.tiny.load()[1].save_pretrained(tmp_path / "model")
    out, names = tmp_path / "scores.json", f"gsm8k:{DATA / 'gsm8k_test.jsonl'},humaneval:{DATA / 'humaneval.jsonl'}"
    text = t2_(
        "eval", "--task", names, "-n", "3", "--max-new-tokens", "4", "--model", tmp_path / "model", "--json", out
    )
    found = json.loads(out.read_text())
    assert {task: row["base"]["of"] for task, row in found["accuracy"].items()} == {"gsm8k": 3, "humaneval": 3}
    assert found["tasks"]["humaneval"]["checker"] == "tests, in a sandbox"
    assert found["tasks"]["gsm8k"] == {"checker": "equality of numbers", "chat": False, "max_new_tokens": 4}
    assert "right by equality of numbers" in text


def test_chat_is_for_models_with_a_template():
    task = t2.tasks.load("gsm8k", DATA / "gsm8k_test.jsonl")

    class Tokenizer:
        chat_template = "{{ messages }}"

    class Plain:
        chat_template = None

    assert [evaluate.styled(task, chat, Tokenizer).chat for chat in (None, True, False)] == [True, True, False]
    assert [evaluate.styled(task, chat, Plain).chat for chat in (None, False)] == [False, False]
    assert not evaluate.styled(t2.tasks.load("math"), None, Tokenizer).chat
    with pytest.raises(ValueError, match="no chat template"):
        evaluate.styled(task, True, Plain)
    pictures = replace(task, images=True)
    assert not evaluate.styled(pictures, None, Tokenizer).chat
    with pytest.raises(ValueError, match="need a vision-language model; --no-chat asks"):
        evaluate.styled(pictures, True, Tokenizer)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "gsm8k"], "cannot load openai/gsm8k (main), test from the hub"),
        (["--task", f"gsm8k:{DATA}/gone.jsonl"], "no file or directory"),
        (["--task", f"gsm8k:{DATA / 'gsm8k_test.jsonl'}", "--split", "train"], "hold its test rows, no train rows"),
        (["--task", f"humaneval:{DATA / 'humaneval.jsonl'}", "--split", "validation"], "has test rows only"),
        (["--task", f"gsm8k:{DATA / 'math.jsonl'}"], "line 1: no 'question'; the columns are problem, solution"),
        (["--task", "math", "-n", "5000"], "has 2000 problems in its test split; 5000 wanted"),
        (["--task", ","], "--task is empty"),
        (["--task", "EMPTY"], "has no problem"),
        (
            ["--task", "LABELS", "--experts", "math", "--by", "expert"],
            "--by expert: problem 2 of 'LABELS' has 'law' there, which is none of --experts",
        ),
        (["--task", "math", "--by", "kind"], "--by kind: problem 1 of 'math' has None there"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(args, message, tmp_path, monkeypatch):
    (tmp_path / "EMPTY.jsonl").write_text("")
    labels = [
        {"prompt": str(i), "answer": "1", "split": "test", "expert": expert} for i, expert in enumerate(("math", "law"))
    ]
    (tmp_path / "LABELS.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    args = [str(tmp_path / f"{a}.jsonl") if a in ("EMPTY", "LABELS") else a for a in args]
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded"))
    assert message in " ".join(t2_("eval", *args, code=1).split())


def test_training_looks_for_its_problems_before_the_model(monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded"))
    assert "no train rows" in " ".join(t2_("train", "--task", f"gsm8k:{DATA / 'gsm8k_test.jsonl'}", code=1).split())


# --- forms of prompts, options, and the base alone


@pytest.fixture
def chatty(tmp_path):
    """The directory of a small random model whose tokenizer has a chat template, and a file of texts with labels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer = t2.tiny.load()[1]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}=>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [f"{text},{label},test" for text, label in (("fine", "good"), ("dull", "bad"), ("fun", "good"))]
    (tmp_path / "films.csv").write_text("\n".join(["text,label,split", *lines]) + "\n")
    return tmp_path


def test_a_csv_is_measured_by_the_likelihood_of_its_labels_without_patching(chatty, monkeypatch):
    monkeypatch.setattr(models, "patch", lambda *_: pytest.fail("the base model alone was patched"))
    out = chatty / "scores.json"
    text = t2_("eval", "--task", chatty / "films.csv", "--model", chatty / "model", "--json", out)
    assert "nothing written" in text
    assert "asked through the chat template" in text
    found = json.loads(out.read_text())
    assert found["tasks"]["films"] == {"checker": "the likeliest option", "chat": True, "max_new_tokens": 16}
    assert found["accuracy"]["films"]["base"]["of"] == 3
    assert "well_formed" not in found["accuracy"]["films"]["base"]
    loaded = models.load(str(chatty / "model"))
    task = t2.tasks.load(chatty / "films.csv", chat=True)
    (score,) = scores(loaded.model, loaded.tokenizer, task, task.split("test"), [None])
    assert found["accuracy"]["films"]["base"]["right"] == score.right


def test_well_formed_answers_and_the_system_message_are_reported(chatty):
    out = chatty / "scores.json"
    args = ["--task", chatty / "films.csv", "--check", "label", "--system", "Be terse.", "--model", chatty / "model"]
    text = t2_("eval", *args, "--json", out)
    found = json.loads(out.read_text())
    assert found["accuracy"]["films"]["base"]["well_formed"] == 0.0
    assert found["tasks"]["films"]["system"] == "Be terse."
    assert "well-formed" in text
    assert "right by the one label named" in text


def test_experts_are_asked_as_they_were_trained(chatty):
    loaded = models.load(str(chatty / "model"))
    bank = t2.patch_model(loaded.model)
    for name, record in (("terse", {"chat": True, "system": "Be terse."}), ("plain", {"chat": False, "system": None})):
        expert = bank.expert({n: torch.ones(k) for n, k in bank.matrices.items()})
        t2.Expert(expert.z, {**expert.manifest, "prompt": record}, expert.sketch).save(chatty / name)

    def forms_of(*args):
        out = chatty / "scores.json"
        said = t2_("eval", "--task", chatty / "films.csv", "--model", chatty / "model", "--json", out, *args)
        found = json.loads(out.read_text())["tasks"]["films"]
        return found["chat"], found.get("system"), " ".join(said.split())

    chat, system, said = forms_of("--experts", chatty / "terse")
    assert (chat, system) == (True, "Be terse.")
    assert "was trained with" not in said
    chat, system, said = forms_of("--experts", chatty / "plain")
    assert (chat, system) == (False, None)
    assert "was trained with" not in said
    chat, system, said = forms_of("--experts", f"{chatty / 'plain'},{chatty / 'terse'}")
    assert (chat, system) == (True, None)
    assert "expert 'plain' was trained with plain text, and is asked with the chat template" in said
    assert "expert 'terse' was trained with the chat template and the system message 'Be terse.'" in said
    chat, system, said = forms_of("--experts", chatty / "terse", "--no-chat")
    assert (chat, system) == (False, None)
    assert said.count("was trained with") == 1


@pytest.mark.parametrize(
    "adapt", [[], ["--adapt", "few-shot"], ["--adapt", "nearest"], ["--adapt", "prompt", "--no-other"]]
)
@pytest.mark.parametrize(
    ("flags", "wanted"), [([], "user:fine;=>"), (["--no-chat"], "fine"), (["--system", ""], "system:;user:fine;=>")]
)
def test_search_choice_and_answer_ask_in_one_form(chatty, monkeypatch, adapt, flags, wanted):
    """What the model reads, from the search for a mixture to the answer."""
    loaded = models.load(str(chatty / "model"))
    bank = t2.patch_model(loaded.model)
    for name in ("a", "b"):
        bank.expert({n: torch.ones(k) for n, k in bank.matrices.items()}).save(chatty / name)
    t2.unpatch_model(loaded.model)
    rows = [{"prompt": "fine", "answer": "good", "expert": name, "split": "train"} for name in ("a", "b")]
    (chatty / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = []
    encoded = chat_module.encode

    def spy(tokenizer, prompts):
        read.extend(chat_module.render(tokenizer, prompts)[0])
        return encoded(tokenizer, prompts)

    monkeypatch.setattr("t2kernels.rollout.generation.encode", spy)
    more = ["--examples", chatty / "e.jsonl"] if adapt and adapt[1] in ("few-shot", "nearest") else []
    experts = ["-e", chatty / "a", "-e", chatty / "b"]
    t2_("generate", "fine", *experts, *adapt, *more, *flags, "--max-new-tokens", 2, "--model", chatty / "model")
    asked = [text for text in read if "category" not in text]
    assert set(asked) == {wanted}
    assert len(asked) >= (2 if not adapt else 3 if more else 1)
    assert all("user:" in text for text in read) == (flags != ["--no-chat"])
