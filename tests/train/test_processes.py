"""Two processes train as one would: the same z, logs of all, samples of their own, the same bits after a resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import t2kernels as t2
from t2kernels import StateError, train
from t2kernels.train import SVFConfig, processes
from t2kernels.train.arguments import UnsupportedSettingError
from tests.helpers import two_processes

# At the default rate of .02 the KL jumps from .02 to .6 in a step: such a path enlarges the rounding of sums over 8
# rows and over twice 4, which is 1e-7 of the gradient's norm.
GREEDY = {
    "temperature": 0.0, "max_steps": 5, "advantage": "batch", "kl_coef": 0.1, "warmup_steps": 0, "learning_rate": 0.006
}  # fmt: skip
SAMPLED = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
BLOCK = {"block": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.006}
# Not Adam, whose first steps have the size of the rate where the gradient is nothing but rounding.
SGD = {"block": True, "max_steps": 5, "save_strategy": "no", "optim": "sgd", "learning_rate": 0.05}
WORLD = 2


def start(folder: Path, runs: dict, processes: int = WORLD) -> tuple[list[dict], str]:
    """Run `two_processes` under torchrun. Returns (what each process wrote, all that was printed)."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        two_processes.__file__, str(folder), json.dumps(runs),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{i}.pt") for i in range(processes)], done.stdout + done.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes did in five trainings. The second half of `cut` is a later start."""
    folder = tmp_path_factory.mktemp("two")
    both = {"experts": ["math", "code"]}
    runs = {
        "greedy": {**GREEDY, "per_device_train_batch_size": 4},
        "several": {
            **GREEDY,
            **both,
            "max_steps": 3,
            "learning_rate": 0.02,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
        },
        "one_prompt": {**SAMPLED, "max_steps": 1, "one_prompt": True, "save_strategy": "no"},
        "straight": SAMPLED,
        "cut": {**SAMPLED, "max_steps": 2},
        "block": {**BLOCK, "per_device_train_batch_size": 4},
        "sgd": {**SGD, "per_device_train_batch_size": 4},
        "block_cut": {**BLOCK, "per_device_train_batch_size": 4, "max_steps": 2},
    }
    first, printed = start(folder, runs)
    resumed = {**BLOCK, "per_device_train_batch_size": 4, "resume": str(folder / "block_cut/run/checkpoint-2")}
    again, _ = start(folder, {"cut": {**SAMPLED, "resume": True}, "block_cut": resumed})
    return first, again, printed


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What this process does alone, with batches twice as large."""
    folder = str(tmp_path_factory.mktemp("one"))
    both = {"experts": ["math", "code"]}
    runs = {
        "greedy": {**GREEDY, "per_device_train_batch_size": 8},
        "several": {
            **GREEDY,
            **both,
            "max_steps": 3,
            "learning_rate": 0.02,
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": 2,
        },
    }
    runs["sgd"] = {**SGD, "per_device_train_batch_size": 8}
    return {key: two_processes.start(f"{folder}/{key}", settings) for key, settings in runs.items()}


def apart(a: dict, b: dict) -> float:
    return max((a[e][m] - b[e][m]).abs().max().item() for e in a for m in a[e])


@pytest.mark.parametrize("run", ["greedy", "several"])
def test_two_processes_reach_the_z_of_one(two, one, run):
    (first, second), *_ = two
    assert [rank[run]["world"] for rank in (first, second)] == [2, 2]
    assert apart(first[run]["z"], second[run]["z"]) == 0
    moved = max((z - 1).abs().max() for z in one[run]["z"]["math"].values())
    assert moved > 0.02
    # Adam divides by the root of small squares: more than one expert, with fewer rows each, enlarges the rounding.
    assert apart(first[run]["z"], one[run]["z"]) < (1e-6 if run == "greedy" else 1e-5)


@pytest.mark.parametrize("run", ["greedy", "several"])
def test_logs_are_of_all_processes(two, one, run):
    (first, second), *_ = two
    alone = one[run]["logs"]
    assert len(alone) == len(first[run]["logs"]) > 2
    keys = {"loss", "grad_norm", "reward", "accuracy", "kl", "completion_length"}
    keys |= {f"{e}_{k}" for e in ("math", "code") for k in ("reward", "kl")} if run == "several" else set()
    for logs in (first[run]["logs"], second[run]["logs"]):
        for mine, wanted in zip(logs, alone, strict=True):
            assert keys <= set(mine)
            for key in keys & set(wanted):
                assert mine[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-6), key
    assert any(a[2] != b[2] for a, b in zip(first[run]["batches"], second[run]["batches"], strict=True))
    for key, value in one[run]["evaluation"].items():
        if "runtime" not in key:
            assert first[run]["evaluation"][key] == pytest.approx(value), key


