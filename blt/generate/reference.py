"""The slow, obvious Byte Latent Transformer: the reference that every fast form is tested against.

It processes one row at a time, recomputes everything for every byte, and uses dense masks and the plain vectorised
definition of the patch rules. It shares its parameters with `blt.model`, but no layout, mask or cache.
Formulas: spec sections 2 to 10.

Letters: N tokens, P patches, D local width, G latent width, k slices a patch, H heads, K head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from blt.checkpoint.models import Checkpoint
from blt.model import BLT, EntropyModel, entropy_of
from blt.model.bfloat16 import BFloat16EntropyModel
from blt.model.hashing import HashEmbedding
from blt.model.layers import Attention, Block, CrossAttention, FeedForward, RMSNorm, Stack
from blt_runtime.hashing import PRIMES
from blt_runtime.ids import EOS, NEWLINE
from blt_runtime.patching import PatchRule, patch_lengths


@dataclass
class Trace:
    """The logits of one row, and the intermediate states."""

    ids: list[int]
    patch_lengths: list[int]
    embeds: Tensor = field(default_factory=lambda: torch.empty(0))
    byte_states: Tensor = field(default_factory=lambda: torch.empty(0))
    patches: Tensor = field(default_factory=lambda: torch.empty(0))
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    decoder_states: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def norm(x: Tensor, module: RMSNorm) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + module.eps).rsqrt() * module.weight


def rotate(x_NHK: Tensor, theta: float) -> Tensor:
    """Rotary embedding of positions 0..N-1 as a complex multiplication of neighbouring pairs."""
    n, _, size = x_NHK.shape
    frequency = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)
    angle = torch.outer(torch.arange(n).float(), frequency)
    phase = torch.polar(torch.ones_like(angle), angle)[:, None]
    pairs = torch.view_as_complex(x_NHK.reshape(n, x_NHK.shape[1], -1, 2).contiguous())
    return torch.view_as_real(pairs * phase).flatten(-2)


def softmax_attention(q_NHK: Tensor, k_JHK: Tensor, v_JHK: Tensor, mask_NJ: Tensor) -> Tensor:
    """Softmax attention [N, H * K]; a query without keys gets 0."""
    score = torch.einsum("nhk,jhk->hnj", q_NHK, k_JHK) / math.sqrt(q_NHK.shape[-1])
    weight = score.masked_fill(~mask_NJ, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hnj,jhk->nhk", weight, v_JHK).flatten(1)


def self_attention(x_ND: Tensor, a: Attention, theta: float, mask_NN: Tensor) -> Tensor:
    q, k, v = ((x_ND @ w.weight.T).unflatten(-1, (-1, a.head_size)) for w in (a.wq, a.wk, a.wv))
    repeat = q.shape[1] // k.shape[1]
    k, v = rotate(k, theta).repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    return softmax_attention(rotate(q, theta), k, v, mask_NN) @ a.wo.weight.T


def feed_forward(x: Tensor, f: FeedForward) -> Tensor:
    gate = x @ f.w1.weight.T
    return (gate * torch.sigmoid(gate) * (x @ f.w3.weight.T)) @ f.w2.weight.T


def block(x_ND: Tensor, layer: Block, theta: float, mask_NN: Tensor) -> Tensor:
    h = x_ND + self_attention(norm(x_ND, layer.attention_norm), layer.attention, theta, mask_NN)
    return h + feed_forward(norm(h, layer.ffn_norm), layer.feed_forward)


def cross_attention(x_QD: Tensor, c_JD: Tensor, c: CrossAttention, mask_QJ: Tensor) -> Tensor:
    """The input is added here, and again by the caller (spec section 2)."""
    heads = (c.n_heads, c.head_size)
    normed = norm(c_JD, c.kv_norm)
    q = (norm(x_QD, c.q_norm) @ c.wq.weight.T).unflatten(-1, heads)
    k, v = (normed @ c.wk.weight.T).unflatten(-1, heads), (normed @ c.wv.weight.T).unflatten(-1, heads)
    return x_QD + softmax_attention(q, k, v, mask_QJ) @ c.wo.weight.T


def documents(ids: Sequence[int], reset_newlines: bool = False) -> Tensor:
    ends = (EOS, NEWLINE) if reset_newlines else (EOS,)
    number, numbers = 0, []
    for token in ids:
        numbers.append(number)
        number += token in ends
    return torch.tensor(numbers)


def block_causal(document_N: Tensor, window: int | None) -> Tensor:
    position = torch.arange(len(document_N))
    back = position[:, None] - position[None, :]
    return (back >= 0) & (back < (window or len(document_N))) & (document_N[:, None] == document_N[None, :])


def patch_ids(lengths: Sequence[int], n: int) -> list[int]:
    """Index of the patch that each of the first n positions belongs to."""
    return [j for j, length in enumerate(lengths) for _ in range(length)][:n]


def entropies(model: EntropyModel, ids: Sequence[int], reset_newlines: bool = False) -> tuple[Tensor, Tensor]:
    """Next-byte entropies [N] in nats, and the logits [N, 260] they come from (spec section 4).

    For bfloat16 the model itself is the reference, because the grouping of sums is part of its definition.
    """
    if isinstance(model, BFloat16EntropyModel):
        rounded = model(torch.tensor([list(ids)]), reset_newlines)[0]
        return entropy_of(rounded), rounded.float()
    x = embed(model.byte_embedding.weight, model.hash_embedding, ids)
    mask = block_causal(documents(ids, reset_newlines), model.config.window)
    for layer in model.layers:
        x = block(x, _block(layer), model.config.rope_theta, mask)
    logits = norm(x, model.norm) @ model.output.weight.T
    p = logits.softmax(-1)
    return -(p * logits.log_softmax(-1)).sum(-1), logits


def _block(layer: object) -> Block:
    assert isinstance(layer, Block)
    return layer


def hash_row(ids: Sequence[int], t: int, prime: int, size: int, rows: int) -> int:
    """Row of an n-gram in its table, in Python integers that are wrapped to 64 bits at the end (spec section 6)."""
    window = [ids[i] if i >= 0 else 0 for i in range(t - size + 1, t + 1)]
    value: int = sum(token * prime**i for i, token in enumerate(window)) % 2**64
    return (value - 2**64 if value >= 2**63 else value) % rows


def embed(bytes_VD: Tensor, hashed: HashEmbedding | None, ids: Sequence[int]) -> Tensor:
    """The embedding of each byte, and of the n-grams that end there."""
    x = bytes_VD[list(ids)]
    if hashed is None:
        return x
    config = hashed.config
    pairs = [(prime, size) for prime in PRIMES[: config.functions] for size in config.sizes]
    for table, (prime, size) in enumerate(pairs):
        rows = [hash_row(ids, t, prime, size, config.rows) for t in range(len(ids))]
        x = x + hashed.table(table)[rows].float()
    return x


def pool(model: BLT, h_ND: Tensor, owner: Sequence[int], n_patches: int) -> Tensor:
    """Initial patch vectors [P * k, D]: the maximum (mean, minimum) of each patch's bytes, or a trained vector."""
    rows, query = [], model.encoder.query
    for patch in range(n_patches):
        members = h_ND[[t for t, j in enumerate(owner) if j == patch]]
        reduce = {"max": lambda m: m.amax(0), "min": lambda m: m.amin(0), "mean": lambda m: m.mean(0)}
        if query is not None:
            reduce["learned"] = lambda m: query.weight[0]
        rows.append(reduce[model.config.pooling](members) if len(members) else torch.zeros(h_ND.shape[1]))
    return (torch.stack(rows) @ model.encoder.patch_projection.weight.T).view(-1, h_ND.shape[1])


