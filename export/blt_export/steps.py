"""The functions of the list `pipeline.STEPS`: each changes one `Job` and returns what it changed, for people."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import onnx_ir as ir

from blt.checkpoint.models import Checkpoint, stored_tables
from blt.model.steps import make_steps
from blt_runtime.backends.onnx import ROWS_MINIMUM, load_library
from blt_runtime.bundle import manifest as manifests
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.manifest import FileRef, Manifest
from blt_runtime.bundle.spec import GraphSpec
from blt_runtime.errors import BackendError

from . import bundle
from .capture import trace
from .job import Job
from .lower import ort, portable
from .passes import batch_rows, join_products
from .quantize import matrices
from .rewrite import diff, op_counts
from .rules import GRAPH
from .specs import Flavour
from .verify import batched, parity, text

log = logging.getLogger("blt_export")


def each(run: Callable[[ir.Model], object], *, flavour: Flavour | None = None) -> Callable[[Job], str]:
    """A pass over every graph of the job (of one flavour, if given); returns how the operators changed."""
    over_all = each_with_spec(lambda model, _: run(model))
    return lambda job: over_all(job) if flavour in (None, job.flavour) else "not in this flavour"


def each_with_spec(run: Callable[[ir.Model, GraphSpec], object]) -> Callable[[Job], str]:
    """The same for a pass that reads the graph's specification, too."""

    def over_all(job: Job) -> str:
        changes = []
        for name, model in job.graphs.items():
            before = op_counts(model)
            try:
                run(model, job.spec.graphs[name])
            except ValueError as error:
                raise ValueError(f"graph {name}: {error}") from error
            changes.append(f"{name}: {diff(before, op_counts(model))}")
        return "; ".join(changes)

    return over_all


def make_modules(job: Job) -> str:
    blt, _ = job.checkpoint.require_blt()
    job.modules = make_steps(blt, job.checkpoint.entropy, job.spec.capacity_bytes, job.spec.capacity_patches)
    return ", ".join(job.modules)


def capture_graphs(job: Job) -> str:
    for name, graph in job.spec.graphs.items():
        if name not in job.captured:
            try:
                job.captured[name] = trace.capture(job.modules[name], graph)
            except RuntimeError as error:
                raise RuntimeError(f"graph {name}: {error}") from error
        job.graphs[name] = job.captured[name].clone()
        job.graphs[name].meta[GRAPH] = name
    return _node_counts(job.graphs)


def lower(job: Job) -> str:
    return each_with_spec({"portable": portable.lower, "ort": ort.lower}[job.flavour])(job)


def join(job: Job) -> str:
    """Only in graphs that are quantised next."""
    blocks = {name: matrices.FORMATS[p].block for name, p in job.precisions.items() if p != "fp32"}
    joined = {name: join_products.run(job.graphs[name], block) for name, block in blocks.items()}
    return ", ".join(f"{name}: -{count} MatMul" for name, count in joined.items()) or "nothing is quantised"


def quantise(job: Job) -> str:
    """Only the graphs that were asked for. One without a matrix that fits stays float32, with a warning."""
    wanted = {name: p for name, p in job.precisions.items() if p != "fp32"}
    for name, precision in wanted.items():
        outcome = job.quantised[name] = matrices.run(job.graphs[name], precision)
        if not outcome.packed:
            job.precisions[name] = "fp32"
            log.warning("nothing in the graph %s could become %s: %s", name, precision, "; ".join(outcome.kept))
    return ". ".join(f"{name}, {wanted[name]}: {job.quantised[name]}" for name in wanted) or "not asked for"


def write_graphs(job: Job) -> str:
    for name, model in job.graphs.items():
        job.files[name] = bundle.write_graph(model, job.folder, name)
    return _node_counts(job.graphs)


