"""`generate` runs more forwards than one a token where a guidance model, beams or both are asked for."""

import pytest
import torch

import t2kernels as t2
from tests.helpers.families import build


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("form", ["factored", "delta"])
def test_each_row_has_its_own_expert(form, guided, beams):
    torch.manual_seed(0)
    model = build("llama")
    bank = t2.patch_model(model, form=form, rows=8)
    for name in "ab":
        bank.add(name, bank.expert({n: 1 + 0.5 * torch.randn(k) for n, k in bank.matrices.items()}))
    x = torch.randint(3, 60, (3, 5))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    if guided:
        options["guidance_scale"] = 1.5
    rows = ["a", None, "b"]
    together = model.generate(x, experts=rows, **options)
    for i, name in enumerate(rows):
        alone = model.generate(x[i : i + 1], experts=name, **options)
        assert torch.equal(together[i : i + 1, : alone.shape[1]], alone)
    with pytest.raises(ValueError, match="expert_ids has shape"):
        model.generate(x, experts=["a", "b"], **options)


def test_negative_prompts_of_another_number_are_named():
    model = build("llama")
    bank = t2.patch_model(model, rows=8)
    bank.add("a", bank.expert({n: torch.ones(k) for n, k in bank.matrices.items()}))
    x = torch.randint(3, 60, (3, 5))
    with pytest.raises(ValueError, match="for guidance_scale, give as many negative prompts as prompts"):
        model.generate(
            x,
            experts=["a", None, "a"],
            guidance_scale=1.5,
            negative_prompt_ids=x[:1],
            max_new_tokens=3,
            do_sample=False,
        )
