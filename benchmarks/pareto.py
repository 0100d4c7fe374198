"""Quality against speed: bits per byte of the models of a study, and how many bytes per second they generate.

    pip install onnxruntime-genai transformers
    python benchmarks/study.py DATA -o STUDY
    python benchmarks/pareto.py STUDY DATA -o OUT

BLTs are exported (`blt export`) and run on this runtime. BPE models are written as Llamas with their weights, and
onnxruntime-genai builds and runs them, as in benchmarks/tokens.py. The other models of a study have no form for
generation (byte-level transformers, hash n-grams in front of tokens) and are left out.

Both continue text of the test split: a BLT that of prompts of this text, in the patches of its rule; a Llama, which
generates freely, prompts of as many tokens as the bytes have by the tokens of the training text. Both choose the
likeliest id. Every model, precision and batch size runs in a separate process, one at a time. Rounds alternate between
them, and medians are reported. It writes pareto.md, pareto.json and pareto.png into OUT.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tokens

from blt.checkpoint.huggingface import LAYER
from blt.checkpoint.models import Checkpoint, load

CAPACITY, WARM_UP = 2048, 8
OURS, THEIRS = "BLT", "BPE"


@dataclass(frozen=True)
class Model:
    """A trained model of a study. unit: bytes per patch or token."""

    name: str
    folder: Path
    bits: float
    unit: float

    @property
    def is_blt(self) -> bool:
        return self.name.startswith(OURS)


def models_of(folder: Path) -> list[Model]:
    """The models of a study that can generate, seed 0."""
    rows = json.loads((folder / "study.json").read_text())
    return [
        Model(row["model"], folder / row["folder"], row["test_bits_per_byte"], row["bytes_per_patch"])
        for row in rows
        if not row["seed"] and row["model"].startswith((OURS, THEIRS)) and "n-grams" not in row["model"]
    ]


# --- building -----------------------------------------------------------------------------------------------------


def build(a: argparse.Namespace, model: Model, precision: str) -> Path:
    """The bundle or the folder of onnxruntime-genai, made if it does not exist."""
    place = Path(a.out) / "models" / f"{model.folder.name}-{precision}"
    if not place.exists():
        (build_blt if model.is_blt else build_llama)(a, model, precision, place)
    return place


def build_blt(a: argparse.Namespace, model: Model, precision: str, place: Path) -> None:
    from blt_export import export

    entropy = a.study / "entropy-model" / "model.pt"
    checkpoint = load(model.folder / "model.pt", entropy_model=entropy if entropy.exists() else None)
    export(checkpoint, place, capacity=CAPACITY, precision=precision, check=False)


def build_llama(a: argparse.Namespace, model: Model, precision: str, place: Path) -> None:
    source = place.parent / f"{model.folder.name}-hf"
    if not (source / "tokenizer.json").exists():
        save_llama(load(model.folder / "model.pt"), source)
    tokens.genai_builder(source, place, precision)


def save_llama(checkpoint: Checkpoint, folder: Path) -> None:
    """A token-level model as transformers' Llama, float32: the same numbers for the same ids."""
    import torch

    assert checkpoint.bpe is not None
    assert checkpoint.vocabulary is not None
    c, found = checkpoint.bpe.config, checkpoint.bpe.state_dict()
    llama = tokens.empty_llama(c, c.vocab_size, c.max_seqlen)
    weights = {
        "model.embed_tokens.weight": found["byte_embedding.weight"],
        "model.norm.weight": found["norm.weight"],
        "lm_head.weight": found["output.weight"],
    }
    for layer in range(c.n_layers):
        for ours, theirs in LAYER:
            weight = found[f"layers.{layer}.{ours}.weight"]
            if ours in ("attention.wq", "attention.wk"):
                weight = to_halves(weight, c.head_size)
            weights[f"model.layers.{layer}.{theirs}.weight"] = weight
    with torch.no_grad():
        llama.load_state_dict(weights)
    tokens.save_with_tokenizer(llama, folder)


def to_halves(weight_RD: Any, head_size: int) -> Any:
    """The inverse of `blt.checkpoint.llama.to_pairs`."""
    return weight_RD.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)


# --- running ------------------------------------------------------------------------------------------------------


def run(a: argparse.Namespace, model: Model, precision: str, batch: int) -> dict[str, float]:
    return (run_blt if model.is_blt else run_llama)(a, model, build(a, model, precision), batch)


