"""Exact entropies of whole documents: all of them are one stream, evaluated in chunks of one fixed shape with a cache.

A chunk's queries attend to its own keys and to those of the `window` tokens before it, which every layer caches from
the previous chunk. So nothing is computed twice or truncated: a token's entropy is that of its document (BOS, bytes,
EOS) evaluated alone, as in generation, however long the document is. Documents follow each other without padding, and
the mask hides everything before the last EOS.

Two facts of algebra make the shapes static. Rotary embedding is relative, so every chunk counts positions from the
start of its cache, and cached keys are rotated back by one chunk. And a query attends to at most `window` keys, so
each block of queries reads a span of window + block keys, which is a view of one buffer.

A model without a window attends to at most max_seqlen tokens, the longest context that it has positions for.

The hash n-grams of a model that has them also span documents: they read the ids before a chunk, as those of a BLT's
encoder do in a stream of many documents.

Letters: C tokens of a chunk, H cached tokens before it, T = H + C, Q queries of a block, J blocks of a chunk,
S = H + Q keys of a block's span, G key/value heads, K head size, E ids before a chunk that n-grams read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blt.model import EntropyModel, entropy_of, ops
from blt.model.bfloat16 import BLOCK, BFloat16EntropyModel
from blt.model.layers import RotaryTable, Rotation, rotate
from blt.model.masks import document_ids
from blt_runtime.ids import EOS

CHUNK = {"cpu": 4096, "cuda": 16384}
"""Tokens of a chunk: rows of a matrix product, so enough of them to be bound by arithmetic."""
BLOCK_QUERIES = 128
"""A smaller block reads fewer masked keys: at a window of 512, a block of 128 reads 640 keys per query, one of 512
reads 1,024."""

Float = NDArray[np.float32]
Ids = NDArray[np.int16]


class Tokens(Protocol):
    """Documents one after another, each BOS ... EOS, read in slices; an array is a valid form."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Ids: ...


class EntropyPass(Protocol):
    """A model over a stream of tokens."""

    chunk: int

    def run(self, ids_N: Tokens, begin: int = 0, end: int | None = None) -> Iterator[Float]:
        """Yields the entropies of tokens [begin, end): the bits are those of a run over all tokens.

        begin, end: multiples of `chunk`, or the end of the stream.
        """
        ...


def make_pass(
    model: EntropyModel, length: int, reset_newlines: bool = False, compile: bool = False, bf16: bool = False
) -> EntropyPass:
    """The pass for this kind of model over about `length` tokens; `bf16` as in `ChunkedPass`."""
    if isinstance(model, BFloat16EntropyModel):
        return BFloat16Pass(model, reset_newlines)
    device = next(model.parameters()).device
    chunk = CHUNK.get(device.type, CHUNK["cuda"])
    return ChunkedPass(model, reset_newlines=reset_newlines, compile=compile, chunk=min(chunk, length), bf16=bf16)


