"""The policy over options: values and gradients of fp64, one forward for single tokens, the same trainer and logs."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import t2kernels as t2
from t2kernels.tasks import Task
from t2kernels.tiny.tokenizer import build
from t2kernels.train import SVFConfig, SVFTrainer
from t2kernels.train.policy.options import options_loss

TOKENIZER = build()
ROWS = [{"prompt": p, "answer": a} for p, a in (("1+2=", "b"), ("12+7=", "a"), ("a", "b"), ("x(abc)=", "a"))]
LONG = [
    {"prompt": "1+2=", "answer": "ab", "choices": ["a", "ab", "xyz"]},
    {"prompt": "77", "answer": "12", "choices": ["12", "1"]},
    {"prompt": "kind(4)", "answer": "m", "choices": ["abcd", "m", "rst"]},
]


def model_(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data.mul_(3).add_(torch.randn_like(p) * 0.05)
    return model


def task(rows, norm="sum", name="kinds", **changes) -> Task:
    made = Task(name, lambda split, n, seed: [dict(r) for r in rows][:n], check="choice", labels=("a", "b"), norm=norm)
    return replace(made, **changes)


def trainer(tmp_path, data, model=None, **changes):
    model = model or model_()
    if not hasattr(model, "t2_bank"):
        t2.patch_model(model, form="delta", rank=5)
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "logging_steps": 1, **changes}
    tr = SVFTrainer(model, SVFConfig(str(tmp_path), **settings), data, processing_class=TOKENIZER)
    tr.model.requires_grad_(False)
    return tr


def started(tr):
    generator = torch.Generator().manual_seed(3)
    parameters = tr.bank.start_training(tr._names[0])
    for p in parameters:
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return parameters


def exact(tr, rows, norm, temperature, kl_coef, kind, direction):
    """The loss in the model's fp32 forward, one prompt and one option at a time, then fp64."""
    loss = 0.0
    for row in rows:
        options, policies, written = tr._options(row), [], []
        for expert in (row["expert"], None):
            scores = []
            for option in options:
                prompt = TOKENIZER(row["prompt"])["input_ids"]
                whole = TOKENIZER(row["prompt"] + " " + option)["input_ids"]
                start = next(i for i, pair in enumerate(zip(whole, [*prompt, -1], strict=False)) if pair[0] != pair[1])
                logits = tr.model(torch.tensor([whole]), experts=expert).logits[0].double()
                found = torch.log_softmax(logits, -1)
                sums = sum(found[t - 1, whole[t]] for t in range(start, len(whole)))
                if expert is not None:
                    written.append(sums.exp())
                scores.append(sums / (len(option) if norm == "length" else 1) / temperature)
            policies.append(torch.log_softmax(torch.stack(scores), 0))
        log_pi, log_base = policies[0], policies[1].detach()
        r = torch.tensor([1.0 if o == row["answer"] else 0.0 for o in options]).double()
        expected = sum(log_pi.exp() * r)
        a, b = (log_pi, log_base) if direction == "reverse" else (log_base, log_pi)
        kl = sum(a.exp() * (a - b))
        log_written = sum(written).log() if norm == "sum" else 0.0
        gain = expected if kind == "expected" else expected.log()
        loss = loss + (-gain + kl_coef * kl - tr.args.written_coef * log_written) / len(rows)
    return loss


@pytest.mark.parametrize(
    ("rows", "norm", "temperature", "kl_coef", "kind", "direction", "size", "written"),
    [
        (ROWS, "sum", 1.0, 0.0, "expected", "reverse", None, 0.0),
        (ROWS, "sum", 1.0, 0.3, "log", "reverse", 2, 0.4),
        (LONG, "sum", 0.5, 0.3, "expected", "forward", None, 0.1),
        (LONG, "length", 1.0, 0.1, "log", "reverse", 3, 0.1),
    ],
)
@pytest.mark.parametrize("start", ["", "1+2+3+4+5+6+7+8+9+1+2+3+"])
def test_loss_and_gradient_are_exact(
    tmp_path, rows, norm, temperature, kl_coef, kind, direction, size, written, start
):  # fmt: skip
    """Also where what all prompts start with is read once."""
    rows = [{**row, "prompt": start + row["prompt"]} for row in rows]
    tr = trainer(
        tmp_path, task(rows, norm), kl_coef=kl_coef, temperature=temperature, policy_loss=kind,
        kl_direction=direction, loss_batch_size=size, written_coef=written,
    )  # fmt: skip
    parameters = started(tr)
    batch = [tr.train_dataset[i] for i in range(len(rows))]
    wanted = exact(tr, batch, norm, temperature, kl_coef, kind, direction)
    wanted.backward()
    grads = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    tr.current_gradient_accumulation_steps = 1
    read = []
    tr.model.model.register_forward_pre_hook(lambda m, a, k: read.append(k["input_ids"].shape), with_kwargs=True)
    found = tr.training_step(tr.model, {"rows": batch})
    apart = [shape for shape in read if shape[0] == 1 and shape[1] >= 20]
    assert bool(apart) == bool(start)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-5)
    for p, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-5 * float(grad.norm()) + 1e-7)


