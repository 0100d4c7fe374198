"""The third form: exported bundles, both flavours, generate what the slow reference generates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blt.checkpoint.models import Checkpoint
from blt.generate import reference
from blt_export import pipeline
from blt_runtime import Model
from tests import exports
from tests.greedy import text_of
from tests.runtime.bundles import hub_cache
from tests.tiny import hard_text, prompts, tiny

VARIANTS = (
    "plain",
    "all_layers_gqa_projection",
    "cross_windows_own_heads_newlines",
    "no_hash_space_causal_latent",
    "max_patch_length",
    "bytes_no_window",
    "hash_entropy_without_layers",
)
TOLERANCE = 2e-5
NEW = 60


def beginnings() -> list[list[int]]:
    """Short prompts, and the hard text up to a position inside its raw bytes, several windows long."""
    return [*prompts(), hard_text()[:150].tolist()]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def models(variant: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A model per flavour, both from one capture."""
    folder, opened = tmp_path_factory.mktemp("bundles"), {}
    for flavour in ("ort", "portable"):
        opened[flavour] = Model.open(pipeline.run(exports.prepare(variant, flavour), folder / flavour).path)
    return opened


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_greedy_text_is_identical(models: dict[str, Model], variant: str, flavour: str) -> None:
    for ids in beginnings():
        stream = models[flavour].stream(bos=False)
        stream.append_ids(ids)
        made = list(stream.generate_ids(NEW, temperature=0, stop_at_eos=False))
        assert made == text_of(variant, tuple(ids), NEW)


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_scores_agree_with_the_reference(models: dict[str, Model], variant: str, flavour: str) -> None:
    checkpoint: Checkpoint = tiny(variant)
    blt, _ = checkpoint.require_blt()
    ids = hard_text()
    lengths = reference.lengths_of(checkpoint, ids.tolist())
    score = models[flavour].score(ids)
    assert score.patch_lengths.tolist() == lengths
    np.testing.assert_allclose(score.logits, reference.forward(blt, ids.tolist(), lengths).logits, 0, TOLERANCE)


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_a_stream_continues_after_appends_and_rewinds(models: dict[str, Model], flavour: str) -> None:
    """Generated, rewound, appended to and generated again: the same as the final text read at once."""
    stream = models[flavour].stream()
    stream.append("The first words, and then ")
    first = list(stream.generate_ids(40, temperature=0, stop_at_eos=False))
    stream.rewind(25)
    stream.append("some more input\n")
    again = list(stream.generate_ids(40, temperature=0, stop_at_eos=False))
    fresh = models[flavour].stream(bos=False)
    fresh.append_ids(stream.ids[:-40])
    assert stream.ids[-40:].tolist() == again == list(fresh.generate_ids(40, temperature=0, stop_at_eos=False))
    assert len(first) == 40


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_a_snapshot_is_restored_to_the_last_bit(models: dict[str, Model], flavour: str) -> None:
    """At every cut of the hard text: windows wrapped, documents ended, patches open; in a stream full of other text."""
    ids, model = hard_text(), models[flavour]
    stream, other = model.stream(bos=False), model.stream()
    other.append_ids(ids[::-1][:300])
    for start, end in ((0, 90), (90, 131), (131, 290), (290, len(ids))):
        stream.append_ids(ids[start:end])
        other.restore(stream.snapshot())
        np.testing.assert_array_equal(other.logits, stream.logits)
        here = stream.snapshot()
        assert list(other.generate_ids(40, temperature=0, stop_at_eos=False)) == list(
            stream.generate_ids(40, temperature=0, stop_at_eos=False)
        )
        np.testing.assert_array_equal(other.logits, stream.logits)
        stream.restore(here)


@pytest.mark.parametrize("inside", ["", "onnx"])
def test_a_bundle_in_a_hub_cache_generates_the_same(tmp_path: Path, inside: str) -> None:
    """There every file is a link into `blobs`, also the weights that the graphs name."""
    path = pipeline.run(exports.prepare("plain", check=False), tmp_path / "bundle").path
    expected = list(Model.open(path).generate_text("Once", 20, temperature=0))
    assert list(Model.open(hub_cache(path, inside)).generate_text("Once", 20, temperature=0)) == expected
