"""Texts with a structure: a JSON schema, a regular expression, one of some texts, or a grammar.

llguidance (https://github.com/guidance-ai/llguidance) says which tokens may come next: a bit for each token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from t2kernels import InputError, PackageError
from t2kernels.serve.http.vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

SPACE: str = r"[ \n\t]{0,16}"
"""Space between the parts of JSON. With no limit a small model writes spaces to the end of its tokens."""


MOST: int = 1 << 18
"""Most characters of a schema, and a quarter of it of other structures: larger ones take seconds."""


class Grammar:
    """The structure of one text, and how far the text has come.

    matcher: llguidance's; ends: tokens that end the text
    """

    matcher: Any
    ends: Sequence[int]

    def __init__(self, matcher: Any, ends: Sequence[int]) -> None:
        self.matcher, self.ends = matcher, ends

    def copy(self) -> Grammar:
        """The same structure for another text, from here on."""
        return Grammar(self.matcher.deep_copy(), self.ends)

    def mask(self) -> NDArray[np.uint8]:
        """One bit for each token, the lowest first: 1 where it may come next. A text that is complete may only end."""
        return np.frombuffer(self.matcher.compute_bitmask(), np.uint8)

    def take(self, token: int) -> None:
        """Go on by a token that was drawn."""
        if token not in self.ends:
            self.matcher.consume_token(token)


class Grammars:
    """Makes the grammars of requests.

    vocabulary: of the model's tokenizer; ends: tokens that end a text; size: tokens that the model knows
    """

    vocabulary: Vocabulary
    ends: list[int]
    size: int

    def __init__(self, vocabulary: Vocabulary, ends: Sequence[int], size: int) -> None:
        self.vocabulary, self.ends, self.size = vocabulary, [end for end in ends if end >= 0], size
        self._tokens: Any = None

    def make(self, kind: str, value: Any) -> Grammar:
        """The grammar of a structure. kind, value: as `Request.structure` gives them

        Raises PackageError if llguidance is not installed, InputError if the structure cannot be used.
        """
        try:
            from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
        except ImportError:
            raise PackageError(
                "a text with a structure needs llguidance: pip install 't2kernels[structured]'"
            ) from None
        if not self.ends:
            raise InputError("this model has no token that ends a text, so its texts cannot have a structure")
        if self._tokens is None:
            tokenizer = TokenizerWrapper(_Tokens(self.vocabulary, self.ends[0], self.size))
            self._tokens = LLTokenizer(tokenizer, n_vocab=self.size, eos_token=self.ends)
        try:
            if (size := len(json.dumps(value))) > (most := MOST if kind in ("json", "calls") else MOST // 4):
                raise InputError(f"it has {size} characters; expected at most {most}")
            if kind == "json":
                schema = json.loads(value) if isinstance(value, str) else value
                options = {"whitespace_flexible": True, "whitespace_pattern": SPACE}
                text = LLMatcher.grammar_from_json_schema(schema, options)
            elif kind == "regex":
                text = LLMatcher.grammar_from_regex(value)
            elif kind == "choice":
                if not value or not all(isinstance(choice, str) and choice for choice in value):
                    raise InputError("expected a list of texts")
                text = LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in value))
            else:
                text = value
            matcher = LLMatcher(self._tokens, text, log_level=0)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"the {kind} cannot be used: {error}") from None
        if matcher.is_error():
            raise InputError(f"the {kind} cannot be used: {matcher.get_error().splitlines()[0]}")
        return Grammar(matcher, self.ends)


class _Tokens:
    """A tokenizer as llguidance's `TokenizerWrapper` reads it."""

    def __init__(self, vocabulary: Vocabulary, end: int, size: int) -> None:
        self.tokenizer = vocabulary.tokenizer
        self.eos_token_id, self.bos_token_id = end, None
        self.tokens = [vocabulary.raw(token) for token in range(size)]
        self.special_token_ids = self.tokenizer.all_special_ids

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
