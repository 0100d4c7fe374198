"""Which shape of BLT generates most bytes per second? A cost model from kernels that are measured on this machine.

    python benchmarks/shapes.py measure -o kernels.json           # one of five parts; run it until none is left
    python benchmarks/shapes.py predict kernels.json configs/demo.yaml
    python benchmarks/shapes.py check kernels.json                # five other models: predicted and measured
    python benchmarks/shapes.py search kernels.json --latent 20M  # the front of bytes/s and FLOPs per byte

A call of a graph costs its products plus the rest. Products are timed alone, by the bytes of all weights that a byte
touches (weights that stay in the caches are read faster) and by the rows of the left side. The rest is linear in the
graph, its layers, its cross-attentions, the keys and values that attention reads, and the width of its activations.
These five coefficients come from the calls of the models of FITTED, by non-negative least squares over relative errors.

Setting: one thread, 512 bytes of context, random weights, the mean patch of the shape, 1 or 8 streams. FLOPs per byte
stand for quality here: no search knows how well a shape learns. So the search prints a front, and keeps the local
models at least a quarter as wide as the latent transformer.

State: `measure` takes a quarter of an hour of an idle machine. `check` has not run on one yet, so how far off the
predictions are is not known.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from blt.model.config import BLTConfig, EntropyConfig, HashConfig, TransformerConfig

CONTEXT, NEW = 512, 96
STREAMS = (1, 8)
PRECISIONS = ("fp32", "int8")
SIZES = (1 << 18, 1 << 21, 1 << 24, 1 << 27)
"""Bytes of weights in one chain of products."""
ROWS = (1, 4, 8)
BLOCK = 128
"""Inputs of a matrix must be a multiple of this to become int8."""
REST = ("graph", "layer", "cross-attention", "key and value bytes", "activation bytes")


@dataclass(frozen=True)
class Shape:
    """A BLT, its entropy model (None: patches at spaces), and its mean patch in bytes."""

    blt: BLTConfig
    entropy: EntropyConfig | None
    patch: float

    @cached_property
    def graphs(self) -> dict[str, Graph]:
        m, D = self.blt, self.blt.local_dim
        V, E = m.vocab_size, m.cross_k * m.local_dim
        graphs = {}
        if self.entropy is not None:
            keys = self.entropy.visible_keys(CONTEXT)
            head = [(self.entropy.dim, self.entropy.vocab_size)]
            graphs["entropy"] = Graph.stack(self.entropy, keys, head, 0)
        graphs["encoder"] = Graph.stack(m.encoder, m.encoder.visible_keys(CONTEXT), [], 0)
        patches = CONTEXT / self.patch
        projection = [(E, m.latent.dim)] * m.latent_projection + [(m.latent.dim, E)] * m.decoder_projection
        pooled = [(D, E), *[(D, D)] * (4 * m.encoder_cross_layers)]
        read = [(D, 2 * D)] * m.decoder_cross_layers
        keys = m.latent.visible_keys(round(patches))
        graphs["latent"] = Graph.stack(m.latent, keys, [*pooled, *projection, *read], m.encoder_cross_layers)
        crossed = [(D, D)] * (2 * m.decoder_cross_layers)
        keys = m.decoder.visible_keys(CONTEXT)
        graphs["decoder"] = Graph.stack(m.decoder, keys, [*crossed, (D, V)], m.decoder_cross_layers)
        return graphs

    def flops(self) -> float:
        """Per byte, with the entropy model."""
        entropy = self.entropy.flops_per_byte(CONTEXT) if self.entropy else 0.0
        return entropy + self.blt.flops_per_byte(self.patch, CONTEXT)

    def touched(self, precision: str) -> float:
        """Bytes of all products' weights: what the caches would have to hold."""
        return sum(weight_bytes(k, n, precision) for graph in self.graphs.values() for k, n in graph.products)

    @classmethod
    def of_config(cls, path: Path) -> Shape:
        """A training configuration of kind `blt`. The entropy model is the one that its `entropy` comment names."""
        raw = yaml.safe_load(path.read_text())
        entropy = path.with_name(f"{path.stem}-entropy.yaml")
        found = EntropyConfig(**yaml.safe_load(entropy.read_text())["model"]) if entropy.exists() else None
        patching = raw["patching"]
        patch = patching.get("target_patch_size") or patching.get("patch_size") or 6.0
        return cls(BLTConfig(**raw["model"]), found, float(patch))


