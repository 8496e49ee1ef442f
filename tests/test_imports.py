"""Every import of our own names something that is there, also where the importing file needs a package that is not."""

import ast

import pytest

import t2kernels
from tests.helpers.paths import ROOT

FOLDERS = ("t2kernels", "tests", "benchmarks", "examples")


def sources() -> dict[str, str]:
    """{dotted name of a module: its text}; a package has the name of its folder and ".__init__"."""
    files = [f for folder in FOLDERS for f in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f.read_text(encoding="utf-8") for f in files}


def names_of(tree: ast.Module) -> set[str]:
    """The names that a module binds, also in conditions and `try` blocks; "*" if it makes names on demand."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add("*" if node.name == "__getattr__" and node in tree.body else node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def missing(modules: dict[str, str]) -> list[str]:
    """The imports of modules or names of `modules` that do not exist."""
    trees = {name: ast.parse(text) for name, text in modules.items()}
    bound = {name: names_of(tree) for name, tree in trees.items()}
    folders = {name.rpartition(".")[0][:n] for name in modules for n in range(len(name))} - {""}
    wrong = []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            parts = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            if base.partition(".")[0] not in ("t2kernels", "tests"):
                continue
            home = base if base in modules else f"{base}.__init__"
            for alias in node.names:
                path = f"{base}.{alias.name}"
                known = bound.get(home, set())
                there = alias.name in known or "*" in known or path in modules or f"{path}.__init__" in modules
                if not (there or path in folders or path == "t2kernels._C"):
                    wrong.append(f"{name}:{node.lineno} imports {path}")
    return wrong


def test_every_import_of_our_own_is_there():
    modules = sources()
    assert len(modules) > 300
    assert not missing(modules)


GOOD = {
    "t2kernels.__init__": "def __getattr__(name): ...",
    "t2kernels.a.__init__": "",
    "t2kernels.a.b": "def f(): ...\nX: int = 1\ntry:\n    import os\nexcept ImportError:\n    os = None",
    "t2kernels.a.c": "from .b import f, X, os\nfrom t2kernels import anything, a\nfrom t2kernels.a import b",
}


@pytest.mark.parametrize(
    "text",
    [
        "from .nobody import f",
        "from .b import nobody",
        "from t2kernels.a import nobody",
        "from t2kernels.a.b import f, nobody as f2",
        "def late():\n    from ..a.gone import f",
    ],
)
def test_a_missing_one_is_found(text):
    assert not missing(GOOD)
    assert len(missing({**GOOD, "t2kernels.a.d": text})) == 1


def test_the_stub_of_the_package_offers_what_is_imported_on_demand():
    """Type checkers read `__init__.pyi`; at run time the names come from the tables of `__init__.py`."""
    tree = ast.parse((ROOT / "t2kernels" / "__init__.pyi").read_text(encoding="utf-8"))
    homes = {
        alias.asname: (node.module or alias.name).removeprefix("t2kernels.")
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes == {**t2kernels._HOME, **{name: name for name in t2kernels._SUBPACKAGES}}
    stubs = {node.name: [base.id for base in node.bases] for node in tree.body if isinstance(node, ast.ClassDef)}
    classes = {name: value for name, value in vars(t2kernels).items() if isinstance(value, type)}
    errors = {name: [b.__name__ for b in c.__bases__] for name, c in classes.items() if c.__module__ == "t2kernels"}
    assert stubs == errors
    assert set(t2kernels.__all__) <= {*homes, *stubs}
