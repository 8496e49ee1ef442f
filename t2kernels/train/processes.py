"""Several processes that train the same experts: what their environment asks for, and lists gathered from all."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from transformers import set_seed

Item = TypeVar("Item")


TORCHRUN = "torchrun --nproc_per_node N SCRIPT"
DEEPSPEED = (
    "experts in DeepSpeed were never tested, and z is small: there is no optimiser state worth sharding. Start with "
    f"{TORCHRUN}; for a base model that does not fit, call fully_shard in a loop of your own "
    "(docs/howto/several-gpus.md)"
)


def unsupported_environment() -> str | None:
    """Why the settings of `accelerate launch` are refused, with the name of the setting; None if they work."""
    value = os.environ.get
    if under_deepspeed():
        return f"accelerate was started with DeepSpeed: {DEEPSPEED}"
    if value("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes"):
        return "accelerate was started with FSDP, in which the trainer was never run; leave it out"
    if value("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no"):
        return "accelerate was started with --dynamo_backend, but the shapes of rollouts change with every step"
    if value("ACCELERATE_MIXED_PRECISION", "no").lower() == "fp8":
        return "accelerate was started with --mixed_precision fp8, which replaces linear layers; take bf16"
    return lone_launch()


def under_deepspeed() -> bool:
    """Whether accelerate would use DeepSpeed: `accelerate launch`, a plugin or `TrainingArguments(deepspeed=...)` set
    this."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true", "yes")


def lone_launch() -> str | None:
    """Why the one process of `accelerate launch --cpu --num_processes 2` is refused; None elsewhere.

    accelerate leaves an address for the others to meet at, but starts none, and tells no number of processes.
    """
    set_by_accelerate = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"}
    if set_by_accelerate <= set(os.environ) and "WORLD_SIZE" not in os.environ:
        return f"accelerate launch was asked for several processes, and without a GPU it starts one: take {TORCHRUN}"
    return None


def alone_by_mistake(processes: int) -> str | None:
    """Why a single process was probably meant to be one of several; None if there are several, or one was meant."""
    if processes == 1 and os.environ.get("WORLD_SIZE", "1") != "1":
        return f"WORLD_SIZE is {os.environ['WORLD_SIZE']}"
    return None


def gather(own: list[Item], processes: int) -> list[list[Item]]:
    """The lists of all processes, in the order of their ranks. Every process must call it."""
    if processes == 1:
        return [own]
    parts: list[list[Item]] = [[] for _ in range(processes)]
    torch.distributed.all_gather_object(parts, own)
    return parts


def seed_by_rank(seed: int, rank: int, processes: int) -> None:
    """Give each process random numbers of its own, for sampling. Call it when all that is replicated is made.

    The order of the data has generators of its own, which start from the same seed everywhere.
    """
    if processes > 1:
        set_seed(seed + rank)
