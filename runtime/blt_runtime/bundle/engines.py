"""A folder of TensorRT engines, which `blt build` writes from a bundle: checked before anything in it is run.

manifest.json                     of the bundle, unchanged; its sha256 is the bundle's id
hash_tables.npy                   of the bundle, if it has one; likewise entropy_tables.npy
entropy.plan, encoder.plan, ...   one serialised engine for each graph of `spec.resident_spec(spec, cached=True)`
entropy.rows.plan, ...            the same of its padded graphs (`spec.padded_spec`), for batched streams; if asked for
entropy.onnx, entropy.weights ... of plans without weights: the graph of each plan, and the bundle's weights
engines.json                      `EnginesFile`: versions, profiles, sizes, sha256 of each plan, parity, signature

A plan is code: TensorRT runs what it holds. So the folder and its files must belong to the user (or root), nobody else
may be able to write to them, links are refused, and engines.json is signed (HMAC-SHA256) with a key that only this user
has, made by the user's first build. Plans run on one version of TensorRT and one kind of GPU only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import reading
from ..errors import BackendError, BundleError, ConfigError, UsageError, VersionError, shown
from ..records import from_dict, to_dict
from . import manifest as manifests
from .bundle import ENGINES_FILE, HASH_WHOLE_BUNDLE, Bundle, Verify, check_content, check_file, entry_of
from .manifest import FileEntry, Manifest, Parity
from .spec import ModelSpec, resident_spec

FORMAT = "blt-engines"
VERSION = 2
"""2: added engines of batched streams, and plans without weights."""
KEY_BYTES = 32
AMPERE = (8, 0)
Hardware = Literal["same", "ampere+"]
Profile = dict[str, tuple[tuple[int, ...], ...]]
"""(least, usual, most) shape of each input with variable sizes."""


@dataclass(frozen=True)
class Machine:
    """What engines are built with and for: the version of TensorRT; the GPU's name and compute capability ("9.0"); the
    versions of the driver and of CUDA, which are for people."""

    tensorrt: str
    gpu: str
    compute_capability: str
    driver: str
    cuda: str

    def __str__(self) -> str:
        return f"TensorRT {self.tensorrt} on {self.gpu} (compute capability {self.compute_capability})"


@dataclass(frozen=True)
class Flags:
    """Options of the build. workspace: bytes, or None for TensorRT's own limit. fp8: the matrices of the latent
    transformer are 8-bit floats (E4M3). strip: plans have no weights."""

    hardware: Hardware = "same"
    workspace: int | None = None
    fp8: bool = False
    strip: bool = False


@dataclass(frozen=True)
class Plan:
    """The engine of a graph: its file, its profiles, and `aliases`: outputs that share an input's memory. graph: sha256
    of the ONNX graph whose weights a plan without weights gets; None for one that has them."""

    file: str
    bytes: int
    sha256: str
    profiles: tuple[Profile, ...]
    aliases: dict[str, str]
    graph: str | None = None

    @property
    def graph_file(self) -> str:
        return f"{self.file.removesuffix('.plan')}.onnx"


class Engine(NamedTuple):
    """A serialised engine. graph: of one without weights, the ONNX graph that has them, and its path, beside which
    they are stored."""

    plan: bytes
    graph: tuple[bytes, Path] | None = None


@dataclass(frozen=True)
class Rows:
    """The engines of padded graphs. streams: how many run at a time."""

    streams: int
    plans: dict[str, Plan]


@dataclass(frozen=True)
class EnginesFile:
    """engines.json without its signature. bundle: sha256 of manifest.json. parity: a stream on the engines, and batched
    ones if there are `rows`, against single streams on ONNX Runtime's CPU on the bundle. weights: of plans without
    weights, the bundle's files that have them."""

    bundle: str
    producer: dict[str, Any]
    machine: Machine
    flags: Flags
    plans: dict[str, Plan]
    parity: tuple[Parity, ...] = field(default=())
    rows: Rows | None = None
    weights: tuple[str, ...] = ()

    @property
    def forms(self) -> list[dict[str, Plan]]:
        """The engines by graph: those of single streams, then those of batched ones if there are any."""
        return [self.plans, *([self.rows.plans] if self.rows is not None else [])]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **to_dict(self)}

    @classmethod
    def from_json(cls, data: Any) -> EnginesFile:
        """Raises BundleError, and VersionError for a newer version of the format."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise BundleError(f"{ENGINES_FILE} is not of the format {FORMAT!r}")
        version = data.get("version")
        if type(version) is not int or version < 1:
            raise BundleError(f"{ENGINES_FILE} has no valid version number")
        if version > VERSION:
            raise VersionError(
                f"the engines have format version {version}, this program reads versions up to {VERSION}: "
                "upgrade blt-runtime"
            )
        body = {key: value for key, value in data.items() if key not in ("format", "version", "hmac")}
        file = from_dict(cls, body, ENGINES_FILE, BundleError)
        for rows, plans in enumerate(file.forms):
            for name, plan in plans.items():
                if plan.file != (wanted := plan_name(name, rows=bool(rows))):
                    raise BundleError(f"{ENGINES_FILE} names {shown(plan.file)} instead of {wanted}")
                if (plan.graph is None) == file.flags.strip:
                    raise BundleError(f"{ENGINES_FILE} does not say whether {wanted} has weights")
        return file


def plan_name(graph: str, *, rows: bool = False) -> str:
    return f"{graph}.rows.plan" if rows else f"{graph}.plan"


@dataclass(frozen=True)
class Engines:
    """A folder of engines. `spec` is what they run; those of batched streams run its padded form."""

    path: Path
    file: EnginesFile
    manifest: Manifest

    @classmethod
    def read(cls, path: str | Path) -> Engines:
        """What the folder says of itself, with no check of its origin: to look at, not to run. Raises BundleError."""
        folder = Path(path)
        data = _read_json(folder)
        file = EnginesFile.from_json(data)
        manifest = manifests.read(folder / manifests.FILE_NAME)
        if entry_of(folder / manifests.FILE_NAME).sha256 != file.bundle:
            raise BundleError(f"{manifests.FILE_NAME} in {folder} was changed (its sha256 differs): {_again(folder)}")
        if any(set(plans) != set(manifest.graphs) for plans in file.forms):
            raise BundleError(f"{ENGINES_FILE} in {folder} has other graphs than {manifests.FILE_NAME}")
        if unknown := [name for name in file.weights if name not in manifest.files]:
            raise BundleError(f"{ENGINES_FILE} in {folder} names {shown(unknown[0])}, which is no file of the bundle")
        return cls(folder, file, manifest)

    @classmethod
    def open(cls, path: str | Path, *, trust: bool = False, verify: Verify = "auto") -> Engines:
        """The engines in a folder, which may be run when `check_machine` returns.

        trust: accept engines that this user has not built, such as those of a container image. verify: whether the
        sha256 of hash tables is compared (see `Bundle.open`); that of plans always is.
        Raises BundleError (damaged) and BackendError (not built here, or others can write to it).
        """
        folder = Path(path)
        _check_owner(folder)
        if not trust:
            _check_signature(folder)
        engines = cls.read(folder)
        for name, plan in (item for plans in engines.file.forms for item in plans.items()):
            check_file(folder / plan.file, FileEntry(plan.bytes, plan.sha256), _again(folder))
            if plan.aliases != engines.spec.graphs[name].aliases:
                raise BundleError(
                    f"{ENGINES_FILE} in {folder} has other caches of the graph {name!r}: {_again(folder)}"
                )
        for name in engines.file.weights:
            check_file(folder / name, engines.manifest.files[name], _again(folder))
        for tables in engines.manifest.tables.values():
            entry = engines.manifest.files[tables.file]
            check_file(folder / tables.file, entry, _again(folder))
            if verify == "full" or (verify == "auto" and entry.bytes <= HASH_WHOLE_BUNDLE):
                check_content(folder / tables.file, entry, _again(folder))
        engines.bundle.hash_tables()
        return engines

    @property
    def spec(self) -> ModelSpec:
        return resident_spec(self.manifest.spec, cached=True)

    @property
    def bundle(self) -> Bundle:
        """The part of the bundle that is in this folder: its manifest and hash tables."""
        return Bundle(self.path, self.manifest)

    def check_rows(self, streams: int = 1) -> Rows:
        """What the folder says of its engines for batched streams. Raises UsageError if there are none, or none for so
        many."""
        if self.file.rows is None:
            raise UsageError(
                f"{self.path} holds no engines for batched streams: "
                f"run blt build BUNDLE -o {self.path} --force --profiles step,prefill,rows=16"
            )
        check_streams(streams, self.file.rows.streams)
        return self.file.rows

    def plans(self, *, rows: bool = False) -> dict[str, Engine]:
        """The serialised engines by graph, whose sha256 were compared, as were those of weights that they lack. rows:
        those for batched streams. Raises BundleError, and UsageError for batched streams that the folder has no engines
        for."""
        listed = self.check_rows().plans if rows else self.file.plans
        for name in self.file.weights:
            check_content(self.path / name, self.manifest.files[name], _again(self.path))
        return {name: Engine(self._content(plan.file, plan.sha256), self._graph(plan)) for name, plan in listed.items()}

    def _graph(self, plan: Plan) -> tuple[bytes, Path] | None:
        if plan.graph is None:
            return None
        return self._content(plan.graph_file, plan.graph), self.path / plan.graph_file

    def _content(self, name: str, sha256: str) -> bytes:
        try:
            with reading.open_plain(self.path / name) as file:
                content = file.read()
        except OSError as error:
            raise BundleError(f"cannot read {self.path / name}: {error.strerror}: {_again(self.path)}") from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise BundleError(f"{name} was changed (its sha256 differs): {_again(self.path)}")
        return content

    def check_machine(self, here: Machine) -> None:
        """Raises BackendError if these engines do not run with this version of TensorRT on this GPU."""
        built, flags = self.file.machine, self.file.flags
        same_gpu = (built.gpu, built.compute_capability) == (here.gpu, here.compute_capability)
        if flags.hardware == "ampere+":
            same_gpu = capability(here) >= AMPERE
        if built.tensorrt != here.tensorrt or not same_gpu:
            raise BackendError(f"the engines in {self.path} are for {built}, but here is {here}: {_again(self.path)}")


def check_streams(streams: int, most: int) -> None:
    """Raises UsageError for more streams than engines run at a time."""
    if streams > most:
        raise UsageError(
            f"the engines run up to {most} streams at a time, not {streams}: ask for fewer, or run blt build with "
            f"--profiles step,prefill,rows={streams}"
        )


def is_engines(folder: str | Path) -> bool:
    """Whether the folder holds engines, of any version and origin."""
    try:
        return os.path.lexists(Path(folder) / ENGINES_FILE)
    except (OSError, ValueError, TypeError):
        return False


def key_file() -> Path:
    """The user's key: engines.key in the folder blt of the user's data folder."""
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    folder = data if data.is_absolute() else Path.home() / ".local" / "share"
    return folder / "blt" / "engines.key"


def make_key() -> None:
    """Makes the user's key if there is none. Two builds that do so at once share one. Raises UsageError."""
    path = key_file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            return
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
            try:
                os.link(temporary, path)
            except FileExistsError:
                return
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write the key that signs engines, {path}: {error.strerror}") from error


