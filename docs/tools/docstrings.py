"""How mkdocstrings shows this package's docstrings.

A docstring names each argument at the start of a line, as `name: [shape] dtype, meaning`. Markdown would join such
lines into one paragraph. This griffe extension makes a list of them, and keeps lines that are laid out in columns as
they are.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ITEM = re.compile(r"(?P<names>[A-Za-z_*][\w.*]*(?:, [A-Za-z_*][\w.*]*){0,5}): (?P<text>\S.*)")
COLUMNS = re.compile(r"\S {2,}\S")
# A sentence that starts so is a paragraph of its own.
OPENERS = ("Returns ", "Raises ")


def as_markdown(text: str) -> str:
    """The docstring with its argument lines as a list, and its columns as code."""
    return "\n\n".join(_paragraph(part.splitlines()) for part in re.split(r"\n\s*\n", text.strip()))


def _paragraph(lines: list[str]) -> str:
    if lines[0].startswith((" ", "$", "```", "- ")) or any(COLUMNS.search(line) for line in lines):
        return "```text\n" + "\n".join(lines) + "\n```" if not lines[0].startswith(("```", "- ")) else "\n".join(lines)
    out: list[str] = []
    in_list = False
    for line in lines:
        item = ITEM.fullmatch(line)
        if item and item["names"] not in ("Memory", "Source", "Note"):
            if not in_list:
                out.append("")
            in_list = True
            out.append(f"- **{item['names'].replace('*', chr(92) + '*')}**: {item['text']}")
        elif in_list and line.startswith("    "):
            out.append("    " + line.strip())
        else:
            if in_list or line.startswith(OPENERS):
                out.append("")
            in_list = False
            out.append(line)
    return "\n".join(out).strip("\n")


class PlainDocstrings(Extension):
    """Rewrites every docstring after it was read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
