"""The ONNX files of a bundle: checked before another library parses them.

A matching manifest proves nothing, since the author of a graph also wrote its checksum. So a graph may hold only what
`blt export` writes: the operators of its flavour, no functions, no subgraphs, no settings of ONNX Runtime. Initializers
have the size of their shape. Larger ones are in files that the manifest lists, within the size of the file. Integer
constants are bounded, because shapes are computed from them.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BundleError
from .manifest import QUANTISED, FileEntry, Manifest
from .protobuf import BYTES, FIXED32, VARINT, Malformed, Reader, Unexpected, signed

STANDARD = frozenset(
    ("Add", "And", "Attention", "Cast", "Clip", "Concat", "Div", "Exp", "Expand", "Gather", "GreaterOrEqual",
     "Identity", "Less", "LessOrEqual", "LogSoftmax", "MatMul", "Max", "Mod", "Mul", "Neg", "Not", "Or",
     "RMSNormalization", "Range", "ReduceMax", "ReduceSum", "Reshape", "RotaryEmbedding", "Shape", "Sigmoid", "Slice",
     "Softmax", "Squeeze", "Sub", "TensorScatter", "Transpose", "Unsqueeze", "Where")
)  # fmt: skip
"""Operators of ONNX that every flavour uses."""
ORT = frozenset(("GatherND", "Split"))
"""Further operators of ONNX in the flavour ort: batched graphs scatter and gather; joined products are split."""
CUDA = frozenset(("GatherND", "Log", "ScatterND", "Split"))
"""Further operators of ONNX in the flavour cuda."""
DEQUANTISE = "DequantizeLinear"
"""A further operator of ONNX in the flavour portable: in 8 and 4 bits, matrices are dequantised before a MatMul."""
CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators, in the flavours ort and cuda: GroupQueryAttention; in 8 and 4 bits,
MatMulNBits; in cuda MultiHeadAttention."""

LARGEST_FILE = 32 << 20
"""Most bytes of an .onnx file. That of the released 1B has less than 1 MiB: weights are in another file."""
LARGEST_INLINE = 1 << 16
"""Most bytes of an initializer in the .onnx file. The export stores up to 1 KiB there."""
LARGEST_INTEGER = 1 << 24
"""Largest integer constant, if no stream of the bundle is longer: sizes, axes and indices are far below."""
MOST_FIELDS = 400_000
"""Most fields of an .onnx file; a graph of 400 nodes has 20,000."""
_UNLIMITED = ((1 << 63) - 1, -(1 << 63))  # the ends of a Slice or Shape that has none
_INT8, _INT4 = 3, 22
_ITEM_BITS = {1: 32, 2: 8, _INT8: 8, 6: 32, 7: 64, 9: 8, 10: 16, 16: 16, _INT4: 4}
"""Of float32, uint8, int8, int32, int64, bool, float16, bfloat16, int4. Two numbers of 4 bits share a byte."""
_INTEGERS = {6: "<i", 7: "<q"}
_DIMENSIONS = 8

