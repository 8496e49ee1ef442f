"""MBPP (arXiv 2108.07732) and HumanEval (arXiv 2107.03374): Python functions that must pass tests, run in `sandbox`."""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from t2kernels import InputError
from t2kernels.tasks import sandbox
from t2kernels.tasks.base import Task
from t2kernels.tasks.records import Row, text, texts

from .source import Dataset, Rows, Source

STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ", "\n```")
"""Texts that follow the body of a function. In HumanEval a base model writes the body only."""


def humaneval_problem(raw: Row) -> Row:
    """The problem in a row of openai/openai_humaneval.

    raw: task_id, prompt (head and docstring), canonical_solution (body), test, entry_point. Raises ValueError.
    """
    stub, body, test, name = (text(raw, column) for column in ("prompt", "canonical_solution", "test", "entry_point"))
    if name not in _defined(stub):
        raise InputError(f"'prompt' does not define {name!r}, the 'entry_point'")
    ask = "Complete this function. Answer with the whole function, imports included, in one code block."
    return {
        "prompt": stub,
        "messages": [{"role": "user", "content": f"{ask}\n\n```python\n{stub.strip()}\n```"}],
        "answer": f"{test}\ncheck({name})\n",
        "setup": stub,
        "code": stub,
        "names": [name],
        "target": body,
        "chat_target": f"```python\n{stub}{body.rstrip()}\n```",
    }


def mbpp_problem(raw: Row) -> Row:
    """The problem in a row of google-research-datasets/mbpp.

    raw: text, code, test_list, test_setup_code; the config `sanitized` has prompt and test_imports instead of the first
    and the last. Raises ValueError.
    """
    asked, code = text(raw, "text" if "text" in raw else "prompt"), text(raw, "code")
    tests = texts(raw, "test_list")
    used = {node.id for node in ast.walk(_tree("\n".join(tests), "test_list")) if isinstance(node, ast.Name)}
    imports = texts(raw, "test_imports") if raw.get("test_imports") else []
    given = text(raw, "test_setup_code") if str(raw.get("test_setup_code") or "").strip() else ""
    setup = "\n".join([*imports, given])
    used |= {node.id for node in ast.walk(_tree(setup, "test_setup_code")) if isinstance(node, ast.Name)}
    names = sorted(used & _defined(code))
    if not names:
        raise InputError("'test_list' uses no name that 'code' defines")
    ask = f"{asked}\nYour code must pass these tests:\n\n" + "\n".join(tests)
    return {
        "prompt": f'"""\n{ask}\n"""\n',
        "messages": [{"role": "user", "content": f"{ask}\n\nAnswer with Python code in one code block."}],
        "answer": "\n".join(tests),
        "setup": setup,
        "code": "",
        "names": names,
        "target": code,
        "chat_target": f"```python\n{code}\n```",
    }


def _tree(source: str, column: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise InputError(f"{column!r} is not Python: {e or 'it is nested too deeply'}") from None


def _defined(source: str) -> set[str]:
    """The functions, classes and variables defined at the top level of a program."""
    found: set[str] = set()
    for node in _tree(source, "code").body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


# --- the program in a completion


def program(completion: str, names: Sequence[str], code: str = "") -> str:
    """The program in a completion.

    names: the names that it must define. code: the head of the function, if the completion is expected to be its body.

    The first of these that is found: the last fenced block that defines a name, closed or not, in any language; the
    part of the text that is Python and defines a name; the completion as the body after `code`, up to the first line
    that is not indented.
    """
    defines = [
        re.compile(rf"(?m)^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(name)}\b|^{re.escape(name)}\s*=")
        for name in names
    ]
    blocks = fenced(completion)
    for block in reversed(blocks):
        if any(d.search(block) for d in defines):
            return f"{code}\n{block}" if code else block
    unfenced = re.sub(r"(?m)^[ \t]*(?:```|~~~).*$", "", completion)
    if any(d.search(unfenced) for d in defines):
        found = longest_python(unfenced, defines)
        return f"{code}\n{found}" if code else found
    if not code:
        return blocks[-1] if blocks else unfenced
    indented = completion.strip("\n").startswith((" ", "\t"))
    return code + body(blocks[0] if blocks and not indented else completion)


