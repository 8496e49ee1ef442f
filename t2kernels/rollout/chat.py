"""From a prompt to token ids, and the tokens that end a completion. This is the only place that knows both.

A prompt is text or a chat. A chat goes through the tokenizer's template, which writes its own special tokens. So the
tokenizer adds its special tokens to text, and never to the output of a template: it would write the BOS token twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from t2kernels import InputError

Message = Mapping[str, Any]
"""{"role": ..., "content": ...}, and whatever else the template reads."""
Chat = Sequence[Message]
AnyPrompt = str | Chat
"""Text, or a chat."""


def has_template(tokenizer: Any) -> bool:
    """True if the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def user_message(text: str) -> list[dict[str, Any]]:
    """A chat of one message from the user."""
    return [{"role": "user", "content": text}]


def as_completion(text: str, prompt: AnyPrompt) -> str | list[dict[str, Any]]:
    """A completion in the form of its prompt: text for text, a message of the assistant for a chat."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def encode(tokenizer: Any, prompts: Sequence[AnyPrompt], **template: Any) -> list[list[int]]:
    """The token ids of each prompt, without padding. A chat ends where the assistant's answer begins.

    template: further arguments of the chat template, such as tools
    Raises ValueError if some prompts are text and others are chats. The template may raise its own errors.
    """
    chats = [not isinstance(prompt, str) for prompt in prompts]
    if any(chats) and not all(chats):
        raise InputError("some prompts of this batch are text and some are chats: use one of the two throughout")
    texts = [
        tokenizer.apply_chat_template(prompt, **{"add_generation_prompt": True, **template}, tokenize=False)
        if chat
        else prompt
        for prompt, chat in zip(prompts, chats, strict=True)
    ]
    return tokenizer(texts, add_special_tokens=not any(chats))["input_ids"] if texts else []


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the model's own and the tokenizer's. Empty if neither has one."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return list(dict.fromkeys(end for end in ends if end is not None))
