"""`plan`: the bytes and the time of a model with experts, from its config alone. Arithmetic; nothing is loaded or run.

Time is a prediction, not a measurement: max(bytes / bandwidth, operations / peak) of one GPU. It leaves out what real
runs add: launches, communication between GPUs, and a memory that gives less than its data sheet says.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from t2kernels import InputError
from t2kernels.factors.checkpoint import meta_model
from t2kernels.factors.decomposition import cpu_seconds, working_set
from t2kernels.factors.factor import resolve_rank
from t2kernels.factors.matrices import Matrix, Targets, find_matrices

from .forms import FORMS, choose_form
from .hardware import Gpu, gpu_by_name

USABLE: float = 0.9  # of a GPU's memory; the rest is for activations, the CUDA context and fragmentation
ROW_PARALLEL: frozenset[str] = frozenset("o_proj out_proj down_proj c_proj dense_4h_to_h fc2 wo w2".split())
COUNTS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class KindPlan:
    """The matrices of one name, shape and form. Bytes are of all of them together, on all GPUs once.

    form, why: as `patch_model` chooses; rank: components that an expert rescales; columns: of U and V that are kept
    base: of the dense weights that stay; factors: U, V and sigma; rows: tables of scale, one row an expert and the base
    split: "rows of U" if the output is split over the GPUs (V is on each), "columns of V" if the input is (U on each)
    gpu: bytes on each GPU; decompose: CPU seconds of one core; decompose_memory: peak bytes of one matrix
    """

    kind: str
    count: int
    M: int
    N: int
    form: str
    why: str
    rank: int
    columns: int
    base: int
    factors: int
    rows: int
    split: str
    gpu: int
    decompose: float
    decompose_memory: int


@dataclass(frozen=True)
class Plan:
    """The answer of `plan`. Bytes, unless a name says otherwise.

    base, factors, rows: of the matrices, summed; other: parameters that are not adapted; kv_cache: of all requests
    gpu_bytes: on each GPU, and usable: what it has for them; fits: whether they do
    decode_seconds: a step of the batch, prefill_seconds: one prompt of `context` tokens; predictions
    expert_file: numbers of one expert in fp32; decompose_seconds: on one CPU core, by measured rates
    needs: what would make it fit, or what more would fit
    """

    gpu: str
    count: int
    experts: int
    context: int
    batch: int
    dtype: str
    kinds: tuple[KindPlan, ...]
    base: int
    factors: int
    rows: int
    other: int
    kv_cache: int
    gpu_bytes: int
    usable: int
    fits: bool
    decode_seconds: float
    decode_dense_seconds: float
    prefill_seconds: float
    expert_file: int
    factors_on_disk: int
    decompose_seconds: float
    decompose_memory: int
    needs: tuple[str, ...]

    @property
    def model(self) -> int:
        """Bytes of the patched model's tensors: base, factors, rows and other."""
        return self.base + self.factors + self.rows + self.other

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "model": self.model}


