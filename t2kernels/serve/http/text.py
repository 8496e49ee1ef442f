"""Tokens to text while they arrive, and where stop strings end the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT: int = 8
"""Earlier tokens that are decoded with the new ones, because the text of a token may depend on the tokens before it."""


class Decoder:
    """Text of tokens that arrive a few at a time. The text ends before the first stop string.

    tokenizer: of the model; stops: stop strings
    """

    tokenizer: PreTrainedTokenizerBase
    stops: list[str]
    stopped: bool
    """Whether a stop string was found."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [s for s in stops if s]
        self.stopped = False
        self._tokens: list[int] = []
        self._read = 0  # tokens whose text was emitted
        self._start = 0  # start of the decoding window, up to CONTEXT tokens before _read
        self._held = ""  # text that may be the beginning of a stop string

    def feed(self, tokens: Sequence[int]) -> str:
        """Add tokens. Returns the new text that no later token can change."""
        if self.stopped:
            return ""
        self._tokens += tokens
        before = self._decode(self._start, self._read)
        text = self._decode(self._start, len(self._tokens))
        if len(text) <= len(before) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # the last character has more tokens to come
        self._start, self._read = max(self._start, len(self._tokens) - CONTEXT), len(self._tokens)
        return self._cut(self._held + text[len(before) :])

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        if self.stopped:
            return ""
        text = self._decode(self._start, len(self._tokens))[len(self._decode(self._start, self._read)) :]
        self._read = len(self._tokens)
        out = self._cut(self._held + text)
        if not self.stopped:
            out += self._held
        self._held = ""
        return out

    def _cut(self, text: str) -> str:
        """The part of a text that can be emitted. Holds back an end that may begin a stop string."""
        found = [i for i in (text.find(s) for s in self.stops) if i >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begins = min((_beginning(text, s) for s in self.stops), default=len(text))
        self._held = text[begins:]
        return text[:begins]

    def _decode(self, start: int, stop: int) -> str:
        tokens = self._tokens[start:stop]
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _beginning(text: str, stop: str) -> int:
    """The first place from which the rest of a text begins a stop string; the text's length if there is none."""
    at = max(0, len(text) - len(stop) + 1)
    while (at := text.find(stop[0], at)) >= 0:
        if stop.startswith(text[at:]):
            return at
        at += 1
    return len(text)
