"""From the bytes and tokens of one choice to parts of its answer: whole characters, each with its tokens."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from ..ids import BYTES
from ..requests import Request, Token
from .metrics import Watch
from .prompts import Prompt


@dataclass(frozen=True)
class Part:
    """text: whole characters. tokens: those of exactly this text, and special ids among them, if the request has
    tokens. prompt: whether it is of an echoed prompt."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    prompt: bool = False

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


class Assembler:
    """Joins bytes to characters. A token is returned with the character that its byte ends or belongs to; the tokens of
    a stop string, whose bytes are never released, are not returned."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held: deque[tuple[int, Token]] = deque()
        self._made = self._released = 0

    def feed(self, piece: bytes, token: Token | None = None) -> Part:
        """The characters that are complete after `piece`. token: the one that was made, if tokens are reported."""
        if token is None:
            self._made += len(piece)
        elif token.id is not None:
            self._made += len(BYTES[token.id])
            self._held.append((self._made, token))
        self._released += len(piece)
        text = self._decoder.decode(piece)
        return Part(text, self._complete(self._released - len(self._decoder.getstate()[0])))

    def flush(self) -> Part:
        """The rest at the end: an incomplete character becomes U+FFFD."""
        return Part(self._decoder.decode(b"", final=True), self._complete(self._released))

    def _complete(self, length: int) -> tuple[Token, ...]:
        """The tokens of the first `length` bytes that were not returned yet."""
        found = []
        while self._held and self._held[0][0] <= length:
            found.append(self._held.popleft()[1])
        return tuple(found)


class Offsets:
    """Where each token begins, in characters. start: of the first one."""

    def __init__(self, start: int = 0) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters = start

    def of(self, id: int) -> int:
        """The index of the character that the next token belongs to; a special id is before the next character."""
        self._characters += len(self._decoder.decode(BYTES[id]))
        complete = bool(BYTES[id]) and not self._decoder.getstate()[0]
        return self._characters - (1 if complete else 0)


@dataclass
class Choice:
    """One of a response's choices, as it is generated.

    request: None if nothing is computed (an echo alone). scored: the echoed prompt has logprobs.
    """

    index: int
    prompt: Prompt
    request: Request | None
    echo: bool = False
    tokens: bool = False
    scored: bool = False
    watch: Watch | None = None

    @property
    def finish_reason(self) -> str:
        finish = "length" if self.request is None else self.request.finish
        return "stop" if finish == "eos" else str(finish)

    @property
    def generated(self) -> int:
        return 0 if self.request is None else self.request.generated

    def cancel(self) -> None:
        """Frees the row within a round."""
        if self.request is not None:
            self.request.cancel()

    def close(self) -> None:
        """Ends it, whether it was read to its end or not, and counts it in the metrics."""
        self.cancel()
        if self.watch is not None:
            done = self.finish_reason in ("stop", "length")
            reason = self.finish_reason if done else "error" if self.finish_reason == "error" else "abort"
            self.watch.end(reason, self.generated, None if self.request is None else self.request.waited)
            self.watch = None

    async def parts(self) -> AsyncIterator[Part]:
        """The answer's parts, none of them empty. Raises the BltError that ended the request."""
        assembler, echo = Assembler(), self.echo
        async for item in self._items():
            if echo:
                echo = False
                if part := self._echoed(assembler):
                    yield part
            if self.watch is not None:
                self.watch.piece()
            token = item if isinstance(item, Token) else None
            if part := assembler.feed(item.piece if isinstance(item, Token) else item, token):
                yield part
        if echo and (part := self._echoed(assembler)):
            yield part
        if part := assembler.flush():
            yield part

    async def _items(self) -> AsyncIterator[Token | bytes]:
        if self.request is None:
            return
        if self.tokens:
            async for token in self.request.tokens():
                yield token
        else:
            async for piece in self.request:
                yield piece

    def _echoed(self, assembler: Assembler) -> Part:
        if not self.scored:
            return Part(assembler.feed(self.prompt.data).text, prompt=True)
        assert self.request is not None
        assert self.request.prompt is not None
        scored = self.request.prompt[len(self.prompt.ids) - len(self.prompt.sent) :]
        return joined([assembler.feed(BYTES[token.id or 0], token) for token in scored], prompt=True)


def joined(parts: Iterable[Part], prompt: bool = False) -> Part:
    """Several parts as one."""
    found: Sequence[Part] = list(parts)
    return Part("".join(part.text for part in found), tuple(t for part in found for t in part.tokens), prompt)
