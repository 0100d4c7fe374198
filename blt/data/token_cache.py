"""The documents of a split in the tokens of a vocabulary, computed once and cached next to the data.

`TOKENS/{split}-{data}-{vocabulary}.ids` holds BOS, tokens, EOS of all documents in order, as integers of 16 or 32 bits;
`.offsets.npy` holds the offset of each document, `.prompts.npy` the number of tokens in its prompt. The ids file is
renamed last, so that all files are complete if it exists. Vocabularies trained on the data are in the same folder,
keyed by the data and their size.

Letters: V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from blt.data.cache_files import create_file, draft_path, writable_folder
from blt.data.dataset import Dataset, Documents
from blt.data.quantities import amount, duration
from blt.files import replace_text
from blt.model.vocabulary import Vocabulary, read_vocabulary, train_vocabulary
from blt_runtime import reading
from blt_runtime.errors import ConfigError, InputError
from blt_runtime.ids import BOS, EOS

Ids = NDArray[np.int64]
TOKENS = "tokens"
TRAINED = 1
"""Version of the training of vocabularies: raised when the same data and size give another vocabulary."""
GROUP_BYTES = 4 << 20
"""Bytes of text encoded at a time."""
log = logging.getLogger("blt.data")


class TokenDocuments:
    """Documents as a `TokenSource`: `lengths` [documents] without BOS and EOS, `token_bytes` [V]."""

    def __init__(self, ids: NDArray[np.int16] | NDArray[np.int32], offsets: Ids, prompts: Ids, vocabulary: Vocabulary):
        self._ids, self._offsets = ids, offsets
        self.lengths: Ids = np.diff(offsets) - 2
        self.prompt_lengths = prompts
        self.vocabulary = vocabulary
        self.token_bytes = vocabulary.token_bytes

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, index: int) -> NDArray[np.int16] | NDArray[np.int32]:
        """BOS, tokens, EOS of a document, int16 (int32 for more than 32,767 ids) [length + 2]."""
        return self._ids[self._offsets[index] : self._offsets[index + 1]]

    def read(self, documents: Ids, begin: Ids, end: Ids) -> NDArray[Any]:
        """`ids(document)[begin:end]` of each of these documents, one after another."""
        offsets = self._offsets[documents]
        pieces = zip((offsets + begin).tolist(), (offsets + end).tolist(), strict=True)
        return np.concatenate([self._ids[:0], *(self._ids[first:last] for first, last in pieces)])


def tokenised(dataset: Dataset, split: str, vocabulary: Vocabulary) -> TokenDocuments:
    """A split's documents in tokens, from the cache if it has them.

    Raises InputError for a damaged cache, and if it cannot be written.
    """
    documents = dataset.split(split)
    stem = _folder(dataset) / f"{split}-{_data_key(documents)}-{vocabulary.key[:24]}"
    files = [Path(f"{stem}{end}") for end in (".ids", ".prompts.npy", ".offsets.npy")]
    dtype: np.dtype[Any] = np.dtype(np.int16 if vocabulary.size <= np.iinfo(np.int16).max else np.int32)
    if files[0].exists():
        log.info("tokens of %s: read from %s", split, files[0].parent)
    else:
        create_file(
            files[0], lambda out: _write(out, documents, split=split, vocabulary=vocabulary, files=files, dtype=dtype)
        )
    try:
        offsets, prompts = (reading.read_array(file) for file in (files[2], files[1]))
        reading.check_plain(files[0])
        ids: NDArray[Any] = np.asarray(np.memmap(files[0], dtype, mode="r")) if offsets[-1] else np.empty(0, dtype)
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{stem}.* is damaged ({error}); delete it and run again") from None
    if len(offsets) != len(documents) + 1 or len(prompts) != len(documents) or offsets[-1] != len(ids):
        raise InputError(f"{stem}.* does not fit the data; delete it and run again")
    return TokenDocuments(ids, offsets, prompts, vocabulary)


def _write(
    out: BinaryIO, documents: Documents, *, split: str, vocabulary: Vocabulary, files: list[Path], dtype: np.dtype[Any]
) -> None:
    """Writes the ids to `out`, and the two arrays to their files."""
    lengths, prompts, began = [0], [], time.monotonic()
    for members in _groups(documents):
        for ids, prompt in _encode(documents, members, vocabulary):
            out.write(np.concatenate([[BOS], ids, [EOS]]).astype(dtype).tobytes())
            lengths.append(len(ids) + 2)
            prompts.append(prompt)
        _log_progress(documents, split, members[-1], began)
    arrays = (np.array(prompts, np.int64), np.cumsum(np.array(lengths, np.int64)))
    for file, array in zip(files[1:], arrays, strict=True):
        draft = draft_path(file)
        try:
            with draft.open("wb") as opened:
                np.save(opened, array)
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)


def _encode(documents: Documents, members: list[int], vocabulary: Vocabulary) -> Iterator[tuple[Ids, int]]:
    """Each document's tokens and the number of them in its prompt; no token crosses the end of a prompt."""
    texts = []
    for index in members:
        text, n = documents.bytes(index), int(documents.prompt_lengths[index])
        texts += [text[:n], text[n:]]
    encoded = vocabulary.encode_all(texts)
    for prompt, rest in zip(encoded[::2], encoded[1::2], strict=True):
        yield np.concatenate([prompt, rest]), len(prompt)