def write(folder: Path, file: EnginesFile) -> None:
    """Writes engines.json, signed, and closes the folder for others. Raises BackendError without a key."""
    body = file.to_json()
    signed = {**body, "hmac": _signature(body, _key())}
    (folder / ENGINES_FILE).write_text(json.dumps(signed, indent=1) + "\n", encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)


def _signature(body: Mapping[str, Any], key: bytes) -> str:
    content = json.dumps({name: value for name, value in body.items() if name != "hmac"}, sort_keys=True)
    return hmac.new(key, content.encode(), "sha256").hexdigest()


def _key() -> bytes:
    """Raises BackendError if there is none, or one that others can read."""
    path = key_file()
    try:
        with reading.open_plain(path) as file:
            info, key = os.fstat(file.fileno()), file.read(KEY_BYTES + 1)
    except OSError as error:
        raise BackendError(f"{path}: {error.strerror}") from error
    if info.st_uid != os.geteuid() or info.st_mode & 0o077 or len(key) != KEY_BYTES:
        raise BackendError(f"{path} is not a key that only this user can read: delete it and run blt build again")
    return key


def _check_signature(folder: Path) -> None:
    data = _read_json(folder)
    found = data.get("hmac") if isinstance(data, dict) else None
    wanted = _signature(data, _key()) if isinstance(found, str) and key_file().exists() else ""
    if not wanted or not hmac.compare_digest(str(found).encode(errors="replace"), wanted.encode()):
        raise BackendError(f"{folder} was not built here: {_again(folder)}")


