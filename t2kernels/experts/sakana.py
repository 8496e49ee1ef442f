"""Files of the authors' release (SakanaAI/self-adaptive-llms): experts, few-shot combinations, decomposed weights.

The release stores logits p, makes a mask m of them, and applies W' = U diag(sigma m) Vᵀ * Σ sigma / Σ(sigma m). So

    z = m Σ sigma / Σ(sigma m)

A factor common to all of m cancels. `max_mult` and `norm_coeffs`, which no file records, are such factors.

Only this module unpickles, and only with `weights_only=True`.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2kernels import InputError, printable
from t2kernels.factors.factor import Factor
from t2kernels.factors.identity import ExpertError, ExpertMismatch
from t2kernels.factors.store import Factors
from t2kernels.layers.scale import z_from_logits
from t2kernels.storage import digest_of

# The release numbers its vectors in the order of the "mlp" weights in the state dict of Llama and Mistral, the only
# models that it supports. The order stands here and is not read from a model: gate and up have the same length, so a
# wrong order would load without an error.
MLP_ORDER = ("gate_proj", "up_proj", "down_proj")
POLICY = re.compile(r"learnable_params_module_list\.([0-9]{1,6})")
COMBINED = re.compile(r"weights_([0-9]{1,6})_k_model_layers_([0-9]{1,6})_mlp_(gate_proj|up_proj|down_proj)_weight")
LEGACY = re.compile(r"(model\.layers\.[0-9]{1,6}\.mlp\.(?:gate_proj|up_proj|down_proj))\.weight")
DECOMPOSED = re.compile(r"(.+)\.weight\.([USV])")


def load_z(
    path: str | Path, factors: Mapping[str, Any], base_model: str | None = None, mask: str = "identity"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """z and manifest from `policy_params.pt`, the legacy `learnable_params.pt`, or a few-shot combination.

    The keys in the file tell which of the three it is. `Expert.from_sakana` makes an expert of the result.

    factors: `Factors` of the model that it was trained on, or {matrix: sigma [R]}. Only the release's own
        (`load_factors`) give exactly its weights: its experts stand on an SVD of fp32 weights. With an SVD of the bf16
        weights W' moved by about 1 % on a small matrix.
    base_model: the model that the file was trained on, for the manifest. The file does not say, and many models have
        its shapes. It is compared with the factors' own.
    mask: of few-shot files only. "identity": m = Σ a_k p_k, as the release's code computes it; "sigmoid":
        m = Σ a_k sigmoid(p_k), a combination of the experts themselves

    Raises ExpertError for a file that is none of the three, ExpertMismatch if number, length or model do not fit the
    factors.
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
    _check_fit(path, masks, sigmas)
    z: dict[str, Tensor] = {}
    for name, m in masks.items():
        sigma = sigmas[name].double().cpu()
        if kind == "few-shot":
            z[name] = m * (sigma.sum() / (sigma * m).sum())
        else:
            z[name] = z_from_logits(m, sigma)
    form: dict[str, Any] = {"form": "z", "from": "sakana", "kind": kind, "trace_norm": True}
    if kind == "few-shot":
        form["mask"] = mask
    manifest: dict[str, Any] = {
        "parametrisation": form,
        "source": {"file": path.name, "sha256": digest_of(path)},
    }
    if base_model:
        manifest["base_model"] = base_model
    return z, manifest


def load_logits(path: str | Path) -> dict[str, Tensor]:
    """{matrix: p [R] fp32}, the logits in an expert's file, policy or legacy.

    The release's few-shot search mixes logits (`adapt.CEMConfig.paper`). An `Expert` holds z, which fixes p only up to
    one factor per matrix. Raises ExpertError for another file.
    """
    path = Path(path)
    kind, logits = _masks(path, _unpickle(path), "identity")
    if kind == "few-shot":
        raise ExpertError(f"{path} is a combination that a search found, not an expert: it has no logits of its own")
    return {name: p.float() for name, p in logits.items()}


