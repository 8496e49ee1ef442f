"""Trains z on the built-in model in a loop of its own; under torchrun the model is sharded by FSDP2's `fully_shard`.

`tests/train/test_sharded.py` calls `train`, and starts two processes of python sharded_training.py FOLDER. Each writes
FOLDER/rank{RANK}.pt.
"""

import os
import sys

import torch
import torch.distributed as dist

import t2kernels as t2

TEXTS = ("12+3+4?", "7+8+9?", "rsx(gcaf)?", "1+2+5?")
NAMES = ("x", "math", "x", "x")  # one sequence of the batch is another expert's


def train(form: str, rank: int | None, processes: int = 1, own: int = 0) -> dict:
    """Two steps on the part of the batch that is this process's own. Returns what it saw."""
    model, tokenizer = t2.tiny.load()
    bank = t2.patch_model(model, form=form, rank=rank)
    bank.add("math", t2.tiny.experts()["math"], max_error=1.0)
    model.requires_grad_(False)
    bank.start_training("x")
    before, refused = sum(p.numel() for p in model.parameters()), ""
    if processes > 1:
        from torch.distributed.fsdp import fully_shard

        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        try:
            bank.start_training("late")
        except t2.T2Error as error:
            refused = str(error)
    here = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())
    parameters = bank.trained_parameters("x")
    optimiser = torch.optim.SGD(parameters.values(), lr=0.1)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    part = slice(own * len(TEXTS) // processes, (own + 1) * len(TEXTS) // processes)
    ids, mask, names = batch["input_ids"][part], batch["attention_mask"][part], NAMES[part]

    def logits() -> torch.Tensor:
        rows = bank.ids(list(names))
        return model(input_ids=ids, attention_mask=mask, expert_ids=rows, use_cache=False).logits

    for _ in range(2):
        found = torch.log_softmax(logits()[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
        ours = torch.tensor([name == "x" for name in names])
        loss = -found[ours].sum() * processes / NAMES.count("x")  # FSDP averages the gradients of the processes
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        answers = logits()
    return {
        "z": bank.stop_training("x").z, "answers": answers, "whole": before, "here": here, "refused": refused,
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    own = dist.get_rank()
    out = {form: train(form, rank, dist.get_world_size(), own) for form, rank in (("delta", 8), ("factored", None))}
    torch.save(out, f"{sys.argv[1]}/rank{own}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
