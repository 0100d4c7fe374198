"""The paper's comparison at a small size: models of equal FLOPs per byte, trained on the same bytes.

    blt data prepare TEXT -o DATA
    python benchmarks/study.py DATA -o STUDY

trains an entropy model and the models of `_variants` with `blt train`, and scores each with `blt eval` on the test
split, also with noise. It writes study.md (the tables), study.json and study.png into STUDY. A killed study continues
where it stopped. docs/study.md has the tables of a run and compares them with the paper.

    python benchmarks/study.py DATA -o STUDY --pilots

first tunes the learning rate of each family of models and writes STUDY/rates.json, which later runs read. Without that
file every model has the rate of its configuration. With --models, only the families of these models are tuned. Pilots
read as much text as the study (--megabytes), because shorter runs are best at higher rates; the best one is the
study's own run of that model.

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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
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
    """One model: the configuration that it starts from, and the values that it replaces.

    tuned_as: the family whose learning rate it has.
    """

    name: str
    config: str
    sets: dict[str, object] = field(default_factory=dict)
    tuned_as: str = ""

    @property
    def family(self) -> str:
        return self.tuned_as or self.config


def _patches(scheme: str, layers: int, **more: object) -> dict[str, object]:
    keys = {f"patching.{key}": value for key, value in more.items()}
    return {"patching.scheme": scheme, "model.latent.n_layers": layers} | keys


def _tables(dim: int, sizes: Sequence[int]) -> dict[str, object]:
    """Hash n-grams of this width whose tables have as many parameters as those of the BLT."""
    blt = _load("blt")
    assert isinstance(blt, BLTRun)
    assert blt.model.hash
    rows = blt.model.hash.params(blt.model.local_dim) // (len(sizes) * dim)
    return {"model.hash": {"sizes": list(sizes), "rows": rows}}


def _variants() -> tuple[Variant, ...]:
    entropy_45 = _patches("entropy", 3, target_patch_size=4.5)
    small = {"model.dim": 128, "model.n_layers": 2, "model.n_heads": 4, "tokenizer.vocab_size": 16384}
    return (
        Variant("byte-level", "bytes"),
        Variant("byte-level with n-grams", "bytes", _tables(128, range(3, 9)), "bytes with n-grams"),
        Variant("BPE", "bpe"),
        Variant("BPE with n-grams", "bpe", _tables(224, (2, 3, 4)), "bpe with n-grams"),
        Variant("BPE, 1024 ids", "bpe", {"tokenizer.vocab_size": 1024}),
        Variant("BPE, 16384 ids", "bpe", small),
        Variant("BLT, entropy 4.5", "blt", entropy_45),
        Variant("BLT, entropy 6", "blt", _patches("entropy", 4, target_patch_size=6.0)),
        Variant("BLT, entropy 8", "blt", _patches("entropy", 5, target_patch_size=8.0)),
        Variant("BLT, space", "blt", _patches("space", 4)),
        Variant("BLT, static 6", "blt", _patches("static", 4, patch_size=6, max_patch_length=None)),
        Variant("without hash n-grams", "blt", entropy_45 | {"model.hash": None}, "blt without n-grams"),
        Variant("without pooled queries", "blt", entropy_45 | {"model.pooling": "learned"}),
    )


PILOTS = {  # the models that choose the learning rates of their families
    "bytes": "byte-level",
    "bytes with n-grams": "byte-level with n-grams",
    "bpe": "BPE",
    "bpe with n-grams": "BPE with n-grams",
    "blt": "BLT, space",
    "blt without n-grams": "without hash n-grams",
}
RATES = (2e-3, 4e-3, 8e-3, 16e-3)
"""Rates tried first. If the best one is the smallest or the largest, its half or its double is tried, too."""


@dataclass(frozen=True)
class Run:
    """A variant fitted to the data and the budget. overrides: for --set. unit: bytes per patch or token. rate: a tuned
    learning rate; None is that of the configuration."""

    variant: Variant
    overrides: list[str]
    unit: float | None = None
    seed: int = 0
    rate: float | None = None

    @property
    def config(self) -> RunConfig:
        return _load(self.variant.config, self.overrides)

    @property
    def reads_entropies(self) -> bool:
        return isinstance(self.config, BLTRun) and self.config.patching.scheme == "entropy"

    @property
    def folder(self) -> str:
        name = self.variant.name.lower().replace(",", "").replace(" ", "-")
        return f"{name}-seed-{self.seed}" if self.seed else name


def chosen(folders: str | None) -> Sequence[Variant]:
    """The variants with these folder names, all for None. Raises SystemExit for an unknown name."""
    known = {Run(variant, []).folder: variant for variant in _variants()}
    names = folders.split(",") if folders else list(known)
    for name in names:
        if name not in known:
            raise SystemExit(f"--models {name}: choose from {', '.join(known)}")
    return [known[name] for name in names]


def _load(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def _sets(values: dict[str, object]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def fitted(variant: Variant, data: Dataset, n_bytes: int, seed: int = 0, rate: float | None = None) -> Run:
    """The variant with the budget's FLOPs per byte and `n_bytes` bytes of training.

    rate: the learning rate; that of the configuration if None.
    """
    byte = _load("bytes")
    context, budget = byte.batch.byte_buckets[-1], flops_per_byte(byte)
    steps = max(2, round(n_bytes / (byte.batch.rows * context)))
    values = {"schedule.steps": steps, "schedule.warmup": min(100, steps // 2), "run.seed": seed} | variant.sets
    if rate is not None:
        values["optimizer.lr"] = rate
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
    return Run(variant, _sets(values), unit, seed, rate)


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

    def train(self, run: Run, name: str | Path | None = None) -> Path:
        """The path of the trained model. Trains it if it does not exist. name: of its folder in STUDY."""
        folder = self.out / (name or run.folder)
        model = folder / "model.pt"
        folder.parent.mkdir(exist_ok=True)
        pilot = self._pilot_folder(run)
        if name is None and not run.seed and not folder.exists() and (self.out / pilot / "model.pt").exists():
            folder.symlink_to(pilot)
        if not model.exists():
            entropy = ["--entropy-model", self.out / ENTROPY] if run.reads_entropies else []
            sets = [part for override in run.overrides for part in ("--set", override)]
            config = CONFIGS / f"{run.variant.config}.yaml"
            options = ["--data", self.args.data, "-o", folder, *entropy, *sets, *self.shared]
            _blt("train", run.config.kind, "-c", config, *options, log=folder.parent / f"{folder.name}.log")
        return model

    def score(self, run: Run) -> dict[str, Any]:
        """Bits per byte of the trained model on the test split, in pieces as long as its rows, which begin as rows of
        training do; with seed 0 also with noise."""
        options = ["--by", "group", "--limit", self.args.limit, "--context", "1k", "--continued"]
        report = self._eval(run, "eval.json", *options, "--baseline", "ppmd,xz")
        if run.seed or not self.args.pairs:
            return report
        noise: dict[str, Any] = self._eval(run, "noise.json", "--suite", "noise", "--items", self.args.pairs)["noise"]
        return report | {"noise": noise["lines"]}

    def _eval(self, run: Run, name: str, *options: object) -> dict[str, Any]:
        """The report of `blt eval`, kept in the model's folder."""
        file, model = self.out / run.folder / name, self.train(run)
        if not file.exists():
            shared = ["--split", "test", "--threads", self.args.threads, "--json"]
            file.write_text(_blt("eval", model, self.args.data, *options, *shared, log=self.out / f"{run.folder}.log"))
        report: dict[str, Any] = json.loads(file.read_text())
        return report

    @property
    def rates(self) -> dict[str, float]:
        """The tuned learning rate of each family; empty before the pilots."""
        return self._piloted("chosen")

    @property
    def _tries(self) -> dict[str, dict[float, float]]:
        return self._piloted("valid_bits_per_byte")

    def _piloted(self, key: str) -> dict[str, Any]:
        file = self.out / "rates.json"
        found: dict[str, Any] = json.loads(file.read_text())[key] if file.exists() else {}
        return found

    def pilots(self) -> None:
        """Writes rates.json: validation bits per byte of each family at several rates, and the best rate.

        With --models, only the families of these models are tuned; the others stay in the file.
        """
        by_name = {variant.name: variant for variant in _variants()}
        families = {variant.family for variant in chosen(self.args.models)}
        pilots = {family: by_name[name] for family, name in PILOTS.items() if family in families}
        with ThreadPoolExecutor(self.args.jobs) as pool:
            tried = dict(zip(pilots, pool.map(self._tried, pilots.values()), strict=True))
        best = {family: min(tries, key=lambda rate: tries[rate]) for family, tries in tried.items()}
        content = {"chosen": self.rates | best, "valid_bits_per_byte": self._tries | tried}
        (self.out / "rates.json").write_text(json.dumps(content | {"megabytes": self.args.megabytes}, indent=1) + "\n")
        rates = sorted({rate for tries in tried.values() for rate in tries})
        print(f"| family | {' | '.join(f'{rate:g}' for rate in rates)} |\n{'|---' * (1 + len(rates))}|")
        for family, tries in tried.items():
            cells = [f"{tries[rate]:.3f}" if rate in tries else "" for rate in rates]
            print(f"| {family} | {' | '.join(cells)} |")

    def _tried(self, variant: Variant) -> dict[float, float]:
        """Validation bits per byte of the variant, by learning rate."""
        found: dict[float, float] = {}
        untried = list(RATES)
        while untried:
            rate = untried.pop(0)
            found[rate] = self._valid(self._pilot(variant, rate))
            if not untried:
                best = min(found, key=lambda tried: found[tried])
                untried = [next_ for next_ in (best / 2, best * 2) if next_ not in found]
        return found

    def _pilot(self, variant: Variant, rate: float) -> Path:
        run = fitted(variant, self.data, round(self.args.megabytes * 1e6), rate=rate)
        if run.reads_entropies:
            self._entropy_model()
        folder = self._pilot_folder(run)
        self.train(run, folder)
        return folder

    def _pilot_folder(self, run: Run) -> Path:
        return Path("pilots") / f"{run.folder}-{run.rate}-{self.args.megabytes:g}MB"

    def _entropy_model(self) -> None:
        self.train(fitted(Variant(ENTROPY, "entropy"), self.data, round(8e6)), Path(ENTROPY))

    def reports(self) -> list[tuple[Run, dict[str, Any]]]:
        """Trains and scores the chosen models."""
        n_bytes = round(self.args.megabytes * 1e6)
        seeds, rates = range(self.args.seeds), self.rates
        runs = [
            fitted(variant, self.data, n_bytes, seed, rates.get(variant.family))
            for seed in seeds
            for variant in chosen(self.args.models)
        ]
        if any(run.reads_entropies for run in runs):
            self._entropy_model()
        with ThreadPoolExecutor(self.args.jobs) as pool:
            return list(zip(runs, pool.map(self.score, runs), strict=True))

    def __call__(self) -> None:
        found = self.reports()
        runs = [run for run, _ in found]
        rows = [self._row(run, report) for run, report in found]
        (self.out / "study.json").write_text(json.dumps(rows, indent=1) + "\n")
        table = "\n".join([*_table(rows), "", *_noise_table(rows)]) + "\n"
        (self.out / "study.md").write_text(table)
        names = ",".join(run.variant.name.replace(",", "") for run in runs if not run.seed)
        folders = [self.out / run.folder for run in runs if not run.seed]
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
            round(self.args.megabytes * 1e6 / 20),
            log=self.out / "plot.log",
        )
        print(table, end="")

    def _row(self, run: Run, report: dict[str, Any]) -> dict[str, Any]:
        last = next(r for r in reversed(self._metrics(run.folder)) if "loss" in r)
        return {
            "model": run.variant.name,
            "seed": run.seed,
            "folder": run.folder,
            "flops_per_byte": _flops(run.config, run.unit),
            "bytes": last["bytes"],
            "bytes_per_patch": report["bytes_per_patch"] if run.config.kind == "blt" else run.unit or 1.0,
            "valid_bits_per_byte": self._valid(run.folder),
            "test_bits_per_byte": report["bits_per_byte"],
            "kinds": bits_by(0, report["groups"]),
            "noise": report.get("noise", []),
            "baselines": report["baselines"],
            "seconds": last["seconds"],
            "settings": run.overrides,
        }

    def _metrics(self, folder: str | Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / folder / "metrics.jsonl").read_text().splitlines()]

    def _valid(self, folder: str | Path) -> float:
        return float(next(r for r in reversed(self._metrics(folder)) if "valid_bpb" in r)["valid_bpb"])


