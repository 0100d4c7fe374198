"""Three forms of one model agree: the slow reference, whole rows, and the cached steps in any chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blt.checkpoint.models import Checkpoint
from blt.generate import reference
from blt.generate.torch_backend import open_model
from tests.tiny import VARIANTS, hard_text, prompts, tiny

TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return tiny(request.param)


def test_whole_rows_and_cached_chunks_agree_with_the_reference(checkpoint: Checkpoint) -> None:
    blt, rule = checkpoint.require_blt()
    ids = hard_text()
    lengths = reference.lengths_of(checkpoint, ids.tolist())
    assert 20 < len(lengths) < len(ids) or rule.scheme == "byte"
    expected = reference.forward(blt, ids.tolist(), lengths).logits.numpy()
    with torch.no_grad():
        whole = blt(torch.from_numpy(ids)[None], torch.tensor([lengths]), max(lengths))[0].numpy()
    np.testing.assert_allclose(whole, expected, rtol=0, atol=TOLERANCE)
    for chunk in (7, 64):
        score = open_model(checkpoint, chunk=chunk).stream().score_ids(ids)
        assert score.patch_lengths.tolist() == lengths
        np.testing.assert_allclose(score.logits, expected, rtol=0, atol=TOLERANCE)
        if checkpoint.entropy is not None:
            with torch.no_grad():
                values = reference.entropies(checkpoint.entropy, ids.tolist(), rule.reset_newlines)[0]
            np.testing.assert_allclose(score.entropies, values, rtol=0, atol=TOLERANCE)


def test_single_steps_agree_with_the_reference(checkpoint: Checkpoint) -> None:
    blt, _ = checkpoint.require_blt()
    ids = hard_text()
    expected = reference.forward(blt, ids.tolist(), reference.lengths_of(checkpoint, ids.tolist())).logits.numpy()
    stream = open_model(checkpoint, chunk=16).stream(bos=False)
    for token, logits in zip(ids, expected, strict=True):
        stream.append_ids([token])
        np.testing.assert_allclose(stream.logits, logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("prompt", range(3))
def test_greedy_text_is_identical(checkpoint: Checkpoint, prompt: int) -> None:
    ids = prompts()[prompt]
    stream = open_model(checkpoint, chunk=16).stream(bos=False)
    stream.append_ids(ids)
    assert list(stream.generate_ids(120, temperature=0, stop_at_eos=False)) == reference.generate(checkpoint, ids, 120)


def test_given_patch_lengths_replace_the_rule(checkpoint: Checkpoint) -> None:
    blt, _ = checkpoint.require_blt()
    ids = hard_text()[:61]
    lengths = [1, 30, 1, 1, 29]
    score = open_model(checkpoint).stream().score_ids(ids, lengths)
    assert score.patch_lengths.tolist() == lengths
    expected = reference.forward(blt, ids.tolist(), lengths).logits.numpy()
    np.testing.assert_allclose(score.logits, expected, rtol=0, atol=TOLERANCE)


def test_a_snapshot_is_restored_to_the_last_bit(checkpoint: Checkpoint) -> None:
    ids, model = hard_text(), open_model(checkpoint, chunk=16)
    stream, other = model.stream(bos=False), model.stream()
    other.append_ids(ids[::-1][:200])
    for start, end in ((0, 90), (90, 290)):
        stream.append_ids(ids[start:end])
        other.restore(stream.snapshot())
        np.testing.assert_array_equal(other.logits, stream.logits)
        assert list(other.generate_ids(30, temperature=0, stop_at_eos=False)) == list(
            stream.generate_ids(30, temperature=0, stop_at_eos=False)
        )
        np.testing.assert_array_equal(other.logits, stream.logits)