@dataclass(frozen=True)
class Graph:
    """What one call computes: products [K, N], layers, cross-attentions, keys visible to a query."""

    products: tuple[tuple[int, int], ...]
    layers: int
    crosses: int
    key_bytes: float
    activations: float

    @classmethod
    def stack(cls, t: TransformerConfig, keys: float, more: list[tuple[int, int]], crosses: int) -> Graph:
        heads = t.head_size * t.n_heads
        one = [
            (t.dim, heads + 2 * t.kv_heads * t.head_size),
            (heads, t.dim),
            (t.dim, 2 * t.hidden_dim),
            (t.hidden_dim, t.dim),
        ]
        read = 4.0 * t.n_layers * keys * (t.n_heads + t.kv_heads) * t.head_size
        wide = 4.0 * (t.n_layers * (4 * t.dim + 3 * t.hidden_dim) + sum(k + n for k, n in more))
        return cls((*one * t.n_layers, *more), t.n_layers, crosses, read, wide)

    def rest(self, rows: float) -> list[float]:
        """The features of REST."""
        return [1.0, self.layers, self.crosses, rows * self.key_bytes, rows * self.activations]


def weight_bytes(k: int, n: int, precision: str) -> float:
    return k * n * (4.0 if precision == "fp32" or k % BLOCK else 1.0 + 4.0 / BLOCK)


class Costs:
    """The measured costs of one precision. Seconds."""

    def __init__(self, measured: Mapping[str, Any], precision: str) -> None:
        self.precision = precision
        self._products, self._measured = measured["products"], measured[precision]

    def products(self, graph: Graph, rows: float, touched: float) -> float:
        at = np.interp(np.log(touched), np.log(SIZES), np.arange(len(SIZES)))
        low, share = int(min(at, len(SIZES) - 2)), at - int(min(at, len(SIZES) - 2))
        seconds = 0.0
        for k, n in graph.products:
            precision = "fp32" if k % BLOCK else self.precision
            by_rows = []
            for r in ROWS:
                node, per_byte = self._products[precision][str(r)]
                rate = per_byte[low] * (1 - share) + per_byte[low + 1] * share
                by_rows.append(node + weight_bytes(k, n, precision) * rate)
            seconds += float(np.interp(rows, ROWS, by_rows))
        return seconds

    def call(self, graph: Graph, rows: float, streams: int, touched: float) -> float:
        """Seconds of one call over `rows` bytes or patches, in a model of `streams` streams."""
        rest = self._measured["rest"][str(streams)]
        return self.products(graph, rows, touched) + float(np.dot(rest, graph.rest(rows)))

    def host(self, streams: int) -> float:
        """Seconds per byte outside of calls."""
        return float(self._measured["host"][str(streams)])

    def per_byte(self, shape: Shape, streams: int) -> dict[str, float]:
        """Seconds of one byte by part."""
        touched, batch = shape.touched(self.precision), self._measured["batch"][str(streams)]
        seconds = {}
        for name, graph in shape.graphs.items():
            rows = batch["patches" if name == "latent" else "bytes"] if streams > 1 else 1.0
            per = self.call(graph, rows, streams, touched) / rows
            seconds[name] = per / shape.patch if name == "latent" else per
        return {**seconds, "host": self.host(streams)}

    def bytes_per_s(self, shape: Shape, streams: int) -> float:
        """Of all streams in total."""
        return 1.0 / sum(self.per_byte(shape, streams).values())


# -- measuring ---------------------------------------------------------------------------------------------------------


