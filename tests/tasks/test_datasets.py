"""Known datasets: their rows, copies of their files, the hub, and the errors of each before any model is loaded."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from t2kernels import HubError, tasks
from t2kernels.tasks.hub import arc, competition_math, gsm8k, python_code, textvqa
from t2kernels.tasks.hub.source import Rows, Source

DATA = Path(__file__).parents[1] / "data"

# Rows with the columns that the datasets have on the hub; the contents are our own.
GSM8K = {
    "question": "Tom buys 1,200 pens at $2. How much?",
    "answer": "He pays 1200*2=$<<1200*2=2400>>2400.\n#### 2,400",
}
MATH500 = {
    "problem": "Half of 1?",
    "solution": "It is $\\boxed{\\frac{1}{2}}$.",
    "answer": "\\frac{1}{2}",
    "subject": "Algebra",
    "level": 2,
}
MATH500 |= {"unique_id": "test/algebra/1.json"}
HENDRYCKS = {
    "problem": "Half of 1?",
    "level": "Level 5",
    "type": "Counting & Probability",
    "solution": "It is $\\boxed{\\frac{1}{2}}$.",
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to add two to each number of a pair.",
    "code": (
        "class Pair(object):\r\n\tdef __init__(self, a, b):\r\n\t\tself.a = a\r\n\t\tself.b = b\r\n"
        "def add_two(p):\r\n\treturn (p.a + 2, p.b + 2)"
    ),
    "test_list": [
        "assert add_two(Pair(1, 2)) == (3, 4)",
        "assert add_two(Pair(0, -2)) == (2, 0)",
        "assert add_two(last) == (11, 12)",
    ],
    "test_setup_code": "last = Pair(9, 10)",
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "x.ipynb",
    "task_id": 3,
    "prompt": "Write a function for pi.",
    "code": "import math\ndef pi():\n    return math.pi",
}
SANITIZED |= {"test_imports": ["import math"], "test_list": ["assert math.isclose(pi(), 3.14159, abs_tol=1e-4)"]}
ARC = {
    "id": "x_1",
    "question": "Which is a star?",
    "choices": {"text": ["Sun", "Moon", "Mars"], "label": ["A", "B", "C"]},
    "answerKey": "A",
}
ARC_DIGITS = {
    **ARC,
    "choices": {"text": ["Moon", "Sun", "Mars", "Io"], "label": ["1", "2", "3", "4"]},
    "answerKey": "2",
}
TEXTVQA = {
    "image_id": "a",
    "question_id": 1,
    "question": "what does the sign say?",
    "question_tokens": ["what"],
    "image": {"bytes": b"\x89PNG", "path": None},
    "image_width": 1,
    "image_height": 1,
    "flickr_original_url": "",
    "flickr_300k_url": "",
    "answers": ["stop"] * 9 + ["go"],
    "image_classes": ["Sign"],
    "set_name": "val",
    "ocr_tokens": ["STOP", "Elm St"],
}


def user(row: dict) -> str:
    (message,) = row["messages"]
    assert message["role"] == "user"
    return message["content"]


def test_gsm8k_row():
    row = gsm8k.problem(GSM8K)
    assert row["prompt"] == "Question: Tom buys 1,200 pens at $2. How much?\nAnswer:"
    assert "1,200 pens" in user(row)
    assert (row["answer"], row["target"]) == ("2400", " He pays 1200*2=$2400.\n#### 2400")
    assert gsm8k.extract(row["target"]) == row["answer"]


def test_math_rows():
    one, other = competition_math.problem(MATH500), competition_math.problem(HENDRYCKS)
    assert one["answer"] == other["answer"] == "\\frac{1}{2}"
    assert [(r["category"], r["level"]) for r in (one, other)] == [("Algebra", "2"), ("Counting & Probability", "5")]
    assert one["prompt"] == "Problem: Half of 1?\nSolution:"
    assert "\\boxed{}" in user(one)


def test_mbpp_rows():
    row = python_code.mbpp_problem(MBPP)
    assert row["names"] == ["Pair", "add_two"]
    assert row["setup"].strip() == "last = Pair(9, 10)"
    assert row["answer"].count("assert") == 3
    assert row["prompt"].startswith('"""\nWrite a function to add two')
    assert MBPP["test_list"][2] in row["prompt"]
    assert MBPP["test_list"][2] in user(row)
    clean = python_code.mbpp_problem(SANITIZED)
    assert (clean["names"], clean["setup"].strip()) == (["pi"], "import math")
    task = python_code.CodeTask("mbpp", lambda *_: [])
    assert task.verdicts([MBPP["code"], SANITIZED["code"], MBPP["code"]], [row, clean, clean]) == [True, True, False]


