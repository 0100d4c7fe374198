"""What an NVIDIA GPU has to answer, in order of worth; each stage in a process with a limit, and one report.

    python benchmarks/gpu.py pack BUNDLE -o PACKED                  # here: a bundle without its weights, 1 to 2 MB
    python benchmarks/gpu.py run -o OUT --minutes 9 [--bundle B ...] [--real PACKED ...] [--from STAGE]

`run` goes on where it stopped: a stage with a result in OUT/results.json is not run again. It needs no network and, for
bundles that are given, no PyTorch. OUT/report.md is written again after each stage. A stage that cannot run here says
why. `--bundle` names bundles of the flavours cuda and portable; without one of a flavour, the demo model is exported.
`--real` is a packed bundle: its weights are made there, random, which is right for times and for nothing else. Engines
are built from bundles of the flavour portable. `--provider` runs the stages of ONNX Runtime on another device: `cpu`
tries the stages themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Result = dict[str, Any]
REPO = Path(__file__).resolve().parents[1]
TEXT = "def area(width, height):\n    return width * height\n\n\nclass Shape:\n" * 8
CHUNK = 1 << 26
ROWS = 64
"""Batched streams of engines, each call of which computes all of them."""
PROMPT, NEW = 512, 128
"""Bytes of a prompt, and bytes that are generated and timed after it."""


class Unavailable(Exception):
    """Why a stage cannot run here."""


def machine(given: argparse.Namespace) -> Result:
    """GPU, driver, libraries."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"no NVIDIA GPU: {error}") from error
    from importlib.metadata import PackageNotFoundError, version

    found: Result = {"gpu": gpu, "python": sys.version.split()[0]}
    for package in ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt-cu13", "tensorrt-rtx", "cuda-bindings"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def micro(given: argparse.Namespace) -> Result:
    """Bandwidth, the cost of one dependent kernel in a replayed graph, and of a launch and a wait."""
    torch = _torch()
    one = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    two = torch.empty_like(one)
    found: Result = {"copy TB/s": 2 * one.nbytes / _seconds(lambda: two.copy_(one)) / 1e12}
    big, vector = torch.randn(16384, 16384, device="cuda").half(), torch.randn(16384, device="cuda").half()
    found["large product TB/s"] = big.nbytes / _seconds(lambda: big @ vector) / 1e12
    for width in (512, 1024, 2048):
        weights = [torch.randn(width, width, device="cuda").half() for _ in range(300)]
        x = torch.randn(width, device="cuda").half()

        def chain(weights: Any = weights, x: Any = x) -> Any:
            y = x
            for weight in weights:
                y = weight @ y
            return y

        found[f"us per product of {width}, launched"] = _seconds(chain) / 300 * 1e6
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        found[f"us per product of {width}, replayed"] = _seconds(graph.replay) / 300 * 1e6
    small = torch.zeros(1, device="cuda")
    found["us per launch and wait"] = _seconds(lambda: small.add_(1), wait_each=True) * 1e6
    return found


def tests(given: argparse.Namespace) -> Result:
    """`pytest -m gpu`: binding, placement, parity, captures, ends of documents, rows."""
    _device("cuda")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-n", "0", "tests/gpu"]
    bundles = os.pathsep.join(map(str, given.bundle))
    environment = {**os.environ, **({"BLT_GPU_BUNDLES": bundles} if bundles else {})}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    return {"exit code": done.returncode, "output": done.stdout[-3000:]}