def _check_owner(folder: Path) -> None:
    """Raises BackendError if another user owns the folder or a file in it, or can write to it, and for links."""
    try:
        for path in (folder, *folder.iterdir()):
            info = path.stat() if path is folder else path.lstat()
            if stat.S_ISLNK(info.st_mode):
                raise BackendError(f"{path.name} in {folder} is a link, which a folder of engines may not hold")
            if info.st_uid not in (0, os.geteuid()):
                raise BackendError(f"{path} belongs to another user: {_again(folder)}")
            if info.st_mode & 0o022:
                raise BackendError(f"other users can write to {path}, and engines are code: chmod -R go-w {folder}")
    except OSError as error:
        raise BundleError(f"cannot read {folder}: {error.strerror}") from error


def _read_json(folder: Path) -> Any:
    path = folder / ENGINES_FILE
    try:
        return reading.read_json(path)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON ({error}): {_again(folder)}") from error


def _again(folder: Path) -> str:
    return f"run blt build BUNDLE -o {folder}"


def capability(machine: Machine) -> tuple[int, ...]:
    """(9, 0) for 9.0. Raises ConfigError."""
    try:
        return tuple(int(part) for part in machine.compute_capability.split("."))
    except ValueError as error:
        raise ConfigError(f"{shown(machine.compute_capability)} is not a compute capability such as 9.0") from error
