"""The comparison of two trees: this one with itself."""

import repairs


def test_a_tree_is_compared_with_itself():
    rows = list(repairs.run(repairs.ROOT, ["built-in"], ["base", "mixed"], repeats=3))
    assert [(r["model"], r["arm"]) for r in rows] == [("built-in", "base"), ("built-in", "mixed")]
    assert all(0 < r["low"] <= r["ratio"] <= r["high"] for r in rows)
    assert repairs.table(rows).row_count == 2