def attention(given: argparse.Namespace) -> Result:
    """Which kernels GroupQueryAttention chooses, as ONNX Runtime prints them."""
    _device(given.provider)
    opened = f"Model.open({str(_bundles(given)[0])!r}, provider={given.provider!r})"
    code = f"from blt_runtime import Model; s = {opened}.stream(); "
    code += f"s.append({TEXT!r}); list(s.generate(4, temperature=0.0))"
    environment = {**os.environ, "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=REPO)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "ernel" in line or "ttention" in line]
    return {"exit code": done.returncode, "lines": sorted(set(lines))[:40]}


def bundles(given: argparse.Namespace) -> Result:
    """Bytes/s, captured and not, and what the precision does to entropies, for each bundle."""
    _device(given.provider)
    return {path.name: _latency(path, given.provider) | _entropies(path, given.provider) for path in _bundles(given)}


def real(given: argparse.Namespace) -> Result:
    """The shape of a released model, with random weights that are made here."""
    _device(given.provider)
    return {path.name: _latency(path, given.provider) for path in _real(given, "cuda")}


def speculation(given: argparse.Namespace) -> Result:
    """Bytes/s with and without drafts, and the measured costs of calls that the choice of drafts rests on."""
    _device(given.provider)
    from blt_runtime import Model

    return {path.name: _drafts(Model.open(path, provider=given.provider)) for path in _bundles(given)[:1]}


def rows(given: argparse.Namespace) -> Result:
    """Bytes/s of a batch of 1, 8 and 64 streams, hash tables on the host and on the device."""
    _device(given.provider)
    from blt_runtime import Model

    path = _bundles(given)[0]
    places = ("host",) if given.provider == "cpu" else ("host", "device")
    return {
        f"tables: {place}": _rows(Model.open(path, provider=given.provider, batched=True, hash_tables=place))
        for place in places
    }


def engines(given: argparse.Namespace) -> Result:
    """TensorRT: building, parity with the CPU, a byte forked and in the plain order, prompts, drafts, batched streams.

    Forked, entropy model and encoder with decoder run side by side: "us of a forked byte" is then less than the sum of
    the other two.
    """
    from blt_export.build import build_engines
    from blt_runtime import Model
    from blt_runtime.backends import platform
    from blt_runtime.bundle.bundle import Bundle
    from blt_runtime.errors import BltError

    try:
        here = platform.open_platform()
    except BltError as error:
        raise Unavailable(str(error)) from error
    made: Result = {}
    for path, check in [*((path, True) for path in _portable(given)), *((p, False) for p in _real(given, "portable"))]:
        out, found = given.out / f"engines-{path.name}", made.setdefault(path.name, {})
        if not out.exists():
            cache = given.out / "timing.cache"
            report = build_engines(Bundle.open(path, "sizes"), out, here, batched=ROWS, timing_cache=cache, check=check)
            found["seconds of building"] = report.seconds
            found["parity"] = {row.output: row.error for row in report.file.parity}
        model = Model.open(out, verify="sizes")
        found.update(_forked(model))
        found.update(_drafts(model))
        found["batched"] = _rows(Model.open(out, batched=True, verify="sizes"), (ROWS,))
    return made


def _forked(model: Any) -> Result:
    found: Result = {}
    for name in ("forked", "in order"):
        stream = model.stream()
        fork = stream._calls._fork
        if name == "in order":
            stream._calls._fork = None
        elif fork is None:
            found["fork"] = "not possible with this patch rule"
            continue
        found |= {f"{name}: {key}": value for key, value in _generated(stream).items()}
        if name == "forked":
            found["us of a forked byte"] = _median_us(fork._token)
        else:
            found |= {f"us of {graph}": _median_us(call) for graph, call in _step_calls(stream)}
    return found


def _drafts(model: Any) -> Result:
    """Bytes/s without drafts, with drafts by lookup, and with those that the measured costs choose; those costs."""
    found: Result = {}
    for mode in ("off", "lookup", "auto"):
        stream = model.stream()
        found |= {f"speculate {mode}: {key}": value for key, value in _generated(stream, speculate=mode).items()}
    costs = stream._speculator.costs
    if costs.measured:
        found["seconds of one, and of each further token of a call"] = {
            name: [time.one, time.extra] for name, time in costs.of.items()
        }
    return found


def _generated(stream: Any, speculate: str = "off") -> Result:
    began = time.perf_counter()
    stream.append(TEXT[:PROMPT])
    first = time.perf_counter() - began
    list(stream.generate(32, temperature=0.0, stop_at_eos=False, speculate=speculate))
    began = time.perf_counter()
    count = len(b"".join(stream.generate(NEW, temperature=0.0, stop_at_eos=False, speculate=speculate)))
    return {"bytes/s": count / (time.perf_counter() - began), f"seconds of a first prompt of {PROMPT} bytes": first}


def _step_calls(stream: Any) -> list[tuple[str, Callable[[], None]]]:
    calls = stream._calls
    return [(name, getattr(calls, name)) for name in ("entropy", "encoder", "decoder") if hasattr(calls, name)]


def _median_us(call: Callable[[], None]) -> float:
    return statistics.median(_timed(call) for _ in range(50)) * 1e6


def _rows(model: Any, sizes: tuple[int, ...] = (1, 8, 64)) -> Result:
    from blt_runtime import Scheduler

    found: Result = {}
    for streams in sizes:
        with Scheduler(model, streams=streams) as scheduler:
            for measured in (False, True):
                began = time.perf_counter()
                requests = [scheduler.submit("The ", 64, seed=i, stop_at_eos=False) for i in range(streams)]
                count = sum(len(request.result()) for request in requests)
                if measured:
                    found[f"bytes/s of {streams}"] = count / (time.perf_counter() - began)
    return found


def rtx(given: argparse.Namespace) -> Result:
    """Whether TensorRT-RTX deserialises a plan on this GPU."""
    _device("cuda")
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        raise Unavailable("tensorrt-rtx is not installed") from error
    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    x = network.add_input("x", trt.float32, (1, 64))
    network.mark_output(network.add_unary(x, trt.UnaryOperation.EXP).get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    return {"version": trt.__version__, "plan bytes": plan.nbytes, "engine": engine is not None}


STAGES: dict[str, tuple[Callable[[argparse.Namespace], Result], int]] = {
    "machine": (machine, 60),
    "micro": (micro, 120),
    "tests": (tests, 300),
    "attention": (attention, 60),
    "bundles": (bundles, 180),
    "real": (real, 400),
    "engines": (engines, 500),
    "rows": (rows, 180),
    "speculation": (speculation, 120),
    "rtx": (rtx, 60),
}
"""In order of worth, each with its limit in seconds."""


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise Unavailable("torch is not installed") from error
    if not torch.cuda.is_available():
        raise Unavailable("torch finds no CUDA device")
    return torch


def _device(provider: str) -> None:
    from blt_runtime.backends.onnx import load_library
    from blt_runtime.backends.providers import PROVIDERS, check_available
    from blt_runtime.errors import BltError

    try:
        check_available(load_library("1.30"), PROVIDERS[provider])
    except BltError as error:
        raise Unavailable(str(error)) from error


def _seconds(run: Callable[[], object], repeat: int = 20, wait_each: bool = False) -> float:
    """Median seconds of a call on the device."""
    torch = _torch()
    found = []
    for _ in range(repeat + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[3:])


def _bundles(given: argparse.Namespace) -> list[Path]:
    """The given bundles of the flavour cuda, or exports of the demo model: fp16 first, which the CPU runs too."""
    return _of_flavour(given, "cuda", ("fp16", "bf16", "int8", "int4"))


def _portable(given: argparse.Namespace) -> list[Path]:
    return _of_flavour(given, "portable", ("fp16", "bf16", "int4"))


def _of_flavour(given: argparse.Namespace, flavour: str, precisions: tuple[str, ...]) -> list[Path]:
    from blt_runtime.bundle import manifest as manifests

    if found := [p for p in given.bundle if manifests.read(p / manifests.FILE_NAME).flavour == flavour]:
        return found
    made = []
    for precision in precisions:
        path = given.out / f"demo-{flavour}-{precision}"
        if not path.exists():
            export = ["export", str(REPO / "configs/demo/model.pt"), "-o", str(path), "--flavour", flavour]
            subprocess.run([sys.executable, "-m", "blt.cli", *export, "--precision", precision], cwd=REPO, check=True)
        made.append(path)
    return made


def _real(given: argparse.Namespace, flavour: str) -> list[Path]:
    """The packed bundles of a flavour, unpacked. Raises Unavailable for the flavour cuda if there is none."""
    from blt_runtime.bundle import manifest as manifests

    made = []
    for packed in given.real:
        if manifests.read(packed / manifests.FILE_NAME).flavour == flavour:
            made.append(given.out / f"real-{packed.name}")
            if not made[-1].exists():
                unpack(packed, made[-1])
    if not made and flavour == "cuda":
        raise Unavailable("no packed bundle of the flavour cuda was given: --real PACKED")
    return made


def _latency(path: Path, provider: str) -> Result:
    """Bytes/s at batch 1, time to first byte, and microseconds of each graph's step: captured and not."""
    from blt_runtime import Model
    from blt_runtime.backends.onnx import OnnxBackend
    from blt_runtime.bundle.bundle import Bundle

    found: Result = {}
    bundle = Bundle.open(path, "sizes")
    for capture in (True, False) if provider == "cuda" else (False,):
        backend = OnnxBackend(bundle, provider=provider, capture=capture)
        stream = Model(backend.spec, backend, bundle.hash_tables()).stream()
        name = "captured" if capture else "launched"
        found |= {f"{name}: {key}": value for key, value in _generated(stream).items()}
        found |= {f"{name}: us of {graph}": _median_us(call) for graph, call in _step_calls(stream)}
    return found


def _entropies(path: Path, provider: str) -> Result:
    """Entropies and boundaries of a text against the CPU, where it runs the same bundle."""
    from blt_runtime import Model
    from blt_runtime.bundle.bundle import Bundle

    if "bf16" in Bundle.open(path, "sizes").manifest.precisions.values():
        return {"entropies": "not compared: the CPU has no bfloat16 kernels"}
    scores = [Model.open(path, provider=name).stream() for name in ("cpu", provider)]
    for stream in scores:
        stream.append(TEXT[:PROMPT])
    here, there = (stream._memory.entropies.array[0, : stream.position] for stream in scores)
    starts = [set(np.cumsum(stream.patch_lengths).tolist()) for stream in scores]
    return {
        "entropies: largest difference": float(np.nanmax(np.abs(here - there))),
        "boundaries moved": len(starts[0] ^ starts[1]),
        "boundaries": len(starts[0]),
    }


def _timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def pack(bundle: Path, out: Path) -> None:
    """A copy without weights and hash tables; their sizes are in the manifest."""
    shutil.copytree(bundle, out, ignore=shutil.ignore_patterns("*.weights", "*.npy"))


def unpack(packed: Path, out: Path) -> None:
    """The bundle with random weights: normal numbers of a small size in the precision of each graph."""
    from blt_runtime.bundle import manifest as manifests

    manifest = manifests.read(packed / manifests.FILE_NAME)
    work = out.with_name(out.name + ".part")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(packed, work)
    for name, entry in manifest.files.items():
        if name.endswith(".weights"):
            _write_random(work / name, entry.bytes, manifest.precision_of(name.removesuffix(".weights")))
    for graph, ref in manifest.tables.items():
        _write_tables(work / ref.file, manifest.spec.hashes[graph], manifest.files[ref.file].bytes)
    work.replace(out)


def _write_random(path: Path, size: int, precision: str) -> None:
    from blt_runtime.hashing import bfloat16_bits

    values = np.random.default_rng(0).normal(0, 0.02, CHUNK).astype(np.float32)
    if precision == "bf16":
        data = bfloat16_bits(values).tobytes()
    else:
        data = values.astype({"fp16": np.float16}.get(precision, np.float32)).tobytes()
    with path.open("wb") as file:
        for at in range(0, size, len(data)):
            file.write(data[: size - at])


def _write_tables(path: Path, spec: Any, size: int) -> None:
    from blt_runtime.hashing import TABLE_DTYPES, stored_width

    shape = (spec.tables * spec.rows, stored_width(spec.dim, spec.dtype))
    header = {"descr": TABLE_DTYPES[spec.dtype].str, "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(size)  # zeros, which take no space


def run(given: argparse.Namespace) -> None:
    given.out.mkdir(parents=True, exist_ok=True)
    results, path = {}, given.out / "results.json"
    if path.exists():
        results = json.loads(path.read_text())
    names = list(STAGES)
    if given.start is not None:
        for name in names[names.index(given.start) :]:
            results.pop(name, None)
    deadline = time.monotonic() + 60 * given.minutes
    for name in names:
        left = deadline - time.monotonic()
        if name in results or left < 10:
            continue
        results[name] = _stage(name, given, min(left, STAGES[name][1]))
        _write(given.out, results)
        print(f"{name}: {json.dumps(results[name])[:200]}", flush=True)
    _write(given.out, results)
    print(given.out / "report.md")


def _stage(name: str, given: argparse.Namespace, seconds: float) -> Result:
    """One stage in a process; a crash or a stage that takes too long is a result too."""
    options = [*(f"--bundle={path}" for path in given.bundle), *(f"--real={path}" for path in given.real)]
    command = [sys.executable, __file__, "stage", name, "-o", str(given.out), f"--provider={given.provider}", *options]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"it took more than {seconds:.0f} seconds"}
    lines = done.stdout.strip().splitlines()
    try:
        found: Result = json.loads(lines[-1])
    except (IndexError, ValueError):
        return {"failed": f"exit code {done.returncode}: {done.stderr.strip()[-400:]}"}
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def stage(given: argparse.Namespace) -> None:
    try:
        found = STAGES[given.name][0](given)
    except Unavailable as error:
        found = {"not run": str(error)}
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))


