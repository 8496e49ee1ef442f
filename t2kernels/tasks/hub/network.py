"""Whether the Hugging Face hub can be asked. Its clients try five times for each file before they say so."""

import contextlib
import sys
from collections.abc import Iterator

from t2kernels import one_line

SECONDS = 5
"""Time in which the hub must answer."""


def unreachable() -> str | None:
    """Why the hub cannot be asked, after one request; None if it answers."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
        return None
    except Exception as e:  # errors of httpx, or of the fork of it that newer versions of the hub's client use
        return f"{constants.ENDPOINT} cannot be reached ({one_line(e)})"


@contextlib.contextmanager
def from_cache_only() -> Iterator[None]:
    """In the block the hub's clients use what they have downloaded before, and fail at once for anything else."""
    from huggingface_hub import constants

    places = [constants, *([sys.modules["datasets.config"]] if "datasets.config" in sys.modules else [])]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
