"""The check of a setting, with one form of error for all of them."""

from __future__ import annotations


def check_setting(good: bool, name: str, value: object, wanted: str) -> None:
    """Raise ValueError "name=value; wanted ..." unless `good`."""
    if not good:
        raise ValueError(f"{name}={value!r}; wanted {wanted}")
