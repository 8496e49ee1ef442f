"""benchmarks/beyond_z.py and continual.py: every kind is the equation that it is named by, and the pages follow
from the rows."""

from pathlib import Path

import pytest
import torch

import t2kernels as t2
from t2kernels.factors.factor import svd

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def beyond(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import beyond_z

    return beyond_z


@torch.no_grad()
def moved(beyond, kind, W):
    """A change of `kind` at W with random numbers."""
    shared = torch.nn.Parameter(torch.zeros(int(kind.split()[1]))) if kind.startswith("tied") else None
    change = beyond.Change(kind, W, shared, torch.Generator().manual_seed(3))
    torch.testing.assert_close(change(W), W, rtol=0, atol=0)  # it begins as the base model, bit for bit
    change.p.normal_()
    return change


@pytest.mark.parametrize("kind", ["z 9", "band 9", "core 9", "tied 5", "output 6", "lora 3"])
@pytest.mark.parametrize("shape", [(24, 40), (48, 24)])
def test_a_change_against_fp64(beyond, kind, shape):
    W = torch.randn(shape)
    change = moved(beyond, kind, W)
    name, size = kind.split()
    p = change.p.detach().double()
    if name == "output":
        expected = W.double() * (1 + p.repeat_interleave(shape[0] // 6))[:, None]
    elif name == "lora":
        expected = W.double() + p @ change.A.detach().double()
    else:
        k = beyond.TIED if name == "tied" else int(size)
        C = torch.zeros(k, k, dtype=torch.float64)
        if name == "tied":
            C = (change.mix.double() @ p).reshape(k, k)
        else:
            numbers = iter(p)
            for i in range(k):
                for j in range(k):
                    if name == "core" or abs(i - j) <= (name == "band"):
                        C[i, j] = next(numbers)
            assert next(numbers, None) is None
        factor = svd(W, k)
        expected = W.double() + factor.U.double() @ C @ torch.diag(factor.sigma.double()) @ factor.V.double().t()
    torch.testing.assert_close(change(W).double(), expected, rtol=1e-5, atol=1e-5)
    change.on = False
    assert change(W) is W


@pytest.mark.parametrize("kind", ["z 128", "band 9", "core 9", "tied 5", "output 16", "lora 3"])
def test_a_change_of_outputs_is_the_change_of_the_weight(beyond, kind):
    """As a hook, with given factors: the same logits and gradients as with W'. More components than there are: all."""
    ids, found = torch.randint(1, 40, (3, 9)), []
    for hooked in (False, True):
        model, _ = t2.tiny.load()
        factors = [svd(layer.weight) for layer in beyond.linear_layers(model)]
        changes = beyond.change(model, kind.replace("128", "999") if hooked else kind, 7, factors if hooked else None)
        generator = torch.Generator().manual_seed(1)
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in parameters:
                p.add_(torch.randn(p.shape, generator=generator) / 20)
        logits = model(ids).logits
        logits.logsumexp(-1).sum().backward()
        found.append((logits.detach(), torch.cat([p.grad.flatten() for p in parameters])))
        for one in changes:
            one.on = False
        base, _ = t2.tiny.load()
        with torch.no_grad():
            assert torch.equal(model(ids).logits, base(ids).logits)
            assert not torch.allclose(base(ids).logits, logits, atol=1e-2)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-3)
    assert (found[1][1] - found[0][1]).norm() < 1e-3 * found[0][1].norm()


def test_a_kind_gets_its_rates_and_then_its_seeds(beyond):
    import beyond_real

    rows = []

    def done(cell, accuracy=0.5):
        names = ("task", "kind", "seed", "learning_rate", "split")
        rows.append(dict(zip(names, cell, strict=False)) | {"accuracy": accuracy})

    for task in ("trec", "subj"):
        done(beyond_real.cells(rows, "z 4", ["trec", "subj"], [0])[0])
        assert rows[-1]["kind"] == "base"
        assert rows[-1]["task"] == task
    for rate in beyond_real.KINDS["z 4"]:
        cell = beyond_real.cells(rows, "z 4", ["trec", "subj"], [0])[0]
        assert cell[:5] == ("trec", "z 4", beyond_real.TUNING_SEED, rate, "validation")
        done(cell, rate)
    best = beyond_real.KINDS["z 4"][1]
    waiting = beyond_real.cells(rows, "z 4", ["trec", "subj"], [0, 1])
    assert [cell[:4] for cell in waiting] == [(t, "z 4", s, best) for s in (0, 1) for t in ("trec", "subj")]
    done(waiting[0])
    assert beyond_real.cells(rows, "z 4", ["trec", "subj"], [0, 1]) == waiting[1:]


def test_the_kind_z_is_an_expert_of_the_library(beyond):
    """The same numbers as an expert in the bank give the same logits."""
    (model, tokenizer), (patched, _) = t2.tiny.load(), t2.tiny.load()
    bank = t2.patch_model(patched)
    changes = beyond.change(model, "z 128", 0)
    assert len(changes) == len(bank.matrices)
    with torch.no_grad():
        for change in changes:
            change.p.normal_(std=0.1)
    z = {name: 1 + change.p.detach() for name, change in zip(bank.matrices, changes, strict=True)}
    bank.add("same", bank.expert(z))
    ids = tokenizer(["rsxt(gcafd)?"], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = patched(ids, experts="same").logits
        assert (expected - patched(ids).logits).abs().max() > 0.1
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["tied 13", "core 4", "output 16"])
def test_a_run_moves_the_numbers_of_its_kind_alone(beyond, kind):
    beyond_numbers = {"tied 13": 13, "core 4": 448, "output 16": 448}
    torch.manual_seed(0)
    trainer, numbers = beyond.prepare("reason", kind, 0, 0.05, steps=1)
    assert numbers == beyond_numbers[kind]
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(p.abs().max() > 0 for p in trained)
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)
    base, tokenizer = t2.tiny.load()
    ids = tokenizer(["47+8+6?"], return_tensors="pt").input_ids
    with torch.no_grad(), trainer.reference():
        torch.testing.assert_close(trainer.model(ids).logits, base(ids).logits, rtol=0, atol=0)
    with torch.no_grad():
        assert not torch.equal(trainer.model(ids).logits, base(ids).logits)


def test_rates_are_those_of_the_best_runs_and_no_cell_is_run_twice(beyond):
    rows = [
        {
            "task": "code",
            "kind": kind,
            "seed": 100,
            "split": "validation",
            "learning_rate": rate,
            "accuracy": rate == rates[1],
        }
        for kind, rates in beyond.KINDS.items()
        for rate in rates
    ]
    assert beyond.cells(True, rows, (), ()) == []
    assert beyond.best_rates(rows)["z 128"] == 0.01
    waiting = beyond.cells(False, rows, ["code", "add6"], [0, 1, 2])
    assert len(waiting) == 2 + 3 * (len(beyond.KINDS) + len(beyond.FEW["add6"]))  # the base model once a task
    done = [dict(zip(("task", "kind", "seed", "learning_rate"), cell[:4], strict=True)) for cell in waiting[:4]]
    done = [row | {"split": "test", "accuracy": 1.0} for row in done]
    assert beyond.cells(False, rows + done, ["code", "add6"], [0, 1, 2]) == waiting[4:]


def test_what_was_learned_first_is_kept_to_the_bit(beyond):
    """Three more experts are trained in the same model. The first one's logits keep their bits, its answers their
    tokens. One z that goes on learning loses both: the test can fail."""
    import continual

    rows = t2.tasks.load("math").split("test", 40)
    for way, kept in (("experts", True), ("one z", False)):
        learner = continual.Learner(way, 0, 0.05, steps=2)
        learner.learn("math")
        name = "math" if way == "experts" else "one"
        ids = learner.tokenizer(["47+8+6?"], return_tensors="pt").input_ids
        with torch.no_grad():
            logits, written = learner.model(ids, experts=name).logits, learner.answers("math", rows)
        for later in continual.SEQUENCE[1:]:
            learner.learn(later)
        with torch.no_grad():
            again = learner.model(ids, experts=name).logits
        assert torch.equal(again, logits) is kept
        assert (learner.answers("math", rows) == written) is kept
    assert learner.bank.names == ["one"]


def test_a_core_is_an_adapter_that_the_bank_holds_already(beyond):
    """B = U C, A = diag(sigma) Vᵀ: the model with the change and the bank with the adapter give the same logits."""
    from t2kernels.experts.exchange.lora import LoraAdapter

    (model, tokenizer), (patched, _) = t2.tiny.load(), t2.tiny.load()
    bank = t2.patch_model(patched)
    changes = beyond.change(model, "core 4", 0)
    with torch.no_grad():
        for change in changes:
            change.p.normal_(std=0.2)
        pairs = {
            name: (change.U @ change.p.reshape(4, 4), change.right)
            for name, change in zip(bank.matrices, changes, strict=True)
        }
    bank.add("core", LoraAdapter(pairs))
    ids = tokenizer(["rsxt(gcafd)?"], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = patched(ids, experts="core").logits
        assert (expected - patched(ids).logits).abs().max() > 0.1
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_the_pages_follow_from_the_rows(beyond, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import beyond_pages

    names = ("beyond-z.md", "continual.md")
    before = [(beyond_pages.plot.DOCS / name).read_text() for name in names]
    monkeypatch.setattr(beyond_pages.plot, "DOCS", tmp_path)
    monkeypatch.setattr(beyond_pages.plot, "save", lambda fig, name: tmp_path / name)
    beyond_pages.main()
    assert [(tmp_path / name).read_text() for name in names] == before, "run python benchmarks/beyond_pages.py"
    assert not any("{{" in page for page in before)


def test_differences_are_seed_by_seed(beyond):
    pytest.importorskip("matplotlib")
    import beyond_pages

    row = {"split": "test", "task": "code", "others": {"math": 0.5, "reason": 0.7}}
    rows = [
        row | {"kind": kind, "learning_rate": 0.1, "seed": s, "accuracy": a + s / 10}
        for kind, a in (("z 16", 0.2), ("core 4", 0.3))
        for s in (2, 0, 1)
    ]
    cells = beyond_pages.Cells(rows + [r | {"split": "validation"} for r in rows])
    assert beyond_pages.signed(cells.over("code", "core 4", "z 16")) == "+0.100 ± 0.000"
    assert cells.others("code", "z 16") == pytest.approx([0.6] * 3)
