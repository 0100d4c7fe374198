"""`blt patch` and its figure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blt.cli import console
from blt.cli.commands import patch
from blt.figures import patches as plot
from blt_runtime.errors import UsageError
from blt_runtime.ids import encode
from blt_runtime.patching import PatchRule

Call = Callable[..., Any]


def test_space_patches_as_json(blt: Call) -> None:
    result = blt("patch", "one two", "--scheme", "space", "--json")
    report = json.loads(result.text)
    assert report["schema"] == "blt.patch/1"
    assert [p["text"] for p in report["patches"]] == ["<BOS>", "one ", "two"]
    assert sum(report["patch_lengths"]) == len("one two") + 2
    assert report["mean_patch_bytes"] == 3.5


def test_text_and_table(blt: Call) -> None:
    lines = blt("patch", "one two", "--scheme", "static:3").text.splitlines()
    assert lines[0] == "<BOS>|one| tw|o"
    assert re.search(r"2 +3 +tw", lines[4])
    assert lines[-1] == "7 bytes, 3 patches after BOS, 2.33 bytes per patch (static patches of 3)"


def test_bytes_that_are_not_text_are_escaped(blt: Call) -> None:
    result = blt("patch", "-", "--scheme", "byte", "--no-table", stdin=b"\xff\x00e\xcc\x81\n[b]")
    assert result.text.startswith("<BOS>|\\xff|\\x00|e|\\xcc|\\x81|\\n\n|[|b|]\n")
    assert result.code == 0


def test_a_file_is_read(blt: Call, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert blt("patch", tmp_path / "f", "--scheme", "byte", "--no-table").text.startswith("<BOS>|a|b|c\n")


def test_colours_alternate_on_a_terminal() -> None:
    ids = encode(b"ab")
    cut = patch.Patches(PatchRule(scheme="byte"), ids, None, np.array([1, 1, 1, 1]))
    styles = [str(span.style) for span in patch._coloured(cut, colour=True).spans]
    assert styles == [patch.COLOURS[0], patch.COLOURS[1], patch.COLOURS[0]]


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.stdout_console().no_color


@pytest.fixture(scope="module")
def cases(golden: Path) -> tuple[Path, list[int], list[int], np.ndarray[Any, Any]]:
    arrays = np.load(golden / "a" / "cases.npz")
    ids, lengths = arrays["ascii/tokens"].reshape(-1), arrays["ascii/patch_lengths"].reshape(-1)
    return golden / "a" / "blt", ids.tolist(), lengths.tolist(), arrays["ascii/entropies"].reshape(-1)


def test_entropy_patches_are_the_references(blt: Call, cases: Any) -> None:
    model, ids, lengths, entropies = cases
    text = bytes(i - 4 for i in ids if i >= 4)
    report = json.loads(blt("patch", "-", "--model", model, "--json", stdin=text).text)
    assert report["patch_lengths"] == lengths
    for shown in report["patches"][1:]:
        assert shown["entropy"] == pytest.approx(float(entropies[shown["start"] - 1]), abs=2e-5)


def test_threshold_replaces_the_models(blt: Call, cases: Any) -> None:
    def n_patches(threshold: float) -> int:
        result = blt("patch", "some more text here", "--model", cases[0], "--threshold", threshold, "--json")
        return len(json.loads(result.text)["patches"])

    assert n_patches(100.0) == 2  # BOS and everything else
    assert n_patches(-1.0) == len("some more text here") + 1


def test_png_and_html(blt: Call, cases: Any, tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog – 日本語, naïve \t café. " * 4
    for name, start in (("figure.png", b"\x89PNG"), ("figure.html", b"<!doctype html>")):
        result = blt("patch", text, "--model", cases[0], "--plot", tmp_path / name, "--no-table")
        assert result.code == 0, result.err
        assert (tmp_path / name).read_bytes().startswith(start)
        assert result.err == f"wrote {tmp_path / name}\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure.html", "figure.png"]


def test_the_page_is_self_contained_and_shows_every_byte() -> None:
    ids = encode('<script>alert("x")</script> é\n', bos=True).tolist()
    figure = plot.Figure(ids, [1.0] * len(ids), starts=frozenset({0, 1, 5}), threshold=0.5, title="a <title>")
    page = plot.render(figure, "html").decode()
    assert page.count('class="byte') == len(ids)
    assert page.count("start") - page.count(".start") >= 3
    assert "<script" not in page
    assert "http" not in page
    assert "a &lt;title&gt;" in page


@pytest.mark.parametrize(
    ("nats", "numbers"), [(0.4, "0 0.1 0.2 0.3 0.4 0.5"), (2.0, "0 0.5 1 1.5 2"), (5.5, "0 1 2 3 4 5")]
)
def test_the_page_has_a_y_scale(nats: float, numbers: str) -> None:
    figure = plot.Figure([1, 70, 71], [nats, nats, 0.0], starts=frozenset({0}), threshold=None)
    page = plot.render(figure, "html").decode()
    scale = re.search(r'<div class="scale".*?</div>', page)
    assert scale is not None
    assert re.findall(r">([\d.]+)</i>", scale[0]) == numbers.split()
    (tick,) = re.findall(r"--tick:([\d.]+)%", page)
    assert f"bottom:{float(tick):.1f}%" in scale[0]


def test_bars_are_at_the_byte_that_was_predicted() -> None:
    figure = plot.Figure([1, 70, 71], [0.5, 2.0, 9.0], starts=frozenset({0, 1}), threshold=1.0)
    assert [figure.before(t) for t in range(3)] == [0.0, 0.5, 2.0]


def test_glyphs() -> None:
    ids = [1, *(4 + b for b in "a é\n".encode()), 4 + 0xFF, 2]
    assert plot.glyphs(ids) == ["BOS", "a", "␣", "é", "·", "↵", "xff", "EOS"]
    assert plot.glyphs([4 + b for b in "é".encode()], lambda char: False) == ["xc3", "xa9"]


def test_a_figure_is_png_or_html() -> None:
    with pytest.raises(UsageError, match="png or html"):
        plot.render(plot.Figure([1], [0.0], starts=frozenset(), threshold=None), "gif")