def test_each_process_samples_for_itself(two):
    (first, second), *_ = two
    (prompts, mine, _), (same, others, _) = first["one_prompt"]["batches"][0], second["one_prompt"]["batches"][0]
    assert len({*prompts, *same}) == 1
    assert mine != others
    assert set(first["straight"]["batches"][0][0]).isdisjoint(second["straight"]["batches"][0][0])  # data is shared out
    assert apart(first["straight"]["z"], second["straight"]["z"]) == 0


def test_a_resumed_run_of_two_processes_gives_the_same_bits(two):
    first, again, _ = two
    for straight, resumed in zip(first, again, strict=True):
        assert straight["straight"]["batches"][2:] == resumed["cut"]["batches"]
        assert apart(straight["straight"]["z"], resumed["cut"]["z"]) == 0
        assert straight["straight"]["logs"] == resumed["cut"]["logs"]


def test_any_trainer_trains_with_two_processes(two, one):
    """transformers' Trainer in `train.experts`: z as one process, checkpoints of experts only, the same bits after."""
    (first, second), again, _ = two
    assert [rank["sgd"]["world"] for rank in (first, second)] == [2, 2]
    assert apart(first["sgd"]["z"], second["sgd"]["z"]) == 0
    assert max((z - 1).abs().max() for z in one["sgd"]["z"]["mine"].values()) > 0.01
    assert apart(first["sgd"]["z"], one["sgd"]["z"]) < 1e-6
    for mine, wanted in zip(first["sgd"]["logs"], one["sgd"]["logs"], strict=True):
        assert mine["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    for straight, resumed in zip((first, second), again, strict=True):
        assert apart(straight["block"]["z"], resumed["block_cut"]["z"]) == 0
        assert straight["block"]["left"] == resumed["block_cut"]["left"] == []


def test_nothing_is_said_about_unused_parameters(two):
    assert "find_unused_parameters" not in two[2]
    assert "trains alone" not in two[2]


@pytest.fixture
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def test_a_lone_process_of_accelerate_is_refused(tmp_path, monkeypatch, alone):
    assert processes.lone_launch() is None
    # What `accelerate launch --cpu --num_processes 2` sets for the one process that it starts.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert processes.lone_launch() is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UnsupportedSettingError, match="it starts one: take torchrun"):
        two_processes.run(str(tmp_path), {"max_steps": 1})
    model, _ = t2.tiny.load()
    t2.patch_model(model)
    with pytest.raises(StateError, match="it starts one: take torchrun"), train.experts(model, "mine"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.lone_launch() is None


def test_the_real_accelerate_launch_is_refused_by_name(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from t2kernels.train import SVFConfig\nSVFConfig('out', use_cpu=True)\nprint('went on')\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(script)]
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "accelerate launch was asked for several processes" in done.stderr
    assert "went on" not in done.stdout


def test_a_process_that_should_be_one_of_several_is_warned_of(monkeypatch, alone):
    assert processes.alone_by_mistake(1) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.alone_by_mistake(2) is None
    assert processes.alone_by_mistake(1) == "WORLD_SIZE is 2"


def test_deepspeed_is_refused_with_what_to_do_instead(tmp_path, monkeypatch):
    with pytest.raises(UnsupportedSettingError, match=r"deepspeed=.* is not supported.*torchrun.*fully_shard"):
        SVFConfig(str(tmp_path), deepspeed={"zero_optimization": {"stage": 2}})
    model, _ = t2.tiny.load()
    t2.patch_model(model)
    ids = torch.tensor([[1, 2]])
    with train.experts(model, "mine"):
        model(input_ids=ids).logits[..., 5].sum().backward()
        # What accelerate's plugin, its launcher and TrainingArguments(deepspeed=...) set, here inside the block.
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(StateError, match=r"DeepSpeed trains this model: .*torchrun"):
            model(input_ids=ids)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8"),
    ],
)
def test_settings_of_accelerate_that_do_not_work_are_refused(tmp_path, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        two_processes.run(str(tmp_path), {"max_steps": 1})
