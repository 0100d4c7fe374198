"""Options that several commands share: declared, explained and checked once.

A command names the options it accepts and receives them as one object; every command has -q and -v:

    @options.verbosity
    @options.takes(options.ModelOptions, "backend", "threads")
    def score(model: options.ModelPath, *, how: options.ModelOptions) -> None: ...
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Unpack, get_type_hints

import typer

from blt.cli import console, devices, inputs
from blt_runtime import patching
from blt_runtime.errors import UsageError, shown
from blt_runtime.grammar import Grammar
from blt_runtime.options import GenerateKeywords, GenerateOptions, resolve

BACKENDS = ("auto", "torch", "onnx")
_UNITS = {"": 1, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

Command = Callable[..., None]


def parse_size(text: str, option: str, at_least: int = 0) -> int:
    """`4096`, `4k`, `4K`, `1.5M`, `2G` as a whole number; k is 1024.

    Raises UsageError that names `option` for anything else, and for less than `at_least`.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)([kKMG]?)", text.strip())
    if not match:
        raise UsageError(f"{option}: {text!r} is not a size; write a number, optionally followed by k, K, M or G (4k)")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < at_least:
        raise UsageError(f"{option} {text}: must be at least {at_least}")
    return size


# --- single options ----------------------------------------------------------------------------------------


def existing_model(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of options that name a model: raises UsageError if there is none. Completion checks nothing."""
    return path if path is None or context.resilient_parsing else inputs.existing_model(path)


def model_or_bundle(context: typer.Context, path: Path | None) -> Path | None:
    """The same of options that accept a bundle, which a folder of `blt pull` or a name on the hub may have."""
    if path is None or context.resilient_parsing:
        return path
    return inputs.existing_model(inputs.prefer_bundle(path))


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        callback=model_or_bundle,
        help="A bundle, model.pt, a run folder or one of its checkpoints, a folder in the facebook or Hugging Face "
        "format, or a hub name.",
    ),
]
CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        callback=existing_model,
        help="A checkpoint: model.pt, a run folder or one of its checkpoints, a folder in the facebook or Hugging Face "
        "format, or a hub name.",
    ),
]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="Sampling temperature; 0 always takes the most likely byte.")
]
Speculate = Annotated[
    str,
    typer.Option(
        "--speculate",
        help="Speculative decoding: off, or its drafter (auto, lookup, decoder, lookup+decoder, entropy).",
    ),
]

Overflow = Annotated[
    str,
    typer.Option(
        "--overflow", help="When the text exceeds the model's capacity: error, or slide (forget the older half)."
    ),
]


# --- options of commands that generate ---------------------------------------------------------------------

DEFAULTS = GenerateOptions()


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How bytes are drawn. Raises UsageError for a value out of range."""

    temperature: Temperature = DEFAULTS.temperature
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Sample from the K most likely bytes (default: all).")
    ] = DEFAULTS.top_k
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p", help="Sample from the fewest bytes that together have this probability (default: all)."
        ),
    ] = DEFAULTS.top_p
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p", help="Drop bytes with less than this share of the highest probability (default: none)."
        ),
    ] = DEFAULTS.min_p
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of the sampling (default: another in each run).")
    ] = DEFAULTS.seed

    def __post_init__(self) -> None:
        self.generate_options()

    def generate_options(self, **more: Unpack[GenerateKeywords]) -> GenerateOptions:
        """These options, and `more` fields of `GenerateOptions`, which replace theirs."""
        own = GenerateOptions(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=self.seed
        )
        return resolve(own, more)


