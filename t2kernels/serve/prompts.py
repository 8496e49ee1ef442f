"""The prompts of a request: messages and texts to token ids, within the context, and the structure of the text."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from t2kernels import InputError, PackageError
from t2kernels.experts.names import AUTO
from t2kernels.rollout.chat import encode, has_template, recorded_form
from t2kernels.serve.engine.grammar import Grammar
from t2kernels.serve.http.errors import bad
from t2kernels.serve.http.protocol import GUIDED, ChatRequest, CompletionRequest

from .auto import AutoPrompt
from .service import Service

logger: logging.Logger = logging.getLogger(__name__)

RESERVED: frozenset[str] = frozenset(
    "conversation messages tools documents chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)
"""Arguments of `apply_chat_template` that are no variables of the template."""


@dataclass
class Prepared:
    """What a request asks the engine.

    prompts: token ids; texts: of the prompts, for `echo`; about: the prompt as the router reads it
    grammar: of the text, or None
    """

    prompts: list[list[int]]
    texts: list[str]
    about: AutoPrompt
    grammar: Grammar | None = None


def prepare(service: Service, request: ChatRequest | CompletionRequest) -> Prepared:
    """Token ids, and the structure of the text. Raises APIError 400."""
    for name, tokens in (("logit_bias", request.logit_bias), ("stop_token_ids", request.stop_token_ids)):
        check_tokens(service, name, tokens)
    prepared = _chat(service, request) if isinstance(request, ChatRequest) else _text(service, request)
    if (structure := request.structure()) is not None:
        try:
            prepared.grammar = service.grammars.make(*structure)
        except (PackageError, InputError) as error:
            fields = ("response_format", "structured_outputs", *(f"guided_{kind}" for kind in GUIDED))
            field = next((name for name in fields if getattr(request, name) is not None), "tool_choice")
            code = "not_installed" if isinstance(error, PackageError) else None
            raise bad(f"{field}: {error}", field, code) from None
    return prepared


def _chat(service: Service, request: ChatRequest) -> Prepared:
    messages = _in_form(service, request.model, request.chat())
    check_length(service, sum(len(message["content"]) for message in messages))
    about = messages if service.tokenizer.chat_template else messages[-1]["content"]
    options = request.chat_template_kwargs
    if wrong := RESERVED.intersection(options):
        raise bad(f"chat_template_kwargs: {min(wrong)} cannot be set by a request", "chat_template_kwargs")
    if request.uses_tools:
        options = {**options, "tools": request.tools}
    return Prepared([encode_chat(service, messages, **options)], [""], about)


def _in_form(service: Service, model: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with the system message of the expert's training if it had one and the request has none."""
    version = service.experts.current.get(model)
    form = recorded_form(version.manifest) if version is not None and has_template(service.tokenizer) else None
    return messages if form is None else [dict(message) for message in form.apply(messages)]


def _text(service: Service, request: CompletionRequest) -> Prepared:
    prompts = request.prompts()
    for prompt in prompts:  # all of them, before the work on the first
        if isinstance(prompt, str):
            check_length(service, len(prompt))
        else:
            limit_of(service, prompt, request.limit)
    encoded = [_encode_text(service, prompt) for prompt in prompts]
    if request.model == AUTO and len(prompts) > 1:
        raise bad("model 'auto' chooses for one prompt: send one request per prompt", "prompt")
    texts = [p if isinstance(p, str) else service.tokenizer.decode(p) if request.echo else "" for p in prompts]
    first = prompts[0]
    about = first if isinstance(first, str) else service.tokenizer.decode(first, skip_special_tokens=True)
    return Prepared(encoded, texts, about)


def encode_chat(service: Service, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """The tokens of messages by the chat template. Without one, a single message of the user is the prompt.

    options: variables of the template, and tools. Raises APIError 400.
    """
    tokenizer = service.tokenizer
    if has_template(tokenizer):
        try:
            return encode(tokenizer, [messages], **options)[0]
        except Exception as error:  # a template may raise anything
            logger.warning("the chat template refused %d messages", len(messages), exc_info=True)
            raise bad(f"the model's chat template refuses these messages: {error}", "messages") from None
    if len(messages) == 1 and messages[0]["role"] == "user" and "tools" not in options:
        return tokenizer(check_text("messages", messages[0]["content"]))["input_ids"]
    asked = "tools" if "tools" in options else "messages"
    raise bad(
        f"{asked}: this model has no chat template, so it cannot read {len(messages)} messages"
        f"{' with tools' if asked == 'tools' else ''}: send one message of the user, use /v1/completions, or start the "
        "server with --chat-template FILE",
        asked,
        "no_chat_template",
    )


def _encode_text(service: Service, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return service.tokenizer(check_text("prompt", prompt))["input_ids"]
    check_tokens(service, "prompt", prompt)
    return prompt


def check_text(field: str, text: str) -> str:
    """The text. Raises APIError 400 if a part of it is no character: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise bad(f"{field}: character {at} is {text[at]!a}, half of a pair, and no text", field) from None
    return text


def check_tokens(service: Service, field: str, tokens: Collection[int]) -> None:
    """Raises APIError 400 if one of the tokens is none of the model's."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < service.tokens):
        raise bad(f"{field}: token ids go from 0 to {service.tokens - 1}", field)


def check_length(service: Service, characters: int) -> None:
    """Raise APIError 400 for a text that cannot fit the context, whatever its tokens are."""
    if characters > service.most_characters:
        raise bad(
            f"this model's maximum context length is {service.context} tokens; the request has {characters} characters",
            code="context_length_exceeded",
        )


def limit_of(service: Service, prompt: Sequence[int], requested: int | None) -> int:
    """How many tokens may follow a prompt. Raises APIError 400 if that is none, or fewer than requested."""
    room = service.context - len(prompt)
    if not prompt:
        raise bad("the prompt is empty: it needs at least one token", "prompt")
    if room < 1 or (requested is not None and requested > room):
        tokens = f"{len(prompt)} tokens of prompt" + (f" and {requested} more" if requested is not None else "")
        message = f"this model's maximum context length is {service.context} tokens; the request asks for {tokens}"
        raise bad(message, code="context_length_exceeded")
    return room if requested is None else requested
