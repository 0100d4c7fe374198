"""The JSON of answers: completions and chat completions, whole or in chunks, with logprobs and patches."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from ..ids import BYTES
from ..requests import Token
from .parts import Choice, Offsets, Part, joined
from .prompts import token_text

Json = dict[str, Any]


class Answer:
    """Writes one response. Subclasses know the two interfaces.

    logprobs: the number of most likely tokens that are listed; None leaves logprobs out. patches: of each byte.
    """

    prefix = object = chunk_object = ""

    def __init__(self, model: str, *, logprobs: int | None, patches: bool) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created, self.model = int(time.time()), model
        self.logprobs, self.patches = logprobs, patches

    def whole(self, choices: Sequence[tuple[Choice, Sequence[Part]]], usage: Json) -> Json:
        """The response that is not streamed."""
        listed = [self._choice(choice, parts) for choice, parts in choices]
        return {**self._head(self.object), "choices": listed, "usage": usage}

    def chunk(self, choice: Choice, part: Part, finish: str | None = None) -> Json:
        """An event of a stream. finish: of the last one of a choice."""
        found: Json = {"index": choice.index, **self._delta(part, finish), "finish_reason": finish}
        found["logprobs"] = self._logprobs(choice, part.tokens) if part.tokens else None
        return {**self._head(self.chunk_object), "choices": [found | self._patches([part])]}

    def first(self, choice: Choice) -> Json | None:
        """The event that opens a choice, if there is one."""
        return None

    def last(self, usage: Json) -> Json:
        """The event with the usage alone."""
        return {**self._head(self.chunk_object), "choices": [], "usage": usage}

    def _head(self, object: str) -> Json:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model}

    def _choice(self, choice: Choice, parts: Sequence[Part]) -> Json:
        part = joined(parts)
        found: Json = {"index": choice.index, **self._message(part.text), "finish_reason": choice.finish_reason}
        found["logprobs"] = None if self.logprobs is None else self._logprobs(choice, part.tokens)
        return found | self._patches(parts)

    def _patches(self, parts: Iterable[Part]) -> Json:
        if not self.patches:
            return {}
        made = [t for part in parts if not part.prompt for t in part.tokens if t.id is not None and BYTES[t.id]]
        return {
            "patches": {
                "bytes": [BYTES[t.id or 0][0] for t in made],
                "entropies": [None if math.isnan(t.entropy) else t.entropy for t in made],
                "starts": [t.starts_patch for t in made],
            }
        }

    def _message(self, text: str) -> Json:
        raise NotImplementedError

    def _delta(self, part: Part, finish: str | None) -> Json:
        raise NotImplementedError

    def _logprobs(self, choice: Choice, tokens: Sequence[Token]) -> Json | None:
        raise NotImplementedError


class CompletionAnswer(Answer):
    """/v1/completions. `text_offset` goes on from chunk to chunk."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, *, logprobs: int | None, patches: bool) -> None:
        super().__init__(model, logprobs=logprobs, patches=patches)
        self._offsets: dict[int, Offsets] = {}

    def _message(self, text: str) -> Json:
        return {"text": text}

    def _delta(self, part: Part, finish: str | None) -> Json:
        return {"text": part.text}

    def _logprobs(self, choice: Choice, tokens: Sequence[Token]) -> Json | None:
        if self.logprobs is None:
            return None
        if (offsets := self._offsets.get(choice.index)) is None:
            start = 0 if choice.echo else len(choice.prompt.data.decode(errors="replace"))
            offsets = self._offsets[choice.index] = Offsets(start)
        ids = [token.id or 0 for token in tokens]
        return {
            "tokens": [token_text(id) for id in ids],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": [offsets.of(id) for id in ids],
            "bytes": [_bytes(id) for id in ids],
        }


class ChatAnswer(Answer):
    """/v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, choice: Choice) -> Json | None:
        found = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return {**self._head(self.chunk_object), "choices": [{**found, "logprobs": None}]}

    def _message(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, part: Part, finish: str | None) -> Json:
        return {"delta": {"content": part.text} if part.text or finish is None else {}}

    def _logprobs(self, choice: Choice, tokens: Sequence[Token]) -> Json | None:
        if self.logprobs is None:
            return None
        return {"content": [_entry(token) for token in tokens], "refusal": None}


def _entry(token: Token) -> Json:
    """One token of a chat: itself, and the most likely ones."""
    assert token.id is not None
    top = [{"token": token_text(id), "logprob": p, "bytes": _bytes(id)} for id, p in _listed(token)]
    return {"token": token_text(token.id), "logprob": token.logprob, "bytes": _bytes(token.id), "top_logprobs": top}


def _top(token: Token) -> dict[str, float] | None:
    """None for the first id of a text, which nothing predicts."""
    return None if token.logprob is None else {token_text(id): p for id, p in _listed(token)}


def _listed(token: Token) -> list[tuple[int, float]]:
    """The most likely ids with their logprobs, and the token's own."""
    assert token.id is not None
    assert token.logprob is not None
    top = list(token.top)
    return top if token.id in dict(top) else [*top, (token.id, token.logprob)]


def _bytes(id: int) -> list[int] | None:
    return list(BYTES[id]) or None


def usage(prompts: Iterable[int], choices: Iterable[Choice], cached: int | None = None) -> Json:
    """Tokens, which are bytes. prompts: the length of each prompt as sent. cached: of them, read from the prefix
    cache; None without one."""
    asked, made = sum(prompts), sum(choice.generated for choice in choices)
    found: Json = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
    return found if cached is None else {**found, "prompt_tokens_details": {"cached_tokens": cached}}
