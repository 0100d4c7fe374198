"""What the configurations refuse, before anything is built from them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from blt.generate.torch_backend import open_model
from blt.model import BLTConfig, EntropyConfig, EntropyModel
from blt.model.config import HashConfig, TransformerConfig
from blt.model.graphs import Limits
from blt.train.config import BatchConfig, DataConfig, OptimizerConfig, PatchingConfig, ScheduleConfig
from blt_runtime.backends.null import null_spec
from blt_runtime.errors import BackendError, ConfigError, OutOfMemory, RuleError, UsageError
from blt_runtime.patching import PatchRule
from tests.tiny import PLAIN, tiny

STACK = {"dim": 8, "n_layers": 1, "n_heads": 2, "ffn_dim": 8, "max_seqlen": 64}


def blt(**changes: Any) -> BLTConfig:
    return BLTConfig.model_validate({"encoder": STACK, "latent": STACK, "decoder": STACK, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hash": {"sizes": [3, 2000], "rows": 5}}, "each from 1 to 1024"),
        ({"hash": {"sizes": [], "rows": 5}}, "non-empty"),
        ({"hash": {"sizes": [0], "rows": 5}}, "each from 1 to 1024"),
        ({"vocab_size": -3}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"cross_k": True}, "must be a number, not True"),
        ({"encoder": STACK | {"dim": True}}, "must be a number, not True"),
        ({"encoder": STACK | {"rope_theta": True}}, "must be a number, not True"),
        ({"encoder": STACK | {"window": False}}, "must be a number, not False"),
        ({"encoder": STACK | {"n_layers": 1.5}}, "n_layers"),
    ],
    ids=str,
)
def test_values_that_nothing_could_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        blt(**changes)


def test_hash_tables_of_one_number_a_row() -> None:
    one = {"dim": 1, "n_layers": 1, "n_heads": 1, "head_dim": 2, "ffn_dim": 8, "max_seqlen": 64}
    assert blt(encoder=one, decoder=one, cross_k=1).hash is None
    with pytest.raises(ValidationError, match="at least 2 with a hash"):
        blt(encoder=one, decoder=one, cross_k=1, hash={"sizes": [2], "rows": 3})


@pytest.mark.parametrize("n_layers", [0, 2])
@pytest.mark.parametrize("hash", [None, {"sizes": [2, 5], "rows": 7, "functions": 2}])
def test_weights_of_an_entropy_model(n_layers: int, hash: dict[str, Any] | None) -> None:
    config = EntropyConfig.model_validate({"dim": 16, "n_layers": n_layers, "n_heads": 2, "hash": hash})
    model = EntropyModel(config)
    assert config.n_params() == sum(weight.numel() for weight in model.parameters())
    tables = config.hash.params(config.dim) if config.hash else 0
    rows = 4 * 16 if hash else 0
    assert config.weights_read() == config.n_params() - 259 * 16 - tables + rows
    assert EntropyConfig.model_validate(config.model_dump()) == config
    assert ("hash" in config.model_dump(mode="json")) == (hash is not None)


def test_an_entropy_models_tables_have_rows_of_two_numbers_at_least() -> None:
    with pytest.raises(ValidationError, match="dim must be at least 2 with a hash"):
        EntropyConfig(dim=1, n_layers=0, n_heads=1, head_dim=2, hash=HashConfig(rows=3))


def test_the_largest_values_are_accepted() -> None:
    assert blt(hash={"sizes": [1, 1024], "rows": 5}).hash is not None


CONFIGS = (
    TransformerConfig, EntropyConfig, HashConfig, BLTConfig,
    DataConfig, PatchingConfig, OptimizerConfig, ScheduleConfig, BatchConfig,
)  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_no_number_of_any_configuration_is_a_bool(kind: type[BaseModel]) -> None:
    for name, field in kind.model_fields.items():
        if "bool" in str(field.annotation):
            continue
        with pytest.raises(ValidationError) as refused:
            kind.model_validate({name: True})
        assert any(error["loc"][:1] == (name,) for error in refused.value.errors()), name


@pytest.mark.parametrize("wrong", [30.5, 30.0, True, 0, -1, "30", float("nan")], ids=str)
@pytest.mark.parametrize("name", ["capacity", "patches", "chunk"])
def test_sizes_of_a_stream_are_whole_numbers(name: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"whole numbers: {name} is"):
        Limits.of(PLAIN, **{name: wrong})
    with pytest.raises(ConfigError, match=f"whole numbers: {name} is"):
        open_model(tiny("bytes_no_window"), **{name: wrong})


@pytest.mark.parametrize("capacity", [1 << 40, 1 << 70])
def test_a_capacity_beyond_memory(capacity: int) -> None:
    with pytest.raises(OutOfMemory, match="choose a smaller --capacity"):
        open_model(tiny("bytes_no_window"), capacity=capacity)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"threads": True}, UsageError),
        ({"threads": 0}, UsageError),
        ({"threads": 1.5}, UsageError),
        ({"threads": 10**9}, UsageError),
        ({"device": 7}, BackendError),
        ({"device": "cuda"}, BackendError),
    ],
    ids=str,
)
def test_options_of_the_torch_backend(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        open_model(tiny("bytes_no_window"), **options)


def test_a_checkpoint_is_named_by_a_path() -> None:
    for wrong in (7, None, b"model.pt", ["model.pt"]):
        with pytest.raises(UsageError, match="a str or a Path"):
            open_model(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"threshold": True},
        {"threshold": 1e300},
        {"threshold": float("nan")},
        {"threshold": "1.5"},
        {"threshold": 1.0, "threshold_add": 1e300},
        {"threshold": 1.0, "threshold_add": True},
        {"threshold": 1.0, "monotonic": 1},
        {"threshold": 1.0, "reset_newlines": "yes"},
        {"threshold": 1.0, "max_patch_length": True},
        {"threshold": 1.0, "max_patch_length": 2.5},
        {"threshold": 1.0, "max_patch_length": 10**30},
        {"scheme": "static", "patch_size": True},
        {"scheme": "static", "patch_size": 10**30},
        {"scheme": ["byte"]},
        {"threshold": 1.0, "entropy_dtype": None},
    ],
    ids=str,
)
def test_patch_rules(values: dict[str, Any]) -> None:
    with pytest.raises(RuleError):
        PatchRule(**values)


@pytest.mark.parametrize("name", ["capacity_bytes", "capacity_patches", "chunk", "encoder_window", "decoder_window"])
@pytest.mark.parametrize("wrong", [0, -1, 30.5, True, None], ids=str)
def test_sizes_of_a_spec(name: str, wrong: Any) -> None:
    with pytest.raises((ConfigError, TypeError)):
        null_spec(**{name: wrong})
