"""Every module, public class, function and method of the package says what it is."""

import ast

import pytest

from tests.test_architecture import PACKAGE, sources


def undocumented(name: str, text: str) -> list[str]:
    """The public definitions of a module without a docstring; the module itself counts."""
    tree = ast.parse(text)
    found = [] if ast.get_docstring(tree) else [name]

    def visit(body: list[ast.stmt], path: str) -> None:
        for node in body:
            if isinstance(node, ast.If | ast.Try | ast.With):
                blocks = [getattr(node, field, []) for field in ("body", "orelse", "finalbody")]
                for block in [*blocks, *(handler.body for handler in getattr(node, "handlers", []))]:
                    visit(block, path)
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            decorators = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
            if not ast.get_docstring(node) and not decorators & {"setter", "deleter", "overload"}:
                found.append(f"{path}.{node.name}")
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{path}.{node.name}")

    visit(tree.body, name)
    return found


def test_every_public_symbol_has_a_docstring():
    assert [symbol for name, text in sources(PACKAGE).items() for symbol in undocumented(name, text)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1", ["m"]),
        ("'''M'''\ndef f(): ...", ["m.f"]),
        ("'''M'''\nasync def f(): ...", ["m.f"]),
        ("'''M'''\ntry:\n    import a\nexcept ImportError:\n    def f(): ...", ["m.f"]),
        ("'''M'''\nclass A:\n    def f(self): ...", ["m.A", "m.A.f"]),
        ("'''M'''\nclass A:\n    '''A'''\n    @property\n    def f(self): ...", ["m.A.f"]),
        ("'''M'''\nclass A:\n    '''A'''\n    def __len__(self): ...\n    def _f(self): ...", []),
        ("'''M'''\n@typing.overload\ndef f(): ...\ndef _g(): ...", []),
    ],
)
def test_each_kind_is_found(text, found):
    assert undocumented("m", text) == found
