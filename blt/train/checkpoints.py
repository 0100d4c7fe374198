"""Training checkpoints: one folder per step, complete or absent. The newest few and milestones are kept; a damaged one
is skipped.

    checkpoints/step-00000500/
        manifest.json              format, step, and size and sha256 of every other file
        state.json                 step, configuration, the loader's position, sums for the log; if it is a milestone
        shard-00001-*.safetensors  weights, optimizer state and random state, one file per rank

One format serves one rank or many: torch's distributed checkpoint (DCP) splits tensors and reassembles them for any
number of ranks. Its default storage unpickles its index; the safetensors storage used here executes no code of a file.
A folder is written under a hidden name, flushed to disk and renamed. All ranks must see the same file system.

The checkpoints in a folder are one branch of training. A run that continues from step s hides those after s; they are
removed when its own next checkpoint is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from blt.checkpoint.claims import check_safetensors
from blt.checkpoint.stopped import EMA
from blt.checkpoint.tensors import StoredTensor, read_shards
from blt.files import replace_folder, scratch, write_synced
from blt.train.parallel import SINGLE, Ranks
from blt_runtime import reading
from blt_runtime.errors import CheckpointError

FOLDER = "checkpoints"
"""In the run folder."""
FORMAT, VERSION = "blt-train", 2
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = ".aside-"
_CHUNK = 4 << 20
log = logging.getLogger("blt.train")


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A complete checkpoint whose files match their checksums. `state` is its state.json."""

    path: Path
    step: int
    state: dict[str, Any]

    def load(self, tensors: Mapping[str, Tensor], ranks: Ranks = SINGLE) -> None:
        """Fills `tensors` in place; they may be sharded over any number of ranks.

        Raises CheckpointError if names or shapes differ. Averages that are not in `tensors` are left out.
        """
        reader = HuggingFaceStorageReader(str(self.path))
        try:
            for file in sorted(self.path.glob("*.safetensors")):
                check_safetensors(file)
            self._check_shapes(reader, tensors)
            with _quiet():
                dcp_load(dict(tensors), storage_reader=reader, process_group=ranks.control, no_dist=ranks.single)
        except CheckpointError:
            raise
        except Exception as error:  # DCP passes on what its readers raise: there is no common base class
            raise CheckpointError(f"{self.path}: cannot be read ({_cause(error)})") from None

    def incomplete(self, error: Exception) -> CheckpointError:
        """The error to raise if `state` lacks a value or has one of a wrong type."""
        return CheckpointError(f"{self.path}: {STATE} is incomplete ({error!r})")

    def _check_shapes(self, reader: HuggingFaceStorageReader, tensors: Mapping[str, Tensor]) -> None:
        entries = reader.read_metadata().state_dict_metadata
        stored = {name: tuple(e.size) for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        problems = [
            f"{name} is {stored.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}"
            for name in sorted(stored.keys() | wanted.keys())
            if (name in wanted or not name.startswith(EMA)) and stored.get(name) != wanted.get(name)
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CheckpointError(
                f"{self.path} does not fit this run: {'; '.join(problems[:3])}{more}; "
                "use the same configuration, or start anew in another output folder"
            )


def write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    *,
    keep: int,
    milestone: bool = False,
    needed: Callable[[int], bool] = lambda step: False,
    ranks: Ranks = SINGLE,
) -> Path:
    """Saves the checkpoint of `step`, then removes all but milestones, the newest `keep` up to it, and those of steps
    that are `needed`. Every rank calls it.

    tensors: this rank's shard of each (a DTensor, or a plain tensor that all ranks share), by the same name on all
    ranks.  state: plain values.  milestone: later calls keep it, whatever their `keep` is.

    Raises CheckpointError on every rank if one cannot write (a full disk). Then nothing of the new folder is left and
    older checkpoints stay.
    """
    path = folder / f"step-{step:08d}"
    draft = folder / f".{path.name}.part"
    marks = {"milestone": True} if milestone else {}
    try:
        ranks.on_first(lambda: _fresh(folder, draft))
        _save(draft, tensors, ranks)
        files = ranks.from_each(lambda: _entries(draft.glob(f"shard-{ranks.rank + 1:05d}-*")))
        ranks.on_first(lambda: _complete(draft, path, step, state | marks, dict(ChainMap(*files))))
    except (CheckpointException, OSError) as error:
        if ranks.first:
            shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder} ({_cause(error)}); older ones are intact: "
            "free some space, then --resume auto continues from the newest"
        ) from None
    if ranks.first:
        _rotate(folder, step, keep, needed)
    return path