def time_products(precision: str, rows: int, size: int, dim: int) -> float:
    """Seconds of one product in a chain of [dim, 4 dim] and [4 dim, dim] matrices of `size` bytes together."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    pairs = max(1, round(size / (2 * weight_bytes(dim, 4 * dim, precision))))
    generator, nodes, weights, last = np.random.default_rng(0), [], [], "x"
    for i in range(2 * pairs):
        k, n = (dim, 4 * dim) if i % 2 == 0 else (4 * dim, dim)
        name, out = f"w{i}", f"y{i}"
        if precision == "fp32":
            weights.append(numpy_helper.from_array(np.full((k, n), 1e-3, np.float32), name))
            nodes.append(helper.make_node("MatMul", [last, name], [out]))
        else:
            codes = generator.integers(0, 256, (n, k // BLOCK, BLOCK), dtype=np.uint8)
            weights.append(numpy_helper.from_array(codes, name))
            weights.append(numpy_helper.from_array(np.full((n, k // BLOCK), 1e-4, np.float32), f"s{i}"))
            more = {"K": k, "N": n, "bits": 8, "block_size": BLOCK, "accuracy_level": 4, "domain": "com.microsoft"}
            nodes.append(helper.make_node("MatMulNBits", [last, name, f"s{i}"], [out], **more))
        last = out
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows, dim])
    y = helper.make_tensor_value_info(last, TensorProto.FLOAT, [1, rows, dim])
    graph = helper.make_graph(nodes, "products", [x], [y], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "products.onnx"
        onnx.save(model, path, save_as_external_data=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", np.ones((1, rows, dim), np.float32))
    binding.bind_output(last)
    return fastest(lambda: session.run_with_iobinding(binding), seconds=1.0) / (2 * pairs)


def fastest(call: Callable[[], Any], seconds: float) -> float:
    """The fifth part of the calls in `seconds` that was fastest: its slowest. Other work on the machine only adds."""
    call()
    took, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(took) < 5:
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return float(np.percentile(took, 20))


def measure_products() -> dict[str, dict[str, tuple[float, list[float]]]]:
    """By precision and rows: seconds of a product beside its weights, and seconds per byte of weights by SIZES."""
    found: dict[str, dict[str, tuple[float, list[float]]]] = {}
    for precision in PRECISIONS:
        found[precision] = {}
        for rows in ROWS:
            small, wide = 128, 256
            times = [time_products(precision, rows, SIZES[1], dim) for dim in (small, wide)]
            sizes = [weight_bytes(dim, 4 * dim, precision) for dim in (small, wide)]
            rate = (times[1] - times[0]) / (sizes[1] - sizes[0])
            node = max(0.0, times[0] - rate * sizes[0])
            rates = []
            for size in SIZES:
                dim = 128 if size == SIZES[0] else 256 if size == SIZES[1] else 512 if size == SIZES[2] else 1024
                took = time_products(precision, rows, size, dim) - node
                rates.append(max(took, 0.0) / weight_bytes(dim, 4 * dim, precision))
            found[precision][str(rows)] = node, rates
            print(
                precision, rows, f"node {node * 1e6:.2f} us,", *(f"{1e-9 / r:.1f}" for r in rates), "GB/s", flush=True
            )
    return found


class Recorder:
    """Wraps a backend and keeps the seconds of each call, by graph and rows."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.calls: dict[tuple[str, int], list[float]] = defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def session(self, group: str) -> RecordedSession:
        return RecordedSession(self._backend.session(group), group, self.calls)

    def row_session(self, group: str) -> RecordedSession:
        return RecordedSession(self._backend.row_session(group), group, self.calls)


class RecordedSession:
    def __init__(self, session: Any, group: str, calls: dict[tuple[str, int], list[float]]) -> None:
        self._session, self._group, self._calls = session, group, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def bind(self, buffers: Mapping[str, Any]) -> Callable[[], None]:
        call, now = self._session.bind(buffers), time.perf_counter
        took = self._calls[self._group, int(buffers["positions"].array.shape[-1])]

        def timed() -> None:
            began = now()
            call()
            took.append(now() - began)

        return timed


def checkpoint_of(shape: Shape) -> Any:
    import torch

    from blt.checkpoint.models import Checkpoint
    from blt.model import BLT, EntropyModel
    from blt_runtime.patching import PatchRule

    generator = torch.Generator().manual_seed(0)
    blt, entropy = BLT(shape.blt).eval(), EntropyModel(shape.entropy).eval() if shape.entropy else None
    for model in (blt, entropy):
        if model is not None:
            model.init_weights(generator)
    return Checkpoint(blt, entropy, PatchRule("entropy", threshold=1.0) if entropy else PatchRule("space"))


