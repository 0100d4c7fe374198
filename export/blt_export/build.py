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
- rows=N: engines of their own, of the padded graphs (`spec.padded_spec`), for N batched streams: one byte or patch of
  every row, or PADDED ones.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir

from blt import files
from blt_runtime import Model
from blt_runtime.arguments import whole
from blt_runtime.backends.platform import Platform, open_engines
from blt_runtime.backends.protocol import PaddedBackend
from blt_runtime.bundle import engines as stored
from blt_runtime.bundle.bundle import Bundle, entry_of
from blt_runtime.bundle.engines import (
    Engines,
    EnginesFile,
    Flags,
    Hardware,
    Machine,
    Plan,
    Rows,
    capability,
    is_engines,
    plan_name,
)
from blt_runtime.bundle.manifest import FILE_NAME, QUANTISED, Parity
from blt_runtime.bundle.spec import (
    AHEAD,
    DTYPE_BYTES,
    PADDED,
    RESIDENT,
    GraphSpec,
    ModelSpec,
    padded_spec,
    resident_spec,
)
from blt_runtime.engine.batch import Batch
from blt_runtime.engine.graphs import SHORTEST, entries
from blt_runtime.engine.prefill import GATHER_BYTES
from blt_runtime.engine.rows import padded_entries, padded_limits
from blt_runtime.errors import BackendError, CheckFailed, UsageError
from blt_runtime.ids import EOS, encode
from blt_runtime.patching import PatchRule
from blt_runtime.stream import Stream

from .graph_files import write_graph
from .passes import keep_states
from .quantize import eight_bit_floats
from .tensorrt import Built, Profile, Refused, build, logger, shapes_of
from .verify import emulate, rows
from .verify.errors import MEASURES, TOLERANCE, measure_of
from .versions import installed

log = logging.getLogger("blt_export")
DEFAULTS = Flags()
PASS = 16
"""Bytes of the longest speculative pass with a profile of its own."""
WIDER = 8
"""Entries of a patch of one prefill profile over those of the one before."""
TEXT = "Grüße aus 東京: the quick brown fox jumps over the lazy dog; 1, 2, 3.\n"
FP8_FROM = (8, 9)
FP8_GPUS = "GPUs of compute capability 8.9 or newer (Ada, Hopper)"
STEPS = 24
"""Bytes of the parity text that are read one by one."""
PARITY_TEXTS = 4
"""Different texts that batched streams read for parity; further rows read them again."""
MOST_ROWS = 1024


@dataclass(frozen=True)
class Report:
    """The engines that were written, and by step of the build ("latent", "latent.rows") the layers and the seconds."""

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


def rows_of(profiles: str) -> int | None:
    """The number of batched streams of `step,prefill,rows=N`, in any order; None without rows. Raises UsageError."""
    parts = ",".join(sorted(part.strip() for part in profiles.split(",")))
    found = re.fullmatch("prefill,(?:rows=([1-9][0-9]{0,5}),)?step", parts)
    if found is None or int(found[1] or 1) > MOST_ROWS:
        raise UsageError(
            f"--profiles {profiles}: give step,prefill (single streams) or step,prefill,rows=N (and N batched streams, "
            f"1 to {MOST_ROWS})"
        )
    return None if found[1] is None else int(found[1])


def check_rows(bundle: Bundle) -> None:
    """Raises BackendError unless a stream of the bundle has room for the padding of batched streams."""
    padded_limits(resident_spec(bundle.manifest.spec, cached=True))


def check_fp8(
    bundle: Bundle, hardware: Hardware = "same", machine: Machine | None = None, *, strip: bool = False
) -> None:
    """Raises UsageError if the latent transformer's matrices are codes already, for GPUs without 8-bit floats, and for
    plans without weights, which get those of the bundle."""
    if strip:
        raise UsageError("--fp8 rounds weights in the build, and --strip takes those of the bundle: leave out one")
    if hardware != "same":
        raise UsageError(f"--fp8 needs {FP8_GPUS}: leave out --hardware {hardware}")
    if machine is not None and capability(machine) < FP8_FROM:
        raise UsageError(f"--fp8 needs {FP8_GPUS}, and {machine.gpu} has {machine.compute_capability}: leave it out")
    if (precision := bundle.manifest.precision_of("latent")) in QUANTISED:
        raise UsageError(
            f"--fp8 rounds floats, and the latent transformer of {bundle.path} is of {precision}: "
            "blt export MODEL -o DIR --flavour portable --precision bf16"
        )


