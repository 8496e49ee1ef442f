"""What a request may hold without asking for anything, and plain sentences for what is refused.

Clients send fields that they do not use: null, or a value that changes nothing. Both are accepted. Everything else that
the server does not do is refused, by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from annotated_types import MaxLen
from pydantic.fields import FieldInfo

from t2kernels import InputError

from .errors import APIError, bad

IGNORED: frozenset[str] = frozenset(
    (
        *("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("request_id", "cache_salt", "parallel_tool_calls", "spaces_between_special_tokens"),
    )
)
"""Fields that change no answer of this server."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_decoding_backend": ("auto",),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "truncate_prompt_tokens": (-1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that are not supported: the values that ask for nothing, besides null."""


def without_neutral(known: Mapping[str, FieldInfo], body: Any, neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL) -> Any:
    """A request's body without what asks for nothing.

    Raises InputError for a field that is not supported, or that has too many entries. Here the first one ends it:
    pydantic would make an error of each.

    known: fields of the request, by name; neutral: as `NEUTRAL`
    """
    if not isinstance(body, dict):
        return body
    kept = {}
    for name, value in body.items():
        if value is None or (name in IGNORED and name not in known):
            continue
        if name in known:
            most = next((m.max_length for m in known[name].metadata if isinstance(m, MaxLen)), None)
            if most is not None and isinstance(value, (list, dict)) and len(value) > most:
                raise InputError(f"{name}: expected at most {most} entries, not {shown(value)}")
            kept[name] = value
        elif name not in neutral:
            plain = name if name.isidentifier() and len(name) <= 64 else shown(name)
            raise InputError(f"{plain}: this field is not supported by this server; remove it")
        elif value not in neutral[name]:
            allowed = ", ".join(map(shown, (None, *neutral[name])))
            raise InputError(f"{name}: {shown(value)} is not supported by this server; it takes {allowed} only")
    return kept


def shown(value: Any, most: int = 60) -> str:
    """A value as JSON, cut to a length."""
    try:
        text = json.dumps(_some(value, most), ensure_ascii=True)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def _some(value: Any, most: int) -> Any:
    """As much of a value as may be shown: it can be large."""
    if isinstance(value, str):
        return value[:100]
    if isinstance(value, list):
        return [_some(v, most // 2) for v in value[:most]]
    if isinstance(value, dict):
        return {k: _some(v, most // 2) for k, v in islice(value.items(), most)}
    return value


EXPECTED: dict[str, str] = {
    "bool": "true or false",
    "dict": "an object",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "model_attributes": "an object",
    "string": "text",
}
"""Kind of pydantic's errors -> what was expected."""
LIMITS: dict[str, tuple[str, str]] = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
"""Kind of pydantic's errors -> the words for a limit, and where it stands."""


def refusal(errors: Sequence[Mapping[str, Any]], content_type: str | None) -> APIError:
    """Why a body is refused: the field, what was given and what is supported.

    errors: pydantic's, the first is told; content_type: of the request
    """
    error = errors[0]
    place = [part for part in error["loc"] if part != "body"]
    kind, given = error["type"], error.get("input")
    if kind == "json_invalid":
        reason = error.get("ctx", {}).get("error", "it is damaged")
        return bad(f"the body is not JSON: {reason}, at character {place[0] if place else 0}", code="bad_json")
    if not place and kind != "value_error":
        if content_type is None or not content_type.partition(";")[0].strip().endswith("json"):
            sent = "is missing" if content_type is None else f"is {shown(content_type)}"
            return bad(f"the header Content-Type {sent}: send 'Content-Type: application/json'", code="content_type")
        return bad("the body is not a JSON object, such as " + '{"model": "base", "prompt": "Hello"}', code="bad_json")
    several = [e for e in errors if e["loc"][:2] == error["loc"][:2]] if len(place) > 1 else [error]
    field = _path(place[:1] if len(several) > 1 else place)
    if kind == "missing":
        return bad(f"{field}: this field is missing", field)
    if kind == "extra_forbidden":
        return bad(f"{field}: this field is not supported by this server; remove it", field)
    if kind == "value_error":
        message = str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
        name = message.partition(":")[0].split("[")[0].strip()
        return bad(message, name if name.isidentifier() else field or None)
    expected = " or ".join(dict.fromkeys(_expected(e) for e in several))
    return bad(f"{field}: expected {expected}, not {shown(given)}", field)


def _expected(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in LIMITS:
        words, limit = LIMITS[kind]
        return f"{words} {context[limit]:g}"
    if kind == "too_short":
        return f"at least {context['min_length']} entries"
    if kind == "too_long":
        return f"at most {context['max_length']} entries"
    if kind == "string_too_long":
        return f"at most {context['max_length']} characters"
    if kind in ("literal_error", "enum"):
        return str(context["expected"])
    if kind == "int_from_float":
        return EXPECTED["int"]
    if kind == "finite_number":
        return "a finite number"
    return EXPECTED.get(kind.removesuffix("_type").removesuffix("_parsing"), f"something else ({error['msg']})")


def _path(place: Sequence[Any]) -> str:
    """messages[2].role"""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).removeprefix(".")
