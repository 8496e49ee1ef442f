"""Tasks from files of one's own: ways to check, options, chats, texts with labels."""

import json

import pytest

from t2kernels import tasks
from t2kernels.tasks.judging import named


def written(path, rows):
    path.write_text("".join(json.dumps({"split": "test", **row}) + "\n" for row in rows))
    return path


def verdict(task, said):
    """(right, well-formed) of a completion of the first problem."""
    row = task.split("test", 1)[0]
    formed = task.formed([said], [row])
    return task.verdicts([said], [row])[0], None if formed is None else formed[0]


LABELS = {"labels": ["spam", "not spam", "news"]}


@pytest.mark.parametrize(
    ("check", "answer", "options", "said", "expected"),
    [
        ("exact", "positive", {}, " positive\n", (True, None)),
        ("exact", "positive", {}, "This is positive.", (False, None)),
        ("exact", " positive ", {}, "positive", (True, None)),  # the completion is compared without its spaces
        ("label", "spam", LABELS, "This is SPAM, really: spam.", (True, True)),
        ("label", "spam", LABELS, "It is not  spam.", (False, True)),  # the longer label counts
        ("label", "not spam", LABELS, "It is Not\nspam.", (True, True)),
        ("label", "spam", LABELS, "spam or news", (False, False)),  # naming several is wrong
        ("label", "spam", LABELS, "spammer", (False, False)),
        ("label", "spam", LABELS, "", (False, False)),
        ("number", "1,234", {}, "First 7. So it is $1234.00!", (True, True)),
        ("number", "1234", {}, "It is 1234, not 1235", (False, True)),
        ("number", "1234", {}, "none", (False, False)),
        ("contains", "New York", {}, "It is in new  york city", (True, None)),
        ("contains", "New York", {}, "It is York", (False, None)),
        ("regex", r"(?i)^\s*yes\b", {}, "Yes, sir", (True, None)),
        ("regex", r"(?i)^\s*yes\b", {}, "Oh yes", (False, None)),
        ("choice", "spam", LABELS, " spam", (True, None)),
        ("choice", "spam", LABELS, "not spam", (False, None)),
    ],
)
def test_checks(tmp_path, check, answer, options, said, expected):
    file = written(tmp_path / "mine.jsonl", [{"prompt": "?", "answer": answer}])
    task = tasks.from_jsonl(file, check, **options)
    assert task.check == check
    assert verdict(task, said) == expected
    in_rows = written(tmp_path / "rows.jsonl", [{"prompt": "?", "answer": answer, "check": check}])
    assert verdict(tasks.from_jsonl(in_rows, **options), said) == expected


def test_rows_may_be_checked_in_different_ways(tmp_path):
    rows = [
        {"prompt": "2+2?", "answer": "4", "check": "number"},
        {"prompt": "Who?", "answer": "Ada"},
        {"prompt": "Is it?", "answer": "no", "check": "label", "choices": ["yes", "no"]},
    ]
    task = tasks.from_jsonl(written(tmp_path / "mixed.jsonl", rows), "contains")
    problems = task.split("test")
    assert task.check == "mixed"
    said = ["It is 4.", "Ada Lovelace", "No."]
    columns = {key: [row.get(key) for row in problems] for key in problems[0] if key != "prompt"}
    assert task.reward(["p"] * 3, said, **columns) == [1, 1, 1]
    assert task.reward(["p"] * 3, [*said[1:], said[0]], **columns) == [-1, -1, -1]
    assert task.formed(["none", "none", "yes or no"], problems) == [False, True, False]


