"""Text as tokens: a byte-level BPE vocabulary, trained on text or read from a file.

The token-level baseline reads the same bytes as a BLT, in other units. Token t of the tokenizer is id 4 + t, after the
four special ids that bytes have, too. Every token has known bytes (in GPT-2's alphabet of 256 characters), and the
tokens of a document always have exactly the bytes of the document: the tokenizer encodes what is UTF-8, and every other
byte becomes the token of that byte. The library `tokenizers` does the work (extra `bpe`).

Letters: V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blt_runtime import reading
from blt_runtime.errors import BltError, ConfigError, InputError, MissingExtra, shown
from blt_runtime.ids import OFFSET, Ids
from blt_runtime.reading import reason

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Tokens do not cross the matches of this pattern, which is Llama 3's: words with the space before them, up to three
digits, punctuation, white space."""
LARGEST = 64 << 20  # bytes of a tokenizer.json; that of 262,144 tokens has 33 MB
PIECE = 1 << 20  # characters per call of the tokenizer; longer text is split
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")


def alphabet() -> dict[str, int]:
    """GPT-2's map of characters to bytes: printable bytes are themselves, the others are characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Vocabulary:
    """A byte-level BPE tokenizer. `text` is its complete JSON description, `key` the sha256 of `text`."""

    def __init__(self, text: str, where: str = "the tokenizer"):
        """Raises ConfigError unless `text` is the JSON of a tokenizer whose tokens are sequences of bytes."""
        self.text, self._where = text, where
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self._tokenizer = _open(text, where)
        ordered = sorted(self._tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        if [number for _, number in ordered] != list(range(len(ordered))):
            raise ConfigError(f"{where}: its token numbers have gaps; give a vocabulary without them")
        self._bytes = self._bytes_of([name for name, _ in ordered])
        self._number_of_byte = self._single_bytes()

    @property
    def size(self) -> int:
        """Number of ids, the special ones included."""
        return OFFSET + len(self._bytes)

    @cached_property
    def token_bytes(self) -> Ids:
        """Number of bytes of each id, int64 [V]; 0 for special ids."""
        return np.array([0] * OFFSET + [len(token) for token in self._bytes], np.int64)

    def encode(self, text: bytes) -> Ids:
        """Ids of a text, without BOS and EOS. Raises InputError if they do not decode to this text."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[bytes]) -> list[Ids]:
        """`encode` for many texts in one call, which uses all cores."""
        split = [list(_segments(text)) for text in texts]
        strings = [segment for segments in split for segment in segments if isinstance(segment, str)]
        encoded = iter(self._tokenizer.encode_batch_fast(strings, add_special_tokens=False))
        ids = []
        for text, segments in zip(texts, split, strict=True):
            pieces = [next(encoded).ids if isinstance(s, str) else self._number_of_byte[s] for s in segments]
            ids.append(np.concatenate([np.empty(0, np.int64), *(np.asarray(p, np.int64) for p in pieces)]) + OFFSET)
            if int(self.token_bytes[ids[-1]].sum()) != len(text):
                raise InputError(f"{self._where} does not preserve every byte of the text; give a plain byte-level one")
        return ids

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; special ids have none. Raises ValueError for an unknown id."""
        numbers = [int(number) for number in ids]
        if any(not 0 <= number < self.size for number in numbers):
            raise ValueError(f"ids must be in 0..{self.size - 1}")
        return b"".join(self._bytes[number - OFFSET] for number in numbers if number >= OFFSET)

    def _bytes_of(self, names: Sequence[str]) -> list[bytes]:
        """The bytes of each token; those of an added token are its name in UTF-8."""
        byte_of = alphabet()
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        unknown = [name for name in names if name not in added and not set(name) <= byte_of.keys()]
        if unknown:
            raise ConfigError(f"{self._where}: {shown(unknown[0])} is not a token of a byte-level BPE vocabulary")
        return [name.encode() if name in added else bytes(byte_of[char] for char in name) for name in names]

    def _single_bytes(self) -> Ids:
        """The tokenizer's number of each of the 256 bytes."""
        numbers = {token: number for number, token in enumerate(self._bytes) if len(token) == 1}
        if len(numbers) != 256:
            raise ConfigError(f"{self._where} has no token for {256 - len(numbers)} of the bytes; it must have all 256")
        return np.array([numbers[bytes([byte])] for byte in range(256)], np.int64)


def _segments(text: bytes) -> Iterator[str | Ids]:
    """The UTF-8 parts of a text as strings, and runs of other bytes as their values, in order."""
    for i, part in enumerate(_NOT_UTF8.split(text.decode("utf-8", errors="surrogateescape"))):
        if i % 2:
            yield np.array([ord(char) - 0xDC00 for char in part], np.int64)
        else:
            yield from (part[at : at + PIECE] for at in range(0, len(part), PIECE))


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("BPE vocabularies need the library tokenizers", "bpe") from None
    return tokenizers


def _open(text: str, where: str) -> Tokenizer:
    try:
        tokenizer: Tokenizer = _library().Tokenizer.from_str(text)
    except (BltError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions; a panic of Rust is not even one
        why = shown(str(error), 200)
        raise ConfigError(f"{where} is not a tokenizer.json of the library `tokenizers` ({why})") from None
    if not isinstance(tokenizer.model, _library().models.BPE) or tokenizer.normalizer is not None:
        raise ConfigError(f"{where} is not a byte-level BPE vocabulary without a normaliser; give one of that kind")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|end|>" in a text is ordinary text
    return tokenizer


def read_vocabulary(path: str | Path) -> Vocabulary:
    """The vocabulary in a `tokenizer.json`. Raises ConfigError."""
    try:
        text = reading.read_text(path, LARGEST)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)}); name a tokenizer.json") from None
    return Vocabulary(text, str(path))


def train_vocabulary(texts: Iterable[bytes], size: int) -> Vocabulary:
    """A vocabulary of `size` ids, or fewer if the texts have no more pairs; equal texts give equal vocabularies."""
    lib = _library()
    tokenizer = lib.Tokenizer(lib.models.BPE())
    split = lib.pre_tokenizers.Split(lib.Regex(SPLIT), "isolated")
    as_bytes = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = lib.pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=size - OFFSET, initial_alphabet=sorted(alphabet()), special_tokens=[], show_progress=False
    )
    strings = (part for text in texts for part in _segments(text) if isinstance(part, str))
    tokenizer.train_from_iterator(strings, trainer)
    return Vocabulary(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False))
