"""Graphs for many streams: the same logits as single streams, and to the last bit the same in any company."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blt_export import pipeline
from blt_runtime import Model
from blt_runtime.batch import Batch, gather
from blt_runtime.errors import BackendError
from blt_runtime.scheduler import Scheduler
from blt_runtime.stream import BYTES
from tests.runtime.test_batch import move
from tests.tiny import hard_text, tiny

VARIANTS = ("plain", "cross_windows_own_heads_newlines", "no_hash_space_causal_latent", "max_patch_length")


@pytest.fixture(scope="module", params=[*((v, "fp32") for v in VARIANTS), ("plain", "int8")], ids=lambda p: "-".join(p))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    variant, precision = request.param
    job = pipeline.make_job(tiny(variant), "ort", precision, capacity=600, chunk=32, check=False)
    return pipeline.run(job, tmp_path_factory.mktemp("rows") / "bundle").path


def batch_of(path: Path, rows: int, share: float = 0.5) -> Batch:
    model = Model.open(path, many=True)
    return Batch(model.spec, model.backend, model.hash_tables, rows, 16, gather(share))


def texts(n: int) -> dict[int, np.ndarray]:
    """Pieces of the hard text, which ends documents and lines everywhere."""
    ids = hard_text()
    return {i: np.roll(ids, -37 * i)[: 100 + 13 * i] for i in range(n)}


def test_rows_are_streams(bundle: Path) -> None:
    chosen, prompts = texts(4), {0: 1, 1: 60, 2: 17, 3: 90}
    seen = move(batch_of(bundle, 4), chosen, prompts)
    model = Model.open(bundle)
    for i, ids in chosen.items():
        score = model.score(ids).logits[prompts[i] - 1 :]
        tolerance = 2e-5 if model.manifest and model.manifest.precision == "fp32" else 0.05 * np.abs(score).max()
        np.testing.assert_allclose(np.array(seen[i]), score, 0, tolerance)


def test_company_changes_nothing_to_the_last_bit(bundle: Path) -> None:
    chosen = texts(5)
    prompts = {0: 1, 1: 60, 2: 17, 3: 90, 4: 5}
    alone = [move(batch_of(bundle, 1), {i: ids}, prompts)[i] for i, ids in chosen.items()]
    for rows, share in ((5, 0.0), (8, 0.7)):
        together = move(batch_of(bundle, rows, share), chosen, prompts)
        for i, logits in enumerate(alone):
            np.testing.assert_array_equal(np.array(together[i]), np.array(logits))


def test_heads_that_the_attention_does_not_take_have_no_graphs_for_many(tmp_path: Path) -> None:
    job = pipeline.make_job(tiny("all_layers_gqa_projection"), "ort", capacity=600, chunk=32, check=False)
    made = pipeline.run(job, tmp_path / "bundle")
    assert made.manifest.row_graphs == {}
    with pytest.raises(BackendError, match="no graphs for many streams"):
        Model.open(made.path, many=True)
    seen = Scheduler(Model.open(made.path), streams=2)  # one after the other, on the graphs of single streams
    with seen:
        text = seen.submit_ids(hard_text()[:40], 20)
        stream = Model.open(made.path).stream(bos=False)
        stream.append_ids(hard_text()[:40])
        assert text.result() == b"".join(BYTES[id] for id in stream.generate_ids(20))
