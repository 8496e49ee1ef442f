"""`check_request`: an expert is checked where its request comes in, before the engine sees it.

What fails inside the engine ends the engine, and with it everyone's requests.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2kernels.experts.columns import lost_share
from t2kernels.experts.exchange.lora import LoraAdapter
from t2kernels.experts.expert import ExpertError
from t2kernels.experts.origin import Origin
from t2kernels.factors.store import Factors
from t2kernels.integrations.vllm.constants import FACTS
from t2kernels.integrations.vllm.requests import STACK, files, load, resident, state_of
from t2kernels.integrations.vllm.settings import Settings


def origin_of(factors: Factors) -> Origin:
    """The facts that experts are checked against, from spectra and manifest alone.

    Mixture-of-experts stacks are left out, because vLLM does not serve experts for them.
    """
    names, facts = [n for n in factors if STACK not in n], factors.manifest
    kept = ({n: of[n] for n in names} for of in (factors.sigmas, factors.sketches, factors.fingerprints))
    return Origin(facts.get("base_model"), facts.get("revision"), *kept, {n: min(factors.shape(n)) for n in names})


def check_request(config: Any, request: Any) -> None:
    """Check that an engine with this `VllmConfig` could use the expert of a `LoRARequest`.

    Raises vLLM's own errors, which its server turns into statuses: LoRAAdapterNotFoundError (404), VLLMValidationError
    (400).
    """
    from vllm.exceptions import LoRAAdapterNotFoundError, VLLMValidationError

    settings = Settings.of(config) or Settings()
    place = settings.factors or str(Path(config.model_config.model) / FACTS)
    try:
        if not resident(request.lora_path):
            raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
        states = tuple((f, state_of(Path(f))) for f in files(request.lora_path))
        if _check(request.lora_path, states, place, settings.rank, settings.max_error) and not _eager(config):
            raise ExpertError(
                "it is a LoRA adapter, whose columns are laid anew when one is added: no compiled model or CUDA graph "
                "can follow; start the engine with enforce_eager=True"
            )
    except FileNotFoundError:
        raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path) from None
    except (ExpertError, ValueError, OSError) as e:  # OSError: a path that is too long, or may not be read
        raise VLLMValidationError(f"expert {request.lora_name!r}: {e}", parameter="model") from None


def _eager(config: Any) -> bool:
    """Whether an engine neither compiles its model nor captures CUDA graphs."""
    from vllm.config import CUDAGraphMode

    how = config.compilation_config
    return not how.mode and how.cudagraph_mode in (None, CUDAGraphMode.NONE)


@functools.lru_cache(4096)  # keyed by the state of the files: a request for a known expert costs one stat
def _check(where: str, states: tuple[object, ...], place: str, rank: int | float | None, max_error: float) -> bool:
    """Whether it is an adapter."""
    expert = load(where)
    if isinstance(expert, LoraAdapter):
        check_adapter(expert, _shapes(place))
        return True
    origin, supports = _origin(place), _supports(place, rank)
    expert.check(origin)
    for name, z in expert.z.items():
        if (lost := lost_share(origin, name, z, supports[name])) > max_error:
            raise ExpertError(
                f"it rescales components that are not served: {lost:.1%} of its change to {name} would be lost "
                f"(max_error={max_error:.1%}); serve with a larger rank, or cut the expert"
            )
    return False


def check_adapter(adapter: LoraAdapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ExpertError unless every matrix of an adapter is there with its shape. shapes: `shapes_of` the factors"""
    for name, (B, A) in adapter.pairs.items():
        shape, wanted = (B.shape[0], A.shape[1]), shapes.get(name)
        if wanted is None:
            raise ExpertError(
                f"the adapter changes {name}, which is no matrix of the factors; decompose with targets that include "
                "it, or it is for another model"
            )
        if shape != wanted:
            raise ExpertError(f"the adapter's {name} is {list(shape)}, the model has {list(wanted)}")


def shapes_of(factors: Factors) -> dict[str, tuple[int, int]]:
    """{matrix that vLLM serves: (M, N)}."""
    return {n: factors.shape(n) for n in factors if STACK not in n}


@functools.lru_cache(4)
def _shapes(place: str) -> dict[str, tuple[int, int]]:
    return shapes_of(Factors.load(place))


@functools.lru_cache(4)
def _origin(place: str) -> Origin:
    return origin_of(Factors.load(place))


@functools.lru_cache(4)
def _supports(place: str, rank: int | float | None) -> dict[str, int]:
    return dict(Factors.load(place).cut(rank).ranks)