def write_batched_graphs(job: Job) -> str:
    """The batched graphs, on the weights that were just written."""
    written = {name: ir.load(path) for name, path in job.files.items()}
    refused = [name for name, model in written.items() if not batch_rows.takes(model, job.spec.graphs[name])]
    if refused:
        return f"not possible: attention of {', '.join(refused)} is not GroupQueryAttention"
    made = {name: batch_rows.run(model, job.spec.graphs[name]) for name, model in written.items()}
    job.row_files = {name: bundle.write_row_graph(model, job.folder, name) for name, model in made.items()}
    return _node_counts(made)


def write_hash_tables(job: Job) -> str:
    blt, _ = job.checkpoint.require_blt()
    if job.spec.hash is None:
        return "the model has none"
    path = bundle.write_hash_tables(stored_tables(blt), job.folder, job.spec.hash.dtype)
    return f"{path.stat().st_size} bytes, {job.spec.hash.dtype}"


def check_parity(job: Job) -> str:
    if not job.check:
        return "not asked for"
    job.parity = parity.check_parity(
        job.checkpoint,
        job.modules,
        job.spec,
        files=job.files,
        hash_tables=job.folder / bundle.HASH_TABLES,
        precisions=job.precisions,
        packed={name: outcome.packed for name, outcome in job.quantised.items()},
    )
    near = len(job.parity.near_threshold)
    if near:
        log.warning("%d of the checked positions have an entropy within tolerance of the threshold", near)
    return ", ".join(f"{row.output} {row.max_abs_error:.1e}" for row in job.parity.rows)


def make_manifest(job: Job) -> str:
    files = bundle.entries(job.folder)
    job.manifest = Manifest(
        producer=producer(),
        flavour=job.flavour,
        precision=job.precision,
        opset=trace.OPSET,
        min_onnxruntime=parity.MIN_ONNXRUNTIME,
        config=configurations(job.checkpoint),
        spec=job.spec,
        graphs={name: FileRef(path.name) for name, path in job.files.items()},
        hash_tables=FileRef(bundle.HASH_TABLES) if job.spec.hash else None,
        files=files,
        parity=job.parity.rows,
        precisions=job.precisions,
        row_graphs={name: FileRef(path.name) for name, path in job.row_files.items()},
    )
    return f"{len(files)} files, {sum(entry.bytes for entry in files.values())} bytes"


def check_batched_parity(job: Job) -> str:
    assert job.manifest is not None
    if not job.check or not job.row_files:
        return "nothing to check"
    try:
        load_library(ROWS_MINIMUM)
    except BackendError as error:
        log.warning("the batched graphs were not checked: %s", error)
        return "not possible here"
    found = batched.check(Bundle(job.folder, job.manifest))
    job.parity = replace(job.parity, rows=(*job.parity.rows, *found))
    job.manifest = replace(job.manifest, parity=job.parity.rows)
    return ", ".join(f"{row.output} {row.max_abs_error:.1e}" for row in found)


def evaluate_on_text(job: Job) -> str:
    assert job.manifest is not None
    if not job.eval_ids:
        return "no text was given"
    found = text.evaluate(job.checkpoint, Bundle(job.folder, job.manifest), job.eval_ids)
    job.manifest = replace(job.manifest, judged=found)
    return f"{found.float_bits_per_byte:.4f} bits per byte in float32, {found.bits_per_byte:.4f} in the bundle"


def write_manifest(job: Job) -> str:
    assert job.manifest is not None
    manifests.write(job.folder / manifests.FILE_NAME, job.manifest)
    return manifests.FILE_NAME


def producer() -> dict[str, str]:
    """Versions of the packages that made the bundle."""
    found = {}
    for name in ("blt-lm", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def configurations(checkpoint: Checkpoint) -> dict[str, Any]:
    models = (("blt", checkpoint.blt), ("entropy", checkpoint.entropy))
    return {name: model.config.model_dump(mode="json") for name, model in models if model is not None}


def _node_counts(graphs: dict[str, ir.Model]) -> str:
    return ", ".join(f"{name}: {len(model.graph)} nodes" for name, model in graphs.items())
