"""Every argument of transformers' trainer works, is refused by name, or is harmless for a written reason."""

import dataclasses
import inspect
import re

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import t2kernels as t2
from t2kernels.tiny.tokenizer import build
from t2kernels.train import SVFConfig, SVFTrainer, arguments, trainer_methods
from t2kernels.train.trainer_methods import UnsupportedTrainerError, check_trainer

FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
OTHER_VALUES = {
    "average_tokens_across_devices": False, "label_smoothing_factor": 0.1, "label_names": ["answer"],
    "optim_target_modules": "all-linear", "torch_compile_backend": "eager", "torch_compile_mode": "default",
    "liger_kernel_config": {"rope": True}, "use_cache": False, "neftune_noise_alpha": 5.0,
    "include_num_input_tokens_seen": "all", "eval_do_concat_batches": False, "eval_accumulation_steps": 4,
    "include_for_metrics": ["inputs"], "hub_token": "x", "hub_model_id": "a/b", "hub_strategy": "end",
    "hub_revision": "main", "parallelism_config": object(), "length_column_name": "size",
    "fsdp_config": {"version": 2}, "deepspeed": {"zero_optimization": {"stage": 2}}, "debug": "underflow_overflow",
}  # fmt: skip
"""A value that is not the default; True for the fields that are not here."""
TOKENIZER = build()
ROWS = [{"prompt": p} for p in ("1+2=", "12+7=", "a", "7")]


def letters(prompts, completions, **columns):
    return [sum(x.isalpha() for x in text) / max(1, len(text)) - 0.5 for text in completions]


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    t2.patch_model(made, form="delta", rank=4)
    return made


def config(folder, **changes):
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "max_new_tokens": 4, "use_cpu": True}
    return SVFConfig(str(folder), **{**settings, **changes})


def trainer(folder, callbacks=None, more=None, **changes):
    return SVFTrainer(
        model(), config(folder, **changes), ROWS, ROWS, letters, "a", processing_class=TOKENIZER, callbacks=callbacks,
        **(more or {}),
    )  # fmt: skip


def test_every_field_is_in_one_table():
    """A field of a newer transformers fails here: read what it does, then put it where it belongs."""
    tables = (arguments.WORKS, set(arguments.REFUSED), set(arguments.HARMLESS))
    found = {name: sum(name in table for table in tables) for name in FIELDS}
    assert {name for name, count in found.items() if count != 1} == set()
    assert all(arguments.HARMLESS.values())
    assert all(arguments.REFUSED.values())


def test_fields_that_work_are_read():
    import transformers.integrations.integration_utils
    import transformers.trainer_callback
    import transformers.trainer_optimizer
    import transformers.training_args

    import t2kernels.train.config
    import t2kernels.train.reinforce
    import t2kernels.train.trainer

    modules = (
        transformers.trainer, transformers.trainer_callback, transformers.trainer_optimizer,
        transformers.training_args, transformers.integrations.integration_utils,
        t2kernels.train.reinforce, t2kernels.train.trainer,
    )  # fmt: skip
    source = "\n".join(map(inspect.getsource, (*modules, t2kernels.train.config)))
    assert {
        name for name in arguments.WORKS & set(FIELDS) if not re.search(rf"\b(args|self)\.{name}\b", source)
    } == set()


@pytest.mark.parametrize("name", sorted(set(arguments.REFUSED) & set(FIELDS)))
def test_a_refused_field_raises_with_its_name(tmp_path, name):
    value = OTHER_VALUES.get(name, True)
    default = arguments._default(SVFConfig, name)
    assert value != default
    with pytest.raises(ValueError, match=f"^{name}=.*is not supported: ") as error:
        config(tmp_path, **{name: value})
    assert isinstance(error.value, t2.T2Error)
    later = config(tmp_path)
    setattr(later, name, value)  # and where it is set after the settings were made
    with pytest.raises(ValueError, match=f"^{name}="):
        SVFTrainer(model(), later, ROWS, None, letters, "a", processing_class=TOKENIZER)
    config(tmp_path, **{name: default})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length'"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy='batch_rebalance'"),
        ({"optim": "lomo"}, "optim='lomo'"),
        ({"optim": "galore_adamw"}, "optim='galore_adamw'"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config: split_batches=True"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config: dispatch_batches=True"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config: even_batches=False"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model='loss'; wanted 'accuracy'"),
    ],
)
def test_a_refused_value_raises_with_its_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, **changes)


def test_a_field_that_nobody_has_looked_at_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "WORKS", arguments.WORKS - {"weight_decay"})
    config(tmp_path)
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 is not supported: it is new in transformers"):
        config(tmp_path, weight_decay=0.1)