def test_options_of_one_token_take_one_row_a_prompt(tmp_path):
    tr = trainer(tmp_path, task(ROWS))
    batch = [tr.train_dataset[i] for i in range(4)]
    texts = [tr._options(row) for row in batch]
    assert texts == [["a", "b"]] * 4
    (piece,) = tr.choices(batch)
    single = all(len(option) == 1 for _, some in encoded_of(tr, batch) for option in some)
    assert len(piece.rollout) == (4 if single else 8)
    assert piece.there.all()
    assert sorted(piece.rewards.sum(1).tolist()) == [0.0] * 4  # one right, one wrong
    pieces = trainer(tmp_path, task(LONG), loss_batch_size=3).choices([{**r, "expert": "kinds"} for r in LONG])
    assert sorted(int(p.there.sum()) for p in pieces) == [2, 3, 3]


def encoded_of(tr, batch):
    from t2kernels.train.policy.options import encoded

    return encoded(TOKENIZER, [r["prompt"] for r in batch], [tr._options(r) for r in batch])


@pytest.mark.parametrize("kind", ["expected", "log"])
def test_it_learns_and_logs_as_any_other_task(tmp_path, kind):
    tr = trainer(
        tmp_path, task(ROWS), max_steps=25, learning_rate=0.1, kl_coef=0.01, policy_loss=kind, eval_strategy="steps",
        eval_steps=25, eval_on_start=True, written_coef=0.0,
    )  # fmt: skip
    tr.eval_dataset = tr.train_dataset
    tr.train()
    logs = [e for e in tr.state.log_history if "loss" in e]
    assert {"reward", "accuracy", "kl", "entropy", "same_text"} <= logs[0].keys()
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert logs[-1]["reward"] > logs[0]["reward"] + 0.3
    before, after = (e["eval_accuracy"] for e in tr.state.log_history if "eval_accuracy" in e)
    assert after == 1.0 >= before
    assert after == pytest.approx(logs[-1]["accuracy"])
    if kind == "expected":
        assert all(e["loss"] <= 0.01 * e["kl"] + 1e-6 for e in logs)


def test_it_learns_to_write_an_option(tmp_path):
    found = {}
    for coef in (0.0, 1.0):
        tr = trainer(tmp_path, task(ROWS), max_steps=10, learning_rate=0.1, kl_coef=0.0, written_coef=coef)
        tr.train()
        found[coef] = [e["written"] for e in tr.state.log_history if "loss" in e]
    assert found[0.0][0] == pytest.approx(found[1.0][0], rel=1e-5)
    assert found[1.0][-1] > 2 * found[1.0][0]
    assert found[1.0][-1] > 2 * found[0.0][-1]


def test_choices_and_written_answers_do_not_train_together(tmp_path):
    written = Task("words", lambda split, n, seed: [dict(r) for r in ROWS][:n])
    model = model_()
    t2.patch_model(model, form="delta", rank=5)
    with pytest.raises(ValueError, match=re.escape("train them with a trainer each")):
        SVFTrainer(
            model, SVFConfig(str(tmp_path), use_cpu=True), experts={"kinds": task(ROWS), "words": written},
            processing_class=TOKENIZER,
        )  # fmt: skip


def test_the_recipe_for_choices(tmp_path):
    config = SVFConfig.choices(str(tmp_path), max_steps=7)
    found = (config.max_steps, config.per_device_train_batch_size, config.learning_rate, config.kl_coef)
    assert found == (7, 32, 0.01, 0.0)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("expected", 0.0, 1e-9), (SVFConfig.choices().policy_loss, 0.99, 1.0)]
)
def test_the_loss_of_choices_moves_a_policy_that_is_sure_of_a_wrong_option(kind, low, high):
    sums = torch.tensor([[30.0, 0.0]], requires_grad=True)
    loss, _ = options_loss(sums.log_softmax(1), torch.tensor([[0.0, 1.0]]), torch.ones(1), kind=kind)
    (grad,) = torch.autograd.grad(loss, sums)
    assert low <= grad[0, 0] <= high
