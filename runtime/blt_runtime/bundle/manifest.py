"""manifest.json of a bundle: read, validated, written. The only module that defines the file's layout.

`Manifest` mirrors the file key by key. Reading is strict: an unknown key, a missing key or a wrong type is
a ManifestError; a newer format version is a VersionError, raised before anything else is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import reading
from ..errors import BundleError, ConfigError, ManifestError, VersionError, shown
from ..records import FORMER, from_dict, to_dict
from .spec import ModelSpec

FORMAT = "blt-bundle"
VERSION = 5
"""2: added the types of hash tables and of a rule's entropies, and each graph's precision; 1 is read as float32.
3: added batched graphs, and hash tables of 8 bits. 4: added resident graphs, and half precision. 5: added
hash tables of the entropy model, which may also be without layers."""
FILE_NAME = "manifest.json"
QUANTISED = ("int8", "int4")
"""Precisions of matrices only; the rest is `around_codes(flavour)`."""
PRECISIONS = ("fp32", "fp16", "bf16", *QUANTISED)


def around_codes(flavour: str) -> str:
    """The precision of what is not packed in a graph of 8 or 4 bits: float16 in the flavours for GPUs."""
    return "fp32" if flavour == "ort" else "fp16"


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: size, and sha256 in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class FileRef:
    """The plain name of a file in the bundle."""

    file: str


Measure = Literal["largest", "rms", "block", "step"]


@dataclass(frozen=True)
class Parity:
    """One line of the parity table that an export or a build printed. `positions`: compared (for weights: blocks).

    measure: what `error` is. "largest": the largest difference, relative to the largest number of its vector (of
    batched graphs: of all), at least 1. "rms": the root mean square of the differences, relative to that of the
    reference. "block": of quantised weights, the root mean square of the worst block, relative to its largest weight.
    "step": of hash tables in 8 bits, the largest difference in half steps of their rows. None in files of earlier
    versions, which do not say it.
    """

    output: str
    error: float = field(metadata={FORMER: "max_abs_error"})
    tolerance: float
    positions: int
    measure: Measure | None = None


@dataclass(frozen=True)
class Judged:
    """The model in float32 (PyTorch) and this bundle on one text of `bytes` bytes: bits per byte of each, and the
    patch boundaries: how many the float model sets, how many of them the bundle lacks, and how many it adds."""

    bytes: int
    float_bits_per_byte: float
    bits_per_byte: float
    boundaries: int
    boundaries_lost: int
    boundaries_new: int


LONGEST_TEMPLATE = 1 << 16
"""Most characters of a chat template."""


@dataclass(frozen=True)
class Manifest:
    """A bundle's description of itself. `config` and `producer` are for people; no code computes from them.

    `hash_tables` is an .npy [T * rows, D_l], `entropy_tables` that of the entropy model; `files` lists every file but
    the manifest itself. `precision` is the export's setting, `precisions` that of each graph ("fp32", "fp16", "bf16";
    of its matrices only, "int8" or "int4"), by default `precision`. `row_graphs` are the batched graphs
    (`spec.row_spec`) on the same weights; empty if there are none. `resident_graphs` are those for devices
    (`spec.resident_spec`), `table_graph` is the batched encoder that gathers from hash tables in memory of a device
    (`spec.table_spec`), also on the same weights. `chat_template` is the Jinja source for chats.
    """

    producer: dict[str, Any]
    flavour: Literal["ort", "cuda", "portable"]
    precision: str
    opset: int
    min_onnxruntime: str
    config: dict[str, Any]
    spec: ModelSpec
    graphs: dict[str, FileRef]
    hash_tables: FileRef | None
    files: dict[str, FileEntry]
    parity: tuple[Parity, ...] = field(default=())
    precisions: dict[str, str] = field(default_factory=dict)
    judged: Judged | None = None
    row_graphs: dict[str, FileRef] = field(default_factory=dict)
    resident_graphs: dict[str, FileRef] = field(default_factory=dict)
    table_graph: FileRef | None = None
    chat_template: str | None = None
    entropy_tables: FileRef | None = None

    @property
    def tables(self) -> dict[str, FileRef]:
        """The files of the hash tables by graph."""
        named = {"entropy": self.entropy_tables, "encoder": self.hash_tables}
        return {name: ref for name, ref in named.items() if ref is not None}

    def precision_of(self, graph: str) -> str:
        """The precision of a graph, one of PRECISIONS."""
        return self.precisions.get(graph, self.precision)

    def arithmetic(self) -> set[str]:
        """The precisions in which the graphs compute: those of their activations."""
        precisions = set(map(self.precision_of, self.graphs))
        return {around_codes(self.flavour) if p in QUANTISED else p for p in precisions}

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **to_dict(self)}

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Raises ManifestError or VersionError."""
        if not isinstance(data, Mapping):
            raise ManifestError("manifest.json must hold an object")
        _check_version(data)
        body = {key: value for key, value in data.items() if key not in ("format", "version")}
        try:
            manifest = from_dict(cls, body, "manifest.json", ManifestError)
        except ConfigError as error:  # parts that contradict each other, found by the specs themselves
            raise ManifestError(f"manifest.json: {error}") from error
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raises ManifestError if its parts contradict each other or name files outside the bundle."""
        for name in (*self.files, *(ref.file for ref in self.references())):
            check_name(name)
        for ref in self.references():
            if ref.file not in self.files:
                raise ManifestError(f"manifest.json uses {shown(ref.file)} but does not list it under 'files'")
        if set(self.graphs) != set(self.spec.graphs):
            raise ManifestError("manifest.json names different graphs under 'graphs' and 'spec'")
        for key, graphs in (("row_graphs", self.row_graphs), ("resident_graphs", self.resident_graphs)):
            if graphs and set(graphs) != set(self.graphs):
                raise ManifestError(f"manifest.json names different graphs under 'graphs' and {key!r}")
        if not set(self.precisions) <= set(self.graphs):
            raise ManifestError("manifest.json names graphs under 'precisions' that it does not have")
        if set(self.tables) != set(self.spec.hashes):
            raise ManifestError("manifest.json must name hash tables exactly when 'spec' has a hash")
        if self.chat_template is not None and len(self.chat_template) > LONGEST_TEMPLATE:
            raise ManifestError(f"manifest.json has a 'chat_template' of over {LONGEST_TEMPLATE:,} characters")

    def references(self) -> list[FileRef]:
        graphs = [*self.graphs.values(), *self.row_graphs.values(), *self.resident_graphs.values()]
        graphs += [self.table_graph] if self.table_graph else []
        return [*graphs, *self.tables.values()]


def check_precision(manifest: Manifest, wanted: str, path: str) -> None:
    """Raises BundleError unless the bundle at `path` was exported at the precision `wanted`."""
    if manifest.precision != wanted:
        raise BundleError(
            f"{path} was exported at {manifest.precision}, not {wanted}: "
            f"blt export CHECKPOINT -o OTHER --precision {wanted} writes one at {wanted}"
        )


def check_name(name: str) -> None:
    """Raises ManifestError unless the name stays in the bundle's folder."""
    plain = name == Path(name).name and name not in ("", ".", "..")
    if not plain or any(c in name for c in "/\\:\0") or name == FILE_NAME:
        raise ManifestError(f"manifest.json names {shown(name)}, which is not a plain file name in the bundle")


def _check_version(data: Mapping[str, Any]) -> None:
    if data.get("format") != FORMAT:
        raise ManifestError(f"manifest.json is not of the format {FORMAT!r}")
    version = data.get("version")
    if type(version) is not int or version < 1:
        raise ManifestError("manifest.json has no valid version number")
    if version > VERSION:
        raise VersionError(
            f"the bundle has format version {version}, this program reads versions up to {VERSION}: upgrade blt-runtime"
        )


def read(path: Path) -> Manifest:
    """The manifest at `path`. Raises ManifestError (also for files that are not JSON) or VersionError."""
    try:
        return Manifest.from_json(reading.read_json(path))
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ManifestError(f"{path} is not valid JSON ({error}): export the bundle again") from error


def is_bundle_manifest(path: Path) -> bool:
    """Whether a file is JSON of this format, of any version and with any content."""
    try:
        data = reading.read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def write(path: Path, manifest: Manifest) -> None:
    """Writes atomically: a reader finds the old file or the new one."""
    manifest.check()
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
