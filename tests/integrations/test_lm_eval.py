"""The adapter for lm-eval, in lm-eval: scores and texts are those of the model with the expert that was asked for."""

import json
import sys

import pytest
import torch

import t2kernels as t2

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[test]'")

from lm_eval.tasks import TaskManager  # noqa: E402

from t2kernels.evaluation import answers  # noqa: E402
from t2kernels.integrations.lm_eval import SVFLM, main, register  # noqa: E402

LENGTH = 12  # tokens; the built-in model's own settings say 32
EXPERTS = ["math", "code", None]
ARGS = {"pretrained": "tiny", "device": "cpu", "dtype": "float32", "batch_size": 4}


def shipped(*names: str) -> str:
    return ";".join(str(t2.tiny.experts()[name]) for name in names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks over the same documents, most of which name an expert: texts, and a choice by likelihood."""
    folder = tmp_path_factory.mktemp("tasks")
    problems = [row for name in ("math", "code") for row in t2.tasks.load(name).split("test", 6)]
    docs = [
        {**row, "expert": EXPERTS[i % 3], "choices": ["=" + row["answer"], "=99", ","]}
        for i, row in enumerate(problems)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/docs.jsonl\ntest_split: test\n"
    common += "target_delimiter: ''\ndoc_to_text: '{{prompt}}'\n"
    (folder / "texts.yaml").write_text(
        f"task: t2_texts\n{common}doc_to_target: '={{{{answer}}}}'\noutput_type: generate_until\n"
        f"generation_kwargs:\n  until: ['?']\n  max_gen_toks: {LENGTH}\nmetric_list:\n  - metric: exact_match\n"
    )
    (folder / "choice.yaml").write_text(
        f"task: t2_choice\n{common}doc_to_target: 0\ndoc_to_choice: '{{{{choices}}}}'\n"
        "output_type: multiple_choice\nmetric_list:\n  - metric: acc\n"
    )
    return folder


def evaluate(folder, model, **kwargs):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = ["t2_texts", "t2_choice"]
    return lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, log_samples=True, bootstrap_iters=0, **kwargs
    )


@pytest.fixture(scope="module")
def model():
    return SVFLM(experts=shipped("math", "code"), **ARGS)


def by_prompt(found: dict, task: str) -> list[dict]:
    return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


def reference(lm: SVFLM, docs: list[dict], experts: list) -> tuple[list[str], list[list[float]]]:
    """Texts by generate, and log-likelihoods of the choices by a forward for each."""
    texts = answers(lm.model, lm.tokenizer, [doc["prompt"] for doc in docs], experts, LENGTH)
    scores = []
    for doc, expert in zip(docs, experts, strict=True):
        row = []
        for choice in doc["choices"]:
            prompt, whole = (
                lm.tokenizer(text, return_tensors="pt")["input_ids"] for text in (doc["prompt"], doc["prompt"] + choice)
            )
            with torch.no_grad(), lm.bank.use(expert):
                logs = lm.model(whole).logits.log_softmax(-1)[0, :-1]
            row.append(float(logs.gather(1, whole[0, 1:, None])[prompt.shape[1] - 1 :].sum()))
        scores.append(row)
    return texts, scores


def check(found: dict, lm: SVFLM, experts: list) -> None:
    samples, choices = by_prompt(found, "t2_texts"), by_prompt(found, "t2_choice")
    docs = [sample["doc"] for sample in samples]
    texts, scores = reference(lm, docs, experts)
    assert [sample["resps"][0][0] for sample in samples] == texts
    said = [[float(resp[0][0]) for resp in sample["resps"]] for sample in choices]
    assert all(a == pytest.approx(b, abs=1e-4) for a, b in zip(said, scores, strict=True))
    right = sum(max(range(3), key=row.__getitem__) == 0 for row in scores)
    assert found["results"]["t2_choice"]["acc,none"] == pytest.approx(right / len(docs))


def test_each_document_has_its_expert(folder, model):
    check(evaluate(folder, model), model, [EXPERTS[i % 3] for i in range(12)])
    texts = reference(model, [{"prompt": "47+38+59?", "choices": []}] * 2, ["math", None])[0]
    assert texts[0] != texts[1]  # the experts make a difference here


def test_one_expert_for_what_names_none(folder, model):
    model.expert, model.expert_column = "math", "nothing"
    check(evaluate(folder, model), model, ["math"] * 12)
    model.expert = lambda doc: "code" if "(" in doc["prompt"] else "math"
    check(evaluate(folder, model), model, ["math"] * 6 + ["code"] * 6)
    model.expert = None
    plain, tokenizer = t2.tiny.load()
    found = [sample["resps"][0][0] for sample in by_prompt(evaluate(folder, model), "t2_texts")]
    prompts = [sample["doc"]["prompt"] for sample in by_prompt(evaluate(folder, model), "t2_texts")]
    assert found == answers(plain, tokenizer, prompts, None, LENGTH)
    model.expert_column = "expert"


def test_a_label_without_expert(folder, model):
    model.expert = "law"
    with pytest.raises(
        ValueError, match="asks for the expert 'law', and there is none of that name; given are base, math, code"
    ):
        evaluate(folder, model)
    model.expert = None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"expert": "law"}, "expert=law: neither a file nor one of base, classify, code, math, reason"),
        ({"experts": "law=gone/law"}, "no file 'gone/law' for the expert 'law'"),
    ],
)
def test_experts_that_are_not_there(args, message):
    with pytest.raises(FileNotFoundError, match=message):
        SVFLM(**ARGS, **args)


def test_by_name_and_on_the_command_line(folder, tmp_path, monkeypatch):
    register()
    register()
    args = f"pretrained=tiny,expert=math,expert_column=nothing,dtype=float32,rank=128,experts={shipped('code')}"
    named = evaluate(folder, "t2kernels", model_args=args, device="cpu", batch_size=4)
    command = [
        "lm_eval",
        "run",
        "--model",
        "t2kernels",
        "--model_args",
        args,
        "--tasks",
        "t2_choice",
        "--include_path",
        str(folder),
    ]
    command += ["--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    main()
    (file,) = tmp_path.rglob("results*.json")
    assert json.loads(file.read_text())["results"]["t2_choice"]["acc,none"] == named["results"]["t2_choice"]["acc,none"]
