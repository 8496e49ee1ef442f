"""Which arguments of transformers' trainer have an effect in `SVFTrainer`, and why the others are refused.

Every field of `TrainingArguments` is in one of three tables. A field that is in none, of a newer transformers, is
refused as soon as it is set: nobody has looked at what it would do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from transformers import TrainingArguments

from t2kernels import T2Error

from .processes import DEEPSPEED

_EVALUATION = "evaluate() answers with generate and scores the text; it keeps no logits and no labels"
_LABELS = "the trainer learns from rewards of text, so there are no labels"
_COMPILE = "the shapes of rollouts change with every step, so each step would compile again"
_HALF_EVALUATION = "evaluation runs in the dtype of the model; load the model in that dtype"
_HUB = "save_expert(name, path) writes one small file to upload"
_LENGTHS = 'prompts have no length before they are encoded; take "random" or "sequential"'
_FSDP = (
    "accelerate runs DDP instead where there is no GPU, and nobody has run it on one; start the trainer with plain "
    "torchrun, or call fully_shard in a loop of your own (docs/howto/several-gpus.md)"
)
_LIGER = "it changes the model for good; apply Liger's kernels before patch_model"

REFUSED: dict[str, str] = {
    "average_tokens_across_devices": "the loss always counts the completions of all processes",
    "label_smoothing_factor": _LABELS,
    "label_names": _LABELS,
    "optim_target_modules": "it names dense layers (GaLore, APOLLO), and the trained z are vectors",
    "bf16_full_eval": _HALF_EVALUATION,
    "fp16_full_eval": _HALF_EVALUATION,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "use_cache": "rollouts always use a KV cache, and forwards with gradients never do",
    "neftune_noise_alpha": "log-probabilities must be those of the model that was sampled from, without noise",
    "auto_find_batch_size": "loss_batch_size lowers the memory of a step without changing its gradient",
    "include_num_input_tokens_seen": "a batch holds problems, not tokens; completion_length is logged",
    "prediction_loss_only": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "save_on_each_node": "a checkpoint is written once, to a folder that all nodes can read",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "parallelism_config": "an expert trains on whole copies of the model; start more processes for more data",
    "remove_unused_columns": "the reward needs the columns",
    "length_column_name": _LENGTHS,
    "deepspeed": DEEPSPEED,
    "fsdp": _FSDP,
    "fsdp_config": _FSDP,
    "debug": "its hooks stay on the model after training",
}
"""{field: why}. A value other than the default raises."""

REFUSED_VALUES: dict[str, dict[str, str]] = {
    "train_sampling_strategy": {"group_by_length": _LENGTHS, "batch_rebalance": _LENGTHS},
    "optim": dict.fromkeys(
        (
            *("lomo", "adalomo", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise"),
            *("galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw", "apollo_adamw_layerwise"),
        ),
        "it updates the weights of dense layers, and the trained z are vectors",
    ),
}
"""{field: {value: why}} of fields whose other values work."""

REFUSED_ACCELERATOR: dict[str, tuple[tuple[object, ...], str]] = {
    "split_batches": ((False,), "per_device_train_batch_size is the batch of one process"),
    "dispatch_batches": ((None, False), "each process reads its own problems"),
    "even_batches": ((True,), "a process without a last batch would leave the others waiting"),
}
"""{entry of accelerator_config: (values that work, why the others do not)}."""

HARMLESS: dict[str, str] = {
    "do_train": "for scripts: Trainer never reads it",
    "do_eval": "for scripts: Trainer never reads it",
    "do_predict": "for scripts: Trainer never reads it; `predict` itself is refused",
    "local_rank": "deprecated: the launcher's environment says it",
    "hub_private_repo": "the reporter trackio reads it; it means nothing elsewhere",
}
"""{field: why it may be set although the trainer does not read it}."""

WORKS: frozenset[str] = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps logging_strategy logging_steps
    logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to
    run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size eval_on_start save_only_model save_strategy save_steps save_total_limit
    enable_jit_checkpoint load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    skip_memory_metrics resume_from_checkpoint
    """.split()
)

TRAINER_ARGUMENTS: dict[str, str] = {
    "optimizers": "train() makes the parameters: use optim= or optimizer_cls_and_kwargs=",
    "data_collator": "a batch is a list of problems; put what a reward needs into the columns of the dataset",
    "model_init": "pass the patched model itself",
    "compute_loss_func": "override compute_loss of a subclass",
    "compute_metrics": "evaluate() reports accuracy and reward; pass what you want to measure as the reward",
    "preprocess_logits_for_metrics": _EVALUATION,
}
"""{argument of Trainer: why it is refused}."""

METHODS: dict[str, str] = {
    "predict": "use evaluate(dataset, metric_key_prefix='test') for the numbers, model.generate(experts=...) for texts",
    "evaluation_loop": f"{_EVALUATION}: use evaluate()",
    "prediction_step": f"{_EVALUATION}: use evaluate()",
    "hyperparameter_search": "make a trainer for each trial: train() starts from the base model each time",
    "push_to_hub": _HUB,
}
"""{method of Trainer: why it is refused}."""

_SAME_AS_DEFAULT: dict[str, tuple[object, ...]] = {
    "include_num_input_tokens_seen": ("no", False),
    "debug": ("", [], None),
}


class UnsupportedSettingError(T2Error, ValueError):
    """An argument of transformers' trainer that would have no effect here, or a wrong one."""


def unsupported(args: TrainingArguments) -> str | None:
    """The reason why an argument is refused, with its name; None if all of them work."""
    for field in dataclasses.fields(TrainingArguments):
        name, value = field.name, getattr(args, field.name)
        why = REFUSED_VALUES.get(name, {}).get(str(getattr(value, "value", value)))
        if why is None and name not in WORKS and name not in HARMLESS:
            if value == _default(type(args), name) or value in _SAME_AS_DEFAULT.get(name, ()):
                continue
            why = REFUSED.get(name, "it is new in transformers, and this version of t2kernels does not know it")
        if why is not None:
            return f"{name}={value!r} is not supported: {why}"
    return _unsupported_accelerator(args.accelerator_config)


def unsupported_argument(kwargs: Mapping[str, object]) -> str | None:
    """The reason why an argument of Trainer itself is refused; None if all of them work."""
    for name, why in TRAINER_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            return f"{name}= is not supported: {why}"
    return None


def refused_method(name: str) -> Callable[..., NoReturn]:
    """A method that takes any arguments and says why `name` of Trainer is refused."""

    def method(self: object, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedSettingError(f"{type(self).__name__}.{name} is not supported: {METHODS[name]}")

    method.__name__, method.__doc__ = name, f"Refused: {METHODS[name]}."
    return method


def _unsupported_accelerator(config: Any) -> str | None:
    for name, (good, why) in REFUSED_ACCELERATOR.items():
        value = config.get(name, good[0]) if isinstance(config, Mapping) else getattr(config, name, good[0])
        if value not in good:
            return f"accelerator_config: {name}={value!r} is not supported: {why}"
    return None


def _default(cls: type[TrainingArguments], name: str) -> object:
    field = cls.__dataclass_fields__[name]
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default