def test_humaneval_row():
    raw = json.loads((DATA / "humaneval.jsonl").read_text().splitlines()[0])
    row = python_code.humaneval_problem(raw)
    assert row["prompt"] == row["setup"] == row["code"] == raw["prompt"]
    assert row["answer"].endswith("\ncheck(has_close_elements)\n")
    assert row["names"] == ["has_close_elements"]
    assert f"```python\n{raw['prompt'].strip()}\n```" in user(row)


def test_arc_rows():
    row, digits = arc.problem(ARC), arc.problem(ARC_DIGITS)
    assert row["prompt"] == "Question: Which is a star?\nA. Sun\nB. Moon\nC. Mars\nAnswer:"
    assert (row["answer"], digits["answer"]) == ("A", "B")
    assert "B. Sun" in digits["prompt"]
    assert "B. Sun" in user(digits)
    assert arc.judge("2", digits)
    assert arc.judge("(B) Sun", digits)
    assert arc.judge("the Sun", digits)
    assert not arc.judge("1", digits)


def test_textvqa_row():
    row = textvqa.problem(TEXTVQA)
    assert row["answer"] == "stop"
    assert row["image"] == TEXTVQA["image"]
    assert "STOP, Elm St" in row["prompt"]
    (message,) = row["messages"]
    assert [part["type"] for part in message["content"]] == ["image", "text"]


@pytest.mark.parametrize(
    ("problem", "raw", "change", "message"),
    [
        (gsm8k.problem, GSM8K, {"answer": "It is 5."}, "'answer' ends in 'It is 5.'; expected '#### ' and a number"),
        (gsm8k.problem, GSM8K, {"question": None}, "'question' is None; expected a non-empty string"),
        (competition_math.problem, MATH500, {"answer": None, "solution": "It is 5"}, "expected an answer in .boxed"),
        (competition_math.problem, MATH500, {"answer": ""}, "'answer' is ''"),
        (python_code.mbpp_problem, MBPP, {"test_list": []}, "'test_list' is .*; expected a non-empty list of strings"),
        (python_code.mbpp_problem, MBPP, {"test_list": ["assert ("]}, "'test_list' is not Python"),
        (python_code.mbpp_problem, MBPP, {"test_list": ["(" * 5000]}, "'test_list' is not Python"),
        (
            python_code.mbpp_problem,
            SANITIZED,
            {"test_imports": ["import math", 5]},
            "'test_imports' is .*; expected a non",
        ),
        (python_code.mbpp_problem, SANITIZED, {"test_imports": 5}, "'test_imports' is 5; expected a non-empty list"),
        (python_code.mbpp_problem, MBPP, {"test_setup_code": 5}, "'test_setup_code' is 5; expected a non-empty string"),
        (
            python_code.mbpp_problem,
            MBPP,
            {"text": "a \ud800"},
            "'text' has '.ud800' at position 2, half of a surrogate",
        ),
        (arc.problem, ARC, {"choices": {"text": ["\ud800"], "label": ["A"]}}, "'text' has '.ud800' at position 0"),
        (python_code.mbpp_problem, MBPP, {"code": "def other(): pass"}, "uses no name that 'code' defines"),
        (arc.problem, ARC, {"answerKey": "D"}, "'answerKey' is 'D' and the labels are"),
        (arc.problem, ARC, {"choices": ["Sun"]}, "'choices' is"),
        (arc.problem, ARC, {"choices": {"text": ["Sun"], "label": ["A", "B"]}}, "for 1 options"),
        (textvqa.problem, TEXTVQA, {"answers": []}, "'answers' is"),
    ],
)
def test_malformed_rows(problem, raw, change, message):
    with pytest.raises(ValueError, match=message):
        problem({**raw, **change})
    with pytest.raises(ValueError, match=r"no '\w+'; the columns are id"):
        problem({"id": 1})


