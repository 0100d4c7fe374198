"""`blt generate --jsonl`: records of all lines, a killed run that continues, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blt.cli import failures
from blt.cli.options import ModelOptions
from blt_runtime import Model
from blt_runtime.backends.null import null_spec
from tests.cli.calls import Result
from tests.cli.conftest import REPO
from tests.runtime.bundles import write_bundle
from tests.runtime.streams import model_of

Generate = Callable[..., Result]
GOOD = b'{"prompt": "one"}\n{"prompt": "two", "id": "b", "n": 3}\n\n{"prompt": "three", "temperature": 0}\n'
BAD = b'{"prompt": 1}\n{"promt": "x"}\n'


def open_null(path: Path, how: ModelOptions) -> Model:
    return model_of(null_spec(local_kind="window"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    (tmp_path / "in").write_bytes(GOOD * 3)
    return tmp_path


@pytest.fixture
def generate(blt: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Generate:
    """`blt generate BUNDLE --jsonl IN -o OUT -n 9 --streams 2 --seed 1` with more options, on the null backend."""

    def call(
        *more: object,
        jsonl: object = folder / "in",
        out: object = folder / "out",
        seed: tuple[object, ...] = ("--seed", 1),
        stdin: bytes = b"",
    ) -> Result:
        with monkeypatch.context() as patch:
            patch.setattr("blt.cli.models.open_batched", open_null)
            patch.setattr("blt.cli.models.check_batched", lambda path, how, streams: None)
            words = ["--jsonl", jsonl, "-o", out, "-n", 9, "--streams", 2, *seed]
            result: Result = blt("generate", folder / "bundle", *words, *more, stdin=stdin)
            return result

    return call


def records(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def test_a_file_gets_a_record_for_each_line(generate: Generate, folder: Path) -> None:
    done = generate()
    assert (done.code, done.out) == (0, b"")
    found = records((folder / "out").read_bytes())
    assert [record["index"] for record in found] == list(range(9))
    assert [record.get("id") for record in found] == [None, "b", None] * 3
    assert max(record["new_bytes"] for record in found[1::3]) <= 3
    assert "9 lines, " in done.err
    assert "bytes/s" in done.err


def test_stdout_gets_the_same_records_and_stdin_may_be_the_input(generate: Generate, folder: Path) -> None:
    generate()
    streamed = generate(jsonl="-", out="-", stdin=GOOD * 3)
    assert streamed.code == 0
    assert streamed.out == generate(out="-").out == (folder / "out").read_bytes()


def test_lines_with_an_error_are_exit_code_1_each_time(generate: Generate, folder: Path) -> None:
    (folder / "in").write_bytes(GOOD + BAD + GOOD)
    first, second = generate(), generate()
    for done in (first, second):
        assert done.code == failures.FAILED
        assert "blt: error: 2 of 8 lines have an error, which their records name\n" in done.err
    found = records((folder / "out").read_bytes())
    assert ["error" in record for record in found] == [False] * 3 + [True] * 2 + [False] * 3


def test_a_seed_that_was_drawn_is_kept_for_the_rest(generate: Generate, folder: Path) -> None:
    generate(seed=(), out=folder / "other")
    generate(seed=())
    whole = (folder / "out").read_bytes()
    assert (folder / "other").read_bytes() != whole
    (folder / "out").write_bytes(whole[: len(whole) // 2])
    assert generate(seed=()).code == 0
    assert (folder / "out").read_bytes() == whole


KILLED = """
import os, signal, sys
from pathlib import Path
from blt.cli import main, models
from blt.generate import batch
from tests.cli.test_generate_batch import open_null
models.open_batched, models.check_batched = open_null, lambda path, how, streams: None
out, records, run = Path(sys.argv.pop(1)), int(sys.argv.pop(1)), batch.run

def killed(*args, **named):
    for record in run(*args, **named):
        yield record  # the command asks for the next when it has written this one
        if out.read_bytes().count(b"\\n") >= records:
            os.kill(os.getpid(), signal.SIGKILL)

