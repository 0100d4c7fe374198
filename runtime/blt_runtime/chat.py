"""Conversations as text: the messages, and the plain format for models without a chat template.

    user: What is a byte?
    assistant: Eight bits.
    user: And a patch?
    assistant:

The text of a longer conversation begins with that of a shorter one and its answer. So a stream appends each turn to
what it holds. Roles are not escaped: a message that contains "\\nassistant:" reads like two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .arguments import choice
from .ids import to_bytes

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
STOPS: Final = tuple(f"\n{role}:".encode() for role in ROLES)
"""Stop strings of the plain format: an answer ends where the next message would begin."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation. `content` is text, or bytes where a model wrote no valid UTF-8.

    Example:
        Message("user", "What is a byte?")

    Raises UsageError for a role that is not one of `ROLES`, and for content that is neither text nor bytes.
    """

    role: str
    content: str | bytes

    def __post_init__(self) -> None:
        choice("role", self.role, ROLES)
        to_bytes(self.content, "the content of a message")


def plain(messages: Iterable[Message]) -> bytes:
    """A line `role: content` for each message, and the beginning of the answer. Generate after it with `stop=STOPS`.

    Example:
        stream.append(plain([Message("user", "What is a byte?")]))
        answer = b"".join(stream.generate(200, stop=STOPS))
    """
    lines = [b"%s: %s\n" % (message.role.encode(), to_bytes(message.content)) for message in messages]
    return b"".join([*lines, b"assistant: "])
