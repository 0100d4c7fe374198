"""The training step against that of transformers: bytes per second, and share of the speed of matrix products.

    python benchmarks/training.py                                  # shapes demo and S, float32 and bfloat16
    python benchmarks/training.py --shapes demo --dtypes bf16 --against OLD   # OLD: another checkout of this project
    python benchmarks/training.py --shapes demo --profile          # time of our steps by operator

Both engines have the same weights, text, patches and shape. Patch lengths are given, so neither runs an entropy model.
Each row is one document, because transformers does not mask documents. The first loss of all engines must agree. A step
is forward and backward; "+ optimizer" adds clipping and fused AdamW. Ours uses deterministic kernels, like `blt train`.

Share of peak: 3 x forward FLOPs of the model's formula (`BLTConfig.flops_per_byte`, without masked keys and padding)
per second, divided by the FLOPs per second of a product of two square matrices in the same dtype and run. Engines run
in separate processes, interleaved step by step; the table has medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from generation import configs

ROOT = Path(__file__).resolve().parents[1]
MEAN_PATCH, LONGEST = 4.5, 16
PEAK_SIDE = 2048
FORMS = ("eager", "compiled")
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
"""Largest difference of the first loss, in nats per byte. The loss is about 5.5."""


@dataclass(frozen=True)
class Shape:
    """A model and a batch of B rows of N bytes."""

    rows: int
    n_bytes: int
    of: Literal["demo", "S", "M"]

    def model(self) -> Any:
        return configs(self.of)[0] if self.of != "demo" else former_demo()


def former_demo() -> Any:
    """The demo checkpoint that shipped until 2026-11-27. Transformers has no shared key-value heads in local models."""
    from blt.model import BLTConfig, HashConfig, TransformerConfig

    local = TransformerConfig(dim=128, n_layers=1, n_heads=2, ffn_dim=384, window=256, max_seqlen=8192)
    return BLTConfig(
        encoder=local,
        latent=TransformerConfig(dim=256, n_layers=4, n_heads=4, ffn_dim=640, max_seqlen=4096),
        decoder=local.model_copy(update={"n_layers": 3}),
        cross_k=2,
        hash=HashConfig(sizes=(3, 4, 5, 6), rows=5531),
    )


SHAPES = {
    "demo": Shape(8, 1024, "demo"),
    "S": Shape(4, 2048, "S"),
    "M": Shape(2, 2048, "M"),
}


def text() -> bytes:
    """Sources of Python's standard library, which depend on the Python version only."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return b"".join(path.read_bytes() for path in files)


def shape_of(name: str, rows: int | None) -> Shape:
    return replace(SHAPES[name], rows=rows) if rows else SHAPES[name]


def make_batch(shape: Shape) -> dict[str, np.ndarray]:
    """ids, targets [B, N] (the last target of a row is not counted: mask), patch lengths [B, P] of sum N + 1."""
    B, N = shape.rows, shape.n_bytes
    random = np.random.default_rng(0)
    raw = np.frombuffer(text()[: B * N], np.uint8).astype(np.int64).reshape(B, N) + 4
    raw[:, 0] = 1
    mask = np.ones((B, N), np.bool_)
    mask[:, -1] = False
    rows = [cut(N + 1, random) for _ in range(B)]
    lengths = np.zeros((B, max(map(len, rows))), np.int64)
    for b, row in enumerate(rows):
        lengths[b, : len(row)] = row
    return {"ids": raw, "targets": np.roll(raw, -1, 1), "mask": mask, "lengths": lengths}


def cut(total: int, random: np.random.Generator) -> list[int]:
    """Patch lengths of a row: 1, then geometric with mean MEAN_PATCH, at most LONGEST."""
    lengths = [1]
    while sum(lengths) < total:
        lengths.append(min(int(random.geometric(1 / MEAN_PATCH)), LONGEST, total - sum(lengths)))
    return lengths


# --- engines, each in a separate process ----------------------------------------------------------------------------


