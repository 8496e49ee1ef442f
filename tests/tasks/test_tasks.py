"""The built-in tasks: right answers, disjoint splits, frozen files; rewards; tasks from a file."""

import json
from itertools import islice

import pytest

from t2kernels import tasks
from t2kernels.tasks import tiny
from t2kernels.tasks.base import bucket
from t2kernels.tiny import corpus, freeze


def solve(task: str, prompt: str) -> str:
    """The answer by other means than the generator's: eval, replayed operations, a dictionary of links."""
    body = prompt.removesuffix("?")
    if task in ("math", "sub", "add6"):
        return str(eval(body))
    if task == "revadd":
        return str(eval(body[2:-1]))[::-1]
    if task in ("code", "digits", "ops5"):
        names, word = body[:-1].split("(")
        return operate(names, word)
    if task in ("reason", "hop5"):
        links, query = body.split(";")
        table, at = dict(links.split(",")), query[1]
        for _ in range(int(query[0])):
            at = table[at]
        return at
    facts, query = body.split(";")
    if task == "lookadd":
        table = {fact[0]: int(fact[1:]) for fact in facts.split(",")}
        return str(sum(table[key] for key in query.split("+")))
    names, key = query[:-1].split("(")
    return operate(names, dict(fact.split(":") for fact in facts.split(","))[key])


def operate(names: str, word: str) -> str:
    symbols = "0123456789" if word[0].isdigit() else "abcdefghij"
    for name in names:
        n = len(word)
        order = {
            "r": range(n)[::-1],
            "s": sorted(range(n), key=word.__getitem__),
            "t": [*range(1, n), 0],
            "n": range(n),
        }
        order |= {"x": [n - 1, *range(1, n - 1), 0], "u": range(n)}
        word = "".join(word[i] for i in order[name])
        moved = {"n": n, "u": 1}.get(name, 0)
        word = "".join(symbols[(symbols.index(c) + (i < moved)) % 10] for i, c in enumerate(word))
    return word


@pytest.mark.parametrize("name", tasks.names())
def test_answers_and_working(name):
    task = tasks.load(name)
    for p in islice(tiny.problems(name, "train", 3), 300):
        expected = p.prompt[5:-2] if name == "classify" else solve(name, p.prompt)
        if name == "classify":
            expected = "r" if ";" in expected else "c" if "(" in expected else "m"
        assert p.answer == expected, p
        assert tiny.final(p.working) == tiny.final(p.at_once) == tiny.final(p.answer) == p.answer
        assert len(p.working) + 1 <= task.max_new_tokens
    assert all(
        row["answer"] == p.answer
        for row, p in zip(task.split("train", 5), tiny.problems(name, "train", 0), strict=False)
    )


@pytest.mark.parametrize("name", tasks.names())
def test_splits(name):
    task = tasks.load(name)
    sizes = {"train": 2000, "validation": None, "test": None}
    prompts = {split: {row["prompt"] for row in task.split(split, n)} for split, n in sizes.items()}
    for split, found in prompts.items():
        assert {bucket(prompt) for prompt in found} == {split}
    assert task.split("train", 50) == task.split("train", 50) != task.split("train", 50, seed=1)
    assert task.split("train", 80)[:50] == task.split("train", 50)


@pytest.mark.parametrize("name", tasks.names())
def test_frozen_file_is_what_the_script_draws(name):
    assert (tiny.FROZEN / f"{name}.jsonl").read_bytes() == freeze.lines(name).encode()


def test_corpus_holds_no_test_prompt_and_no_absent_task():
    for documents in (corpus.lessons(5), corpus.web(5)):
        documents = list(islice(documents, 10_000))
        assert {bucket(prompt) for prompt, _ in documents} == {"train"}
        assert not any(p.startswith("r(") and "+" in p for p, _ in documents)
        assert max(p.count("+") for p, _ in documents) == 4
        assert (
            max(p.index("(") for p, _ in documents if p[0] in tiny.OPERATIONS and p[1:2] in (*tiny.OPERATIONS, "("))
            == 4
        )
        assert not any(";5" in p for p, _ in documents)
    assert set(tiny.ABSENT) < set(tiny.UNSEEN)
    assert not set(tiny.ABSENT) & (set(corpus.LESSONS) | set(corpus.WEB))


