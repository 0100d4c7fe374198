"""How many nodes ONNX Runtime runs in each graph and each layer of the flavour `ort`, and that packed codes are equal.

The floor of a layer with the kernels of ONNX Runtime 1.32 is in docs/architecture.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import ModuleType

import numpy as np
import onnx_ir as ir
import pytest

from blt.checkpoint.models import Checkpoint
from blt_export import ExportReport, pipeline
from blt_export.quantize.blockwise import quantise
from blt_export.quantize.matrices import FORMATS
from blt_export.state import ExportState
from blt_runtime import Model
from blt_runtime.patching import PatchRule
from tests import tiny as tinies
from tests.exports import CAPACITY, CHUNK

FLOAT = Counter(RMSNormalization=2, MatMul=5, GroupQueryAttention=1, QuickGelu=1, Mul=1, Add=2)
INT8 = Counter(RMSNormalization=2, MatMulNBits=4, GroupQueryAttention=1, Split=1, QuickGelu=1, Mul=1, Add=2)
"""Of a layer of 12 nodes: queries, keys and values are one product. Float32 has two for the feed-forward's halves."""
CROSS = Counter(RMSNormalization=1, Attention=1, Reshape=2, Add=1)
"""Of a cross-attention, besides its two products."""
Exported = Callable[[str], ExportReport]


@pytest.fixture(scope="module")
def nodes(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("nodes")


@pytest.fixture(scope="module")
def deep() -> Checkpoint:
    """Two layers in each graph but the encoder, widths of 128, heads of 64 and 32."""
    config = tinies.PLAIN.model_copy(
        update={
            "encoder": tinies.stack(128, 1, 2, window=24, ffn_dim=128),
            "latent": tinies.stack(256, 2, 4, ffn_dim=128),
            "decoder": tinies.stack(128, 2, 2, window=24, ffn_dim=128),
        }
    )
    entropy = tinies.ENTROPY.model_copy(update={"dim": 128, "n_layers": 2, "n_heads": 4, "ffn_dim": 128})
    return tinies.random_checkpoint(config, PatchRule("entropy", threshold=0.0), entropy_config=entropy)


@pytest.fixture(scope="module")
def prepare(deep: Checkpoint) -> Callable[[str], ExportState]:
    """precision -> an export's state; all share one capture."""
    captured: dict[str, ir.Model] = {}

    def make(precision: str) -> ExportState:
        state = pipeline.prepare(deep, "ort", precision=precision, capacity=CAPACITY, chunk=CHUNK)
        state.captured = captured
        return state

    return make


@pytest.fixture(scope="module")
def exported(prepare: Callable[[str], ExportState], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """precision -> the report of an export that took all steps."""
    done: dict[str, ExportReport] = {}

    def export(precision: str) -> ExportReport:
        if precision not in done:
            done[precision] = pipeline.run(prepare(precision), tmp_path_factory.mktemp(precision) / "bundle")
        return done[precision]

    return export


@pytest.mark.parametrize(
    ("precision", "total"),
    [
        ("fp32", {"entropy": 37, "encoder": 20, "latent": 82, "decoder": 51}),
        ("int8", {"entropy": 37, "encoder": 20, "latent": 80, "decoder": 51}),
    ],
)
def test_nodes_of_each_graph_and_each_layer(
    exported: Exported, nodes: ModuleType, precision: str, total: dict[str, int]
) -> None:
    report = exported(precision)
    layer, product = (FLOAT, "MatMul") if precision == "fp32" else (INT8, "MatMulNBits")
    layers = {"entropy": [layer], "encoder": [], "latent": [layer], "decoder": [layer + CROSS + Counter({product: 2})]}
    found = {name: nodes.optimised(report.path / f"{name}.onnx") for name in total}
    assert {name: [Counter(each) for each in nodes.layers(graph)] for name, graph in found.items()} == layers
    assert {name: len(graph.node) for name, graph in found.items()} == total


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_passes_change_no_bit(
    prepare: Callable[[str], ExportState], exported: Exported, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Against a bundle of the same weights whose products stay apart and whose doublings stay: steps and a chunk."""
    skipped = {"fold doublings", "join products"}
    monkeypatch.setattr(pipeline, "STEPS", tuple(step for step in pipeline.STEPS if step.name not in skipped))
    folder = exported(precision).path.parent / "plain"
    pipeline.run(prepare(precision), folder)
    ids = tinies.hard_text()[:70]
    logits = []
    for path in (folder, exported(precision).path):
        stream = Model.open(path, threads=1).stream(bos=False)
        stream.append_ids(ids[:40])
        rows = [stream.logits.copy()]
        for id in ids[40:]:
            stream.append_ids([id])
            rows.append(stream.logits.copy())
        logits.append(np.stack(rows))
    np.testing.assert_array_equal(logits[1], logits[0])


@pytest.mark.parametrize("precision", FORMATS)
def test_codes_of_joined_matrices_are_those_of_each(precision: str) -> None:
    """Blocks of codes belong to single columns, so columns side by side keep their codes and scales."""
    rng, form = np.random.default_rng(0), FORMATS[precision].of_rows(256)
    matrices = [rng.normal(size=(256, n)).astype(np.float32) for n in (32, 8, 8)]
    joined = quantise(np.concatenate(matrices, 1).T, form)
    each = [quantise(matrix.T, form) for matrix in matrices]
    np.testing.assert_array_equal(joined.codes, np.concatenate([blocks.codes for blocks in each]))
    np.testing.assert_array_equal(joined.scales, np.concatenate([blocks.scales for blocks in each]))


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("halvings", [1, 9])
def test_codes_of_halved_matrices_are_the_same(precision: str, halvings: int) -> None:
    form = FORMATS[precision].of_rows(256)
    matrix = np.random.default_rng(0).normal(size=(8, 256)).astype(np.float32)
    whole, factor = quantise(matrix, form), np.float32(0.5**halvings)
    halved = quantise(matrix * factor, form)
    np.testing.assert_array_equal(halved.codes, whole.codes)
    np.testing.assert_array_equal(halved.scales, whole.scales * factor)
