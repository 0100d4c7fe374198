"""Prompts of requests as ids. BOS is put in front unless the ids bring it; ids as sent are what is counted."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

import numpy as np

from ..errors import InputError, UsageError, shown
from ..ids import BOS, VOCAB, Ids, checked_ids, decode, encode
from .errors import RequestError

MOST_PROMPTS = 1024
SPECIALS = ("<|boe|>", "<|bos|>", "<|eos|>", "<|bpe|>")
"""How the ids 0 to 3 are written."""


@dataclass(frozen=True)
class Prompt:
    """sent: the ids of the request [N], possibly none."""

    sent: Ids

    @classmethod
    def of(cls, text: str | bytes) -> Prompt:
        return cls(encode(text, bos=False))

    @property
    def ids(self) -> Ids:
        """What the model reads [N] or [N + 1]: `sent`, after BOS."""
        return self.sent if self.has_bos else np.concatenate([[BOS], self.sent]).astype(np.int64)

    @property
    def has_bos(self) -> bool:
        return len(self.sent) > 0 and int(self.sent[0]) == BOS

    @property
    def data(self) -> bytes:
        """The bytes of the prompt."""
        return decode(self.sent)


def prompts_of(prompt: object, prompt_base64: object) -> list[Prompt]:
    """The prompts of a request's two fields, of which one is set. Raises RequestError."""
    if (prompt is None) == (prompt_base64 is None):
        which = "is missing" if prompt is None else "and prompt_base64 are both there: leave out one"
        raise RequestError(f"prompt {which}", param="prompt")
    if prompt_base64 is not None:
        return [_decoded(text) for text in _several(prompt_base64, "prompt_base64")]
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], str | list):
        return [_of_ids(prompt)]
    return [Prompt.of(each) if isinstance(each, str) else _of_ids(each) for each in _several(prompt, "prompt")]


def _several(value: object, param: str) -> list[object]:
    found = value if isinstance(value, list) else [value]
    if not 1 <= len(found) <= MOST_PROMPTS:
        raise RequestError(f"{param} must hold 1 to {MOST_PROMPTS:,} prompts, not {len(found):,}", param=param)
    return found


def _of_ids(value: object) -> Prompt:
    if not isinstance(value, list):
        raise RequestError(f"prompt must be text, ids, or a list of either, not {shown(value)}", param="prompt")
    return Prompt(ids_of(value, "prompt"))


def ids_of(value: object, param: str) -> Ids:
    """A list of ids as an array. Raises RequestError."""
    if not isinstance(value, list):
        raise RequestError(f"{param} must be a list of ids, not {shown(value)}", param=param)
    try:
        return checked_ids(value or np.zeros(0, dtype=np.int64), VOCAB)
    except (UsageError, InputError) as error:
        raise RequestError(f"{param}: {error}", param=param) from error


def _decoded(text: object) -> Prompt:
    if not isinstance(text, str):
        raise RequestError(f"prompt_base64 must be text, not {shown(text)}", param="prompt_base64")
    try:
        return Prompt.of(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"prompt_base64 is not base64: {error}", param="prompt_base64") from error


def token_text(id: int) -> str:
    """How an id is written where JSON wants text: an ASCII character, `bytes:\\xc3` for any other byte, `<|eos|>`."""
    if id < len(SPECIALS):
        return SPECIALS[id]
    byte = id - len(SPECIALS)
    return chr(byte) if byte < 0x80 else f"bytes:\\x{byte:02x}"
