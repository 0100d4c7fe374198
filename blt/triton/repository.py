"""Writes a bundle as a model of a Triton model repository.

REPOSITORY/NAME/config.pbtxt    inputs, outputs and settings
REPOSITORY/NAME/1/model.py      what the server runs (`blt.triton.model`)
REPOSITORY/NAME/1/bundle/       the files that the bundle's manifest lists, unless the settings name another folder
"""

from __future__ import annotations

import os
import re
import shutil
from importlib import resources
from pathlib import Path

from blt import files
from blt_runtime.bundle import manifest as manifests
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.errors import UsageError, shown

MARK = "# Written by blt export --triton."
"""The first line of config.pbtxt: the folder may be replaced with --force."""
INPUTS = {
    "PROMPT": ("TYPE_STRING", 1),
    "INPUT_IDS": ("TYPE_INT32", -1),
    "MAX_TOKENS": ("TYPE_INT32", 1),
    "TEMPERATURE": ("TYPE_FP32", 1),
    "TOP_P": ("TYPE_FP32", 1),
    "TOP_K": ("TYPE_INT32", 1),
    "MIN_P": ("TYPE_FP32", 1),
    "SEED": ("TYPE_INT64", 1),
    "STOP": ("TYPE_STRING", -1),
    "IGNORE_EOS": ("TYPE_BOOL", 1),
    "STREAM": ("TYPE_BOOL", 1),
}
OUTPUTS = {
    "TEXT": ("TYPE_STRING", 1),
    "OUTPUT_IDS": ("TYPE_INT32", -1),
    "FINISH_REASON": ("TYPE_STRING", 1),
    "PROMPT_TOKENS": ("TYPE_INT32", 1),
    "COMPLETION_TOKENS": ("TYPE_INT32", 1),
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def write(bundle: Path, repository: Path, name: str, *, copy: bool = True, force: bool = False) -> Path:
    """Writes the model `name` into `repository` and returns its folder. It appears complete or not at all.

    bundle: its folder; it needs batched graphs. copy: the model's folder gets the bundle's files, else the absolute
    path of `bundle`. force: an older model of `blt export --triton` is replaced. Raises UsageError for a bad name, a
    bundle without batched graphs and a folder that must not be replaced, and BundleError.
    """
    target = check_target(repository, name, force)
    opened = Bundle.open(bundle, "auto" if copy else "sizes")
    if not opened.manifest.row_graphs:
        raise UsageError(
            f"{bundle} has no batched graphs, which a server needs: export the checkpoint with --flavour ort"
        )
    with files.staged(target) as work:
        version = work / "1"
        version.mkdir()
        program = resources.files("blt.triton").joinpath("model.py").read_text(encoding="utf-8")
        files.write_synced(version / "model.py", program)
        if copy:
            (version / "bundle").mkdir()
            for file in (manifests.FILE_NAME, *opened.manifest.files):
                shutil.copyfile(opened.path / file, version / "bundle" / file)
        files.write_synced(work / "config.pbtxt", config(name, None if copy else bundle.resolve()))
    return target


def check_target(repository: Path, name: str, force: bool) -> Path:
    """The folder of the model. Raises UsageError for a bad name, and if the folder must not be replaced."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{shown(name)} cannot name a model of Triton: use letters, digits, '.', '_' and '-'")
    if repository.exists() and not repository.is_dir():
        raise UsageError(f"{repository} is a file; give the folder of a model repository")
    target = repository / name
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not _is_ours(target):
        raise UsageError(f"{target} exists and was not written by blt export --triton; give another folder or name")
    if not force:
        raise UsageError(f"{target} holds a model already; give another folder or name, or --force to replace it")
    return target


def _is_ours(target: Path) -> bool:
    try:
        with (target / "config.pbtxt").open("rb") as file:
            return file.read(len(MARK)) == MARK.encode()
    except OSError:
        return False


def config(name: str, bundle: Path | None = None) -> str:
    """config.pbtxt. bundle: where it is, if the model's folder has no copy."""
    settings = {
        "provider": ("cpu", "cpu, or cuda for a bundle of the flavour cuda"),
        "streams": ("16", "requests that run at a time"),
        "max_queue": ("256", "requests that wait before one is refused"),
        "capacity": ("", "bytes of one stream; empty: the bundle's"),
        "threads": ("", "CPU threads; empty: all cores"),
        "prefix_bytes": ("0", "memory for beginnings of prompts that requests share"),
    }
    where = {} if bundle is None else {"bundle": (str(bundle), "the folder of the bundle")}
    return "\n".join(
        [
            MARK,
            f"name: {_quoted(name)}",
            'backend: "python"',
            "max_batch_size: 0  # the model batches requests itself",
            "model_transaction_policy { decoupled: true }",
            "instance_group [ { count: 1 kind: KIND_CPU } ]",
            *(f"input [ {_tensor(name, *of)} optional: true }} ]" for name, of in INPUTS.items()),
            *(f"output [ {_tensor(name, *of)} }} ]" for name, of in OUTPUTS.items()),
            *(
                f"parameters {{ key: {_quoted(key)} value: {{ string_value: {_quoted(value)} }} }}  # {what}"
                for key, (value, what) in (where | settings).items()
            ),
            "",
        ]
    )


def _tensor(name: str, kind: str, size: int) -> str:
    return f"{{ name: {_quoted(name)} data_type: {kind} dims: [ {size} ]"


def _quoted(text: str) -> str:
    """A string of the protobuf text format; bytes that are no printable ASCII are octal escapes."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in os.fsencode(text))
    return f'"{"".join(plain)}"'
