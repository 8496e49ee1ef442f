"""Programs out of completions, and whether they pass."""

import json
from pathlib import Path

import pytest

from t2kernels import tasks
from t2kernels.tasks.hub.python_code import fenced, program

TASK = tasks.load("humaneval", Path(__file__).parents[1] / "data" / "humaneval.jsonl")
ROWS = TASK.split("test")
COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0] if key != "prompt"}
PROMPTS = [row["prompt"] for row in ROWS]

CODE = "def f(x):\n    return x * x"
STUB = 'from typing import List\n\n\ndef f(x: List[int]) -> int:\n    """ Square.\n    >>> f(3)\n    9\n    """\n'


def run(source: str) -> dict:
    names: dict = {}
    exec(source, names)
    return names


@pytest.mark.parametrize(
    "completion",
    [
        CODE,
        f"```python\n{CODE}\n```",
        f"```\n{CODE}\n```",
        f"```py\n{CODE}\n```",
        f"~~~python\n{CODE}\n~~~",
        f"````python\n{CODE}\n````",
        f"Sure!\n\n```python\n{CODE}\n```\nIt squares.",
        f"```python\n{CODE}",
        f"{CODE}\n```\nIt squares.",
        f"First:\n```python\ndef f(x):\n    return x + x\n```\nBetter:\n```python\n{CODE}\n```",
        f"```python\n{CODE}\n```\nUse it:\n```python\nprint(f(3))\n```",
        f"```bash\npip install x\n```\n```python\n{CODE}\n```",
        f"Here is the function:\n\n{CODE}\n\nThis squares its argument, for you.",
        f"Here it is.\n\nimport math\n\n{CODE}\n\nThat's it!",
        f"  ```python\n{CODE}\n  ```",
        f"```python\n{CODE}\n```\n\nQuestion: another\n```python\ndef g(x):\n    return 0\n```",
        "f = lambda x: x * x",
        "def g(y):\n    return y * y\ndef f(x):\n    return g(x)\n",
        "def f(x):\n    return x * x\n\nWrite a function that cubes.\n\ndef h(x):\n    return x ** 3",
    ],
)
def test_a_program_is_found(completion):
    assert run(program(completion, ["f"]))["f"](3) == 9


@pytest.mark.parametrize(
    "completion",
    [
        "    return x * x\n",
        "    return x * x\n\n\ndef other(x) -> int:\n    return 0\n",
        "    return x * x\n\nprint(f(3))\nassert f(3) == 10",
        "    return x * x\n# Next\n",
        "return x * x",
        "\n    y = x\n\n    return x * y\n```\nDone.",
        "```python\n    return x * x\n```",
        f"```python\n{STUB}    return x * x\n```",
        f"{STUB}    return x * x\n",
        "def f(x: List[int]) -> int:\n    return x * x",
        "The function:\n```\ndef f(x: List[int]) -> int:\n    return x * x\n```",
        "    if x:\n        return x * x\n    # nothing\n    return 0",
        "\treturn x * x",
    ],
)
def test_a_body_goes_on_from_the_head(completion):
    assert run(program(completion, ["f"], STUB))["f"](3) == 9


def test_fences():
    assert fenced("a\n```x\n1\n```\nb\n```\n2") == ["1", "2"]
    assert fenced("````\n```\n1\n```\n````") == ["```\n1\n```"]
    assert fenced("no code") == []


def mutated(body: str) -> str:
    """The same body with the values of its return statements wrong."""
    return "\n".join(
        line.replace("return ", "return None, ", 1) if line.strip().startswith("return ") else line
        for line in body.split("\n")
    )


def test_canonical_solutions_pass_and_mutated_ones_fail():
    n = len(ROWS)
    assert TASK.reward(PROMPTS, COLUMNS["target"], **COLUMNS) == [1.0] * n
    whole = [f"Of course.\n```python\n{row['code']}{row['target']}\n```" for row in ROWS]
    assert TASK.reward(PROMPTS, [[{"role": "assistant", "content": c}] for c in whole], **COLUMNS) == [1.0] * n
    wrong = [mutated(body) for body in COLUMNS["target"]]
    assert TASK.reward(PROMPTS, wrong, **COLUMNS) == [-1.0] * n
    assert TASK.reward(PROMPTS, ["    pass"] * n, **COLUMNS) == [-1.0] * n


def test_what_is_no_program_is_wrong():
    bad = [
        None,
        "",
        "  \n",
        "I do not know.",
        "```python\n```",
        "    return (",
        [],
        [{}],
        "\ud800",
        "def",
        "    " * 5000,
    ]
    rows = [ROWS[0]] * len(bad)
    columns = {key: [row[key] for row in rows] for key in COLUMNS}
    assert TASK.reward([""] * len(bad), bad, **columns) == [-1.0] * len(bad)


def test_cheats_are_wrong():
    cheats = [
        "    import os; os._exit(0)",
        "    raise SystemExit(0)",
        "    class Any:\n        def __eq__(self, other):\n            return True\n    return Any()",
        "    import builtins\n    builtins.AssertionError = Exception\n    return None",
        "    import sys\n    sys.modules['__main__'].check = lambda f: None\n"
        "    sys._getframe(1).f_globals['check'] = lambda f: None",
        "```python\ndef has_close_elements(*a):\n    return None\ndef check(candidate):\n    pass\n```",
    ]
    columns = {key: [ROWS[0][key]] * len(cheats) for key in COLUMNS}
    assert TASK.reward([""] * len(cheats), cheats, **columns) == [-1.0] * len(cheats)


def test_columns_that_are_missing():
    with pytest.raises(ValueError, match="needs the column 'names'; the columns are answer"):
        TASK.reward(["p"], ["c"], answer=["assert True"])
    with pytest.raises(ValueError, match="1 prompts, 1 completions and 0 answers"):
        TASK.reward(["p"], ["c"], answer=[])


def test_the_data_is_what_its_readme_says():
    folder = Path(__file__).parents[1] / "data"
    readme = (folder / "README.md").read_text()
    for path in folder.glob("*.jsonl"):
        assert path.name in readme
        assert all(json.loads(line) for line in path.read_text().splitlines())
