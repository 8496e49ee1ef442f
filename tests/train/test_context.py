"""`train.experts`: any trainer trains experts in a block, and saves and resumes them alone."""

import logging
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

import t2kernels as t2
from t2kernels import InputError, StateError
from t2kernels.experts.bank import ExpertBank


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def patched(form="factored", **settings):
    model, tokenizer = t2.tiny.load()
    return model, tokenizer, t2.patch_model(model, form=form, **settings)


def texts(tokenizer, n=32):
    return [tokenizer(r["prompt"] + "=" + r["answer"]) for r in t2.tasks.load("math").split("train", n)]


def fit(folder, model, tokenizer, rows=None, collator=None, resume=None, callbacks=None, steps=4, **settings):
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=0.02, use_cpu=True,
        **{"save_strategy": "steps", "save_steps": 2, "report_to": "none", "disable_tqdm": True, **settings},
    )  # fmt: skip
    collator = collator or DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, args, collator, rows or texts(tokenizer), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def step(model, tokenizer, lr=0.05, **routing):
    """A step of plain SGD on a sentence for each row."""
    batch = tokenizer(["1+2=3", "7+7=14"], padding=True, return_tensors="pt")
    model(**batch, labels=batch["input_ids"], **routing).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= lr * p.grad
                p.grad = None


def open_parts(model, bank):
    """What a block must leave as it was."""
    return (
        bank.in_training, bank.names, {n: p.requires_grad for n, p in model.named_parameters()}, model.training,
        sorted(name for name in vars(model) if "_require_grads" not in name),  # stays after checkpointing
        bank.rows_in_use, len(model._load_state_dict_pre_hooks),
        any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
    )  # fmt: skip


@pytest.mark.parametrize("form", ["factored", "delta"])
def test_the_block_is_the_five_lines(tmp_path, form):
    model, tokenizer, bank = patched(form, rank=None)
    model.requires_grad_(False)
    bank.start_training("mine")
    with bank.use("mine"):
        fit(tmp_path / "lines", model, tokenizer, save_strategy="no")
    wanted = bank.stop_training("mine")
    model, tokenizer, bank = patched(form, rank=None)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = open_parts(model, bank)
    with t2.train.experts(model, "mine") as trained:
        assert list(trained) == bank.in_training == ["mine"]
        assert all(p.requires_grad == (".logits." in n) for n, p in model.named_parameters())
        fit(tmp_path / "block", model, tokenizer, save_strategy="no")
        inside = trained["mine"]
    assert trained["mine"] == inside == wanted == bank["mine"]
    assert bank["mine"].manifest["parametrisation"] == "raw"
    assert trained["mine"].save(tmp_path / "mine").is_file()
    bank.remove("mine")
    assert open_parts(model, bank) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("form", "settings"), [("factored", {}), ("delta", {"rank": 8}), ("factored", {"factors": "int8"})]
)
@pytest.mark.parametrize("how", [{}, {"parametrisation": "sigmoid"}, {"init": "start"}])
def test_checkpoints_hold_experts_only_and_resume_to_the_same_bits(tmp_path, form, settings, how):
    if form == "delta" and "parametrisation" in how:
        return  # refused: it needs every component

    def run(folder, others=0, **kwargs):
        torch.manual_seed(0)
        model, tokenizer, bank = patched(form, **settings)
        for i in range(others):
            bank.add(f"other{i}", t2.Expert({}))  # so that the expert in training has another row
        given = dict(how)
        if "init" in given:
            n = next(iter(bank.matrices))
            given["init"] = bank.expert({n: torch.full([bank.matrices[n]], 1.1)})
        with t2.train.experts(model, "mine", **given) as trained:
            fit(folder, model, tokenizer, **kwargs)
        return trained["mine"]

    straight = run(tmp_path / "straight")
    run(tmp_path / "cut", callbacks=[StopAt()])
    checkpoint = tmp_path / "cut/checkpoint-2"
    weights = sum(p.stat().st_size for p in (checkpoint / "model.safetensors", *checkpoint.glob("experts/*")))
    assert weights < 5 * 4 * straight.numel + 50_000  # the built-in model has 4 MB
    half = t2.Expert.load(checkpoint / "experts/mine")
    assert half.numel == straight.numel
    assert half != straight
    resumed = run(tmp_path / "cut", others=2, resume=str(checkpoint))
    assert resumed == straight


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model, tokenizer, _ = patched()
    args = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}

    class Worse(TrainerCallback):  # the second evaluation counts as worse
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    with t2.train.experts(model, "mine") as trained:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.02, use_cpu=True,
            save_strategy="steps", save_steps=2, report_to="none", disable_tqdm=True, **args,
        )  # fmt: skip
        rows = texts(tokenizer)
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(model, arguments, collator, rows, eval_dataset=rows[:4], callbacks=[Worse()])
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert trained["mine"] == t2.Expert.load(tmp_path / "checkpoint-2/experts/mine")
    assert trained["mine"] != t2.Expert.load(tmp_path / "checkpoint-4/experts/mine")


