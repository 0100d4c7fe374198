"""The functions of `pipeline.STEPS`. Each updates the `ExportState` and returns a summary of what it changed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from blt.checkpoint.models import Checkpoint, stored_tables
from blt.evaluate.provider_check import MOST_MOVED
from blt.model.steps import make_steps
from blt_runtime.backends.onnx import ROWS_MINIMUM, load_library
from blt_runtime.bundle import graph_file
from blt_runtime.bundle import manifest as manifests
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.manifest import FileRef, Manifest, around_codes
from blt_runtime.bundle.spec import TABLES_OF_DEVICES, GraphSpec, ModelSpec, resident_spec, row_spec, table_spec
from blt_runtime.errors import BackendError, BundleError, UsageError

from . import bundle
from .capture import trace
from .lower import cuda, ort, portable
from .passes import batch_rows, fold_doubling, gather_tables, halve, join_products, keep_states
from .quantize import matrices
from .rewrite import diff, op_counts
from .rules import GRAPH
from .specs import FLAVOURS, Flavour
from .state import ExportState
from .verify import batched, emulate, parity, text
from .versions import installed

log = logging.getLogger("blt_export")


def each(
    run: Callable[[ir.Model], object], *, flavours: tuple[Flavour, ...] = FLAVOURS
) -> Callable[[ExportState], str]:
    """A step that runs a pass over every graph and returns how the operators changed. flavours: skip any other one."""
    return each_with_spec(lambda model, _: run(model), flavours=flavours)


def each_with_spec(
    run: Callable[[ir.Model, GraphSpec], object], *, flavours: tuple[Flavour, ...] = FLAVOURS
) -> Callable[[ExportState], str]:
    """The same for a pass that also reads the graph's specification."""

    def over_all(state: ExportState) -> str:
        if state.flavour not in flavours:
            return "not in this flavour"
        changes = []
        for name, model in state.graphs.items():
            before = op_counts(model)
            try:
                run(model, state.spec.graphs[name])
            except ValueError as error:
                raise ValueError(f"graph {name}: {error}") from error
            changes.append(f"{name}: {diff(before, op_counts(model))}")
        return "; ".join(changes)

    return over_all


def make_modules(state: ExportState) -> str:
    blt, _ = state.checkpoint.require_blt()
    state.modules = make_steps(
        blt,
        state.checkpoint.entropy,
        capacity_bytes=state.spec.capacity_bytes,
        capacity_patches=state.spec.capacity_patches,
    )
    return ", ".join(state.modules)


def capture_graphs(state: ExportState) -> str:
    for name, graph in state.spec.graphs.items():
        if name not in state.captured:
            try:
                state.captured[name] = trace.capture(state.modules[name], graph)
            except RuntimeError as error:
                raise RuntimeError(f"graph {name}: {error}") from error
        state.graphs[name] = state.captured[name].clone()
        state.graphs[name].meta[GRAPH] = name
    return _node_counts(state.graphs)


def lower(state: ExportState) -> str:
    return each_with_spec({"portable": portable.lower, "ort": ort.lower, "cuda": cuda.lower}[state.flavour])(state)


def join(state: ExportState) -> str:
    """For the kernels of ONNX Runtime: all products in graphs that are quantised next. In the flavour ort, the products
    of each attention in the others."""
    if state.flavour == "portable":
        return "not in this flavour"
    formats = matrices.OF_FLAVOUR[state.flavour]
    joined = {}
    for name, precision in state.precisions.items():
        if precision in formats:
            joined[name] = join_products.run(state.graphs[name], formats[precision].block)
        elif state.flavour == "ort":
            joined[name] = join_products.run(state.graphs[name], attentions_only=True)
    return ", ".join(f"{name}: -{count} MatMul" for name, count in joined.items()) or "nothing is quantised"


def fold_doublings(state: ExportState) -> str:
    """Not in half precision, where small weights would lose bits."""
    if state.flavour != "ort":
        return "not in this flavour"
    whole = [name for name, precision in state.precisions.items() if precision not in halve.HALVES]
    return ", ".join(f"{name}: -{fold_doubling.run(state.graphs[name])} Mul" for name in whole) or "half precision"