def test_options_are_the_choices_of_the_row_or_the_labels(tmp_path):
    rows = [
        {"prompt": "a", "answer": "no", "check": "choice"},
        {"prompt": "b", "answer": "cat", "check": "choice", "choices": [" cat", "a long dog "]},
        {"prompt": "c", "answer": "yes", "check": "choice"},
    ]
    task = tasks.from_jsonl(written(tmp_path / "c.jsonl", rows))
    assert [task.options(row) for row in task.split("test")] == [
        ("no", "yes"),
        ("cat", "a long dog"),
        ("no", "yes"),
    ]
    assert task.norm == "length"  # as acc_norm: a row has choices of its own
    assert tasks.from_jsonl(written(tmp_path / "d.jsonl", rows[::2])).norm == "sum"
    assert tasks.load("math").options({"answer": "1"}) == ()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"answer": "a", "check": "near"}], "line 1: 'check' is 'near'; it must be one of exact, label, number"),
        ([{"answer": "a", "check": "choice"}], "line 1: check 'choice' needs at least two different options"),
        ([{"answer": "a", "check": "label", "choices": ["b", "c"]}], "line 1: 'answer' is 'a'; it must be one of"),
        ([{"answer": "a", "check": "label", "choices": "b"}], "line 1: 'choices' is 'b'; expected a non-empty list"),
        ([{"answer": "a"}, {"answer": "x", "check": "number"}], "line 2: 'answer' is 'x'; check 'number' needs"),
        ([{"answer": "(", "check": "regex"}], "line 1: 'answer' is '\\(', no regular expression"),
        ([{"answer": "a", "check": "choice", "choices": ["a", "b"]}, {"answer": "a"}], "'choice' goes with no other"),
        ([{"prompt": [{"role": "user", "content": "x"}], "answer": "a"}, {"answer": "a"}], "some prompts are text"),
        ([{"prompt": [{"content": "x"}], "answer": "a"}], "line 1: 'prompt' is .*expected a text, or messages"),
        ([{"prompt": [], "answer": "a"}], r"line 1: 'prompt' is \[\]; expected a text, or messages"),
        ([{"prompt": [{"role": "user", "content": ""}], "answer": "a"}], "line 1: 'content' is ''"),
        ([{"answer": "a", "check": ["exact"]}], r"line 1: 'check' is \['exact'\]; it must be one of"),
        ([{"answer": "a", "check": {"a": 1}}], "line 1: 'check' is .*; it must be one of"),
        ([{"answer": "a", "check": "label", "choices": ["a", " ", "b"]}], "line 1: an option is empty"),
        ([{"answer": "Yes", "check": "label", "choices": ["Yes", "yes", "no"]}], "differ only in case or spaces"),
    ],
)
def test_what_a_file_must_not_hold(tmp_path, rows, message):
    file = written(tmp_path / "bad.jsonl", [{"prompt": "p", **row} for row in rows])
    with pytest.raises(ValueError, match=message) as error:
        tasks.load(file)
    assert str(file) in str(error.value)


def test_chats_and_the_system_message(tmp_path):
    from dataclasses import replace

    chat = [{"role": "user", "content": "2+2?"}]
    own = [{"role": "system", "content": "Mine."}, *chat]
    file = written(tmp_path / "c.jsonl", [{"prompt": chat, "answer": "4"}, {"prompt": own, "answer": "4"}])
    task = tasks.load(file)
    assert task.chat
    assert task.made_of_chats
    assert [row["prompt"] for row in task.split("test")] == [chat, own]
    empty = {"role": "system", "content": ""}
    assert [row["prompt"] for row in replace(task, system="").split("test")] == [[empty, *chat], own]
    plain = tasks.load(written(tmp_path / "p.jsonl", [{"prompt": "2+2?", "answer": "4"}]), chat=True)
    assert replace(plain, system="").split("test")[0]["prompt"] == [empty, *chat]


@pytest.mark.parametrize("name", ["films.csv", "films.jsonl"])
def test_texts_with_labels(tmp_path, name):
    rows = [("Fine, really", "pos", "train"), ('So "bad"\nindeed', "neg", "test"), ("Good", "pos", "test")]
    file = tmp_path / name
    if name.endswith("csv"):
        import csv

        with file.open("w", newline="", encoding="utf-8-sig") as out:
            csv.writer(out).writerows([("text", "label", "split"), *rows])
    else:
        file.write_text(
            "".join(json.dumps(dict(zip(("text", "label", "split"), row, strict=True))) + "\n" for row in rows)
        )
    task = tasks.load(file)
    assert (task.name, task.check, task.labels) == ("films", "choice", ("neg", "pos"))
    first, second = task.split("test")
    ask = "Which of these fits the text best: neg, pos? Answer with one word."
    assert first["prompt"] == f'{ask}\n\nText: So "bad"\nindeed\nLabel:'
    assert (first["answer"], first["target"], second["answer"]) == ("neg", " neg", "pos")
    assert task.options(first) == ("neg", "pos")
    (chat,) = tasks.load(file, chat=True).split("train")
    assert chat["prompt"] == [{"role": "user", "content": f"{ask}\n\nText: Fine, really"}]
    assert tasks.load(file, check="label").check == "label"
    words = tasks.classification(file, "Is it {labels}?", {"pos": "good", "neg": "bad"}, "label")
    assert words.split("test")[0]["prompt"].startswith("Is it good, bad?\n\nText: So")
    assert words.split("test")[0]["answer"] == "bad"
    assert verdict(words, "It is bad.") == (True, True)
    with pytest.raises(ValueError, match="'label' is 'neg'; it must be one of pos"):
        tasks.classification(file, labels=["pos", "other"])
    with pytest.raises(ValueError, match="check is 'number'; for a classification"):
        tasks.load(file, check="number")


