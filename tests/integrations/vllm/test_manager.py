"""The expert manager of the vLLM plugin, with requests as vLLM makes them and without vLLM."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import t2kernels as t2
from t2kernels import tiny
from t2kernels.experts.expert import ExpertError
from t2kernels.integrations.vllm import requests
from t2kernels.integrations.vllm.engine.manager import ExpertManager
from t2kernels.layers.scale import make_scale


@pytest.fixture(scope="module")
def patched():
    model, _ = tiny.load()
    bank = t2.patch_model(model, targets="attention", rank=8, form="delta", rows=3)
    return model, bank


@pytest.fixture
def manager(patched):
    _, bank = patched
    manager = ExpertManager(bank, torch.full((64,), 0, dtype=torch.int32), host=4)
    yield manager
    empty(manager)
    assert len(bank) == 0
    assert bank.rows_in_use == 0  # nothing is held beyond the last step


@pytest.fixture(scope="module")
def files(patched, tmp_path_factory):
    folder, bank = tmp_path_factory.mktemp("experts"), patched[1]
    made = {}
    for e in range(1, 8):
        g = torch.Generator().manual_seed(e)
        made[e] = bank.expert({n: 1 + torch.randn(k, generator=g) for n, k in bank.matrices.items()}).save(
            folder / f"e{e}"
        )
    return made


def request(number, path, name=None, inplace=False):
    return SimpleNamespace(
        lora_int_id=number, lora_name=name or f"e{number}", lora_path=str(path), load_inplace=inplace
    )


def step(*runs):
    """A step of (id, tokens) in order."""
    return SimpleNamespace(index_mapping=tuple(np.repeat([i for i, _ in runs], [n for _, n in runs])))


def run(manager, files, *runs):
    manager.set_active_adapters([request(i, files[i]) for i in {i for i, _ in runs} - {0}], step(*runs))


def empty(manager):
    for number in manager.list_adapters():
        manager.remove_adapter(number)
    manager.set_active_adapters([], step())


def z_in(bank, row):
    """The expert that stands in a row, as z of the first matrix."""
    layer = bank.layers[0][0]
    return layer.scale[row] / layer.sigma + 1


def right(manager, files, *runs):
    """Every token's row holds its expert's numbers, and what lies behind the tokens is the base model's row."""
    start, layer, names = 0, *manager.bank.layers[0]
    for number, count in runs:
        rows = manager.token_rows[start : start + count].unique().tolist()
        assert len(rows) == (count > 0)
        z = t2.Expert.load(files[number]).z[names[0]] if number else torch.ones_like(layer.sigma)
        for row in rows:
            torch.testing.assert_close(layer.scale[row], make_scale(z, layer.sigma, "delta"), rtol=0, atol=0)
        start += count
    assert not manager.token_rows[start:].any()


def test_tokens_get_the_rows_of_their_experts(manager, files):
    where = manager.token_rows.data_ptr()
    for runs in (
        [(1, 5), (0, 3), (2, 1)],
        [(2, 1), (1, 1)],
        [(0, 2)],
        [(3, 64)],
        [(1, 2), (3, 1), (1, 4), (0, 1), (3, 2)],
        [],
    ):
        run(manager, files, *runs)
        right(manager, files, *runs)
        assert manager.tokens == sum(n for _, n in runs)
    assert manager.token_rows.data_ptr() == where


def test_an_expert_of_the_step_keeps_its_row_and_the_oldest_gives_way(manager, files):
    run(manager, files, (1, 1), (2, 1))
    run(manager, files, (2, 1), (3, 1))  # takes the row of 1
    right(manager, files, (2, 1), (3, 1))
    run(manager, files, (3, 1))
    run(manager, files, (1, 1), (3, 1))  # takes the row of 2: 3 is older by use, but in the step
    right(manager, files, (1, 1), (3, 1))
    assert manager.bank.evictions >= 2


def test_many_random_steps(manager, files):
    rng = np.random.default_rng(0)
    for _ in range(60):
        who = [0, *rng.choice(np.arange(1, 8), 2, replace=False)]
        runs = [(int(rng.choice(who)), int(rng.integers(1, 9))) for _ in range(rng.integers(1, 6))]
        run(manager, files, *runs)
        right(manager, files, *runs)
        assert len(manager.list_adapters()) <= 4


def test_more_experts_than_rows_are_an_error_and_the_next_step_is_right(manager, files):
    run(manager, files, (1, 1))
    with pytest.raises(RuntimeError, match="rows are in use"):
        run(manager, files, (1, 1), (2, 1), (3, 1))
    run(manager, files, (2, 2), (3, 1))
    right(manager, files, (2, 2), (3, 1))


def test_host_memory_is_bounded_and_files_are_read_again(manager, files):
    for number in files:
        manager.add_adapter(request(number, files[number]))
    assert manager.list_adapters() == set(map(int, manager.bank.names)) == {4, 5, 6, 7}
    run(manager, files, (1, 2))
    right(manager, files, (1, 2))
    run(manager, files, (2, 1), (3, 1))
    assert {2, 3} < manager.list_adapters()


def test_a_bad_file_changes_nothing(manager, files, tmp_path):
    run(manager, files, (1, 2))
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(files[2].read_bytes()[:100])
    other = t2.Expert({"model.layers.0.nothing": torch.ones(3)}).save(tmp_path / "other")
    for path, error in ((bad, "is not an expert"), (tmp_path / "none", "does not exist"), (other, "for another model")):
        with pytest.raises(ExpertError, match=error):
            manager.add_adapter(request(9, path))
    long = t2.Expert({manager.bank.layers[0][1][0]: torch.arange(16.0)}).save(tmp_path / "long")
    with pytest.raises(ValueError, match="would be lost"):
        manager.add_adapter(request(9, long))
    assert manager.list_adapters() == {1}
    assert manager.bank.names == ["1"]
    right(manager, files, (1, 2))


