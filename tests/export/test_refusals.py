"""Arguments of an export that cannot be met: one typed error, before anything is captured where that is possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blt.generate.torch_backend import open_model
from blt_export import pipeline
from blt_runtime.errors import ConfigError, OutOfMemory, UsageError
from blt_runtime.patching import PatchRule
from tests.tiny import PLAIN, random_checkpoint, stack, tiny


@pytest.fixture(autouse=True)
def no_capture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.function is not test_a_precision_that_no_matrix_can_have:
        monkeypatch.setattr("blt_export.capture.trace.capture", lambda *_: pytest.fail("captured a graph"))


@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize("capacity", [1 << 40, 1 << 70])
def test_a_capacity_beyond_memory(flavour: str, capacity: int, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match="choose a smaller --capacity"):
        pipeline.export(tiny(), tmp_path / "b", flavour=flavour, capacity=capacity)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"capacity": 30.5}, {"patches": True}, {"chunk": 0}, {"capacity": "9"}], ids=str)
def test_sizes_are_whole_numbers(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whole numbers"):
        pipeline.export(tiny(), tmp_path / "b", **options)


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_a_type_of_tables_that_the_model_does_not_have(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"table_dtype {dtype}: this model has no hash tables"):
        pipeline.export(tiny("no_hash_space_causal_latent"), tmp_path / "b", table_dtype=dtype)


def test_a_precision_that_no_matrix_can_have(tmp_path: Path) -> None:
    """Blocks have 128 inputs; widths of 24 have none. The bundle must not call itself int8."""
    narrow = stack(24, 1, 2, window=24, ffn_dim=24)
    config = PLAIN.model_copy(
        update={"encoder": narrow, "latent": stack(24, 1, 2, ffn_dim=24), "decoder": narrow, "cross_k": 1, "hash": None}
    )
    checkpoint = random_checkpoint(config, PatchRule("byte"))
    with pytest.raises(UsageError, match=r"no matrix of this model can have it \(24 inputs are no multiple of 128\)"):
        pipeline.export(checkpoint, tmp_path / "b", precision="int8", capacity=64)
    assert not list(tmp_path.iterdir())


def test_the_arguments_of_a_checkpoint_are_those_of_the_runtime() -> None:
    with pytest.raises(ConfigError, match="whole numbers"):
        open_model(tiny("static"), chunk=2.5)  # type: ignore[arg-type]
