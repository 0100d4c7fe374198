"""Chat templates: Jinja sources with the variables of Hugging Face's, which a bundle may hold.

A template is code of the bundle's author. It runs in Jinja's sandbox, without access to Python's objects. Its processor
time, its text, products and powers are limited; the memory of other values, such as `x ~ x`, is not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from .bundle.manifest import LONGEST_TEMPLATE
from .errors import InputError, MissingExtra, UsageError

if TYPE_CHECKING:
    import jinja2

BOS, EOS = "<|bos|>", "<|eos|>"
"""What `bos_token` and `eos_token` are in a template."""
SECONDS = 2.0
"""Most processor time of one rendering, which is checked in loops and macros."""
MOST_CHARACTERS = 1 << 24
"""Most characters of a prompt, and most items of a repeated text or list."""
MOST_BITS = 1 << 12
"""Most bits of a power or a product."""


class ChatTemplate:
    """A compiled template. Several threads may use it at a time.

    Raises UsageError for a source that is no template or too long, and MissingExtra without Jinja.
    """

    def __init__(self, source: str) -> None:
        if len(source) > LONGEST_TEMPLATE:
            raise UsageError(f"the chat template has {len(source):,} characters; the most is {LONGEST_TEMPLATE:,}")
        try:
            from jinja2 import TemplateError
        except ImportError as error:
            raise MissingExtra("jinja2, which chat templates need,", "serve") from error
        self.source, self._clock = source, _Clock()
        try:
            self._template: jinja2.Template = _environment(self._clock).from_string(source)
        except (TemplateError, RecursionError) as error:
            raise UsageError(f"the chat template is not valid: {_line(error)}") from error

    def render(self, messages: Sequence[dict[str, Any]], generation_prompt: bool = True) -> bytes:
        """The prompt, without the BOS at its beginning. Raises InputError where the template refuses the messages, and
        where it exceeds a limit."""
        self._clock.begin()
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                messages=messages, add_generation_prompt=generation_prompt, bos_token=BOS, eos_token=EOS, tools=None
            ):
                pieces.append(piece)
                length += len(piece)
                if length > MOST_CHARACTERS:
                    _raise(f"its text has more than {MOST_CHARACTERS:,} characters")
        except Exception as error:  # whatever its expressions do
            raise InputError(f"the chat template refuses these messages: {_line(error)}") from error
        return "".join(pieces).removeprefix(BOS).encode(errors="ignore")


class _Clock(threading.local):
    """The processor time of the rendering in this thread."""

    _end = float("inf")

    def begin(self) -> None:
        self._end = time.thread_time() + SECONDS

    def tick(self) -> str:
        """Raises TemplateError where the time has passed."""
        if time.thread_time() > self._end:
            _raise(f"it computes for more than {SECONDS:g} s")
        return ""


def _environment(clock: _Clock) -> jinja2.Environment:
    """A sandbox that reads the clock in each round of a loop and each call of a macro."""
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Limited(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])
        tick = staticmethod(clock.tick)

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree = super()._parse(source, name, filename)
            for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
                assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
                tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
                node.body.insert(0, nodes.ExprStmt(tick))
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_size(operator, left, right)
            return super().call_binop(context, operator, left, right)

    # Not optimised: constant expressions are then computed by `render`, with its limits.
    made = Limited(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], optimized=False)
    made.globals["raise_exception"] = _raise
    return made


def _check_size(operator: str, left: Any, right: Any) -> None:
    """Raises TemplateError where a product or a power is too large to compute."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            _raise(f"a result of {operator} has more than {MOST_BITS:,} bits")
    elif operator == "*":
        count, items = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(count, int) and hasattr(items, "__len__") and len(items) * count > MOST_CHARACTERS:
            _raise(f"a result of * has more than {MOST_CHARACTERS:,} items")


def _raise(message: object) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(str(message))


def _line(error: BaseException) -> str:
    lines = str(error).split("\n")
    return lines[0][:300] or type(error).__name__
