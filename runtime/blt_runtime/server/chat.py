"""From the messages of a request to one prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from .. import chat
from ..chat_template import ChatTemplate
from ..errors import InputError
from .errors import RequestError
from .schema import Message

AT_ONCE = 2
"""Chats that are rendered at a time, away from the event loop."""


class Template:
    """The chat template of a server.

    source: Jinja, or None for the plain form of `blt_runtime.chat`. stop: strings that end an answer. Raises UsageError
    for a source that is no template.
    """

    def __init__(self, source: str | None) -> None:
        self.source = source
        self.stop: list[str | bytes] = list(chat.STOPS) if source is None else []
        self._template = None if source is None else ChatTemplate(source)
        self._threads = ThreadPoolExecutor(AT_ONCE, "chat-template")

    async def render(self, messages: Sequence[Message], generation_prompt: bool) -> bytes:
        """The prompt. BOS is left out of its beginning, where it is put anyway. Raises RequestError."""
        if self._template is None:
            return chat.plain([chat.Message(message.role, message.content) for message in messages])
        given = [message.model_dump(include={"role", "content", "name"}) for message in messages]
        render = partial(self._template.render, given, generation_prompt)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, render)
        except InputError as error:
            raise RequestError(str(error), param="messages") from error

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
