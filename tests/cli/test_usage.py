"""Bad input: one line on stderr with the problem and what to do, and the right exit code."""

from __future__ import annotations

import ast
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from blt.cli import console, failures, options
from blt_runtime.errors import BltError, CapacityError, CheckFailed, MissingExtra, UsageError

Call = Callable[..., Any]
REPO = Path(__file__).resolve().parents[2]

WRONG = [
    # arguments, exit code, words of the message
    (["nonsense"], 2, "nonsense"),
    (["patch"], 2, "TEXT"),
    (["generate", "no-such-model", "hello"], 2, "no such file"),
    (["generate", "{model}", ""], 2, "--unconditional"),
    (["generate", "{model}"], 2, "--unconditional"),
    (["generate", "{model}", "hello", "--unconditional"], 2, "leave one"),
    (["generate", "{model}", "hello", "-n", "many"], 2, "-n"),
    (["generate", "{model}", "hello", "--file", "{text}"], 2, "leave PROMPT"),
    (["generate", "{model}", "--file", "none"], 2, "no such file"),
    (["generate", "{model}", "--file", "{nothing}"], 2, "is empty"),
    (["generate", "{model}", "-ello"], 2, "after --"),
    (["generate", "{model}", "--no text"], 2, "after --"),
    (["generate", "{model}", "--", "-ello", "-n", "3"], 2, "write options before --"),
    (["generate", "{model}", "two", "words"], 2, "quote a text"),
    (["patch", "-ello"], 2, "after --"),
    (["generate", "{model}", "hello", "--backend", "tensorflow"], 2, "torch, onnx"),
    (["generate", "{model}", "hello", "--raw", "--json"], 2, "--raw"),
    (["generate", "{model}", "hello", "--temprature", "1"], 2, "--temprature"),
    (["generate", "{model}", "hello", "--temperature", "hot"], 2, "temperature"),
    (["generate", "{garbage}", "hello"], 1, "checkpoint"),
    (["generate", "{empty}", "hello"], 2, "a bundle has manifest.json, a run folder model.pt"),
    (["patch", ""], 2, "empty"),
    (["patch", "hello"], 2, "--model"),
    (["patch", "hello", "--scheme", "static:0"], 2, "static:N"),
    (["patch", "hello", "--scheme", "static:²"], 2, "static:N"),
    (["patch", "hello", "--scheme", "static:99999999999999999999"], 2, "static:N"),
    (["patch", "hello", "--scheme", "static:3", "--threshold", "1"], 2, "--threshold"),
    (["patch", "hello", "--scheme", "entropy", "--threshold", "nan"], 2, "--threshold"),
    (["patch", "hello", "--scheme", "words"], 2, "static:N"),
    (["patch", "hello", "--scheme", "space", "--threshold", "1"], 2, "--threshold"),
    (["patch", "hello", "--scheme", "byte", "--plot", "x.gif"], 2, ".png or .html"),
    (["score", "{model}", "{text}", "--npz", "out.txt"], 2, ".npz"),
    (["score", "{model}", "no-such-file", "--npz", "{tmp}/o.npz"], 2, "no-such-file"),
    (["score", "{model}", "{ids}", "--npz", "{tmp}/no/folder/o.npz"], 2, "folder"),
    (["score", "{model}", "{ids}", "--npz", "{folder}"], 2, "is a folder"),
    (["patch", "x", "--scheme", "byte", "--plot", "{picture}"], 2, "is a folder"),
    (["plot", "{empty}", "-o", "{picture}"], 2, "is a folder"),
    (["score", "{model}", "{nothing}", "--npz", "{tmp}/o.npz"], 2, "is empty"),
    (["score", "{model}", "-", "--npz", "{tmp}/o.npz"], 2, "standard input is empty"),
    (["score", "{unfinished}", "{text}", "--npz", "{tmp}/o.npz"], 2, "`blt train` command continues it"),
    (["score", "{model}", "{text}", "--npz", "{tmp}/o.npz", "--entropy-model", "none"], 2, "no such file"),
    (["score", "{model}", "{high}", "--npz", "{tmp}/o.npz"], 2, "0..259"),
    (["score", "{model}", "{floats}", "--npz", "{tmp}/o.npz"], 2, "whole numbers"),
    (["score", "{model}", "{garbage_npy}", "--npz", "{tmp}/o.npz"], 2, ".npy"),
    (["score", "{model}", "{ids}", "--npz", "{tmp}/o.npz", "--patch-lengths", "{short}"], 2, "sum to"),
    (["eval", "{model}", "no-such-data"], 2, "no-such-data"),
    (["eval", "{model}", "{nothing}"], 2, "is empty"),
    (["eval", "{model}", "{text}", "--context", "0"], 2, "--context"),
    (["eval", "{model}", "{text}", "--limit", "0"], 2, "--limit"),
    (["eval", "{model}", "{text}", "--fail-above", "nan"], 2, "--fail-above"),
    (["eval", "{model}", "{text}", "--by", "language"], 2, "group"),
    (["eval", "{model}", "{text}", "--baseline", "zip"], 2, "ppmd, xz"),
    (["eval", "{model}", "{empty}"], 2, "blt data prepare"),
    (["export", "{model}", "-o", "{tmp}/b", "--flavour", "vanilla"], 2, "portable"),
    (["export", "{model}", "-o", "{tmp}/b", "--capacity", "lots"], 2, "--capacity"),
    (["export", "{model}", "-o", "{tmp}/b", "--capacity", "1"], 2, "--capacity 1: must be at least 2"),
    (["export", "{model}", "-o", "{tmp}/b", "--patches", "1"], 2, "--patches 1: must be at least 2"),
    (["export", "{model}", "-o", "{tmp}/b", "--precision", "int3"], 2, "fp32, fp16, bf16, int8, int4"),
    (["export", "{model}", "-o", "{tmp}/b", "--precision-of", "int8"], 2, "GRAPH=PRECISION"),
    (["export", "{model}", "-o", "{tmp}/b", "--precision-of", "latnet=int8"], 2, "did you mean 'latent'"),
    (["export", "{model}", "-o", "{tmp}/b", "--eval-data", "{empty}"], 2, "blt data prepare"),
    (["export", "{model}", "-o", "{tmp}/b", "--eval-data", "{text}", "--capacity", "2"], 2, "at least 3"),
    (["inspect", "{garbage}"], 1, "checkpoint"),
    (["inspect", "{model}", "--context", "0"], 2, "--context"),
    (["inspect", "{model}", "--context", "9" * 400], 2, "--context"),
    (["data", "info", "{empty}"], 2, "data folder"),
    (["data", "info", "no-such-data"], 2, "no such data folder"),
    (["data", "prepare", "{text}", "-o", "{tmp}/d", "--split", "half"], 2, "98/1/1"),
    (["data", "prepare", "{text}", "-o", "{tmp}/d", "--split", "0/1/1"], 2, "98/1/1"),
    (["data", "prepare", "{text}", "-o", "{tmp}/d", "--format", "csv"], 2, "csv"),
    (["data", "prepare", "{text}", "-o", "{tmp}/d", "--seed", "99999999999999999999"], 2, "seed"),
    (["data", "prepare", "no-such-text", "-o", "{tmp}/d"], 2, "no such file"),
    (["train", "entropy", "-c", "no-such.yaml"], 2, "no-such.yaml"),
    (["train", "blt"], 2, "config"),
]


