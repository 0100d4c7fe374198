"""The paper's comparison at a small size: models of equal FLOPs per byte, trained on the same bytes.

    blt data prepare TEXT -o DATA
    python benchmarks/study.py DATA -o STUDY

trains an entropy model and the models of VARIANTS with `blt train` and scores each with `blt eval` on the test split,
also with noise. It writes study.md (the tables), study.json and study.png into STUDY. A killed study continues where it
stopped. docs/study.md has the tables of a run and compares them with the paper.

The byte-level transformer of configs/study/bytes.yaml sets the FLOPs per byte. In every other model, one feed-forward
width (of the latent transformer or the token model) is chosen so that the whole model has these FLOPs. With entropy
patches, the entropy model counts, too. Rows hold the same number of bytes in all models, so a step reads the same
amount of text.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blt.data import Dataset
from blt.data.token_cache import tokenised, vocabulary_for
from blt.train.config import BLTRun, BPERun, EntropyRun, RunConfig, load_config
from blt.train.dryrun import flops_per_byte
from blt_runtime.patching import PatchRule, patch_lengths

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "study"
ENTROPY = "entropy-model"
SAMPLE = 4 << 20  # bytes of training text on which space patches and tokens are measured
STEP = 8  # widths are multiples of this, which changes the FLOPs by much less than one per cent


@dataclass(frozen=True)
class Variant:
    """One model: the configuration that it starts from, and the values that it replaces."""

    name: str
    config: str
    sets: dict[str, object] = field(default_factory=dict)


def _patches(scheme: str, layers: int, **more: object) -> dict[str, object]:
    keys = {f"patching.{key}": value for key, value in more.items()}
    return {"patching.scheme": scheme, "model.latent.n_layers": layers} | keys


ENTROPY_45 = _patches("entropy", 3, target_patch_size=4.5)
LEARNED = {"model.pooling": "learned"}
SEED = {"run.seed": 1}

VARIANTS = (
    Variant("byte-level", "bytes"),
    Variant("BPE", "bpe"),
    Variant("BLT, entropy 4.5", "blt", ENTROPY_45),
    Variant("BLT, entropy 6", "blt", _patches("entropy", 4, target_patch_size=6.0)),
    Variant("BLT, entropy 8", "blt", _patches("entropy", 5, target_patch_size=8.0)),
    Variant("BLT, space", "blt", _patches("space", 4)),
    Variant("BLT, static 6", "blt", _patches("static", 4, patch_size=6, max_patch_length=None)),
    Variant("without hash n-grams", "blt", ENTROPY_45 | {"model.hash": None}),
    Variant("without pooled queries", "blt", ENTROPY_45 | LEARNED),
    # Two variants again: a difference smaller than that between two seeds has no meaning.
    Variant("BLT, entropy 4.5, seed 1", "blt", ENTROPY_45 | SEED),
    Variant("without pooled queries, seed 1", "blt", ENTROPY_45 | LEARNED | SEED),
)


@dataclass(frozen=True)
class Run:
    """A variant fitted to the data and the budget. overrides: for --set. unit: bytes per patch or token."""

    variant: Variant
    overrides: list[str]
    unit: float | None = None

    @property
    def config(self) -> RunConfig:
        return _load(self.variant.config, self.overrides)

    @property
    def reads_entropies(self) -> bool:
        return isinstance(self.config, BLTRun) and self.config.patching.scheme == "entropy"

    @property
    def folder(self) -> str:
        return self.variant.name.lower().replace(",", "").replace(" ", "-")


def chosen(folders: str | None) -> Sequence[Variant]:
    """The VARIANTS with these folder names, all for None. Raises SystemExit for an unknown name."""
    known = {Run(variant, []).folder: variant for variant in VARIANTS}
    names = folders.split(",") if folders else list(known)
    for name in names:
        if name not in known:
            raise SystemExit(f"--models {name}: choose from {', '.join(known)}")
    return [known[name] for name in names]


def _load(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def _sets(values: dict[str, object]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def fitted(variant: Variant, data: Dataset, n_bytes: int) -> Run:
    """The variant with the budget's FLOPs per byte and `n_bytes` bytes of training."""
    byte = _load("bytes")
    context, budget = byte.batch.byte_buckets[-1], flops_per_byte(byte)
    steps = max(2, round(n_bytes / (byte.batch.rows * context)))
    values = {"schedule.steps": steps, "schedule.warmup": min(100, steps // 2)} | variant.sets
    config = _load(variant.config, _sets(values))
    unit, width = None, ""
    if isinstance(config, BPERun):
        unit, width = _bytes_per_token(data, config), "model.ffn_dim"
        values["batch.byte_buckets"] = [round(context / unit)]
    elif isinstance(config, BLTRun):
        unit, width = _patch_size(data, config), "model.latent.ffn_dim"
        values["batch.patches"] = STEP * math.ceil(
            1.12 * context / unit / STEP
        )  # few rows then end before the last byte
    if width:
        values[width] = _width(variant.config, values, width, budget=budget, unit=unit)
    return Run(variant, _sets(values), unit)


def _flops(config: RunConfig, unit: float | None) -> float:
    entropy = _load("entropy")
    assert isinstance(entropy, EntropyRun)
    return flops_per_byte(config, bytes_per_token=unit, entropy=entropy.model, patch_size=unit)


def _width(name: str, values: dict[str, object], key: str, *, budget: float, unit: float | None) -> int:
    """The feed-forward width with which the model has the FLOPs of the budget. They are linear in the width."""
    low, high = (_flops(_load(name, _sets(values | {key: width})), unit) for width in (STEP, 2 * STEP))
    width = STEP * round((STEP + (budget - low) / (high - low) * STEP) / STEP)
    if width < STEP:
        raise SystemExit(f"{name}: its other parts alone have more FLOPs per byte than the byte-level transformer")
    return width


def _sample(data: Dataset) -> list[int]:
    lengths = data.split("train").lengths
    order = np.random.default_rng(0).permutation(len(lengths))
    return [int(i) for i in order[: int(np.searchsorted(np.cumsum(lengths[order]), SAMPLE)) + 1]]


def _patch_size(data: Dataset, config: BLTRun) -> float:
    if config.patching.scheme != "space":
        return config.patching.mean_patch_size
    documents, rule = data.split("train"), PatchRule("space", max_patch_length=config.patching.max_patch_length)
    members = _sample(data)
    n = sum(len(patch_lengths(rule, documents.ids(i), None, include_next_token=False)) - 1 for i in members)
    return float(documents.lengths[members].sum() / n)


def _bytes_per_token(data: Dataset, config: BPERun) -> float:
    documents, wanted = data.split("train"), config.tokenizer
    members = np.arange(len(documents))
    vocabulary = vocabulary_for(data, members, size=wanted.vocab_size, train_bytes=wanted.train_bytes, path=wanted.path)
    tokens = tokenised(data, "train", vocabulary)
    return float(documents.lengths.sum() / tokens.lengths.sum())


def _blt(*arguments: object, log: Path) -> str:
    """The command's standard output; its log is appended to the file."""
    with log.open("a") as errors:
        done = subprocess.run(
            [sys.executable, "-m", "blt.cli", *map(str, arguments)], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    if done.returncode:
        raise SystemExit(f"blt {' '.join(map(str, arguments))} failed; see {log}")
    return done.stdout


class Study:
    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.out)
        self.data = Dataset(args.data)
        self.shared = ["--threads", args.threads, *([] if args.compile else ["--no-compile"])]
        self.out.mkdir(parents=True, exist_ok=True)

    def train(self, run: Run) -> Path:
        """The path of the trained model. Trains it if it does not exist."""
        folder = self.out / run.folder
        model = folder / "model.pt"
        if not model.exists():
            entropy = ["--entropy-model", self.out / ENTROPY] if run.reads_entropies else []
            sets = [part for override in run.overrides for part in ("--set", override)]
            config = CONFIGS / f"{run.variant.config}.yaml"
            options = ["--data", self.args.data, "-o", folder, *entropy, *sets, *self.shared]
            _blt("train", run.config.kind, "-c", config, *options, log=self.out / f"{run.folder}.log")
        return model

    def score(self, run: Run) -> dict[str, Any]:
        """Bits per byte of the trained model on the test split, without and with noise."""
        options = ["--by", "group", "--limit", self.args.limit, "--context", "1k", "--baseline", "ppmd,xz"]
        noise: dict[str, Any] = self._eval(run, "noise.json", "--suite", "noise", "--items", self.args.pairs)["noise"]
        return self._eval(run, "eval.json", *options) | {"noise": noise["lines"]}

    def _eval(self, run: Run, name: str, *options: object) -> dict[str, Any]:
        """The report of `blt eval`, kept in the model's folder."""
        file, model = self.out / run.folder / name, self.train(run)
        if not file.exists():
            shared = ["--split", "test", "--threads", self.args.threads, "--json"]
            file.write_text(_blt("eval", model, self.args.data, *options, *shared, log=self.out / f"{run.folder}.log"))
        report: dict[str, Any] = json.loads(file.read_text())
        return report

    def __call__(self) -> None:
        n_bytes = round(self.args.megabytes * 1e6)
        runs = [fitted(variant, self.data, n_bytes) for variant in chosen(self.args.models)]
        if any(run.reads_entropies for run in runs):
            self.train(fitted(Variant(ENTROPY, "entropy"), self.data, n_bytes))
        with ThreadPoolExecutor(self.args.jobs) as pool:
            reports = list(pool.map(self.score, runs))
        rows = [self._row(run, report) for run, report in zip(runs, reports, strict=True)]
        (self.out / "study.json").write_text(json.dumps(rows, indent=1) + "\n")
        table = "\n".join([*_table(rows), "", *_noise_table(rows)]) + "\n"
        (self.out / "study.md").write_text(table)
        names = ",".join(run.variant.name.replace(",", "") for run in runs)
        folders = [self.out / run.folder for run in runs]
        _blt(
            "plot",
            *folders,
            "-o",
            self.out / "study.png",
            "--labels",
            names,
            "--against",  # against FLOPs, the curves would be the same: all models have the same FLOPs per byte
            "bytes",
            "--from",
            round(n_bytes / 20),
            log=self.out / "plot.log",
        )
        print(table, end="")

    def _row(self, run: Run, report: dict[str, Any]) -> dict[str, Any]:
        records = [json.loads(line) for line in (self.out / run.folder / "metrics.jsonl").read_text().splitlines()]
        last = next(r for r in reversed(records) if "loss" in r)
        valid = next(r for r in reversed(records) if "valid_bpb" in r)
        return {
            "model": run.variant.name,
            "flops_per_byte": _flops(run.config, run.unit),
            "bytes": last["bytes"],
            "bytes_per_patch": report["bytes_per_patch"] if run.config.kind == "blt" else run.unit or 1.0,
            "valid_bits_per_byte": valid["valid_bpb"],
            "test_bits_per_byte": report["bits_per_byte"],
            "kinds": _kinds(report["groups"]),
            "noise": report["noise"],
            "baselines": report["baselines"],
            "seconds": last["seconds"],
            "settings": run.overrides,
        }


def _kinds(groups: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Bits per byte of each kind, over all its groups `kind.language`."""
    kinds = sorted({name.split(".")[0] for name in groups})
    members = {kind: [group for name, group in groups.items() if name.split(".")[0] == kind] for kind in kinds}
    return {
        kind: sum(g["bits_per_byte"] * g["bytes"] for g in parts) / sum(g["bytes"] for g in parts)
        for kind, parts in members.items()
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """The table of results as Markdown lines."""
    kinds = list(rows[0]["kinds"])
    head = ["model", "MFLOPs/byte", "MB read", "bytes/patch", "test bits/byte", *kinds]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["model"], f"{row['flops_per_byte'] / 1e6:.3f}", f"{row['bytes'] / 1e6:.2f}"]
        cells.append(f"{row['bytes_per_patch']:.2f}")
        cells += [f"{value:.3f}" for value in (row["test_bits_per_byte"], *row["kinds"].values())]
        lines.append(f"| {' | '.join(cells)} |")
    for name, value in rows[0]["baselines"].items():
        lines.append(f"| {name} | | | | {value:.3f} |{' |' * len(kinds)}")
    return lines


def _noise_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: additional bits per clean byte with noise in the completion (in the prompt)."""
    recipes = list(dict.fromkeys(line["recipe"] for line in rows[0]["noise"] if line["noise_in"]))
    lines = [f"| model | clean | {' | '.join(recipes)} |", "|---" * (2 + len(recipes)) + "|"]
    for row in rows:
        rise = {(line["recipe"], line["noise_in"]): line["rise"] for line in row["noise"]}
        clean = next(line["bits_per_clean_byte"] for line in row["noise"] if not line["noise_in"])
        cells = [f"{rise[name, 'completion']:+.2f} ({rise[name, 'prompt']:+.3f})" for name in recipes]
        lines.append(f"| {row['model']} | {clean:.3f} | {' | '.join(cells)} |")
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder made by `blt data prepare`")
    parser.add_argument("-o", "--out", default="study", help="folder of the runs and the table")
    parser.add_argument(
        "--models", metavar="NAME,...", help="train only these, by the names of their folders, such as bpe"
    )
    parser.add_argument("--megabytes", type=float, default=8.0, help="text that each model trains on, in 10^6 bytes")
    parser.add_argument("--limit", default="64k", help="test bytes of each group")
    parser.add_argument("--pairs", type=int, default=60, help="pairs of prompt and completion under noise")
    parser.add_argument("--jobs", type=int, default=1, help="models trained at once")
    parser.add_argument("--threads", type=int, default=2, help="threads per model")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train without torch.compile")
    return parser.parse_args()


if __name__ == "__main__":
    Study(_arguments())()
