"""vLLM's own LoRA kernels as a peer: lora_shrink and lora_expand of the installed package, over the same base and
PEFT's adapters."""

from __future__ import annotations

import importlib.util
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(device: torch.device) -> str | None:
    """Why they cannot run here, or None."""
    if device.type != "cuda":
        return "they need a GPU"
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    return None


def arm(ids: Tensor, adapters: int):
    """y_i = x W_iᵀ + scaling B_e A_e x for the adapter e of each token; metadata made once, before the clock starts,
    which favours this peer."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    def arguments(T: int) -> tuple:
        """Newer versions can launch for the adapters that are there only, which is faster."""
        more = "specialize_active_lora" in inspect.signature(meta.meta_args).parameters
        return meta.meta_args(T, *[True] * more)

    rows = torch.where(ids == 0, -1, (ids - 1) % adapters).int()
    meta = LoRAKernelMeta.make(adapters, len(ids), device=ids.device)
    meta.prepare_tensors(rows)
    stacked: dict[int, tuple[list[Tensor], list[Tensor], float]] = {}

    def run(x, ids, w):
        if id(w.W) not in stacked:
            layers = w.lora
            names = [str(i + 1) for i in range(adapters)]
            A = [torch.stack([layer.lora_A[n].weight for n in names])[:, None].contiguous() for layer in layers]
            B = [torch.stack([layer.lora_B[n].weight for n in names])[:, None].contiguous() for layer in layers]
            stacked[id(w.W)] = A, B, float(layers[0].scaling[names[0]])
        A, B, scaling = stacked[id(w.W)]
        sizes = [len(W) for W in w.W]
        y = torch.cat([F.linear(x, W) for W in w.W], 1) if len(w.W) > 1 else F.linear(x, w.W[0])
        h = torch.zeros(len(A), len(x), A[0].shape[-2], dtype=torch.float32, device=x.device)
        lora_shrink(x, A, h, *arguments(len(x)), scaling)
        lora_expand(h, B, y, *arguments(len(x)), offset_start=0, add_inputs=True)
        return list(y.split(sizes, 1))

    return run
