"""Requests of OpenAI's API, with the fields that vLLM adds to it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from t2kernels import InputError
from t2kernels.serve.engine.adjusting import Adjustment
from t2kernels.serve.engine.grammar import Grammar
from t2kernels.serve.engine.sampling import Sampling

from .errors import bad
from .refusals import refusal, shown, without_neutral
from .tools import calls_of

MAX_LOGPROBS: int = 20
MAX_STOPS: int = 16
MAX_STOP: int = 1024
"""Most characters of a stop text. It is searched for after every token."""
MAX_COMPLETIONS: int = 128
"""Completions of one request: prompts times n."""

MAX_MODEL: int = 2048
"""Most characters of `model`: a mixture of 16 experts is shorter."""

JSON = dict[str, Any]
"""A JSON object."""
GUIDED: tuple[str, ...] = ("json", "regex", "choice", "grammar")
"""Kinds of structure that `guided_KIND` and the keys of `structured_outputs` ask for."""


class StreamOptions(BaseModel):
    """Options of a stream. include_usage: whether a last chunk holds the number of tokens."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = None  # accepted and ignored
    continuous_usage_stats: Literal[False] | None = None


class Request(BaseModel):
    """The fields that both endpoints take.

    A field that would change the answer and is not supported is refused with an error.
    A field that changes nothing is ignored (`refusals`).
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    model: str = Field(max_length=MAX_MODEL)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    logit_bias: dict[int, float] = Field({}, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=64)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = Field([], max_length=128)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: JSON | None = None
    guided_json: str | JSON | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, max_length=1024)
    guided_grammar: str | None = None
    structured_outputs: JSON | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body: Any) -> Any:
        return without_neutral(cls.model_fields, body)

    @model_validator(mode="after")
    def _check(self) -> Request:
        if len(self.stops) > MAX_STOPS or not all(0 < len(s) <= MAX_STOP for s in self.stops):
            raise InputError(f"stop: expected at most {MAX_STOPS} texts of 1 to {MAX_STOP} characters")
        if self.stream_options is not None and not self.stream:
            raise InputError("stream_options: expected null where stream is not true")
        if not all(math.isfinite(b) and abs(b) <= 100 for b in self.logit_bias.values()):
            raise InputError("logit_bias: expected token ids with numbers from -100 to 100")
        if self.structure() is not None and self.ignore_eos:
            raise InputError("ignore_eos: a text with a structure ends where the structure does; leave it out")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def limit(self) -> int | None:
        """The requested number of new tokens, or None."""
        raise NotImplementedError

    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported with each token. None: no log-probability is reported."""
        raise NotImplementedError

    def structure(self) -> tuple[str, Any] | None:
        """(kind, value) of the structure that the text must have, or None. Raises InputError.

        kind: "json" with a schema, "regex", "choice" with texts, or "grammar" in Lark's form
        """
        asked = {f"guided_{kind}": (kind, getattr(self, f"guided_{kind}")) for kind in GUIDED}
        for kind, value in (self.structured_outputs or {}).items():
            if kind not in GUIDED and value not in (None, False):
                raise InputError(f"structured_outputs: {kind} is not supported; there are {', '.join(GUIDED)}")
            asked[f"structured_outputs.{kind}"] = (kind, value if kind in GUIDED else None)
        if self.response_format is not None:
            asked["response_format"] = ("json", _schema(self.response_format))
        found = {name: value for name, value in asked.items() if value[1] is not None}
        if len(found) > 1:
            raise InputError(f"{', '.join(found)}: expected one of them at most")
        return next(iter(found.values()), None)

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False

    @property
    def uses_tools(self) -> bool:
        """Whether the model is told of tools and its calls are read."""
        return False

    def sampling(self, i: int, ends: Sequence[int] = (), grammar: Grammar | None = None) -> Sampling:
        """The sampling of completion i. Each completion has its own seed, made from the request's seed.

        ends: tokens that end the text, which min_tokens holds back; grammar: of the text, for this completion alone
        """
        seed = None if self.seed is None else f"{self.seed}/{i}"
        adjustment = Adjustment(
            self.frequency_penalty,
            self.presence_penalty,
            self.repetition_penalty,
            self.logit_bias,
            self.min_tokens,
            ends,
            grammar,
        )
        top_k = max(0, self.top_k)
        return Sampling(
            self.temperature, self.top_p, top_k, seed, self.wanted_logprobs(), min_p=self.min_p, adjustment=adjustment
        )


def _schema(format: JSON) -> JSON | str | None:
    """The schema that a `response_format` asks for; None for text."""
    kind = format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    schema = format.get("json_schema")
    if kind == "json_schema" and isinstance(schema, dict):
        return schema.get("schema") or {}
    raise InputError(
        f"response_format: expected {{'type': 'text'}}, 'json_object', or 'json_schema' with json_schema, "
        f"not {shown(format)}"
    )


