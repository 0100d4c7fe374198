"""The whole export, as one list of named steps.

`STEPS` runs from top to bottom on one `Job`; each step says what it changed, and how long it took is logged.
Up to `lower` both flavours are the same; nothing in the list changes numerics but `quantise`, which is off unless asked
for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from blt.checkpoint.models import Checkpoint, load, stored_tables
from blt.model.steps import make_steps
from blt_runtime.backends.onnx import ROWS_MINIMUM, load_library
from blt_runtime.bundle import manifest as manifests
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.manifest import FileRef, Manifest
from blt_runtime.errors import BackendError, BltError, UsageError
from blt_runtime.hashing import TABLE_DTYPES, TableDtype

from . import bundle
from .capture import capture
from .job import ExportReport, Job, Step, StepReport, each
from .lower import ort, portable
from .passes import (
    batch_rows,
    cleanup,
    fix_capacity,
    fold_constants,
    fold_weights,
    gather_once,
    join_products,
    name_io,
    read_slices,
    rotate_inside,
    simplify_gathers,
    simplify_reshapes,
)
from .quantize import quantize
from .specs import FLAVOURS, Flavour, export_spec
from .verify import parity, text
from .verify import rows as verify_rows

log = logging.getLogger("blt_export")

Progress = Callable[[str], None]


def make_modules(job: Job) -> str:
    blt, _ = job.checkpoint.require_blt()
    job.modules = make_steps(blt, job.checkpoint.entropy, job.spec.capacity_bytes, job.spec.capacity_patches)
    return ", ".join(job.modules)


def capture_graphs(job: Job) -> str:
    for name, graph in job.spec.graphs.items():
        if name not in job.captured:
            try:
                job.captured[name] = capture.capture(job.modules[name], graph)
            except RuntimeError as error:
                raise RuntimeError(f"graph {name}: {error}") from error
        job.graphs[name] = job.captured[name].clone()
    return ", ".join(f"{name}: {len(model.graph)} nodes" for name, model in job.graphs.items())


def lower(job: Job) -> str:
    lowering = {"portable": portable.lower, "ort": ort.lower}[job.flavour]
    return each(lowering)(job)


def join(job: Job) -> str:
    """Only in graphs that are quantised next."""
    wanted = {name: quantize.FORMATS[p].block for name, p in job.precisions.items() if p != "fp32"}
    went = {name: join_products.run(job.graphs[name], block) for name, block in wanted.items()}
    return ", ".join(f"{name}: -{count} MatMul" for name, count in went.items()) or "nothing is quantised"


def for_ort(run: Callable[[ir.Model], int]) -> Callable[[Job], str]:
    """A pass over every graph, in the flavour `ort` only."""
    return lambda job: each(lambda model, _: run(model))(job) if job.flavour == "ort" else "not in this flavour"


def quantise(job: Job) -> str:
    """Only the graphs that were asked for; one that has nothing to quantise is float32 and says so."""
    wanted = {name: p for name, p in job.precisions.items() if p != "fp32"}
    for name, precision in wanted.items():
        outcome = job.quantised[name] = quantize.run(job.graphs[name], precision)
        if not outcome.packed:
            job.precisions[name] = "fp32"
            log.warning("nothing in the graph %s could become %s: %s", name, precision, "; ".join(outcome.kept))
    return ". ".join(f"{name}, {wanted[name]}: {job.quantised[name]}" for name in wanted) or "not asked for"


def write_graphs(job: Job) -> str:
    for name, model in job.graphs.items():
        job.files[name] = bundle.write_graph(model, job.folder, name)
    return ", ".join(f"{name}: {len(model.graph)} nodes" for name, model in job.graphs.items())


def write_row_graphs(job: Job) -> str:
    """The graphs for many streams, on the weights that were just written."""
    written = {name: ir.load(path) for name, path in job.files.items()}
    refused = [name for name, model in written.items() if not batch_rows.takes(model, job.spec.graphs[name])]
    if refused:
        return f"not possible: attention of {', '.join(refused)} is not GroupQueryAttention"
    made = {name: batch_rows.run(model, job.spec.graphs[name]) for name, model in written.items()}
    job.row_files = {name: bundle.write_row_graph(model, job.folder, name) for name, model in made.items()}
    return ", ".join(f"{name}: {len(model.graph)} nodes" for name, model in made.items())


def write_hash_tables(job: Job) -> str:
    blt, _ = job.checkpoint.require_blt()
    if job.spec.hash is None:
        return "the model has none"
    path = bundle.write_hash_tables(stored_tables(blt), job.folder, job.spec.hash.dtype)
    return f"{path.stat().st_size} bytes, {job.spec.hash.dtype}"


def check_parity(job: Job) -> str:
    if not job.check:
        return "not asked for"
    tables = job.folder / bundle.HASH_TABLES
    packed = {name: outcome.packed for name, outcome in job.quantised.items()}
    job.parity = parity.check_parity(job.checkpoint, job.modules, job.spec, job.files, tables, job.precisions, packed)
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
        opset=capture.OPSET,
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


def check_row_parity(job: Job) -> str:
    assert job.manifest is not None
    if not job.check or not job.row_files:
        return "nothing to check"
    try:
        load_library(ROWS_MINIMUM)
    except BackendError as error:
        log.warning("the graphs for many streams were not checked: %s", error)
        return "not possible here"
    found = verify_rows.check(Bundle(job.folder, job.manifest))
    job.parity = replace(job.parity, rows=(*job.parity.rows, *found))
    job.manifest = replace(job.manifest, parity=job.parity.rows)
    return ", ".join(f"{row.output} {row.max_abs_error:.1e}" for row in found)


def judge_on_text(job: Job) -> str:
    assert job.manifest is not None
    if not job.eval_ids:
        return "no text was given"
    found = text.judge(job.checkpoint, Bundle(job.folder, job.manifest), job.eval_ids)
    job.manifest = replace(job.manifest, judged=found)
    return f"{found.float_bits_per_byte:.4f} bits per byte in float32, {found.bits_per_byte:.4f} in the bundle"


def write_manifest(job: Job) -> str:
    assert job.manifest is not None
    manifests.write(job.folder / manifests.FILE_NAME, job.manifest)
    return manifests.FILE_NAME


STEPS = (
    Step("make the step modules", make_modules),
    Step("capture", capture_graphs),
    Step("name inputs and outputs", each(name_io.run)),
    Step("fix the caches' capacity", each(fix_capacity.run)),
    Step("fold weights", each(lambda model, _: fold_weights.run(model))),
    Step("fold constants", each(lambda model, _: fold_constants.run(model))),
    Step("simplify gathers", each(lambda model, _: simplify_gathers.run(model))),
    Step("gather patches once", each(lambda model, _: gather_once.run(model))),
    Step("simplify reshapes", each(lambda model, _: simplify_reshapes.run(model))),
    Step("clean up", each(lambda model, _: cleanup.run(model))),
    Step("lower", lower),
    Step("read slices by one attention", for_ort(read_slices.run)),
    Step("join products", join),
    Step("rotate inside the attention", for_ort(rotate_inside.run)),
    Step("clean up again", each(lambda model, _: cleanup.run(model))),
    Step("quantise", quantise),
    Step("write graphs", write_graphs),
    Step("write graphs for many streams", write_row_graphs),
    Step("write hash tables", write_hash_tables),
    Step("parity", check_parity),
    Step("make the manifest", make_manifest),
    Step("parity of many streams", check_row_parity),
    Step("judge on text", judge_on_text),
    Step("write manifest", write_manifest),
)


def export(
    checkpoint: Checkpoint | str | Path,
    out_dir: str | Path,
    *,
    flavour: str = "ort",
    precision: str = "fp32",
    capacity: int | None = None,
    patches: int | None = None,
    chunk: int = 128,
    check: bool = True,
    force: bool = False,
    progress: Progress | None = None,
    table_dtype: str | None = None,
    precision_of: Mapping[str, str] | None = None,
    eval_ids: Sequence[npt.NDArray[np.int64]] = (),
) -> ExportReport:
    """Write a checkpoint as a bundle in the folder `out_dir`, which appears only when everything went well.

    flavour: "ort" (fastest on ONNX Runtime) or "portable" (standard operators: ONNX Runtime and TensorRT).
    capacity, patches: bytes and patches that one stream can hold. chunk: most bytes per call.
    check: compare every graph with PyTorch. force: replace a bundle that is there. progress: told each step's name.
    table_dtype: of the hash tables: "float32", "float16", "bfloat16" or "int8" (default: as in the checkpoint).
    precision: of the matrices, "fp32", "int8" or "int4" (the latter two in the flavour "ort"); precision_of: another
    one for some graphs ("entropy", "encoder", "latent", "decoder").
    eval_ids: pieces of a text, ids [N] with BOS in front: the manifest then says what the bundle's bits per byte are.

    Raises UsageError (arguments, target folder), CheckpointError, CheckFailed (parity), BltError (a model that the
    lowering cannot express).
    """
    job = make_job(checkpoint, flavour, precision, capacity, patches, chunk, check, table_dtype, precision_of)
    job.eval_ids = eval_ids
    return run(job, Path(out_dir), force, progress)


def run(job: Job, out: Path, force: bool = False, progress: Progress | None = None) -> ExportReport:
    """All steps, in order, into a folder that becomes `out` at the end."""
    reports: list[StepReport] = []
    with bundle.staged(out, force) as job.folder:
        for step in STEPS:
            if progress is not None:
                progress(step.name)
            started = time.perf_counter()
            changed = _run_step(step, job, reports)
            reports.append(StepReport(step.name, changed, time.perf_counter() - started))
            log.info("%s (%.2f s): %s", step.name, reports[-1].seconds, changed)
    assert job.manifest is not None
    nodes = {name: len(model.graph) for name, model in job.graphs.items()}
    return ExportReport(out, job.manifest, job.parity.near_threshold, nodes, tuple(reports))


def _run_step(step: Step, job: Job, before: list[StepReport]) -> str:
    """An error that a step did not expect names the step and the one before it."""
    try:
        return step.run(job)
    except (ValueError, RuntimeError) as error:
        where = f"step {step.name!r}" + (f" (after {before[-1].name!r})" if before else "")
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BltError(f"cannot export this model: {where}: {reason}; please report it") from error


def make_job(
    checkpoint: Checkpoint | str | Path,
    flavour: str,
    precision: str = "fp32",
    capacity: int | None = None,
    patches: int | None = None,
    chunk: int = 128,
    check: bool = True,
    table_dtype: str | None = None,
    precision_of: Mapping[str, str] | None = None,
) -> Job:
    """Check the arguments of an export and load the checkpoint."""
    check_arguments(flavour, precision, table_dtype, precision_of)
    known: Flavour = "ort" if flavour == "ort" else "portable"
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load(checkpoint, generates=True)
    spec = export_spec(loaded, known, capacity, patches, chunk, cast(TableDtype | None, table_dtype))
    precisions = quantize.choose(precision, precision_of or {}, spec.graphs)
    return Job(loaded, spec, known, precision, check, precisions)


def check_arguments(
    flavour: str, precision: str, table_dtype: str | None = None, precision_of: Mapping[str, str] | None = None
) -> None:
    """What can be said before a checkpoint is read. Raises UsageError."""
    if flavour not in FLAVOURS:
        raise UsageError(f"flavour {flavour!r}: choose one of {', '.join(FLAVOURS)}")
    quantize.check(flavour, precision, precision_of or {})
    if table_dtype is not None and table_dtype not in TABLE_DTYPES:
        raise UsageError(f"table_dtype {table_dtype!r}: choose one of {', '.join(TABLE_DTYPES)}")


def producer() -> dict[str, str]:
    """Versions of what made the bundle."""
    found = {}
    for name in ("blt-lm", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def configurations(checkpoint: Checkpoint) -> dict[str, Any]:
    parts = (("blt", checkpoint.blt), ("entropy", checkpoint.entropy))
    return {name: model.config.model_dump(mode="json") for name, model in parts if model is not None}
