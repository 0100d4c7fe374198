"""`blt chat`: a conversation. Messages are lines of stdin, answers go to stdout, everything else to stderr."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, cast

import typer

from blt.cli import console, generation, models, options
from blt_runtime.errors import Cancelled, CapacityError
from blt_runtime.options import GenerateOptions

if TYPE_CHECKING:
    from blt.generate.conversation import Conversation
    from blt_runtime.speculation.speculate import Speculate

log = logging.getLogger("blt.cli")
PROMPT = "> "
HELP = """\
/rewind   take back the last message and its answer
/reset    forget the conversation, except for --system
/history  print the conversation
/help     print this list
/quit     end, as the end of the input does
A message that begins with / is written with //. Ctrl-C ends an answer early."""
GO_ON = "/rewind takes back the last message and its answer, /reset forgets the conversation"


def _lines() -> Iterator[bytes]:
    """The lines of stdin without their ends, on a terminal with a prompt, line editing and a history."""
    if not sys.stdin.isatty():
        yield from (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  gives `input` line editing and a history
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    while True:
        try:
            yield os.fsencode(_input())
        except (EOFError, KeyboardInterrupt) as error:
            print(file=sys.stderr)
            if isinstance(error, EOFError):
                return
            raise


def _input() -> str:
    if sys.stdout.isatty():
        return input(PROMPT)
    print(PROMPT, end="", file=sys.stderr, flush=True)  # stdout is for the answers
    return input()


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, since an exception inside a step would damage the stream. A second Ctrl-C raises
    KeyboardInterrupt."""
    pressed = threading.Event()

    def press(*_: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _until(pressed: threading.Event, pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        if pressed.is_set():
            return


class _Chat:
    """Runs the lines of one conversation. refused: the messages that did not fit."""

    def __init__(self, conversation: Conversation, n: int, chosen: GenerateOptions) -> None:
        self._conversation, self._n, self._chosen = conversation, n, chosen
        self.refused = 0

    def run(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            word = line.strip()
            if word == b"/quit":
                return
            if word.startswith(b"/") and not word.startswith(b"//"):
                self._command(os.fsdecode(word))
            elif word:
                self._answer(line[1:] if line.startswith(b"//") else line)

    def _command(self, word: str) -> None:
        conversation = self._conversation
        if word == "/help":
            console.to_stderr(HELP)
        elif word == "/history":
            for message in conversation.messages:
                console.to_stderr(f"{message.role}: {cast('bytes', message.content).decode(errors='replace')}")
        elif word == "/reset":
            conversation.reset()
            log.info("the conversation is forgotten")
        elif word != "/rewind":
            log.warning("%s is no command; /help lists them", word)
        elif conversation.exchanges:
            taken = conversation.rewind()
            log.info("taken back: %s", taken.message.decode(errors="replace"))
        else:
            log.warning("there is no message to take back")

    def _answer(self, message: bytes) -> None:
        with _ctrl_c() as pressed:
            try:
                pieces = self._conversation.ask(message, self._n, options=self._chosen, cancelled=pressed.is_set)
            except CapacityError as error:
                self.refused += 1
                log.warning("%s; %s", error, GO_ON if self._conversation.exchanges else "write a shorter one")
                return
            except Cancelled:
                log.info("interrupted: the message is taken back")
                return
            generation.write_text(_until(pressed, pieces))
            generation.write_bytes(b"\n")
        self._report_end()

    def _report_end(self) -> None:
        finish = self._conversation.exchanges[-1].finish
        if finish == "full":
            log.warning("the conversation fills the model's %s bytes; %s", f"{self._conversation.capacity:,}", GO_ON)
        elif finish == "length":
            log.info("the answer reached its limit of %s bytes (-n)", f"{self._n:,}")
        elif finish is None:
            log.info("interrupted; the answer ends here")


@options.verbosity
@options.takes(options.SamplingOptions)
@options.takes(
    options.ModelOptions, "backend", "entropy_model", "entropy_dtype", "device", *options.ON_DEVICES, "threads"
)
def chat(
    model: options.ModelPath,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="Begin with this system message (default: none).")
    ] = None,
    n: Annotated[str, typer.Option("-n", "--max-bytes", metavar="SIZE", help="Bytes of one answer, at most.")] = "512",
    *,
    sampling: options.SamplingOptions,
    speculate: options.Speculate = "off",
    how: options.ModelOptions,
) -> None:
    """Talk with a model: each line is a message, each answer is written to stdout. /help lists the commands."""
    size = options.parse_size(n, "-n", at_least=1)
    chosen = sampling.generate_options(speculate=cast("Speculate", speculate))
    from blt.generate.chat_format import format_of
    from blt.generate.conversation import Conversation

    with models.open_model(model, how) as opened:
        text = None if system is None else os.fsencode(system)
        conversation = Conversation(opened.stream(), text, format=format_of(opened), seed=sampling.seed)
        chat = _Chat(conversation, size, chosen)
        if sys.stdin.isatty():
            log.info("/help lists the commands, Ctrl-D ends")
        chat.run(_lines())
    if chat.refused and not sys.stdin.isatty():
        raise CapacityError(f"messages that did not fit and have no answer: {chat.refused:,}")