# --- copies of the files


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pens(n: int, start: int = 0) -> list[dict]:
    return [{"question": f"What is {i} plus {i}?", "answer": f"#### {2 * i}"} for i in range(start, start + n)]


def answers(rows: list[dict]) -> list[int]:
    return [int(row["answer"]) // 2 for row in rows]


def test_every_second_training_row_is_for_training_and_the_rest_for_validation(tmp_path):
    write(tmp_path / "train.jsonl", pens(7))
    write(tmp_path / "test.jsonl", pens(3, 100))
    for path in (tmp_path, str(tmp_path), {"train": tmp_path / "train.jsonl", "test": str(tmp_path / "test.jsonl")}):
        task = tasks.load("gsm8k", path)
        assert [answers(task.split(s)) for s in ("train", "validation", "test")] == [
            [0, 2, 4, 6],
            [1, 3, 5],
            [100, 101, 102],
        ]
        assert answers(task.split("train", 2)) == [0, 2]
    with pytest.raises(ValueError, match="has 3 problems in its test split; 4 wanted"):
        task.split("test", 4)


def test_the_real_rows_are_right_by_their_own_solutions():
    for name, path in (
        ("gsm8k", DATA / "gsm8k_test.jsonl"),
        ("gsm8k", DATA / "gsm8k_train.jsonl"),
        ("math500", DATA / "math.jsonl"),
    ):
        task = tasks.load(name, path)
        rows = [row for split in ("test",) if "train" not in path.stem for row in task.split(split)]
        rows += [row for split in ("train", "validation") if "train" in path.stem for row in task.split(split)]
        assert len(rows) == len(path.read_text().splitlines())
        columns = {key: [row.get(key) for row in rows] for key in rows[0] if key != "prompt"}
        assert task.reward([r["prompt"] for r in rows], columns["target"], **columns) == [1.0] * len(rows)
        assert task.reward([r["prompt"] for r in rows], ["The answer is 0.123."] * len(rows), **columns) == [
            -1.0
        ] * len(rows)


def test_a_file_is_the_split_of_its_name(tmp_path):
    task = tasks.load(f"gsm8k:{write(tmp_path / 'my_test_250.jsonl', pens(4))}")
    assert task.name == "gsm8k"
    assert answers(task.split("test")) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="the files given for 'gsm8k' hold its test rows, no train rows"):
        task.split("train")
    train = tasks.load("gsm8k", write(tmp_path / "train.jsonl", pens(4)))
    assert answers(train.split("validation")) == [1, 3]
    mixed = write(tmp_path / "problems.jsonl", [*pens(40), {**pens(1, 99)[0], "split": "test"}])
    parts = [answers(tasks.load("gsm8k", mixed).split(s)) for s in ("train", "validation", "test")]
    assert sorted(i for part in parts for i in part) == [*range(40), 99]
    assert 99 in parts[2]


def test_a_set_of_test_rows_can_lend_some_for_training():
    task = tasks.load("humaneval", DATA / "humaneval.jsonl")
    assert len(task.split("test")) == 15
    with pytest.raises(ValueError, match=r"'humaneval' has test rows only; tasks.load\('humaneval', holdout=20\)"):
        task.split("train")
    lent = tasks.load("humaneval", DATA / "humaneval.jsonl", holdout=5)
    parts = [[r["names"][0] for r in lent.split(s)] for s in ("train", "validation", "test")]
    assert [len(p) for p in parts] == [3, 2, 10]
    assert not set(parts[0] + parts[1]) & set(parts[2])
    with pytest.raises(ValueError, match="holdout=5: 'gsm8k' has training rows of its own"):
        tasks.load("gsm8k", DATA / "gsm8k_test.jsonl", holdout=5)


