"""`blt convert`: writes a checkpoint of any format as our `model.pt` or as a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from blt.cli import console, inputs, options
from blt_runtime.errors import UsageError

FORMATS = ("native", "hf")
DTYPES = ("float32", "float16", "bfloat16")


@options.verbosity
@options.takes(options.ModelOptions, "entropy_model", "entropy_dtype")
def convert(
    model: options.CheckpointPath,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write, or with --to native a .pt file.")
    ],
    to: Annotated[str, typer.Option("--to", help="native (model.pt) or hf (BltForCausalLM of transformers).")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16 for all weights (default: the stored ones).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Write MODEL in another format. Weights are streamed: memory holds one block of one tensor at a time."""
    if to not in FORMATS:
        raise UsageError(f"--to {to}: choose one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if to == "hf" and out.suffix == ".pt":
        raise UsageError(f"-o {out}: a Hugging Face checkpoint is a folder")
    inputs.refuse_engines(model, "their weights cannot be converted; give the checkpoint they come from")
    if inputs.is_bundle(model):
        raise UsageError(
            f"{model} is a bundle: its weights cannot be converted; give the checkpoint it was exported from"
        )
    target = out if to == "hf" or out.suffix == ".pt" else out / "model.pt"
    _check_target(out, target, force)

    import torch

    from blt.checkpoint import huggingface, native
    from blt.checkpoint.formats import open_source
    from blt.data.quantities import amount

    started = time.perf_counter()
    source = open_source(model, entropy_model=how.entropy_model)
    if how.entropy_dtype is not None:
        if source.patch_rule is None:
            raise UsageError(f"--entropy-dtype {how.entropy_dtype} belongs to the patch rule, and {model} has none")
        source = replace(source, patch_rule=replace(source.patch_rule, entropy_dtype=how.entropy_dtype))
    if to == "hf":
        huggingface.check(source)  # before all weights are read
    source.check_finite()
    target.parent.mkdir(parents=True, exist_ok=True)
    write = huggingface.write if to == "hf" else native.write
    write(source, target, None if dtype is None else getattr(torch, dtype))
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in ([target] if target.is_file() else target.iterdir()))
    if as_json:
        report = {"from": source.format, "to": to, "path": target, "bytes": size, "seconds": round(seconds, 2)}
        console.print_json("blt.convert/1", report)
        return
    console.say(f"{target}: {amount(size)}, {source.format} to {to} in {seconds:.1f} s")


def _check_target(out: Path, target: Path, force: bool) -> None:
    """Raises UsageError unless `target` may be written: a file, or for Hugging Face a folder that is replaced whole.

    --force replaces only a checkpoint of that form, never another folder.
    """
    is_file = out.suffix == ".pt"
    if out.exists() and out.is_dir() == is_file:
        raise UsageError(f"-o {out}: this is a {'folder' if is_file else 'file'}; give another path")
    there = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if there and not force:
        raise UsageError(f"{target} exists; give another path, or --force to replace it")
    if there and target.is_dir():
        from blt.checkpoint import huggingface

        if not huggingface.matches(target):
            raise UsageError(f"{target} is no Hugging Face folder of a BLT and is not replaced; give a new folder")