def bits_by(part: int, groups: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Bits per byte of each kind (part 0) or language (part 1), over all its groups `kind.language`."""
    members: dict[str, list[Mapping[str, Any]]] = {}
    for name, group in groups.items():
        members.setdefault(name.split(".")[part], []).append(group)
    return {
        key: sum(g["bits_per_byte"] * g["bytes"] for g in parts) / sum(g["bytes"] for g in parts)
        for key, parts in sorted(members.items())
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """The table of results as Markdown lines: means over seeds, and half the range of the test bits."""
    kinds = list(rows[0]["kinds"])
    head = ["model", "seeds", "MFLOPs/byte", "MB read", "bytes/patch", "test bits/byte", *kinds]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, found in _by_model(rows).items():
        bits = [row["test_bits_per_byte"] for row in found]
        spread = f" ± {(max(bits) - min(bits)) / 2:.3f}" if len(bits) > 1 else ""
        cells = [name, str(len(found)), f"{found[0]['flops_per_byte'] / 1e6:.3f}"]
        cells += [f"{mean(row['bytes'] for row in found) / 1e6:.2f}"]
        cells += [f"{mean(row['bytes_per_patch'] for row in found):.2f}", f"{mean(bits):.3f}{spread}"]
        cells += [f"{mean(row['kinds'][kind] for row in found):.3f}" for kind in kinds]
        lines.append(f"| {' | '.join(cells)} |")
    for name, value in rows[0]["baselines"].items():
        lines.append(f"| {name} | | | | | {value:.3f} |{' |' * len(kinds)}")
    return lines


def _by_model(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [row for row in rows if row["model"] == name] for name in dict.fromkeys(row["model"] for row in rows)}


def _noise_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: additional bits per clean byte with noise in the completion (in the prompt), of seed 0."""
    rows = [row for row in rows if row["noise"]]
    if not rows:
        return []
    recipes = list(dict.fromkeys(line["recipe"] for line in rows[0]["noise"] if line["noise_in"]))
    lines = [f"| model | clean | {' | '.join(recipes)} |", "|---" * (2 + len(recipes)) + "|"]
    for row in rows:
        rise = {(line["recipe"], line["noise_in"]): line["rise"] for line in row["noise"]}
        clean = next(line["bits_per_clean_byte"] for line in row["noise"] if not line["noise_in"])
        cells = [f"{rise[name, 'completion']:+.2f} ({rise[name, 'prompt']:+.3f})" for name in recipes]
        lines.append(f"| {row['model']} | {clean:.3f} | {' | '.join(cells)} |")
    return lines


def add_arguments(parser: argparse.ArgumentParser, models: str | None = None, pairs: int = 60) -> None:
    """The options of a study. models, pairs: their defaults."""
    parser.add_argument("data", help="a folder made by `blt data prepare`")
    parser.add_argument("-o", "--out", default="study", help="folder of the runs and the table")
    parser.add_argument(
        "--models", metavar="NAME,...", default=models,
        help="train only these, by the names of their folders, such as bpe",
    )  # fmt: skip
    parser.add_argument("--megabytes", type=float, default=8.0, help="text that each model trains on, in 10^6 bytes")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each model")
    parser.add_argument("--pilots", action="store_true", help="tune the learning rates instead")
    parser.add_argument("--limit", default="64k", help="test bytes of each group")
    parser.add_argument("--pairs", type=int, default=pairs, help="pairs of prompt and completion under noise; 0: none")
    parser.add_argument("--jobs", type=int, default=1, help="models trained at once")
    parser.add_argument("--threads", type=int, default=2, help="threads per model")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train without torch.compile")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    study = Study(arguments)
    study.pilots() if arguments.pilots else study()
