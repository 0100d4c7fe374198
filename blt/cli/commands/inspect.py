"""`blt inspect`: the contents of a checkpoint or a bundle, and the cost of a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from blt.cli import console, inputs, options
from blt.cli.bundle_tables import evaluation_table, parity_table, precision_text
from blt_runtime.errors import UsageError

if TYPE_CHECKING:
    from blt.checkpoint.source import Source
    from blt_runtime.bundle.bundle import Bundle


@options.verbosity
@options.takes(options.ModelOptions, "entropy_model")
def inspect(
    model: options.ModelPath,
    patch_size: Annotated[float, typer.Option(min=1.0, help="Mean patch size in bytes, for the costs per byte.")] = 4.5,
    context: Annotated[str, typer.Option(metavar="SIZE", help="Row length in bytes, for the costs.")] = "2k",
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Parameters, FLOPs and weight bytes per byte of a checkpoint; manifest and parity table of a bundle."""
    if inputs.is_bundle(model):
        if how.entropy_model is not None:
            raise UsageError(f"{model} is a bundle and holds its entropy model; leave --entropy-model out")
        from blt_runtime.bundle.bundle import Bundle

        _inspect_bundle(Bundle.open(model), patch_size=patch_size, tensors=tensors, as_json=as_json)
        return
    from blt.checkpoint.formats import open_source

    size = options.parse_size(context, "--context", at_least=1)
    source = open_source(model, entropy_model=how.entropy_model)
    report = token_report(source, size) if source.bpe is not None else source_report(source, patch_size, size)
    if tensors:
        named = [(part, name, t) for part, p in source.models().items() for name, t in p.weights.items()]
        report["tensors"] = {f"{part}.{name}": f"{t.shape} {t.dtype}" for part, name, t in named}
    if as_json:
        console.print_json("blt.inspect/1", {"path": model, "kind": "checkpoint", **report})
    else:
        console.print_tree(report)


# --- checkpoints -------------------------------------------------------------------------------------------


def token_report(source: Source, context: int) -> dict[str, Any]:
    """The report of a token-level baseline; costs of one token in rows of `context` tokens."""
    config = source.bpe.config if source.bpe else None
    assert config is not None
    return {
        "format": source.format,
        "stored": _stored(source),
        "parameters": {"token model": config.n_params(), "total": config.n_params()},
        f"FLOPs per token (rows of {context})": config.flops_per_byte(context),
        "weight bytes read per token": 4 * config.weights_read(),
        "config of the token model": _given(config.model_dump(mode="json")),
    }


def source_report(source: Source, patch_size: float, context: int) -> dict[str, Any]:
    """The report of a checkpoint, whose weights are not loaded.

    Costs are those of one byte at a mean patch of `patch_size` bytes in rows of `context` bytes. Weights count as
    float32, rows of the hash tables in their stored dtype.
    """
    from blt.bench.weight_bytes import source_weight_bytes

    blt, entropy = source.blt_config, source.entropy_config
    parameters: dict[str, int] = {}
    flops: dict[str, float] = {}
    if entropy is not None:
        parameters["entropy model"] = entropy.n_params()
        flops["entropy model"] = entropy.flops_per_byte(context)
    if blt is not None:
        parameters |= blt.params()
        flops |= blt.flops(patch_size, context)
    report: dict[str, Any] = {
        "format": source.format,
        "stored": _stored(source),
        "parameters": {**parameters, "total": sum(parameters.values())},
        f"FLOPs per byte (patches of {patch_size:g}, rows of {context})": {**flops, "total": sum(flops.values())},
        f"weight bytes read per byte (patches of {patch_size:g})": source_weight_bytes(source, patch_size),
    }
    if source.patch_rule is not None:
        report["patch rule"] = _given(source.patch_rule.to_dict())
    for name, config in (("blt", blt), ("entropy model", entropy)):
        if config is not None:
            report[f"config of the {name}"] = _given(config.model_dump(mode="json"))
    return report


def _stored(source: Source) -> dict[str, int]:
    """Bytes of weights by dtype."""
    found: dict[str, int] = {}
    for part in source.models().values():
        for tensor in part.weights.values():
            name = str(tensor.dtype).removeprefix("torch.")
            found[f"bytes as {name}"] = found.get(f"bytes as {name}", 0) + sum(p.nbytes for p in tensor.pieces)
    return found


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _given(v) if isinstance(v, dict) else v for key, v in values.items() if v is not None}


# --- bundles -----------------------------------------------------------------------------------------------


def _inspect_bundle(bundle: Bundle, *, patch_size: float, tensors: bool, as_json: bool) -> None:
    from blt.bench.weight_bytes import bundle_weight_bytes

    if as_json:
        report = {
            "path": bundle.path,
            "kind": "bundle",
            f"weight bytes read per byte (patches of {patch_size:g})": bundle_weight_bytes(bundle, patch_size),
            "manifest": bundle.manifest.to_json(),
        }
        console.print_json("blt.inspect/1", report)
        return
    manifest, spec = bundle.manifest, bundle.manifest.spec
    out = console.stdout_console()
    console.print_tree(
        {
            "bundle": bundle.path,
            "flavour": manifest.flavour,
            "precision": precision_text(manifest),
            "opset": manifest.opset,
            "ONNX Runtime": f"{manifest.min_onnxruntime} or newer",
            "capacity": f"{spec.capacity_bytes:,} bytes, {spec.capacity_patches:,} patches",
            "caches": f"{sum(g.cache_bytes() for g in spec.graphs.values()):,} bytes a stream",
            "size": f"{sum(entry.bytes for entry in manifest.files.values()):,} bytes",
            f"weight bytes read per byte (patches of {patch_size:g})": bundle_weight_bytes(bundle, patch_size),
            "patch rule": _given(spec.patch_rule.to_dict()),
            "made with": manifest.producer,
        }
    )
    if tensors:
        out.print(_graphs_table(bundle))
    if manifest.parity:
        out.print()
        out.print(parity_table(manifest.parity))
    if manifest.judged is not None:
        out.print()
        out.print(evaluation_table(manifest.judged))


def _graphs_table(bundle: Bundle) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("graph", "tensor", "", "dtype", "shape"):
        table.add_column(name)
    for name, graph in bundle.manifest.spec.graphs.items():
        for way, members in (("in", graph.inputs), ("out", graph.outputs)):
            for t in members:
                table.add_row(name, t.name, way, t.dtype, " x ".join(str(d) for d in t.shape))
    return table