@contextmanager
def gathered(path: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> Iterator[dict[str, StoredTensor]]:
    """Whole tensors from the shards of all ranks, in files of a temporary folder next to `path`: none is in memory.

    Every rank calls it. Raises CheckpointError on every rank if one cannot write.
    """
    with ExitStack() as stack:
        folder = ranks.on_first(lambda: stack.enter_context(scratch(path)))
        try:
            _save(folder, tensors, ranks)
        except (CheckpointException, OSError) as error:
            raise CheckpointError(
                f"{path} could not be written ({_cause(error)}); free some space and run the same command again"
            ) from None
        yield read_shards(sorted(folder.glob("*.safetensors")))


def _save(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Writes one file per rank. Raises CheckpointException or OSError."""
    with _quiet():
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp_save(dict(tensors), storage_writer=writer, process_group=ranks.control, no_dist=ranks.single)


def set_aside(folder: Path, step: int) -> None:
    """Hides the checkpoints after `step`, the step that a run continues from: they are another branch, or damaged.

    The next successful `write` removes them.
    """
    later = [path for path in checkpoint_folders(folder) if step_of(path) > step]
    for path in later:
        hidden = path.with_name(f"{_ASIDE}{path.name}")
        if hidden.exists():
            shutil.rmtree(hidden)
        path.rename(hidden)
    if later:
        names = ", ".join(path.name for path in later)
        log.info("continuing from step %d: hid %s as %s* until the next checkpoint", step, names, folder / _ASIDE)


def _fresh(folder: Path, draft: Path) -> None:
    """Makes an empty `draft` and removes the folders that killed processes left."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".step-*"):
        shutil.rmtree(stale)
    draft.mkdir()


def _entries(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file, for the manifest."""
    return {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in files}


def _complete(draft: Path, path: Path, step: int, state: dict[str, Any], shards: dict[str, dict[str, Any]]) -> None:
    """Adds state.json and the manifest and gives the folder its name. shards: `_entries` of the ranks' files."""
    write_synced(draft / STATE, json.dumps({"step": step, **state}))
    files = dict(sorted({**shards, **_entries([draft / STATE])}.items()))
    write_synced(draft / MANIFEST, json.dumps({"format": FORMAT, "version": VERSION, "step": step, "files": files}))
    _sync(draft)
    replace_folder(draft, path)
    _sync(path.parent)


def _rotate(folder: Path, step: int, keep: int, needed: Callable[[int], bool]) -> None:
    """Once the checkpoint of `step` is complete, removes older ones but milestones and `needed` ones, hidden ones and
    the replaced one.

    A checkpoint with a short or missing file does not count towards `keep`, so that a readable one remains. Checksums
    are not computed here: that would read every checkpoint again after each new one.
    """
    earlier = [path for path in checkpoint_folders(folder) if step_of(path) < step]
    whole = [path for path in earlier if _looks_whole(path)]
    kept = whole[max(0, len(whole) - (keep - 1)) :]
    try:
        for path in earlier:
            if path not in kept and not needed(step_of(path)) and not _is_milestone(path):
                _remove(path)
        for hidden in (*folder.glob(f"{_ASIDE}step-*"), *folder.glob(".step-*.old")):
            shutil.rmtree(hidden)
    except OSError as error:
        log.warning("an old checkpoint in %s could not be removed (%s)", folder, _cause(error))


def _remove(path: Path) -> None:
    """Renames the folder before deleting its files, so that half a folder never looks like a checkpoint."""
    path.rename(_old(path))
    shutil.rmtree(_old(path))


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def checkpoint_folders(folder: Path) -> list[Path]:
    """TrainingCheckpoint folders, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def read(path: Path) -> TrainingCheckpoint:
    """The checkpoint at `path`, a copy under any name included. Compares every file with its checksum.

    Raises CheckpointError.
    """
    path = path.resolve()
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a training checkpoint; give a folder step-* or a run folder")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest.get('version')}, this program reads version {VERSION}; "
            "use the program version that wrote it"
        )
    try:
        step, files = int(manifest["step"]), dict(manifest["files"])
        for name, entry in files.items():
            _check_file(path, name, size=entry["size"], sha256=entry["sha256"])
    except (LookupError, TypeError, ValueError):
        raise CheckpointError(f"{path / MANIFEST} is damaged") from None
    extra = sorted({file.name for file in path.iterdir()} - files.keys() - {MANIFEST})
    if extra or STATE not in files:
        raise CheckpointError(f"{path} does not match its manifest: {', '.join(extra) or STATE}")
    state = _read_json(path / STATE)
    if state.get("step") != step or (_NAME.fullmatch(path.name) and step_of(path) != step):
        raise CheckpointError(f"{path} holds step {state.get('step')}, its manifest says {step}")
    return TrainingCheckpoint(path, step, state)


def read_newest(folder: Path, wanted: Callable[[int], bool] = lambda step: True) -> TrainingCheckpoint | None:
    """The newest undamaged checkpoint of a `wanted` step, None if the folder has none. Logs a warning for each damaged
    one.

    Raises CheckpointError if all are damaged.
    """
    found = [path for path in checkpoint_folders(folder) if wanted(step_of(path))]
    for path in reversed(found):
        try:
            return read(path)
        except CheckpointError as error:
            log.warning("%s; trying the previous one", error)
    if found:
        raise CheckpointError(f"{folder}: no checkpoint can be read; start anew in another output folder")
    return None


def _is_milestone(path: Path) -> bool:
    try:
        return bool(_read_json(path / STATE).get("milestone"))
    except CheckpointError:
        return False


def _looks_whole(path: Path) -> bool:
    """Whether all files of the manifest exist with the right size."""
    try:
        files = _read_json(path / MANIFEST)["files"]
        return all((path / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (CheckpointError, OSError, LookupError, TypeError, AttributeError):
        return False


def _check_file(folder: Path, name: str, size: int, sha256: str) -> None:
    file = folder / name
    if file.parent != folder:
        raise CheckpointError(f"{file} is missing")
    try:
        reading.check_plain(reading.in_folder(folder, name))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({reading.reason(error)})") from None
    if file.stat().st_size != size:
        raise CheckpointError(f"{file} is {file.stat().st_size} bytes, not {size}: truncated or changed")
    if _sha256(file) != sha256:
        raise CheckpointError(f"{file} is damaged: its sha256 is not that of the manifest")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with reading.open_plain(path) as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = reading.read_json(reading.in_folder(path.parent, path.name), finite=False)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a training checkpoint: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({reading.reason(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged")
    return content


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cause(error: BaseException) -> str:
    """One line about the first error: DCP wraps the errors of all ranks."""
    if isinstance(error, CheckpointException):
        inner = next(iter(error.failures.values()))[0]
        return _cause(inner)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides DCP's warning that it runs without a process group: one rank has none. Filters are those of the process, so
    another thread than the main one leaves them alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