class ChunkedPass:
    """A model over a stream of tokens, chunk by chunk.

    bf16: the layers' products are in bfloat16 by autocast; residuals, norms, logits and entropies stay float32.
    """

    def __init__(
        self,
        model: EntropyModel,
        reset_newlines: bool = False,
        compile: bool = False,
        chunk: int = 4096,
        bf16: bool = False,
    ):
        config = model.config
        self.model, self.reset_newlines, self.bf16 = model, reset_newlines, bf16
        self.device = next(model.parameters()).device
        self.window = config.window or config.max_seqlen
        self.chunk = BLOCK_QUERIES * -(-chunk // BLOCK_QUERIES)
        table = RotaryTable(self.window + self.chunk, config.head_size, config.rope_theta).to(self.device)
        self.history = model.hash_embedding.history if model.hash_embedding else 0
        self._rotation = table.at(torch.arange(self.window, self.window + self.chunk, device=self.device))
        one_chunk = table.at(torch.tensor([self.chunk], device=self.device))
        self._back = Rotation(one_chunk.cos, -one_chunk.sin)
        self._step = torch.compile(self._run_chunk, fullgraph=True, dynamic=False) if compile else self._run_chunk

    @property
    def replay(self) -> int:
        """The number of chunks before a given one that its entropies depend on: the receptive field of all layers."""
        return -(-self.model.config.n_layers * self.window // self.chunk)

    def run(self, ids_N: Tokens, begin: int = 0, end: int | None = None) -> Iterator[Float]:
        end = len(ids_N) if end is None else end
        cache = self._empty_cache()
        before_H = np.full(self.window, EOS, np.int64)  # an EOS ends a document, so no token attends to these
        for at in range(self._first(ids_N, begin), end, self.chunk):
            ids_C = ids_N[at : at + self.chunk]
            ids_T = np.zeros(self.window + self.chunk, np.int64)
            ids_T[: self.window] = before_H
            ids_T[self.window : self.window + len(ids_C)] = ids_C
            before_H = ids_T[self.chunk :]
            before_E = np.zeros(self.history, np.int64)
            known_E = ids_N[max(0, at - self.history) : at]
            before_E[self.history - len(known_E) :] = known_E
            given_T, given_E = (torch.from_numpy(ids).to(self.device) for ids in (ids_T, before_E))
            with torch.no_grad():
                entropy_C, *cache = self._step(given_T, given_E, cache)
            if at >= begin:
                yield entropy_C[: len(ids_C)].cpu().numpy()

    def _first(self, ids_N: Tokens, begin: int) -> int:
        """The chunk from which a run computes so that those from `begin` on are right: that of the document's start,
        if the receptive field reaches so far."""
        first = max(0, begin - self.replay * self.chunk)
        ends = np.flatnonzero(np.asarray(ids_N[first:begin]) == EOS)
        return first + (int(ends[-1]) + 1) // self.chunk * self.chunk if len(ends) else first

    def _empty_cache(self) -> list[Tensor]:
        config = self.model.config
        shape = (1, config.kv_heads, self.window, config.head_size)
        return [torch.zeros(shape, device=self.device) for _ in range(2 * config.n_layers)]

    def _run_chunk(self, ids_T: Tensor, before_E: Tensor, cache: list[Tensor]) -> tuple[Tensor, ...]:
        """Ids [T], the ids before the chunk that n-grams read [E], keys and values [1, G, H, K] of each layer
        -> entropies [C], the cache of the next chunk."""
        mask_JQS = self._mask(document_ids(ids_T[None], self.reset_newlines)[0])
        attends = [
            _CachedAttention(key, value, self._back, mask_JQS)
            for key, value in zip(cache[::2], cache[1::2], strict=True)
        ]
        model = self.model
        x_1CD = model.embed(torch.cat([before_E, ids_T[self.window :]])[None])[:, self.history :]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            h_1CD = model.run_layers(x_1CD, self._rotation, attends)
        logits = model.output(model.norm(h_1CD.float()))
        return entropy_of(logits)[0], *(tensor for attend in attends for tensor in (attend.key, attend.value))

    def _mask(self, document_T: Tensor) -> Tensor:
        """The keys of its span that each query may attend to: in the window, not later, same document. [J, Q, S]"""
        query_Q1 = torch.arange(BLOCK_QUERIES, device=self.device)[:, None] + self.window
        distance_QS = query_Q1 - torch.arange(self.window + BLOCK_QUERIES, device=self.device)
        near_QS = (distance_QS >= 0) & (distance_QS < self.window)
        own_JQ = document_T[self.window :].unflatten(0, (-1, BLOCK_QUERIES))
        mask_JQS: Tensor = near_QS & (own_JQ[..., None] == _spans(document_T, self.window + BLOCK_QUERIES)[:, None])
        return mask_JQS


class _CachedAttention:
    """Attention of one layer. `key` and `value` [1, G, H, K] are the cache before the chunk, then that after it."""

    def __init__(self, key: Tensor, value: Tensor, back: Rotation, mask_JQS: Tensor) -> None:
        self.key, self.value, self._back, self._mask_JQS = key, value, back, mask_JQS

    def __call__(self, q_1HCK: Tensor, k_1GCK: Tensor, v_1GCK: Tensor) -> Tensor:
        n, span = q_1HCK.shape[2], self._mask_JQS.shape[-1]
        k_1GTK = torch.cat([rotate(self.key, self._back), k_1GCK], 2)
        v_1GTK = torch.cat([self.value, v_1GCK], 2)
        self.key, self.value = k_1GTK[:, :, n:].contiguous(), v_1GTK[:, :, n:].contiguous()
        q_JHQK = q_1HCK[0].unflatten(1, (-1, BLOCK_QUERIES)).transpose(0, 1)
        k_JGSK, v_JGSK = (_spans(x[0].transpose(0, 1), span).mT for x in (k_1GTK, v_1GTK))
        out_JHQK = ops.attend_dense(q_JHQK, k_JGSK, v_JGSK, self._mask_JQS)
        return out_JHQK.transpose(0, 1).flatten(1, 2)[None]


def _spans(x_T: Tensor, span: int) -> Tensor:
    """Overlapping slices of length `span` along the first axis, one for each block of queries, [J, ..., S]: a view."""
    return x_T.unfold(0, span, BLOCK_QUERIES)


class BFloat16Pass:
    """A model in bfloat16. Its sums depend on where a document begins, so every document is a separate row.

    A document longer than max_seqlen is cut at multiples of the model's block. Before each piece, the receptive field
    of all layers is evaluated again, or half a row if that is less.
    """

    chunk = 1

    def __init__(self, model: BFloat16EntropyModel, reset_newlines: bool = False):
        config = model.config
        self.model, self.reset_newlines = model, reset_newlines
        self.row = max(2 * BLOCK, config.max_seqlen // BLOCK * BLOCK)
        field = config.n_layers * (config.window or config.max_seqlen)
        self.overlap = min(BLOCK * -(-field // BLOCK), self.row // 2 // BLOCK * BLOCK)

    def run(self, ids_N: Tokens, begin: int = 0, end: int | None = None) -> Iterator[Float]:
        last = len(ids_N) if end is None else end
        at = self._start(ids_N, begin)
        while at < last:
            start, at = at, self._end(ids_N, at)
            entropies = np.concatenate(list(self._document(ids_N[start:at])))
            yield entropies[max(0, begin - start) : max(0, last - start)]

    def _start(self, ids_N: Tokens, at: int) -> int:
        """The first token of the document that holds token `at`."""
        for end in range(at, 0, -self.row):
            first = max(0, end - self.row)
            ends = np.flatnonzero(np.asarray(ids_N[first:end]) == EOS)
            if len(ends):
                return first + int(ends[-1]) + 1
        return 0

    def _end(self, ids_N: Tokens, begin: int) -> int:
        """The position after the next EOS, or the end of the stream."""
        for at in range(begin, len(ids_N), self.row):
            ends = np.flatnonzero(ids_N[at : at + self.row] == EOS)
            if len(ends):
                return at + int(ends[0]) + 1
        return len(ids_N)

    def _document(self, ids_N: Ids) -> Iterator[Float]:
        keep = 0
        while keep < len(ids_N):
            begin = max(0, keep - self.overlap)
            ids_1N = torch.from_numpy(ids_N[begin : begin + self.row].astype(np.int64))[None]
            with torch.no_grad():
                entropy_N = entropy_of(self.model(ids_1N, self.reset_newlines))[0].numpy()
            yield entropy_N[keep - begin :]
            keep = begin + len(entropy_N)
