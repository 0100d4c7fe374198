"""runtime/examples/notebook.ipynb: its cells run in order, and are stored without outputs."""

from __future__ import annotations

import ast
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from blt_runtime import Model
from tests.runtime.bundles import write_bundle

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def notebook(repo: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((repo / "runtime/examples/notebook.ipynb").read_text(encoding="utf-8"))
    return read


def test_cells_run_in_order(
    notebook: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Model, "open", functools.partial(Model.open, backend="null"))
    drawn: list[tuple[int, list[str]]] = []

    def show() -> None:
        (axes,) = pyplot.gcf().axes
        drawn.append((len(axes.patches), [label.get_text() for label in axes.get_xticklabels()]))
        pyplot.close("all")

    monkeypatch.setattr(pyplot, "show", show)
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for at, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        exec(compile("".join(cell["source"]), f"cell {at}", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert all(printed[:-1])
    text = "def open_file(path):\n    return open(path, encoding='utf-8')\n"
    assert drawn == [(len(text), list(text.replace("\n", "⏎")))]
    assert (
        b"".join(ast.literal_eval(line.partition("before  ")[2]) for line in printed[-2].splitlines()) == text.encode()
    )


def test_it_is_a_notebook_of_version_4_without_outputs(notebook: dict[str, Any]) -> None:
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert {(cell["execution_count"], len(cell["outputs"])) for cell in code} == {(None, 0)}
