"""Delta form over two tensor-parallel processes."""

import pytest

from t2kernels.integrations.vllm import engine_args
from tests.vllm.worlds import LONG, ask, engine, wrong


@pytest.fixture(scope="module")
def llm(world, monkeypatch_module):
    monkeypatch_module.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(world.model, **engine_args(factors=world.factors, rows=3, tensor_parallel_size=2)) as llm:
        yield llm


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_every_prompt_with_every_expert(llm, world):
    pairs = world.pairs()
    assert not wrong(ask(llm, world, pairs), world, pairs)
    (first,), (again,) = (ask(llm, world, [(LONG, 4)]) for _ in range(2))
    assert first.num_cached_tokens in (0, 32)
    assert again.num_cached_tokens == 32