def test_a_plain_loop_saves_and_goes_on(tmp_path):
    def run(steps, load=None, save=None):
        model, tokenizer, _ = patched()
        with t2.train.experts(model, "mine") as trained:
            if load:
                trained.load(load_file(load))
            for _ in range(steps):
                step(model, tokenizer)
            if save:
                trained.save(save)
        return trained["mine"]

    run(2, save=tmp_path)
    assert run(1, load=tmp_path / "model.safetensors") == run(3) != run(2)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    model, tokenizer, _ = patched()
    with t2.train.experts(model, ["a", "b"]) as trained:
        step(model, tokenizer, experts=["a", "b"])
        trained.save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")

    def load(names, state=state, model=model, **how):
        t2.patch_model(model := t2.tiny.load()[0] if model is None else model)
        with t2.train.experts(model, names, **how):
            model.load_state_dict(state, strict=False)

    for names, how, message in (
        ("a", {}, "in the same order"),
        (["b", "a"], {}, "in the same order"),
        (["a", "c"], {}, r"no experts/c.safetensors: it is of other experts, 'a', 'b'"),
        (["a", "b"], {"parametrisation": "sigmoid"}, "the checkpoint was trained with parametrisation='raw'"),
    ):
        with pytest.raises(t2.ExpertError, match=message):
            load(names, model=None, **how)
    other = t2.tiny.load()[0]
    with torch.no_grad():
        for p in other.parameters():
            p += 0.05 * torch.randn_like(p)
    with pytest.raises(t2.ExpertMismatch):
        load(["a", "b"], model=other)
    broken = dict(state)
    broken["t2kernels:parameters.safetensors"] = state["t2kernels:parameters.safetensors"][:-1]
    with pytest.raises(t2.ExpertError, match=r"the checkpoint/parameters\.safetensors"):
        load(["a", "b"], broken, model=None)
    outside = tmp_path / "outside"
    with pytest.raises(t2.ExpertError, match="in the same order"):
        load(["a", "b"], {**state, f"t2kernels:experts/{outside}.safetensors": torch.zeros(3, dtype=torch.uint8)}, None)
    assert not list(tmp_path.glob("outside*"))


def test_a_dense_checkpoint_still_loads(tmp_path):
    model, tokenizer, _ = patched()
    dense = {k: v.clone() for k, v in model.state_dict().items()}
    with t2.train.experts(model, "mine"):
        assert model.load_state_dict(dense, strict=False).missing_keys != []  # those in training
        step(model, tokenizer)
    save_file({k: v.contiguous().clone() for k, v in dense.items()}, tmp_path / "x.safetensors")


@pytest.mark.parametrize("mistake", ["nothing", "no_grad", "base", "other model"])
def test_a_block_without_a_gradient_is_an_error(mistake):
    model, tokenizer, bank = patched()
    before, other, kept = open_parts(model, bank), t2.tiny.load()[0], []

    def block():
        with t2.train.experts(model, "mine") as trained:
            kept.append(trained)
            if mistake == "no_grad":
                with torch.no_grad():
                    model(**tokenizer(["1+2"], return_tensors="pt"))
            elif mistake == "base":
                x = torch.randn(1, 3, model.config.hidden_size, requires_grad=True)
                model(inputs_embeds=x, experts=None).logits.sum().backward()
            elif mistake == "other model":
                step(other, tokenizer)

    with pytest.raises(StateError, match="nothing was trained: no gradient but zero reached 'mine'; run the training"):
        block()
    assert open_parts(model, bank) == before
    assert kept[0]["mine"].numel == sum(bank.matrices.values())


def test_an_exception_leaves_no_training_open():
    model, tokenizer, bank = patched()
    model.train()
    before, kept = open_parts(model, bank), []

    def block():
        with t2.train.experts(model, ["a", "b"]) as trained:
            kept.append(trained)
            step(model, tokenizer, experts=["a", "a"])
            model.eval()
            model.gradient_checkpointing_enable({"use_reentrant": False})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
    assert open_parts(model, bank) == before
    assert kept[0]["a"] != kept[0]["b"]  # as far as they got
    with pytest.raises(StateError, match="has ended"):
        kept[0].save("nowhere")
    with t2.train.experts(model, "a"):  # the name is free
        step(model, tokenizer)