def _run(stack: Stack, x: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """The outputs of all layers, in order."""
    for layer in stack.layers:
        x = block(x, _block(layer), stack.config.rope_theta, mask)
        yield x


@torch.no_grad()
def forward(model: BLT, ids: Sequence[int], lengths: Sequence[int]) -> Trace:
    """All states of one row of ids; the patch lengths sum to N + 1 (the virtual next token)."""
    c, n, n_patches = model.config, len(ids), len(lengths)
    trace = Trace(
        list(ids), list(lengths), embeds=embed(model.encoder.byte_embedding.weight, model.hash_embedding, ids)
    )
    owner = torch.tensor(patch_ids(lengths, n))
    document = documents(ids)

    query_patch = torch.arange(n_patches).repeat_interleave(c.cross_k)
    distance = query_patch[:, None] - owner[None, :]
    encoder_mask = (distance >= 0) & (distance < c.encoder_cross_window)
    h, p, crossed = trace.embeds, torch.empty(0), 0
    local_states = _run(model.encoder, trace.embeds, block_causal(document, c.encoder.window))
    for i, h in enumerate(local_states):
        if c.encoder_cross_all_layers or i == c.encoder.n_layers - 1:
            p = pool(model, h, owner.tolist(), n_patches) if crossed == 0 else p
            p = p + cross_attention(p, h, _cross(model.encoder.cross[crossed]), encoder_mask)
            crossed += 1
    trace.byte_states, trace.patches = h, p

    ends_document = torch.tensor([any(ids[t] == EOS for t in range(n) if owner[t] == j) for j in range(n_patches)])
    patch_document = ends_document.cumsum(0) - ends_document.long()
    latent_mask = block_causal(patch_document if c.latent_document_mask else patch_document * 0, c.latent.window)
    g = p.view(n_patches, -1)
    g = g if model.latent.projection is None else g @ model.latent.projection.weight.T
    *_, g = _run(model.latent, g, latent_mask)
    trace.latents = g

    slices = g if model.decoder.patch_projection is None else g @ model.decoder.patch_projection.weight.T
    slices = slices.reshape(-1, h.shape[1])
    complete = torch.tensor(patch_ids(lengths[1:], n))
    distance = complete[:, None] - query_patch[None, :]
    decoder_mask = (distance >= 0) & (distance < c.decoder_cross_window)
    local_mask = block_causal(document, c.decoder.window)
    for i, layer in enumerate(model.decoder.layers):
        if c.decoder_cross_all_layers or i == 0:
            h = h + cross_attention(h, slices, _cross(model.decoder.cross[i]), decoder_mask)
        h = block(h, _block(layer), c.decoder.rope_theta, local_mask)
    trace.decoder_states = h
    trace.logits = norm(h, model.decoder.norm) @ model.decoder.output.weight.T
    return trace


def _cross(module: object) -> CrossAttention:
    assert isinstance(module, CrossAttention)
    return module


@torch.no_grad()
def lengths_of(checkpoint: Checkpoint, ids: Sequence[int], rule: PatchRule | None = None) -> list[int]:
    """Patch lengths of one row by the checkpoint's patch rule, with the virtual next token."""
    rule = rule or checkpoint.require_blt()[1]
    values = None
    if rule.needs_entropy:
        assert checkpoint.entropy is not None
        values = entropies(checkpoint.entropy, ids, rule.reset_newlines)[0].numpy()
    return [int(length) for length in patch_lengths(rule, np.asarray(ids, np.int64), values)]


def generate(checkpoint: Checkpoint, ids: Sequence[int], n: int) -> list[int]:
    """Greedy continuation of `ids` by `n` tokens; everything is recomputed for each token."""
    blt, _ = checkpoint.require_blt()
    out = list(ids)
    for _ in range(n):
        out.append(int(forward(blt, out, lengths_of(checkpoint, out)).logits[-1].argmax()))
    return out[len(ids) :]
