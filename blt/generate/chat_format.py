"""How the messages of a conversation become a prompt: the chat template that a bundle holds, or the plain format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blt_runtime import Model
from blt_runtime.chat import STOPS, Message, plain
from blt_runtime.chat_template import ChatTemplate


@dataclass(frozen=True)
class ChatFormat:
    """render: messages as bytes, and the beginning of an answer. stops: strings that end an answer, besides EOS."""

    render: Callable[[Sequence[Message]], bytes]
    stops: tuple[bytes, ...]


PLAIN = ChatFormat(plain, STOPS)


def format_of(model: Model) -> ChatFormat:
    """The format of the chat template in the model's bundle; the plain one without a template. Raises UsageError for a
    template that is not valid, and MissingExtra without Jinja."""
    source = None if model.manifest is None else model.manifest.chat_template
    if source is None:
        return PLAIN
    template = ChatTemplate(source)
    return ChatFormat(lambda messages: template.render([_shown(message) for message in messages]), ())


def _shown(message: Message) -> dict[str, str]:
    content = message.content
    return {
        "role": message.role,
        "content": content if isinstance(content, str) else content.decode(errors="replace"),
    }
