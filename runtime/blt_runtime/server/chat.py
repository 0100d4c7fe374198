"""From the messages of a request to one prompt."""

from __future__ import annotations

from collections.abc import Sequence

from .. import chat
from ..chat_template import ChatTemplate
from ..errors import InputError
from .errors import RequestError
from .schema import Message


class Template:
    """The chat template of a server.

    source: Jinja, or None for the plain form of `blt_runtime.chat`. stop: strings that end an answer. Raises UsageError
    for a source that is no template.
    """

    def __init__(self, source: str | None) -> None:
        self.source = source
        self.stop: list[str | bytes] = list(chat.STOPS) if source is None else []
        self._template = None if source is None else ChatTemplate(source)

    def render(self, messages: Sequence[Message], generation_prompt: bool) -> bytes:
        """The prompt. BOS is left out of its beginning, where it is put anyway. Raises RequestError."""
        if self._template is None:
            return chat.plain([chat.Message(message.role, message.content) for message in messages])
        given = [message.model_dump(include={"role", "content", "name"}) for message in messages]
        try:
            return self._template.render(given, generation_prompt)
        except InputError as error:
            raise RequestError(str(error), param="messages") from error