# Wire type of each field that `blt export` writes; texts of older exports (names, notes) are skipped unread.
_MODEL = {1: VARINT, 2: BYTES, 3: BYTES, 4: BYTES, 5: VARINT, 6: BYTES, 7: BYTES, 8: BYTES}
_OPSET = {1: BYTES, 2: VARINT}
_GRAPH = {1: BYTES, 2: BYTES, 5: BYTES, 10: BYTES, 11: BYTES, 12: BYTES, 13: BYTES, 16: BYTES}
_NODE = {1: BYTES, 2: BYTES, 3: BYTES, 4: BYTES, 5: BYTES, 6: BYTES, 7: BYTES, 9: BYTES}
_ATTRIBUTE = {1: BYTES, 2: FIXED32, 3: VARINT, 4: BYTES, 7: FIXED32, 8: VARINT, 13: BYTES, 20: VARINT}
_TENSOR = {1: VARINT, 2: VARINT, 8: BYTES, 9: BYTES, 12: BYTES, 13: BYTES, 14: VARINT, 16: BYTES}
_VALUE = {1: BYTES, 2: BYTES, 3: BYTES, 4: BYTES}
_TYPE = {1: BYTES}
_TENSOR_TYPE = {1: VARINT, 2: BYTES}
_SHAPE = {1: BYTES}
_DIMENSION = {1: VARINT, 2: BYTES, 3: BYTES}
_ENTRY = {1: BYTES, 2: BYTES}
_UNWRITTEN = {  # fields of ONNX that a message above lacks, by their names in an error
    "the model": {14: "metadata", 20: "training information", 25: "functions", 26: "configurations"},
    "the graph": {14: "quantization notes", 15: "sparse initializers"},
    "a node": {8: "an overload", 10: "configurations"},
    "an attribute": {5: "a tensor", 6: "a subgraph", 10: "tensors", 11: "subgraphs", 21: "a reference"},
}


def operators(flavour: str, quantised: bool) -> frozenset[tuple[str, str]]:
    """(domain, name) of every operator that `blt export` writes for a flavour."""
    if flavour == "portable":
        return frozenset(("", name) for name in (*STANDARD, *([DEQUANTISE] if quantised else [])))
    contrib = ["GroupQueryAttention", *(["MultiHeadAttention"] if flavour == "cuda" else [])]
    if quantised:
        contrib.append("MatMulNBits")
    standard = STANDARD | (CUDA if flavour == "cuda" else ORT)
    return frozenset([*(("", name) for name in standard), *((CONTRIB, name) for name in contrib)])


def read_graph(folder: Path, name: str, manifest: Manifest, precision: str) -> bytes:
    """The content of the graph file `name` of a bundle. Raises BundleError unless it holds only what is written above.

    precision: of the graph's matrices.
    """
    path = folder / name
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= LARGEST_FILE else b""
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    try:
        if size > LARGEST_FILE:
            raise _Foreign(f"it has {size:,} bytes")
        _Check(operators(manifest.flavour, precision in QUANTISED), manifest).model(content)
    except _Foreign as error:
        raise BundleError(
            f"cannot load {name} in {folder}: {error}, which `blt export` never writes: export the bundle again"
        ) from error
    except Malformed as error:
        raise BundleError(
            f"cannot load {name} in {folder}: it is not an ONNX graph ({error}): copy or export the bundle again"
        ) from error
    return content


class _Foreign(ValueError):
    """A valid ONNX graph that no export of ours writes."""


@dataclass(frozen=True)
class _Tensor:
    dtype: int
    shape: tuple[int, ...]
    integers: tuple[int, ...] | None
    """The values of an integer tensor in the .onnx file; None for other tensors."""


