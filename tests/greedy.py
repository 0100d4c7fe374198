"""The slow reference's greedy text, in one run of the reference instead of one run an id."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from blt.checkpoint.models import Checkpoint
from blt.generate import reference
from blt.generate.torch_backend import open_model
from tests.tiny import tiny


def greedy_text(checkpoint: Checkpoint, prompt: Sequence[int], n: int) -> list[int]:
    """The `n` ids of `reference.generate`. Cached PyTorch steps write them. Then the reference reads the whole text: it
    is causal, so every id must be its choice after the ids before it."""
    stream = open_model(checkpoint, chunk=16).stream(bos=False)
    stream.append_ids(prompt)
    made = list(stream.generate_ids(n, temperature=0, stop_at_eos=False))
    blt, _ = checkpoint.require_blt()
    ids = [*prompt, *made[:-1]]
    logits = reference.forward(blt, ids, reference.lengths_of(checkpoint, ids)).logits
    assert made == logits[len(prompt) - 1 :].argmax(-1).tolist(), "the cached steps choose other ids than the reference"
    return made


@cache
def text_of(variant: str, prompt: tuple[int, ...], n: int) -> list[int]:
    """The same of one of the tiny variants, once in a process."""
    return greedy_text(tiny(variant), prompt, n)
