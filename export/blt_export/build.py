"""`blt build`: TensorRT engines from a bundle of the flavour portable, for the GPU of this machine. Needs no PyTorch.

Each graph is made resident (`passes.keep_states`) in memory, where it still refers to the bundle's weights, then parsed
and built. The engines are opened, and a stream on them is compared with ONNX Runtime's CPU. Only then does the folder
appear (`blt_runtime.bundle.engines`).

Profiles, which are ranges of shapes that TensorRT optimises for
- step: one byte or one patch. The latent graph has one profile for each number of entries that a patch may have: 8, 16,
  32, ...
- pass: up to 16 bytes of a speculative pass.
- prefill: up to a chunk. The latent graph's scratch memory grows with patches times entries, so it has several: the
  more entries, the fewer patches, as `engine.prefill` cuts its calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import onnx_ir as ir

from blt import files
from blt_runtime import Model
from blt_runtime.backends.platform import Platform, open_engines
from blt_runtime.bundle import engines as stored
from blt_runtime.bundle.bundle import Bundle, entry_of
from blt_runtime.bundle.engines import Engines, EnginesFile, Flags, Plan, is_engines, plan_name
from blt_runtime.bundle.manifest import FILE_NAME, Parity
from blt_runtime.bundle.spec import AHEAD, DTYPE_BYTES, RESIDENT, GraphSpec, ModelSpec, resident_spec
from blt_runtime.engine.graphs import entries
from blt_runtime.engine.prefill import GATHER_BYTES
from blt_runtime.errors import BackendError, CheckFailed, UsageError
from blt_runtime.ids import EOS, encode
from blt_runtime.patching import PatchRule
from blt_runtime.stream import Stream

from .passes import keep_states
from .tensorrt import Built, Profile, Refused, build, logger, shapes_of
from .verify import emulate
from .verify.errors import MEASURES, TOLERANCE, measure_of
from .versions import installed

log = logging.getLogger("blt_export")
DEFAULTS = Flags()
PASS = 16
"""Bytes of the longest speculative pass with a profile of its own."""
WIDER = 8
"""Entries of a patch of one prefill profile over those of the one before."""
TEXT = "Grüße aus 東京: the quick brown fox jumps over the lazy dog; 1, 2, 3.\n"
STEPS = 24
"""Bytes of the parity text that are read one by one."""


@dataclass(frozen=True)
class Report:
    """The engines that were written, and by graph the layers and the seconds of the build."""

    path: Path
    file: EnginesFile
    layers: dict[str, int]
    seconds: dict[str, float]


def check_target(out: Path, force: bool) -> None:
    """Raises UsageError if `out` holds something that must not be replaced."""
    files.check_target(out, force, "engines", is_engines)


def check_bundle(bundle: Bundle) -> None:
    """Raises UsageError unless TensorRT has the operators of the bundle's graphs."""
    if bundle.manifest.flavour != "portable":
        raise UsageError(
            f"{bundle.path} is of the flavour {bundle.manifest.flavour}, but engines are built from portable: "
            "blt export MODEL -o DIR --flavour portable"
        )


