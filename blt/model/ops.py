"""Operations that each export flavour lowers differently, as custom operators that stay whole in a captured graph.

Each runs eagerly, too, so a captured module can still be executed and is the reference of its own lowering. Training
does not use them, because the compiler cannot look into a custom operator: modules then call the plain functions.

Letters: B rows, S positions of this call, C cache slots, H heads, G key/value heads, K head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def exporting() -> bool:
    """Whether a module is being captured for an export. Torch 2.11 sets `is_exporting` during compilation, too."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def rotate_pairs(x_BHSK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    """Interleaved rotary embedding; cos, sin are [S, K/2] or [B, S, K/2]."""
    if cos_SK.ndim == 3:
        cos_SK, sin_SK = cos_SK[:, None], sin_SK[:, None]
    even, odd = x_BHSK.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos_SK - odd * sin_SK, even * sin_SK + odd * cos_SK), -1)
    return rotated.flatten(-2).type_as(x_BHSK)


def slot_positions(last_B: Tensor, capacity: int) -> Tensor:
    """Position that each slot of a ring cache holds after position `last` was written: [B, C].

    Position p is stored in slot p mod C; a slot that was never written gets a negative number.
    """
    slot_C = torch.arange(capacity, device=last_B.device)
    return last_B[:, None] - (last_B[:, None] - slot_C) % capacity


def visible(positions_BS: Tensor, doc_start_BS: Tensor, slot_position_BC: Tensor, window: int) -> Tensor:
    """The slots that each query attends to, bool [B, S, C]; `window` 0 means no window."""
    t_BS1, p_B1C = positions_BS[..., None], slot_position_BC[:, None]
    allowed = (p_B1C <= t_BS1) & (p_B1C >= doc_start_BS[..., None])
    return allowed & (t_BS1 - p_B1C < window) if window else allowed


def attend_dense(q_BHSK: Tensor, k_BGJK: Tensor, v_BGJK: Tensor, mask_BSJ: Tensor) -> Tensor:
    """Softmax attention under a boolean mask; key/value heads are repeated for grouped queries."""
    groups = q_BHSK.shape[1] // k_BGJK.shape[1]
    if groups > 1:
        k_BGJK, v_BGJK = k_BGJK.repeat_interleave(groups, 1), v_BGJK.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q_BHSK, k_BGJK, v_BGJK, attn_mask=mask_BSJ[:, None])


def write_slots(cache_BGCK: Tensor, x_BGSK: Tensor, positions_BS: Tensor) -> None:
    """Writes the entries of `positions` into their ring slots, in place."""
    slot_BS = positions_BS % cache_BGCK.shape[2]
    cache_BGCK.scatter_(2, slot_BS[:, None, :, None].expand_as(x_BGSK), x_BGSK.to(cache_BGCK.dtype))


@torch.library.custom_op("blt::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("blt::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, S, K]; cos, sin [B, S, K/2]."""
    return rotate_pairs(x, cos, sin)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("blt::cached_attention", mutates_args=())
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    positions: Tensor,
    doc_start: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes k, v [B, G, S, K] of `positions` [B, S] (consecutive) into the ring caches [B, G, C, K], then attends.

    Needs C >= window - 1 + S, or, without a window, C > the last position. Returns out [B, H, S, K] and both caches.
    """
    present_key, present_value = past_key.clone(), past_value.clone()
    write_slots(present_key, k, positions)
    write_slots(present_value, v, positions)
    mask = visible(positions, doc_start, slot_positions(positions[:, -1], past_key.shape[2]), window)
    return attend_dense(q, present_key, present_value, mask), present_key, present_value


@cached_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    positions: Tensor,
    doc_start: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(past_key), torch.empty_like(past_value)
