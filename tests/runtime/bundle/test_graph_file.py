"""A graph holds only what the export writes. Everything else is one quick error before ONNX Runtime sees the file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blt_runtime.bundle import graph_file
from blt_runtime.bundle.graph_file import operators, read_graph
from blt_runtime.bundle.manifest import FileEntry, Manifest
from blt_runtime.bundle.protobuf import BYTES, VARINT, Malformed, Reader, signed
from blt_runtime.errors import BundleError
from tests.runtime.bundles import write_bundle

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

NAME, WEIGHTS = "entropy.onnx", "entropy.weights"
Change = Callable[[Any], object]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    made = write_bundle(tmp_path)
    return replace(made, files={**made.files, WEIGHTS: FileEntry(64, "")})


def valid() -> Any:
    """y = x * 2, with the 2 in a file; an integer constant shapes it."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["doubled"], name="first"),
        helper.make_node("Reshape", ["doubled", "shape"], ["y"], allowzero=0),
    ]
    shape = numpy_helper.from_array(np.array([-1, 4], np.int64), "shape")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", 4]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [external("two", (4,)), shape])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def external(name: str, shape: tuple[int, ...], **where: Any) -> Any:
    """A float32 tensor stored in a file; where: entries that replace location, offset and length."""
    tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    entries = {"location": WEIGHTS, "offset": 48, "length": 4 * int(np.prod(shape)), **where}
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def stored(**where: Any) -> Change:
    return lambda model: model.graph.initializer[0].CopyFrom(external("two", (4,), **where))


def node(op_type: str, inputs: tuple[str, ...] = ("x",), **attributes: Any) -> Change:
    return lambda model: model.graph.node.append(helper.make_node(op_type, list(inputs), ["more"], **attributes))


def with_constants(op_type: str, *constants: Any) -> Change:
    def change(model: Any) -> None:
        names = [f"constant{i}" for i in range(len(constants))]
        for name, value in zip(names, constants, strict=True):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        node(op_type, tuple(names))(model)

    return change


def subgraph() -> Any:
    return helper.make_graph([helper.make_node("Add", ["x", "x"], ["z"])], "inner", [], [])


def function(model: Any) -> None:
    made = helper.make_function("custom", "F", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], [])
    model.functions.append(made)


def tensor_attribute(model: Any) -> None:
    value = numpy_helper.from_array(np.zeros(3, np.float32), "value")
    model.graph.node[0].attribute.append(helper.make_attribute("value", value))


def nbits(**changes: Any) -> Change:
    """A matrix [N 2, K 32] of 8 bits in a block of 32, with other attributes or shapes."""

    def change(model: Any) -> None:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        codes = np.zeros(changes.pop("codes", (2, 1, 32)), np.uint8)
        scales = np.zeros(changes.pop("scales", (2,)), np.float32)
        sizes = {"N": 2, "K": 32, "bits": 8, "block_size": 32, **changes}
        model.graph.initializer.extend([numpy_helper.from_array(codes, "q"), numpy_helper.from_array(scales, "s")])
        made = helper.make_node("MatMulNBits", ["x", "q", "s"], ["more"], domain="com.microsoft", **sizes)
        model.graph.node.append(made)

    return change