def load_factors(path: str | Path, base_model: str | None = None, mlp_only: bool = True) -> Factors:
    """The release's `*_decomposed_params.pt` as Factors, in memory. With them its experts give exactly its weights.

    base_model: for the manifest
    mlp_only: True: only the matrices that the release adapts; False: all matrices of the blocks
    Raises ExpertError for another file, and for a matrix that is incomplete or whose shapes do not fit together.
    """
    path = Path(path)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, t in _unpickle(path).items():
        found = DECOMPOSED.fullmatch(key)
        if found and ".layers." in key and ("mlp" in key or not mlp_only):
            parts.setdefault(found[1], {})[found[2]] = t
    if not parts:
        raise ExpertError(
            f"{path} has no keys NAME.weight.U, .S and .V of a block; wanted the release's *_decomposed_params.pt"
        )
    factors: dict[str, Factor] = {}
    for name, p in parts.items():
        shapes = {k: list(t.shape) for k, t in p.items()}
        if set(p) != set("USV") or any(not t.is_floating_point() for t in p.values()):
            raise ExpertError(f"{path}: {name}: wanted floating-point U, S and V, got {shapes}")
        U, S, V = p["U"], p["S"], p["V"]
        # torch.svd returns V, not Vᵀ. The check of shapes cannot tell them apart for a square matrix.
        if S.dim() != 1 or U.dim() != 2 or V.dim() != 2 or U.shape[1] != S.numel() or V.shape[1] != S.numel():
            raise ExpertError(
                f"{path}: {name}: wanted U [M, R], S [R], V [N, R] as torch.svd returns them, got {shapes}"
            )
        for part, t in p.items():
            _check_finite(path, f"{name}.weight.{part}", t)
        factors[name] = Factor(U.contiguous(), S.float(), V.t().contiguous().t())
    matrices = {n: {"algorithm": "torch.svd (release)"} for n in factors}
    return Factors(factors, {"base_model": base_model, "algorithm": ["torch.svd (release)"], "matrices": matrices})


def _masks(path: Path, state: Mapping[str, Tensor], mask: str) -> tuple[str, dict[str, Tensor]]:
    """(kind of the file, {matrix: [R] fp64}): the logits p of an expert, or the mask m of a few-shot combination."""
    if policy := {int(f[1]): t for key, t in state.items() if (f := POLICY.fullmatch(key))}:
        _only(path, state, len(policy), "learnable_params_module_list.N")
        if sorted(policy) != list(range(len(policy))) or len(policy) % len(MLP_ORDER):
            raise ExpertError(
                f"{path}: its {len(policy)} vectors are not numbered 0, 1, 2, ... "
                "with three (gate, up, down) for each layer"
            )
        # Sorted as numbers: among strings "10" comes before "2".
        return "policy", {
            _name(*divmod(i, len(MLP_ORDER))): _logits(path, f"vector {i}", policy[i]) for i in sorted(policy)
        }
    if legacy := {f[1]: _logits(path, key, t) for key, t in state.items() if (f := LEGACY.fullmatch(key))}:
        _only(path, state, len(legacy), "model.layers.N.mlp.*_proj.weight")
        return "legacy", legacy
    if "adaptive_weights" in state:
        return "few-shot", _combine(path, state, mask)
    raise ExpertError(
        f"{path} is not an expert of the release: wanted keys learnable_params_module_list.N, "
        f"model.layers.N.mlp.*_proj.weight, or adaptive_weights; got {', '.join(list(state)[:3]) or 'nothing'}"
    )


