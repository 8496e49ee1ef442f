"""The files of the authors' release (SakanaAI/self-adaptive-llms): experts, few-shot combinations, decomposed weights.

The release stores logits p and applies W' = U diag(sigma m) Vᵀ * Σ sigma / Σ(sigma m) with a mask m made from p, so that
z = m Σ sigma / Σ(sigma m). A factor common to all of m cancels: `max_mult` and `norm_coeffs`, which no file records, need not be known.

This is the only place that unpickles, and it does so with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from t2kernels.factors.factor import Factor
from t2kernels.factors.identity import ExpertError, ExpertMismatch
from t2kernels.factors.store import Factors
from t2kernels.layers.scale import z_from_logits

from .expert import Expert

# The release numbers its vectors by the order of "mlp" weights in the state dict of Llama and Mistral, the only models that it supports.
# gate and up have the same length, so another order would load without any error: it is written down here, never read off a model.
MLP_ORDER = ("gate_proj", "up_proj", "down_proj")
POLICY = re.compile(r"learnable_params_module_list\.(\d+)")
COMBINED = re.compile(r"weights_(\d+)_k_model_layers_(\d+)_mlp_(gate_proj|up_proj|down_proj)_weight")
LEGACY = re.compile(r"(model\.layers\.\d+\.mlp\.(?:gate_proj|up_proj|down_proj))\.weight")
DECOMPOSED = re.compile(r"(.+)\.weight\.([USV])")


def load_expert(path: str | Path, factors: Mapping, base_model: str | None = None, mask: str = "identity") -> Expert:
    """An expert from `policy_params.pt`, the legacy `learnable_params.pt`, or a few-shot combination; told apart by their keys.

    factors: `Factors` of the model that it was trained on, or {matrix: sigma [R]}. Those of the release (`load_factors`) give exactly
        its weights; an SVD of bf16 weights instead of the fp32 ones moved W' by about 1 % on a small matrix.
    base_model: the model that the file was trained on. The file does not say, and many models have its shapes; it is compared with the
        factors' own, and recorded.
    mask: of few-shot files only. "identity": m = Σ a_k p_k, what the release's code computes; "sigmoid": m = Σ a_k sigmoid(p_k), a
        combination of the experts themselves

    Raises ExpertError for a file that is none of the three, ExpertMismatch where number, length or model do not fit the factors.
    """
    path = Path(path)
    if mask not in ("identity", "sigmoid"):
        raise ExpertError(f"mask={mask!r}; wanted 'identity' (as the release computes) or 'sigmoid'")
    theirs = getattr(factors, "manifest", {}).get("base_model")
    if base_model and theirs and base_model != theirs:
        raise ExpertMismatch(f"{path}: trained on {base_model}, the factors are of {theirs}; decompose {base_model}")
    state = _unpickle(path)
    sigmas = factors.sigmas if isinstance(factors, Factors) else factors
    kind, masks = _masks(path, state, mask)
    _fits(path, masks, sigmas)
    z = {}
    for name, m in masks.items():
        sigma = sigmas[name].double().cpu()
        if kind == "few-shot":
            z[name] = m * (sigma.sum() / (sigma * m).sum())
        else:
            z[name] = z_from_logits(m, sigma)
    manifest = {
        "parametrisation": {"form": "z", "from": "sakana", "kind": kind, "trace_norm": True}
        | ({"mask": mask} if kind == "few-shot" else {}),
        "source": {"file": path.name, "sha256": _sha256(path)},
    }
    if base_model:
        manifest["base_model"] = base_model
    return Expert.trained_on(factors, z, **manifest) if isinstance(factors, Factors) else Expert(z, manifest)


def load_logits(path: str | Path) -> dict[str, Tensor]:
    """{matrix: p [R]} of an expert's file, policy or legacy: what the release's few-shot search mixes (`adapt.CEMConfig.paper`).

    An `Expert` holds z, from which p follows only up to one factor a matrix. Raises ExpertError for another file.
    """
    path = Path(path)
    kind, logits = _masks(path, _unpickle(path), "identity")
    if kind == "few-shot":
        raise ExpertError(f"{path} is a combination that a search found, not an expert: it has no logits of its own")
    return {name: p.float() for name, p in logits.items()}


def load_factors(path: str | Path, base_model: str | None = None, mlp_only: bool = True) -> Factors:
    """The release's `*_decomposed_params.pt` as Factors, in memory: its own U, S, V, so that its experts give its weights.

    base_model: recorded in the manifest. mlp_only: only the matrices that the release adapts; False: all of the blocks' matrices.
    Raises ExpertError for another file, or one in which a matrix is incomplete or does not fit together.
    """
    path = Path(path)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, t in _unpickle(path).items():
        found = DECOMPOSED.fullmatch(key)
        if found and ".layers." in key and ("mlp" in key or not mlp_only):
            parts.setdefault(found[1], {})[found[2]] = t
    if not parts:
        raise ExpertError(
            f"{path} holds no '{{name}}.weight.U', '.S', '.V' of a block; wanted the release's *_decomposed_params.pt"
        )
    factors = {}
    for name, p in parts.items():
        shapes = {k: list(t.shape) for k, t in p.items()}
        if set(p) != set("USV") or any(not t.is_floating_point() for t in p.values()):
            raise ExpertError(f"{path}: {name}: wanted floating-point U, S and V, got {shapes}")
        U, S, V = p["U"], p["S"], p["V"]
        # torch.svd returns V, not Vᵀ. For a square matrix the two look alike, and orthogonality holds for both.
        if S.dim() != 1 or U.dim() != 2 or V.dim() != 2 or U.shape[1] != S.numel() or V.shape[1] != S.numel():
            raise ExpertError(
                f"{path}: {name}: wanted U [M, R], S [R], V [N, R] as torch.svd returns them, got {shapes}"
            )
        factors[name] = Factor(U.contiguous(), S.float(), V.t().contiguous().t())
    matrices = {n: {"algorithm": "torch.svd (release)"} for n in factors}
    return Factors(factors, {"base_model": base_model, "algorithm": ["torch.svd (release)"], "matrices": matrices})


def _masks(path: Path, state: Mapping[str, Tensor], mask: str) -> tuple[str, dict[str, Tensor]]:
    """What kind of file it is, and by matrix, in fp64: the logits p of an expert, or the mask m of a few-shot combination."""
    if policy := {int(f[1]): t for key, t in state.items() if (f := POLICY.fullmatch(key))}:
        _only(path, state, len(policy), "learnable_params_module_list.N")
        if sorted(policy) != list(range(len(policy))) or len(policy) % len(MLP_ORDER):
            raise ExpertError(
                f"{path}: its {len(policy)} vectors are not 0, 1, 2, ... in threes (gate, up, down of every layer)"
            )
        # By number: as strings, 10 comes before 2.
        return "policy", {
            _name(*divmod(i, len(MLP_ORDER))): _logits(path, f"vector {i}", policy[i]) for i in sorted(policy)
        }
    if legacy := {f[1]: _logits(path, key, t) for key, t in state.items() if (f := LEGACY.fullmatch(key))}:
        _only(path, state, len(legacy), "model.layers.N.mlp.*_proj.weight")
        return "legacy", legacy
    if "adaptive_weights" in state:
        return "few-shot", _combine(path, state, mask)
    raise ExpertError(
        f"{path} is no expert of the release: wanted keys learnable_params_module_list.N, model.layers.N.mlp.*_proj.weight, "
        f"or adaptive_weights; got {', '.join(list(state)[:3]) or 'nothing'}"
    )


def _combine(path: Path, state: Mapping[str, Tensor], mask: str) -> dict[str, Tensor]:
    found: dict[str, dict[int, Tensor]] = {}
    for key, t in state.items():
        if f := COMBINED.fullmatch(key):
            found.setdefault(_name(int(f[2]), MLP_ORDER.index(f[3])), {})[int(f[1])] = _logits(path, key, t)
    _only(path, state, 1 + sum(len(v) for v in found.values()), "weights_K_k_model_layers_N_mlp_*_proj_weight")
    names = sorted(found, key=_position)
    a = state["adaptive_weights"].double()  # [experts, 1 or matrices]
    if (
        a.dim() != 2
        or a.shape[1] not in (1, len(names))
        or any(sorted(v) != list(range(len(a))) for v in found.values())
    ):
        counts = sorted({len(v) for v in found.values()})
        raise ExpertError(
            f"{path}: adaptive_weights {list(a.shape)} does not fit {len(names)} matrices with {counts} experts each"
        )
    a = a.expand(-1, len(names))
    if mask == "sigmoid":
        found = {n: {k: torch.sigmoid(p) for k, p in v.items()} for n, v in found.items()}
    return {n: sum(a[k, i] * found[n][k] for k in range(len(a))) for i, n in enumerate(names)}


def _fits(path: Path, masks: Mapping[str, Tensor], sigmas: Mapping[str, Tensor]) -> None:
    mine, theirs = set(masks), {n for n in sigmas if LEGACY.fullmatch(f"{n}.weight")}
    if mine != theirs:
        some = sorted(mine ^ theirs, key=_position)[:3]
        raise ExpertMismatch(
            f"{path} has {len(mine)} MLP matrices, the factors {len(theirs)}; they differ in {', '.join(some)}: another model"
        )
    for name, m in masks.items():
        if m.numel() != len(sigmas[name]):
            raise ExpertMismatch(
                f"{path}: {name} has {m.numel()} components, the factors {len(sigmas[name])}; its normaliser needs every component of the "
                "model it was trained on (factors with rank=None)"
            )


def _only(path: Path, state: Mapping[str, Tensor], count: int, wanted: str) -> None:
    if len(state) != count:
        raise ExpertError(
            f"{path}: {len(state) - count} of its {len(state)} keys are not {wanted}; the release adapts Llama and Mistral MLPs only"
        )


def _logits(path: Path, key: str, t: Tensor) -> Tensor:
    if t.dim() != 1 or not t.is_floating_point():
        raise ExpertError(f"{path}: {key} is {t.dtype} {list(t.shape)}; wanted a floating-point vector")
    if not torch.isfinite(t).all():
        raise ExpertError(f"{path}: {key} holds NaN or infinity")
    return t.detach().double()


def _name(layer: int, which: int) -> str:
    return f"model.layers.{layer}.mlp.{MLP_ORDER[which]}"


def _position(name: str) -> tuple[int, int]:
    parts = name.split(".")
    return int(parts[2]), MLP_ORDER.index(parts[-1])


def _unpickle(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ExpertError(f"{path} does not exist; wanted a .pt file of the release")
    try:
        # Decomposed weights of an 8B model are 45 GB: mapped, so that only what is used is read.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # a damaged pickle raises whatever its first wrong byte leads to
        why = str(e).partition("\n")[0] or type(e).__name__
        raise ExpertError(
            f"{path} cannot be loaded as plain tensors (truncated, or it holds more than tensors): {why}"
        ) from e
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items()
    ):
        raise ExpertError(f"{path} holds no dict of tensors; wanted a .pt file of the release")
    return dict(state)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
