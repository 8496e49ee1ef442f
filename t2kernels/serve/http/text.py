"""Tokens to text as they come, and where a text stops."""

from __future__ import annotations

from collections.abc import Sequence

CONTEXT = 8
"""Tokens before the new ones that are decoded with them: a tokenizer may write a token differently after another one."""


class Decoder:
    """Text of tokens that come a few at a time; ends before the first of the stop strings.

    feed(tokens) -> text that will not change any more; finish() -> the rest. stopped: whether a stop string has come
    """

    def __init__(self, tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, [s for s in stops if s]
        self.stopped = False
        self._tokens: list[int] = []
        self._from = self._read = (
            0  # the tokens of which the text has been taken, and where decoding starts for their sake
        )
        self._held = ""  # may be the beginning of a stop string

    def feed(self, tokens: Sequence[int]) -> str:
        if self.stopped:
            return ""
        self._tokens += tokens
        before = self._decode(self._from, self._read)
        text = self._decode(self._from, len(self._tokens))
        if len(text) <= len(before) or text.endswith(
            "\N{REPLACEMENT CHARACTER}"
        ):  # a character of several tokens is not whole yet
            return ""
        self._from, self._read = max(self._from, len(self._tokens) - CONTEXT), len(self._tokens)
        return self._cut(self._held + text[len(before) :])

    def finish(self) -> str:
        if self.stopped:
            return ""
        text = self._decode(self._from, len(self._tokens))[len(self._decode(self._from, self._read)) :]
        self._read = len(self._tokens)
        out = self._cut(self._held + text)
        if not self.stopped:
            out += self._held
        self._held = ""
        return out

    def _cut(self, text: str) -> str:
        found = [i for i in (text.find(s) for s in self.stops) if i >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, start: int, stop: int) -> str:
        return self.tokenizer.decode(
            self._tokens[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