def test_an_expert_that_is_not_finite_ends_the_training_too():
    model, tokenizer, bank = patched()

    def block():
        with t2.train.experts(model, ["a", "b"]):
            step(model, tokenizer, experts=["a", "b"])
            with torch.no_grad():
                bank.trained_parameters("a")[next(iter(bank.matrices))][0] = float("nan")

    with pytest.raises(t2.ExpertError, match="smaller learning rate"):
        block()
    assert bank.in_training == []
    assert bank.names == ["b"]


def test_what_cannot_begin_is_refused():
    model, tokenizer, bank = patched()
    bank.add("taken", t2.Expert({}))
    before = open_parts(model, bank)
    for names, error, message in (
        ([], InputError, "wanted the name"),
        (["a", "a"], InputError, "different names"),
        (["a", "taken"], InputError, "has an expert named 'taken'"),
        (["Case", "case"], ValueError, "case"),
    ):
        with pytest.raises(error, match=message), t2.train.experts(model, names):
            pytest.fail("the block must not begin")
        assert open_parts(model, bank) == before
    with pytest.raises(InputError, match="init has"), t2.train.experts(model, "a", init={"b": t2.Expert({})}):
        pass
    with t2.train.experts(model, "a"):
        step(model, tokenizer)
        with pytest.raises(StateError, match="'a' is in training already"), t2.train.experts(model, "b"):
            pass
        step(model, tokenizer)  # the first goes on
    bank.remove("a")
    assert open_parts(model, bank) == before
    with pytest.raises(InputError), t2.train.experts(t2.tiny.load()[0], "a"):
        pass


@pytest.mark.parametrize("form", ["factored", "delta"])
def test_several_experts_train_by_a_column_as_each_alone(tmp_path, form):
    tasks = {"math": t2.tasks.load("math"), "code": t2.tasks.load("code")}

    def run(names):
        model, tokenizer, bank = patched(form, rank=None)
        rows = [
            {**tokenizer((r["prompt"] + r["answer"])[:8], padding="max_length", max_length=8), "expert": name}
            for pair in zip(*(task.split("train", 8) for task in tasks.values()), strict=True)
            for name, r in zip(tasks, pair, strict=True)
            if name in names
        ]
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        loss = torch.zeros(())
        with t2.train.experts(model, names) as trained:
            collate = trained.collator(collator)
            for at in range(0, len(rows), 2 * len(names)):
                batch = collate(rows[at : at + 2 * len(names)])
                logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).double(), batch["labels"][:, 1:].flatten(), reduction="sum"
                )
                loss.backward()
                with torch.no_grad():
                    for name in names:
                        for p in bank.trained_parameters(name).values():
                            p -= 1e-3 * p.grad
                            p.grad = None
        return trained

    both = run(["math", "code"])
    for name in tasks:
        alone = run([name])[name]
        assert max((alone.z[n] - 1).abs().max() for n in alone.z) > 1e-3
        for n, z in alone.z.items():
            torch.testing.assert_close(both[name].z[n], z, atol=1e-5, rtol=0)


def test_the_trainer_takes_the_column(tmp_path, caplog):
    model, tokenizer, bank = patched()
    rows = [{**row, "kind": "ab"[i % 2]} for i, row in enumerate(texts(tokenizer))]
    caplog.set_level(logging.WARNING, logger="t2kernels")
    with t2.train.experts(model, ["a", "b", "idle"]) as trained:
        collator = trained.collator(DataCollatorForLanguageModeling(tokenizer, mlm=False), column="kind")
        fit(tmp_path, model, tokenizer, rows, collator, remove_unused_columns=False)
        with pytest.raises(InputError, match="remove_unused_columns=False"):
            collator([{"input_ids": [1]}])
    assert [r.getMessage()[:34] for r in caplog.records] == ["no gradient but zero reached 'idle'"[:34]]
    base = bank.expert({n: torch.ones(k) for n, k in bank.matrices.items()})
    assert base == trained["idle"] != trained["a"] != trained["b"] != base


def test_scopes_inside_the_block_route_too():
    model, tokenizer, bank = patched()
    with t2.train.experts(model, ["a", "b"]) as trained:
        for name in ("a", None):
            with bank.use(name) if name else nullcontext():
                step(model, tokenizer, **({} if name else {"experts": "b"}))
    assert trained["a"] == trained["b"]
    assert isinstance(bank, ExpertBank)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.int16])
def test_a_checkpoint_that_was_cast_is_refused(tmp_path, cast):
    model, tokenizer, _ = patched()
    with t2.train.experts(model, "mine") as trained:
        step(model, tokenizer)
        trained.save(tmp_path)
        state = {name: t.to(cast) for name, t in load_file(tmp_path / "model.safetensors").items()}
        with pytest.raises(t2.ExpertError, match=f"is {cast}, wanted torch.uint8"):
            trained.load(state)
