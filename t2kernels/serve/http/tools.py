"""Calls of tools in a text, in the form of Hermes and Qwen models.

<tool_call>
{"name": "weather", "arguments": {"city": "Bern"}}
</tool_call>
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from t2kernels.serve.engine.grammar import SPACE

BEGIN: str = "<tool_call>"
END: str = "</tool_call>"


def calls_of(functions: Sequence[dict[str, Any]], several: bool) -> str:
    """A grammar in Lark's form of texts that are calls of functions and nothing else.

    functions: with name and parameters, a JSON schema; several: whether there may be more than one call
    """
    rules = [f"start: call{' (NEXT call)*' if several else ''}", 'NEXT: "\\n"']
    tail = f"}}\n{END}"
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        head = f'{BEGIN}\n{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
        schema = function.get("parameters") or {"type": "object", "additionalProperties": False}
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": {"whitespace_flexible": True, "whitespace_pattern": SPACE}}
        rules.append(f"call_{i}: {_quoted(head)} arguments_{i} {_quoted(tail)}")
        rules.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return "\n".join(rules)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class ToolReader:
    """Takes the calls out of a text that arrives a piece at a time.

    Text that may begin a call is held back. What is no call after all, because it is damaged or has no end, is text.
    """

    found: int
    """Number of calls so far."""

    def __init__(self) -> None:
        self.found = 0
        self._held = ""

    def feed(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """(text before and after calls, calls in the form of OpenAI's API) that a new piece of text completes."""
        self._held += text
        out, calls = "", []
        while (at := self._held.find(BEGIN)) >= 0:
            end = self._held.find(END, at)
            if end < 0:
                break
            call = self._call(self._held[at + len(BEGIN) : end])
            out += self._held[:at] if call else self._held[: end + len(END)]
            calls += [call] if call else []
            self._held = self._held[end + len(END) :].lstrip("\n" if call else "")
        if at < 0:
            at = next((i for i in range(len(self._held)) if BEGIN.startswith(self._held[i:])), len(self._held))
        out, self._held = out + self._held[:at], self._held[at:]
        return (out.strip("\n") if self.found and not out.strip() else out), calls

    def finish(self) -> str:
        """The text that was held back to the end."""
        held, self._held = self._held, ""
        return held

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        if not isinstance(name, str):
            return None
        self.found += 1
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        function = {"name": name, "arguments": arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
