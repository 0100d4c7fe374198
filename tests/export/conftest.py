"""Two tiny models that together use every option of the architecture, each captured once for the whole session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blt_export import ExportReport, pipeline
from blt_export.state import ExportState
from blt_runtime.bundle.bundle import Bundle
from tests import engines, exports
from tests.export.variants import BundleOf, Prepare


@pytest.fixture(scope="session")
def prepare() -> Prepare:
    """(variant, flavour) -> an export's state; the first export of a variant captures its graphs."""

    def make(variant: str, flavour: str) -> ExportState:
        return exports.prepare(variant, flavour)

    return make


@pytest.fixture(scope="session")
def bundle_of(prepare: Prepare, tmp_path_factory: pytest.TempPathFactory) -> BundleOf:
    """(variant, flavour) -> the report of its export, whose `path` is the bundle."""
    done: dict[tuple[str, str], ExportReport] = {}

    def export(variant: str, flavour: str) -> ExportReport:
        if (variant, flavour) not in done:
            folder: Path = tmp_path_factory.mktemp("bundles") / f"{variant}-{flavour}"
            done[variant, flavour] = pipeline.run(prepare(variant, flavour), folder)
        return done[variant, flavour]

    return export


@pytest.fixture(scope="module")
def _own_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The key that signs engines is not the user's."""
    with engines.own_key(tmp_path_factory.mktemp("data")):
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of the flavour portable, for engines."""
    return engines.exported(tmp_path_factory.mktemp("build"))
