"""The modules of the model as incremental steps, with the signatures of the four exported graphs.

A step module takes the tokens (or patches) of one call and its caches, and returns its outputs and the new caches. Run
directly, it updates the caches in place: this is the cached PyTorch form of generation. Under `torch.export`, caches
are inputs and outputs of `blt::cached_attention`, which every export flavour lowers in its own way.

Letters: B rows, S bytes of this call, P patches of this call, L longest patch, N byte states and R patches that the
call may read, C cache slots, D local width, X and Y cross-attention layers of the encoder and the decoder, k slices a
patch, W patches a decoder byte may read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from blt.model import ops
from blt.model.bfloat16 import ROWS, BFloat16EntropyModel, BlockAttention, BlockCache
from blt.model.blt import BLT
from blt.model.entropy import EntropyModel, entropy_of
from blt.model.layers import Attend, RotaryTable, Stack


class GraphCache:
    """Key and value caches as inputs and outputs of a captured graph."""

    def __init__(self, key: Tensor, value: Tensor, positions_BS: Tensor, doc_start_BS: Tensor, window: int) -> None:
        self.present = [key, value]
        self._where = (positions_BS, doc_start_BS, window)

    def __call__(self, q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
        out: Tensor
        out, *self.present = ops.cached_attention(q_BHSK, k_BGSK, v_BGSK, *self.present, *self._where)
        return out


class InPlaceCache:
    """Key and value caches that are updated in place; only slots that were written are read."""

    def __init__(self, key: Tensor, value: Tensor, positions_BS: Tensor, mask_BSC: Tensor) -> None:
        self.present = [key, value]
        self._positions_BS, self._mask_BSC = positions_BS, mask_BSC

    def __call__(self, q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
        used = self._mask_BSC.shape[-1]
        for cache, new in zip(self.present, (k_BGSK, v_BGSK), strict=True):
            ops.write_slots(cache, new, self._positions_BS)
        key, value = (cache[:, :, :used] for cache in self.present)
        return ops.attend_dense(q_BHSK, key, value, self._mask_BSC)


def open_caches(
    caches: Sequence[Tensor], positions_BS: Tensor, doc_start_BS: Tensor, window: int | None
) -> list[GraphCache] | list[InPlaceCache]:
    """One cache per layer, from the flat list key.0, value.0, key.1, ..."""
    pairs = list(zip(caches[::2], caches[1::2], strict=True))
    if not pairs:  # a model without layers
        return []
    if ops.exporting():
        return [GraphCache(key, value, positions_BS, doc_start_BS, window or 0) for key, value in pairs]
    capacity = pairs[0][0].shape[2]
    used = min(capacity, int(positions_BS.max()) + 1)
    slots_BC = ops.slot_positions(positions_BS[:, -1], capacity)[:, :used]
    mask = ops.visible(positions_BS, doc_start_BS, slots_BC, window or 0)
    return [InPlaceCache(key, value, positions_BS, mask) for key, value in pairs]


class StepModule(nn.Module):
    """One graph as a module, with a rotary table of exactly the positions that its caches can hold."""

    def __init__(self, stack: Stack, capacity: int) -> None:
        super().__init__()
        config = stack.config
        self.window = config.window
        self.rotary = RotaryTable(capacity, config.head_size, config.rope_theta)

    def _open(
        self, caches: Sequence[Tensor], positions_BS: Tensor, doc_start_BS: Tensor
    ) -> list[GraphCache] | list[InPlaceCache] | list[BlockCache]:
        return open_caches(caches, positions_BS, doc_start_BS, self.window)


def _present(opened: Sequence[GraphCache] | Sequence[InPlaceCache] | Sequence[BlockCache]) -> list[Tensor]:
    return [tensor for cache in opened for tensor in cache.present]


def _embedded(
    byte_embedding: nn.Module, hashed: bool, ids: Tensor, rest: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Embeddings [B, S, D], and the inputs after ids and hash_embedding (which only a model with tables has)."""
    x_BSD: Tensor = byte_embedding(ids)
    return (x_BSD + rest[0], rest[1:]) if hashed else (x_BSD, rest)