@dataclass
class Measured:
    """Of one model: seconds per byte in total, the fastest of a few runs; its calls; rows per call."""

    seconds: float
    calls: dict[tuple[str, int], list[float]]
    patch: float
    bytes_per_call: float
    patches_per_call: float


def measure(shape: Shape, precision: str, streams: int, bundle: Path, repeat: int = 3) -> Measured:
    """Generates with a model of this shape and random weights, at the shape's mean patch."""
    from blt import bench
    from blt_export import export
    from blt_runtime import Model

    if not bundle.exists():
        export(checkpoint_of(shape), bundle, precision=precision, capacity=2048, check=False)
    texts = bench.shifted_texts(
        bench.bench_text(CONTEXT + NEW + bench.SHIFT * streams), streams=streams, prompt_bytes=CONTEXT, new_bytes=NEW
    )
    single = Model.open(bundle, threads=1, verify="sizes")
    if shape.entropy is not None:
        single = bench.at_patch_size(single, texts, shape.patch, by_rises=True)
    if streams == 1:
        recorder = Recorder(single.backend)
        bench.run(bench.with_changes(single, backend=recorder).stream(), texts[0], forced(texts[0]))
        recorder.calls.clear()
        runs = [bench.run(single.stream(), texts[0], forced(texts[0])) for _ in range(repeat)]
        bench.run(bench.with_changes(single, backend=recorder).stream(), texts[0], forced(texts[0]))
        best = max(runs, key=lambda run: run.bytes_per_s)
        return Measured(1 / best.bytes_per_s, dict(recorder.calls), best.mean_patch, 1.0, 1.0)
    opened = bench.with_changes(Model.open(bundle, threads=1, batched=True, verify="sizes"), spec=single.spec)
    del single
    recorder = Recorder(opened.backend)
    batches = [bench.batch_run(opened, texts, temperature=0.8, share=0.5, slice=8) for _ in range(repeat)]
    bench.batch_run(bench.with_changes(opened, backend=recorder), texts, temperature=0.8, share=0.5, slice=8)
    batch = max(batches, key=lambda run: run.bytes_per_s)
    per_call = batch.done.tokens / max(1, batch.done.rounds)
    return Measured(1 / batch.bytes_per_s, dict(recorder.calls), batch.mean_patch, per_call, batch.patches_per_call)


def forced(text: Any) -> Any:
    from blt import bench

    return bench.Forced(text.new.tolist(), 0.8)


