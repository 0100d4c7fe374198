"""The ONNX Runtime backend on hand-made graphs: aliased caches, external data, and errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blt_runtime import Bundle, PatchRule
from blt_runtime.backends.null import null_spec
from blt_runtime.backends.protocol import HostBuffer
from blt_runtime.bundle.bundle import entry_of
from blt_runtime.bundle.spec import CacheSpec, GraphSpec, ModelSpec, TensorSpec
from blt_runtime.errors import BackendError, BundleError, MissingExtra, UsageError
from tests.runtime.bundles import edit, write_bundle

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from blt_runtime.backends.onnx import OnnxBackend, load_library  # noqa: E402

CAPACITY = 16
CACHE_SHAPE = (1, 1, CAPACITY, 1)
GRAPHS = ("encoder", "latent", "decoder")


def accumulator(weights: str | None = None) -> bytes:
    """x is put into the cache at `positions`, y = 2 x + sum(cache). The 2 may be stored in the file `weights`.

    Nothing may read the past of an aliased pair but the node that writes the present: their order is not
    defined.
    """
    two = numpy_helper.from_array(np.full((1, 256), 2, np.float32), "two")
    if weights is not None:
        onnx.external_data_helper.set_external_data(two, weights)
        two.ClearField("raw_data")
        two.data_location = TensorProto.EXTERNAL
    nodes = [
        helper.make_node("Slice", ["two", "from", "to", "axis"], ["one_two"]),
        helper.make_node("Mul", ["x", "one_two"], ["doubled"]),
        helper.make_node("Unsqueeze", ["x", "axes"], ["update"]),
        helper.make_node("Slice", ["positions", "from", "to", "axis"], ["first"]),
        helper.make_node("Squeeze", ["first", "axis"], ["write"]),
        helper.make_node("TensorScatter", ["past_key.0", "update", "write"], ["present_key.0"], axis=-2),
        helper.make_node("ReduceSum", ["present_key.0"], ["total"], keepdims=0),
        helper.make_node("Add", ["doubled", "total"], ["y"]),
    ]
    constants = {"from": [0], "to": [1], "axis": [1], "axes": [1, 3]}
    graph = helper.make_graph(
        nodes,
        "accumulator",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S"]),
            helper.make_tensor_value_info("positions", TensorProto.INT64, ["B", "S"]),
            helper.make_tensor_value_info("past_key.0", TensorProto.FLOAT, list(CACHE_SHAPE)),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "S"]),
            helper.make_tensor_value_info("present_key.0", TensorProto.FLOAT, list(CACHE_SHAPE)),
        ],
        [two, *(numpy_helper.from_array(np.array(v, np.int64), k) for k, v in constants.items())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    return bytes(model.SerializeToString())


def accumulators() -> dict[str, GraphSpec]:
    cache = TensorSpec("past_key.0", "float32", CACHE_SHAPE)
    inputs = (TensorSpec("x", "float32", ("B", "S")), TensorSpec("positions", "int64", ("B", "S")), cache)
    outputs = (TensorSpec("y", "float32", ("B", "S")), TensorSpec("present_key.0", "float32", CACHE_SHAPE))
    aliases = {"present_key.0": "past_key.0"}
    return {g: GraphSpec(g, inputs, outputs, aliases, CacheSpec("linear", CAPACITY, None, 1)) for g in GRAPHS}


def spec() -> ModelSpec:
    return null_spec(PatchRule("byte"), entropy=False)


def opened(folder: Path) -> Bundle:
    """The bundle, its graphs described as the accumulators that they are: the backend only
    requires that a graph's tensors are those of its spec, while a manifest must describe the four graphs of a model."""
    bundle = Bundle.open(folder)
    bundle.manifest.spec.graphs.update(accumulators())
    return bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    write_bundle(tmp_path / "b", spec(), dict.fromkeys(GRAPHS, accumulator()))
    return opened(tmp_path / "b")


