"""`blt inspect`: the contents of a checkpoint or a bundle, and the cost of a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from blt.cli import console, inputs, options
from blt.cli.bundle_tables import engines_table, evaluation_table, parity_table, precision_text, size_table
from blt_runtime.errors import UsageError

if TYPE_CHECKING:
    from blt.checkpoint.source import Source
    from blt_runtime.bundle.bundle import Bundle
    from blt_runtime.bundle.engines import Engines

SCHEMA = "blt.inspect/3"


@options.verbosity
@options.takes(options.ModelOptions, "entropy_model")
def inspect(
    model: options.ModelPath,
    patch_size: Annotated[float, typer.Option(min=1.0, help="Mean patch size in bytes, for the costs per byte.")] = 4.5,
    context: Annotated[str, typer.Option(metavar="SIZE", help="Row length in bytes, for the FLOPs.")] = "2k",
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Show parameters, FLOPs and weight bytes per byte of a checkpoint, or what a bundle or engines say."""
    if inputs.is_bundle(model):
        if how.entropy_model is not None:
            raise UsageError(f"{model} is a bundle and holds its entropy model; leave --entropy-model out")
        from blt_runtime.bundle.bundle import Bundle
        from blt_runtime.bundle.engines import Engines, is_engines

        if is_engines(model):
            _inspect_engines(Engines.read(model), as_json=as_json)
            return
        _inspect_bundle(Bundle.open(model), patch_size=patch_size, tensors=tensors, as_json=as_json)
        return
    from blt.checkpoint.formats import open_source

    size = options.parse_size(context, "--context", at_least=1)
    source = open_source(model, entropy_model=how.entropy_model)
    report = token_report(source, size) if source.bpe is not None else source_report(source, patch_size, size)
    if tensors:
        report["tensors"] = _tensors(source)
    if as_json:
        console.print_json(SCHEMA, {"path": model, "kind": "checkpoint", **report})
    else:
        _show(report)


# --- checkpoints -------------------------------------------------------------------------------------------


def token_report(source: Source, context: int) -> dict[str, Any]:
    """The report of a token-level baseline; costs of one token in rows of `context` tokens."""
    config = source.bpe.config if source.bpe else None
    assert config is not None
    costs = {
        "parameters": config.n_params(),
        "flops_per_token": config.flops_per_byte(context),
        "weight_bytes_per_token": 4 * config.weights_read(),
    }
    return {
        "format": source.format,
        "stored_bytes": _stored(source),
        "context": context,
        **{name: {"token_model": value, "total": value} for name, value in costs.items()},
        "config": {"token_model": _given(config.model_dump(mode="json"))},
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
        "stored_bytes": _stored(source),
        "patch_size": patch_size,
        "context": context,
        "parameters": console.snake_case({**parameters, "total": sum(parameters.values())}),
        "flops_per_byte": console.snake_case({**flops, "total": sum(flops.values())}),
        "weight_bytes_per_byte": console.snake_case(source_weight_bytes(source, patch_size)),
    }
    if source.patch_rule is not None:
        report["patch_rule"] = _given(source.patch_rule.to_dict())
    configs = {"blt": blt, "entropy_model": entropy}
    report["config"] = {name: _given(c.model_dump(mode="json")) for name, c in configs.items() if c is not None}
    return report


def _stored(source: Source) -> dict[str, int]:
    """Bytes of weights by dtype."""
    found: dict[str, int] = {}
    for part in source.models().values():
        for tensor in part.weights.values():
            name = str(tensor.dtype).removeprefix("torch.")
            found[name] = found.get(name, 0) + sum(p.nbytes for p in tensor.pieces)
    return found


