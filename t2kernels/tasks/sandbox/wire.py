"""Values between the judge and the program, as JSON.

Plain data is sent by value. For any other object a number is sent, which the program's side resolves. The judge
decodes only data that it builds itself, so a program cannot hand it an object whose `==` is always true.
"""

import datetime
import decimal
import fractions
import json
import os
from collections import deque
from collections.abc import Callable
from typing import Any

LARGEST = 16 << 20
"""Most bytes of one message."""

_MOMENTS = {kind.__name__: kind for kind in (datetime.datetime, datetime.date, datetime.time)}


class Broken(Exception):
    """The other side is gone, or sent something that is not a message."""


def encode(value: Any, reference: Callable[[Any], int]) -> Any:
    """The JSON value for a Python value. A subclass of a plain type is sent as the plain type.

    reference: object -> its number, for anything that is not plain data. It may raise TypeError.
    """
    again = lambda v: encode(v, reference)  # noqa: E731
    match value:
        case None | bool():
            return value
        case int():
            value = int(value)
            return value if -(2**53) < value < 2**53 else {"i": hex(value)}
        case float():
            return float(value)
        case str():
            return str(value)
        case tuple():
            return {"t": [again(v) for v in tuple(value)]}
        case list():
            return [again(v) for v in list(value)]
        case dict():
            return {"d": [[again(k), again(v)] for k, v in dict(value).items()]}
        case set() | frozenset():
            return {"s" if isinstance(value, set) else "z": [again(v) for v in value]}
        case bytes() | bytearray():
            return {"b": bytes(value).hex()}
        case complex():
            return {"c": [value.real, value.imag]}
        case range():
            return {"r": [value.start, value.stop, value.step]}
        case deque():
            return {"q": [again(v) for v in value]}
        case decimal.Decimal():
            return {"n": str(value)}
        case fractions.Fraction():
            return {"f": f"{value.numerator:x}/{value.denominator:x}"}
        case datetime.date() | datetime.time() if type(value) in _MOMENTS.values():
            return {"m": [type(value).__name__, value.isoformat()]}
        case datetime.timedelta():
            return {"e": [value.days, value.seconds, value.microseconds]}
    return {"h": reference(value)}


def decode(value: Any, resolve: Callable[[int], Any]) -> Any:
    """The Python value for a JSON value of `encode`.

    resolve: number -> object.
    Raises ValueError, TypeError, KeyError or RecursionError for JSON that `encode` never writes.
    """
    again = lambda v: decode(v, resolve)  # noqa: E731
    if isinstance(value, list):
        return [again(v) for v in value]
    if not isinstance(value, dict):
        return value
    ((tag, body),) = value.items()
    match tag:
        case "i":
            return int(body, 16)
        case "t":
            return tuple(again(v) for v in body)
        case "d":
            return {again(k): again(v) for k, v in body}
        case "s":
            return {again(v) for v in body}
        case "z":
            return frozenset(again(v) for v in body)
        case "b":
            return bytes.fromhex(body)
        case "c":
            return complex(float(body[0]), float(body[1]))
        case "r":
            return range(*map(int, body))
        case "q":
            return deque(again(v) for v in body)
        case "n":
            return decimal.Decimal(body)
        case "f":
            top, bottom = body.split("/")
            return fractions.Fraction(int(top, 16), int(bottom, 16))
        case "m":
            return _MOMENTS[body[0]].fromisoformat(body[1])
        case "e":
            return datetime.timedelta(*map(int, body))
        case "h":
            return resolve(body)
    raise ValueError(f"unknown tag {tag!r}")


def frame(message: Any) -> bytes:
    """A message as bytes: its length in four, then JSON. Raises ValueError if it is longer than LARGEST."""
    data = json.dumps(message).encode()
    if len(data) > LARGEST:
        raise ValueError(f"a value of {len(data)} bytes; {LARGEST} is the most")
    return len(data).to_bytes(4, "big") + data


def send(fd: int, message: Any) -> None:
    """Write a message. Raises Broken, or ValueError if it is longer than LARGEST."""
    data = frame(message)
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as e:
        raise Broken(str(e)) from None


def receive(fd: int) -> Any:
    """Read a message. Raises Broken."""
    size = int.from_bytes(_read(fd, 4), "big")
    if size > LARGEST:
        raise Broken(f"a message of {size} bytes; {LARGEST} is the most")
    try:
        return json.loads(_read(fd, size))
    except (ValueError, RecursionError) as e:
        raise Broken(f"not JSON: {e}") from None


def _read(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise Broken("the other side is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
