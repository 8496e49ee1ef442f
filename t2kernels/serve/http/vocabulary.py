"""The bytes that each token of a tokenizer stands for.

A token may be a part of a character. Its text alone is then U+FFFD, but its bytes are known: byte-level tokenizers
write each byte as a letter, and others have tokens such as <0xE2> for single bytes.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE: re.Pattern[str] = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A token of one byte."""


class Vocabulary:
    """Tokens as bytes and as names.

    tokenizer: of the model
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        steps = set(_decoder_steps(tokenizer))
        self._letters = _byte_of_letter() if ("ByteLevel", None) in steps else None
        self._space = next((text for kind, text in steps if kind in ("Metaspace", "Replace") and text), None)
        self._fallback = ("ByteFallback", None) in steps

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019  (one vocabulary a server)
    def raw(self, token: int) -> bytes:
        """The bytes of a token. Those of an answer's tokens, in a row, are the bytes of its text."""
        if token in self._added:
            return self._added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):  # the model has more tokens than the tokenizer
            return b""
        if self._letters is not None:
            if all(letter in self._letters for letter in piece):
                return bytes(self._letters[letter] for letter in piece)
            return piece.encode()
        if self._fallback and (found := BYTE.fullmatch(piece)):
            return bytes([int(found[1], 16)])
        if self._space is not None:
            return piece.replace(self._space, " ").encode()
        return self.tokenizer.decode([token]).encode()

    def name(self, token: int) -> str:
        r"""The text of a token; for a part of a character its bytes, such as "bytes:\xf0\x9f"."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def names(self, tokens: Iterable[int]) -> list[str]:
        """The names of different tokens. A token whose name an earlier one has is called "token_id:17"."""
        found: dict[str, None] = {}
        for token in tokens:
            name = self.name(token)
            found[name if name not in found else f"token_id:{token}"] = None
        return list(found)

    def offsets(self, tokens: Sequence[int], start: int) -> list[int]:
        """Where the text of each token begins, in characters; parts of a character begin where it begins.

        start: characters before the first token
        """
        out, decoder = [], codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            out.append(start)
            start += len(decoder.decode(self.raw(token)))
        return out


def _decoder_steps(tokenizer: Any) -> list[tuple[str, str | None]]:
    """(kind, the text that stands for a space) of each step of a fast tokenizer's decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return []
    found = json.loads(decoder.__getstate__())
    return [(step["type"], _space_of(step)) for step in found.get("decoders", [found])]


def _space_of(step: dict[str, Any]) -> str | None:
    if step["type"] == "Replace" and step.get("content") == " ":
        return step["pattern"].get("String")
    return step.get("replacement") if step["type"] == "Metaspace" else None


def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (openai/gpt-2, src/encoder.py)."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(rest)}