def _write(out: Path, results: dict[str, Result]) -> None:
    """results.json and report.md, each replaced at once."""
    lines = ["# GPU report", "", results.get("machine", {}).get("gpu", "no GPU"), ""]
    for name in STAGES:
        lines += [f"## {name}", "", (STAGES[name][0].__doc__ or "").strip(), ""]
        lines += [f"- {key}: {_shown(value)}" for key, value in results.get(name, {"not run": "yet"}).items()] + [""]
    for file, text in (("results.json", json.dumps(results, indent=1)), ("report.md", "\n".join(lines))):
        temporary = out / f"{file}.part"
        temporary.write_text(text)
        temporary.replace(out / file)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_shown(item)}" for key, item in value.items())
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("bundle", type=Path)
    packing.add_argument("-o", "--out", type=Path, required=True)
    packing.set_defaults(run=lambda given: pack(given.bundle, given.out))
    for name, function in (("run", run), ("stage", stage)):
        command = commands.add_parser(name)
        if name == "stage":
            command.add_argument("name", choices=STAGES)
        command.add_argument("-o", "--out", type=Path, required=True)
        command.add_argument("--bundle", type=Path, action="append", default=[])
        command.add_argument("--real", type=Path, action="append", default=[])
        command.add_argument("--provider", default="cuda")
        command.add_argument("--minutes", type=float, default=9)
        command.add_argument("--from", dest="start", choices=STAGES)
        command.set_defaults(run=function)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
