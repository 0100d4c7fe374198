"""The plain format of conversations."""

from __future__ import annotations

from typing import Any

import pytest

from blt_runtime.chat import STOPS, Message, plain
from blt_runtime.errors import UsageError
from blt_runtime.text import StopMatcher

QUESTION = Message("user", "What is a byte?")


def test_each_message_is_a_line_with_its_role_and_the_answer_is_begun() -> None:
    messages = [Message("system", "Be brief."), QUESTION]
    assert plain(messages) == b"system: Be brief.\nuser: What is a byte?\nassistant: "


def test_without_messages_only_the_answer_is_begun() -> None:
    assert plain([]) == b"assistant: "


def test_the_text_of_a_longer_conversation_begins_with_the_shorter_ones_and_its_answer() -> None:
    longer = [QUESTION, Message("assistant", "Eight\nbits."), Message("user", "And a patch?")]
    assert plain(longer).startswith(plain([QUESTION]) + b"Eight\nbits.")


def test_bytes_that_are_not_utf8_are_kept() -> None:
    assert plain([Message("user", b"\xff\x00")]) == b"user: \xff\x00\nassistant: "


def test_an_answer_ends_where_the_next_message_would_begin() -> None:
    matcher = StopMatcher(STOPS)
    assert matcher.feed(b"Eight bits.\nuser: And") == b"Eight bits."
    assert matcher.stopped


@pytest.mark.parametrize("role", ["robot", "", "user\nassistant", None, 3], ids=repr)
def test_an_unknown_role_is_refused(role: Any) -> None:
    with pytest.raises(UsageError, match="role"):
        Message(role, "text")


@pytest.mark.parametrize("content", [None, 7, ["text"]], ids=repr)
def test_content_that_is_neither_text_nor_bytes_is_refused(content: Any) -> None:
    with pytest.raises(UsageError, match="the content of a message must be text"):
        Message("user", content)
