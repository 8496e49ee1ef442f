"""Draw the frozen test splits of the built-in tasks: `python -m t2kernels.tiny.freeze`."""

import json
from itertools import islice

from t2kernels.tasks import names, tiny

SEED = 0


def lines(task: str) -> str:
    """The test file of a task: 2000 rows for math, code and reason, 1000 for the others; i.i.d., duplicates kept."""
    count = 2000 if task in ("math", "code", "reason") else 1000
    drawn = islice(tiny.problems(task, "test", SEED), count)
    return "".join(json.dumps({"prompt": p.prompt, "answer": p.answer}, separators=(",", ":")) + "\n" for p in drawn)


def main() -> None:
    """Write the test file of every task."""
    tiny.FROZEN.mkdir(exist_ok=True)
    for task in names():
        (tiny.FROZEN / f"{task}.jsonl").write_text(lines(task), newline="\n")


if __name__ == "__main__":
    main()