def ours(shape: Shape, batch: dict[str, Any], *, bf16: bool, form: str) -> tuple[Any, Callable[[], Any]]:
    import torch
    import torch.utils

    from blt.train.objective import Objective

    torch.use_deterministic_algorithms(True)
    settings: Any = torch.utils.deterministic  # a property that the type stubs lack
    settings.fill_uninitialized_memory = False
    model = our_model(shape)
    objective = Objective(model, LONGEST, bf16=bf16, compile=form == "compiled")
    targets = int(batch["mask"].sum())

    def loss() -> Any:
        found: Any = objective._sum(batch["ids"], batch["targets"], batch["mask"], batch["lengths"])
        return (found[0] if isinstance(found, tuple) else found) / targets  # a sum alone in checkouts before 2026-11-27

    return model, loss


def our_model(shape: Shape) -> Any:
    import torch

    from blt.model import BLT

    model = BLT(shape.model())
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def theirs(shape: Shape, batch: dict[str, Any], *, bf16: bool, form: str) -> tuple[Any, Callable[[], Any]]:
    import torch
    from transformers import BltConfig, BltForCausalLM

    from blt.checkpoint.huggingface import huggingface_name
    from blt.checkpoint.huggingface_write import to_json
    from blt_runtime.patching import PatchRule

    source = our_model(shape)
    settings = to_json(source.config, None, PatchRule("entropy", threshold=1.0), "float32")
    model = BltForCausalLM(BltConfig(**settings)).train()
    weights = {huggingface_name(name): value for name, value in source.state_dict().items()}
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys, missing
    assert all("patcher" in name for name in missing.missing_keys), missing
    call: Any = torch.compile(model) if form == "compiled" else model
    labels = torch.where(batch["ids"] == 1, -100, batch["ids"])

    def loss() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return call(batch["ids"], patch_lengths=batch["lengths"], labels=labels, use_cache=False).loss

    return model, loss


def serve(a: argparse.Namespace) -> None:
    """Makes the engine, then answers each line of stdin: seconds and loss for "FORM [optimizer]", FLOPs per second for
    "peak"."""
    import torch

    torch.set_num_threads(a.threads)
    shape, bf16 = shape_of(a.shapes, a.rows), a.dtypes == "bf16"
    batch = {name: torch.from_numpy(array) for name, array in make_batch(shape).items()}
    make = theirs if a.child == "transformers" else ours
    made = {form: make(shape, batch, bf16=bf16, form=form) for form in a.forms.split(",")}
    steps = {form: stepper(a, *pair) for form, pair in made.items()}
    for line in sys.stdin:
        command, *rest = line.split()
        answer: Any = peak(a, bf16) if command == "peak" else steps[command](rest == ["optimizer"])
        print(json.dumps(answer), flush=True)


def clock(a: argparse.Namespace) -> float:
    return time.process_time() if a.cpu else time.perf_counter()


def stepper(a: argparse.Namespace, model: Any, loss_of: Callable[[], Any]) -> Callable[[bool], list[float]]:
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-9, fused=True
    )  # so small that the loss of every step is that of the first

    def step(update: bool) -> list[float]:
        began = clock(a)
        loss = loss_of()
        loss.backward()
        if update:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [clock(a) - began, loss.item()]

    return step


def peak(a: argparse.Namespace, bf16: bool) -> float:
    import torch

    x = torch.randn(PEAK_SIDE, PEAK_SIDE, dtype=torch.bfloat16 if bf16 else torch.float32)
    began = clock(a)
    x @ x
    return 2 * PEAK_SIDE**3 / (clock(a) - began)


# --- the run -------------------------------------------------------------------------------------------------


