"""`blt chat`: messages from a pipe and from a terminal, commands, Ctrl-C, and a model that is full."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from blt.cli import generation
from blt_runtime import Model
from blt_runtime.backends.null import null_spec
from tests.cli.calls import Result
from tests.cli.conftest import REPO
from tests.runtime.bundles import write_bundle
from tests.runtime.streams import model_of

Chat = Callable[..., Result]


@contextmanager
def open_null(path: Path, how: object, capacity: int = 300) -> Iterator[Model]:
    yield model_of(null_spec(capacity_bytes=capacity))


@pytest.fixture
def chat(blt: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """`chat("Hello", "/rewind")`: these lines from a pipe, answered by the null backend with -n 20 --seed 1."""
    write_bundle(tmp_path / "bundle")

    def call(*lines: str | bytes, options: tuple[object, ...] = ()) -> Result:
        stdin = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
        with monkeypatch.context() as patch:
            patch.setattr("blt.cli.models.open_model", open_null)
            result: Result = blt("chat", tmp_path / "bundle", "-n", 20, "--seed", 1, *options, stdin=stdin)
            return result

    return call


def test_each_line_of_a_pipe_is_a_message_and_stdout_has_the_answers(chat: Chat) -> None:
    one, both = chat("Hello"), chat("Hello", "", "And now?")
    assert one.code == both.code == 0
    assert both.text.startswith(one.text)
    assert len(both.text) > len(one.text) > 1
    assert ">" not in both.err


def test_a_line_of_windows_is_the_same_message(chat: Chat) -> None:
    assert chat("Hello\r").out == chat("Hello").out


def test_a_rewound_exchange_was_never_said(chat: Chat) -> None:
    taken = chat("Hello", "Nonsense", "/rewind", "And now?", "/history")
    never = chat("Hello", "And now?", "/history")
    assert "taken back: Nonsense" in taken.err
    assert taken.text.startswith(chat("Hello").text)
    assert taken.text.endswith(never.text.removeprefix(chat("Hello").text))
    assert taken.err[taken.err.index("user: ") :] == never.err[never.err.index("user: ") :]


def test_a_reset_keeps_the_system_message_only(chat: Chat) -> None:
    system = ("--system", "Be brief.")
    again = chat("Hello", "/reset", "/history", "And now?", options=system)
    assert again.text.endswith(chat("And now?", options=system).text)
    assert "\nsystem: Be brief.\n" in again.err
    assert "user: Hello" not in again.err


def test_history_lists_messages_with_escape_sequences_shown(chat: Chat) -> None:
    assert "user: \\x1b[2J\ufffd\n" in chat(b"\x1b[2J\xff", "/history").err


def test_commands_are_listed_and_a_wrong_one_is_no_message(chat: Chat) -> None:
    done = chat("/help", "/rewnd", "/rewind", "/quit", "never read")
    assert done.code == 0
    assert done.out == b""
    for part in ("/rewind ", "/reset ", "/history ", "/quit ", "/rewnd is no command", "there is no message to take"):
        assert part in done.err


def test_a_message_may_begin_with_a_slash(chat: Chat) -> None:
    assert "user: /usr/bin\n" in chat("//usr/bin", "/history").err


def test_ctrl_c_ends_an_answer_and_its_beginning_stays(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write = signal.getsignal(signal.SIGINT), generation.write_bytes
    pieces: list[bytes] = []

    def write_and_press(data: bytes) -> None:
        write(data)
        pieces.append(data)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generation, "write_bytes", write_and_press)
    done = chat("Hello", "/history", "And now?")
    assert done.code == 0
    first = b"".join(pieces[:3])
    assert done.out.startswith(first + b"\n")
    assert "interrupted; the answer ends here" in done.err
    assert f"assistant: {first.decode(errors='replace')}\n" in done.err
    assert len(pieces) > 10  # the next message has its whole answer
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_the_command(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def press_twice(data: bytes) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generation, "write_bytes", press_twice)
    assert chat("Hello").code == 130


def test_a_full_conversation_says_how_to_go_on(chat: Chat) -> None:
    ways = "/rewind takes back the last message and its answer, /reset forgets the conversation"
    full = chat("Hello", "x" * 227, "And now?")
    assert full.code == 1
    assert f"the conversation fills the model's 299 bytes; {ways}\n" in full.err
    assert f"and 0 of the model's 299 are left; {ways}\n" in full.err
    assert "error: messages that did not fit and have no answer: 1\n" in full.err
    assert chat("x" * 200, "y" * 90, "/rewind", "Hello").text.endswith(chat("Hello").text)


def test_a_message_that_never_fits_is_refused_and_the_next_is_answered(chat: Chat) -> None:
    done = chat("x" * 400, "Hello")
    assert done.code == 1
    assert "are left; write a shorter one\n" in done.err
    assert done.out == chat("Hello").out


TERMINAL = """
import signal
from blt.cli import main, models
from tests.cli.test_chat import open_null
models.open_model = open_null
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
main()
"""


class Terminal:
    """`blt chat` on a terminal."""

    def __init__(self, folder: Path) -> None:
        write_bundle(folder / "bundle")
        self.keys, terminal = pty.openpty()
        command = [sys.executable, "-c", TERMINAL, "chat", str(folder / "bundle"), "-n", "5", "--seed", "1"]
        path = os.pathsep.join(str(REPO / part) for part in ("", "export", "runtime"))
        environment = {**os.environ, "PYTHONPATH": path, "TERM": "dumb"}
        self.process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
        os.close(terminal)

    def until_prompt(self) -> str:
        screen = b""
        while not screen.endswith(b"> "):
            screen += os.read(self.keys, 1000)
        return screen.decode()

    def end_by(self, act: Callable[[], object]) -> int:
        """The exit code, after `act`. It is repeated, since it may come before the terminal is ready for it."""
        time.sleep(0.2)
        for _ in range(24):
            if self.process.poll() is not None:
                break
            act()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.process.kill()
        os.close(self.keys)
        return self.process.returncode


def test_a_terminal_has_a_prompt_and_the_end_of_input_is_a_normal_end(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    assert "/help lists the commands, Ctrl-D ends" in terminal.until_prompt()
    os.write(terminal.keys, b"Hello\n")
    assert "the answer reached its limit of 5 bytes" in terminal.until_prompt()
    assert terminal.end_by(lambda: os.write(terminal.keys, b"\x04")) == 0


def test_ctrl_c_at_the_prompt_ends(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.until_prompt()
    assert terminal.end_by(lambda: terminal.process.send_signal(signal.SIGINT)) == 130
