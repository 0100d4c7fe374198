"""Continue a text with an exported bundle: python embed.py BUNDLE "Once upon a time"

Needs `pip install 'blt-runtime[cpu]'`; no torch.
"""

from __future__ import annotations

import sys

from blt_runtime import BltError, Model


def main(bundle: str, prompt: str, backend: str = "onnx") -> None:
    model = Model.open(bundle, backend=backend)  # shared by all streams and threads
    stream = model.stream(seed=0)  # owns the state of one text
    stream.append(prompt)
    for piece in stream.generate(200, temperature=0.8, top_p=0.95, stop=["\n\n"]):
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()

    stream.rewind(10)  # remove the last ten tokens, exactly
    stream.append(" ... and then")  # and continue from there; earlier text is not computed again
    for piece in stream.generate(50, temperature=0):
        sys.stdout.buffer.write(piece)
    print()

    score = model.score(stream.ids)
    print(f"{len(score.ids)} ids in {len(score.patch_lengths)} patches", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except BltError as error:
        sys.exit(f"error: {error}")
