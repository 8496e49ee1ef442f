"""benchmarks/host_work.py: both engines are measured beside the plain loop, and a wrong result gets no time."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    pytest.importorskip("fastapi")
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_both_engines_are_measured():
    import host_work

    rows = list(host_work.run(((18, 9), (7, 7)), repeats=2))
    assert [(r["engine"], r["tokens"]) for r in rows] == [(e, t) for e in ("t2 serve", "vllm") for t in (18, 7)]
    assert all(r["us"] > 0 and r["loop_us"] > 0 and r["ratio"] > 0 for r in rows)
    assert host_work.table(rows).row_count == 4


def test_a_wrong_result_gets_no_time(monkeypatch):
    import host_work
    from measure import WrongResult

    right = host_work.ExpertIds.fill

    def wrong(self, requests, tokens):
        right(self, requests, tokens)
        self.ids[0] += 1

    monkeypatch.setattr(host_work.ExpertIds, "fill", wrong)
    with pytest.raises(WrongResult):
        next(host_work.run(((6, 3),), repeats=1))