def test_parquet_and_the_layout_of_the_hub(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for config, rows in (("ARC-Easy", [ARC, ARC_DIGITS]), ("ARC-Challenge", [ARC_DIGITS])):
        (tmp_path / config).mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / config / "test-00000-of-00001.parquet")
    assert [r["answer"] for r in tasks.load("arc_easy", tmp_path).split("test")] == ["A", "B"]
    assert [r["answer"] for r in tasks.load("arc_challenge", tmp_path).split("test")] == ["B"]
    bad = tmp_path / "test.parquet"
    bad.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"test\.parquet: no parquet file that can be read"):
        tasks.load("arc_easy", bad)


def test_chat_prompts(tmp_path):
    path = write(tmp_path / "test.jsonl", pens(1))
    assert tasks.load("gsm8k", path).split("test")[0]["prompt"].startswith("Question: ")
    row = tasks.load("gsm8k", path, chat=True).split("test")[0]
    assert [m["role"] for m in row["prompt"]] == ["user"]
    assert not {"messages", "chat_target"} & set(row)
    assert row["target"] == "#### 0"
    own = write(tmp_path / "own.jsonl", [{"prompt": "1+1=", "answer": "2", "split": "test"}])
    assert tasks.load(own, chat=True).split("test") == [
        {"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}
    ]
    assert tasks.load("math", chat=True).split("test", 1)[0]["prompt"][0]["role"] == "user"


# --- what goes wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a", "answer": "#### 1"}\n{"question": "b"', r"test\.jsonl, line 2: not JSON"),
        (
            '{"question": "a", "answer": "#### 1"}\n\n{"question": "b"}',
            r"test\.jsonl, line 3: no 'answer'; the columns are question",
        ),
        ("[1]", r"test\.jsonl, line 1: a list, not an object"),
        ('{"question": "a", "answer": "one"}', r"test\.jsonl, line 1: 'answer' ends in 'one'"),
        ("\n", r"holds no test row"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    path = tmp_path / "test.jsonl"
    path.write_text(text)
    for place in (path, tmp_path, {"test": path}):
        with pytest.raises(ValueError, match=message):
            tasks.load("gsm8k", place)


def test_a_file_without_rows_or_with_a_wrong_split(tmp_path):
    with pytest.raises(ValueError, match=r"mine\.jsonl holds no row"):
        tasks.load("gsm8k", write(tmp_path / "mine.jsonl", []))
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 1: 'split' is 'dev'"):
        tasks.load("gsm8k", write(tmp_path / "mine.jsonl", [{**GSM8K, "split": "dev"}]))


def test_wrong_paths(tmp_path):
    for path in (tmp_path / "gone.jsonl", tmp_path / "gone"):
        with pytest.raises(FileNotFoundError, match="gone"):
            tasks.load("gsm8k", path)
    (tmp_path / "test.csv").write_text("a")
    with pytest.raises(ValueError, match=r"test\.csv is no \.jsonl or \.parquet file"):
        tasks.load("gsm8k", tmp_path / "test.csv")
    with pytest.raises(ValueError, match=r"holds no file of a split; expected train\.jsonl or test\.jsonl"):
        tasks.load("gsm8k", tmp_path)
    with pytest.raises(ValueError, match=r"expected \{split: file\} with train and test"):
        tasks.load("gsm8k", {"dev": tmp_path})
    with pytest.raises(ValueError, match="path and holdout are for gsm8k"):
        tasks.load("math", tmp_path)
    with pytest.raises(ValueError, match="no task 'gsm8'; did you mean 'gsm8k'"):
        tasks.load("gsm8")


# --- the hub, as a directory with its layout


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset repository with two configs, and `datasets` caching beside it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    header = "".join(
        f"- config_name: {c}\n  data_files:\n"
        f"  - split: train\n    path: {c}/train.jsonl\n  - split: test\n    path: {c}/test.jsonl\n"
        for c in "ab"
    )
    write(tmp_path / "repo" / "a" / "train.jsonl", pens(4))
    write(tmp_path / "repo" / "a" / "test.jsonl", pens(2, 50))
    write(tmp_path / "repo" / "b" / "train.jsonl", pens(2, 20))
    write(tmp_path / "repo" / "b" / "test.jsonl", [*pens(1, 60), {"question": "b", "answer": "none"}])
    (tmp_path / "repo" / "README.md").write_text(f"---\nconfigs:\n{header}---\n")
    return str(tmp_path / "repo")


def test_the_hub_s_configs_are_read_side_by_side(hub):
    rows = Rows("gsm8k", Source(hub, gsm8k.problem, ("a", "b")))
    assert answers(rows("train", None, 0)) == [0, 1, 2]  # 0, 20, 1, 21, 2, 3
    assert answers(rows("validation", None, 0)) == [20, 21, 3]
    assert answers(rows("test", 3, 0)) == [50, 60, 51]
    with pytest.raises(ValueError, match=r"repo \(b\), test row 1: 'answer' ends in 'none'"):
        rows("test", None, 0)
    assert answers(Rows("gsm8k", Source(hub, gsm8k.problem, ("a",)))("test", None, 0)) == [50, 51]


def test_a_hub_that_is_not_there(hub, monkeypatch):
    with pytest.raises(
        OSError, match=r"cannot load .*gone, test from the hub: .*tasks.load\('gsm8k', path=...\), or --task gsm8k:PATH"
    ):
        Rows("gsm8k", replace(gsm8k.SOURCE, id=hub + "/gone", configs=(None,)))("test", 1, 0)
    with pytest.raises(
        OSError, match=r"cannot load openai/gsm8k \(main\), test from the hub: .*Without a network give a copy"
    ):
        tasks.load("gsm8k").split("test")  # HF_HUB_OFFLINE is set for all tests


def test_ids_and_splits_are_those_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name=None, *, split=None):
        asked.append((path, name, split))
        raise OSError("asked")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    wanted = {
        "gsm8k": ("openai/gsm8k", "main", "test"),
        "math500": ("HuggingFaceH4/MATH-500", None, "test"),
        "hendrycks_math": ("EleutherAI/hendrycks_math", "algebra", "test"),
        "mbpp": ("google-research-datasets/mbpp", "full", "test"),
        "humaneval": ("openai/openai_humaneval", None, "test"),
        "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
        "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
        "textvqa": ("lmms-lab/textvqa", None, "validation"),
    }
    assert list(wanted) == tasks.hub_names()
    for name, call in wanted.items():
        with pytest.raises(OSError, match="asked"):
            tasks.load(name).split("test")
        assert asked.pop() == call


def test_a_missing_package_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError,
        match=r"'gsm8k' is loaded from the hub .* needs the package datasets: "
        r"pip install 't2kernels\[tasks\]'; or give",
    ):
        tasks.load("gsm8k")
    assert tasks.load("gsm8k", DATA / "gsm8k_test.jsonl").split("test", 1)