def test_every_argument_of_trainer_is_taken_or_refused(tmp_path):
    known = {"self", "model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks"}
    known |= {"optimizer_cls_and_kwargs", *arguments.TRAINER_ARGUMENTS}
    assert set(inspect.signature(Trainer.__init__).parameters) == known
    for name in arguments.TRAINER_ARGUMENTS:
        with pytest.raises(ValueError, match=f"^{name}= is not supported"):
            trainer(tmp_path, more={name: lambda *args: None})
    plain = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="args is a TrainingArguments; wanted an SVFConfig"):
        SVFTrainer(model(), plain, ROWS, None, letters, "a", processing_class=TOKENIZER)


def test_methods_that_cannot_work_say_so(tmp_path):
    tr = trainer(tmp_path)
    for name in arguments.METHODS:
        with pytest.raises(ValueError, match=f"SVFTrainer.{name} is not supported: "):
            getattr(tr, name)(ROWS)


def test_the_harmless_fields_change_nothing(tmp_path):
    plain = trainer(tmp_path)
    plain.train()
    odd = trainer(tmp_path, do_train=True, do_eval=True, do_predict=True, hub_private_repo=True)
    odd.train()
    assert plain.experts["a"] == odd.experts["a"]


def test_settings_of_data_and_memory_work(tmp_path, monkeypatch):
    plain = trainer(tmp_path)
    plain.train()
    emptied = []
    monkeypatch.setattr("t2kernels.train.reinforce.clear_device_cache", lambda: emptied.append(1))
    other = trainer(
        tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True, dataloader_prefetch_factor=2,
        dataloader_drop_last=True, torch_empty_cache_steps=2, skip_memory_metrics=False, full_determinism=False,
    )  # fmt: skip
    result = other.train()
    assert len(emptied) == 1
    assert "train_mem_cpu_alloc_delta" in result.metrics
    assert other.experts["a"] == plain.experts["a"]
    ordered = trainer(tmp_path, train_sampling_strategy="sequential")
    ordered.train()
    assert ordered.experts["a"] != plain.experts["a"]


def test_a_checkpoint_that_a_callback_asks_for_is_written_whole(tmp_path):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 1

    straight = trainer(tmp_path, callbacks=[Save()])
    straight.train()
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "parameters.safetensors"} <= names
    resumed = trainer(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    resumed.train()  # by the field, since the argument is left out
    assert resumed.experts["a"] == straight.experts["a"]
    anew = trainer(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"), max_steps=1)
    anew.train(resume_from_checkpoint=False)
    assert anew.state.global_step == 1


def test_transformers_private_methods_are_checked(tmp_path, monkeypatch):
    check_trainer()
    functions = {**trainer_methods.OVERRIDDEN, **trainer_methods.CALLED}
    for name, (_, parameters) in functions.items():
        renamed = {key: value for key, value in vars(Trainer).items() if key != name}
        with pytest.raises(UnsupportedTrainerError, match=rf"{name}\(.*there is none"):
            check_trainer(type("Trainer", (), renamed))
        if parameters:
            changed = type("Trainer", (Trainer,), {**vars(Trainer), name: lambda self, other=None: None})
            with pytest.raises(UnsupportedTrainerError, match=rf"{name}\(.*its parameters are other"):
                check_trainer(changed)
    uncalled = {key: value for key, value in vars(Trainer).items() if key != "_run_epoch"}
    with pytest.raises(UnsupportedTrainerError, match=r"_clip_grad_norm.*Trainer does not call it"):
        check_trainer(type("Trainer", (), uncalled))
    monkeypatch.delattr(Trainer, "_save_scaler")
    with pytest.raises(RuntimeError, match=f"transformers {re.escape(transformers.__version__)}: Trainer._save_scaler"):
        trainer(tmp_path)


def test_the_models_configs_are_never_written(tmp_path):
    """Another thread may generate while a trainer is made and runs."""
    tr_model = model()
    tr_model.config.use_cache = False
    tr_model.generation_config.eos_token_id = tr_model.config.eos_token_id = 5
    writes = []

    def watched(cls):
        class Watched(cls):
            def __setattr__(self, name, value):
                writes.append((name, value))
                super().__setattr__(name, value)

        return Watched

    for owner in (tr_model.config, tr_model.generation_config):
        owner.__class__ = watched(type(owner))
    settings = config(tmp_path)
    tr = SVFTrainer(tr_model, settings, ROWS, None, letters, "a", processing_class=TOKENIZER)
    tr.train()
    assert [(name, value) for name, value in writes if (name, value) != ("use_cache", False)] == []
    assert tr.processing_class is TOKENIZER
    assert settings.use_cache is True
