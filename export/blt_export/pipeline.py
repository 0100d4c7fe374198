"""The whole export, as one list of named steps.

`STEPS` runs from top to bottom on one `ExportState`. Each step returns what it changed; the log shows it with the
seconds.
Up to "lower" all flavours are the same. Only "quantise" and "halve" change numerics; they do nothing unless asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from blt.checkpoint.models import Checkpoint, load
from blt_runtime.chat_template import ChatTemplate
from blt_runtime.errors import BltError, UsageError
from blt_runtime.hashing import TABLE_DTYPES, TableDtype

from . import bundle, steps
from .lower import cuda
from .passes import (
    cleanup,
    fix_capacity,
    fold_constants,
    fold_weights,
    free_capacity,
    gather_once,
    halve,
    name_io,
    pack_heads,
    read_slices,
    rotate_inside,
    simplify_gathers,
    simplify_reshapes,
)
from .quantize import matrices
from .specs import FLAVOURS, Flavour, export_spec
from .state import ExportReport, ExportState, Step, StepReport
from .steps import each, each_with_spec

CONTRIB_FLAVOURS: tuple[Flavour, ...] = ("ort", "cuda")
"""Attention is GroupQueryAttention of ONNX Runtime."""

STEPS = (
    Step("make the step modules", steps.make_modules),
    Step("capture", steps.capture_graphs),
    Step("name inputs and outputs", each_with_spec(name_io.run)),
    Step("fix the caches' capacity", each_with_spec(fix_capacity.run)),
    Step("fold weights", each(fold_weights.run)),
    Step("fold constants", each(fold_constants.run)),
    Step("simplify gathers", each(simplify_gathers.run)),
    Step("gather patches once", each(gather_once.run)),
    Step("simplify reshapes", each(simplify_reshapes.run)),
    Step("clean up", each(cleanup.run)),
    Step("lower", steps.lower),
    Step("pack heads", each(pack_heads.run, flavours=CONTRIB_FLAVOURS)),
    Step("read slices by one attention", each(read_slices.run, flavours=CONTRIB_FLAVOURS)),
    Step("fold doublings", steps.fold_doublings),
    Step("join products", steps.join),
    Step("rotate inside the attention", each(rotate_inside.run, flavours=CONTRIB_FLAVOURS)),
    Step("keep nodes on the device", each(cuda.finish, flavours=("cuda",))),
    Step("clean up again", each(cleanup.run)),
    Step("free the caches' capacity", each_with_spec(free_capacity.run, flavours=("ort", "portable"))),
    Step("quantise", steps.quantise),
    Step("halve", steps.halve_graphs),
    Step("write graphs", steps.write_graphs),
    Step("write batched graphs", steps.write_batched_graphs),
    Step("write graphs for devices", steps.write_resident_graphs),
    Step("write hash tables", steps.write_hash_tables),
    Step("parity", steps.check_parity),
    Step("make the manifest", steps.make_manifest),
    Step("parity of batched graphs", steps.check_batched_parity),
    Step("evaluate on text", steps.evaluate_on_text),
    Step("write manifest", steps.write_manifest),
)

log = logging.getLogger("blt_export")

Progress = Callable[[str], None]


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
    chat_template: str | None = None,
) -> ExportReport:
    """Write a checkpoint as a bundle in the folder `out_dir`, which appears only if every step succeeds.

    flavour: "ort" (fastest on CPUs), "cuda" (ONNX Runtime on GPUs, CUDA and WebGPU) or "portable" (standard
    operators: ONNX Runtime and TensorRT).
    capacity, patches: bytes and patches that one stream can hold. chunk: most bytes per call.
    check: compare every graph with PyTorch. force: replace an existing bundle. progress: called with each step's name.
    table_dtype: of the hash tables: "float32", "float16", "bfloat16" or "int8" (default: as in the checkpoint).
    precision: "fp32", "fp16" or "bf16" (the last not in the flavour "ort"); or "int8" or "int4", of the matrices only
    (in the flavours "cuda" and "portable" the rest is "fp16").
    precision_of: another precision for single graphs ("entropy", "encoder", "latent", "decoder").
    eval_ids: pieces of a text, ids [N] that begin with BOS; the manifest then holds the bundle's bits per byte on them.
    chat_template: Jinja source that makes a prompt of a chat's messages.

    Raises UsageError (arguments, target folder), CheckpointError, CheckFailed (parity), BltError (a model that the
    lowering cannot express).
    """
    state = prepare(
        checkpoint,
        flavour,
        precision=precision,
        capacity=capacity,
        patches=patches,
        chunk=chunk,
        check=check,
        table_dtype=table_dtype,
        precision_of=precision_of,
        eval_ids=eval_ids,
        chat_template=chat_template,
    )
    return run(state, Path(out_dir), force=force, progress=progress)


def prepare(
    checkpoint: Checkpoint | str | Path,
    flavour: str,
    *,
    precision: str = "fp32",
    capacity: int | None = None,
    patches: int | None = None,
    chunk: int = 128,
    check: bool = True,
    table_dtype: str | None = None,
    precision_of: Mapping[str, str] | None = None,
    eval_ids: Sequence[npt.NDArray[np.int64]] = (),
    chat_template: str | None = None,
) -> ExportState:
    """Check the arguments of an export and load the checkpoint. Arguments and errors are those of `export`."""
    check_arguments(flavour, precision, table_dtype=table_dtype, precision_of=precision_of)
    known = cast(Flavour, flavour)
    if chat_template is not None:
        ChatTemplate(chat_template)  # raises if it is none
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load(checkpoint, generates=True)
    dtype = cast(TableDtype | None, table_dtype)
    spec = export_spec(loaded, known, capacity=capacity, patches=patches, chunk=chunk, table_dtype=dtype)
    precisions = matrices.choose(precision, precision_of or {}, spec.graphs)
    halve.half_spec(spec, matrices.activations(precisions, flavour))  # raises if graphs would not fit each other
    state = ExportState(loaded, spec, known, precision=precision, check=check, precisions=precisions, eval_ids=eval_ids)
    return replace(state, chat_template=chat_template)


def check_arguments(
    flavour: str, precision: str, *, table_dtype: str | None = None, precision_of: Mapping[str, str] | None = None
) -> None:
    """The checks that need no checkpoint. Raises UsageError."""
    if flavour not in FLAVOURS:
        raise UsageError(f"flavour {flavour!r}: choose one of {', '.join(FLAVOURS)}")
    matrices.check(flavour, precision, precision_of or {})
    if table_dtype is not None and table_dtype not in TABLE_DTYPES:
        raise UsageError(f"table_dtype {table_dtype!r}: choose one of {', '.join(TABLE_DTYPES)}")


def run(state: ExportState, out: Path, *, force: bool = False, progress: Progress | None = None) -> ExportReport:
    """All steps, in order, into a folder that becomes `out` at the end."""
    reports: list[StepReport] = []
    with bundle.staged(out, force) as state.folder:
        for step in STEPS:
            if progress is not None:
                progress(step.name)
            started = time.perf_counter()
            changed = _run_step(step, state, reports)
            reports.append(StepReport(step.name, changed, time.perf_counter() - started))
            log.debug("%s (%.2f s): %s", step.name, reports[-1].seconds, changed)
    assert state.manifest is not None
    nodes = {name: len(model.graph) for name, model in state.graphs.items()}
    return ExportReport(
        out,
        manifest=state.manifest,
        near_threshold=state.parity.near_threshold,
        margin=state.parity.margin,
        nodes=nodes,
        steps=tuple(reports),
    )


def _run_step(step: Step, state: ExportState, before: list[StepReport]) -> str:
    """An error that a step did not expect is raised again with the names of the step and the one before it."""
    try:
        return step.run(state)
    except (ValueError, RuntimeError) as error:
        where = f"step {step.name!r}" + (f" (after {before[-1].name!r})" if before else "")
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BltError(f"cannot export this model: {where}: {reason}; please report it") from error
