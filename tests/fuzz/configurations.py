"""Draws random configurations over every option, and compares all forms of the model that each of them describes.

    python -m tests.fuzz.configurations --seeds 0:200
    python -m tests.fuzz.configurations --seeds 17 --no-export

The reference is the slow form. The candidates are whole rows, the cached PyTorch steps (in chunks, step by step, after
rewinds and in batches), the bundles of both flavours (the same four ways, and batched graphs), and the checkpoint
after a round trip through each format. A candidate may differ by NOISES times the model's own float32 noise, the
distance of the reference in float32 from itself in float64, and at least by TOLERANCE.

A seed always draws the same case. Exit code 1 if any form disagrees.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from blt.checkpoint import huggingface, huggingface_write, native
from blt.checkpoint.formats import open_source
from blt.checkpoint.models import Checkpoint, load
from blt.generate import reference
from blt.generate.torch_backend import open_model
from blt.model import BLT, BLTConfig, EntropyConfig, EntropyModel
from blt.model.bfloat16 import to_bfloat16
from blt.model.config import HashConfig, TransformerConfig
from blt_export import pipeline
from blt_runtime import Model
from blt_runtime.engine.batch import Batch
from blt_runtime.ids import BOS, EOS, NEWLINE, OFFSET
from blt_runtime.patching import PatchRule
from tests.checkpoint.facebook import write_facebook
from tests.runtime.engine.batches import read_texts
from tests.tiny import runs_rows

TOLERANCE, NOISES = 2e-5, 8.0
FLAVOURS = ("ort", "portable")
Array = npt.NDArray[Any]
Random = np.random.Generator


@dataclass(frozen=True)
class Case:
    """A model, a text that it reads, and the limits of a stream that holds the text."""

    seed: int
    checkpoint: Checkpoint
    ids: Array
    capacity: int
    chunk: int

    def describe(self) -> str:
        blt, rule = self.checkpoint.require_blt()
        used = blt.config.model_dump(exclude_defaults=True)
        return f"seed {self.seed}: {used}, {rule}, {len(self.ids)} ids, capacity {self.capacity}, chunk {self.chunk}"


class Disagreement(AssertionError):
    """A candidate that differs from the reference."""


# --- drawing -------------------------------------------------------------------------------------------------


def pick(random: Random, *values: Any) -> Any:
    return values[int(random.integers(len(values)))]


def draw(seed: int) -> Case:
    """The case of a seed."""
    random = np.random.default_rng(seed)
    config, entropy_config = draw_model(random)
    blt = BLT(config)
    generator = torch.Generator().manual_seed(seed)
    blt.init_weights(generator)
    entropy = EntropyModel(entropy_config)
    entropy.init_weights(generator)
    with torch.no_grad():
        entropy.output.weight.mul_(3)  # sharper predictions, so that entropies spread
    ids = draw_text(random)
    rule = draw_rule(random, entropy, ids)
    kept = entropy.eval() if rule.needs_entropy else None
    if kept is not None and rule.entropy_dtype == "bfloat16":
        kept = to_bfloat16(kept)
    capacity = len(ids) + int(random.integers(0, 60))
    return Case(seed, Checkpoint(blt.eval(), kept, rule), ids, capacity, int(random.integers(1, 70)))


def draw_model(random: Random) -> tuple[BLTConfig, EntropyConfig]:
    """Half of the models have what the facebook format shares between stacks."""
    dim, shared = int(pick(random, 16, 24, 32)), random.random() < 0.5
    window = int(pick(random, 5, 12, 24))
    common = {"norm_eps": float(pick(random, 1e-5, 1e-3)), "rope_theta": float(pick(random, 500.0, 500000.0))}
    local = {"window": None if random.random() < 0.3 else window, **common}

    def own() -> dict[str, Any]:
        other = {"norm_eps": float(pick(random, 1e-5, 1e-6)), "rope_theta": float(pick(random, 100.0, 10000.0))}
        return local if shared else {**other, "window": pick(random, None, 6, 17)}

    encoder, decoder = draw_stack(random, dim, **own()), draw_stack(random, dim, **own())
    latent_own = {**common, "window": None if shared or random.random() < 0.6 else int(random.integers(2, 9))}
    latent = draw_stack(random, int(pick(random, 16, 32, 48)), **latent_own)
    cross_k = int(pick(random, 1, 2, 3))
    heads = {"encoder_cross_heads": int(pick(random, 1, 2, 4)), "decoder_cross_heads": int(pick(random, 1, 2, 8))}
    if shared:
        heads["decoder_cross_heads"] = heads["encoder_cross_heads"]
    config = BLTConfig(
        encoder=TransformerConfig(**encoder),
        latent=TransformerConfig(**latent),
        decoder=TransformerConfig(**decoder),
        cross_k=cross_k,
        encoder_cross_all_layers=bool(random.integers(2)),
        decoder_cross_all_layers=bool(random.integers(2)),
        encoder_cross_window=int(pick(random, 1, 1, 2, 3)),
        decoder_cross_window=int(pick(random, 1, 1, 2, 4)),
        decoder_projection=not (latent["dim"] == dim and cross_k == 1 and random.random() < 0.7),
        pooling=pick(random, "max", "mean", "min", "learned"),
        hash=draw_hash(random),
        latent_document_mask=bool(random.integers(2)),
        **(heads if random.random() < 0.7 else {}),
    )
    entropy = draw_stack(random, int(pick(random, 16, 32)), window=pick(random, 7, 20, 512), norm_eps=1e-5)
    return config, EntropyConfig(**entropy)


def draw_stack(random: Random, dim: int, **more: Any) -> dict[str, Any]:
    heads = int(pick(random, 1, 2, 4))
    return {
        "dim": dim,
        "n_layers": int(pick(random, 1, 1, 2, 3)),
        "n_heads": heads,
        "n_kv_heads": pick(random, None, *(n for n in (1, 2, 4) if heads % n == 0)),
        "head_dim": int(pick(random, 4, 6, 8)) if random.random() < 0.3 or dim // heads % 2 else None,
        "ffn_dim": int(pick(random, 8, 24, 40)),
        "max_seqlen": 256,
        **more,
    }


def draw_hash(random: Random) -> HashConfig | None:
    if random.random() < 0.3:
        return None
    sizes = sorted({int(size) for size in random.integers(1, 12, int(random.integers(1, 5)))})
    return HashConfig(sizes=tuple(sizes), rows=int(pick(random, 1, 7, 1009)), functions=int(pick(random, 1, 2, 4)))


def draw_text(random: Random) -> Array:
    """Words, lines, documents, raw bytes and repetitions, 60 to 150 ids."""
    n = int(random.integers(60, 150))
    ids = random.integers(0, 256, n) + OFFSET
    words = random.integers(97, 123, n) + OFFSET
    words[random.random(n) < 0.2] = 32 + OFFSET
    part = np.sort(random.integers(0, n, 2))
    ids[part[0] : part[1]] = words[part[0] : part[1]]
    ids[random.random(n) < 0.05] = NEWLINE
    ids[random.random(n) < 0.04] = EOS
    repeat = int(random.integers(1, 20))
    ids[n - repeat :] = ids[:repeat]
    if random.random() < 0.8:
        ids[0] = BOS
    return ids.astype(np.int64)


def draw_rule(random: Random, entropy: EntropyModel, ids: Array) -> PatchRule:
    """A rule whose thresholds are far from the text's entropies, so that roundings move no boundary."""
    scheme = pick(random, "entropy", "entropy", "entropy", "space", "static", "byte", "bpe")
    longest = pick(random, None, 3, 9)
    newlines = bool(random.integers(2)) and scheme == "entropy"
    if scheme == "static":
        return PatchRule("static", patch_size=int(random.integers(1, 12)), max_patch_length=longest)
    if scheme != "entropy":
        return PatchRule(scheme, max_patch_length=longest)
    dtype = pick(random, "float32", "float32", "float32", "bfloat16")
    model = to_bfloat16(entropy) if dtype == "bfloat16" else entropy
    with torch.no_grad():
        values_N = reference.entropies(model, ids.tolist(), newlines)[0].numpy()
    rises_N = np.diff(values_N)
    kind = pick(random, "level", "rise", "both")
    common: dict[str, Any] = {"max_patch_length": longest, "reset_newlines": newlines, "entropy_dtype": dtype}
    if kind == "rise":
        return PatchRule("entropy", threshold=gap(rises_N), monotonic=True, **common)
    added: dict[str, Any] = {"threshold_add": gap(rises_N)} if kind == "both" else {}
    return PatchRule("entropy", threshold=gap(values_N), **added, **common)


