"""`blt patch`: the patches of a text in colours, as a table, as JSON, or as the paper's figure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from blt.cli import console, figures, inputs, options, scorers
from blt.figures.patches import SPECIAL
from blt_runtime.errors import UsageError
from blt_runtime.ids import OFFSET, decode, encode
from blt_runtime.patching import PatchRule, patch_lengths

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLOURS = ("black on #a8d1ff", "black on #ffd9a0")  # alternate, so that neighbouring patches differ
SCHEMES = "entropy, space, static:N, byte"


@dataclass(frozen=True)
class Patches:
    """A text and its patches. ids [N], the first is BOS; entropies [N] in nats or None; lengths [P] with sum N + 1."""

    rule: PatchRule
    ids: NDArray[np.int64]
    entropies: NDArray[np.float32] | None
    lengths: NDArray[np.int64]

    @cached_property
    def starts(self) -> list[int]:
        """Index of the first id of every patch that holds a real id."""
        edges = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        return [int(edge) for edge in edges if edge < len(self.ids)]

    @property
    def mean(self) -> float:
        """Bytes per patch; the patch of BOS alone is left out."""
        return (len(self.ids) - 1) / max(1, len(self.starts) - 1)

    def entropy_before(self, t: int) -> float | None:
        """Entropy in nats of the prediction of id t. None for the first id, and without a model."""
        return None if self.entropies is None or t == 0 else float(self.entropies[t - 1])

    def spans(self) -> list[tuple[int, int]]:
        """[start, end) of every patch of `starts`."""
        return list(zip(self.starts, [*self.starts[1:], len(self.ids)], strict=True))


def escaped(ids: NDArray[np.int64]) -> str:
    """Ids as printable text: `\\n`, `\\xff` for bytes that are not UTF-8, `<BOS>` for special ids."""
    shown, run = "", []
    for i in [*ids.tolist(), None]:
        if i is not None and i >= OFFSET:
            run.append(i)
            continue
        shown += "".join(_escape(char) for char in decode(run).decode("utf-8", "surrogateescape"))
        run = []
        shown += "" if i is None else f"<{SPECIAL[i]}>"
    return shown


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char if char.isprintable() else char.encode("unicode_escape").decode()


def parse_scheme(scheme: str, threshold: float | None) -> PatchRule | None:
    """The rule of --scheme; None for entropy without a threshold, which means the model's own rule.

    Raises UsageError for an unknown scheme, and for a threshold that is no number of nats or does not fit the scheme.
    """
    static = re.fullmatch(r"static:([1-9][0-9]{0,8})", scheme)
    if static is None and scheme not in ("entropy", "space", "byte"):
        raise UsageError(f"--scheme {scheme}: choose one of {SCHEMES}")
    if threshold is not None and scheme != "entropy":
        raise UsageError(f"--threshold belongs to --scheme entropy, not {scheme}; leave it out")
    if threshold is not None and not math.isfinite(threshold):
        raise UsageError(f"--threshold {threshold}: give a number of nats")
    if static is not None:
        return PatchRule(scheme="static", patch_size=int(static[1]))
    if scheme == "entropy":
        return None if threshold is None else PatchRule(scheme="entropy", threshold=threshold)
    return PatchRule(scheme="space" if scheme == "space" else "byte")


@options.verbosity
@options.takes(options.ModelOptions, "entropy_model", "entropy_dtype", *options.ON_DEVICES, "threads")
def patch(
    text: Annotated[str, typer.Argument(metavar="TEXT|FILE|-", help="Text, a file, or - for standard input.")],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            callback=options.model_or_bundle,
            help="Model that computes the entropies; only the entropy rule needs one (default: none).",
        ),
    ] = None,
    scheme: Annotated[str | None, typer.Option(help=f"Patch rule: {SCHEMES} (default: the model's).")] = None,
    threshold: Annotated[float | None, typer.Option(help="Threshold in nats (default: the model's).")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Draw the entropies and boundaries, as .png or .html.")
    ] = None,
    table: Annotated[bool, typer.Option("--table/--no-table", help="Also list the patches in a table.")] = True,
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Show the patches of a text. Only the entropy rule needs a model."""
    data = inputs.file_or_text(text)
    if not data:
        raise UsageError("the text is empty; give some text, a file, or - for standard input")
    figures.check_path(plot)
    rule = parse_scheme(scheme or "entropy", threshold)
    cut = _cut(encode(data, bos=True), rule, scheme, model=model, how=how)
    if plot is not None:
        _plot(cut, plot)
    if as_json:
        console.print_json("blt.patch/1", _as_json(cut))
        return
    out = console.stdout_console()
    out.print(_coloured(cut, colour=out.is_terminal and not out.no_color), soft_wrap=True)
    if table:
        out.print(_table(cut))
    console.say(_summary(cut))


