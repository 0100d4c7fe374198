"""The released 1B at its real size, through every format to a bundle: times, peak memory, equal output.

    python benchmarks/real_size.py make DIR       random weights, bfloat16, 4.5 billion: reference and hub format
    python benchmarks/real_size.py run DIR        conversions, export with parity, opening, generation; prints a table

Needs about 50 GB of disk and 25 minutes on two cores; `run` deletes what it no longer needs. Every step is a `blt`
command in a separate process. Its peak is the kernel's count of resident memory, pages of mapped files included. The
exit code is 1 if a limit below is exceeded or two outputs differ.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "runtime"), str(ROOT / "export")]

from blt.checkpoint.facebook import facebook_name, hash_table_name  # noqa: E402
from blt.checkpoint.models import load  # noqa: E402
from blt.checkpoint.source import HASH_TABLES, shapes  # noqa: E402
from blt.checkpoint.tensors import BLOCK, StoredTensor, write_pickled, write_safetensors  # noqa: E402
from blt.generate import reference as slow  # noqa: E402
from blt.model import BLTConfig, EntropyConfig  # noqa: E402
from blt.train.config import load_config  # noqa: E402

GB = 1e9
CONVERT_PEAK, EXPORT_PEAK, OPEN_SECONDS = 8 * GB, 14 * GB, 3.0
MEAN_PATCH = 4.5
PROMPT = "The Byte Latent Transformer reads bytes, finds where the next one is hard to predict, and cuts there."


class Random(StoredTensor):
    """Random bfloat16 weights, made one block at a time: normal with sigma = width^(-1/2); ones for norms."""

    def __init__(self, name: str, shape: tuple[int, ...], seed: int, scale: float = 1.0) -> None:
        super().__init__((name,), (torch.empty(shape, dtype=torch.bfloat16, device="meta"),))
        object.__setattr__(self, "_made_of", (seed, scale))

    def blocks(self) -> Iterator[Tensor]:
        seed, scale = self._made_of  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(seed)
        for part in self.pieces[0].split(max(1, BLOCK // max(1, self.pieces[0][:1].nbytes))):
            block = torch.empty(part.shape, dtype=torch.bfloat16)
            yield (
                block.fill_(1.0)
                if block.ndim == 1
                else block.normal_(0, scale * self.shape[-1] ** -0.5, generator=generator)
            )


def random_weights(config: BLTConfig | EntropyConfig, seed: int) -> dict[str, StoredTensor]:
    """Weights under their facebook names; hash tables are separate tensors."""
    entropy = isinstance(config, EntropyConfig)
    weights: dict[str, StoredTensor] = {}
    for i, (ours, shape) in enumerate(shapes(config).items()):
        if ours == HASH_TABLES and isinstance(config, BLTConfig) and config.hash:
            for t in range(config.hash.n_tables):
                name = hash_table_name(t)
                weights[name] = Random(name, (config.hash.rows, shape[1]), seed + 1000 * (t + 1))
        else:
            name = facebook_name(ours, entropy=entropy)
            sharp = 3.0 if entropy and ours == "output.weight" else 1.0  # so that entropies spread over a nat or more
            weights[name] = Random(name, shape, seed=seed + i, scale=sharp)
    return weights


def make(folder: Path) -> None:
    """Writes the folders blt_1b and entropy_model (training format), hub/blt-1b and hub/blt-entropy."""
    blt, entropy = _released()
    total = sum(blt.params().values()) + entropy.n_params()
    print(f"{total:,} parameters, {blt.params()['hash tables']:,} of them in hash tables")
    entropy_weights = random_weights(entropy, 7)
    params = {
        "train_entropy_model": True,
        "entropy_model": _entropy_args(entropy),
        "distributed": {"model_dtype": "bf16"},
    }
    _write_json(folder / "entropy_model" / "params.json", params)
    write_pickled(folder / "entropy_model" / "consolidated.pth", {}, {"model": entropy_weights})
    threshold = _threshold(folder / "entropy_model")
    train_args = {
        "model": _blt_args(blt),
        "data": {"patcher_args": {"patching_mode": "entropy", "threshold": threshold, "patch_size": MEAN_PATCH}},
        "distributed": {"model_dtype": "bf16"},
    }
    weights = random_weights(blt, 1)
    _write_json(folder / "blt_1b" / "params.json", train_args)
    write_pickled(folder / "blt_1b" / "consolidated.pth", {}, {"model": weights})
    _write_json(folder / "hub" / "blt-1b" / "config.json", {"args": _blt_args(blt)})
    _write_json(folder / "hub" / "blt-1b" / "train_args.json", train_args)
    write_safetensors(folder / "hub" / "blt-1b" / "model.safetensors", weights)
    _write_json(folder / "hub" / "blt-entropy" / "config.json", {"args": _entropy_args(entropy)})
    write_safetensors(folder / "hub" / "blt-entropy" / "model.safetensors", entropy_weights)


def _released() -> tuple[BLTConfig, EntropyConfig]:
    """The released shapes, which are also those of two of our configurations."""
    blt, entropy = (load_config(ROOT / "configs" / f"{name}.yaml").model for name in ("blt-1b", "entropy-100m"))
    assert isinstance(blt, BLTConfig)
    assert isinstance(entropy, EntropyConfig)
    return blt, entropy


def _blt_args(c: BLTConfig) -> dict[str, Any]:
    assert c.hash is not None
    stacks = {"local_encoder": c.encoder, "local_decoder": c.decoder, "global": c.latent}
    sizes = {f"{key}_{part}": getattr(s, ours) for part, s in stacks.items() for key, ours in _SIZES}
    return sizes | {
        "rope_theta": c.latent.rope_theta,
        "max_encoder_seq_length": c.encoder.max_seqlen,
        "max_seqlen": c.latent.max_seqlen,
        "local_attention_window_len": c.encoder.window,
        "attn_impl": "xformers",
        "attn_bias_type": "block_causal",
        "cross_attn_k": c.cross_k,
        "cross_attn_nheads": c.encoder_heads,
        "cross_attn_all_layers_decoder": True,
        "cross_attn_all_layers_encoder": False,
        "downsampling_by_pooling": c.pooling,
        "encoder_hash_byte_group_size": list(c.hash.sizes),
        "encoder_hash_byte_group_vocab": c.hash.rows,
        "encoder_hash_byte_group_nb_functions": c.hash.functions,
        "patching_mode": "entropy",
    }


_SIZES = (("dim", "dim"), ("n_layers", "n_layers"), ("n_heads", "n_heads"))


def _entropy_args(c: EntropyConfig) -> dict[str, Any]:
    return {
        "dim": c.dim,
        "n_layers": c.n_layers,
        "n_heads": c.n_heads,
        "max_seqlen": c.max_seqlen,
        "sliding_window": c.window,
        "attn_bias_type": "local_block_causal",
    }


def _threshold(entropy_model: Path) -> float:
    """The threshold at which one byte in MEAN_PATCH of the prompt begins a patch, for the random weights."""
    entropy = load(entropy_model).entropy
    assert entropy is not None
    with torch.no_grad():
        values = slow.entropies(entropy, [1, *(byte + 4 for byte in PROMPT.encode())])[0].numpy()
    ordered = np.sort(values)
    at = int(len(ordered) * (1 - 1 / MEAN_PATCH))
    return round(float(ordered[at] + ordered[at + 1]) / 2, 4)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


# --- the run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    step: str
    seconds: float
    peak: int
    limit: float | None = None

    @property
    def exceeded(self) -> bool:
        return self.limit is not None and self.peak > self.limit


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: list[Result] = []
        self.faults: list[str] = []

    def blt(self, step: str, *args: str | Path, limit: float | None = None) -> bytes:
        return self.run(step, [sys.executable, "-m", "blt.cli", *map(str, args)], limit)

    def run(self, step: str, command: Sequence[str], limit: float | None = None) -> bytes:
        """Runs a child process and returns its stdout. Its seconds and peak memory are added to the table."""
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:3])}
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, cwd=self.folder)
        assert child.stdout is not None
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        result = Result(step=step, seconds=seconds, peak=usage.ru_maxrss * 1024, limit=limit)
        self.results.append(result)
        print(f"{step}: {result.seconds:.1f} s, peak {result.peak / GB:.2f} GB", file=sys.stderr, flush=True)
        if status:
            raise SystemExit(f"{step} failed")
        self.expect(not result.exceeded, f"{step}: peak {result.peak / GB:.2f} GB is above {(limit or 0) / GB:g} GB")
        return output

    def expect(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)
            print(fault, file=sys.stderr, flush=True)


OPEN = """
import json, re, sys, time
from pathlib import Path
from blt_runtime import Model
started = time.perf_counter()
model = Model.open(sys.argv[1])
opened = time.perf_counter()
stream = model.stream()
stream.append(sys.argv[2][:64])
first = time.perf_counter()
text = list(stream.generate_ids(64, temperature=0, stop_at_eos=False))
done = time.perf_counter()
resident, here = 0, False
for line in Path("/proc/self/smaps").read_text().splitlines():
    if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
        here = line.endswith("hash_tables.npy")
    elif here and line.startswith("Rss:"):
        resident += int(line.split()[1]) * 1024
