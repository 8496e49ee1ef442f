"""Imports run in one direction, nothing goes in a circle, and rooms, files and lines stay small.

An import counts wherever it stands: at the top, in a function, or for types only.
"""

import ast
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import t2kernels
from tests.helpers.paths import ROOT

PACKAGE = ROOT / "t2kernels"
# Each room may import the rooms of the lines above it, and no room of its own line.
ORDER = (
    ("storage",),
    ("ops", "tasks"),
    ("factors",),
    ("layers", "tiny"),
    ("experts",),
    ("patching",),
    ("rollout",),
    ("train",),
    ("adapt",),
    ("evaluation",),
    ("serve",),
    ("integrations",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
ONLY = {"tasks": {"storage"}, "tiny": {"tasks", "storage"}}  # they know nothing of models
NOT_ROOMS = {"real", "benchmarks", "data", "docs", "helpers", "vllm"}  # folders of tests without a room of that name


def sources(folder: Path) -> dict[str, str]:
    """{dotted name of a module: its text}; a package has the name of its folder."""
    files = sorted(folder.rglob("*.py"))
    names = [file.relative_to(folder.parent).with_suffix("").as_posix().replace("/", ".") for file in files]
    return {n: f.read_text(encoding="utf-8") for n, f in zip(names, files, strict=True)}


def imports(name: str, text: str, known: set[str]) -> tuple[set[str], list[str]]:
    """(modules that a module imports, private names of others that it uses); `known` calls a package "a.__init__"."""

    def resolve(path: str) -> str | None:
        home = t2kernels._HOME.get(path.removeprefix("t2kernels."))
        for found in (path, f"{path}.__init__", f"t2kernels.{home}", f"t2kernels.{home}.__init__"):
            if found in known:
                return found
        return resolve(path.rpartition(".")[0]) if "." in path else None

    tree, bound, targets, private = ast.parse(text), {}, set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            for alias in node.names:
                path = f"{base}.{alias.name}"
                bound[alias.asname or alias.name] = path
                targets.add(resolve(path))
                if base.startswith("t2kernels") and alias.name.startswith("_") and path not in known:
                    private.append(path)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                sibling = f"{name.rpartition('.')[0]}.{alias.name}"  # a file that is run by its path
                path = sibling if sibling in known else alias.name
                bound[alias.asname or alias.name.partition(".")[0]] = path if alias.asname else path.partition(".")[0]
                targets.add(resolve(path) if path != "t2kernels" else None)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            targets |= {resolve(a.value) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    for node in ast.walk(tree):  # module.name, as in `import t2kernels as t2; t2.patch_model`
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            module = bound[node.value.id]
            if resolve(f"{module}.{node.attr}") and module == "t2kernels":
                targets.add(resolve(f"{module}.{node.attr}"))
            private_name = node.attr.startswith("_") and not node.attr.startswith("__")
            if private_name and module.startswith("t2kernels") and resolve(module) in (module, f"{module}.__init__"):
                private.append(f"{module}.{node.attr}")
    return {t for t in targets if t and t not in (name, "t2kernels.__init__")}, private


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other."""
    reach = {node: set(arrows.get(node, ())) for node in arrows}
    for middle in arrows:
        for node in arrows:
            if middle in reach[node]:
                reach[node] |= reach[middle]
    groups = {frozenset(b for b in arrows if b in reach[a] and a in reach[b]) for a in arrows if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def faults(modules: dict[str, str]) -> list[str]:
    """The rules that the modules break: {dotted name: text}."""
    found, files, rooms = [], defaultdict(set), defaultdict(set)
    room = lambda name: name.split(".")[1]  # noqa: E731
    for name, text in modules.items():
        if name == "t2kernels.__init__":  # the public names, of all rooms
            continue
        files[name], private = imports(name, text, set(modules))
        found += [f"{name} uses the private {p}" for p in private if p.rpartition(".")[0] != name]
        for target in files[name]:
            if (a := room(name)) != (b := room(target)):
                rooms[a].add(b)
                if LEVEL[b] >= LEVEL[a] or b not in ONLY.get(a, LEVEL):
                    found.append(f"{name} imports {target}: {a} may not import {b}")
    found += [f"a circle of files: {' '.join(c)}" for c in circles(files)]
    found += [f"a circle of rooms: {' '.join(c)}" for c in circles(rooms)]
    found += [f"{n} has {k} lines, 400 are allowed" for n, t in modules.items() if (k := t.count("\n")) > 400]
    folders = Counter(name.rpartition(".")[0] for name in modules)
    found += [f"{folder} has {n} files, 12 are allowed" for folder, n in folders.items() if n > 12]
    names = Counter(name.rpartition(".")[2] for name in modules)
    found += [
        f"{n} files are called {name}.py" for name, n in names.items() if n > 1 and name not in ("__init__", "__main__")
    ]
    return sorted(found)


def test_the_package_keeps_the_rules():
    broken = faults(sources(PACKAGE))
    assert not broken, "\n".join(broken)


def test_the_root_is_small():
    modules = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    folders = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert modules | folders <= LEVEL.keys(), "a room without a place in ORDER"
    assert len(modules) <= 3
    assert len(folders) <= 13
    assert len(modules | folders) <= 18


def test_tests_mirror_the_package():
    folders = {p.parent.relative_to(ROOT / "tests") for p in (ROOT / "tests").rglob("test_*.py")}
    assert [str(f) for f in folders if f.parts and f.parts[0] not in NOT_ROOMS and not (PACKAGE / f).is_dir()] == []


PYTHON_ERRORS = {
    *("ValueError", "TypeError", "KeyError", "IndexError", "RuntimeError", "OSError", "FileNotFoundError"),
    *("ImportError", "ModuleNotFoundError"),
}
# Programs that run without the package, the protocols of mappings and sequences, and an OSError of any number.
MAY_RAISE = {
    *(f"tasks/sandbox/{name}.py" for name in ("isolation", "judge", "player", "warden", "wire")),
    *("train/data.py", "storage.py", "layers/dense/readonly.py"),
}


def test_errors_that_are_meant_to_be_read_are_t2_errors():
    """The command line takes any other error for a bug."""
    bare = [
        f"{file.relative_to(PACKAGE)}:{node.lineno} raises {node.exc.func.id}"
        for file in PACKAGE.rglob("*.py")
        if file.relative_to(PACKAGE).as_posix() not in MAY_RAISE
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and getattr(node.exc.func, "id", "") in PYTHON_ERRORS
    ]
    assert not bare, "\n".join(bare)


def test_lines_are_short():
    files = [f for folder in ("t2kernels", "tests", "benchmarks", "examples") for f in (ROOT / folder).rglob("*.py")]
    long = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120
    ]
    assert not long, "\n".join(long)


GOOD = {
    "t2kernels.ops.op": "def run(): ...",
    "t2kernels.ops.planner": "from .op import run",
    "t2kernels.layers.linear": "from t2kernels.ops.planner import run\nfrom t2kernels.ops import op\nop.run",
    "t2kernels.tasks.base": "import json",
    "t2kernels.tiny.pretrain": "from t2kernels.tasks.base import json",
}


def test_a_good_package_has_no_faults():
    assert faults(GOOD) == []


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("ops.up", "from t2kernels.layers.linear import x", "ops may not import layers"),
        ("ops.lazy", "def f():\n    from t2kernels.layers import linear", "ops may not import layers"),
        ("ops.types", "if TYPE_CHECKING:\n    import t2kernels.layers.linear", "ops may not import layers"),
        ("ops.dynamic", "import_module('t2kernels.layers.linear')", "ops may not import layers"),
        ("ops.public", "import t2kernels as t2\nt2.tiny.load()", "ops may not import tiny"),
        ("ops.side", "from t2kernels.tasks.base import json", "ops may not import tasks"),
        ("tiny.model", "from t2kernels.ops.op import run", "tiny may not import ops"),
        ("ops.op", "from . import planner", "a circle of files: t2kernels.ops.op t2kernels.ops.planner"),
        ("ops.peek", "from .op import _hidden", "uses the private t2kernels.ops.op._hidden"),
        ("ops.reach", "from . import op\nop._hidden", "uses the private t2kernels.ops.op._hidden"),
        ("ops.long", "\n" * 401, "t2kernels.ops.long has 401 lines"),
        ("layers.op", "", "2 files are called op.py"),
    ],
)
def test_each_fault_is_found(name, text, fault):
    modules = GOOD | {"t2kernels.tiny.__init__": ""} | {f"t2kernels.{name}": text}
    assert [f for f in faults(modules) if fault in f], faults(modules)


def test_circles_of_rooms_and_full_folders_are_found():
    loop = {"t2kernels.ops.a": "import t2kernels.factors.b", "t2kernels.factors.b": "import t2kernels.ops.a"}
    assert "a circle of rooms: factors ops" in faults(loop)
    crowd = {f"t2kernels.ops.m{i}": "" for i in range(13)}
    assert faults(crowd) == ["t2kernels.ops has 13 files, 12 are allowed"]
