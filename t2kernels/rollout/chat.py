"""From a prompt to token ids, and the tokens that end a completion. This is the only place that knows both.

`prompt_form` decides whether a model is asked through its chat template. A prompt is text or a chat. A chat goes
through the tokenizer's template, which writes its own special tokens. So the tokenizer adds its special tokens to text,
and never to the output of a template: it would write the BOS token twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from t2kernels import InputError
from t2kernels.tasks import names
from t2kernels.tasks.base import Task

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


@dataclass(frozen=True)
class PromptForm:
    """How a text is asked.

    chat: as a message of the user, through the chat template; else as it is
    system: the system message before it; None: the template's own. An empty text is a message too.
    """

    chat: bool = False
    system: str | None = None

    def apply(self, prompt: AnyPrompt) -> AnyPrompt:
        """A prompt in this form. A chat stays one, and gets the system message if it has none."""
        if isinstance(prompt, str):
            if not self.chat:
                return prompt
            prompt = user_message(prompt)
        if self.system is None or prompt[0].get("role") == "system":
            return prompt
        return [{"role": "system", "content": self.system}, *prompt]

    def of_task(self, task: Task) -> Task:
        """The task with its prompts in this form."""
        return replace(task, chat=self.chat, system=self.system)

    def record(self) -> dict[str, Any]:
        """The form as JSON, for the column `prompt` of the manifest of an expert that was trained with it."""
        return {"chat": self.chat, "system": self.system}

    def __str__(self) -> str:
        if not self.chat:
            return "plain text"
        return "the chat template" + ("" if self.system is None else f" and the system message {self.system!r:.40}")


def recorded_form(manifest: Mapping[str, Any]) -> PromptForm | None:
    """The form that an expert was trained with, from its manifest; None if that does not say it.

    Raises InputError for a system message that is no text.
    """
    found = manifest.get("prompt")
    if not isinstance(found, Mapping) or not isinstance(found.get("chat"), bool):
        return None
    system = found.get("system")
    if not isinstance(system, str | None):
        raise InputError(
            f"the manifest of expert {manifest.get('name')!r:.60} has the system message {system!r:.60}, wanted a text "
            "or null; give the form yourself (--chat, --no-chat, --system)"
        )
    return PromptForm(found["chat"], system)


def prompt_form(
    tokenizer: Any,
    chat: bool | None = None,
    system: str | None = None,
    manifests: Sequence[Mapping[str, Any]] = (),
    task: Task | None = None,
) -> PromptForm:
    """The form in which a model is asked, in training, evaluation, generation, adaptation and serving alike.

    chat: True, False, or None, which is the first of these that says something:
        the task: True if its prompts are chats, False for those of the built-in model and for images
        the manifests: the form that all experts with a record were trained with
        the tokenizer: True if it has a chat template
    system: the system message; None: the recorded one, or the template's own
    manifests: of the experts that will answer
    task: what is asked

    Raises ValueError for chats without a template or with images, for texts where the task has chats, and for a system
    message without a chat.
    """
    template = has_template(tokenizer)
    forms = {form for manifest in manifests if (form := recorded_form(manifest)) is not None}
    recorded = forms.pop() if len(forms) == 1 else None
    if task is not None and task.made_of_chats and chat is False:
        raise InputError(f"--no-chat: the prompts of {task.name!r} are chats, which need the chat template")
    if chat and task is not None and task.images:
        raise InputError(
            f"--chat: the messages of {task.name!r} hold images, which need a vision-language model; --no-chat asks "
            "with the words in them"
        )
    if chat is None:
        if task is not None and task.made_of_chats:
            chat = True
        elif task is not None and (task.images or task.name in names()):
            chat = False
        else:
            chat = template and (system is not None or recorded is None or recorded.chat)
    if chat and not template:
        raise InputError("--chat: this model's tokenizer has no chat template")
    if system is not None and not chat:
        raise InputError("--system: a system message needs the chat template, and these prompts are plain text")
    if system is None and chat and recorded is not None:
        system = recorded.system
    return PromptForm(chat, system)


def other_forms(form: PromptForm, manifests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each expert that was trained with another form than `form`. manifests: {expert: manifest}"""
    recorded = {name: recorded_form(manifest) for name, manifest in manifests.items()}
    return [
        f"expert {name!r} was trained with {own}, and is asked with {form}"
        for name, own in recorded.items()
        if own is not None and own != form
    ]


def render(tokenizer: Any, prompts: Sequence[AnyPrompt], **template: Any) -> tuple[list[str], bool]:
    """(the text of each prompt; whether the tokenizer must add its special tokens to it). Arguments as of `encode`."""
    chats = [not isinstance(prompt, str) for prompt in prompts]
    if any(chats) and not all(chats):
        raise InputError("some prompts of this batch are text and some are chats: use one of the two throughout")
    texts = [
        tokenizer.apply_chat_template(prompt, **{"add_generation_prompt": True, **template}, tokenize=False)
        if chat
        else prompt
        for prompt, chat in zip(prompts, chats, strict=True)
    ]
    return texts, not any(chats)


def encode(tokenizer: Any, prompts: Sequence[AnyPrompt], **template: Any) -> list[list[int]]:
    """The token ids of each prompt, without padding. A chat ends where the assistant's answer begins.

    template: further arguments of the chat template, such as tools
    Raises ValueError if some prompts are text and others are chats. The template may raise its own errors.
    """
    texts, special = render(tokenizer, prompts, **template)
    return tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the model's own and the tokenizer's. Empty if neither has one."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return list(dict.fromkeys(end for end in ends if end is not None))
