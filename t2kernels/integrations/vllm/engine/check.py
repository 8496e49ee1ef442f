"""Experts are checked where a request comes in, before the engine sees it: what fails later fails a whole engine, and everyone's requests with it."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from t2kernels.experts.columns import lost_share
from t2kernels.experts.expert import ExpertError
from t2kernels.factors.store import Factors
from t2kernels.integrations.vllm import requests
from t2kernels.integrations.vllm.settings import Settings

from .build import origin_of

FACTS = "t2kernels"  # directory in a factored checkpoint: manifest and spectra of its factors


def check_request(config: Any, request: Any) -> None:
    """Raises vLLM's validation errors, which the server answers with 404 or 400, for an expert that the engine could not use."""
    from vllm.exceptions import LoRAAdapterNotFoundError, VLLMValidationError

    settings = Settings.of(config) or Settings()
    place = settings.factors or str(Path(config.model_config.model) / FACTS)
    try:
        states = tuple((f, _state(f)) for f in requests.files(request.lora_path))
        _check(request.lora_path, states, place, settings.rank, settings.max_error)
    except FileNotFoundError:
        raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path) from None
    except (ExpertError, ValueError, OSError) as e:  # OSError: a path that is too long, or may not be read
        raise VLLMValidationError(f"expert {request.lora_name!r}: {e}", parameter="model") from None


def _state(file: str) -> tuple[int, int, int]:
    path = Path(file)
    s = os.stat(path if path.exists() else path.with_name(path.name + ".safetensors"))
    return s.st_ino, s.st_size, s.st_mtime_ns


@functools.lru_cache(4096)  # by the state of the files: a request of a known expert costs a stat
def _check(where: str, states: tuple, place: str, rank: int | float | None, max_error: float) -> None:
    expert = requests.load(where)
    origin, supports = _origin(place), _supports(place, rank)
    expert.check(origin)
    for name, z in expert.z.items():
        if (lost := lost_share(origin, name, z, supports[name])) > max_error:
            raise ExpertError(
                f"it rescales components that are not served: {lost:.1%} of its change to {name} would be lost (max_error={max_error:.1%}); "
                "serve with a larger rank, or cut the expert"
            )


@functools.lru_cache(4)
def _origin(place: str):
    return origin_of(Factors.load(place))


@functools.lru_cache(4)
def _supports(place: str, rank: int | float | None) -> dict[str, int]:
    return dict(Factors.load(place).cut(rank).ranks)
