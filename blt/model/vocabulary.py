"""Text as tokens: a byte-level BPE vocabulary, trained on the data, and a split's documents in its tokens.

The baseline that BLT is compared with reads the same bytes in other units. Token t of the tokenizer is id 4 + t, behind
the special ids that bytes have, too. Every token stands for known bytes (GPT-2's alphabet of 256 characters), and the
tokens of a document are those bytes again, whatever they are: what is UTF-8 goes through the tokenizer, a byte that is
not becomes the token of that byte. The library `tokenizers` does the work (extra `bpe`).

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
from numpy.typing import NDArray

from blt_runtime.errors import BltError, CheckpointError, ConfigError, InputError, MissingExtra
from blt_runtime.ids import OFFSET

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = NDArray[np.int64]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Where tokens may not cross: Llama 3's pattern (words behind a space, three digits, marks, white space)."""
PIECE = 1 << 20  # characters that the tokenizer gets at once: a longer document is cut there
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")


def alphabet() -> dict[str, int]:
    """Character to byte as in GPT-2's vocabulary: printable bytes are themselves, the others come from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Vocabulary:
    """A byte-level BPE tokenizer. `text` is its whole description, `key` the sha256 of that."""

    def __init__(self, text: str, where: str = "the tokenizer"):
        """Raises ConfigError unless `text` is the JSON of a tokenizer whose tokens stand for bytes."""
        self.text, self._where = text, where
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self._tokenizer = _open(text, where)
        ordered = sorted(self._tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        if [number for _, number in ordered] != list(range(len(ordered))):
            raise ConfigError(f"{where}: its token numbers have gaps; give a vocabulary without them")
        self._bytes = self._bytes_of([name for name, _ in ordered])
        self._id_of_byte = self._bytes_alone()

    @property
    def size(self) -> int:
        """Ids, the special ones included."""
        return OFFSET + len(self._bytes)

    @cached_property
    def token_bytes(self) -> Ids:
        """Bytes that each id stands for, int64 [V]; special ids none."""
        return np.array([0] * OFFSET + [len(token) for token in self._bytes], np.int64)

    def encode(self, text: bytes) -> Ids:
        """Ids of a text, without BOS and EOS. Raises InputError if they would not be this text again."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[bytes]) -> list[Ids]:
        """`encode` of many texts at once, which uses all cores."""
        parts = [list(_parts(text)) for text in texts]
        strings = [part for found in parts for part in found if isinstance(part, str)]
        encoded = iter(self._tokenizer.encode_batch_fast(strings, add_special_tokens=False))
        ids = []
        for text, found in zip(texts, parts, strict=True):
            pieces = [self._id_of_byte[part] if isinstance(part, np.ndarray) else next(encoded).ids for part in found]
            ids.append(np.concatenate([np.empty(0, np.int64), *(np.asarray(p, np.int64) for p in pieces)]) + OFFSET)
            if int(self.token_bytes[ids[-1]].sum()) != len(text):
                raise InputError(f"{self._where} does not keep every byte of the text; give a plain byte-level one")
        return ids

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; special ids vanish. Raises ValueError for an id that is none."""
        numbers = [int(number) for number in ids]
        if any(not 0 <= number < self.size for number in numbers):
            raise ValueError(f"ids must lie in 0..{self.size - 1}")
        return b"".join(self._bytes[number - OFFSET] for number in numbers if number >= OFFSET)

    def _bytes_of(self, names: Sequence[str]) -> list[bytes]:
        """What each token stands for; an added token is the text of its name."""
        byte_of = alphabet()
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        unknown = [name for name in names if name not in added and not set(name) <= byte_of.keys()]
        if unknown:
            raise ConfigError(f"{self._where}: {unknown[0]!r} is no token of a byte-level BPE vocabulary")
        return [name.encode() if name in added else bytes(byte_of[char] for char in name) for name in names]

    def _bytes_alone(self) -> Ids:
        """The tokenizer's number of each of the 256 bytes."""
        numbers = {token: number for number, token in enumerate(self._bytes) if len(token) == 1}
        if len(numbers) != 256:
            raise ConfigError(f"{self._where} has no token for {256 - len(numbers)} of the bytes; it must have all 256")
        return np.array([numbers[bytes([byte])] for byte in range(256)], np.int64)


def _parts(text: bytes) -> Iterator[str | Ids]:
    """UTF-8 as strings, and runs of other bytes as their values, in order."""
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
    except BltError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"{where} is not the tokenizer.json of `tokenizers` ({error})") from None
    if not isinstance(tokenizer.model, _library().models.BPE) or tokenizer.normalizer is not None:
        raise ConfigError(f"{where} is no byte-level BPE vocabulary without a normaliser; give one of that kind")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|end|>" in a text is text
    return tokenizer


def read_vocabulary(path: str | Path) -> Vocabulary:
    """A `tokenizer.json`. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); name a tokenizer.json") from None
    return Vocabulary(text, str(path))


def train_vocabulary(texts: Iterable[bytes], size: int) -> Vocabulary:
    """A vocabulary of `size` ids or fewer (where the texts have no more pairs), the same for the same texts."""
    lib = _library()
    tokenizer = lib.Tokenizer(lib.models.BPE())
    split = lib.pre_tokenizers.Split(lib.Regex(SPLIT), "isolated")
    as_bytes = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = lib.pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=size - OFFSET, initial_alphabet=sorted(alphabet()), special_tokens=[], show_progress=False
    )
    strings = (part for text in texts for part in _parts(text) if isinstance(part, str))
    tokenizer.train_from_iterator(strings, trainer)
    return Vocabulary(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False))


def checked(text: str, where: Path) -> Vocabulary:
    """The vocabulary inside a checkpoint. Raises CheckpointError."""
    try:
        return Vocabulary(text, f"the tokenizer in {where}")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
