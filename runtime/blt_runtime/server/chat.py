"""Chat templates: the messages of a chat as one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .. import chat
from ..errors import UsageError
from .errors import RequestError
from .prompts import SPECIALS
from .schema import Message

BOS, EOS = SPECIALS[1:3]


class Template:
    """A Jinja template with the variables of Hugging Face's chat templates, in a sandbox.

    source: of the template, or None for the plain form of `blt_runtime.chat`. stop: strings that end an answer. Raises
    UsageError for a source that is no template.
    """

    def __init__(self, source: str | None) -> None:
        self.source = source
        self.stop: list[str | bytes] = list(chat.STOPS) if source is None else []
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        try:
            self._template = None if source is None else environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template is not valid: {error}") from error

    def render(self, messages: Sequence[Message], generation_prompt: bool) -> bytes:
        """The prompt. BOS is left out of its beginning, where it is put anyway. Raises RequestError."""
        if self._template is None:
            return chat.plain([chat.Message(message.role, message.content) for message in messages])
        try:
            text = self._template.render(
                messages=[message.model_dump(include={"role", "content", "name"}) for message in messages],
                add_generation_prompt=generation_prompt,
                bos_token=BOS,
                eos_token=EOS,
                tools=None,
            )
        except Exception as error:  # whatever its expressions do
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        return text.removeprefix(BOS).encode(errors="ignore")


def _raise(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))
