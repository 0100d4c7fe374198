"""What `blt build --fp8` costs: bits per byte of a bundle, and of it with the latent transformer's weights rounded.

    blt export model.pt -o bundle --flavour portable --precision fp16
    python benchmarks/eight_bit_floats.py model.pt bundle text.txt      # one JSON object on stdout

Both are computed on the CPU: every half value is rounded as an engine would round it (`blt_export.verify.emulate`). The
text is cut as `blt export --eval-data` cuts it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from blt.checkpoint.models import load
from blt.cli.commands.export import EVAL_BYTES, EVAL_PIECE
from blt.evaluate import texts
from blt_export.build import cost_of_fp8
from blt_export.quantize import eight_bit_floats
from blt_export.verify import emulate, text
from blt_runtime import Bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    arguments = parser.parse_args()
    checkpoint, bundle = load(arguments.checkpoint, generates=True), Bundle.open(arguments.bundle)
    context = min(EVAL_PIECE, bundle.manifest.spec.capacity_bytes - 2)
    ids = texts.spread(arguments.text, texts.choose_split(arguments.text, None), context=context, most=EVAL_BYTES)
    found = {}
    for name, changes in {"bundle": {}, "fp8": {"latent": eight_bit_floats.round_weights}}.items():
        with emulate.on_cpu(bundle, changes=changes) as model:
            found[name] = asdict(text.evaluate(checkpoint, model, ids))
            if changes:
                found["parity"] = asdict(cost_of_fp8(bundle, model))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
