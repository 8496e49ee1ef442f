"""A whole model on the CUDA kernel, in its emulator, as `auto` runs it on a GPU where it has been checked."""

import pytest
import torch
import transformers

import t2kernels as t2
from tests.helpers import emulator

pytestmark = pytest.mark.skipif(emulator.WHY_NOT is not None, reason=str(emulator.WHY_NOT))


def patched(form, rank, dtype):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
    )
    model = transformers.LlamaForCausalLM(config)
    bank = t2.patch_model(model, form=form, rank=rank, rows=4)
    for name in "ab":
        bank.add(name, bank.expert({n: torch.rand(k) * 2 for n, k in bank.matrices.items()}))
    return model.to(dtype).eval()


@pytest.mark.parametrize("form, rank, launches", [("delta", 16, 2 + 2 + 2 + 2), ("factored", None, 2 + 2 + 2 + 2)])
def test_a_mixed_batch_gives_what_torch_gives(form, rank, launches):
    """Launches a block: two for each of q, k, v together, o, gate and up together, and down."""
    ids, experts = torch.randint(0, 60, (3, 4)), ["a", None, "b"]
    with torch.no_grad():
        exact = patched(form, rank, torch.float32)(ids, experts=experts).logits
        model = patched(form, rank, torch.bfloat16)
        plain = model(ids, experts=experts).logits
        with emulator.in_place_of_a_gpu() as cuda:
            got = model(ids, experts=experts).logits
            assert len(cuda.launches) == 2 * launches
            assert {line.choice.path for line in t2.explain(model, ids).lines} == {"decode"}
    assert (got - exact).norm() <= 1.2 * (plain - exact).norm()
    assert (got - exact).norm() < 0.05 * exact.norm()