def run_blt(a: argparse.Namespace, model: Model, bundle: Path, batch: int) -> dict[str, float]:
    from blt.bench import Forced, Text, batch_run
    from blt.bench import run as run_stream
    from blt.data import Dataset
    from blt_runtime import Model as Runtime

    size = a.prompt_bytes + a.new_bytes
    documents = Dataset(a.data).split("test")
    long = [i for i in range(len(documents)) if documents.lengths[i] >= size]
    texts = [
        Text.of(documents.bytes(long[i * len(long) // batch])[:size], a.prompt_bytes, a.new_bytes) for i in range(batch)
    ]
    if batch > 1:
        opened = Runtime.open(bundle, threads=a.threads, verify="sizes", batched=True)
        found = batch_run(opened, texts, temperature=0.0, share=tokens.SHARE, slice=tokens.SLICE)
        return {"bytes_per_s": found.bytes_per_s, "mean_patch": found.mean_patch}
    stream = Runtime.open(bundle, threads=a.threads, verify="sizes").stream
    warm = Text(texts[0].prompt, texts[0].new[:WARM_UP])
    run_stream(stream(), warm, Forced(warm.new.tolist(), 0.0))
    done = run_stream(stream(), texts[0], Forced(texts[0].new.tolist(), 0.0))
    return {"bytes_per_s": done.bytes_per_s, "mean_patch": done.mean_patch}


def run_llama(a: argparse.Namespace, model: Model, folder: Path, batch: int) -> dict[str, float]:
    config = json.loads((folder / "genai_config.json").read_text())
    return tokens.generate_tokens(
        folder,
        vocabulary=config["model"]["vocab_size"],
        bytes_per_token=model.unit,
        prompt_bytes=a.prompt_bytes,
        new_bytes=a.new_bytes,
        batch=batch,
        threads=a.threads,
    )


# --- results ------------------------------------------------------------------------------------------------------


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (bits per byte, bytes/s) those that no other point beats in both, by bits."""
    best: list[tuple[float, float]] = []
    for bits, speed in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or speed > best[-1][1]:
            best.append((bits, speed))
    return best


def speed_at(curve: Sequence[tuple[float, float]], bits: float) -> float | None:
    """The speed of the fastest model on a front with at most so many bits per byte; None if there is none."""
    return max((speed for found, speed in curve if found <= bits), default=None)


def compared(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: all points; and of each case, the fastest BLT that is at least as good as each token model."""
    lines = ["| model | bytes per patch or token | bits/byte | precision | batch | bytes/s |", "|---" * 6 + "|"]
    for r in rows:
        point = f"{r['unit']:.2f} | {r['bits']:.3f} | {r['precision']} | {r['batch']} | {r['bytes_per_s']:.0f}"
        lines.append(f"| {r['model']} | {point} |")
    lines += ["", "| precision | batch | token model | bits/byte | its bytes/s | BLT as good, bytes/s | ratio |"]
    lines.append("|---" * 7 + "|")
    for precision, batch in dict.fromkeys((r["precision"], r["batch"]) for r in rows):
        case = [r for r in rows if (r["precision"], r["batch"]) == (precision, batch)]
        ours = front([(r["bits"], r["bytes_per_s"]) for r in case if r["model"].startswith(OURS)])
        for r in case:
            if r["model"].startswith(THEIRS):
                speed = speed_at(ours, r["bits"])
                found = ["none", ""] if speed is None else [f"{speed:.0f}", f"{speed / r['bytes_per_s']:.2f}"]
                cells = [precision, str(batch), r["model"], f"{r['bits']:.3f}", f"{r['bytes_per_s']:.0f}", *found]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel for each precision and batch size: the points of both kinds and their fronts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys((r["precision"], r["batch"]) for r in rows))
    figure, axes = pyplot.subplots(1, len(cases), figsize=(4.2 * len(cases), 4), squeeze=False, layout="constrained")
    for panel, (precision, batch) in zip(axes[0], cases, strict=True):
        for kind in (OURS, THEIRS):
            case = [r for r in rows if (r["precision"], r["batch"]) == (precision, batch)]
            points = [(r["bits"], r["bytes_per_s"]) for r in case if r["model"].startswith(kind)]
            panel.plot(*zip(*front(points), strict=True), "-o", label=kind)
            panel.plot(*zip(*points, strict=True), ".", color="gray", zorder=0)
        panel.set(title=f"{precision}, batch {batch}", xlabel="bits per byte", ylabel="bytes/s", ylim=(0, None))
        panel.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the folder of benchmarks/study.py")
    parser.add_argument("data", type=Path, help="its data folder")
    parser.add_argument("-o", "--out", type=Path, default=Path("pareto"), help="exported models and results")
    tokens.add_arguments(parser, precisions="fp32,int8")
    a = parser.parse_args()
    (a.out / "models").mkdir(parents=True, exist_ok=True)
    by_name = {model.folder.name: model for model in models_of(a.study)}
    if a.child:
        step, name, precision, batch = a.child.split(",")
        print(
            json.dumps(
                run(a, by_name[name], precision, int(batch))
                if step == "run"
                else str(build(a, by_name[name], precision))
            )
        )
        return
    cases = [(name, p, int(b)) for p in a.precisions.split(",") for b in a.batches.split(",") for name in by_name]
    for name, precision, _ in cases:
        tokens.child(a, "build", name, precision, 1, script=__file__)
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {case: [] for case in cases}
    for turn in range(a.repeat):
        for case in cases:
            found[case].append(tokens.child(a, "run", *case, script=__file__))
            print(f"round {turn + 1}, {case}: {found[case][-1]['bytes_per_s']:.1f} bytes/s", file=sys.stderr)
    rows = [
        {
            "model": by_name[name].name,
            "bits": by_name[name].bits,
            "unit": by_name[name].unit,
            "precision": precision,
            "batch": batch,
            "bytes_per_s": statistics.median(run["bytes_per_s"] for run in runs),
        }
        for (name, precision, batch), runs in found.items()
    ]
    (a.out / "pareto.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = compared(rows)
    (a.out / "pareto.md").write_text("\n".join(lines) + "\n")
    plot(rows, a.out / "pareto.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