def _tensors(source: Source) -> list[dict[str, Any]]:
    named = [(f"{part}.{name}", t) for part, p in source.models().items() for name, t in p.weights.items()]
    return [{"name": name, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in named]


def _show(report: dict[str, Any]) -> None:
    from blt.data.quantities import amount

    stored = ", ".join(f"{amount(n)} as {dtype}" for dtype, n in report["stored_bytes"].items())
    console.print_tree({"format": report["format"], "stored": stored})
    print()
    console.stdout_console().print(_parts_table(report))
    print()
    named = {"patch rule": report["patch_rule"]} if "patch_rule" in report else {}
    for part, config in report["config"].items():
        named[f"config of the {part.replace('_', ' ')}"] = _plain(config)
    console.print_tree(named)
    if "tensors" in report:
        print()
        table = Table(box=None, pad_edge=False)
        for name in ("tensor", "dtype", "shape"):
            table.add_column(name, no_wrap=name == "tensor")
        for t in report["tensors"]:
            table.add_row(t["name"], t["dtype"], " x ".join(map(str, t["shape"])))
        console.stdout_console().print(table)


def _parts_table(report: dict[str, Any]) -> Table:
    """One row per part of the model: its dimensions, its parameters, and what a byte (or token) costs."""
    from blt.data.quantities import amount, count

    unit = "token" if "flops_per_token" in report else "byte"
    flops, read = report[f"flops_per_{unit}"], report[f"weight_bytes_per_{unit}"]
    of_patches = "" if unit == "token" else f"patches of {report['patch_size']:g} bytes and "
    caption = f"costs per {unit}: {of_patches}rows of {report['context']:,} {unit}s, weights read as float32"
    table = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    for name in ("part", "layers", "dim", "heads", "parameters", f"FLOPs/{unit}", f"weights/{unit}"):
        table.add_column(name, justify="left" if name == "part" else "right")
    dims = _dims(report["config"])
    for part, parameters in report["parameters"].items():
        costs = ("" if part not in flops else count(flops[part]), "" if part not in read else amount(read[part]))
        table.add_row(part.replace("_", " "), *dims.get(part, ("", "", "")), count(parameters), *costs)
    return table


def _dims(config: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Layers, width and heads of every transformer."""
    blt = config.get("blt", {})
    stacks = {
        "entropy_model": config.get("entropy_model"),
        "token_model": config.get("token_model"),
        "local_encoder": blt.get("encoder"),
        "latent_transformer": blt.get("latent"),
        "local_decoder": blt.get("decoder"),
    }
    return {
        part: (str(stack["n_layers"]), str(stack["dim"]), str(stack["n_heads"]))
        for part, stack in stacks.items()
        if stack is not None
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Dimensions are no counts: they get no thousands separators."""
    return {key: _plain(v) if isinstance(v, dict) else str(v) for key, v in values.items()}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _given(v) if isinstance(v, dict) else v for key, v in values.items() if v is not None}


# --- bundles -----------------------------------------------------------------------------------------------


def _inspect_bundle(bundle: Bundle, *, patch_size: float, tensors: bool, as_json: bool) -> None:
    from blt.bench.weight_bytes import bundle_weight_bytes
    from blt.data.quantities import amount

    if as_json:
        report = {
            "path": bundle.path,
            "kind": "bundle",
            "patch_size": patch_size,
            "weight_bytes_per_byte": console.snake_case(bundle_weight_bytes(bundle, patch_size)),
            "manifest": bundle.manifest.to_json(),
        }
        console.print_json(SCHEMA, report)
        return
    manifest, spec, read = bundle.manifest, bundle.manifest.spec, bundle_weight_bytes(bundle, patch_size)
    out, template = console.stdout_console(), manifest.chat_template
    console.print_tree(
        {
            "bundle": bundle.path,
            "flavour": manifest.flavour,
            "precision": precision_text(manifest),
            "opset": manifest.opset,
            "ONNX Runtime": f"{manifest.min_onnxruntime} or newer",
            "capacity": f"{spec.capacity_bytes:,} bytes, {spec.capacity_patches:,} patches",
            "caches": f"{amount(sum(g.cache_bytes() for g in spec.graphs.values()))} a stream",
            f"weights read per byte (patches of {patch_size:g})": {part: amount(n) for part, n in read.items()},
            "patch rule": _given(spec.patch_rule.to_dict()),
            **({} if template is None else {"chat template": f"{len(template):,} characters"}),
            "made with": manifest.producer,
        }
    )
    out.print()
    out.print(size_table(manifest))
    if tensors:
        out.print()
        out.print(_graphs_table(bundle))
    if manifest.parity:
        out.print()
        out.print(parity_table(manifest.parity))
    if manifest.judged is not None:
        out.print()
        out.print(evaluation_table(manifest.judged))


# --- engines -----------------------------------------------------------------------------------------------


def _inspect_engines(engines: Engines, *, as_json: bool) -> None:
    """Reads engines.json only: also of engines for another machine, or of another user."""
    from blt.data.quantities import amount

    file, manifest = engines.file, engines.manifest
    if as_json:
        console.print_json(SCHEMA, {"path": engines.path, "kind": "engines", "engines": file.to_json()})
        return
    workspace = "TensorRT's own limit" if file.flags.workspace is None else amount(file.flags.workspace)
    console.print_tree(
        {
            "engines": engines.path,
            "built with": f"TensorRT {file.machine.tensorrt}, CUDA {file.machine.cuda}, driver {file.machine.driver}",
            "for": f"{file.machine.gpu}, compute capability {file.machine.compute_capability}"
            + (", and Ampere or newer" if file.flags.hardware == "ampere+" else ""),
            "flags": f"hardware {file.flags.hardware}, workspace {workspace}"
            + (", plans without weights" if file.flags.strip else ""),
            "precision": precision_text(manifest) + (", latent matrices in fp8" if file.flags.fp8 else ""),
            "capacity": f"{manifest.spec.capacity_bytes:,} bytes, {manifest.spec.capacity_patches:,} patches",
            "bundle": f"manifest.json of sha256 {file.bundle[:16]}...",
            "made with": file.producer,
        }
    )
    out = console.stdout_console()
    out.print()
    out.print(engines_table(file, manifest))
    if file.parity:
        out.print()
        out.print(parity_table(file.parity, "ONNX Runtime's CPU"))


def _graphs_table(bundle: Bundle) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("graph", "tensor", "", "dtype", "shape"):
        table.add_column(name)
    for name, graph in bundle.manifest.spec.graphs.items():
        for way, members in (("in", graph.inputs), ("out", graph.outputs)):
            for t in members:
                table.add_row(name, t.name, way, t.dtype, " x ".join(str(d) for d in t.shape))
    return table
