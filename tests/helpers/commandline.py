"""Running `t2` in tests."""

import pytest
from typer.testing import CliRunner

from t2kernels.cli import app, console


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Lines that are not wrapped."""
    monkeypatch.setattr(console.out, "_width", 160)
    monkeypatch.setattr(console.err, "_width", 160)


def t2_(*args, code=0):
    """Run `t2 args`; its output, stdout and stderr."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output
