"""Parity: the exported graphs on ONNX Runtime, called as by a stream, against the PyTorch step modules on a whole row.

The reference makes one call per graph over the whole sequence. The graphs make many calls, single steps and chunks,
with their own caches. Each graph reads the reference's intermediate values, so that errors do not add up over graphs.

Error of an output: max |got - want| / max(1, |want|), where |want| is the largest of the vector (logits of a position,
state of a byte): the rounding errors of every element of a product are as large as its largest terms allow.
A number that is not finite counts as infinite error.

Tolerance in float32: 2e-5. A model with large weights or many layers may have more noise than that: its own PyTorch
modules in float32 are as far from the same modules in float64. Where an error is above the tolerance, this noise is
measured on the same inputs, and the tolerance is NOISES times it. Above LARGEST_NOISE the tolerance does not follow: an
error of a graph could no longer be told from noise. In `tests/export/verify/test_noise.py` the graphs of a noisy model
are within half of its noise, and one matrix in error by 1 % is at 2,000 times the noise.

Hash tables in 8 bits: max |got - want| relative to the largest error that rounding can cause, half a step of each row.

Half precision differs from float32 by design: the error of an output is its relative root mean square, as below. The
tolerances are those of one rounding, 2^-11 and 2^-8, with room for ten and more that add up over the layers. bfloat16
has no kernels on CPUs, so the graph is emulated there (`verify.emulate`).

Quantised graphs differ from float32 by design, so they are checked in two ways (and by `verify.text`):
- `<graph>.weights`: the weights that the written codes represent against the float weights, the worst block
  (`blockwise.block_error`). The largest error of rounding is known. So one wrong scale, one block with swapped halves
  of its bytes or one block in another's place fails, even if the outputs hide it.
- each output: root mean square of got - want over all of it, relative to that of want; single elements of rare ids
  have larger errors. Measured with the demo model, random weights and shape S of benchmarks/generation.py, rounded
  activations included: 0.1 to 4 % at 8 bits, 1 to 38 % at 4 bits. The tolerance leaves room for deeper models. A graph
  that interprets its codes differently than they were written gives 100 % and more.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from blt.checkpoint.models import Checkpoint
from blt.model.hashing import HashEmbedding as TableEmbedding
from blt.model.layers import RotaryTable
from blt_runtime.backends.onnx import EXPAND, load_library
from blt_runtime.bundle.manifest import Parity
from blt_runtime.bundle.spec import GraphSpec, HashSpec, ModelSpec, TensorSpec
from blt_runtime.errors import CheckFailed
from blt_runtime.hashing import HashEmbedding, hash_ids

from ..passes.halve import HALVES
from ..quantize.matrices import FORMATS, Packed, read_error
from .errors import MEASURES, TOLERANCE, largest, measure_of
from .plan import Plan, graph_calls, make_plan

NOISES = 4.0
"""Tolerance in multiples of the measured noise: graph and PyTorch each have it, and their roundings differ."""
LARGEST_NOISE = 5e-4
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
HALF_STEPS = 1.01
"""Tolerance of hash tables in 8 bits, in half steps; a hundredth for the roundings of float32."""
MIN_ONNXRUNTIME = "1.30"
PREPACK_UP_TO = 1 << 30
"""Bytes of a graph's weights beyond which they stay mapped: a packed copy and PyTorch's weights would not fit."""
Arrays = dict[str, npt.NDArray[Any]]
log = logging.getLogger("blt_export")


@dataclass(frozen=True)
class ParityReport:
    """The table, and the positions where an error of the entropy could move a patch boundary: those within `margin`
    (relative, like the errors) of the threshold. It is the tolerance; at half precision twice the largest error.

    A quantised entropy model may move boundaries anywhere: no positions are listed for it, `verify.text` counts them.
    """

    rows: tuple[Parity, ...]
    near_threshold: tuple[int, ...]
    margin: float = 0.0


def check_parity(
    checkpoint: Checkpoint,
    steps: Mapping[str, nn.Module],
    spec: ModelSpec,
    *,
    files: Mapping[str, Path],
    hash_tables: Mapping[str, Path],
    precisions: Mapping[str, str] | None = None,
    packed: Mapping[str, tuple[Packed, ...]] | None = None,
) -> ParityReport:
    """Compare every output of every graph, the embeddings from the written hash tables, and quantised weights.

    precisions: of graphs that are not "fp32"; packed: their weights.

    Raises CheckFailed, with the output and its largest error.
    """
    plan = make_plan(spec)
    precisions, packed = precisions or {}, packed or {}
    inputs = _row_inputs(checkpoint, spec, plan)
    rows: list[Parity] = []
    noises: dict[str, float] = {}
    margin = 0.0
    for name, hashed in checkpoint.hash_embeddings.items():
        hash, want_ND = spec.hashes[name], inputs[name]["hash_embedding"]
        written_ND = _hash_embedding(hash_tables[name], hash, plan.ids_N)
        error, measure = largest(written_ND, want_ND), measure_of("fp32")
        if hash.dtype == "int8":
            error, measure = _in_half_steps(hashed, hash, written_ND, want_ND, plan.ids_N), "step"
        output = "hash_embedding" if name == "encoder" else f"{name}.hash_embedding"
        tolerance = _table_tolerance(hashed, hash, TOLERANCE["fp32"])
        rows.append(Parity(output, error, tolerance, len(plan.ids_N), measure))
    entropy_N = np.zeros(0)
    for name, graph in spec.graphs.items():
        precision = precisions.get(name, "fp32")
        if packed.get(name):
            rows.append(_weights_row(name, files[name], packed[name]))
        want = _reference(steps[name], graph, inputs[name])
        got = _exported(files[name], graph, spec, inputs[name], precision in FORMATS)
        found = []
        for tensor in _plain(graph.outputs, graph):
            measure = measure_of(precision)
            error = MEASURES[measure](got[tensor.name], want[tensor.name])
            positions = want[tensor.name].shape[1]
            found.append(Parity(f"{name}.{tensor.name}", error, TOLERANCE[precision], positions, measure))
        if precision == "fp32" and any(row.error > row.tolerance for row in found):
            of_graph = _noise(steps[name], graph, inputs[name], want)
            noises |= {f"{name}.{output}": noise for output, noise in of_graph.items()}
            found = [following(row, noises[row.output]) for row in found]
        rows += found
        if name == "entropy" and precision not in FORMATS:
            entropy_N = want["entropy"][0]
            margin = next(row.tolerance for row in found if row.output == "entropy.entropy")
            if precision in HALVES:
                margin = 2 * largest(got["entropy"], want["entropy"])
        _pass_on(inputs, name, want)
    demand(rows, noises=noises)
    return ParityReport(tuple(rows), _near(entropy_N, spec, margin), margin)


def following(row: Parity, noise: float) -> Parity:
    """The row with a tolerance that follows the model's own noise. If that decides, a warning names both."""
    tolerance = NOISES * noise
    if not row.tolerance < tolerance <= NOISES * LARGEST_NOISE:
        return row
    if row.tolerance < row.error <= tolerance:
        log.warning(
            "%s differs by %.3g: this model's own float32 noise is %.3g, so the tolerance is %.3g instead of %.3g",
            row.output, row.error, noise, tolerance, row.tolerance,
        )  # fmt: skip
    return replace(row, tolerance=tolerance)


