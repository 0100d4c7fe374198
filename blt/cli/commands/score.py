"""`blt score`: entropies, patches and logits of a model for given ids, as arrays in a .npz file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from blt import files
from blt.cli import console, inputs, options, scorers
from blt_runtime.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _ids(file: str) -> NDArray[np.int64]:
    from blt_runtime.ids import VOCAB, encode

    if file.endswith(".npy"):
        return inputs.load_ids(Path(file), VOCAB)
    return encode(inputs.read_file(file), bos=True, eos=False)


@options.verbosity
@options.takes(
    options.ModelOptions, "backend", "entropy_model", "entropy_dtype", "device", *options.ON_DEVICES, "threads"
)
def score(
    model: options.ModelPath,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Text or bytes (read after a BOS), ids in a .npy file, or - for standard input."
        ),
    ],
    npz: Annotated[Path, typer.Option("--npz", metavar="OUT", help="The .npz file to write.")],
    patch_lengths: Annotated[
        Path | None,
        typer.Option(
            "--patch-lengths",
            metavar="L.npy",
            help="Read the patch lengths from this file (default: by the model's rule).",
        ),
    ] = None,
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Write ids [N], entropies [N] (nats), patch_lengths [P] (sum N + 1) and logits [N, 260] of FILE to a .npz file."""
    if npz.suffix != ".npz":
        raise UsageError(f"--npz {npz}: the name must end in .npz")
    files.check_folder(npz)
    ids = _ids(file)
    lengths = None if patch_lengths is None else inputs.load_patch_lengths(patch_lengths, len(ids))
    with scorers.open_stream(model, len(ids), how) as scorer:
        result = scorer(ids, lengths)
    with files.atomic_file(npz) as out:
        np.savez(
            out,
            ids=result.ids,
            entropies=result.entropies,
            patch_lengths=result.patch_lengths,
            logits=result.logits,
        )
    summary = {"file": npz, "ids": len(ids), "patches": len(result.patch_lengths)}
    if as_json:
        console.print_json("blt.score/1", summary)
    else:
        console.log.info("%s: %s ids, %s patches", npz, f"{len(ids):,}", f"{len(result.patch_lengths):,}")
