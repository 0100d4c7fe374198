"""`blt plot`: runs are read as they were written, half-written ones too, and drawn against what they cost."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt.figures import runs as plot_runs
from blt.figures.metrics import distinct, read_run, read_runs

Call = Callable[..., Any]
Records = list[dict[str, Any]]


def records(bpb: float, n: int = 4, flops: bool = True) -> Records:
    """A run that gets better by a tenth every 100 steps, validated every second time."""
    found: Records = []
    for i in range(1, n + 1):
        counts = {"bytes": 1000 * i} | ({"flops": 2e9 * i} if flops else {})
        found.append({"step": 100 * i, "loss": bpb * 0.9**i * math.log(2), "bpb": bpb * 0.9**i, **counts})
        if i % 2 == 0:
            found.append({"step": 100 * i, "valid_bpb": bpb * 0.9**i + 0.1, "valid_bytes": 50})
    return found


def make_run(folder: Path, content: Records, tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in content) + tail)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / "a", records(4.0)), make_run(tmp_path / "b", records(5.0))]


def test_the_curves_are_those_of_the_file(blt: Call, runs: list[Path]) -> None:
    result = blt("plot", *runs, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.text)
    first = report["runs"][0]
    assert report["schema"] == "blt.plot/1"
    assert [run["label"] for run in report["runs"]] == ["a", "b"]
    assert first["curves"]["bytes"]["bpb"] == [[1000 * i, pytest.approx(4 * 0.9**i)] for i in range(1, 5)]
    assert first["curves"]["flops"]["valid_bpb"] == [[2e9 * i, pytest.approx(4 * 0.9**i + 0.1)] for i in (2, 4)]
    assert first["steps"] == 400
    assert first["valid_bpb"] == first["best_valid_bpb"] == pytest.approx(4 * 0.9**4 + 0.1)


def test_from_leaves_out_the_beginning(blt: Call, runs: list[Path]) -> None:
    report = json.loads(blt("plot", *runs, "--json", "--from", "2500", "--against", "step").text)
    assert [x for x, _ in report["runs"][1]["curves"]["step"]["loss"]] == [300, 400]


def test_the_table_has_a_line_for_each_run(blt: Call, runs: list[Path]) -> None:
    lines = blt("plot", *runs, "--labels", "space, static").text.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "space", "static"]
    assert f"{4 * 0.9**4 + 0.1:.4f}" in lines[1]


def test_a_page_names_the_runs_and_is_self_contained(blt: Call, runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.html"
    assert blt("plot", *runs, "-o", out, "--labels", "<one>,two", "--title", "a & b").code == 0
    page = out.read_text()
    assert "&lt;one&gt;" in page
    assert "a &amp; b" in page
    for label in ("&lt;one&gt;", "two"):
        assert page.count(f"<title>{label}</title>") == (1 + 2) * 2  # loss and both bits per byte, two axes
        assert page.count(f"<title>{label}: ") == 2 * 2  # validations: times, axes
    assert not re.search(r"https?://|<script|src=|nan|inf", page)


def test_a_picture_is_a_png(blt: Call, runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    assert blt("plot", runs[0] / "metrics.jsonl", "-o", out).code == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_runs_without_an_axis_are_named_and_the_others_drawn(blt: Call, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    old = make_run(tmp_path / "old", records(4.0, flops=False))
    new = make_run(tmp_path / "new", records(4.0))
    result = blt("plot", old, new, "-o", tmp_path / "x.html")
    assert result.code == 0
    assert "not drawn against flops" in result.err
    assert "old" in result.err
    page = (tmp_path / "x.html").read_text()
    assert page.count("<title>old</title>") == 3
    assert page.count("<title>new</title>") == 3 * 2


def test_labels_that_matplotlib_would_interpret_or_cannot_write_are_shown(
    blt: Call, runs: list[Path], tmp_path: Path
) -> None:
    """An underscore hides a line from the legend, dollar signs are formulas, control characters are not in XML."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "x.html"
    assert blt("plot", *runs, "-o", out, "--labels", "_one,$\\a$", "--title", "a\x01b").code == 0
    page = out.read_text()
    assert re.search(r"<text[^>]*> ?_one</text>", page)
    assert re.search(r"<text[^>]*>\$\\a\$</text>", page)
    assert "a\ufffdb" in page


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", records(4.0), tail='{"step": 500, "lo'), "run")
    assert run.train[-1]["step"] == 400