def plan(
    config: PretrainedConfig,
    gpu: str = "h200",
    count: int = 1,
    experts: int = 64,
    rank: int | float | None = 1 / 16,
    form: str = "auto",
    targets: Targets = "all",
    context: int = 8192,
    batch: int = 1,
    dtype: torch.dtype | None = None,
) -> Plan:
    """What a model with resident experts takes, and what it is predicted to do.

    gpu, count: how many of which; layers are split over them (tensor parallel), the tables of experts are on each
    experts: resident, each with a row; rank, form, targets: as in `patch_model`
    context, batch: tokens of a request, in the cache and as a prompt, and requests at a time
    dtype: of weights, factors and cache; None: the config's
    Raises InputError for numbers below 1, an unknown form or GPU, or a config without a model.
    """
    for name, value in (("count", count), ("experts", experts), ("context", context), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name}={value}: wanted at least 1")
    if form not in FORMS:
        raise InputError(f"form={form!r}; wanted one of {', '.join(map(repr, FORMS))}")
    card = gpu_by_name(gpu)
    text = config.get_text_config()
    stored = dtype or getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.bfloat16
    model = meta_model(config)
    matrices = find_matrices(model, targets)
    kinds = _kinds(matrices.values(), rank, form, experts + 1, stored, count)
    adapted = sum(m.shape[0] * m.shape[1] for m in matrices.values())
    other = sum(p.numel() for p in model.parameters()) - adapted
    table = model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    size = stored.itemsize
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * heads * head_dim * size * context * batch

    def on_gpu(kinds: Iterable[KindPlan], n: int, requests: int = batch) -> int:
        per = sum(_each(k, n) for k in kinds)
        return per + -(-other * size // n) + -(-cache * requests // (batch * min(n, heads)))

    def sums(name: str) -> Any:
        return sum(getattr(k, name) for k in kinds)

    usable = int(USABLE * card.memory)
    mine = on_gpu(kinds, count)
    # A step reads everything but the rows of experts that are not in the batch, and of the embedding a row a request.
    lookup = 0 if tied else table * size
    idle = sums("rows") * max(0, experts + 1 - batch) // (experts + 1)
    read = mine - idle - -(-lookup // count)
    dense_read = -(-((adapted + other) * size - lookup) // count) + -(-cache // min(count, heads))
    numbers = sum((k.base + k.factors) // size for k in kinds) + other - (0 if tied else table)
    seen = 2 * text.num_attention_heads * head_dim * text.num_hidden_layers  # operations a pair of tokens, q k and p v
    decode = _seconds(card, read, batch * (2 * numbers + 2 * seen * context) / count)
    dense = _seconds(
        card, dense_read, batch * (2 * (adapted + other - (0 if tied else table)) + 2 * seen * context) / count
    )
    prefill = _seconds(card, mine - idle, (2 * numbers * context + seen * context * context) / count)
    free = usable - on_gpu(kinds, count, 0)
    request = -(-cache // (batch * min(count, heads)))
    row = sums("rows") // (experts + 1)
    needs = []
    if mine > usable:
        enough = next((n for n in COUNTS if on_gpu(kinds, n) <= usable), None)
        needs.append(f"{enough} {card.name} hold it" if enough else f"{COUNTS[-1]} {card.name} do not hold it")
        if free > 0:
            needs.append(f"the weights fit: {free // request} requests of {context} tokens do, {batch} do not")
        needs.append(f"{(mine - usable) / 1e9:.1f} GB too much on each GPU")
    else:
        needs.append(f"{free // request} requests of {context} tokens fit")
        needs.append(f"{experts + (usable - mine) // row} experts fit with {batch} requests")
    columns = sum(k.count * k.rank for k in kinds)
    return Plan(
        gpu=card.name,
        count=count,
        experts=experts,
        context=context,
        batch=batch,
        dtype=str(stored).removeprefix("torch."),
        kinds=kinds,
        base=sums("base"),
        factors=sums("factors"),
        rows=sums("rows"),
        other=other * size,
        kv_cache=cache,
        gpu_bytes=mine,
        usable=usable,
        fits=mine <= usable,
        decode_seconds=decode,
        decode_dense_seconds=dense,
        prefill_seconds=prefill,
        expert_file=4 * columns,
        factors_on_disk=sum(k.count * k.rank * (size * (k.M + k.N) + 12) for k in kinds),
        decompose_seconds=sums("decompose"),
        decompose_memory=max(k.decompose_memory for k in kinds),
        needs=tuple(needs),
    )


def _kinds(
    matrices: Iterable[Matrix], rank: int | float | None, form: str, rows: int, dtype: torch.dtype, n: int
) -> tuple[KindPlan, ...]:
    groups: dict[tuple[Any, ...], list[Matrix]] = defaultdict(list)
    for m in matrices:
        support = resolve_rank(rank, m.rank)
        chosen = choose_form(m, support, form, dtype, dtype)
        leaf = m.tensor.rpartition(".")[2] if m.index is not None else m.path.rpartition(".")[2]
        groups[(leaf, m.shape, support, *chosen)].append(m)
    found = []
    for (leaf, (M, N), support, chosen, why), members in groups.items():
        count = len(members)
        C = min(M, N) if chosen == "factored" else support
        one = KindPlan(
            kind=leaf,
            count=count,
            M=M,
            N=N,
            form=chosen,
            why=why,
            rank=support,
            columns=C,
            base=count * M * N * dtype.itemsize if chosen == "delta" else 0,
            factors=count * C * ((M + N) * dtype.itemsize + 4),
            rows=count * rows * C * 4,
            split="columns of V" if leaf in ROW_PARALLEL else "rows of U",
            gpu=0,
            decompose=count * cpu_seconds(M, N, C),
            decompose_memory=working_set(M, N),
        )
        found.append(dataclasses.replace(one, gpu=_each(one, n)))
    return tuple(found)


def _each(k: KindPlan, n: int) -> int:
    """Bytes on each of n GPUs: the weight and one of U, V are split; the other one, sigma and the tables are not."""
    numbers = k.factors - 4 * k.count * k.columns
    divided, whole = (k.N, k.M) if k.split == "columns of V" else (k.M, k.N)
    shared = numbers * whole // (k.M + k.N)
    return -(-k.base // n) + shared + -(-numbers * divided // ((k.M + k.N) * n)) + 4 * k.count * k.columns + k.rows


def _seconds(card: Gpu, moved: float, operations: float) -> float:
    return max(moved / card.bandwidth, operations / card.peak)