class ChatRequest(Request):
    """The body of POST /v1/chat/completions."""

    messages: list[JSON] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[JSON] = Field([], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | JSON = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: JSON = {}

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise InputError(f"top_logprobs: {self.top_logprobs} needs logprobs=true")
        self._functions()
        return self

    def _functions(self) -> dict[str, JSON]:
        """The functions that may be called, by name."""
        for i, tool in enumerate(self.tools):
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict) or not function.get("name"):
                raise InputError(
                    f"tools[{i}]: expected {{'type': 'function', 'function': {{'name': ...}}}}, not {shown(tool)}"
                )
        return {str(tool["function"]["name"]): tool["function"] for tool in self.tools}

    def structure(self) -> tuple[str, Any] | None:
        """See `Request.structure`. ("calls", a grammar) where the text must be a call of a function."""
        found, functions, choice = super().structure(), self._functions(), self.tool_choice
        if choice in ("none", "auto"):
            return found
        if found is not None:
            raise InputError("tool_choice: a text that must be a call has no other structure; leave that out")
        if choice == "required":
            if not functions:
                raise InputError('tool_choice: "required" needs tools')
            return "calls", calls_of(list(functions.values()), self.parallel_tool_calls)
        named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        name = named.get("name") if isinstance(named, dict) else None
        if not isinstance(name, str) or name not in functions:
            form = "{'type': 'function', 'function': {'name': ...}} with the name of a tool"
            raise InputError(f"tool_choice: expected {form}, not {shown(choice)}")
        return "calls", calls_of([functions[name]], False)

    @property
    def limit(self) -> int | None:
        """The requested number of new tokens, or None."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def uses_tools(self) -> bool:
        """See `Request.uses_tools`."""
        return bool(self.tools) and self.tool_choice != "none"

    def wanted_logprobs(self) -> int | None:
        """See `Request.wanted_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def chat(self) -> list[JSON]:
        """The messages with plain text as content. Raises APIError 400 for images and other parts."""
        out = []
        for i, message in enumerate(self.messages):
            content, role = message.get("content"), message.get("role")
            if isinstance(content, list):
                if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
                    raise bad(f"messages[{i}] has a part that is not text; this model reads text only", "messages")
                content = "".join(str(part.get("text", "")) for part in content)
            if content is None and role == "assistant":
                content = ""  # as in a message that only calls tools
            if not isinstance(content, str) or not isinstance(role, str):
                given = f"role {shown(role)} and content {shown(message.get('content'))}"
                raise bad(f"messages[{i}]: expected a role and a content, both text, not {given}", "messages")
            out.append({k: v for k, v in message.items() if v is not None} | {"content": content} | _calls(message, i))
        return out


def chat_of(**fields: Any) -> ChatRequest:
    """A chat that another form of request asks for. Raises APIError 400."""
    try:
        return ChatRequest(**fields)
    except ValidationError as error:
        raise refusal(error.errors(), "application/json") from None


def _calls(message: JSON, i: int) -> JSON:
    """{"tool_calls": ...} of a message, with arguments as objects: templates write them as JSON themselves."""
    calls = message.get("tool_calls")
    if not calls:
        return {}
    try:
        functions = [dict(call["function"]) for call in calls]
        for function in functions:
            if isinstance(function.get("arguments"), str):
                function["arguments"] = json.loads(function["arguments"] or "{}")
    except (ValueError, TypeError, KeyError, RecursionError):
        raise bad(
            f"messages[{i}].tool_calls: expected functions with a name and arguments in JSON", "messages"
        ) from None
    return {"tool_calls": [{**call, "function": f} for call, f in zip(calls, functions, strict=True)]}


def _prompt(value: Any) -> Any:
    """The prompt as it is. pydantic would try each of its forms on each of a million entries."""
    entries = value if isinstance(value, list) else [value]
    kinds = set(map(type, entries))
    if len(kinds) > 1 or not kinds <= {str, int, list} or (kinds == {int} and value is not entries):
        raise InputError(f"prompt: expected text, texts, token ids, or lists of token ids, not {shown(value)}")
    if kinds != {int} and len(entries) > MAX_COMPLETIONS:
        raise InputError(f"prompt: {len(entries)} prompts; expected 1 to {MAX_COMPLETIONS} completions")
    if kinds == {list} and not set(map(type, itertools.chain(*entries))) <= {int}:
        raise InputError(f"prompt: expected token ids, not {shown(value)}")
    return value


Prompts: TypeAlias = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
"""One prompt or several, as text or token ids."""


class CompletionRequest(Request):
    """The body of POST /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise InputError(f"best_of: {self.best_of} is not supported; it can only be n, {self.n}")
        prompts = len(self.prompts())
        if not 1 <= prompts * self.n <= MAX_COMPLETIONS:
            raise InputError(f"prompt: {prompts} prompts with n={self.n}; expected 1 to {MAX_COMPLETIONS} completions")
        return self

    @property
    def limit(self) -> int | None:
        """The requested number of new tokens; 16 by default, as in OpenAI's API."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def echoes(self) -> bool:
        """See `Request.echoes`."""
        return self.echo

    def wanted_logprobs(self) -> int | None:
        """See `Request.wanted_logprobs`."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, each a text or token ids."""
        single = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        return [self.prompt] if single else list(self.prompt)
