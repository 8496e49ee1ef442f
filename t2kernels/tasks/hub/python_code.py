"""MBPP (arXiv 2108.07732) and HumanEval (arXiv 2107.03374): Python functions, right if they pass the tests. They run in `sandbox`."""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

from t2kernels.tasks import sandbox
from t2kernels.tasks.base import Task
from t2kernels.tasks.records import text, texts

from .source import Source

STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ", "\n```")
"""What begins something else after the body of a function, which is all that a base model is asked for in HumanEval."""


def humaneval_problem(raw: dict) -> dict:
    """A row of openai/openai_humaneval: task_id, prompt (head and docstring), canonical_solution (body), test, entry_point. Raises ValueError."""
    stub, body, test, name = (text(raw, column) for column in ("prompt", "canonical_solution", "test", "entry_point"))
    if name not in _defined(stub):
        raise ValueError(f"'prompt' does not define {name!r}, the 'entry_point'")
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


def mbpp_problem(raw: dict) -> dict:
    """A row of google-research-datasets/mbpp: text, code, test_list, test_setup_code; `sanitized` has prompt and test_imports instead.

    Raises ValueError.
    """
    asked, code = text(raw, "text" if "text" in raw else "prompt"), text(raw, "code")
    tests = texts(raw, "test_list")
    used = {node.id for node in ast.walk(_tree("\n".join(tests), "test_list")) if isinstance(node, ast.Name)}
    setup = "\n".join([*(raw.get("test_imports") or []), raw.get("test_setup_code") or ""])
    used |= {node.id for node in ast.walk(_tree(setup, "test_setup_code")) if isinstance(node, ast.Name)}
    names = sorted(used & _defined(code))
    if not names:
        raise ValueError("'test_list' uses no name that 'code' defines")
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


HUMANEVAL = Source("openai/openai_humaneval", humaneval_problem, train=None)
MBPP = Source("google-research-datasets/mbpp", mbpp_problem, ("full",))


def _tree(source: str, column: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as e:
        raise ValueError(f"{column!r} is not Python: {e}") from None


def _defined(source: str) -> set[str]:
    """The functions, classes and variables that a program defines at its top level."""
    found: set[str] = set()
    for node in _tree(source, "code").body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


# --- the program in a completion


def program(completion: str, names: Sequence[str], code: str = "") -> str:
    """The program that a completion gives. names: what it must define. code: the head of the function, if that is what it goes on from.

    The last fenced block that defines a name counts, closed or not, whatever its language; without one, the part of the text that is Python
    and defines a name; else the completion is the body that follows `code`, up to the first line that is not indented.
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
    """The fenced code blocks of a text, the last one also if it is not closed."""
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
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def longest_python(said: str, defines: Sequence[re.Pattern]) -> str:
    """From the imports or decorators before the first definition to the last line up to which the text is Python."""
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
    """The body of a function: up to the first line that is not indented, but the very first, which may have lost its indentation."""
    kept = []
    for line in completion.split("\n"):
        if kept and any(k.strip() for k in kept) and line.strip() and not line.startswith((" ", "\t")):
            break
        kept.append(line)
    found = re.sub(
        r"(?m)^\t+", lambda tabs: "    " * len(tabs[0]), "\n".join(kept)
    )  # the docstring before it is indented by spaces
    return found if found.lstrip("\n")[:1] in (" ", "\t") else f"    {found.lstrip()}"


# --- the task


@dataclass(frozen=True)
class CodeTask(Task):
    """A task whose answers are programs, and whose right answers pass the tests in the column `answer`.

    Further columns: `names` that the tests use, `setup` that runs before them, `code` that the completion goes on from, if any.
    limits: of each program, None for the usual ones. workers: programs at a time, by default one for each core.
    """

    limits: sandbox.Limits | None = None
    workers: int | None = None

    def verdicts(self, completions: Sequence[str | None], rows: Sequence[dict]) -> list[bool]:
        """Whether each program passes. Raises sandbox.SandboxError if this machine cannot confine them, ValueError without `names`."""
        for row in rows:
            if not row.get("names"):
                raise ValueError(f"task {self.name!r} needs the column 'names' of its rows; given are {', '.join(row)}")
        at = [i for i, c in enumerate(completions) if c is not None and c.strip()]
        jobs = [self.job(completions[i], rows[i]) for i in at]
        passed = {
            i: result.passed for i, result in zip(at, sandbox.run_many(jobs, self.limits, self.workers), strict=True)
        }
        return [passed.get(i, False) for i in range(len(completions))]

    def job(self, completion: str, row: dict) -> sandbox.Job:
        """What the sandbox is given for a completion."""
        names = tuple(row["names"])
        return sandbox.Job(
            program(completion, names, row.get("code") or ""), row["answer"], names, row.get("setup") or ""
        )