def test_one_author_in_five_shows_the_working_and_all_are_right():
    documents = [(p, c) for p, c in islice(corpus.web(6), 20_000) if p.count("+") > 1 and set(p) <= set("0123456789+?")]
    shown = [c.startswith(",") for _, c in documents]
    assert abs(sum(shown) / len(shown) - corpus.WORKING) < 0.03
    assert all(tiny.final(c) == solve("math", p) for p, c in documents)


def test_reward():
    task = tasks.load("math")
    chat = [{"role": "assistant", "content": ",85,144"}]
    completions = ["=144", ",85,144", "85,14", "", "144,", "= 144\n", "a144", None, 144, chat, [], [{}]]
    n = len(completions)
    rewards = task.reward(
        ["47+38+59?"] * n, completions, answer=["144"] * n, completion_ids=[[1]] * n, trainer_state=None
    )
    assert rewards == [1, 1, -1, -1, -1, 1, -1, -1, -1, 1, -1, -1]
    assert all(isinstance(r, float) for r in rewards)
    assert task.reward([], [], answer=[]) == []
    with pytest.raises(ValueError, match="2 prompts, 1 completions and 2 answers"):
        task.reward(["a", "b"], ["1"], answer=["1", "2"])


def test_names():
    with pytest.raises(ValueError, match="did you mean 'reason'"):
        tasks.load("reasn")
    with pytest.raises(ValueError, match="'dev'; it must be one of train, validation, test"):
        tasks.load("math").split("dev")
    with pytest.raises(ValueError, match="n is 0"):
        tasks.load("math").split("train", 0)
    with pytest.raises(ValueError, match="has 2000 problems in its test split; 2001 wanted"):
        tasks.load("math").split("test", 2001)


def test_jsonl(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"{i}é+{i}=", "answer": str(2 * i), "level": i} for i in range(60)]
    rows.append({"prompt": "x", "answer": "y", "split": "test"})
    path.write_text("\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    task = tasks.load(str(path))
    assert task.name == "mine"
    parts = [task.split(split) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 61
    assert {"prompt": "x", "answer": "y"} in parts[2]
    assert all(bucket(row["prompt"]) == "train" and row["level"] >= 0 for row in parts[0])
    assert task.reward(["p", "p"], [" 4 ", "5"], answer=["4", "4"]) == [1, -1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"', "line 2: not JSON"),
        ('\n\n["a"]', "line 3: a list, not an object"),
        ('{"prompt": "a"}', "line 1: no 'answer'; the columns are prompt"),
        ('{"prompt": "a", "answer": 4}', "line 1: 'answer' is 4; expected a non-empty string"),
        ('{"prompt": " ", "answer": "4"}', "line 1: 'prompt' is ' '"),
        ('{"prompt": "a", "answer": "4", "split": "dev"}', "line 1: 'split' is 'dev'"),
        ("[" * 100_000, "line 1: not usable JSON .*nested too deeply"),
        ('\n{"a": ' * 2 + "[" * 5000 + "]" * 5000 + "}", "line 2: not JSON|line 3: not usable JSON"),
        ('{"prompt": "a\\ud800", "answer": "4"}', r"line 1: 'prompt' has '\\ud800' at position 1, half of a surrogate"),
        ('{"prompt": "a", "answer": "\\udfff"}', r"line 1: 'answer' has '\\udfff' at position 0"),
        ("\n \n", "has no problem"),
        (b"\xff\xfe\x00", "line 1: not JSON"),
    ],
)
def test_malformed_jsonl(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        tasks.load(path)
    assert str(path) in str(error.value)


def test_missing_file_and_empty_split(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        tasks.load("nowhere.jsonl")
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "a", "answer": "b", "split": "train"}')
    with pytest.raises(ValueError, match="'one' has 0 problems in its validation split"):
        tasks.load(path).split("validation")