def test_without_a_network_the_hub_is_asked_once(monkeypatch):
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))
            raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match=r"cannot be reached \(no route to the hub\); .* Without a network give a copy"):
        tasks.load("gsm8k").split("test")
    assert asked == [(constants.ENDPOINT, 5)]
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


def test_a_directory_of_several_datasets_gives_the_files_of_one(tmp_path):
    write(tmp_path / "gsm8k_train.jsonl", pens(4))
    write(tmp_path / "deep" / "gsm8k_test.jsonl", pens(2, 50))
    other = {"text": "a film", "label": "positive"}
    for name in ("a_train.jsonl", "z/test.jsonl"):
        write(tmp_path / name, [other])
    task = tasks.load("gsm8k", tmp_path)
    assert (len(task.split("train")), len(task.split("test"))) == (2, 2)
    with pytest.raises(
        ValueError, match=r"a_train\.jsonl, line 1: no 'code'; the columns are text"
    ):  # none has its columns
        tasks.load("mbpp", tmp_path)


def test_train_rows_alone_are_enough_to_train(tmp_path):
    write(tmp_path / "train.jsonl", pens(4))
    task = tasks.load("gsm8k", tmp_path / "train.jsonl")
    assert task.held_out() == task.split("validation")
    assert task.held_out(1) == task.split("validation", 1)
    write(tmp_path / "test.jsonl", pens(2, 50))
    task = tasks.load("gsm8k", tmp_path)
    assert task.held_out() == task.split("test")
    with pytest.raises(ValueError, match="'none' has 0 problems in its test split"):
        tasks.Task("none", lambda split, n, seed: []).held_out()