def quantise(state: ExportState) -> str:
    """Graphs with a precision of 8 or 4 bits. One without a matrix that fits has floats, with a warning. Raises
    UsageError if no graph has one, since the bundle would name a precision that it does not have."""
    wanted = {name: p for name, p in state.precisions.items() if p in matrices.FORMATS}
    for name, precision in wanted.items():
        outcome = state.quantised[name] = matrices.run(state.graphs[name], precision, state.flavour)
        if not outcome.packed:
            state.precisions[name] = around_codes(state.flavour)
            log.warning("nothing in the graph %s could become %s: %s", name, precision, "; ".join(outcome.kept))
    if state.precision != "fp32" and state.precision not in state.precisions.values():
        reasons = dict.fromkeys(
            reason.split(": ")[-1] for outcome in state.quantised.values() for reason in outcome.kept
        )
        raise UsageError(
            f"precision {state.precision}: no matrix of this model can have it ({'; '.join(list(reasons)[:3])}): "
            "export at fp32"
        )
    return ". ".join(f"{name}, {wanted[name]}: {state.quantised[name]}" for name in wanted) or "not asked for"


def halve_graphs(state: ExportState) -> str:
    """Graphs of half precision. The specification then has half caches."""
    computed = matrices.activations(state.precisions, state.flavour)
    wanted = {name: p for name, p in computed.items() if p in halve.HALVES}
    state.spec = halve.half_spec(state.spec, computed)
    changed = {name: halve.run(state.graphs[name], precision) for name, precision in wanted.items()}
    return ", ".join(f"{name}: {count} constants" for name, count in changed.items()) or "not asked for"


def write_graphs(state: ExportState) -> str:
    for name, model in state.graphs.items():
        state.files[name] = bundle.write_graph(model, state.folder, name)
    return _node_counts(state.graphs)


def write_batched_graphs(state: ExportState) -> str:
    """The batched graphs, on the weights that were just written. Those for devices keep byte states too."""
    if state.flavour == "portable":
        return "not in this flavour"
    written = {name: ir.load(path) for name, path in state.files.items()}
    refused = [name for name, model in written.items() if not batch_rows.supports(model, state.spec.graphs[name])]
    if refused:
        return f"not possible: attention of {', '.join(refused)} is not GroupQueryAttention"
    made = {name: batch_rows.run(model, state.spec.graphs[name]) for name, model in written.items()}
    if state.flavour == "cuda":
        wanted = resident_spec(state.spec).graphs
        made = {name: keep_states.run(model, row_spec(wanted[name])) for name, model in made.items()}
        if state.spec.hash is not None and state.spec.hash.dtype in TABLES_OF_DEVICES:
            gathering = table_spec(row_spec(wanted["encoder"]), state.spec.hash)
            model = gather_tables.run(made["encoder"], gathering)
            state.table_file = bundle.write_variant(model, state.folder, "encoder", "tables")
    state.row_files = {name: bundle.write_variant(model, state.folder, name, "rows") for name, model in made.items()}
    return _node_counts(made)


def write_resident_graphs(state: ExportState) -> str:
    """For devices: the graphs that keep byte states and patch vectors, on the weights that were just written."""
    if state.flavour != "cuda":
        return "not in this flavour"
    wanted = resident_spec(state.spec).graphs
    made = {name: keep_states.run(ir.load(path), wanted[name]) for name, path in state.files.items()}
    state.resident_files = {
        name: bundle.write_variant(model, state.folder, name, "device") for name, model in made.items()
    }
    return _node_counts(made)


def write_hash_tables(state: ExportState) -> str:
    written = []
    for name, hashed in state.checkpoint.hash_embeddings.items():
        path, dtype = state.folder / bundle.HASH_TABLES[name], state.spec.hashes[name].dtype
        bundle.write_hash_tables(stored_tables(hashed), path, dtype)
        written.append(f"{name}: {path.stat().st_size} bytes, {dtype}")
    return ", ".join(written) or "the model has none"


def check_parity(state: ExportState) -> str:
    if not state.check:
        return "not asked for"
    with _runnable(state) as (folder, spec):
        state.parity = parity.check_parity(
            state.checkpoint,
            state.modules,
            spec,
            files={name: folder / path.name for name, path in state.files.items()},
            hash_tables={name: state.folder / bundle.HASH_TABLES[name] for name in state.spec.hashes},
            precisions=state.precisions,
            packed={name: outcome.packed for name, outcome in state.quantised.items()},
        )
    near = len(state.parity.near_threshold)
    if near and state.precisions.get("entropy", "fp32") == "fp32":
        log.warning("%d of the checked positions have an entropy within tolerance of the threshold", near)
    return ", ".join(f"{row.output} {row.error:.1e}" for row in state.parity.rows)


