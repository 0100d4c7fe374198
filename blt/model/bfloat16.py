"""The entropy model as facebookresearch/blt's loader runs it: weights, activations and entropies in bfloat16 (spec
section 4).

With eight bits of precision the result shows how a sum was grouped, so the layout of the attention is part of the
definition: blocks of 512 queries from the start of each document, each with its own keys and the window - 1 keys before
them, in this order. The golden data was computed like this, and a position gets the same sums in a long row, in a short
row and step by step. With torch's AVX-512 kernels 2,260 of the 2,283 golden entropies are bit-identical and all 15
cases have the golden patches. The other 23 are in documents that an EOS ends: the kernel ends its sums with the
document, whose end an incremental step cannot know yet. Older kernels group sums differently; with them entropies
differ by up to 0.11 nats, and patches in 2 to 4 cases.

Letters: B rows, S positions of this call, J keys of a block, C slots, N positions of a row, V vocabulary.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from blt.model import ops
from blt.model.entropy import EntropyModel
from blt.model.masks import document_ids
from blt_runtime.errors import RuleError

BLOCK = 512
QUERIES = 32
"""Queries are padded to a multiple of this: the kernel sums the remainder modulo 8 in another order (measured)."""
ROWS = 8
"""Least rows of a matrix product. For one row, and for products of up to 4,096 multiplications (8 rows of a width below
23), torch chooses kernels that sum in another order (measured)."""


class BlockAttention:
    """Attention of `positions` [B, S] (ascending); the keys and values of position p are in slot p mod C.

    Slots of invisible positions may hold any finite values.
    """

    def __init__(self, positions_BS: Tensor, doc_start_BS: Tensor, window: int | None, capacity: int) -> None:
        rows = zip(positions_BS, doc_start_BS, strict=True)
        self._rows = [_blocks(positions_S, start_S, window, capacity) for positions_S, start_S in rows]

    def __call__(self, q_BHSK: Tensor, key_BGCK: Tensor, value_BGCK: Tensor) -> Tensor:
        out = []
        for b, blocks in enumerate(self._rows):
            q, key, value = q_BHSK[b : b + 1], key_BGCK[b : b + 1], value_BGCK[b : b + 1]
            parts = [
                _attend(q[:, :, part], key[:, :, slot_J].to(q.dtype), value[:, :, slot_J].to(q.dtype), mask_1SJ)
                for part, slot_J, mask_1SJ in blocks
            ]
            out.append(torch.cat(parts, 2))
        return torch.cat(out)


def _blocks(
    positions_S: Tensor, doc_start_S: Tensor, window: int | None, capacity: int
) -> list[tuple[slice, Tensor, Tensor]]:
    """Of each block that has one of the positions: its queries, the slots of its keys, and its mask."""
    block_S = positions_S - (positions_S - doc_start_S) % BLOCK
    found, end = [], 0
    for start, count in zip(*(x.tolist() for x in block_S.unique_consecutive(return_counts=True)), strict=True):
        part, end = slice(end, end + count), end + count
        document = int(doc_start_S[part.start])
        key_J = torch.arange(document if window is None else max(document, start - window + 1), start + BLOCK)
        mask_1SJ = ops.visible(positions_S[None, part], doc_start_S[None, part], key_J[None], window or 0)
        found.append((part, key_J % capacity, mask_1SJ))
    return found


def _attend(q_1HSK: Tensor, k_1GJK: Tensor, v_1GJK: Tensor, mask_1SJ: Tensor) -> Tensor:
    n = q_1HSK.shape[2]
    q, mask = F.pad(q_1HSK, (0, 0, 0, -n % QUERIES)), F.pad(mask_1SJ, (0, 0, 0, -n % QUERIES), value=True)
    return ops.attend_dense(q, k_1GJK, v_1GJK, mask)[:, :, :n]


class BlockCache:
    """Key and value caches that are updated in place. Buffers may have any dtype; their values are bfloat16."""

    def __init__(self, key: Tensor, value: Tensor, positions_BS: Tensor, attention: BlockAttention) -> None:
        self.present = [key, value]
        self._positions_BS, self._attention = positions_BS, attention

    def __call__(self, q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
        for cache, new in zip(self.present, (k_BGSK, v_BGSK), strict=True):
            ops.write_slots(cache, new, self._positions_BS)
        return self._attention(q_BHSK, *self.present)


class BFloat16EntropyModel(EntropyModel):
    """Made by `to_bfloat16`. Its logits are bfloat16, so `entropy_of` computes in bfloat16, too."""

    def forward(self, ids_BN: Tensor, reset_newlines: bool = False) -> Tensor:
        """Next-byte logits of whole rows, bfloat16 [B, N, V]."""
        n = ids_BN.shape[1]
        ids_BN = F.pad(ids_BN, (0, max(0, ROWS - n)))
        positions_BN = torch.arange(ids_BN.shape[1]).expand_as(ids_BN)
        document_BN = document_ids(ids_BN, reset_newlines)
        begins_BN = document_BN != F.pad(document_BN, (1, 0))[:, :-1]
        doc_start_BN = torch.where(begins_BN, positions_BN, 0).cummax(1).values
        attention = BlockAttention(positions_BN, doc_start_BN, self.config.window, ids_BN.shape[1])
        rotation = self.rotary.at(positions_BN[:1])
        h_BND = self.run_layers(self.byte_embedding(ids_BN), rotation, [attention] * len(self.layers))
        logits: Tensor = self.output(self.norm(h_BND))[:, :n]
        return logits


def to_bfloat16(model: EntropyModel) -> BFloat16EntropyModel:
    """A copy in bfloat16. The angles of the rotary embedding stay float32, and the rotation is computed in float32.

    Raises RuleError for a model with hash n-grams, which facebookresearch/blt does not have.
    """
    if model.hash_embedding is not None:
        raise RuleError("bfloat16 entropies are those of facebookresearch/blt, which has no hash n-grams; use float32")
    with torch.device("meta"):
        twin = BFloat16EntropyModel(model.config)
    twin.load_state_dict({n: t.detach().to(torch.bfloat16) for n, t in model.state_dict().items()}, assign=True)
    twin.rotary = copy.deepcopy(model.rotary)
    return twin.requires_grad_(False).eval()
