"""benchmarks/shapes.py: the products that it counts are those of exported graphs; its fit is a least-squares fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def shapes(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("shapes")


def small(shapes: ModuleType, name: str) -> Any:
    if name == "spaces":
        return shapes.shape(None, 64, (128, 2), 2, kv=1, window=32, patch=6.0, k=1, cross_all=False)
    return shapes.shape(shapes.entropy_of(64, 2, hashed=name == "hashed"), 64, (192, 1), 2, window=32)


@pytest.mark.parametrize("name", ["hashed", "plain", "spaces"])
def test_products_are_those_of_the_exported_graphs(shapes: ModuleType, name: str, tmp_path: Path) -> None:
    """Inputs and outputs in total: which products of one input are joined depends on the precision."""
    onnx = pytest.importorskip("onnx")
    from blt_export import export

    shape = small(shapes, name)
    export(shapes.checkpoint_of(shape), tmp_path / "b", capacity=256, check=False)
    assert set(shape.graphs) == {"encoder", "latent", "decoder"} | ({"entropy"} if shape.entropy else set())
    for group, counted in shape.graphs.items():
        graph = onnx.load(tmp_path / "b" / f"{group}.onnx", load_external_data=False).graph
        dims = {t.name: tuple(t.dims) for t in graph.initializer}
        found: Counter[int] = Counter()
        for node in graph.node:
            if node.op_type == "MatMul" and node.input[1] in dims:
                found[dims[node.input[1]][0]] += dims[node.input[1]][1]
        wanted: Counter[int] = Counter()
        for k, n in counted.products:
            wanted[k] += n
        assert found == wanted, group


def test_the_fit_leaves_out_what_would_be_negative(shapes: ModuleType) -> None:
    generator = np.random.default_rng(0)
    a = generator.random((20, 3))
    assert shapes.nonnegative(a, a @ [1.0, 0.0, 2.0]) == pytest.approx([1.0, 0.0, 2.0], abs=1e-9)
    found = shapes.nonnegative(a, a @ [1.0, -3.0, 2.0])
    assert found.min() == 0.0
    assert (found[[0, 2]] > 0).any()


def measured(shapes: ModuleType) -> dict[str, Any]:
    """Kernels of a machine that reads 1 GB/s, and whose rows, nodes and host cost nothing but a microsecond a layer."""
    flat = {str(rows): (0.0, [1e-9] * len(shapes.SIZES)) for rows in shapes.ROWS}
    part = {
        "rest": {str(s): [0.0, 1e-6, 0.0, 0.0, 0.0] for s in shapes.STREAMS},
        "host": {str(s): 2e-6 for s in shapes.STREAMS},
        "batch": {str(s): {"bytes": 4.0, "patches": 2.0} for s in shapes.STREAMS},
    }
    return {"products": dict.fromkeys(shapes.PRECISIONS, flat), **dict.fromkeys(shapes.PRECISIONS, part)}


def test_a_byte_costs_its_weights_layers_and_the_host(shapes: ModuleType) -> None:
    shape = small(shapes, "hashed")
    costs = shapes.Costs(measured(shapes), "fp32")
    seconds = costs.per_byte(shape, 1)
    read = {group: 4e-9 * sum(k * n for k, n in graph.products) for group, graph in shape.graphs.items()}
    assert seconds["decoder"] == pytest.approx(read["decoder"] + 2e-6)
    assert seconds["latent"] == pytest.approx((read["latent"] + 1e-6) / shape.patch)
    assert seconds["host"] == 2e-6
    assert costs.bytes_per_s(shape, 1) == pytest.approx(1 / sum(seconds.values()))
    batched = costs.per_byte(shape, 8)
    assert batched["decoder"] == pytest.approx((read["decoder"] + 2e-6) / 4)
    assert batched["latent"] == pytest.approx((read["latent"] + 1e-6) / 2 / shape.patch)


def test_candidates_have_the_wanted_latent_transformer(shapes: ModuleType) -> None:
    found = list(shapes.candidates(20e6))
    assert len(found) > 100
    for shape in found[::50]:
        assert shape.blt.latent.n_layers * shape.blt.latent.layer_params() == pytest.approx(20e6, rel=0.15)
        assert shape.blt.local_dim >= shape.blt.latent.dim / 4