def nonnegative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Least squares with coefficients of at least 0: those that come out negative are left out, the worst first."""
    kept = list(range(a.shape[1]))
    while True:
        found = np.linalg.lstsq(a[:, kept], b, rcond=None)[0]
        if (found >= 0).all():
            break
        kept.pop(int(found.argmin()))
    result = np.zeros(a.shape[1])
    result[kept] = found
    return result


def stack(dim: int, layers: int, *, kv: int | None = None, window: int | None = None, head: int = 64) -> Any:
    return TransformerConfig(
        dim=dim, n_layers=layers, n_heads=max(1, dim // head), n_kv_heads=kv, window=window, max_seqlen=4096
    )


def entropy_of(dim: int, layers: int, *, window: int = 64, hashed: bool = True) -> EntropyConfig:
    tables = HashConfig(sizes=(2, 3, 4, 5, 6), rows=4096) if hashed else None
    heads = max(1, dim // 64)
    return EntropyConfig(dim=dim, n_layers=layers, n_heads=heads, window=window, max_seqlen=4096, hash=tables)


def shape(
    entropy: EntropyConfig | None,
    local: int,
    latent: tuple[int, int],
    decoder: int,
    *,
    kv: int | None = None,
    window: int = 256,
    patch: float = 4.5,
    k: int = 2,
    cross_all: bool = True,
) -> Shape:
    blt = BLTConfig(
        encoder=stack(local, 1, kv=kv, window=window),
        latent=stack(*latent),
        decoder=stack(local, decoder, kv=kv, window=window),
        cross_k=k,
        decoder_cross_all_layers=cross_all,
        hash=HashConfig(sizes=(2, 3, 4, 5, 6), rows=4096),
    )
    return Shape(blt, entropy, patch)


FITTED = {  # the coefficients of REST come from these
    "a": shape(entropy_of(128, 0), 128, (256, 4), 1, kv=1),
    "b": shape(entropy_of(128, 2, window=256), 128, (256, 6), 3, patch=5.0),
    "c": shape(entropy_of(256, 4, window=512, hashed=False), 256, (512, 4), 4, window=512),
    "d": shape(entropy_of(256, 1), 384, (768, 6), 2, kv=2, window=128, patch=6.0, cross_all=False),
    "e": shape(entropy_of(512, 6, window=512, hashed=False), 512, (1024, 4), 5, window=512),
    "f": shape(None, 512, (1024, 8), 2, kv=2, patch=6.0),
}
CHECKED = {  # and the predictions for these are compared with measurements
    "1": shape(entropy_of(128, 1), 256, (512, 6), 2, kv=1, window=128, patch=6.0, k=2),
    "2": shape(entropy_of(128, 2, window=256, hashed=False), 256, (384, 8), 4, patch=5.0),
    "3": shape(entropy_of(256, 4, window=256, hashed=False), 512, (768, 8), 3, kv=4, window=256),
    "4": shape(None, 384, (1024, 10), 3, kv=2, window=128, patch=6.0),
    "5": shape(entropy_of(512, 3, window=512, hashed=False), 512, (1024, 12), 6, window=512),
}


def measure_rest(found: dict[str, Any], precision: str, streams: int, folder: Path) -> None:
    """Adds the coefficients of REST, the seconds of the host and the rows of calls, to measured products."""
    costs, rows, seconds, hosts, batches = Costs(found, precision), [], [], [], []
    for name, each in FITTED.items():
        got, touched = measure(each, precision, streams, folder / f"{name}-{precision}"), each.touched(precision)
        in_calls = 0.0
        for (group, n), took in got.calls.items():
            typical = statistics.median(took)
            in_calls += typical * len(took)
            if group not in each.graphs or (streams == 1 and n != 1) or len(took) < 4:
                continue
            graph = each.graphs[group]
            remainder = typical - costs.products(graph, n, touched)
            rows.append(np.array(graph.rest(n)) / typical)  # divided by the time: errors are relative
            seconds.append(remainder / typical)
        hosts.append(got.seconds - in_calls / (NEW * streams))
        batches.append((got.bytes_per_call, got.patches_per_call))
        print(f"{precision}, {streams} streams, {name}: {1 / got.seconds:,.0f} bytes/s", flush=True)
    per_call, patches = (statistics.mean(column) for column in zip(*batches, strict=True))
    part = found[precision]
    part["rest"][str(streams)] = nonnegative(np.array(rows), np.array(seconds)).tolist()
    part["host"][str(streams)] = max(0.0, statistics.median(hosts))
    part["batch"][str(streams)] = {"bytes": per_call, "patches": patches}


def command_measure(a: argparse.Namespace) -> None:
    """Continues with the file of an interrupted run."""
    from blt.bench.machine import cpu_name

    found: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {"processor": cpu_name()}
    left = [(p, s) for p, s in itertools.product(PRECISIONS, STREAMS) if str(s) not in found.get(p, {}).get("rest", {})]
    if "products" not in found:
        found["products"] = measure_products()
        found.update({p: {"rest": {}, "host": {}, "batch": {}} for p in PRECISIONS})
        a.out.write_text(json.dumps(found, indent=1))
    elif left:
        with tempfile.TemporaryDirectory() as folder:
            measure_rest(found, *left.pop(0), Path(folder))
        a.out.write_text(json.dumps(found, indent=1))
    print(f"{len(left)} parts left: run the same command again" if left else f"wrote {a.out}")


def command_predict(a: argparse.Namespace) -> None:
    measured = json.loads(a.kernels.read_text())
    print("| config | MFLOPs per byte | " + " | ".join(f"{p}, {s} streams" for p in PRECISIONS for s in STREAMS) + " |")
    print("|---" * (2 + len(PRECISIONS) * len(STREAMS)) + "|")
    for path in a.configs:
        each = Shape.of_config(path)
        rates = [f"{Costs(measured, p).bytes_per_s(each, s):,.0f}" for p in PRECISIONS for s in STREAMS]
        print(f"| {path.stem} | {each.flops() / 1e6:.1f} | " + " | ".join(rates) + " |")


def command_check(a: argparse.Namespace) -> None:
    measured = json.loads(a.kernels.read_text())
    print("| model | precision | streams | predicted, bytes/s | measured | predicted / measured |\n" + "|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for precision, (name, each), streams in itertools.product(PRECISIONS, CHECKED.items(), STREAMS):
            predicted = Costs(measured, precision).bytes_per_s(each, streams)
            got = 1 / measure(each, precision, streams, Path(folder) / f"{name}-{precision}").seconds
            row = f"| {name} | {precision} | {streams} | {predicted:,.0f} | {got:,.0f} | {predicted / got:.2f} |"
            print(row, flush=True)


def candidates(latent_weights: float) -> Iterator[Shape]:
    """Shapes whose latent transformer has about this many weights."""
    for dim in range(256, 2561, 128):
        layers = round(latent_weights / stack(dim, 1).layer_params())
        if not 4 <= layers <= 32 or not 0.5 <= dim / (64 * layers) <= 2.5:
            continue
        for local, decoder, patch in itertools.product(range(128, 1025, 128), (1, 2, 3, 5), (4.5, 6.0, 8.0)):
            if not dim / 4 <= local <= dim / 2 + 64:
                continue
            for kv, window, layers_e in itertools.product((1, 2), (128, 256), (None, 0, 1, 2)):
                entropy = None if layers_e is None else entropy_of(128 if local < 512 else 256, layers_e)
                if entropy is None and patch != 6.0:
                    continue  # patches at spaces have the length of words
                yield shape(entropy, local, (dim, layers), decoder, kv=kv, window=window, patch=patch)


def command_search(a: argparse.Namespace) -> None:
    measured = json.loads(a.kernels.read_text())
    costs = Costs(measured, a.precision)
    found = sorted(
        ((costs.bytes_per_s(s, 1), costs.bytes_per_s(s, 8), s.flops(), s) for s in candidates(a.latent)),
        key=lambda f: -f[0],
    )
    if a.flops:
        found = [f for f in found if f[2] >= a.flops]
    if a.bytes_per_s:
        found = [f for f in found if f[0] >= a.bytes_per_s]
    print(
        "| bytes/s, 1 stream | 8 streams | MFLOPs per byte | latent | local | decoder | kv, window | patch | entropy |"
    )
    print("|---" * 9 + "|")
    most = 0.0
    for one, eight, flops, s in found:  # from fast to slow: on the front are those with more FLOPs than all faster ones
        if flops <= most * 1.05:
            continue
        most, m = flops, s.blt
        entropy = "spaces" if s.entropy is None else f"{s.entropy.n_layers} x {s.entropy.dim}"
        print(
            f"| {one:,.0f} | {eight:,.0f} | {flops / 1e6:.1f} | {m.latent.n_layers} x {m.latent.dim} | {m.local_dim} "
            f"| {m.decoder.n_layers} | {m.decoder.kv_heads}, {m.decoder.window} | {s.patch} | {entropy} |"
        )


def number(text: str) -> float:
    return float(text.rstrip("MGk")) * {"M": 1e6, "G": 1e9, "k": 1e3}.get(text[-1], 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("measure", help="time the kernels of this machine")
    p.add_argument("-o", "--out", type=Path, required=True)
    p.set_defaults(run=command_measure)
    p = commands.add_parser("predict", help="bytes/s of training configurations")
    p.add_argument("kernels", type=Path)
    p.add_argument("configs", type=Path, nargs="+")
    p.set_defaults(run=command_predict)
    p = commands.add_parser("check", help="compare predictions with measurements of five models")
    p.add_argument("kernels", type=Path)
    p.set_defaults(run=command_check)
    p = commands.add_parser("search", help="the front of bytes/s and FLOPs per byte")
    p.add_argument("kernels", type=Path)
    p.add_argument("--latent", type=number, default=20e6, help="weights of the latent transformer: 20M")
    p.add_argument("--precision", choices=PRECISIONS, default="int8")
    p.add_argument("--flops", type=number, help="at least this many per byte: 40M")
    p.add_argument("--bytes-per-s", type=number, help="at least this many with one stream")
    p.set_defaults(run=command_search)
    a = parser.parse_args()
    a.run(a)


if __name__ == "__main__":
    main()