status = dict(l.split(":", 1) for l in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"open": opened - started, "first": first - opened, "bytes_per_s": 64 / (done - first),
                  "tables_resident": resident, "resident": int(status["VmRSS"].split()[0]) * 1024}))
"""


def run(folder: Path) -> int:
    bench = Bench(folder)
    convert(bench)
    bench.blt("inspect native", "inspect", "native/model.pt")
    bench.blt("export, parity", "export", "native/model.pt", "-o", "bundle", "--force", limit=EXPORT_PEAK)
    facts = json.loads(bench.run("open, 64 bytes", [sys.executable, "-c", OPEN, "bundle", PROMPT]))
    bench.expect(facts["open"] < OPEN_SECONDS, f"opening takes {facts['open']:.2f} s")
    bench.expect(facts["tables_resident"] < 64 << 20, f"{facts['tables_resident']:,} bytes of hash tables are resident")
    generate = ["generate", "-n", "64", "--temperature", "0", "--raw", "--no-stream"]
    outputs = [
        bench.blt("generate, bundle", *generate, "bundle", PROMPT),
        bench.blt("generate, PyTorch", *generate, "native/model.pt", PROMPT),
    ]
    bench.expect(outputs[0] == outputs[1] and len(outputs[0]) > 0, f"greedy bytes differ: {outputs}")
    report(bench, facts, outputs[0])
    return 1 if bench.faults else 0


def convert(bench: Bench) -> None:
    """Converts each format to ours. All three must give the same file, byte for byte."""
    folder = bench.folder
    bench.blt(
        "reference to native", "convert", "blt_1b", "-o", "native", "--to", "native", "--force", limit=CONVERT_PEAK
    )
    bench.blt("native to hf", "convert", "native", "-o", "hf", "--to", "hf", "--force", limit=CONVERT_PEAK)
    for name, source in (("hub", "hub/blt-1b"), ("hf", "hf")):
        bench.blt(
            f"{name} to native", "convert", source, "-o", "again", "--to", "native", "--force", limit=CONVERT_PEAK
        )
        same = filecmp.cmp(folder / "native" / "model.pt", folder / "again" / "model.pt", shallow=False)
        bench.expect(same, f"{name} to native gives another file than reference to native")
        shutil.rmtree(folder / "again")


def report(bench: Bench, facts: dict[str, float], text: bytes) -> None:
    print("| step | seconds | peak resident GB | limit |\n|---|---|---|---|")
    for r in bench.results:
        print(f"| {r.step} | {r.seconds:.1f} | {r.peak / GB:.2f} | {f'{r.limit / GB:g}' if r.limit else ''} |")
    print(
        f"\nThe bundle opens in {facts['open']:.2f} s, has read the first 64 bytes {facts['first']:.2f} s later and "
        f"writes {facts['bytes_per_s']:.2f} bytes/s; {facts['tables_resident'] / 1e6:.1f} MB of its hash tables are "
        f"resident, "
        f"{facts['resident'] / GB:.2f} GB in all. Bundle and PyTorch write the same {len(text)} bytes."
    )
    print("\n".join(bench.faults) or "Every limit holds.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["make", "run"])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if given.step == "run":
        return run(folder)
    make(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