class Engine:
    """A child process that runs one step per line of its stdin."""

    def __init__(self, a: argparse.Namespace, name: str, *, shape: str, dtype: str) -> None:
        self.name, self.forms = name, a.forms.split(",")
        here = a.against if name == "against" else ROOT
        paths = [here, here / "runtime", here / "export"]
        threads = str(a.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        command = [sys.executable, __file__, f"--shapes={shape}", f"--dtypes={dtype}", f"--threads={threads}"]
        command += [f"--forms={a.forms}", "--child", name]
        command += [*(["--cpu"] if a.cpu else []), *([f"--rows={a.rows}"] if a.rows else [])]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def request(self, line: str) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"benchmark child {self.name} ended with {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def measure(a: argparse.Namespace, shape: str, dtype: str) -> dict[str, Any]:
    """Seconds by (engine, form, with optimizer) and the peak: medians over the rounds."""
    names = [*a.engines.split(","), *(["against"] if a.against else [])]
    engines = [Engine(a, name, shape=shape, dtype=dtype) for name in names]
    columns = [(engine, form, update) for engine in engines for form in engine.forms for update in ("", " optimizer")]
    losses = {f"{engine.name} {form}": engine.request(form)[1] for engine in engines for form in engine.forms}
    if max(losses.values()) - min(losses.values()) > TOLERANCE[dtype]:
        sys.exit(f"the engines do not compute the same loss: {losses}")
    seconds: dict[str, list[float]] = {}
    peaks = []
    for number in range(a.rounds + 1):  # the first warms up
        peaks.append(engines[0].request("peak"))
        for engine, form, update in columns:
            took = engine.request(form + update)[0]
            if number:
                seconds.setdefault(f"{engine.name} {form}{update}", []).append(took)
    for engine in engines:
        engine.close()
    print(f"{shape} {dtype}: losses {losses}", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"shape": shape, "dtype": dtype, "peak": statistics.median(peaks[1:]), "seconds": medians}


def report(a: argparse.Namespace, result: dict[str, Any]) -> None:
    shape, seconds = shape_of(result["shape"], a.rows), result["seconds"]
    n_bytes, config = shape.rows * shape.n_bytes, shape.model()
    flops = 3 * n_bytes * config.flops_per_byte(MEAN_PATCH, shape.n_bytes)
    print(f"\n{result['shape']}, {result['dtype']}: {config.n_params() / 1e6:.1f} M weights, ", end="")
    print(f"{shape.rows} x {shape.n_bytes} bytes, {flops / 1e9:.0f} GFLOP a step, ", end="")
    print(f"peak {result['peak'] / 1e9:.0f} GFLOP/s\n")
    print("| | bytes/s | share of peak | times as fast | + optimizer, bytes/s | times as fast |")
    print("|---|---|---|---|---|---|")
    slow = next(iter(seconds))
    for name in [name for name in seconds if not name.endswith("optimizer")]:
        plain, updated = seconds[name], seconds[f"{name} optimizer"]
        share = flops / plain / result["peak"]
        ratios = seconds[slow] / plain, seconds[f"{slow} optimizer"] / updated
        print(f"| {name} | {n_bytes / plain:,.0f} | {share:.0%} | {ratios[0]:.2f} ", end="")
        print(f"| {n_bytes / updated:,.0f} | {ratios[1]:.2f} |", flush=True)


def profile(a: argparse.Namespace, name: str, dtype: str) -> None:
    """Prints the operators of three of our steps by their own time."""
    import torch

    torch.set_num_threads(a.threads)
    shape = shape_of(name, a.rows)
    batch = {name: torch.from_numpy(array) for name, array in make_batch(shape).items()}
    for form in a.forms.split(","):
        step = stepper(a, *ours(shape, batch, bf16=dtype == "bf16", form=form))
        step(True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            for _ in range(3):
                step(True)
        table = seen.key_averages().table("self_cpu_time_total", row_limit=25, max_name_column_width=60)
        print(f"{name} {dtype} {form}\n{table}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="demo,S", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--engines", default="transformers,ours")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--against", type=Path, help="another checkout of this project, measured in the same run")
    parser.add_argument("--rows", type=int, help="rows of a batch instead of the shape's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds, for one thread on a busy machine")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        return serve(a)
    pairs = [(shape, dtype) for shape in a.shapes.split(",") for dtype in a.dtypes.split(",")]
    if a.profile:
        for shape, dtype in pairs:
            profile(a, shape, dtype)
        return None
    times = "CPU" if a.cpu else "wall"
    print(f"{a.threads} threads, {times} time, medians of {a.rounds} rounds; load average {os.getloadavg()[0]:.1f}")
    found = []
    for shape, dtype in pairs:
        found.append(measure(a, shape, dtype))
        report(a, found[-1])
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