def test_an_id_belongs_to_one_expert(manager, files):
    manager.add_adapter(request(1, files[1]))
    with pytest.raises(ValueError, match="belongs to one expert"):
        manager.add_adapter(request(1, files[2]))
    manager.add_adapter(request(1, files[2], inplace=True))
    manager.set_active_adapters([request(1, files[2])], step((1, 3)))
    right(manager, {1: files[2]}, (1, 3))


def test_replacing_an_expert_of_the_running_step(manager, files):
    run(manager, files, (1, 2), (2, 1))
    manager.add_adapter(request(1, files[5], inplace=True))
    manager.set_active_adapters([request(1, files[5]), request(2, files[2])], step((1, 2), (2, 1)))
    right(manager, {1: files[5], 2: files[2]}, (1, 2), (2, 1))


def test_a_file_that_changed_is_read_again_when_that_is_asked_for(manager, files, tmp_path):
    path = tmp_path / "mine.safetensors"
    for e in (1, 2):
        path.write_bytes(files[e].read_bytes())
        manager.add_adapter(request(1, path, inplace=True))
        manager.set_active_adapters([request(1, path)], step((1, 2)))
        right(manager, {1: files[e]}, (1, 2))


def test_what_the_step_has_is_not_forgotten_for_what_it_loads(patched, files, tmp_path):
    manager, gone = ExpertManager(patched[1], torch.zeros(64, dtype=torch.int32), host=2), tmp_path / "gone.safetensors"
    gone.write_bytes(files[2].read_bytes())
    manager.add_adapter(request(2, gone))
    manager.add_adapter(request(1, files[1]))
    gone.unlink()
    manager.set_active_adapters([request(3, files[3]), request(2, gone)], step((3, 1), (2, 1)))  # 2 is the oldest
    right(manager, files, (3, 1), (2, 1))
    empty(manager)


def test_two_requests_that_vllm_takes_for_one(manager, files):
    manager.add_adapter(request(1, files[1], "same"))
    manager.add_adapter(request(2, files[2], "same"))
    manager.set_active_adapters(
        [request(1, files[1], "same")], step((1, 2), (2, 2))
    )  # the other was dropped from the set: it is known
    right(manager, files, (1, 2), (2, 2))
    with pytest.raises(RuntimeError, match="one name and different experts"):
        manager.set_active_adapters([request(1, files[1], "same")], step((1, 2), (3, 2)))


def test_removed_and_asked_for_again(manager, files):
    run(manager, files, (1, 2), (2, 1))
    assert manager.remove_adapter(1)
    assert not manager.remove_adapter(1)
    run(manager, files, (2, 1), (1, 2))
    right(manager, files, (2, 1), (1, 2))


def test_warm_up_runs_the_base_model(manager, files):
    with manager.dummy_lora_cache():
        assert manager.add_dummy_lora(request(1, "/not/a/real/path"), rank=8)
        assert not manager.add_dummy_lora(request(1, "/not/a/real/path"), rank=8)
    manager.set_active_adapters([request(1, "/not/a/real/path")], step((1, 7)))
    assert z_in(manager.bank, int(manager.token_rows[0])).eq(1).all()
    run(manager, files, (1, 2))  # an id of the warm-up is free for an expert
    right(manager, files, (1, 2))
    with pytest.raises(ValueError, match="belongs to one expert"):  # once
        manager.add_adapter(request(1, files[2]))


def test_a_warm_up_in_the_middle_leaves_experts_alone(manager, files):
    run(manager, files, (1, 2), (4, 1))
    dummies = [request(i, "/not/a/real/path") for i in (1, 2)]
    assert [manager.add_dummy_lora(r) for r in dummies] == [False, True]
    manager.set_active_adapters(dummies, step((1, 3), (2, 3)))
    manager.remove_all_adapters()
    assert manager.list_adapters() == {1, 4}
    run(manager, files, (1, 2), (4, 1))
    right(manager, files, (1, 2), (4, 1))
    assert manager.bank.names == ["1", "4"]


def test_a_step_beyond_the_buffer(manager, files):
    with pytest.raises(RuntimeError, match="max_num_batched_tokens"):
        run(manager, files, (1, 65))


def test_mixtures(manager, files):
    where = requests.address({files[1]: 0.25, files[2]: 0.5})
    mixed = t2.Expert.mix([(t2.Expert.load(files[1]), 0.25), (t2.Expert.load(files[2]), 0.5)])
    manager.set_active_adapters([request(1, where)], step((1, 3)))
    name = manager.bank.layers[0][1][0]
    torch.testing.assert_close(z_in(manager.bank, int(manager.token_rows[0])), mixed.z[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [512, 8192])
def test_steps_of_many_requests(patched, files, tokens):
    manager = ExpertManager(patched[1], torch.zeros(8192, dtype=torch.int32), host=8)
    who = [int(i) for i in np.arange(tokens // 16) % 3]  # requests of 16 tokens, two experts and the base model
    for i in range(3):  # never the same twice in a row
        runs = [(number, 16) for number in np.roll(who, i)]
        run(manager, files, *runs)
        right(manager, files, *runs)
    empty(manager)


def test_an_address_is_forgotten_under_all_of_its_ids(manager, files):
    for number in (1, 2):
        manager.add_adapter(request(number, files[1]))
    manager.add_adapter(request(3, files[3]))
    manager.forget(str(files[1]))
    assert manager.list_adapters() == {3}
    manager.forget("mem:nobody#0123456789abcdef")
    assert manager.list_adapters() == {3}
