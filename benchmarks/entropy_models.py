"""Entropy models beside each other: bits per byte, boundaries in common with the first one, microseconds per byte.

    python benchmarks/entropy_models.py DATA RUN...         # a table on stderr, one JSON object on stdout

RUN are folders of `blt train entropy`; the first is the reference of the boundaries. Bits per byte are the last ones
of each run. Boundaries are those of the validation text of DATA, with the threshold of each model that gives the same
mean patch. The time is that of decode steps on ONNX Runtime with one thread: medians of interleaved runs of a BLT with
random weights whose encoder has the n-grams of the hashed models. Only the parts "entropy" and "hashing" depend on the
entropy model; "hashing" is that of both models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MEAN, LONGEST, REPEAT = 4.5, 24, 5
PROMPT, NEW = 256, 256
SIZES = (2, 3, 4, 5, 6, 7, 8)


def pieces_of(model: Any, documents: Any) -> list[Any]:
    """The documents of a split, with their entropies."""
    from blt.data.entropies import make_pass
    from blt.data.threshold import Piece

    ids_N, cuts = documents.tokens[0 : len(documents.tokens)], documents.token_offsets[1:-1]
    entropies_N = np.concatenate(list(make_pass(model, len(ids_N)).run(ids_N)))
    split = (np.split(values, cuts) for values in (ids_N.astype(np.int64), entropies_N))
    return [Piece(ids, entropies) for ids, entropies in zip(*split, strict=True)]


def boundaries(pieces: Sequence[Any]) -> tuple[Any, set[tuple[int, int]]]:
    """The rule with the mean patch, and where its patches begin: (document, position)."""
    from blt.data.threshold import find_rule
    from blt_runtime.patching import PatchRule, patch_lengths

    rule = find_rule(PatchRule("entropy", threshold=0.0, max_patch_length=LONGEST), pieces, MEAN)
    starts = [np.cumsum(patch_lengths(rule, piece.ids, piece.entropies))[:-1].tolist() for piece in pieces]
    return rule, {(document, start) for document, found in enumerate(starts) for start in found}


def opened(entropy: Any, rule: Any, out: Path, precision: str, text: Any) -> Any:
    """A bundle's model: a BLT with random weights and this entropy model."""
    import torch

    from blt.bench.measure import at_patch_size
    from blt.checkpoint.models import Checkpoint
    from blt.model import BLT, BLTConfig
    from blt_export import pipeline
    from blt_runtime import Model

    local = {"dim": 128, "n_heads": 4, "ffn_dim": 384, "window": 256, "max_seqlen": 2048}
    sizes = {"encoder": {**local, "n_layers": 1}, "decoder": {**local, "n_layers": 2}}
    latent = {"dim": 256, "n_layers": 4, "n_heads": 4, "ffn_dim": 768, "max_seqlen": 1024}
    blt = BLT(BLTConfig.model_validate({**sizes, "latent": latent, "hash": {"sizes": SIZES, "rows": 20011}}))
    blt.init_weights(torch.Generator().manual_seed(0))
    pipeline.export(Checkpoint(blt.eval(), entropy, rule), out, precision=precision, check=False)
    return at_patch_size(Model.open(out, threads=1), [text], MEAN)


def times(models: dict[str, Any], text: Any) -> dict[str, dict[str, float]]:
    """Microseconds per byte of the parts that depend on the entropy model."""
    from blt.bench.parts import split

    runs: dict[str, list[Any]] = {name: [] for name in models}
    for _ in range(REPEAT):
        for name, model in models.items():
            runs[name].append(split(model, text, 0.8).seconds)
    parts = ("entropy", "hashing")
    return {n: {part: 1e6 * statistics.median(s[part] for s in found) for part in parts} for n, found in runs.items()}


def bits_per_byte(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float([line["valid_bpb"] for line in lines if "valid_bpb" in line][-1])


def main() -> None:
    import torch

    from blt.bench.runs import Text
    from blt.data.dataset import Dataset
    from blt.train.initial_weights import entropy_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    documents = Dataset(options.data).split("valid")
    found: dict[str, dict[str, Any]] = {}
    rules, entropy, common = {}, {}, set[tuple[int, int]]()
    for run in options.runs:
        model = entropy_model(run)
        assert model is not None
        entropy[run.name] = model.eval().requires_grad_(False)
        pieces = pieces_of(model, documents)
        rules[run.name], starts = boundaries(pieces)
        common = common or starts
        found[run.name] = {
            "bits_per_byte": bits_per_byte(run),
            "same_boundaries": len(common & starts) / len(common),
            "weights_read": model.config.weights_read(),
        }
    ids = np.concatenate([piece.ids for piece in pieces])
    text = Text.of(bytes((ids[ids >= 4] - 4).astype(np.uint8)), PROMPT, NEW)
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "int8"):
            models = {
                name: opened(model, rules[name], Path(folder) / f"{name}-{precision}", precision, text)
                for name, model in entropy.items()
            }
            for name, parts in times(models, text).items():
                found[name] |= {f"{part}_us_{precision}": us for part, us in parts.items()}
    for name, row in found.items():
        print(f"{name:>10}", *(f"{key} {value:.4g}" for key, value in row.items()), file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