def buffers(tokens: int) -> dict[str, HostBuffer]:
    cache = HostBuffer("float32", CACHE_SHAPE)
    made = {n: HostBuffer("float32", (1, tokens)) for n in ("x", "y")}
    return {
        **made,
        "positions": HostBuffer("int64", (1, tokens)),
        "past_key.0": cache,
        "present_key.0": cache,
    }


@pytest.mark.parametrize("options", [{}, {"threads": 2, "spin": True, "prepack": False}])
def test_calls_update_the_cache_in_place(bundle: Bundle, options: dict[str, Any]) -> None:
    session = OnnxBackend(bundle, **options).session("encoder")
    bound = buffers(1)
    call = session.bind(bound)
    seen: list[float] = []
    for t in range(10):
        bound["x"].array[0, 0], bound["positions"].array[0, 0] = t, t
        call()
        seen.append(t)
        assert bound["y"].array[0, 0] == 2 * t + sum(seen)
        np.testing.assert_array_equal(bound["past_key.0"].array.reshape(-1)[: t + 1], seen)


def test_chunks_and_steps_share_a_cache(bundle: Bundle) -> None:
    session = OnnxBackend(bundle).session("decoder")
    chunk, step = buffers(4), buffers(1)
    step["past_key.0"] = step["present_key.0"] = chunk["past_key.0"]
    chunk["x"].array[0] = [1, 2, 3, 4]
    session.bind(chunk)()
    step["positions"].array[0, 0], step["x"].array[0, 0] = 4, 5
    session.bind(step)()
    assert step["y"].array[0, 0] == 25
    np.testing.assert_array_equal(chunk["past_key.0"].array.reshape(-1)[:6], [1, 2, 3, 4, 5, 0])


def test_parts_of_buffers_are_bound_by_address(bundle: Bundle) -> None:
    bound, long = buffers(2), HostBuffer("float32", (1, 9))
    long.array[0] = np.arange(9)
    OnnxBackend(bundle).session("encoder").bind({**bound, "x": long.part(3, (1, 2)), "y": long.part(7, (1, 2))})()
    np.testing.assert_array_equal(long.array[0], [0, 1, 2, 3, 4, 5, 6, 13, 15])


def test_buffers_are_aligned() -> None:
    assert [HostBuffer("int64", (n,)).array.ctypes.data % 64 for n in (1, 7, 64, 1000)] == [0] * 4


def with_weights(folder: Path, location: str) -> Bundle:
    """A bundle whose encoder keeps its weights in the file `location`."""
    write_bundle(folder, spec(), {**dict.fromkeys(GRAPHS, accumulator()), "encoder": accumulator(location)})
    (folder / location).write_bytes(np.full((1, 256), 2, np.float32).tobytes())
    if (folder / location).parent == folder:
        listed = json.loads((folder / "manifest.json").read_text())["files"]
        edit(folder, files={**listed, location: asdict(entry_of(folder / location))})
    return opened(folder)


def test_external_data_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = with_weights(tmp_path / "b", "encoder.weights")
    monkeypatch.chdir("/")
    bound = buffers(1)
    bound["x"].array[0, 0] = 3
    OnnxBackend(bundle).session("encoder").bind(bound)()
    assert bound["y"].array[0, 0] == 9


def test_external_data_outside_the_bundle_is_refused(tmp_path: Path) -> None:
    bundle = with_weights(tmp_path / "b", "../outside.weights")
    with pytest.raises(BundleError, match=r"encoder\.onnx"):
        OnnxBackend(bundle)


def test_bad_bindings(bundle: Bundle) -> None:
    session = OnnxBackend(bundle).session("encoder")
    bound = buffers(1)
    with pytest.raises(BackendError, match="'x'"):
        session.bind({k: v for k, v in bound.items() if k != "x"})
    with pytest.raises(BackendError, match="'encoder' failed") as error:
        session.bind({**bound, "past_key.0": HostBuffer("float32", (1, 1, 3, 1))})()
    assert "\n" not in str(error.value)


