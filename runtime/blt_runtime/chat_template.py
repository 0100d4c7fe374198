"""Chat templates: Jinja sources with the variables of Hugging Face's, which a bundle may hold.

A template is code of the bundle's author. It runs in Jinja's sandbox, without access to Python's objects; its time is
not limited.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from .bundle.manifest import LONGEST_TEMPLATE
from .errors import InputError, MissingExtra, UsageError

if TYPE_CHECKING:
    import jinja2

BOS, EOS = "<|bos|>", "<|eos|>"
"""What `bos_token` and `eos_token` are in a template."""


class ChatTemplate:
    """A compiled template.

    Raises UsageError for a source that is no template or too long, and MissingExtra without Jinja.
    """

    def __init__(self, source: str) -> None:
        if len(source) > LONGEST_TEMPLATE:
            raise UsageError(f"the chat template has {len(source):,} characters; the most is {LONGEST_TEMPLATE:,}")
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise MissingExtra("jinja2, which chat templates need,", "serve") from error
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        self.source = source
        try:
            self._template: jinja2.Template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise UsageError(f"the chat template is not valid: {_line(error)}") from error

    def render(self, messages: Sequence[dict[str, Any]], generation_prompt: bool = True) -> bytes:
        """The prompt, without the BOS at its beginning. Raises InputError where the template refuses the messages."""
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=generation_prompt, bos_token=BOS, eos_token=EOS, tools=None
            )
        except Exception as error:  # whatever its expressions do
            raise InputError(f"the chat template refuses these messages: {_line(error)}") from error
        return text.removeprefix(BOS).encode(errors="ignore")


def _raise(message: object) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(str(message))


def _line(error: BaseException) -> str:
    lines = str(error).split("\n")
    return lines[0][:300] or type(error).__name__