@dataclass
class _Check:
    allowed: frozenset[tuple[str, str]]
    manifest: Manifest
    reader: Reader = field(default_factory=lambda: Reader(MOST_FIELDS))

    def model(self, content: bytes) -> None:
        found = self._read("the model", content, _MODEL)
        if len(found[7]) != 1:
            raise Malformed("it has no graph" if not found[7] else "it has several graphs")
        if not found[8]:
            raise Malformed("it has no operator set")
        domains = {_text(domain) for opset in _messages(found[8]) for domain in self.reader.read(opset, _OPSET)[1]}
        known = {domain for domain, _ in self.allowed}
        if not domains <= known:
            raise _Foreign(f"it uses the operators of {_shown(min(domains - known))}")
        graph = self._read("the graph", _messages(found[7])[0], _GRAPH)
        tensors = dict(self._initializer(tensor) for tensor in _messages(graph[5]))
        for node in _messages(graph[1]):
            self._node(node, tensors)
        for value in (*graph[11], *graph[12]):
            self._value(value)

    def _node(self, message: bytes, tensors: Mapping[str, _Tensor]) -> None:
        found = self._read("a node", message, _NODE)
        name, domain = _text(_last(found[4])), _text(_last(found[7]))
        if (domain, name) not in self.allowed:
            raise _Foreign(f"it has the operator {_shown(f'{domain}.{name}' if domain else name)}")
        attributes = dict(self._attribute(attribute) for attribute in _messages(found[5]))
        inputs = [tensors.get(_text(value)) for value in found[1]]
        if name == "Expand":
            _check_expand(inputs)
        elif name == "Range":
            _check_range(inputs)
        elif name == "MatMulNBits":
            _check_blocks(inputs, attributes)
        elif name == DEQUANTISE:
            _check_matrix(inputs, attributes)

    def _attribute(self, message: bytes) -> tuple[str, int | None]:
        """The name, and the value if it is one integer."""
        found = self._read("an attribute", message, _ATTRIBUTE)
        numbers = [signed(value) for value in (*found[3], *found[8]) if isinstance(value, int)]
        self._check_integers(numbers)
        return _text(_last(found[1])), numbers[-1] if found[3] else None

    def _initializer(self, message: bytes) -> tuple[str, _Tensor]:
        found = self._read("an initializer", message, _TENSOR)
        name, dtype = _text(_last(found[8])), _number(found[2])
        if dtype not in _ITEM_BITS:
            raise _Foreign(f"{_shown(name)} has the type {dtype}")
        shape = tuple(signed(size) for size in found[1] if isinstance(size, int))
        if len(shape) > _DIMENSIONS or min(shape, default=0) < 0:
            raise Malformed(f"{_shown(name)} has an impossible shape")
        size = -(-math.prod(shape) * _ITEM_BITS[dtype] // 8)
        if _number(found[14]):
            self._external(name, size, _messages(found[13]))
            if found[9]:
                raise Malformed(f"{_shown(name)} is stored twice")
            return name, _Tensor(dtype, shape, None)
        raw = _last(found[9])
        if len(raw) != size:
            raise Malformed(f"{_shown(name)} has {len(raw)} bytes instead of {size}")
        if size > LARGEST_INLINE:
            raise _Foreign(f"{_shown(name)} has {size:,} bytes in the .onnx file")
        if dtype not in _INTEGERS:
            return name, _Tensor(dtype, shape, None)
        values = tuple(value for (value,) in struct.iter_unpack(_INTEGERS[dtype], raw))
        self._check_integers(values)
        return name, _Tensor(dtype, shape, values)

    def _external(self, name: str, size: int, entries: list[bytes]) -> None:
        """The tensor's bytes are within a file that the manifest lists."""
        keys = {}
        for entry in entries:
            found = self.reader.read(entry, _ENTRY)
            keys[_text(_last(found[1]))] = _text(_last(found[2]))
        if not keys.keys() <= {"location", "offset", "length"}:
            raise _Foreign(f"{_shown(name)} is stored with {_shown(', '.join(sorted(keys)))}")
        location = keys.get("location", "")
        listed: FileEntry | None = self.manifest.files.get(location)
        if listed is None:
            raise _Foreign(f"{_shown(name)} is stored in {_shown(location)}, a file that the manifest does not list")
        offset, length = _decimal(keys.get("offset", "0")), _decimal(keys.get("length", str(size)))
        if length != size:
            raise Malformed(f"{_shown(name)} has {length} bytes instead of {size}")
        if offset + length > listed.bytes:
            raise Malformed(f"{_shown(name)} ends after the end of {location}")

    def _value(self, message: int | bytes) -> None:
        """An input or an output is a tensor, not a sequence, a map or an optional."""
        for kind in self._read("a value", message, _VALUE)[2]:
            for tensor in self._read("a type", kind, _TYPE)[1]:
                for shape in self._read("a type", tensor, _TENSOR_TYPE)[2]:
                    for dimension in self._read("a shape", shape, _SHAPE)[1]:
                        self._read("a shape", dimension, _DIMENSION)

    def _check_integers(self, values: Iterable[int]) -> None:
        limit = max(LARGEST_INTEGER, self.manifest.spec.capacity_bytes)
        for value in values:
            if abs(value) > limit and value not in _UNLIMITED:
                raise _Foreign(f"it has the constant {value:,}")

    def _read(self, kind: str, message: int | bytes, expected: Mapping[int, int]) -> dict[int, list[int | bytes]]:
        assert isinstance(message, bytes)
        try:
            return self.reader.read(message, expected)
        except Unexpected as error:
            if name := _UNWRITTEN.get(kind, {}).get(error.number):
                raise _Foreign(f"{kind} has {name}") from error
            raise


def _check_expand(inputs: list[_Tensor | None]) -> None:
    """An Expand to a constant shape makes at most LARGEST_INTEGER numbers."""
    shape = inputs[1] if len(inputs) > 1 else None
    if shape is not None and (shape.integers is None or math.prod(map(abs, shape.integers)) > LARGEST_INTEGER):
        raise _Foreign("it expands a value to a giant shape")


def _check_range(inputs: list[_Tensor | None]) -> None:
    """A Range counts whole numbers by 1, so that its limits bound its length."""
    delta = inputs[2] if len(inputs) > 2 else None
    if delta is None or delta.integers != (1,):
        raise _Foreign("it has a range whose step is not 1")


def _check_blocks(inputs: list[_Tensor | None], attributes: Mapping[str, int | None]) -> None:
    """The codes [N, blocks, bytes] and scales [N * blocks] of a quantised matrix have the sizes of its attributes."""
    n, k, bits, block = (attributes.get(name) or 0 for name in ("N", "K", "bits", "block_size"))
    if min(n, k, block) < 1 or bits not in (4, 8) or len(inputs) < 3:
        raise Malformed("a quantised product has impossible sizes")
    blocks = -(-k // block)
    for tensor, size in ((inputs[1], n * blocks * (block * bits // 8)), (inputs[2], n * blocks)):
        if tensor is None or math.prod(tensor.shape) != size:
            raise Malformed("a quantised product has a matrix of another size")


def _check_matrix(inputs: list[_Tensor | None], attributes: Mapping[str, int | None]) -> None:
    """The codes [K, N] are int8 with scales [N] on axis 1, or int4 with scales [K / block, N] on axis 0."""
    codes, scales = (*inputs, None, None)[:2]
    if len(inputs) != 2 or codes is None or scales is None or len(codes.shape) != 2:
        raise Malformed("a quantised matrix lacks its codes or scales")
    (k, n), axis, block = codes.shape, attributes.get("axis"), attributes.get("block_size") or 0
    if codes.dtype == _INT8:
        fits = axis == 1 and block == 0 and scales.shape == (n,)
    else:
        fits = codes.dtype == _INT4 and axis == 0 and block > 0 and scales.shape == (k // block, n) and k % block == 0
    if not fits:
        raise Malformed("a quantised matrix has scales of another size")


def _messages(values: list[int | bytes]) -> list[bytes]:
    return [value for value in values if isinstance(value, bytes)]


def _last(values: list[int | bytes]) -> bytes:
    """The value of a field that is not repeated: the last one counts."""
    return values[-1] if values and isinstance(values[-1], bytes) else b""


def _number(values: list[int | bytes]) -> int:
    return values[-1] if values and isinstance(values[-1], int) else 0


def _text(value: int | bytes) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else ""
    except UnicodeDecodeError as error:
        raise Malformed("a name is not UTF-8") from error


def _decimal(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise Malformed(f"{_shown(text)} is not a position in a file")
    return int(text)


def _shown(name: str) -> str:
    """A name from the file, for an error message: short, without control characters."""
    return repr(name if len(name) <= 60 else name[:57] + "...")