def dequantised(bits: int = 4, **changes: Any) -> Change:
    """A matrix [K 64, N 3] of 4 bits in blocks of 32, or of 8 bits, with other shapes, types or attributes."""

    def change(model: Any) -> None:
        n, k = 3, 64
        shape, options = ((n,), {"axis": 1}) if bits == 8 else ((k // 32, n), {"axis": 0, "block_size": 32})
        kind = changes.pop("kind", {8: TensorProto.INT8, 4: TensorProto.INT4}[bits])
        codes = TensorProto(name="q", dims=changes.pop("codes", (k, n)), data_type=kind)
        codes.raw_data = bytes(changes.pop("bytes", k * n * bits // 8))
        scales = numpy_helper.from_array(np.ones(changes.pop("scales", shape), np.float16), "s")
        inputs = changes.pop("inputs", ["q", "s"])
        model.graph.initializer.extend([codes, scales])
        model.graph.node.append(helper.make_node("DequantizeLinear", inputs, ["more"], **{**options, **changes}))

    return change


def initializer(**changes: Any) -> Change:
    def change(model: Any) -> None:
        tensor = numpy_helper.from_array(np.zeros(4, np.float32), "t")
        for name, value in changes.items():
            if isinstance(value, list):
                tensor.ClearField(name)
                getattr(tensor, name).extend(value)
            else:
                setattr(tensor, name, value)
        model.graph.initializer.append(tensor)

    return change


def opset(domain: str) -> Change:
    return lambda model: model.opset_import.append(helper.make_opsetid(domain, 1))


HOSTILE: dict[str, tuple[Change, str]] = {
    "If": (node("If", then_branch=subgraph(), else_branch=subgraph()), "operator 'If'"),
    "Loop": (node("Loop", body=subgraph()), "operator 'Loop'"),
    "Scan": (node("Scan", body=subgraph(), num_scan_inputs=1), "operator 'Scan'"),
    "a subgraph of a known operator": (node("Add", body=subgraph()), "an attribute has a subgraph"),
    "a tensor attribute": (tensor_attribute, "an attribute has a tensor"),
    "a function": (function, "the model has functions"),
    "a custom operator": (node("Neg", domain="custom"), "operator 'custom.Neg'"),
    "a custom domain": (opset("custom"), "the operators of 'custom'"),
    "an operator of training": (opset("ai.onnx.preview.training"), "the operators of"),
    "an operator of another kind of model": (node("StringNormalizer"), "operator 'StringNormalizer'"),
    "a giant ConstantOfShape": (with_constants("ConstantOfShape", [1 << 20, 1 << 20]), "operator 'ConstantOfShape'"),
    "a giant Expand": (with_constants("Expand", np.float32(0), [1 << 20, 1 << 20]), "a giant shape"),
    "a giant range": (with_constants("Range", 0, 1 << 40, 1), "the constant 1,099,511,627,776"),
    "a fine range": (with_constants("Range", *np.array([0, 1, 1e-12], np.float32)), "a range whose step is not 1"),
    "a giant constant": (with_constants("Mul", [1, -(1 << 62)]), "the constant"),
    "a giant attribute": (node("Softmax", axis=1 << 50), "the constant"),
    "settings of ONNX Runtime": (
        lambda m: m.metadata_props.add(key="ort_config", value="{}"),
        "the model has metadata",
    ),
    "a sparse initializer": (lambda m: m.graph.sparse_initializer.add(), "the graph has sparse initializers"),
    "a parent folder": (stored(location="../secret"), "stored in '../secret'"),
    "an absolute path": (stored(location="/etc/passwd"), "stored in '/etc/passwd'"),
    "an unlisted file": (stored(location="other.weights"), "does not list"),
    "memory of the process": (stored(location="*/_ORT_MEM_ADDR_/*", offset=4096), "does not list"),
    "no location": (stored(location=None), "stored in ''"),
    "an unknown key": (stored(basepath="/"), "stored with"),
    "an offset after the end": (stored(offset=52), "ends after the end of entropy.weights"),
    "a giant offset": (stored(offset=1 << 62), "is not a position"),
    "a negative offset": (stored(offset=-16), "is not a position"),
    "a length of another shape": (stored(length=8), "has 8 bytes instead of 16"),
    "no length and too few bytes": (stored(offset=60, length=None), "ends after the end"),
    "fewer bytes than its shape": (initializer(dims=[1 << 40]), "has 16 bytes instead of 4398046511104"),
    "a negative size": (initializer(dims=[-1, -4]), "an impossible shape"),
    "a shape of many sizes": (initializer(dims=[1] * 99), "an impossible shape"),
    "texts": (initializer(data_type=TensorProto.STRING), "has the type 8"),
    "values outside raw_data": (initializer(float_data=[1.0]), "field 4"),
    "a product of fewer codes": (nbits(codes=(1, 1, 32)), "a matrix of another size"),
    "a product of fewer scales": (nbits(scales=(1,)), "a matrix of another size"),
    "a product of more columns": (nbits(K=1 << 20), "a matrix of another size"),
    "a product of no bits": (nbits(bits=0), "impossible sizes"),
}


HOSTILE_MATRICES: dict[str, tuple[Change, str]] = {
    "fewer codes": (dequantised(bytes=95), "'q' has 95 bytes instead of 96"),
    "codes for bytes": (dequantised(kind=TensorProto.INT8), "'q' has 96 bytes instead of 192"),
    "codes of another type": (dequantised(8, kind=TensorProto.UINT8), "scales of another size"),
    "codes of more sizes": (dequantised(codes=(8, 8, 3)), "lacks its codes or scales"),
    "fewer scales": (dequantised(scales=(1, 3)), "scales of another size"),
    "fewer scales of 8 bits": (dequantised(8, scales=(2,)), "scales of another size"),
    "one scale": (dequantised(8, scales=()), "scales of another size"),
    "another block": (dequantised(block_size=16), "scales of another size"),
    "a block that does not divide": (dequantised(block_size=24), "scales of another size"),
    "a negative block": (dequantised(block_size=-32), "scales of another size"),
    "blocks of 8 bits": (dequantised(8, block_size=32), "scales of another size"),
    "another axis": (dequantised(axis=1), "scales of another size"),
    "codes that are computed": (dequantised(inputs=["x", "s"]), "lacks its codes or scales"),
    "zero points": (dequantised(inputs=["q", "s", "q"]), "lacks its codes or scales"),
    "no scales": (dequantised(inputs=["q"]), "lacks its codes or scales"),
}


def check(folder: Path, manifest: Manifest, content: bytes, precision: str = "int8") -> None:
    (folder / NAME).write_bytes(content)
    assert read_graph(folder, NAME, manifest, precision) == content


def refused(folder: Path, manifest: Manifest, content: bytes) -> str:
    start = time.thread_time()
    with pytest.raises(BundleError) as error:
        check(folder, manifest, content)
    assert time.thread_time() - start < 1
    message = str(error.value)
    assert message.startswith(f"cannot load {NAME} in ")
    assert message.endswith("export the bundle again")
    assert message.isprintable()
    assert len(message) < 300 + len(str(folder))
    return message


def test_a_graph_of_listed_operators_is_read(tmp_path: Path, manifest: Manifest) -> None:
    check(tmp_path, manifest, valid().SerializeToString())
    for change in (nbits(), with_constants("Range", 0, 9, 1), with_constants("Expand", np.float32(0), [3, 4])):
        model = valid()
        change(model)
        check(tmp_path, manifest, model.SerializeToString())


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_export_writes_is_refused(tmp_path: Path, manifest: Manifest, kind: str) -> None:
    change, message = HOSTILE[kind]
    model = valid()
    change(model)
    assert message in refused(tmp_path, manifest, model.SerializeToString())


@pytest.mark.parametrize("bits", [8, 4])
def test_matrices_of_the_flavour_portable_are_read(tmp_path: Path, manifest: Manifest, bits: int) -> None:
    """At 8 and 4 bits only."""
    model, portable = valid(), replace(manifest, flavour="portable")
    dequantised(bits)(model)
    check(tmp_path, portable, model.SerializeToString())
    for other, precision in ((portable, "fp16"), (manifest, "int8")):
        with pytest.raises(BundleError, match="operator 'DequantizeLinear'"):
            check(tmp_path, other, model.SerializeToString(), precision)


@pytest.mark.parametrize("kind", HOSTILE_MATRICES)
def test_matrices_of_other_sizes_are_refused(tmp_path: Path, manifest: Manifest, kind: str) -> None:
    change, message = HOSTILE_MATRICES[kind]
    model = valid()
    change(model)
    assert message in refused(tmp_path, replace(manifest, flavour="portable"), model.SerializeToString())


def test_operators_follow_flavour_and_precision(tmp_path: Path, manifest: Manifest) -> None:
    assert operators("portable", False) < operators("ort", False) < operators("ort", True)
    model = valid()
    nbits()(model)
    for other, precision in ((manifest, "fp32"), (replace(manifest, flavour="portable"), "int8")):
        with pytest.raises(BundleError, match="never writes"):
            check(tmp_path, other, model.SerializeToString(), precision)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    whole = valid().SerializeToString()
    for cut in range(len(whole)):
        with pytest.raises(BundleError):
            check(tmp_path, manifest, whole[:cut])


def test_a_changed_byte_is_read_or_refused(tmp_path: Path, manifest: Manifest) -> None:
    """By no other error. Many changes are valid graphs with other names."""
    whole = valid().SerializeToString()
    for at in range(len(whole)):
        for changed in (whole[at] ^ 0x80, whole[at] ^ 0x07, 0xFF, 0):
            (tmp_path / NAME).write_bytes(whole[:at] + bytes([changed]) + whole[at + 1 :])
            try:
                read_graph(tmp_path, NAME, manifest, "int8")
            except BundleError:
                continue


def nested(depth: int) -> bytes:
    """A message in field 7 of a message, `depth` times: a graph is field 7 of a model."""
    message = b""
    for _ in range(depth):
        message = b"\x3a" + varint(len(message)) + message
    return message


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no graph",
        b"\xff" * 400_000,
        b"\x08" + b"\x80" * 11 + b"\x01",
        b"\x3a\xff\xff\xff\xff\x7f",
        b"\x3b" * 1000,
        nested(20_000),
        b"\x3a\x00" * 2,
        b"\x08\x01" * 1_000_000,
    ],
    ids=["empty", "text", "ones", "varint", "length", "groups", "nested", "two graphs", "many fields"],
)
def test_damage_is_refused(tmp_path: Path, manifest: Manifest, content: bytes) -> None:
    assert "it is not an ONNX graph" in refused(tmp_path, manifest, content)


def test_a_giant_file_is_not_read(tmp_path: Path, manifest: Manifest) -> None:
    with (tmp_path / NAME).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match="it has 1,099,511,627,776 bytes"):
        read_graph(tmp_path, NAME, manifest, "fp32")


def test_an_initializer_in_the_file_is_small(tmp_path: Path, manifest: Manifest) -> None:
    model = valid()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(graph_file.LARGEST_INLINE // 4 + 1, "f4"), "t"))
    assert "in the .onnx file" in refused(tmp_path, manifest, model.SerializeToString())


def test_names_in_messages_are_short_and_printable(tmp_path: Path, manifest: Manifest) -> None:
    model = valid()
    node("\x1b[31m" + "x" * 10_000)(model)
    refused(tmp_path, manifest, model.SerializeToString())


def test_fields_are_read_by_number() -> None:
    message = b"\x08\x96\x01\x12\x02hi\x08" + varint((1 << 64) - 5) + b"\x0a\x02\x01\x02"
    found = Reader(10).read(message, {1: VARINT, 2: BYTES, 3: BYTES})
    assert found == {1: [150, (1 << 64) - 5, 1, 2], 2: [b"hi"], 3: []}
    assert signed((1 << 64) - 5) == -5
    with pytest.raises(Malformed, match="too many"):
        Reader(3).read(message, {1: VARINT, 2: BYTES})
    with pytest.raises(Malformed, match="wire type"):
        Reader(3).read(message, {1: BYTES})
