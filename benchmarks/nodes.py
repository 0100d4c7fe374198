"""Nodes that ONNX Runtime runs in each graph of a decode step, the time of a call, and bytes/s, of several bundles.

    python benchmarks/nodes.py BUNDLE                            # nodes a graph and a layer, us per call, bytes/s
    python benchmarks/nodes.py BEFORE AFTER --threads 1          # the same of two bundles, and ratios

Nodes are counted in the graph that a session runs, after ONNX Runtime's own fusions. Nodes a layer are those from one
attention to the next. Calls are decode steps of one token (of one patch of four bytes in the latent graph) after a
prompt. All bundles are timed in this process, in turns: background load then disturbs all of them, and ratios hold.
Greedy generation after the same prompt gives bytes/s. Each cell has the median, and the best of all calls in brackets.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from blt_runtime import Model

PROMPT = "The boundaries of patches follow the entropy of the next byte, and a model of bytes needs no vocabulary. "
Timed = dict[str, Callable[[], object]]


def optimised(path: Path) -> Any:
    """The GraphProto that a session on the CPU runs."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that the optimised graph is of this machine only
        options.optimized_model_filepath = f"{folder}/graph.onnx"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return onnx.load(f"{folder}/graph.onnx", load_external_data=False).graph


def layers(graph: Any) -> list[list[str]]:
    """Operators of each layer but the last: what an attention needs that the attention before it does not need, and
    that attention itself."""
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    needed: list[set[int]] = []  # by node, those before it
    for node in graph.node:
        sources = {makers[name] for name in node.input if name in makers}
        needed.append(sources.union(*(needed[i] for i in sources)))
    attentions = [i for i, node in enumerate(graph.node) if node.op_type == "GroupQueryAttention"]
    return [sorted(graph.node[i].op_type for i in needed[b] - needed[a]) for a, b in pairwise(attentions)]


def step_calls(model: Model, prompt: int) -> Timed:
    """Bound calls of a decode step by graph, after a prompt of that many bytes."""
    stream = model.stream()
    stream.append((PROMPT * (1 + prompt // len(PROMPT)))[:prompt])
    steps, patches = stream._calls, stream._memory.patches
    calls: Timed = {"entropy": steps.entropy} if "entropy" in model.spec.graphs else {}
    latent = steps._graphs.latent_call(patches - 1, patches)
    return {**calls, "encoder": steps.encoder, "latent": latent, "decoder": steps.decoder}


def bytes_in_turns(models: Sequence[Model], prompt: int, new: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds of a byte of each model's greedy text after the prompt: the mean of each byte's median, and of its least.

    The models generate one byte each in turns, the same text in each round. So a disturbance in one round is not in the
    result.
    """
    streams, text = [model.stream() for model in models], (PROMPT * (1 + prompt // len(PROMPT)))[:prompt]
    took = np.zeros((len(models), rounds, new))
    for turn in range(rounds):
        texts = []
        for stream in streams:
            stream.reset()
            stream.append(text)
            texts.append(stream.generate_ids(new, temperature=0, stop_at_eos=False))
        for at in range(new):
            for i in sorted(range(len(models)), reverse=bool((turn + at) % 2)):
                began = time.perf_counter()
                next(texts[i])
                took[i, turn, at] = time.perf_counter() - began
    return [(float(np.median(each, 0).mean()), float(each.min(0).mean())) for each in took]


def in_turns(calls: Sequence[Callable[[], object]], rounds: int, repeat: int) -> list[tuple[float, float]]:
    """Median and least seconds of each call: `repeat` of one after the other, in `rounds` rounds of alternating
    order."""
    took: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        for i in sorted(range(len(calls)), reverse=bool(turn % 2)):
            calls[i]()
            for _ in range(repeat):
                began = time.perf_counter()
                calls[i]()
                took[i].append(time.perf_counter() - began)
    return [(statistics.median(seconds), min(seconds)) for seconds in took]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt-bytes", type=int, default=200)
    parser.add_argument("--new-bytes", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=30, help="timed calls of a graph in each round")
    a = parser.parse_args()
    models = [Model.open(path, threads=a.threads) for path in a.bundles]
    print("| | " + " | ".join(f"{path.name}: nodes, a layer | us" for path in a.bundles) + " | time |")
    print("|---" * (2 + 2 * len(models)) + "|")
    steps = [step_calls(model, a.prompt_bytes) for model in models]
    for name in steps[0]:
        took = in_turns([calls[name] for calls in steps], a.rounds, a.calls)
        cells = []
        for path, seconds in zip(a.bundles, took, strict=True):
            graph = optimised(path / f"{name}.onnx")
            each = sorted({len(layer) for layer in layers(graph)})
            cells.append(f"{len(graph.node)}, {'/'.join(map(str, each)) or '-'} | {shown(seconds)}")
        print(f"| {name} | {' | '.join(cells)} | {ratio(took)} |")
    took = bytes_in_turns(models, a.prompt_bytes, a.new_bytes, a.rounds)
    print("| a byte | " + " | ".join(f"| {shown(seconds)}" for seconds in took) + f" | {ratio(took)} |")
    speeds = (f"| {1 / median:,.0f} ({1 / least:,.0f})" for median, least in took)
    print("| bytes/s | " + " | ".join(speeds) + " | |")


def shown(seconds: tuple[float, float]) -> str:
    median, least = seconds
    return f"{1e6 * median:.1f} ({1e6 * least:.1f})"


def ratio(took: Sequence[tuple[float, float]]) -> str:
    """Of the last to the first."""
    (median, least), (new_median, new_least) = took[0], took[-1]
    return f"{new_median / median:.3f} ({new_least / least:.3f})"


if __name__ == "__main__":
    main()