def _combine(path: Path, state: Mapping[str, Tensor], mask: str) -> dict[str, Tensor]:
    """{matrix: m [R] fp64} of a few-shot combination."""
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
    for name, vectors in found.items():
        if len({v.numel() for v in vectors.values()}) > 1:
            raise ExpertError(f"{path}: the experts differ in length at {name}; the file is damaged")
    _check_finite(path, "adaptive_weights", a)
    a = a.expand(-1, len(names))
    if mask == "sigmoid":
        found = {n: {k: torch.sigmoid(p) for k, p in v.items()} for n, v in found.items()}
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return {n: sum((a[k, i] * found[n][k] for k in range(len(a))), zero) for i, n in enumerate(names)}


def _check_fit(path: Path, masks: Mapping[str, Tensor], sigmas: Mapping[str, Tensor]) -> None:
    """Raise ExpertMismatch if the matrices or their numbers of components differ."""
    mine, theirs = set(masks), {n for n in sigmas if LEGACY.fullmatch(f"{n}.weight")}
    if mine != theirs:
        some = sorted(mine ^ theirs, key=_position)[:3]
        raise ExpertMismatch(
            f"{path} has {len(mine)} MLP matrices, the factors have {len(theirs)}; they differ in {', '.join(some)}: "
            "it is for another model"
        )
    for name, m in masks.items():
        if m.numel() != len(sigmas[name]):
            raise ExpertMismatch(
                f"{path}: {name} has {m.numel()} components, the factors have {len(sigmas[name])}; its normaliser "
                "needs every component of the model it was trained on (factors with rank=None)"
            )


def _only(path: Path, state: Mapping[str, Tensor], count: int, wanted: str) -> None:
    """Raise ExpertError if the file has more keys than the `count` known ones."""
    if len(state) != count:
        raise ExpertError(
            f"{path}: {len(state) - count} of its {len(state)} keys are not {wanted}; "
            "the release adapts Llama and Mistral MLPs only"
        )


def _logits(path: Path, key: str, t: Tensor) -> Tensor:
    if t.dim() != 1 or not t.is_floating_point():
        raise ExpertError(f"{path}: {key} is {t.dtype} {list(t.shape)}; wanted a floating-point vector")
    _check_finite(path, key, t)
    return t.detach().double()


def _check_finite(path: Path, key: str, t: Tensor) -> None:
    if not torch.isfinite(t).all():
        raise ExpertError(f"{path}: {key} holds NaN or infinity; the file is damaged")


def _name(layer: int, which: int) -> str:
    return f"model.layers.{layer}.mlp.{MLP_ORDER[which]}"


def _position(name: str) -> tuple[int, int]:
    parts = name.split(".")
    return int(parts[2]), MLP_ORDER.index(parts[-1])


def _unpickle(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ExpertError(f"{path} does not exist; wanted a .pt file of the release")
    try:
        # Decomposed weights of an 8B model are 45 GB. A mapped file is read only where it is used.
        mapped = zipfile.is_zipfile(path)
        if mapped:
            _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:  # a damaged pickle can raise any exception
        why = str(e).partition("\n")[0] or type(e).__name__
        raise ExpertError(
            f"{path} cannot be loaded as plain tensors (truncated, or it holds more than tensors): {why}"
        ) from e
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items()
    ):
        raise ExpertError(f"{path} is not a dict of tensors; wanted a .pt file of the release")
    for key, t in state.items():
        # An expanded tensor of a small file may have any number of elements, so this comes before a look at its values.
        if t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized:
            raise ExpertError(f"{path}: {printable(key)} is {t.layout} on {t.device}; wanted a dense tensor")
        if t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise ExpertError(
                f"{path}: {printable(key)} {list(t.shape)} is an expanded view of "
                f"{t.untyped_storage().nbytes()} bytes; "
                "the file is not one of the release"
            )
    return dict(state)


def _check_sums(path: Path) -> None:
    """Compare the parts of a .pt file with their checksums, which torch writes and does not read. Raises ValueError."""
    with zipfile.ZipFile(path) as parts:
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
            raise InputError("its parts are compressed, which torch.save never does")
        if (damaged := parts.testzip()) is not None:
            raise InputError(f"the checksum of its part {damaged} is wrong, so the file is damaged")