batch.run = killed
main()
"""


def test_a_run_that_was_killed_continues_to_the_same_file(generate: Generate, folder: Path) -> None:
    generate(out=folder / "whole")
    path = os.pathsep.join(str(REPO / part) for part in ("", "export", "runtime"))
    words = ["generate", "bundle", "--jsonl", "in", "-o", "out", "-n", "9", "--seed", "1", "--streams", "2"]
    held = 0
    for records in (1, 4):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, "out", str(records), *words],
            cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        )  # fmt: skip
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert held < (folder / "out").read_bytes().count(b"\n") < 9
        held = (folder / "out").read_bytes().count(b"\n")
    with (folder / "out").open("ab") as file:
        file.write(b'{"index": ')
    done = generate()
    assert done.code == 0
    assert f"out holds {held} records already" in done.err
    assert (folder / "out").read_bytes() == (folder / "whole").read_bytes()
    before = (folder / "out").stat().st_mtime_ns
    assert generate().code == 0
    assert (folder / "out").stat().st_mtime_ns == before


@pytest.mark.parametrize("streams", [1, 5])
def test_another_number_of_streams_continues_too(generate: Generate, folder: Path, streams: int) -> None:
    generate(out=folder / "whole")
    whole = (folder / "whole").read_bytes()
    generate()
    (folder / "out").write_bytes(whole[: len(whole) // 2])
    assert generate("--streams", streams).code == 0
    assert (folder / "out").read_bytes() == whole


def test_another_model_input_or_option_is_refused_in_one_line(generate: Generate, folder: Path) -> None:
    generate()
    held = (folder / "out").read_bytes()
    refused = {"options (top_k)": generate("--top-k", 5), "options (seed)": generate("--seed", 2)}
    refused["options (stop)"] = generate("--stop", "\n")
    (folder / "in").write_bytes(GOOD)
    refused["input (bytes, sha256)"] = generate()
    (folder / "in").write_bytes(GOOD * 3)
    manifest = folder / "bundle/manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    refused["model"] = generate()
    for what, done in refused.items():
        assert done.code == failures.USAGE
        assert f"out belongs to a run that differs in {what}: choose another name" in done.err
        assert len(done.err.splitlines()) == 1
    assert (folder / "out").read_bytes() == held
    assert generate("--top-k", 5, "--force").code == 0
    assert (folder / "out").read_bytes() != held


def test_another_provider_is_refused_since_it_rounds_differently(blt: Callable[..., Any], folder: Path) -> None:
    def open_far(path: Path, how: ModelOptions) -> Model:
        model = open_null(path, how)
        model.backend.provider = how.provider  # type: ignore[attr-defined]
        return model

    words = ["--jsonl", folder / "in", "-o", folder / "out", "-n", 9, "--seed", 1, "--provider"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blt.cli.models.check_batched", lambda path, how, streams: None)
        patch.setattr("blt.cli.models.open_batched", open_far)
        assert blt("generate", folder / "bundle", *words, "cpu").code == 0
        assert "provider" not in (folder / "out.state.json").read_text()
        refused = blt("generate", folder / "bundle", *words, "cuda")
        assert blt("generate", folder / "bundle", *words, "cpu").code == 0
    assert refused.code == failures.USAGE
    assert "out belongs to a run that differs in provider" in refused.err


def test_an_input_that_changes_while_it_is_read_is_an_error(
    generate: Generate, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blt_runtime.engine.batch import Batch

    run = Batch.round

    def change(batch: Batch) -> object:
        (folder / "in").write_bytes(GOOD)
        return run(batch)

    monkeypatch.setattr(Batch, "round", change)
    done = generate()
    assert done.code == failures.USAGE
    assert "in was changed while it was read" in done.err


def test_the_output_is_not_the_input(generate: Generate, folder: Path) -> None:
    (folder / "out").hardlink_to(folder / "in")
    done = generate("--force")
    assert done.code == failures.USAGE
    assert "is the input" in done.err
    assert (folder / "in").read_bytes() == GOOD * 3


ALONE = ["--file=x", "--unconditional", "--raw", "--no-stream", "--stats", "--json", "--speculate=auto"]
ALONE += ["--overflow=slide", "--backend=torch", "--device=cuda"]


@pytest.mark.parametrize("option", ["prompt", *ALONE])
def test_options_of_a_single_prompt_are_refused(generate: Generate, option: str) -> None:
    done = generate(option)
    assert done.code == failures.USAGE
    assert " is for a single prompt: leave it out" in done.err


@pytest.mark.parametrize("option", ["-o=x", "--streams=2", "--force"])
def test_options_of_a_batch_need_one(blt: Generate, folder: Path, option: str) -> None:
    done = blt("generate", folder / "bundle", "hello", *option.split("="))
    assert done.code == failures.USAGE
    assert "belongs to --jsonl IN" in done.err


def test_an_input_and_an_output_that_do_not_fit_each_other(generate: Generate, folder: Path, blt: Generate) -> None:
    without = blt("generate", folder / "bundle", "--jsonl", folder / "in")
    missing, device = generate(jsonl=folder / "missing"), generate(jsonl="/dev/null")
    unnamed = generate(jsonl="-", stdin=GOOD)
    for done, why in (
        (without, "--jsonl needs -o OUT"),
        (missing, "missing: No such file"),
        (device, "/dev/null: not a plain file"),
        (unnamed, "a run that reads standard input cannot be continued"),
    ):
        assert done.code == failures.USAGE
        assert why in done.err
