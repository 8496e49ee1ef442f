"""Two tensor-parallel processes, and the wiring that replaces nothing of vLLM's: `worker_cls`."""

import pytest

from t2kernels.integrations.vllm import engine_args
from tests.vllm.worlds import LONG, ask, engine, wrong

WORKER = "t2kernels.integrations.vllm.engine.worker.ExpertWorker"


@pytest.fixture(scope="module")
def llm(world, monkeypatch_module):
    monkeypatch_module.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch_module.setenv("VLLM_PLUGINS", "")  # the plugin is not loaded at all
    with engine(
        world.model, **engine_args(factors=world.factors, rows=3, worker_cls=WORKER, tensor_parallel_size=2)
    ) as llm:
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