def build_engines(
    bundle: Bundle,
    out: Path,
    platform: Platform,
    *,
    batched: int | None = None,
    flags: Flags = DEFAULTS,
    timing_cache: Path | None = None,
    check: bool = True,
    force: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """Builds engines for all graphs of a bundle into the folder `out`, which appears complete or not at all.

    batched: also build engines for this number of batched streams (`TensorRtRows`). timing_cache: a file with
    TensorRT's measurements, read if it exists and written after each graph. check: compare streams on the engines with
    ONNX Runtime's CPU. progress: receives the name of each step.

    Raises UsageError (flavour, precision, `out`), BackendError (a graph is refused, an engine does not open, no room
    for padding) and CheckFailed.
    """
    check_bundle(bundle)
    if batched is not None:
        whole("batched", batched, 1, MOST_ROWS)
        check_rows(bundle)
    if flags.fp8:
        check_fp8(bundle, flags.hardware, platform.machine, strip=flags.strip)
    check_target(out, force)
    stored.make_key()
    spec, trt = resident_spec(bundle.manifest.spec, cached=True), platform.trt
    layers, seconds, trt_log = dict[str, int](), dict[str, float](), logger(trt)
    weights = set[str]()

    def build_form(folder: Path, streams: int | None = None) -> dict[str, Plan]:
        plans = {}
        for name, graph in spec.graphs.items():
            file = plan_name(name, rows=streams is not None)
            progress(step := file.removesuffix(".plan"))
            ranges = profiles(spec, name, streams)
            built = build_graph(bundle, graph, trt, trt_log, ranges, flags, timing_cache, streams=streams)
            (folder / file).write_bytes(built.plan)
            entry = entry_of(folder / file)
            plans[name] = Plan(file, entry.bytes, entry.sha256, tuple(map(dict, ranges)), graph.aliases)
            if flags.strip:
                model = made_graph(bundle, graph, streams)
                (folder / plans[name].graph_file).write_bytes(ir.to_proto(model).SerializeToString())
                plans[name] = replace(plans[name], graph=entry_of(folder / plans[name].graph_file).sha256)
                weights.update(weight_files(model))
            layers[step], seconds[step] = built.layers, built.seconds
            del built
        return plans

    with files.staged(out) as work:
        plans = build_form(work)
        for_rows = None if batched is None else Rows(batched, build_form(work, batched))
        tables = [tables.file for tables in bundle.manifest.tables.values()]
        for file in (FILE_NAME, *tables, *sorted(weights)):
            copyfile(bundle.path / file, work / file)
        digest = entry_of(work / FILE_NAME).sha256
        producer = installed("blt-lm", "blt-runtime", "onnx-ir", "onnxruntime")
        made = EnginesFile(
            digest, producer, platform.machine, flags, plans, rows=for_rows, weights=tuple(sorted(weights))
        )
        progress("parity")
        made = replace(made, parity=_parity(bundle, Engines(work, made, bundle.manifest), platform, check))
        stored.write(work, made)
    return Report(out, made, layers, seconds)


def profiles(spec: ModelSpec, name: str, streams: int | None = None) -> list[Profile]:
    """The profiles of a resident graph, the narrowest first, since the first one that takes a call runs it. streams:
    those of the padded graph for this number of batched streams."""
    graph = shaped(spec.graphs[name], streams)
    sizes = _sizes(spec, name) if streams is None else _row_sizes(spec, name, streams)
    return [shapes_of(graph, *of) for of in sizes]


def _sizes(spec: ModelSpec, name: str) -> list[list[dict[str, int]]]:
    chunk = spec.chunk
    if name != "latent":
        steps = [(1, 1, 1), (1, min(4, chunk), min(PASS, chunk)), (1, chunk, chunk)]
        return [[{"S": s} for s in range_] for range_ in dict.fromkeys(steps)]
    sizes = _patch_sizes(spec)
    for shorter, longest in _prefill_lengths(spec, sizes[-1][-1]["L"]):
        patches = max(min(chunk, AHEAD + 1), min(chunk, GATHER_BYTES // (_state_bytes(spec) * (shorter + 1))))
        usual = {"P": min(patches, max(1, chunk // 4)), "L": min(longest, 8)}
        sizes.append([{"P": 1, "L": 1}, usual, {"P": patches, "L": longest}])
    return sizes


def _row_sizes(spec: ModelSpec, name: str, streams: int) -> list[list[dict[str, int]]]:
    """What `PaddedCalls` runs."""
    if name != "latent":
        return [[{"S": size}] * 3 for size in (1, PADDED)]
    sizes = _patch_sizes(spec)
    usual, most = ({"P": PADDED, "L": n} for n in (SHORTEST, padded_entries(spec.graphs[name], streams)))
    return [*sizes, [usual, usual, {**most, "L": min(most["L"], sizes[-1][-1]["L"])}]]


def _patch_sizes(spec: ModelSpec) -> list[list[dict[str, int]]]:
    """One patch, in one profile for each number of entries."""
    lengths = [SHORTEST]
    while lengths[-1] < entries(longest_patch(spec.patch_rule, spec.encoder_window, spec.capacity_bytes)):
        lengths.append(2 * lengths[-1])
    return [[{"P": 1, "L": length}] * 3 for length in lengths]


def shaped(graph: GraphSpec, streams: int | None) -> GraphSpec:
    """The inputs of the graph that is built, with their number of rows in place of B: fewer sizes are unknown to
    TensorRT. streams: of the padded graph for batched streams."""
    rows, form = (1, graph) if streams is None else (streams, padded_spec(graph))
    inputs = (replace(t, shape=tuple(rows if size == "B" else size for size in t.shape)) for t in form.inputs)
    return replace(form, inputs=tuple(inputs))


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
    *,
    streams: int | None = None,
) -> Built:
    """The engine of one resident graph, or of its padded form for this number of batched streams. Raises
    BackendError."""
    model, configs = made_graph(bundle, graph, streams), []

    def configure(config: Any) -> None:
        if flags.strip:
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
            config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
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
        with _content(model, graph.name, bundle.graph_file(graph.name), flags) as (content, weights):
            spec = shaped(graph, streams)
            built = build(trt, trt_log, spec, lambda parser: parser.parse(content, weights), ranges, configure)
    except Refused as error:
        raise BackendError(f"TensorRT {trt.__version__}: {error}") from error
    if timing_cache is not None:
        with files.atomic_file(timing_cache) as file:
            file.write(configs[0].get_timing_cache().serialize())
    return built


def made_graph(bundle: Bundle, graph: GraphSpec, streams: int | None = None) -> ir.Model:
    """What TensorRT parses: the resident graph, or its padded form for this number of batched streams. Its weights are
    those of the bundle."""
    model = keep_states.run(ir.load(bundle.graph_file(graph.name)), graph if streams is None else padded_spec(graph))
    for value, tensor in zip(model.graph.inputs, shaped(graph, streams).inputs, strict=True):
        value.shape = ir.Shape(list(tensor.shape))
    return model


def weight_files(model: ir.Model) -> set[str]:
    """Names of the files that a graph's weights are in."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


@contextmanager
def _content(model: ir.Model, name: str, path: Path, flags: Flags) -> Iterator[tuple[bytes, str]]:
    """The graph as it is parsed, and a path in the folder of its weights. With `flags.fp8` the weights of the latent
    transformer are in a temporary folder: a message of protobuf has at most 2 GB."""
    if not flags.fp8 or name != "latent":
        yield ir.to_proto(model).SerializeToString(), str(path)
        return
    eight_bit_floats.run(model)
    with TemporaryDirectory(prefix="blt-fp8-") as folder:
        written = write_graph(model, Path(folder), name)
        yield written.read_bytes(), str(written)


# --- parity ------------------------------------------------------------------------------------------------


def _parity(bundle: Bundle, engines: Engines, platform: Platform, check: bool) -> tuple[Parity, ...]:
    """Opens every engine and, if asked, compares. Raises BackendError and CheckFailed."""
    changes = {"latent": eight_bit_floats.round_weights} if engines.file.flags.fp8 else {}
    with emulate.on_cpu(bundle, changes=changes) if check else nullcontext() as reference:
        forms = [False] if engines.file.rows is None else [False, True]
        opened = [_opened(bundle, engines, platform, reference, batched=batched) for batched in forms]
        if changes and reference is not None:
            opened.append((cost_of_fp8(bundle, reference),))
    found = tuple(row for rows in opened for row in rows)
    wrong = [row for row in found if not row.error <= row.tolerance]
    if wrong:
        listed = ", ".join(f"{row.output} {row.error:.1e} (tolerance {row.tolerance:.0e})" for row in wrong)
        raise CheckFailed(f"the engines differ from ONNX Runtime's CPU: {listed}")
    return found


def _opened(
    bundle: Bundle, engines: Engines, platform: Platform, reference: Model | None, *, batched: bool
) -> tuple[Parity, ...]:
    backend = open_engines(engines, platform, batched=batched)
    if reference is None:
        return ()
    model = Model(backend.spec, backend, bundle.hash_tables(), manifest=bundle.manifest)
    precision = max(bundle.manifest.arithmetic(), key=TOLERANCE.__getitem__)
    return (compare_rows if batched else compare)(reference, model, precision)


def compare(reference: Model, candidate: Model, precision: str) -> tuple[Parity, ...]:
    """A stream of each on the same text: a prompt over several chunks and two documents with the reference's patches,
    then single bytes, until the patches differ (they may, where an entropy is near the threshold)."""
    spec = reference.spec
    prompt, rest = _texts(spec)
    wanted = reference.score(prompt)
    found = candidate.score(prompt, wanted.patch_lengths)
    made = [_row("prompt.logits", found.logits, wanted.logits, precision)]
    if spec.patch_rule.needs_entropy:
        made.append(_row("prompt.entropies", found.entropies[:, None], wanted.entropies[:, None], precision))
    pairs = list(_steps(reference.stream(bos=False), candidate.stream(bos=False), prompt, rest))
    if pairs:
        got, want = (np.stack(logits) for logits in zip(*pairs, strict=True))
        made.append(_row("steps.logits", got, want, precision))
    return tuple(made)


def compare_rows(reference: Model, candidate: Model, precision: str) -> tuple[Parity, ...]:
    """All rows of a batch of the candidate, which has batched streams only, against single streams of the reference on
    the same texts."""
    assert isinstance(candidate.backend, PaddedBackend)
    spec, count = candidate.spec, candidate.backend.rows
    longest = entries(longest_patch(spec.patch_rule, spec.encoder_window, spec.capacity_bytes)) // spec.encoder_window
    rule = rows.rule(max(1, longest))
    with_entropy = "entropy" in spec.graphs
    batch = Batch(
        replace(spec, patch_rule=rule), candidate.backend, candidate.hash_tables, count, with_entropy=with_entropy
    )
    text, which = rows.texts(batch.spec, min(count, PARITY_TEXTS)), np.arange(count) % PARITY_TEXTS
    single = Model(replace(reference.spec, patch_rule=rule), reference.backend, reference.hash_tables)
    scores = [single.score(ids) for ids in text]
    found = rows.read(batch, text[which])
    wanted = np.array([score.logits[rows.first(text.shape[1]) :] for score in scores])[which]
    vocab = spec.vocab_size
    made = [_row("rows.logits", found.logits.reshape(-1, vocab), wanted.reshape(-1, vocab), precision)]
    if found.entropies is not None:
        entropies = np.array([score.entropies for score in scores])[which]
        made.append(_row("rows.entropies", found.entropies.reshape(-1, 1), entropies.reshape(-1, 1), precision))
    return tuple(made)


def _texts(spec: ModelSpec) -> tuple[Any, Any]:
    """Ids of the prompt, and those that are read one by one."""
    text = np.concatenate([encode(TEXT, bos=True), [EOS], encode(TEXT * (1 + 2 * spec.chunk // len(TEXT)), bos=False)])
    prompt = text[: min(len(text) - STEPS, spec.capacity_bytes - STEPS, spec.capacity_patches - STEPS)]
    return prompt, text[len(prompt) : len(prompt) + STEPS]


def cost_of_fp8(bundle: Bundle, rounded: Model) -> Parity:
    """What 8-bit floats change: the bundle with rounded weights against the bundle, both on the CPU."""
    prompt, _ = _texts(rounded.spec)
    with emulate.on_cpu(bundle) as exact:
        wanted = exact.score(prompt)
    found = rounded.score(prompt, wanted.patch_lengths)
    return _row("fp8.logits", found.logits, wanted.logits, "fp8")


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