def fenced(completion: str) -> list[str]:
    """The fenced code blocks of a text. The last one may be unclosed."""
    blocks: list[str] = []
    lines, fence = [], ""
    for line in completion.split("\n"):
        mark = re.match(r"[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[ \t]*$", line)
        if not fence and mark:
            fence, lines = mark[1], []
        elif fence and mark and mark[1].startswith(fence) and not mark[2]:
            blocks.append("\n".join(lines))
            fence = ""
        elif fence:
            lines.append(line)
    return [*blocks, "\n".join(lines)] if fence else blocks


def parses(source: str) -> bool:
    """Whether a text is Python."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def longest_python(said: str, defines: Sequence[re.Pattern[str]]) -> str:
    """The longest part of a text that is Python, from the imports or decorators before the first definition on."""
    lines = said.split("\n")
    starts = [
        i
        for i, line in enumerate(lines)
        if re.match(r"(?:from\s+\S+\s+import|import|def|class|@|async\s+def)\b|@", line)
    ]
    at = next((i for i, line in enumerate(lines) if any(d.match(line) for d in defines)), 0)
    for start in [s for s in starts if s <= at][:20] or [at]:
        for end in range(len(lines), at, -1):
            part = "\n".join(lines[start:end])
            if (end == len(lines) or lines[end - 1].strip()) and parses(part):
                return part
            if len(lines) - end > 200:
                break
    return "\n".join(lines[at:])


def body(completion: str) -> str:
    """The body of a function: the text up to the first line that is not indented.

    The very first line may be unindented: some completions lose its indentation.
    """
    kept = []
    for line in completion.split("\n"):
        if kept and any(k.strip() for k in kept) and line.strip() and not line.startswith((" ", "\t")):
            break
        kept.append(line)
    # The docstring before the body is indented by spaces, and Python does not allow a mixture.
    found = re.sub(r"(?m)^\t+", lambda tabs: "    " * len(tabs[0]), "\n".join(kept))
    return found if found.lstrip("\n")[:1] in (" ", "\t") else f"    {found.lstrip()}"


# --- the task


@dataclass(frozen=True)
class CodeTask(Task):
    """A task whose answers are programs. An answer is right if it passes the tests in the column `answer`.

    Further columns: `names`, the names that the tests use; `setup`, code that runs before them; `code`, the head of the
    function if the completion is its body.

    limits: for each program; None means the defaults. workers: programs at a time; None means one per core.
    """

    limits: sandbox.Limits | None = None
    workers: int | None = None

    def verdicts(self, completions: Sequence[str | None], rows: Sequence[Row]) -> list[bool]:
        """Whether each program passes its tests.

        Raises sandbox.SandboxError if this machine cannot confine programs, ValueError for a row without `names`.
        """
        for row in rows:
            if not row.get("names"):
                raise InputError(f"task {self.name!r} needs the column 'names'; the columns are {', '.join(row)}")
        given = {i: c for i, c in enumerate(completions) if c is not None and c.strip()}
        jobs = [self.job(completion, rows[i]) for i, completion in given.items()]
        results = sandbox.run_many(jobs, self.limits, self.workers)
        passed = {i: result.passed for i, result in zip(given, results, strict=True)}
        return [passed.get(i, False) for i in range(len(completions))]

    def job(self, completion: str, row: Row) -> sandbox.Job:
        """The sandbox job that tests a completion."""
        names = tuple(row["names"])
        source = program(completion, names, row.get("code") or "")
        return sandbox.Job(source, row["answer"], names, row.get("setup") or "")


def _make(stop: tuple[str, ...]) -> Callable[[str, Rows, str], Task]:
    def make(name: str, rows: Rows, checker: str) -> Task:
        return CodeTask(name, rows, max_new_tokens=512, stop=stop, checker="tests, in a sandbox")

    return make


TASKS: dict[str, Dataset] = {
    "mbpp": Dataset(Source("google-research-datasets/mbpp", mbpp_problem, ("full",)), _make(())),
    "humaneval": Dataset(Source("openai/openai_humaneval", humaneval_problem, train=None), _make(STOP)),
}
