"""benchmarks/serve_hostile.py: every kind of attack beside good requests; a wrong answer gets no time."""

import itertools
from pathlib import Path

import pytest

from t2kernels import tiny
from tests.helpers.serving import served

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def hostile(monkeypatch):
    pytest.importorskip("fastapi")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serve_hostile

    return serve_hostile


@pytest.fixture
def attacks(hostile, tmp_path):
    file = tiny.experts()["math"]
    return list(itertools.islice(hostile.attacks(file.read_bytes(), hostile.overflowing(file, tmp_path)), 32))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "experts").mkdir()
    return tmp_path / "experts"


def test_good_requests_are_right_beside_every_kind_of_attack(hostile, attacks, folder):
    assert len({attack.kind for attack in attacks}) >= 32
    with served(process=True, experts=folder) as (client, service):
        found = hostile.run(client.base_url.port, 24, attacks, clients=8)
        assert (found["good"], found["wrong"], found["hostile"]) == (24, 0, len(attacks))
        assert not set(found["statuses"]) - {"200", "201", "400", "403", "404", "409", "413", "429", "500", "quiet"}
        assert found["health_asked"] > 0
        assert hostile.table([{"model": "tiny", **found}]).row_count == 1
        assert client.get("/health").json()["status"] == "ready"
        assert not service.engine.failure


def test_a_wrong_answer_or_an_answer_of_500_gets_no_time(hostile, attacks, folder, monkeypatch):
    from measure import WrongResult

    with served(process=True, experts=folder) as (client, _):
        port, real, texts = client.base_url.port, hostile.good, itertools.count()
        monkeypatch.setattr(hostile, "good", lambda *job: f"{real(*job)} {next(texts)}")
        with pytest.raises(WrongResult, match="good answers are wrong"):
            hostile.run(port, 8, attacks[:1], clients=2)
    assert hostile.fault(attacks[0]._replace(kind="stop texts"), 500)
    assert hostile.fault(attacks[0], "ConnectionResetError")
    assert not hostile.fault(attacks[0], 400)
