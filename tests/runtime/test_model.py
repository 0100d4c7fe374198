"""The public names of the runtime, and the keywords of `Model.open`."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import blt_runtime
from blt_runtime import Bundle, Model
from blt_runtime.backends.null import NullBackend, null_spec
from tests.runtime.bundles import write_bundle


def test_public_names_are_few_and_documented_with_an_example() -> None:
    assert len(blt_runtime.__all__) <= 12
    for name in blt_runtime.__all__:
        assert "Example:\n    " in (inspect.getdoc(getattr(blt_runtime, name)) or ""), f"{name} has no example"


@pytest.mark.parametrize("batched", [False, True])
def test_many_is_the_former_name_of_batched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batched: bool) -> None:
    seen = []

    def backend(name: str, bundle: Bundle, *, batched: bool, **_: object) -> NullBackend:
        seen.append(batched)
        return NullBackend(bundle.manifest.spec)

    monkeypatch.setattr("blt_runtime.model._backend", backend)
    write_bundle(tmp_path / "b", null_spec())
    Model.open(tmp_path / "b", batched=batched)
    with pytest.warns(DeprecationWarning, match=r"batched=") as warned:
        Model.open(tmp_path / "b", many=batched)
    assert seen == [batched, batched]
    assert [warning.filename for warning in warned] == [__file__]