def test_a_loss_that_is_no_number_has_no_point(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "r", [*records(4.0), {"step": 500, "loss": math.nan, "bytes": 5000}]), "r")
    assert [x for x, _ in run.points("loss", "bytes")] == [1000, 2000, 3000, 4000]


def test_a_run_that_only_validated_so_far_counts(tmp_path: Path) -> None:
    only = make_run(tmp_path / "r", [{"step": 5, "valid_bpb": 3.0, "bytes": 10, "flops": 1e6}])
    assert read_runs([only])[0].summary()["valid_bpb"] == 3.0


def test_labels_tell_paths_apart(tmp_path: Path) -> None:
    assert distinct([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert distinct([tmp_path / "run", tmp_path / "run"]) == ["run", "run (2)"]


ERRORS = [
    (["{tmp}/none"], 2, "metrics.jsonl"),
    (["{tmp}/empty"], 2, "no records"),
    (["{tmp}/broken"], 2, "line 1"),
    (["{tmp}/a", "-o", "x.gif"], 2, ".png or .html"),
    (["{tmp}/a", "-o", "{tmp}/no/x.html"], 2, "does not exist"),
    (["{tmp}/a", "--against", "tea"], 2, "choose from bytes"),
    (["{tmp}/a", "--labels", "x,y"], 2, "2 labels for 1 runs"),
    (["{tmp}/a", "--from", "1G", "-o", "{tmp}/x.html"], 2, "nothing to draw"),
    (["{tmp}/a", "--against", "seconds", "-o", "{tmp}/x.html"], 2, "nothing to draw"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), ERRORS)
def test_a_mistake_is_one_line(
    blt: Call, tmp_path: Path, runs: list[Path], arguments: list[str], code: int, words: str
) -> None:
    make_run(tmp_path / "empty", [])
    make_run(tmp_path / "broken", [], tail="not a record\n" + json.dumps(records(4.0)[0]) + "\n")
    result = blt("plot", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.code == code
    assert words in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


@given(st.floats(1e-3, 1e15), st.floats(1.001, 1e6))
def test_an_axis_has_a_few_round_ticks_within_its_ends(low: float, factor: float) -> None:
    at = plot_runs.ticks(low, low * factor)
    assert 2 <= len(at) <= 2 * plot_runs.MOST
    assert at == sorted(set(at))
    assert all(low <= value <= low * factor * (1 + 1e-9) for value in at)


def test_one_axis_has_its_panels_in_one_row(runs: list[Path]) -> None:
    read = read_runs(runs)
    assert [len(row) for row in plot_runs.Figure(read, ["bytes"]).panels()] == [2]
    assert [len(row) for row in plot_runs.Figure(read, ["bytes", "flops"]).panels()] == [2, 2]


def test_the_legend_fits_into_the_width() -> None:
    assert plot_runs.legend_columns(["a", "b"], 8.8) == 2
    assert plot_runs.legend_columns(["a", "b", "c", "d"], 8.8) == 3
    assert plot_runs.legend_columns(["x" * 29] * 4, 4.4) == 2
    assert plot_runs.legend_columns(["x" * 200] * 4, 4.4) == 1


@pytest.mark.parametrize(
    ("begin", "factor"),
    [(1030, 1.33), (0.9e6, 700), (3e7, 1.4), (1e4, 1e5), (2e9, 30)],
    ids=["kB", "MB", "near", "far", "GB"],
)
def test_the_labels_of_ticks_do_not_touch(begin: float, factor: float) -> None:
    pytest.importorskip("matplotlib")
    from blt.figures import runs as figures
    from blt.figures.metrics import Run

    steps = [factor ** (i / 9) for i in range(10)]
    records = [
        {"step": i + 1, "bytes": begin * f, "flops": 1e9 * begin * f, "loss": 3 / f**0.1, "bpb": 2 / f}
        for i, f in enumerate(steps)
    ]
    canvas = figures._draw(figures.Figure([Run("a", Path("a"), records, [])]))
    canvas.draw_without_rendering()
    for ax in canvas.axes:
        for axis, side in ((ax.xaxis, 0), (ax.yaxis, 1)):
            extents = [label.get_window_extent().extents for label in axis.get_ticklabels()]
            boxes = sorted((float(box[side]), float(box[side + 2])) for box in extents)
            assert len(boxes) >= 2
            assert all(before[1] + 3 < after[0] for before, after in pairwise(boxes))