@pytest.fixture
def files(tmp_path: Path, golden: Path) -> dict[str, Path]:
    """Inputs that are wrong in one way each."""
    made = {name: tmp_path / name for name in ("garbage", "empty", "text", "nothing", "unfinished")}
    made |= {name: tmp_path / f"{name}.npy" for name in ("ids", "high", "floats", "garbage_npy", "short")}
    made["garbage"].write_bytes(b"not a checkpoint" * 10)
    made["garbage_npy"].write_bytes(b"not an array")
    made["empty"].mkdir()
    made |= {"folder": tmp_path / "folder.npz", "picture": tmp_path / "folder.png"}
    for name in ("folder", "picture"):
        made[name].mkdir()
    made["nothing"].touch()
    (made["unfinished"] / "checkpoints").mkdir(parents=True)
    made["text"].write_text("some text")
    np.save(made["ids"], np.array([1, 80, 81]))
    np.save(made["high"], np.array([1, 260]))
    np.save(made["floats"], np.array([1.0, 2.0]))
    np.save(made["short"], np.array([1, 2]))
    return {**made, "tmp": tmp_path, "model": golden / "a" / "blt"}


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG, ids=[" ".join(w[0])[:60] for w in WRONG])
def test_bad_input_is_one_line(blt: Call, files: dict[str, Path], arguments: list[str], code: int, words: str) -> None:
    result = blt(*(argument.format(**files) for argument in arguments))
    assert result.code == code, result.err
    assert result.out == b""
    assert result.err.startswith("blt: error: ")
    assert result.err.count("\n") == 1
    assert words in result.err