def _groups(documents: Documents) -> Iterator[list[int]]:
    """Consecutive documents in groups of about GROUP_BYTES."""
    members: list[int] = []
    size = 0
    for index, length in enumerate(documents.lengths):
        members.append(index)
        size += int(length)
        if size >= GROUP_BYTES:
            yield members
            members, size = [], 0
    if members:
        yield members


def _log_progress(documents: Documents, split: str, last: int, began: float) -> None:
    done = int(documents.lengths[: last + 1].sum())
    rate = done / max(time.monotonic() - began, 1e-9)
    log.info("tokens of %s: %s of %s, %s/s", split, amount(done), amount(documents.n_bytes), amount(rate))


def vocabulary_for(
    dataset: Dataset, members: Ids, *, size: int, train_bytes: int, path: str | None = None
) -> Vocabulary:
    """The vocabulary of a run: that of the `tokenizer.json` at `path`, or one trained on the data and cached there.

    It is trained on about `train_bytes` of the training documents `members`, a sample over all of them. Raises
    ConfigError if the vocabulary at `path` has more than `size` ids, and InputError if none can be written.
    """
    if path is not None:
        found = read_vocabulary(path)
        if found.size > size:
            raise ConfigError(f"{path} has {found.size} ids, special ones included; set tokenizer.vocab_size to that")
        return found
    documents = dataset.split("train")
    what = f"{TRAINED} {_data_key(documents)} {size} {train_bytes} {hashlib.sha256(members.tobytes()).hexdigest()}"
    file = _folder(dataset) / f"tokenizer-{size}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
    create_file(file, lambda out: _train(out, _sample(documents, members, train_bytes), size))
    return read_vocabulary(file)


def _train(out: BinaryIO, texts: Iterator[bytes], size: int) -> None:
    began = time.monotonic()
    vocabulary = train_vocabulary(texts, size)
    log.info("vocabulary of %s ids in %s", f"{vocabulary.size:,}", duration(time.monotonic() - began))
    if vocabulary.size < size:
        log.warning(
            "the text has only %d tokens; %d of the vocabulary stay unused", vocabulary.size, size - vocabulary.size
        )
    out.write(vocabulary.text.encode())


def save_vocabulary(vocabulary: Vocabulary, file: Path) -> None:
    """Writes a vocabulary file, whole or not at all. Raises InputError if it cannot be written."""
    with writable_folder(file.parent):
        replace_text(file, vocabulary.text)


def _sample(documents: Documents, members: Ids, n_bytes: int) -> Iterator[bytes]:
    """Documents in a seeded order until they have `n_bytes`."""
    total = 0
    for index in np.random.default_rng(0).permutation(members):
        if total >= n_bytes:
            return
        total += int(documents.lengths[index])
        yield documents.bytes(int(index))


def _folder(dataset: Dataset) -> Path:
    return dataset.folder / TOKENS


def _data_key(documents: Documents) -> str:
    return hashlib.sha256("".join(documents.sha256).encode()).hexdigest()[:8]