def _noise(step: nn.Module, graph: GraphSpec, inputs: Arrays, want: Arrays) -> dict[str, float]:
    """The error of the PyTorch module in float32 (`want`) against the same module in float64, by output. Rotary angles
    are part of it: at position p, float32 rounds them by up to p * 2^-24."""
    exact = copy.deepcopy(step).double()
    for module in exact.modules():
        if isinstance(module, RotaryTable):
            module.make_buffers(torch.float64)
    doubles = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in inputs.items()}
    found = _reference(exact, graph, doubles, torch.float64)
    return {name: largest(want[name].astype(np.float64), value.astype(np.float64)) for name, value in found.items()}


def _weights_row(name: str, file: Path, packed: tuple[Packed, ...]) -> Parity:
    """The row of a graph's quantised weights; its `positions` are blocks."""
    blocks = sum(weight.weights // weight.form.block for weight in packed)
    return Parity(f"{name}.weights", read_error(file, packed), packed[0].form.largest_error, blocks, "block")


def _row_inputs(checkpoint: Checkpoint, spec: ModelSpec, plan: Plan) -> dict[str, Arrays]:
    """Inputs of each graph over the whole row, one row; `_pass_on` adds the outputs of other graphs."""
    inputs: dict[str, Arrays] = {}
    for name in spec.graphs:
        start = plan.doc_start[name]
        inputs[name] = {"positions": np.arange(len(start))[None], "doc_start": start[None]}
        if name in ("entropy", "encoder"):
            inputs[name]["ids"] = plan.ids_N[None]
    for name, hashed in checkpoint.hash_embeddings.items():
        with torch.no_grad():
            inputs[name]["hash_embedding"] = hashed(torch.from_numpy(plan.ids_N[None])).numpy()
    inputs["latent"].update(
        byte_index=plan.byte_index_PL[None], patch_length=plan.patch_length_P[None], own_start=plan.own_start_P[None]
    )
    inputs["decoder"]["patch_row"] = plan.patch_row_NW[None]
    return inputs


def _table_tolerance(hashed: TableEmbedding, spec: HashSpec, exact: float) -> float:
    """Tables in the checkpoint's dtype are the same numbers. A sum over T narrower ones has T roundings, each of half a
    unit in the last place."""
    if spec.dtype == "int8":
        return HALF_STEPS
    if hashed.stored_as == spec.dtype or spec.dtype == "float32":
        return exact
    return spec.tables * ROUNDING[spec.dtype]


def _in_half_steps(
    hashed: TableEmbedding, spec: HashSpec, got: npt.NDArray[Any], want: npt.NDArray[Any], ids_N: npt.NDArray[np.int64]
) -> float:
    """The largest error of a position, relative to the sum over tables of half a step (a row's largest value / 254)."""
    row_NT = torch.from_numpy(hash_ids(ids_N, spec.sizes, spec.functions, spec.rows))
    half_N = np.zeros(len(ids_N))
    for t in range(spec.tables):
        with torch.no_grad():
            half_N += hashed.table(t)[row_NT[:, t]].double().abs().amax(-1).numpy() / 254
    if not np.isfinite(got).all():
        return math.inf
    error_N = np.abs(got[0].astype(np.float64) - want[0]).max(-1)
    return float((error_N / np.maximum(half_N, np.finfo(np.float32).tiny)).max(initial=0.0))


def _hash_embedding(tables: Path, spec: HashSpec, ids_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """The embedding that the runtime computes from the written tables: [1, N, D]."""
    embedding = HashEmbedding(np.load(tables, mmap_mode="r"), spec.sizes, spec.functions, spec.rows)
    out_ND = np.empty((len(ids_N), spec.dim), np.float32)
    embedding.many(np.concatenate([np.zeros(max(spec.sizes) - 1, np.int64), ids_N]), out_ND)
    return out_ND[None]


def _pass_on(inputs: dict[str, Arrays], name: str, outputs: Arrays) -> None:
    if name == "encoder":
        inputs["latent"]["byte_states"] = outputs["byte_states"][0]
        inputs["decoder"]["byte_states"] = outputs["byte_states"]
    elif name == "latent":
        inputs["decoder"]["patch_kv"] = outputs["patch_kv"][0]


def _plain(tensors: tuple[TensorSpec, ...], graph: GraphSpec) -> list[TensorSpec]:
    """The tensors that are not caches."""
    caches = {*graph.aliases, *graph.aliases.values()}
    return [t for t in tensors if t.name not in caches]


def _reference(step: nn.Module, graph: GraphSpec, inputs: Arrays, dtype: torch.dtype = torch.float32) -> Arrays:
    """Plain outputs of one PyTorch call over the whole row, with caches that hold all of it."""
    names = _plain(graph.inputs, graph)
    slots = inputs["positions"].shape[1]
    cached = [t for t in graph.inputs if t not in names]
    caches = [torch.zeros(1, t.shape[1], slots, t.shape[3], dtype=dtype) for t in cached]  # type: ignore[arg-type]
    with torch.no_grad():
        outputs = step(*(torch.from_numpy(np.ascontiguousarray(inputs[t.name])) for t in names), *caches)
    named = zip(graph.outputs, outputs, strict=True)
    return {t.name: value.numpy() for t, value in named if t.name not in graph.aliases}


def _exported(path: Path, graph: GraphSpec, spec: ModelSpec, inputs: Arrays, quantised: bool) -> Arrays:
    """The same outputs of the exported graph, call after call."""
    run = GraphRun(path, graph, quantised=quantised)
    pieces: dict[str, list[npt.NDArray[Any]]] = {t.name: [] for t in _plain(graph.outputs, graph)}
    start_N = inputs["doc_start"][0]
    for a, b in graph_calls(len(start_N), graph, spec, start_N):
        given = {t.name: _positions(inputs[t.name], t, a, b).astype(t.dtype) for t in _plain(graph.inputs, graph)}
        for name, value in run(given).items():
            pieces[name].append(value.astype(np.float32))
    return {name: np.concatenate(values, 1) for name, values in pieces.items()}


def _positions(value: npt.NDArray[Any], tensor: TensorSpec, a: int, b: int) -> npt.NDArray[Any]:
    """Positions a..b of an input; pools (no B in their shape) are passed whole."""
    return np.ascontiguousarray(value[:, a:b] if tensor.shape[0] == "B" else value)


class GraphRun:
    """One graph with its caches on ONNX Runtime's CPU provider; present and past are the same memory."""

    def __init__(self, path: Path, graph: GraphSpec, rows: int = 1, quantised: bool = False) -> None:
        onnxruntime = load_library(MIN_ONNXRUNTIME)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        weights = path.with_suffix(".weights")
        if weights.exists() and weights.stat().st_size > PREPACK_UP_TO and not quantised:  # see `matrices`
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry(*EXPAND)
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._graph = graph
        cached = set(graph.aliases.values())
        self.caches = {t.name: np.zeros(t.resolve(B=rows), t.dtype) for t in graph.inputs if t.name in cached}

    def __call__(self, inputs: Arrays) -> Arrays:
        binding = self._session.io_binding()
        for name, array in {**inputs, **self.caches}.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for tensor in self._graph.outputs:
            source = self._graph.aliases.get(tensor.name)
            if source is None:
                binding.bind_output(tensor.name, "cpu")
            else:
                cache = self.caches[source]
                binding.bind_output(tensor.name, "cpu", 0, cache.dtype, cache.shape, cache.ctypes.data)
        self._session.run_with_iobinding(binding)
        results = dict(zip((t.name for t in self._graph.outputs), binding.get_outputs(), strict=True))
        return {name: value.numpy() for name, value in results.items() if name not in self._graph.aliases}


def demand(rows: Sequence[Parity], reference: str = "PyTorch", noises: Mapping[str, float] | None = None) -> None:
    """Raises CheckFailed, with the row of the largest error, unless all are within their tolerance.

    noises: the measured float32 noise of the model by output; the message says whether the error can be noise."""
    bad = [row for row in rows if not row.error <= row.tolerance]
    if bad:
        worst = max(bad, key=lambda row: row.error)
        raise CheckFailed(
            f"parity: {worst.output} differs from {reference} by {worst.error:.3g} "
            f"(tolerance {worst.tolerance:.3g}){_cause((noises or {}).get(worst.output))}; no bundle was written"
        )


def _cause(noise: float | None) -> str:
    if noise is None:
        return ""
    if noise > LARGEST_NOISE:
        return f": this model's own float32 noise is {noise:.3g}, too large to tell an error of the graph from it"
    return f": the graph is wrong, since this model's own float32 noise is only {noise:.3g}"


def _near(entropy_N: npt.NDArray[Any], spec: ModelSpec, margin: float) -> tuple[int, ...]:
    """Positions where an error within the margin could move a patch boundary."""
    rule = spec.patch_rule
    level = rule.threshold
    if level is None or not len(entropy_N):
        return ()
    margin_N = margin * np.maximum(1.0, entropy_N)
    rise_N = np.diff(entropy_N, prepend=np.inf)
    near_N = np.abs((rise_N if rule.monotonic else entropy_N) - level) <= margin_N
    if rule.threshold_add is not None and not rule.monotonic:
        near_N |= np.abs(rise_N - rule.threshold_add) <= margin_N
    return tuple(int(i) for i in np.flatnonzero(near_N))