def gap(values_N: Array) -> float:
    """The middle of the widest gap among the larger half of the values."""
    ordered = np.sort(values_N)[len(values_N) // 2 :]
    widest = int(np.diff(ordered).argmax())
    return float(ordered[widest] + ordered[widest + 1]) / 2


# --- comparing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    lengths: list[int]
    logits: Array
    tolerance: float

    def compare(self, name: str, logits: Array, first: int = 0) -> None:
        """Raises Disagreement unless `logits` are those after the ids from `first` on."""
        want = self.logits[first : first + len(logits)]
        size = np.maximum(1.0, np.abs(want).max(-1, keepdims=True))
        error = float((np.abs(logits - want) / size).max()) if np.isfinite(logits).all() else np.inf
        if logits.shape != want.shape or not error <= self.tolerance:
            raise Disagreement(f"{name}: differs from the reference by {error:.3g}, tolerance {self.tolerance:.3g}")

    def compare_lengths(self, name: str, lengths: Array) -> None:
        if lengths.tolist() != self.lengths:
            raise Disagreement(f"{name}: patch lengths {lengths.tolist()} instead of {self.lengths}")


def expect(case: Case) -> Expected:
    blt, _ = case.checkpoint.require_blt()
    ids = case.ids.tolist()
    lengths = reference.lengths_of(case.checkpoint, ids)
    logits = reference.forward(blt, ids, lengths).logits.numpy()
    exact = reference.forward(copy.deepcopy(blt).double(), ids, lengths).logits.numpy()
    size = np.maximum(1.0, np.abs(exact).max(-1, keepdims=True))
    noise = float((np.abs(logits - exact) / size).max())
    return Expected(lengths, logits, max(TOLERANCE, NOISES * noise))


def check(case: Case, export: bool = True) -> list[str]:
    """Compares every form with the reference. Returns their names. Raises Disagreement."""
    expected = expect(case)
    done = [*_whole_rows(case, expected), *_streams("PyTorch", _torch(case), case, expected)]
    with tempfile.TemporaryDirectory() as folder:
        done += _formats(case, expected, Path(folder))
        exported = case.checkpoint.patch_rule is not None and case.checkpoint.patch_rule.entropy_dtype == "float32"
        if export and exported:
            done += _bundles(case, expected, Path(folder))
    return done


def _torch(case: Case) -> Model:
    return open_model(case.checkpoint, capacity=case.capacity, chunk=case.chunk)


def _whole_rows(case: Case, expected: Expected) -> Iterator[str]:
    blt, _ = case.checkpoint.require_blt()
    with torch.no_grad():
        whole = blt(torch.from_numpy(case.ids)[None], torch.tensor([expected.lengths]), max(expected.lengths))[0]
    expected.compare("whole rows", whole.numpy())
    yield "whole rows"


def _streams(form: str, model: Model, case: Case, expected: Expected) -> Iterator[str]:
    """A model in chunks, in parts of all lengths with rewinds between them, and in a batch."""
    random = np.random.default_rng(case.seed + 1)
    score = model.score(case.ids)
    expected.compare_lengths(f"{form}, chunks", score.patch_lengths)
    expected.compare(f"{form}, chunks", score.logits)
    yield f"{form}, chunks"
    stream = model.stream(bos=False)
    while stream.position < len(case.ids):
        stream.append_ids(case.ids[stream.position : stream.position + int(pick(random, 1, 1, 2, 9, 40))])
        expected.compare(f"{form}, parts up to {stream.position}", stream.logits[None], stream.position - 1)
        if random.random() < 0.3:
            stream.rewind(int(random.integers(0, min(stream.position, 15))))
            expected.compare(f"{form}, rewound to {stream.position}", stream.logits[None], stream.position - 1)
    yield f"{form}, parts and rewinds"
    if model.spec.patch_rule.scheme != "bpe":  # its last patch depends on the end of the text
        yield from _batch(form, model, case, expected)


def _batch(form: str, model: Model, case: Case, expected: Expected) -> Iterator[str]:
    """The text in three rows, which begin to generate at different places."""
    prompts = {0: 1, 1: len(case.ids) // 2, 2: len(case.ids)}
    batch = Batch(model.spec, model.backend, model.hash_tables, 3, slice=5)
    seen = read_texts(batch, dict.fromkeys(prompts, case.ids), prompts)
    for row, prompt in prompts.items():
        expected.compare(f"{form}, row {row} of a batch", np.array(seen[row]), prompt - 1)
    yield f"{form}, batch"


def _bundles(case: Case, expected: Expected, folder: Path) -> Iterator[str]:
    """Both flavours, from one capture."""
    captured: dict[str, Any] = {}
    for flavour in FLAVOURS:
        state = pipeline.prepare(case.checkpoint, flavour, capacity=case.capacity, chunk=case.chunk)
        state.captured = captured
        report = pipeline.run(state, folder / flavour)
        yield from _streams(flavour, Model.open(report.path), case, expected)
        if report.manifest.row_graphs and runs_rows() and case.checkpoint.require_blt()[1].scheme != "bpe":
            yield from _batch(f"{flavour}, batched graphs", Model.open(report.path, batched=True), case, expected)


def _formats(case: Case, expected: Expected, folder: Path) -> Iterator[str]:
    """Round trips: the weights are the same, and every setting is, unless a warning names it."""
    source = case.checkpoint.to_source(folder)
    native.write(source, folder / "model.pt")
    _same("native", case, expected, load(folder / "model.pt"))
    yield "native"
    if not huggingface_write.obstacles(source):
        huggingface.write(source, folder / "hf")
        lost = huggingface_write.lost(source, huggingface._config(source, torch.float32))
        if not [name for name in lost if "n_kv_heads" not in name]:
            _same("Hugging Face", case, expected, load(folder / "hf"))
            yield "Hugging Face"
    if _in_facebook(case.checkpoint):
        (folder / "fb").mkdir()
        path = write_facebook(folder / "fb", case.checkpoint, "hub")
        _same("facebook", case, expected, load(path))
        assert open_source(path).patch_rule == case.checkpoint.patch_rule
        yield "facebook"


def _same(name: str, case: Case, expected: Expected, back: Checkpoint) -> None:
    if back.patch_rule is not None and case.checkpoint.patch_rule is not None:
        dtype = case.checkpoint.patch_rule.entropy_dtype
        back = back if back.patch_rule.entropy_dtype == dtype else replace(back, patch_rule=case.checkpoint.patch_rule)
    blt, _ = back.require_blt()
    if reference.lengths_of(back, case.ids.tolist()) != expected.lengths:
        raise Disagreement(f"{name}: other patches after a round trip")
    expected.compare(name, reference.forward(blt, case.ids.tolist(), expected.lengths).logits.numpy())


def _in_facebook(checkpoint: Checkpoint) -> bool:
    """Whether the format has arguments for everything in the checkpoint."""
    blt, rule = checkpoint.require_blt()
    c = blt.config
    shared = [
        {getattr(stack, name) for stack in stacks}
        for name, stacks in {
            "norm_eps": (c.encoder, c.latent, c.decoder),
            "rope_theta": (c.encoder, c.latent, c.decoder),
            "window": (c.encoder, c.decoder),
        }.items()
    ]
    plain = not rule.reset_newlines and rule.entropy_dtype == "float32" and c.pooling != "learned"
    plain = plain and c.latent.window is None and c.encoder_heads == c.decoder_heads
    return plain and all(len(values) == 1 for values in shared)


# --- the command ---------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.configurations", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0:20", help="one seed, or FIRST:END")
    parser.add_argument("--no-export", action="store_true", help="leave out the bundles, which take most of the time")
    given = parser.parse_args(arguments)
    first, _, end = given.seeds.partition(":")
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other
    began, failed = time.perf_counter(), []
    for seed in range(int(first), int(end or int(first) + 1)):
        case = draw(seed)
        try:
            done = check(case, export=not given.no_export)
            print(f"seed {seed}: {len(done)} forms agree", flush=True)
        except Exception as error:
            failed.append(seed)
            print(f"seed {seed}: {type(error).__name__}: {error}\n  {case.describe()}", flush=True)
    print(f"{len(failed)} seeds failed {failed}, {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
