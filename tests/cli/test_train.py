"""`t2 train` as it is steered: what is printed and written, what is kept, what is refused."""

import json
import re

import pytest

import t2kernels as t2
from t2kernels.cli.learning import shown
from t2kernels.cli.verbs.train import FEWEST
from t2kernels.tasks.base import bucket
from t2kernels.train import SVFTrainer
from tests.helpers.commandline import t2_, wide  # noqa: F401

QUICK = ("--steps", 3, "--batch", 8, "--rank", 4, "--form", "delta", "-n", 8, "--validation", 8)


def test_a_run_says_its_steps_and_leaves_its_history(tmp_path):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "mine", tmp_path / "run.svg"
    result = t2_(
        "train", "--task", "math", *QUICK, "--out", out, "--eval-every", 2, "--plot", plot, "--loss-batch", 4,
        "--advantage", "batch",
    )  # fmt: skip
    assert re.search(r"base model: [\d.]+% ± [\d.]+% of held-out problems", result)
    lines = re.findall(r"step (\d) of 3: reward [+-][\d.]+, right \d+%, KL [\d.]+", result)
    assert lines == ["1", "2", "3"]
    assert re.findall(r"step (\d): [\d.]+% ±", result) == ["2", "3"]  # every second, and the last
    assert result.index("base model:") < result.index("step 1 of 3")
    assert "best of 3 steps in validation: step" in result
    rows = [json.loads(line) for line in (tmp_path / "mine.history.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3]
    assert plot.read_text().startswith("<?xml")
    facts = t2.Expert.load(out).manifest
    assert facts["evaluated_on"] == 8
    assert facts["prompt"] == {"chat": False, "system": None}
    assert facts["steps"] in (2, 3)


def test_a_stopped_run_saves_its_expert(tmp_path, monkeypatch):
    rollout, calls = SVFTrainer.rollout, []

    def stopping(self, rows):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rollout(self, rows)

    monkeypatch.setattr(SVFTrainer, "rollout", stopping)
    text = t2_("train", "--task", "math", *QUICK, "--out", tmp_path / "mine", "--eval-every", 0, code=130)
    assert "stopped at step 2 of 3; the expert of step 2 is saved to" in " ".join(text.split())
    assert t2.Expert.load(tmp_path / "mine").manifest["steps"] == 2


def test_choices_train_without_writing(tmp_path, monkeypatch):
    rows = [{"text": f"{a}+{b}", "label": "odd" if (a + b) % 2 else "even"} for a in range(6) for b in range(6)]
    file = tmp_path / "parity.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("t2kernels.rollout.generation.Sampler.draw", lambda *a, **k: pytest.fail("it wrote"))
    t2_(
        "train", "--task", file, "--check", "choice", "--policy-loss", "log", *QUICK, "--out", tmp_path / "parity",
        "--eval-every", 3, "-n", 1, "--validation", 1,
    )  # fmt: skip
    assert t2.Expert.load(tmp_path / "parity").manifest["task"] == "parity"


def test_a_file_without_validation_rows_keeps_some_of_its_training_rows(tmp_path, monkeypatch):
    rows = [{"prompt": f"{i}=", "answer": str(i), "split": "test" if i == 0 else "train"} for i in range(300)]
    file, seen = tmp_path / "same.jsonl", set()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollout = SVFTrainer.rollout

    def noting(self, rows):
        seen.update(row["prompt"] for row in rows)
        return rollout(self, rows)

    monkeypatch.setattr(SVFTrainer, "rollout", noting)
    kept = {row["prompt"] for row in rows[1:] if bucket(row["prompt"]) == "validation"}
    args = ("train", "--task", file, *QUICK, "-n", 1, "--batch", 300, "--max-new-tokens", 2)
    text = t2_(*args, "--out", tmp_path / "same")
    assert len(kept) >= FEWEST
    assert f"{len(kept)} of the training problems are kept for validation" in text
    assert seen == {row["prompt"] for row in rows[1:]} - kept
    assert t2.Expert.load(tmp_path / "same").manifest["evaluated_on"] == min(8, len(kept))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["prompt"] not in kept))
    assert "the last expert is kept" in t2_(*args, "--out", tmp_path / "few")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--plot", "run.txt"), "a curve is written to"),
        (("--loss-type", "mean"), "loss_type='mean'"),
        (("--policy-loss", "square"), "policy_loss='square'"),
    ],
)
def test_wrong_settings(tmp_path, args, message):
    text = t2_("train", *QUICK, "--out", tmp_path / "mine", *args, code=1)
    assert message in " ".join(text.split())


def test_a_log_without_kl_is_shown_without():
    assert shown([{"reward": 0.5, "accuracy": 0.25}, {"reward": 0.0, "accuracy": 0.75, "kl": 1.0}]) == {
        "reward": "reward +0.25",
        "accuracy": "right 50%",
    }
    assert shown([]) == {}


def test_an_engine_that_is_not_there_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("t2kernels.cli.models.load", lambda *a, **k: pytest.fail("it loaded the model"))
    text = t2_("train", "--rollout", "vlm", "--out", tmp_path / "mine", code=1)
    assert "there is no engine 'vlm'; there are" in " ".join(text.split())


def test_the_options_of_an_engine_reach_the_trainer(tmp_path, monkeypatch):
    seen = {}

    def learn(loaded, task, name, **settings):
        seen.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("t2kernels.cli.verbs.train.learn", learn)
    factors = tmp_path / "factors"
    t2.decompose(str(t2.tiny.path()), factors, rank=4)
    t2_(
        "train", *QUICK, "--rollout", "vllm", "--max-staleness", 2, "--factors", factors, "--out", tmp_path / "mine",
        code=130,
    )  # fmt: skip
    assert (seen["rollout"], seen["max_staleness"]) == ("vllm", 2)
    assert seen["rollout_options"] == {"factors": str(factors)}
