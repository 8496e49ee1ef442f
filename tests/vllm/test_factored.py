"""Factored form: a checkpoint that `t2 decompose --format vllm` wrote, alone and over two processes in both layouts."""

import pytest

from t2kernels.integrations.vllm import engine_args
from t2kernels.integrations.vllm.engine.model_folder import write_checkpoint
from tests.vllm.worlds import LONG, ask, engine, wrong


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("factored")
    write_checkpoint(world.model, out)
    return out


@pytest.mark.parametrize("ranks, layout", [(1, "auto"), (2, "replicate"), (2, "shard")])
def test_every_prompt_with_every_expert(world, checkpoint, monkeypatch, ranks, layout):
    if ranks > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(checkpoint, **engine_args(rows=3, layout=layout, tensor_parallel_size=ranks)) as llm:
        pairs = world.pairs()
        assert not wrong(ask(llm, world, pairs), world, pairs)
        assert ask(llm, world, [(LONG, 1)])[0].num_cached_tokens == 32