@dataclass(frozen=True, kw_only=True)
class GrammarOptions:
    """What the text must match. Raises UsageError for more than one."""

    schema: Annotated[
        str | None,
        typer.Option("--schema", metavar="FILE|JSON", help="Write one JSON value that matches this JSON schema."),
    ] = None
    regex: Annotated[
        str | None,
        typer.Option("--regex", metavar="REGEX", help="Write text that this regular expression matches as a whole."),
    ] = None
    grammar: Annotated[
        str | None,
        typer.Option("--grammar", metavar="FILE|LARK", help="Write text that matches this Lark grammar."),
    ] = None

    def __post_init__(self) -> None:
        given = [name for name in ("schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"--{given[0]} and --{given[1]}: a text matches one grammar; leave out one of them")

    def compiled(self) -> Grammar | None:
        """The grammar; None without one. Raises InputError for one that cannot be used, and MissingExtra."""
        texts = self.texts()
        return Grammar(schema=texts.get("schema"), regex=texts.get("regex"), lark=texts.get("lark")) if texts else None

    def texts(self) -> dict[str, str]:
        """The text of the schema, regular expression or Lark grammar by its name in `Grammar`; empty without one."""
        if self.schema is not None:
            schema = inputs.file_or_string(self.schema)
            if schema is self.schema and not schema.lstrip().startswith("{"):
                raise UsageError(f"--schema {shown(schema)}: neither a file nor a JSON object")
            return {"schema": schema}
        if self.grammar is not None:
            return {"lark": inputs.file_or_string(self.grammar)}
        return {} if self.regex is None else {"regex": self.regex}


# --- options of commands that open a model -----------------------------------------------------------------

ON_DEVICES = ("provider", "trust_engines", "engine_cache")
"""Fields of `ModelOptions` for commands that open a bundle or engines for single streams."""
BATCHED = ("provider", "trust_engines")
"""The same for batched streams."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is opened. `device` and `threads` count for every backend; the rest depends on the model's format.

    provider: of ONNX Runtime, which runs a bundle; engine_cache is for one of them. precision: what the model must run
    at. entropy_model: where the model's format stores it separately. Raises UsageError for an unknown backend, provider
    or device name, and for an engine cache of another provider.
    """

    backend: Annotated[
        str, typer.Option("--backend", help="torch, onnx, or auto: onnx for a bundle, torch for a checkpoint.")
    ] = "auto"
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            help="Fail unless MODEL has this precision: fp32, fp16, bf16, int8 or int4 (default: accept any).",
        ),
    ] = None
    entropy_model: Annotated[
        Path | None,
        typer.Option(
            "--entropy-model",
            metavar="PATH",
            callback=existing_model,
            help="Entropy model that MODEL's format stores separately (default: in MODEL's folder or next to it).",
        ),
    ] = None
    entropy_dtype: Annotated[
        patching.EntropyDtype | None,
        typer.Option(
            "--entropy-dtype",
            help="float32, or bfloat16 as facebookresearch/blt's loader computes entropies and threshold; PyTorch only"
            " (default: as MODEL's patch rule says).",
        ),
    ] = None
    device: Annotated[
        str, typer.Option("--device", help="Device of a checkpoint: cpu, cuda[:n], or auto, which is cpu.")
    ] = "auto"
    provider: Annotated[
        str,
        typer.Option(
            "--provider",
            help="ONNX Runtime's provider: cpu; cuda or webgpu, for the flavour cuda; tensorrt, for the flavour "
            "portable; or auto, the first that runs MODEL here.",
        ),
    ] = "cpu"
    trust_engines: Annotated[
        bool, typer.Option("--trust-engines", help="Run TensorRT engines that this user has not built: they are code.")
    ] = False
    engine_cache: Annotated[
        Path | None,
        typer.Option(
            "--engine-cache",
            metavar="DIR",
            help="Where --provider tensorrt keeps its engines (default: blt/tensorrt in the user's cache folder).",
        ),
    ] = None
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads (default: all cores).")] = None

    def __post_init__(self) -> None:
        from blt_runtime.arguments import choice
        from blt_runtime.backends.providers import KEEPING_ENGINES, NAMES, TENSORRT

        choice("--provider", self.provider, NAMES)
        if self.engine_cache is not None and self.provider not in KEEPING_ENGINES:
            raise UsageError(f"--engine-cache is for --provider {TENSORRT}, not {self.provider}: leave it out")
        if self.backend not in BACKENDS:
            raise UsageError(f"--backend {self.backend}: choose one of {', '.join(BACKENDS)}")
        devices.check_name(self.device)


# --- decorators of commands --------------------------------------------------------------------------------


def takes(record: type[Any], *names: str) -> Callable[[Command], Command]:
    """The command's parameter annotated `record`, a dataclass of options, becomes these options of the command.

    names: fields of `record`, in the order of the help; none for all of them. The others keep their defaults.
    """
    hints = get_type_hints(record, include_extras=True)
    defaults = {field.name: field.default for field in fields(record)}
    chosen = names or tuple(defaults)
    added = [_keyword(name, hints[name], defaults[name]) for name in chosen]

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        holder = next(parameter.name for parameter in own if parameter.annotation is record)

        @functools.wraps(command)
        def decorated(**values: Any) -> None:
            given = {name: values.pop(name) for name in chosen}
            command(**values, **{holder: record(**given)})

        kept = [[parameter] if parameter.name != holder else added for parameter in own]
        return _with_parameters(decorated, [parameter for some in kept for parameter in some])

    return decorate


def verbosity(command: Command) -> Command:
    """Adds -q and -v, which set the level of the logs before any other option is checked."""

    @functools.wraps(command)
    def decorated(quiet: bool, verbose: int, **values: Any) -> None:
        command(**values)

    own = inspect.signature(command, eval_str=True).parameters.values()
    added = [_keyword("quiet", _Quiet, False), _keyword("verbose", _Verbose, 0)]
    return _with_parameters(decorated, [*own, *added])


def _quiet(value: bool) -> bool:
    if value:
        console.set_verbosity(-1)
    return value


def _verbose(value: int) -> int:
    if value:
        console.set_verbosity(value)
    return value


_Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", is_eager=True, callback=_quiet, help="Print warnings and errors only.")
]
_Verbose = Annotated[
    int,
    typer.Option(
        "-v",
        "--verbose",
        is_eager=True,
        count=True,
        callback=_verbose,
        show_default=False,
        help="Print more, and the traceback of an error.",
    ),
]


def _keyword(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _with_parameters(command: Command, parameters: list[inspect.Parameter]) -> Command:
    """`command` with the signature that typer reads the options from; typer passes every value by its name."""
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    command.__dict__["__signature__"] = inspect.Signature(keywords)
    return command
