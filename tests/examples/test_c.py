"""The C interface of runtime/examples/c, built with the system's compiler and used from a C program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("cffi")
pytest.importorskip("setuptools")

from blt_export import pipeline
from blt_runtime import Model
from tests import exports

REPO = Path(__file__).resolve().parents[2]
C = REPO / "runtime/examples/c"
N, PROMPT = 40, "Once upon a time"
Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


def missing() -> str | None:
    """Why the library cannot be built here."""
    if not shutil.which("gcc") or not shutil.which("make"):
        return "gcc or make is not installed"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are not installed"
    return None if sysconfig.get_config_var("Py_ENABLE_SHARED") else "this Python has no shared libpython"


pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(exports.prepare("plain", check=False), tmp_path_factory.mktemp("bundle") / "b").path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library, the example program and the program of these tests."""
    folder = tmp_path_factory.mktemp("built")
    flags = "CC=gcc", f"PYTHON={sys.executable}", f"BUILD={folder}"
    subprocess.run(["make", "-C", C, *flags], check=True, capture_output=True)
    include, library = f"-I{C}", [f"-L{folder}", "-lblt", "-lpthread", "-Wl,-rpath,$ORIGIN"]
    check = Path(__file__).with_name("check.c")
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", include, check, *library, "-o", folder / "check"], check=True)
    return folder


@pytest.fixture
def run(built: Path, tmp_path: Path) -> Run:
    """Runs a built program in a folder elsewhere, without an environment that is activated."""

    def call(program: str, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[bytes]:
        environment = {"PATH": os.defpath, "PYTHONPATH": str(REPO / "runtime"), **more}
        command = [built / program, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)

    return call


def lines(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode().splitlines()


def expected(bundle: Path, **options: float) -> bytes:
    stream = Model.open(bundle, threads=1).stream()
    stream.append(PROMPT)
    return b"".join(stream.generate(N, **options))  # type: ignore[arg-type]


def test_the_program_writes_the_bytes_of_a_python_stream(run: Run, bundle: Path) -> None:
    done = run("generate", bundle, PROMPT, str(N), "0")
    assert (done.returncode, done.stdout, done.stderr) == (0, expected(bundle, temperature=0), b"")


def test_a_missing_bundle_is_one_line(run: Run) -> None:
    done = run("generate", "missing", PROMPT)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"error: missing is not a bundle: there is no such folder\n"


def test_a_python_without_the_runtime_is_an_error_of_the_first_call(run: Run) -> None:
    done = run("generate", "missing", PROMPT, PYTHONPATH="", BLT_PYTHON="/missing/python")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(b"error: the embedded Python could not start")


def test_invalid_arguments_are_errors(run: Run, bundle: Path) -> None:
    first, *found = lines(run("check", "arguments", bundle))
    assert first == "0 [path is NULL: give a bundle folder]"
    for line, words in zip(
        found,
        (
            "0 no\\udcff\\x1bsuch is not a bundle", "0 threads must be", "-1 n must be", "-1 a stop string must",
            "-1 temperature must be", "-1 top_p must be", "-1 prompt is NULL", "-1 callback is NULL",
            "-1 the model is closed or was never", "-1 the model is closed or was never", "-1 100,001 tokens exceed",
            "0 100,001 tokens", "-1 the model is closed or was never",
        ),
        strict=True,
    ):  # fmt: skip
        assert line.startswith(words)


def test_a_callback_ends_the_text_and_may_close_the_model(run: Run, bundle: Path) -> None:
    stopped, sampled, again, inner, closing = lines(run("check", "stop", bundle))
    greedy = expected(bundle, temperature=0)
    assert stopped == "3 3"
    assert sampled == again == expected(bundle, temperature=1, top_k=50, top_p=0.9, min_p=0.001, seed=7).hex()
    assert (inner, closing) == (greedy[:3].hex(), greedy.hex())


def test_threads_with_a_model_each_and_threads_on_one_model_write_the_same(run: Run, bundle: Path) -> None:
    *found, last = lines(run("check", "threads", bundle))
    text = expected(bundle, temperature=0).hex()
    missing = "missing is not a bundle: there is no such folder"
    assert found == [f"{missing} {text}"] * 4 + [f"path is NULL: give a bundle folder {text}"] * 2
    assert last == "[]"  # each thread has its own error


def test_closed_models_leave_no_files_threads_or_mappings(run: Run, bundle: Path) -> None:
    early, late = lines(run("check", "leaks", bundle))
    assert early == late