class EntropyStep(StepModule):
    """ids [B, S], hash_embedding [B, S, D] (if the model has tables), positions, doc_start [B, S], caches
    -> entropy [B, S] in nats, logits [B, S, V], caches."""

    def __init__(self, model: EntropyModel, capacity: int) -> None:
        super().__init__(model, capacity)
        self.model, self.hashed = model, model.hash_embedding is not None

    def forward(self, ids: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        x_BSD, (positions, doc_start, *caches) = _embedded(model.byte_embedding, self.hashed, ids, rest)
        opened: Sequence[Attend] = (held := self._open(caches, positions, doc_start))
        h_BSD = model.run_layers(x_BSD, self.rotary.at(positions), opened)
        logits = model.output(model.norm(h_BSD))
        return entropy_of(logits), logits.float(), *_present(held)


class BFloat16EntropyStep(EntropyStep):
    """`EntropyStep` for a `BFloat16EntropyModel`, with its layout of the attention; not for export."""

    def forward(self, ids: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        positions, doc_start, *caches = rest
        n = ids.shape[1]
        if n < ROWS:  # repeat the last token, which writes the same slot
            ids, positions, doc_start = (
                torch.cat([x, x[:, -1:].expand(-1, ROWS - n)], 1) for x in (ids, positions, doc_start)
            )
        entropy, logits, *held = super().forward(ids, positions, doc_start, *caches)
        return entropy[:, :n], logits[:, :n], *held

    def _open(
        self, caches: Sequence[Tensor], positions_BS: Tensor, doc_start_BS: Tensor
    ) -> list[GraphCache] | list[InPlaceCache] | list[BlockCache]:
        attention = BlockAttention(positions_BS, doc_start_BS, self.window, caches[0].shape[2])
        pairs = zip(caches[::2], caches[1::2], strict=True)
        return [BlockCache(key, value, positions_BS, attention) for key, value in pairs]


class EncoderStep(StepModule):
    """ids [B, S], hash_embedding [B, S, D] (if the model has tables), positions, doc_start, caches
    -> byte_states [B, S, X, D], caches."""

    def __init__(self, model: BLT, capacity: int) -> None:
        super().__init__(model.encoder, capacity)
        self.encoder = model.encoder
        self.hashed = model.hash_embedding is not None

    def forward(self, ids: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        x_BSD, (positions, doc_start, *caches) = _embedded(self.encoder.byte_embedding, self.hashed, ids, rest)
        opened = self._open(caches, positions, doc_start)
        states = self.encoder.byte_states(x_BSD, self.rotary.at(positions), opened)
        return torch.stack(states, 2), *_present(opened)


class LatentStep(StepModule):
    """Turns complete patches into the keys and values that the decoder reads.

    byte_states [N, X, D], byte_index [B, P, L], patch_length [B, P], own_start [B, P] (only with an encoder window
    above 1), positions, doc_start [B, P] in patches, caches -> patch_kv [B, P, Y, 2, k, D], caches.
    """

    def __init__(self, model: BLT, capacity: int) -> None:
        super().__init__(model.latent, capacity)
        self.encoder, self.latent, self.decoder = model.encoder, model.latent, model.decoder
        self.windowed = model.config.encoder_cross_window > 1

    def forward(
        self, byte_states: Tensor, byte_index: Tensor, patch_length: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        entry_L = torch.arange(byte_index.shape[-1], device=byte_index.device)
        key_valid = own_valid = entry_L < patch_length[..., None]
        if self.windowed:
            own_valid, rest = key_valid & (entry_L >= rest[0][..., None]), rest[1:]
        positions, doc_start, *caches = rest
        states = [byte_states[:, x][byte_index] for x in range(len(self.encoder.cross))]
        p_BPE = self.encoder.pool(states, key_valid, own_valid)
        opened = self._open(caches, positions, doc_start)
        g_BPG = self.latent(p_BPE, self.rotary.at(positions), opened)
        return self.decoder.patch_keys_values(g_BPG), *_present(opened)


class DecoderStep(StepModule):
    """byte_states [B, S, X, D], patch_kv [R, Y, 2, k, D], patch_row [B, S, W], positions, doc_start, caches
    -> logits [B, S, V], caches."""

    def __init__(self, model: BLT, capacity: int) -> None:
        super().__init__(model.decoder, capacity)
        self.decoder = model.decoder

    def forward(
        self,
        byte_states: Tensor,
        patch_kv: Tensor,
        patch_row: Tensor,
        positions: Tensor,
        doc_start: Tensor,
        *caches: Tensor,
    ) -> tuple[Tensor, ...]:
        opened = self._open(caches, positions, doc_start)
        h_BSD = byte_states[:, :, -1]
        logits = self.decoder(h_BSD, patch_kv, patch_row, self.rotary.at(positions), opened)
        return logits, *_present(opened)


def make_steps(
    blt: BLT, entropy: EntropyModel | None, capacity_bytes: int, capacity_patches: int
) -> dict[str, StepModule]:
    """The step modules of a model by graph name, in evaluation mode, for streams of these capacities."""
    steps: dict[str, StepModule] = {}
    if entropy is not None:
        kind = BFloat16EntropyStep if isinstance(entropy, BFloat16EntropyModel) else EntropyStep
        steps["entropy"] = kind(entropy, capacity_bytes)
    steps["encoder"] = EncoderStep(blt, capacity_bytes)
    steps["latent"] = LatentStep(blt, capacity_patches)
    steps["decoder"] = DecoderStep(blt, capacity_bytes)
    return {name: step.eval() for name, step in steps.items()}
