"""A file of records: continued after a kill at any byte, refused for another run, written by one process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from blt.generate.output import Output, open_output, state_path
from blt_runtime.errors import UsageError

RUN: Mapping[str, Any] = {"model": "abc", "input": {"bytes": 3}, "options": {"n": 5, "top_k": None}}
RECORDS = [
    b'{"index": 0, "text": "a"}\n',
    b'{"index": 1, "error": "why"}\n',
    b'{"index": 2, "text": "\\", \\"error\\": \\"x"}\n',
]


def write(path: Path, records: list[bytes] = RECORDS, run: Mapping[str, Any] = RUN, force: bool = False) -> Output:
    """Continues `path` with those of `records` that it lacks. Returns what it was opened with."""
    with open_output(path, run, {"seed": 4}, force=force) as output:
        for record in records[output.done :]:
            output.write(record)
    return output


def test_a_new_file_gets_the_records_and_a_state_beside_it(tmp_path: Path) -> None:
    output = write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"".join(RECORDS)
    assert (output.done, output.failed, output.state["seed"]) == (0, 0, 4)
    assert state_path(tmp_path / "out") == tmp_path / "out.state.json"
    assert json.loads((tmp_path / "out.state.json").read_text()) == {"schema": "blt.batch/1", **RUN, "seed": 4}


def test_a_file_that_was_cut_at_any_byte_becomes_the_same(tmp_path: Path) -> None:
    path, whole = tmp_path / "out", b"".join(RECORDS)
    write(path)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        output = write(path)
        assert path.read_bytes() == whole
        assert output.done == whole[:cut].count(b"\n")
        assert output.failed == (output.done > 1)


def test_a_record_is_in_the_file_once_it_is_written(tmp_path: Path) -> None:
    with open_output(tmp_path / "out", RUN, {}, force=False) as output:
        for n, record in enumerate(RECORDS, 1):
            output.write(record)
            assert (tmp_path / "out").read_bytes() == b"".join(RECORDS[:n])


def test_what_the_first_run_drew_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "out", RECORDS[:1])
    with open_output(tmp_path / "out", RUN, {"seed": 5}, force=False) as output:
        assert output.state["seed"] == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "xyz"}, "differs in model:"),
        ({"options": {"n": 6, "top_k": None}}, r"differs in options \(n\):"),
        ({"options": {"n": 5}, "input": {}}, r"differs in input \(bytes\), options \(top_k\):"),
        ({"options": {"n": 5, "top_k": None, "regex": "a+"}}, r"differs in options \(regex\):"),
    ],
)
def test_another_run_is_refused_unless_it_begins_anew(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = tmp_path / "out"
    write(path, RECORDS[:2])
    for one, other in ((RUN, {**RUN, **change}), ({**RUN, **change}, RUN)):
        write(path, RECORDS[:2], one, force=True)
        held = path.read_bytes(), state_path(path).read_bytes()
        with pytest.raises(UsageError, match=f"{named} choose another name, or replace .* with --force"):
            write(path, run=other)
        assert (path.read_bytes(), state_path(path).read_bytes()) == held
    assert write(path, [b'{"index": 0, "text": "new"}\n'], {**RUN, **change}, force=True).done == 0
    assert path.read_bytes() == b'{"index": 0, "text": "new"}\n'


@pytest.mark.parametrize("state", [None, b"", b"{", b"[]", b'{"schema": "blt.batch/0"}'])
def test_a_file_without_a_state_of_this_version_is_refused(tmp_path: Path, state: bytes | None) -> None:
    (tmp_path / "out").write_bytes(b"mine\n")
    if state is not None:
        (tmp_path / "out.state.json").write_bytes(state)
    with pytest.raises(UsageError, match=r"replace .* with --force"):
        write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"mine\n"


def test_an_empty_file_is_begun_whatever_its_state(tmp_path: Path) -> None:
    """A process that was killed between --force and its first record leaves one."""
    write(tmp_path / "out", run={**RUN, "model": "xyz"})
    (tmp_path / "out").write_bytes(b"")
    write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"".join(RECORDS)


@pytest.mark.parametrize("edited", [RECORDS[0] + RECORDS[2], b"\n" + RECORDS[0], RECORDS[0] + b"hand-written\n"])
def test_a_file_that_was_edited_is_refused(tmp_path: Path, edited: bytes) -> None:
    write(tmp_path / "out")
    (tmp_path / "out").write_bytes(edited)
    with pytest.raises(UsageError, match=r"line \d of .* is no record of this command"):
        write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == edited


def test_one_process_writes_a_file(tmp_path: Path) -> None:
    with open_output(tmp_path / "out", RUN, {}, force=False) as output:
        output.write(RECORDS[0])
        with pytest.raises(UsageError, match="another process is writing"):
            write(tmp_path / "out", force=True)
    assert (tmp_path / "out").read_bytes() == RECORDS[0]


def test_pipes_folders_and_missing_folders_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("pipe", "not a plain file"), (".", "is a folder"), ("none/out", "does not exist")):
        with pytest.raises(UsageError, match=why):
            write(tmp_path / name)
