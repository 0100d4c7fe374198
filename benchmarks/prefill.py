"""Prefill: time per byte of a prompt of the ONNX Runtime bundle and of transformers' forward pass, one table.

    python benchmarks/prefill.py                                 # shape M; prompts of 64, 512 and 2048 bytes
    python benchmarks/prefill.py --shape S --bundle DIR          # DIR: the bundle, kept and reused

Both engines have the same shape, random weights, float32 and random bytes, one prompt at a time. In each, the threshold
is the quantile of the prompt's own entropies that gives patches of 4.5 bytes. Ours is `Stream.append_ids` on an empty
stream: entropy model, hashes, then chunks through encoder, latent transformer and decoder. Afterwards all caches are
filled. Theirs is `BltForCausalLM.forward` including the entropy model, in its fastest form: no cache, logits of the
last byte only.

Each engine runs in a separate process, one at a time. Every round runs both; the table has medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from generation import MEAN_PATCH, PROMPTS, SHAPES, export_bundle, hf_model, random_ids

Timed = Callable[[], tuple[float, float]]
"""Reads a prompt once. Returns seconds and mean patch size in bytes."""


def clock(a: argparse.Namespace) -> float:
    return time.process_time() if a.cpu else time.perf_counter()


def threshold_of(entropies_N: np.ndarray) -> float:
    return float(np.quantile(entropies_N, 1 - 1 / MEAN_PATCH))


def ours(a: argparse.Namespace) -> Callable[[np.ndarray], Timed]:
    from blt.bench.runs import with_changes
    from blt_runtime import Model

    model = Model.open(a.bundle, threads=a.threads, verify="sizes")

    def prepare(ids_N: np.ndarray) -> Timed:
        rule = replace(model.spec.patch_rule, threshold=threshold_of(model.score(ids_N).entropies))
        stream = with_changes(model, spec=replace(model.spec, patch_rule=rule)).stream(bos=False)

        def read() -> tuple[float, float]:
            stream.reset()
            began = clock(a)
            stream.append_ids(ids_N)
            seconds = clock(a) - began
            return seconds, len(ids_N) / len(stream.patch_lengths)

        return read

    return prepare


def transformers(a: argparse.Namespace) -> Callable[[np.ndarray], Timed]:
    import torch

    torch.set_num_threads(a.threads)
    model = hf_model(a.shape)

    def prepare(ids_N: np.ndarray) -> Timed:
        ids_BN = torch.from_numpy(ids_N)[None]
        with torch.inference_mode():
            entropies_BN = model.model.patcher(ids_BN)[0]
        threshold = threshold_of(entropies_BN.numpy())
        lengths_BP = model.model.patcher.patch_lengths_from_entropies(entropies_BN, len(ids_N), threshold=threshold)
        model.config.patching_threshold = model.model.config.patching_threshold = threshold
        mean_patch = len(ids_N) / int((lengths_BP > 0).sum())

        def read() -> tuple[float, float]:
            began = clock(a)
            with torch.inference_mode():
                model(ids_BN, use_cache=False, logits_to_keep=1)
            return clock(a) - began, mean_patch

        return read

    return prepare


ENGINES = {"runtime": ours, "transformers": transformers}


def run_engine(a: argparse.Namespace) -> dict[int, tuple[float, float]]:
    """Median seconds by prompt length, and the mean patch size, after one run as a warm-up."""
    prepare, found = ENGINES[a.child](a), {}
    for n in map(int, a.prompts.split(",")):
        read = prepare(random_ids(n))
        read()
        runs = [read() for _ in range(a.runs)]
        found[n] = statistics.median(seconds for seconds, _ in runs), runs[0][1]
        print(f"{a.child}, {n} bytes: {1e6 * found[n][0] / n:.0f} us per byte", file=sys.stderr)
    return found


def child(a: argparse.Namespace, engine: str) -> Any:
    """Runs this script again for one engine and parses its last line, JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(a.threads), "HF_HUB_OFFLINE": "1"}
    options = [f"--{name}={getattr(a, name)}" for name in ("shape", "bundle", "threads", "runs", "prompts")]
    command = [sys.executable, __file__, *options, *(["--cpu"] if a.cpu else []), "--child", engine]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(f"benchmark child {engine} failed with {result.returncode}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="M")
    parser.add_argument("--bundle", type=Path, help="folder for the bundle, kept and reused")
    parser.add_argument("--prompts", default=",".join(map(str, PROMPTS)), help="bytes of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--runs", type=int, default=5, help="timed runs in each process")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds, for one thread on a busy machine")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child == "export":
        print(json.dumps(export_bundle(a.shape, a.bundle)))
    elif a.child:
        print(json.dumps(run_engine(a)))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            a.bundle = a.bundle or Path(temporary) / "bundle"
            child(a, "export")
            rounds = [{engine: child(a, engine) for engine in ENGINES} for _ in range(a.repeat)]
        report(a, rounds)


def report(a: argparse.Namespace, rounds: list[dict[str, Any]]) -> None:
    sizes = a.prompts.split(",")
    times = "CPU" if a.cpu else "wall"
    print(f"shape {a.shape}, float32, {a.threads} threads, {times} time, ", end="")
    print(f"medians of {a.repeat} rounds of {a.runs}; load average {os.getloadavg()[0]:.1f}\n")
    print("| us per byte of a prompt of | " + " | ".join(f"{n} bytes" for n in sizes) + " |")
    print("|---" * (1 + len(sizes)) + "|")
    took = {e: [statistics.median(r[e][n][0] for r in rounds) / int(n) for n in sizes] for e in ENGINES}
    for engine in ENGINES:
        print(f"| {engine} | " + " | ".join(f"{1e6 * seconds:.0f}" for seconds in took[engine]) + " |")
    ratios = [theirs / ours for theirs, ours in zip(took["transformers"], took["runtime"], strict=True)]
    print("| times as fast as transformers | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    for engine in ENGINES:
        patches = ", ".join(f"{rounds[0][engine][n][1]:.2f}" for n in sizes)
        print(f"\nmean patches of {engine}: {patches} bytes", end="")
    print()


if __name__ == "__main__":
    main()
