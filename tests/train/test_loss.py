"""Kinds of loss and advantage against the formulas of their papers, written out in fp64, and against TRL if it is
there."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from t2kernels.rollout.rewards import advantages
from t2kernels.train.loss import reinforce_loss, row_weights


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 4, 2, 6])[:, None]
    new = -torch.rand(6, 6, generator=g, dtype=torch.float64) * 3
    old = new + 0.5 * torch.randn(6, 6, generator=g, dtype=torch.float64)
    A = torch.randn(6, generator=g, dtype=torch.float64)
    return new, old, mask, A, torch.rand(6, 6, generator=g, dtype=torch.float64)


def by_hand(kind, new, old, mask, A, kl, beta, clip, longest):
    """Σ over rows and tokens, one at a time."""
    B, total = len(A), 0.0
    for i in range(B):
        row = 0.0
        for t in range(int(mask[i].sum())):
            if old is None:
                gain = A[i] * new[i, t]
            else:
                ratio = torch.exp(new[i, t] - old[i, t])
                gain = min(ratio * A[i], min(max(ratio, 1 - clip), 1 + clip) * A[i]) if clip else ratio * A[i]
            row = row - gain + beta * kl[i, t]
        scale = {
            "sum": 1 / B,
            "grpo": 1 / (B * int(mask[i].sum())),
            "dapo": 1 / int(mask.sum()),
            "dr_grpo": 1 / (B * longest),
        }[kind]
        total = total + scale * row
    return total


@pytest.mark.parametrize("kind", ["sum", "grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize(("stale", "clip"), [(False, None), (True, 0.2), (True, None)])
def test_losses_are_those_of_their_papers(kind, stale, clip):
    new, old, mask, A, kl = batch()
    old = old if stale else None
    x, y = new.clone().requires_grad_(True), new.clone().requires_grad_(True)
    lengths = mask.sum(1).tolist()
    weights = torch.tensor(row_weights(kind, lengths, ["a"] * 6, 8), dtype=torch.float64)
    poisoned = torch.where(mask, kl, float("nan"))
    found = reinforce_loss(x, mask, A, weights, poisoned, 0.1, old, clip)
    wanted = by_hand(kind, y, old, mask, A, kl, 0.1, clip, 8)
    torch.testing.assert_close(found, wanted)
    found.backward()
    wanted.backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert not x.grad[~mask].any()


def test_weights_are_of_each_expert_alone():
    for kind in ("sum", "grpo", "dapo", "dr_grpo"):
        both = row_weights(kind, [3, 5, 2, 7], ["a", "b", "a", "b"], 9)
        assert both[::2] == row_weights(kind, [3, 2], ["a", "a"], 9)
        assert both[1::2] == row_weights(kind, [5, 7], ["b", "b"], 9)


def test_the_first_update_with_clipped_ratios_is_that_of_reinforce():
    new, _, mask, A, _ = batch()
    weights = torch.full((6,), 1 / 6, dtype=torch.float64)
    x, y = new.clone().requires_grad_(True), new.clone().requires_grad_(True)
    reinforce_loss(x, mask, A, weights, old=new, clip=0.2).backward()
    reinforce_loss(y, mask, A, weights).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_advantages_of_grpo_and_leave_one_out():
    r = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.25, -0.5])
    groups = r.double().reshape(2, 4)
    std = ((groups - groups.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True).div(3).sqrt()
    wanted = ((groups - groups.mean(1, keepdim=True)) / (std + 1e-4)).reshape(-1)
    torch.testing.assert_close(advantages(r, ["a"] * 8, 4, "grpo").double(), wanted, rtol=1e-5, atol=1e-6)
    assert advantages(torch.ones(4), ["a"] * 4, 4, "grpo").abs().max() == 0
    others = torch.tensor([(groups[i // 4].sum() - r[i]) / 3 for i in range(8)])
    torch.testing.assert_close(advantages(r, ["a"] * 8, 4, "leave_one_out"), r - others.float())


class Unset(SimpleNamespace):
    """A trainer of which only what is set here is switched on."""

    def __getattr__(self, name):
        return None


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_losses_are_those_of_trl(kind, tmp_path):
    trl = pytest.importorskip("trl")
    new, old, mask, A, kl = batch()
    ref = new - kl  # TRL's k3 estimate differs from the exact KL: without it
    config = trl.GRPOConfig(str(tmp_path), loss_type=kind, beta=0.0, epsilon=0.2, max_completion_length=8, use_cpu=True)
    ids = torch.zeros(6, 6, dtype=torch.long)
    stub = Unset(
        args=config, beta=0.0, loss_type=kind, epsilon_low=0.2, epsilon_high=0.2, max_completion_length=8,
        importance_sampling_level="token", top_entropy_quantile=1.0, use_vllm=False, use_liger_kernel=False, tools=None,
        off_policy_mask_threshold=None, current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda t: t, reduce=lambda t, **k: t),
        _metrics={"train": defaultdict(list)}, aux_loss_enabled=False,
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros(6, 6), None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": ids, "prompt_mask": mask.long(), "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": A, "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    theirs = trl.GRPOTrainer._compute_loss(stub, None, inputs)
    weights = torch.tensor(row_weights(kind, mask.sum(1).tolist(), ["a"] * 6, 8), dtype=torch.float64)
    torch.testing.assert_close(
        reinforce_loss(new, mask, A, weights, old=old, clip=0.2), theirs.double(), rtol=1e-6, atol=0
    )