def _cut(
    ids: NDArray[np.int64],
    rule: PatchRule | None,
    scheme: str | None,
    *,
    model: Path | None,
    how: options.ModelOptions,
) -> Patches:
    if model is None:
        if rule is None or rule.needs_entropy:
            raise UsageError("the entropy rule needs a model: give --model MODEL, or --scheme space, static:N or byte")
        return Patches(rule, ids, entropies=None, lengths=patch_lengths(rule, ids))
    with scorers.open_entropies(model, how) as source:
        entropies = source.entropies(ids)
        rule = _resolve(rule, scheme, source.rule)
        if rule.needs_entropy and how.entropy_dtype is not None:  # an entropy model without a rule does not store it
            rule = replace(rule, entropy_dtype=how.entropy_dtype)
        return Patches(rule, ids, entropies=entropies, lengths=patch_lengths(rule, ids, entropies))


def _resolve(given: PatchRule | None, scheme: str | None, own: PatchRule | None) -> PatchRule:
    """The rule of the options, completed from the model's own rule (max_patch_length, monotonic, threshold)."""
    if given is None:
        if own is None or (scheme == "entropy" and not own.needs_entropy):
            raise UsageError("this model stores no entropy threshold; give --threshold in nats")
        return own
    if given.needs_entropy and own is not None and own.needs_entropy:
        return replace(own, threshold=given.threshold)
    return given


def _plot(cut: Patches, path: Path) -> None:
    from blt.figures.patches import Figure, render

    if cut.entropies is None:
        raise UsageError("--plot draws entropies, which need a model: add --model MODEL")
    limit = cut.rule.threshold if cut.rule.needs_entropy and not cut.rule.monotonic else None
    title = f"{_rule_name(cut.rule)}: {cut.mean:.2f} bytes per patch"
    figure = Figure(
        cut.ids.tolist(), cut.entropies.tolist(), starts=frozenset(cut.starts), threshold=limit, title=title
    )
    figures.write(path, figure, render)


def _rule_name(rule: PatchRule) -> str:
    if rule.scheme == "static":
        return f"static patches of {rule.patch_size}"
    if not rule.needs_entropy:
        return f"{rule.scheme} patches"
    compared = "rise of the entropy" if rule.monotonic else "entropy"
    return f"{compared} > {rule.threshold:.4g} nats"


def _coloured(cut: Patches, colour: bool) -> Text:
    """Patches in alternating colours; without colours they are separated by `|`."""
    line = Text()
    for i, (start, end) in enumerate(cut.spans()):
        if i and not colour:
            line.append("|")
        shown = escaped(cut.ids[start:end]).replace("\\n", "\\n\n")  # keep the line breaks of the text
        line.append(shown, style=COLOURS[i % 2] if colour else "")
    return line


def _table(cut: Patches) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("patch", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("entropy", justify="right")
    table.add_column("text")
    for i, (start, end) in enumerate(cut.spans()):
        entropy = cut.entropy_before(start)
        shown = "" if entropy is None else f"{entropy:.3f}"
        table.add_row(str(i), str(end - start), shown, Text(escaped(cut.ids[start:end])))
    return table


def _summary(cut: Patches) -> str:
    n, patches = len(cut.ids) - 1, len(cut.starts) - 1
    return f"{n:,} bytes, {patches:,} patches after BOS, {cut.mean:.2f} bytes per patch ({_rule_name(cut.rule)})"


def _as_json(cut: Patches) -> dict[str, Any]:
    return {
        "rule": cut.rule.to_dict(),
        "bytes": len(cut.ids) - 1,
        "mean_patch_bytes": round(cut.mean, 4),
        "patch_lengths": cut.lengths,
        "patches": [
            {
                "start": start,
                "length": end - start,
                "ids": cut.ids[start:end],
                "text": escaped(cut.ids[start:end]),
                "entropy": cut.entropy_before(start),
            }
            for start, end in cut.spans()
        ],
    }