def build_engines(
    bundle: Bundle,
    out: Path,
    platform: Platform,
    *,
    flags: Flags = DEFAULTS,
    timing_cache: Path | None = None,
    check: bool = True,
    force: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """Builds engines for all graphs of a bundle into the folder `out`, which appears complete or not at all.

    timing_cache: a file with TensorRT's measurements, read if it exists and written after each graph. check: compare a
    stream on the engines with ONNX Runtime's CPU. progress: receives the name of each step.

    Raises UsageError (flavour, `out`), BackendError (a graph is refused, an engine does not open) and CheckFailed.
    """
    check_bundle(bundle)
    check_target(out, force)
    stored.make_key()
    spec, trt = resident_spec(bundle.manifest.spec, cached=True), platform.trt
    plans, layers, seconds, trt_log = dict[str, Plan](), dict[str, int](), dict[str, float](), logger(trt)
    with files.staged(out) as work:
        for name, graph in spec.graphs.items():
            progress(name)
            ranges = profiles(spec, name)
            built = build_graph(bundle, graph, trt, trt_log, ranges, flags, timing_cache)
            (work / plan_name(name)).write_bytes(built.plan)
            entry = entry_of(work / plan_name(name))
            plans[name] = Plan(plan_name(name), entry.bytes, entry.sha256, tuple(map(dict, ranges)), graph.aliases)
            layers[name], seconds[name] = built.layers, built.seconds
            del built
        copyfile(bundle.path / FILE_NAME, work / FILE_NAME)
        if bundle.manifest.hash_tables is not None:
            copyfile(bundle.path / bundle.manifest.hash_tables.file, work / bundle.manifest.hash_tables.file)
        digest = entry_of(work / FILE_NAME).sha256
        producer = installed("blt-lm", "blt-runtime", "onnx-ir", "onnxruntime")
        file = EnginesFile(digest, producer, platform.machine, flags, plans)
        progress("parity")
        file = replace(file, parity=_parity(bundle, Engines(work, file, bundle.manifest), platform, check))
        stored.write(work, file)
    return Report(out, file, layers, seconds)


def profiles(spec: ModelSpec, name: str) -> list[Profile]:
    """The profiles of a resident graph, the narrowest first, since the first one that takes a call runs it."""
    graph, chunk = one_row(spec.graphs[name]), spec.chunk
    if name != "latent":
        steps = [(1, 1, 1), (1, min(4, chunk), min(PASS, chunk)), (1, chunk, chunk)]
        sizes = [[{"S": s} for s in range_] for range_ in dict.fromkeys(steps)]
    else:
        most = entries(longest_patch(spec.patch_rule, spec.encoder_window, spec.capacity_bytes))
        lengths = [entries(1)]
        while lengths[-1] < most:
            lengths.append(2 * lengths[-1])
        sizes = [[{"P": 1, "L": length}] * 3 for length in lengths]
        for shorter, longest in _prefill_lengths(spec, most):
            patches = max(min(chunk, AHEAD + 1), min(chunk, GATHER_BYTES // (_state_bytes(spec) * (shorter + 1))))
            usual = {"P": min(patches, max(1, chunk // 4)), "L": min(longest, 8)}
            sizes.append([{"P": 1, "L": 1}, usual, {"P": patches, "L": longest}])
    return [shapes_of(graph, *of) for of in sizes]


def one_row(graph: GraphSpec) -> GraphSpec:
    """The inputs with their number of rows, 1, in place of B: fewer sizes are unknown to TensorRT."""
    inputs = (replace(t, shape=tuple(1 if size == "B" else size for size in t.shape)) for t in graph.inputs)
    return replace(graph, inputs=tuple(inputs))


def _prefill_lengths(spec: ModelSpec, most: int) -> Iterator[tuple[int, int]]:
    """Entries of the prefill profiles: more than the first number, up to the second."""
    shorter, longest = 0, max(8, GATHER_BYTES // (_state_bytes(spec) * spec.chunk))
    while longest < most:
        yield shorter, longest
        shorter, longest = longest, WIDER * longest
    yield shorter, most


def longest_patch(rule: PatchRule, window: int, capacity: int) -> int:
    """Most bytes that a patch reads in a stream of `capacity` bytes: those of `window` patches, its own included."""
    longest = {"static": rule.patch_size, "byte": 1}.get(rule.scheme) or capacity
    if rule.max_patch_length is not None:
        longest = min(longest, rule.max_patch_length)
    return min(capacity, window * longest)


def _state_bytes(spec: ModelSpec) -> int:
    memory = spec.graphs["encoder"].tensor(RESIDENT["encoder"][1])
    width = memory.shape[-1]
    assert isinstance(width, int)
    return width * DTYPE_BYTES[memory.dtype]


def build_graph(
    bundle: Bundle,
    graph: GraphSpec,
    trt: Any,
    trt_log: Any,
    ranges: list[Profile],
    flags: Flags = DEFAULTS,
    timing_cache: Path | None = None,
) -> Built:
    """The engine of one resident graph. Raises BackendError."""
    path = bundle.graph_file(graph.name)
    model = keep_states.run(ir.load(path), graph)
    for value, tensor in zip(model.graph.inputs, one_row(graph).inputs, strict=True):
        value.shape = ir.Shape(list(tensor.shape))
    content = ir.to_proto(model).SerializeToString()
    configs = []

    def configure(config: Any) -> None:
        if flags.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, flags.workspace)
        if flags.hardware == "ampere+":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if timing_cache is not None:
            known = timing_cache.read_bytes() if timing_cache.exists() else b""
            cache = config.create_timing_cache(known)
            if cache is None or not config.set_timing_cache(cache, False):
                raise BackendError(f"{timing_cache} is no timing cache of this TensorRT and GPU: delete it")
        configs.append(config)

    try:
        built = build(trt, trt_log, graph, lambda parser: parser.parse(content, str(path)), ranges, configure)
    except Refused as error:
        raise BackendError(f"TensorRT {trt.__version__}: {error}") from error
    if timing_cache is not None:
        with files.atomic_file(timing_cache) as file:
            file.write(configs[0].get_timing_cache().serialize())
    return built


# --- parity ------------------------------------------------------------------------------------------------


def _parity(bundle: Bundle, engines: Engines, platform: Platform, check: bool) -> tuple[Parity, ...]:
    """Opens every engine and, if asked, compares. Raises BackendError and CheckFailed."""
    backend = open_engines(engines, platform)
    if not check:
        return ()
    model = Model(backend.spec, backend, bundle.hash_tables(), manifest=bundle.manifest)
    with emulate.on_cpu(bundle) as wanted:
        rows = compare(wanted, model, max(bundle.manifest.arithmetic(), key=TOLERANCE.__getitem__))
    wrong = [row for row in rows if not row.error <= row.tolerance]
    if wrong:
        listed = ", ".join(f"{row.output} {row.error:.1e} (tolerance {row.tolerance:.0e})" for row in wrong)
        raise CheckFailed(f"the engines differ from ONNX Runtime's CPU: {listed}")
    return rows


def compare(reference: Model, candidate: Model, precision: str) -> tuple[Parity, ...]:
    """A stream of each on the same text: a prompt over several chunks and two documents with the reference's patches,
    then single bytes, until the patches differ (they may, where an entropy is near the threshold)."""
    spec = reference.spec
    text = np.concatenate([encode(TEXT, bos=True), [EOS], encode(TEXT * (1 + 2 * spec.chunk // len(TEXT)), bos=False)])
    prompt = text[: min(len(text) - STEPS, spec.capacity_bytes - STEPS, spec.capacity_patches - STEPS)]
    rest = text[len(prompt) : len(prompt) + STEPS]
    wanted = reference.score(prompt)
    found = candidate.score(prompt, wanted.patch_lengths)
    rows = [_row("prompt.logits", found.logits, wanted.logits, precision)]
    if spec.patch_rule.needs_entropy:
        rows.append(_row("prompt.entropies", found.entropies[:, None], wanted.entropies[:, None], precision))
    pairs = list(_steps(reference.stream(bos=False), candidate.stream(bos=False), prompt, rest))
    if pairs:
        got, want = (np.stack(logits) for logits in zip(*pairs, strict=True))
        rows.append(_row("steps.logits", got, want, precision))
    return tuple(rows)


def _steps(reference: Stream, candidate: Stream, prompt: Any, rest: Any) -> Iterator[tuple[Any, Any]]:
    for some in (reference, candidate):
        some.append_ids(prompt)
    for id in rest:
        for some in (reference, candidate):
            some.append_ids([id])
        if not np.array_equal(reference.patch_lengths, candidate.patch_lengths):
            return
        yield candidate.logits.copy(), reference.logits.copy()


def _row(output: str, found_NV: Any, wanted_NV: Any, precision: str) -> Parity:
    """In float32 the largest error, relative to max(1, the largest of the position); else the relative root mean
    square."""
    found, wanted = found_NV[None], wanted_NV[None]
    measure = measure_of(precision)
    return Parity(output, MEASURES[measure](found, wanted), TOLERANCE[precision], len(wanted_NV), measure)
