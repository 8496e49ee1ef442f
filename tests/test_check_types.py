"""scripts/check-types fails below its share, and says where the unknown types are."""

import runpy

import pytest

from tests.helpers.paths import ROOT


def symbol(name, known=True, exported=True, message=None):
    diagnostics = [{"message": message}] if message else []
    return {"name": name, "isTypeKnown": known, "isExported": exported, "diagnostics": diagnostics}


@pytest.fixture(scope="module")
def verdict():
    return runpy.run_path(str(ROOT / "scripts" / "check-types"))["verdict"]


def report(*symbols):
    return {"modules": [{"name": f"t2kernels{m}"} for m in ("", ".ops", ".ops.op")], "symbols": symbols}


def test_share_and_worst_modules(verdict):
    known = [symbol(f"t2kernels.ops.f{i}") for i in range(17)]
    unknown = [
        symbol("t2kernels.ops.op.run", known=False, message="Return type is unknown\n  more"),
        symbol("t2kernels.ops.op.A.x", known=False),
        symbol("t2kernels.ops.operands", known=False, message="Type is unknown"),
    ]
    hidden = symbol("t2kernels._private", known=False, exported=False)
    enough, text = verdict(report(*known, *unknown, hidden), 85)
    assert enough
    assert text.splitlines() == [
        "types: 85.0 % of 20 public symbols have a known type, at least 85 % must",
        "  2 in t2kernels.ops.op, first t2kernels.ops.op.run: Return type is unknown",
        "  1 in t2kernels.ops, first t2kernels.ops.operands: Type is unknown",
    ]
    assert not verdict(report(*known, *unknown, hidden), 85.1)[0]


def test_a_report_without_symbols_is_not_enough(verdict):
    assert not verdict(report(), 95)[0]
