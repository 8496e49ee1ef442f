"""Experts in the memory of an engine's processes, without files: the policies of a training run.

Their address is `mem:NAME#DIGEST`, with the digest of z, so that vLLM's prefix cache tells versions apart. `keep` holds
one in this process, `RowWorker` takes one in each worker of an engine.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from t2kernels.experts.expert import Expert, ExpertError
from t2kernels.experts.files import check_manifest
from t2kernels.storage import parse_json

MEMORY = "mem:"
"""The start of the address of an expert in memory."""
WORKER: str = f"{__name__}.RowWorker"
"""vLLM's `worker_extension_cls` of an engine that takes experts from memory."""
KEY = "t2kernels"
SHORT = 16
"""Hexadecimal digits of the digest in an address."""
ALL = "z"
"""The one tensor of an expert that is sent without the names of its matrices."""
LAYOUTS = 64
"""How many lists of matrices a process remembers. A model has one, unless its experts cover different matrices."""

_kept: dict[str, Expert] = {}  # address -> expert, of this process
_layouts: dict[str, dict[str, int]] = {}  # digest -> {matrix: size}, of this process


def address_of(name: str, expert: Expert) -> str:
    """The address of an expert in memory."""
    return f"{MEMORY}{name}#{expert.digest()[:SHORT]}"


def keep(where: str, expert: Expert) -> None:
    """Hold an expert in this process. Raises ExpertError if its digest is not that of the address."""
    if (found := expert.digest()[:SHORT]) != where.rpartition("#")[2]:
        raise ExpertError(f"{where} came with other numbers (digest {found}); send it again")
    _kept[where] = expert


def is_kept(where: str) -> bool:
    """Whether this process holds the expert of an address."""
    return where in _kept


def find(where: str) -> Expert:
    """The expert at an address. Raises ExpertError if this process does not hold it."""
    if where not in _kept:
        raise ExpertError(f"{where} is not in this engine's memory: it was dropped, or never sent; publish it again")
    return _kept[where]


def drop(where: str) -> None:
    """Forget an expert, if it is there."""
    _kept.pop(where, None)


# --- as bytes


def pack(expert: Expert, whole: bool = False) -> bytes:
    """The bytes of an expert on its way: 4 for each number, and a header of a hundred.

    whole: also the names of its matrices, and what its factors are recognised by, which is compared with those of the
        engine. Who was sent one expert whole can read every other of the same matrices without
    """
    if whole or not expert.z:
        facts = {k: v for k, v in expert.manifest.items() if k in ("base_model", "fingerprint", "fingerprints")}
        tensors = {f"{n}.z": v for n, v in expert.z.items()}
        tensors |= {f"{n}.sketch": s.half() for n, s in expert.sketch.items()}
        return save(tensors, {KEY: json.dumps(facts)})
    layout = _remember(expert)
    return save({ALL: torch.cat([expert.z[n] for n in _layouts[layout]])}, {KEY: json.dumps({"layout": layout})})


def unpack(data: bytes) -> Expert:
    """The expert of `pack`. Raises ExpertError for bytes that are none, and for matrices that were never named here."""
    try:
        tensors = load(data)
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = parse_json(header["__metadata__"][KEY])
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        raise ExpertError(f"{len(data)} bytes that are no expert ({e}); send what `pack` makes") from None
    check_manifest(facts, "an expert that was sent")
    if set(tensors) == {ALL} and "layout" in facts:
        return Expert(_spread(tensors[ALL], str(facts["layout"])))
    z: dict[str, Tensor] = {}
    sketch: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        if not name or kind not in ("z", "sketch"):
            raise ExpertError(f"an expert that was sent has a tensor {key!r:.80}; wanted MATRIX.z or MATRIX.sketch")
        (z if kind == "z" else sketch)[name] = tensor
    if not z:
        raise ExpertError("an expert that was sent has no matrix at all")
    expert = Expert(z, facts, sketch)
    _remember(expert)
    return expert


def _remember(expert: Expert) -> str:
    """The name of an expert's layout, its matrices and their sizes in order, which this process knows from now on."""
    ranks = dict(sorted(expert.ranks.items()))
    name = hashlib.sha256(json.dumps(ranks).encode()).hexdigest()[:SHORT]
    _layouts.pop(name, None)
    _layouts[name] = ranks
    while len(_layouts) > LAYOUTS:
        del _layouts[next(iter(_layouts))]
    return name


def _spread(flat: Tensor, layout: str) -> dict[str, Tensor]:
    ranks = _layouts.get(layout)
    if ranks is None:
        raise ExpertError(
            f"an expert was sent as numbers alone, and which matrices they are of ({layout}) was never said to this "
            "process: send one with its names first (`pack(expert, whole=True)`)"
        )
    if flat.shape != (sum(ranks.values()),):
        raise ExpertError(f"an expert was sent as {list(flat.shape)} numbers; its matrices have {sum(ranks.values())}")
    return dict(zip(ranks, flat.split(list(ranks.values())), strict=True))


class RowWorker:
    """What each worker of an engine with experts can do beside vLLM's own: called by `collective_rpc`."""

    model_runner: Any

    def t2_take_row(self, where: str, data: bytes) -> str:
        """Hold the expert that `pack` made of an address. Returns its digest. Raises ExpertError for another one."""
        expert = unpack(bytes(data))
        keep(where, expert)
        return expert.digest()

    def t2_drop_row(self, where: str) -> None:
        """Forget it, in host memory as well. No request that waits or runs may use it."""
        drop(where)
        forget = getattr(self.model_runner.lora_manager, "forget", None)
        if forget is not None:
            forget(where)
