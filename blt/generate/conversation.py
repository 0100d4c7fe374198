"""A conversation in one stream: each message and its answer are appended to what the stream holds.

Where a chat template writes earlier messages differently than before, the stream is rewound to the first difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from blt.generate.chat_format import PLAIN, ChatFormat
from blt_runtime import GenerateOptions, Stream
from blt_runtime.chat import Message
from blt_runtime.engine.prefill import Cancel
from blt_runtime.errors import Cancelled, CapacityError, UsageError
from blt_runtime.ids import BYTES, EOS, OFFSET, decode, shared_length, to_bytes
from blt_runtime.text import StopMatcher, listed_stops

Finish = Literal["eos", "stop", "length", "full"]


@dataclass
class Exchange:
    """A message and its answer so far.

    start: tokens of the stream before the text that this exchange added. begun: tokens when the answer began.
    finish: why the answer ended. "full": the model's capacity. None: it is being written, or its reader left it.
    """

    message: bytes
    start: int
    begun: int
    answer: bytes = b""
    finish: Finish | None = None


class Conversation:
    """Messages and answers, and the stream that holds their text.

    stream: a new one. system: the text of a first message with that role. format: how messages become text. seed: makes
    the draws repeatable. The draws of an answer depend on the seed and on the number of exchanges before it.

    Example:
        conversation = Conversation(model.stream(), "Be brief.")
        for piece in conversation.ask("What is a byte?", 200):
            sys.stdout.buffer.write(piece)
        conversation.rewind()

    Raises CapacityError if no message fits after the system message, and InputError where the template refuses it.
    """

    def __init__(
        self,
        stream: Stream,
        system: str | bytes | None = None,
        *,
        format: ChatFormat = PLAIN,
        seed: int | None = None,
    ) -> None:
        self.exchanges: list[Exchange] = []
        self._stream, self._format, self._seed = stream, format, seed
        self._system = [] if system is None else [Message("system", system)]
        self._origin = stream.position
        if system is not None:
            self._check_room(len(format.render([*self._system, Message("user", b"?")])), "the system message")

    @property
    def messages(self) -> list[Message]:
        """The messages of all roles, the answer that is being written included."""
        said = [
            message
            for exchange in self.exchanges
            for message in (Message("user", exchange.message), Message("assistant", exchange.answer))
        ]
        return [*self._system, *said]

    @property
    def capacity(self) -> int:
        """Bytes of text that the conversation can have, its roles included."""
        return self._stream.spec.capacity_bytes - self._origin

    def ask(
        self,
        message: str | bytes,
        n: int,
        *,
        options: GenerateOptions | None = None,
        cancelled: Cancel | None = None,
    ) -> Iterator[bytes]:
        """Appends a message, and returns its answer of at most `n` bytes: the bytes of each token as it is generated,
        b"" while bytes are held back because they may begin a stop string.

        The answer also ends where the model would begin the next message, and at a special id. It may be left at any
        byte: what was yielded is the answer then.
        options: of generation; their seed is not used. cancelled: called while the message is read; see
        `Stream.append_ids`.
        Raises CapacityError if the message and one byte of an answer do not fit, InputError where the template refuses
        it, and Cancelled. The conversation has not changed then.
        """
        self._settle()
        text, held = self._format.render([*self.messages, Message("user", message)]), self._text()
        kept = shared_length(*(np.frombuffer(some, np.uint8) for some in (text, held)))
        self._check_room(len(text) - len(held), "the message")
        self._stream.rewind(len(held) - kept)
        start = self._stream.position
        try:
            self._stream.append(text[kept:], cancelled)
        except (CapacityError, Cancelled) as error:
            self._stream.append(held[kept:])
            if isinstance(error, Cancelled):
                raise
            raise CapacityError(f"the message does not fit: {error}") from error
        self.exchanges.append(Exchange(to_bytes(message), start, self._stream.position))
        options = options or GenerateOptions()
        matcher = StopMatcher([*self._format.stops, *listed_stops(options.stop)])
        return self._answer(self.exchanges[-1], self._ids(n, options), matcher)

    def rewind(self) -> Exchange:
        """Removes the last message and its answer. The stream is that of a conversation without them.

        Raises UsageError if there is none.
        """
        if not self.exchanges:
            raise UsageError("there is no exchange to take back")
        self._stream.rewind(self._stream.position - self.exchanges[-1].start)
        return self.exchanges.pop()

    def reset(self) -> None:
        """Forgets all messages but the system message."""
        self._stream.reset()
        self.exchanges.clear()

    def _check_room(self, needed: int, what: str) -> None:
        """Raises CapacityError unless `needed` bytes and one byte of an answer fit."""
        left = self._stream.spec.capacity_bytes - self._stream.position
        if needed + 1 > left:
            raise CapacityError(
                f"{what} does not fit: it needs {needed:,} bytes and one for an answer, and {left:,} of "
                f"the model's {self.capacity:,} are left"
            )

    def _settle(self) -> None:
        """Removes tokens after the last answer from the stream: a stop string, a special id, bytes held back."""
        if self.exchanges:
            last = self.exchanges[-1]
            self._stream.rewind(max(0, self._stream.position - last.begun - len(last.answer)))

    def _text(self) -> bytes:
        """What the stream holds."""
        return decode(self._stream.ids[self._origin :])

    def _answer(self, exchange: Exchange, ids: Iterator[int], matcher: StopMatcher) -> Iterator[bytes]:
        finish: Finish | None = None
        try:
            for id in ids:
                if id < OFFSET:
                    finish = "eos"
                    break
                exchange.answer += (piece := matcher.feed(BYTES[id]))
                yield piece
                if matcher.stopped:
                    finish = "stop"
                    break
        except CapacityError:
            finish = "full"
        if rest := matcher.flush():
            exchange.answer += rest
            yield rest
        exchange.finish = finish or "length"
        self._settle()

    def _ids(self, n: int, options: GenerateOptions) -> Iterator[int]:
        """Up to `n` ids, and EOS if the text ends before."""
        place = len(self.exchanges) - 1
        random = None if self._seed is None else np.random.default_rng([self._seed, place])
        sampler = replace(options, seed=None).sampler(random)
        done = 0
        for id in self._stream.generate_ids(n, sampler=sampler, options=replace(options, stop=None, grammar=None)):
            done += 1
            yield id
        if done < n:
            yield EOS