def test_the_traceback_comes_with_v_only(blt: Call) -> None:
    assert "Traceback" not in blt("generate", "no-such-model", "x").err
    loud = blt("generate", "no-such-model", "x", "-v")
    assert "Traceback" in loud.err
    assert loud.err.splitlines()[-1].startswith("blt: error: ")
    assert loud.code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (CapacityError("x"), 1),
        (CheckFailed("x"), 3),
        (MissingExtra("PyTorch", "train"), 4),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 1),
        (RuntimeError("two\nlines"), 1),
        (BltError("x"), 1),
    ],
)
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    console.start_logging()
    assert failures.report(error) == code
    assert capsys.readouterr().err.count("\n") == 1


class _Hidden(MetaPathFinder):
    """Makes a library look as if it were not installed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


@contextmanager
def hidden(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            patch.delitem(sys.modules, module)
        patch.setattr(sys, "meta_path", [_Hidden(name), *sys.meta_path])
        yield


def test_a_missing_library_names_its_extra(blt: Call, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with hidden(monkeypatch, "matplotlib"):
        result = blt("patch", "hello", "--model", files["model"], "--plot", files["tmp"] / "figure.png", "--no-table")
    assert result.code == 4
    assert "blt-lm[plot]" in result.err
    assert not (files["tmp"] / "figure.png").exists()
    (files["tmp"] / "a.zst").write_bytes(zstandard.compress(b"text"))
    with hidden(monkeypatch, "zstandard"):
        result = blt("data", "prepare", files["tmp"] / "a.zst", "-o", files["tmp"] / "data")
    assert result.code == 4
    assert "blt-lm[train]" in result.err


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("256", 256), ("4k", 4096), ("4K", 4096), ("1.5M", 3 << 19), ("2G", 2 << 30)]
)
def test_sizes(text: str, value: int) -> None:
    assert options.parse_size(text, "-n") == value


@pytest.mark.parametrize("text", ["", "k", "-1", "4 k", "1e3", "0x10", "4kB"])
def test_wrong_sizes_name_the_option(text: str) -> None:
    with pytest.raises(UsageError, match="--capacity"):
        options.parse_size(text, "--capacity")


def test_version_and_env(blt: Call) -> None:
    from blt import __version__

    assert blt("--version").text == f"blt {__version__}\n"
    report = json.loads(blt("env").text)
    assert report["schema"] == "blt.env/2"
    assert report["blt"] == __version__
    assert "numpy" in report["packages"]


def test_env_does_not_load_torch(blt_process: Call) -> None:
    done = blt_process("env", PYTHONVERBOSE="")
    assert json.loads(done.text)["packages"]["numpy"]
    err = blt_process("env", PYTHONPROFILEIMPORTTIME="1").err
    loaded = {line.split("|")[-1].strip() for line in err.splitlines()}  # nested imports are indented
    assert "torch" not in loaded
    assert "numpy" in loaded


@pytest.mark.parametrize("arguments", [[], ["data"], ["train"]])
def test_an_incomplete_command_prints_only_the_help(blt: Call, arguments: list[str]) -> None:
    result = blt(*arguments)
    assert result.code == 2
    assert "Usage" in result.text
    assert result.err == ""


def test_the_help_lists_commands_by_stage_in_the_order_of_the_way(blt: Call) -> None:
    """Every command is in one panel; the panels go from data to tools."""
    from blt.cli import STAGES, app

    shown = blt("--help").text
    panels = re.findall(r"^╭─ ([\w ]+?) ─", shown, re.MULTILINE)
    stages = ["Data and patches", "Train", "Evaluate", "Export", "Generate", "Serve", "Share", "Tools"]
    assert panels == ["Options", *stages]
    assert panels[1:] == list(STAGES)
    listed = [line.split()[1] for line in shown.splitlines() if re.match(r"│ [a-z]", line)]
    in_order = [name for commands in STAGES.values() for name in commands]
    assert [name for name in listed if name in in_order] == in_order
    registered = [c.name for c in app.registered_commands] + [g.name for g in app.registered_groups]
    assert sorted(in_order) == sorted(str(name) for name in registered)


@pytest.mark.parametrize("command", [["generate"], ["train", "blt"], ["bench", "throughput"], ["data", "info"]])
def test_every_command_has_quiet_and_verbose(blt: Call, command: list[str]) -> None:
    shown = blt(*command, "-h").text
    assert re.search(r"--quiet +-q", shown)
    assert re.search(r"--verbose +-v", shown)


def test_a_command_shows_the_model_options_it_takes_and_no_others(blt: Call) -> None:
    shown = blt("bench", "throughput", "-h").text
    assert "--precision" in shown
    assert "--threads" in shown
    assert "--backend" not in shown
    assert "--entropy-model" not in shown


def test_v_shows_the_debug_lines_of_the_export(capsys: pytest.CaptureFixture[str]) -> None:
    console.start_logging()
    log = logging.getLogger("blt_export")
    log.debug("hidden")
    console.set_verbosity(1)
    log.debug("a rule did not apply: its reason")
    console.set_verbosity(0)
    assert capsys.readouterr().err == "a rule did not apply: its reason\n"


def test_help_is_on_stdout(blt: Call) -> None:
    for arguments in (["-h"], ["generate", "-h"], ["data", "prepare", "--help"]):
        result = blt(*arguments)
        assert result.code == 0
        assert "Usage" in result.text
        assert result.err == ""


def test_a_compilers_output_is_not_repeated_whole() -> None:
    from blt.cli.failures import describe

    line, _ = describe(RuntimeError("g++ failed\n" + "warning\n" * 10_000 + "no memory"))
    assert len(line) < 1000
    assert "g++ failed" in line
    assert "no memory" in line


def _texts(file: Path) -> Iterator[str]:
    """The string constants of a module, without docstrings."""
    tree = ast.parse(file.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def test_no_message_contains_a_mark_of_the_documentation() -> None:
    """Such as D4, the number of a row in docs/spec.md."""
    for package in ("blt", "export/blt_export", "runtime/blt_runtime"):
        for file in (REPO / package).rglob("*.py"):
            marked = [text for text in _texts(file) if re.search(r"\bD\d{1,2}\b", text)]
            assert not marked, file


def _odd_keys(value: object) -> Iterator[str]:
    """Keys that are not snake_case."""
    if isinstance(value, dict):
        for key, part in value.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", key):
                yield key
            yield from _odd_keys(part)
    elif isinstance(value, list):
        for part in value:
            yield from _odd_keys(part)


@pytest.mark.parametrize(
    "line",
    [
        "env",
        "env --full",
        "patch hello --scheme space",
        "inspect {model} --tensors",
        "score {model} {text} --npz {tmp}/o.npz",
        "eval {model} {text} --baseline xz",
        "eval {model} --suite characters --items 1",
        "data prepare {text} -o {tmp}/d",
        "generate {model} x -n 2 --ignore-eos",
        "bench patch {model} --prompt-bytes 20 --repeat 1",
    ],
)
def test_the_keys_of_json_are_snake_case(blt: Call, files: dict[str, Path], line: str) -> None:
    done = blt(*(word.format(**files) for word in line.split()), "--json")
    assert done.code == 0, done.err
    report = json.loads(done.text)
    assert re.fullmatch(r"blt\.[a-z]+/\d+", report["schema"])
    assert not list(_odd_keys(report))
