"""Weight bytes of ONNX files, read without the library onnx and compared with its values."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from blt.bench.weight_bytes import graph_weight_bytes
from blt_runtime.errors import BundleError

onnx = pytest.importorskip("onnx")
X, FLOAT = np.float32, 1


def write(path: Path, nodes: list[object], external: bool, **tensors: np.ndarray) -> Path:
    """A graph of `nodes` with these initializers, in the file or in an external one."""
    inputs = [onnx.helper.make_tensor_value_info("x", FLOAT, [1, "S"])]
    outputs = [onnx.helper.make_tensor_value_info("y", FLOAT, None)]
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", inputs, outputs, weights))
    onnx.save(model, path, save_as_external_data=external, location=f"{path.stem}.weights", size_threshold=0)
    return path


def node(operator: str, *inputs: str) -> object:
    return onnx.helper.make_node(operator, inputs, ["y"])


@pytest.mark.parametrize("external", [False, True])
def test_matrices_count_whole_and_tables_by_row(tmp_path: Path, external: bool) -> None:
    nodes = [
        node("MatMul", "x", "matrix"),
        node("Gather", "table", "x"),
        node("GroupQueryAttention", "x", "x", "x", "x", "x", "x", "x", "cos", "sin"),
        node("Gather", "tied", "x"),
        node("MatMul", "x", "tied"),
    ]
    path = write(
        tmp_path / "graph.onnx",
        nodes,
        external,
        matrix=np.ones((300, 7), X),
        table=np.ones((50, 8), X),
        cos=np.ones((100, 4), X),
        sin=np.ones((100, 4), X),
        tied=np.ones((20, 5), X),
        bytes=np.ones(33, np.uint8),
        number=np.array(1.0, X),
    )
    assert (tmp_path / "graph.weights").exists() == external
    assert graph_weight_bytes(path) == 4 * (300 * 7 + 8 + 4 + 4 + 20 * 5 + 1) + 33


def test_a_real_graph_counts_what_onnx_counts(tmp_path: Path) -> None:
    from blt_export import export
    from tests.tiny import tiny

    export(tiny(), tmp_path / "bundle", capacity=64, check=False)
    for name in ("entropy", "encoder", "latent", "decoder"):
        graph = onnx.load(tmp_path / "bundle" / f"{name}.onnx").graph
        sizes = {t.name: onnx.numpy_helper.to_array(t).nbytes for t in graph.initializer}
        found = graph_weight_bytes(tmp_path / "bundle" / f"{name}.onnx")
        assert 0.2 * sum(sizes.values()) < found < sum(sizes.values())
        tables = [n for n in sizes if n.startswith("rotary")]
        assert tables
        assert found <= sum(n for name, n in sizes.items() if name not in tables) + 2 * 64 * 4


@pytest.mark.parametrize(
    "data", [b"", b"graph entropy", b"\x3a\xff\xff\xff\xff\x7f", b"\x3a\x01", b"\x80" * 20, b"\xff" * 400_000]
)
def test_a_file_that_is_no_graph_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "graph.onnx").write_bytes(data)
    started = time.thread_time()
    with pytest.raises(BundleError, match=r"graph.onnx is not an ONNX file"):
        graph_weight_bytes(tmp_path / "graph.onnx")
    assert time.thread_time() - started < 0.5