def test_which_files_are_texts_with_labels(tmp_path):
    (tmp_path / "x.csv").write_text("text,kind\na,b\n")
    with pytest.raises(ValueError, match=r"x\.csv: the columns are text, kind; expected text and label"):
        tasks.load(tmp_path / "x.csv")
    (tmp_path / "y.csv").write_text("text,label\na,b\nc,b\n")
    with pytest.raises(ValueError, match="at least two"):
        tasks.load(tmp_path / "y.csv")
    (tmp_path / "z.csv").write_text("text,label\na,\n")
    with pytest.raises(ValueError, match=r"z\.csv, line 2: 'label' is ''"):
        tasks.load(tmp_path / "z.csv")
    with pytest.raises(FileNotFoundError, match=r"gone\.csv"):
        tasks.load(tmp_path / "gone.csv")
    both = written(tmp_path / "both.jsonl", [{"prompt": "p", "answer": "a", "text": "t", "label": "l"}])
    assert tasks.load(both).split("test")[0]["prompt"] == "p"


def test_arc_by_the_likelihood_of_its_options(tmp_path):
    raw = {
        "question": "Which is hot?",
        "answerKey": "2",
        "choices": {"text": ["Ice", "Lava flow"], "label": ["1", "2"]},
    }
    (tmp_path / "test.jsonl").write_text(json.dumps(raw) + "\n")
    (letter,) = tasks.load("arc_easy", tmp_path / "test.jsonl").split("test")
    task = tasks.load("arc-easy", tmp_path / "test.jsonl", check="choice")
    assert (task.check, task.norm, task.name) == ("choice", "length", "arc_easy")
    (row,) = task.split("test")
    assert letter["answer"] == "B"
    assert row["answer"] == "Lava flow"
    assert task.options(row) == ("Ice", "Lava flow")
    assert row["prompt"] == "Question: Which is hot?\nAnswer:"
    assert task.verdicts(["Lava flow", "Ice"], [row] * 2) == [True, False]
    by_letter = tasks.load("arc_easy", tmp_path / "test.jsonl")
    assert by_letter.formed(["(B)", "I do not know"], [letter] * 2) == [True, False]
    (chat,) = tasks.load(f"arc-easy:{tmp_path / 'test.jsonl'}", check="choice", chat=True).split("test")
    assert chat["prompt"] == [{"role": "user", "content": "Which is hot?"}]
    with pytest.raises(ValueError, match="check 'number': 'arc_easy' can be checked by 'choice'"):
        tasks.load("arc_easy", tmp_path / "test.jsonl", check="number")
    with pytest.raises(ValueError, match="'math' has a check of its own"):
        tasks.load("math", check="choice")


def test_labels_are_named_by_whole_words():
    assert named("C++ or c", ["c++", "c"]) == ["c++", "c"]
    assert named("x", []) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\nso good,pos\nbad, really,neg\n", "line 3: 3 cells, .*'neg', and the header has 2"),
        ("text,label,label\na,pos,neg\nb,neg,pos\n", "several columns 'label'"),
    ],
)
def test_a_table_whose_cells_belong_to_no_column_is_refused(tmp_path, text, message):
    """csv.DictReader takes the second cell for the label and drops the third, and of two columns takes the last."""
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        tasks.load(str(file))


def test_empty_cells_at_the_end_of_a_row_are_no_columns(tmp_path):
    file = tmp_path / "good.csv"
    file.write_text('text,label\n"so, so",neg,\ngood,pos,,\n')
    assert tasks.load(str(file)).labels == ("neg", "pos")
