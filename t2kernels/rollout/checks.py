"""The check of a setting, with one form of error for all of them."""

from __future__ import annotations

from t2kernels import InputError


def check_setting(good: bool, name: str, value: object, wanted: str) -> None:
    """Raise ValueError "name=value; wanted ..." unless `good`."""
    if not good:
        raise InputError(f"{name}={value!r}; wanted {wanted}")