@contextlib.contextmanager
def _runnable(state: ExportState) -> Iterator[tuple[Path, ModelSpec]]:
    """The folder of the written graphs, and their specification; in bfloat16, that of emulations in float32."""
    if "bf16" not in state.precisions.values():
        yield state.folder, state.spec
        return
    with emulate.graphs(state.files, state.folder.parent) as folder:
        yield folder, emulate.float_spec(state.spec)


def make_manifest(state: ExportState) -> str:
    """Raises ValueError if the runtime would refuse a graph (`blt_runtime.bundle.graph_file`)."""
    files = bundle.entries(state.folder)
    tables = {name: FileRef(bundle.HASH_TABLES[name]) for name in state.spec.hashes}
    state.manifest = Manifest(
        producer=producer(),
        flavour=state.flavour,
        precision=state.precision,
        opset=trace.OPSET,
        min_onnxruntime=parity.MIN_ONNXRUNTIME,
        config=configurations(state.checkpoint),
        spec=state.spec,
        graphs={name: FileRef(path.name) for name, path in state.files.items()},
        hash_tables=tables.get("encoder"),
        entropy_tables=tables.get("entropy"),
        files=files,
        parity=state.parity.rows,
        precisions=state.precisions,
        row_graphs={name: FileRef(path.name) for name, path in state.row_files.items()},
        resident_graphs={name: FileRef(path.name) for name, path in state.resident_files.items()},
        table_graph=FileRef(state.table_file.name) if state.table_file else None,
        chat_template=state.chat_template,
    )
    gathering = {"encoder": state.manifest.table_graph} if state.manifest.table_graph else {}
    for refs in (state.manifest.graphs, state.manifest.row_graphs, state.manifest.resident_graphs, gathering):
        for name, ref in refs.items():
            try:
                graph_file.read_graph(state.folder, ref.file, state.manifest, state.manifest.precision_of(name))
            except BundleError as error:
                raise ValueError(str(error)) from error
    return f"{len(files)} files, {sum(entry.bytes for entry in files.values())} bytes"


def check_batched_parity(state: ExportState) -> str:
    assert state.manifest is not None
    if not state.check or not state.row_files:
        return "nothing to check"
    if "bf16" in state.precisions.values():
        return "not possible here: bfloat16 has no kernels on CPUs"
    try:
        load_library(ROWS_MINIMUM)
    except BackendError as error:
        log.warning("the batched graphs were not checked: %s", error)
        return "not possible here"
    found = batched.check(Bundle(state.folder, state.manifest))
    state.parity = replace(state.parity, rows=(*state.parity.rows, *found))
    state.manifest = replace(state.manifest, parity=state.parity.rows)
    return ", ".join(f"{row.output} {row.error:.1e}" for row in found)


def evaluate_on_text(state: ExportState) -> str:
    assert state.manifest is not None
    if not state.eval_ids:
        return "no text was given"
    with emulate.on_cpu(Bundle(state.folder, state.manifest), state.folder.parent) as model:
        found = text.evaluate(state.checkpoint, model, state.eval_ids)
    state.manifest = replace(state.manifest, judged=found)
    moved = (found.boundaries_lost + found.boundaries_new) / max(1, found.boundaries)
    precision = state.precisions.get("entropy", "fp32")
    if moved > MOST_MOVED and precision != "fp32":
        log.warning(
            "%.2f %% of the patch boundaries move, because the entropy model is %s: consider --precision-of entropy=%s",
            100 * moved, precision, "fp32" if precision == "fp16" or state.flavour == "ort" else "fp16",
        )  # fmt: skip
    return f"{found.float_bits_per_byte:.4f} bits per byte in float32, {found.bits_per_byte:.4f} in the bundle"


def write_manifest(state: ExportState) -> str:
    assert state.manifest is not None
    manifests.write(state.folder / manifests.FILE_NAME, state.manifest)
    return manifests.FILE_NAME


def producer() -> dict[str, str]:
    """Versions of the packages that made the bundle."""
    return installed("blt-lm", "blt-runtime", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def configurations(checkpoint: Checkpoint) -> dict[str, Any]:
    models = (("blt", checkpoint.blt), ("entropy", checkpoint.entropy))
    return {name: model.config.model_dump(mode="json") for name, model in models if model is not None}


def _node_counts(graphs: dict[str, ir.Model]) -> str:
    return ", ".join(f"{name}: {len(model.graph)} nodes" for name, model in graphs.items())