def giant() -> bytes:
    """y is a tensor of `x` times 2**48 numbers before it is summed up. No constant is above 2**24."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Mul", ["huge", "huge"], ["larger"]),
        helper.make_node("Mul", ["shape", "larger"], ["size"]),
        helper.make_node("Expand", ["x", "size"], ["expanded"]),
        helper.make_node("ReduceMax", ["expanded"], ["most"], keepdims=1),
        helper.make_node("Mul", ["x", "most"], ["y"]),
    ]
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", "S"]) for n in ("x", "y")]
    huge = numpy_helper.from_array(np.array([1 << 24, 1], np.int64), "huge")
    graph = helper.make_graph(nodes, "giant", tensors[:1], tensors[1:], [huge])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    return bytes(model.SerializeToString())


def test_what_cannot_be_allocated_is_a_memory_error(tmp_path: Path) -> None:
    """For any class that onnxruntime raises. The stream turns it into an error that says what to do."""
    write_bundle(tmp_path / "b", spec(), dict.fromkeys(GRAPHS, giant()))
    bundle = Bundle.open(tmp_path / "b")
    tensors = tuple(TensorSpec(n, "float32", ("B", "S")) for n in ("x", "y"))
    bundle.manifest.spec.graphs.update({g: GraphSpec(g, tensors[:1], tensors[1:], {}, None) for g in GRAPHS})
    call = OnnxBackend(bundle).session("latent").bind({n: HostBuffer("float32", (1, 1)) for n in ("x", "y")})
    with pytest.raises(MemoryError, match="graph 'latent' failed: no 1,125,899,906,842,624 bytes"):
        call()


def test_foreign_graphs(tmp_path: Path) -> None:
    write_bundle(tmp_path / "a", spec(), {**dict.fromkeys(GRAPHS, accumulator()), "latent": b"no graph"})
    with pytest.raises(BundleError, match=r"cannot load latent\.onnx in .*export the bundle again") as error:
        OnnxBackend(opened(tmp_path / "a"))
    assert "\n" not in str(error.value)
    write_bundle(tmp_path / "b", None, dict.fromkeys((*GRAPHS, "entropy"), accumulator()))
    with pytest.raises(BundleError, match="other inputs than the manifest lists"):
        OnnxBackend(Bundle.open(tmp_path / "b"))


def test_a_provider_that_does_not_exist(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"provider 'cuba' is unknown: did you mean 'cuda'\?"):
        OnnxBackend(bundle, provider="cuba")


@pytest.mark.parametrize("provider", ["cuda", "webgpu"])
def test_a_provider_refuses_graphs_of_another_flavour(bundle: Bundle, provider: str) -> None:
    with pytest.raises(BackendError, match=f"provider {provider} runs bundles of the flavour cuda, .* --flavour cuda"):
        OnnxBackend(bundle, provider=provider)


def test_bad_threads(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="threads"):
        OnnxBackend(bundle, threads=0)


def test_onnxruntime_is_not_installed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'blt-runtime\[cpu\]'") as error:
        OnnxBackend(bundle)
    assert error.value.exit_code == 4


def test_onnxruntime_is_too_old(bundle: Bundle) -> None:
    edit(bundle.path, min_onnxruntime="99.0")
    with pytest.raises(BackendError, match=r"needs onnxruntime 99\.0"):
        OnnxBackend(opened(bundle.path))
    load_library("1.30")


def test_no_telemetry_is_kept_or_sent(repo: Path, tmp_path: Path) -> None:
    """onnxruntime would write an identifier of the machine and its events below the home folder once it is loaded."""
    code = "from blt_runtime.backends.onnx import load_library; print(load_library('1.0').get_available_providers())"
    environment = {"PYTHONPATH": str(repo / "runtime"), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "CPUExecutionProvider" in done.stdout
    assert list(tmp_path.rglob("*")) == []
