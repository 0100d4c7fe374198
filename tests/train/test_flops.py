"""The formulas for FLOPs per byte, against PyTorch's own count of what a forward and a backward pass run.

PyTorch counts the products of a dense attention, masked keys included, and the formulas count visible keys only. So
windows are taken off here, the formulas are asked for as many keys as the kernel has, and the number of visible keys is
held against the masks themselves. Everything runs on the meta device: shapes, no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blt.model import BLT, BLTConfig, EntropyConfig, EntropyModel, TransformerConfig
from blt.model.masks import causal_mask
from blt.model.token import TokenModel
from blt.train.config import BLTRun, load_config
from blt.train.dryrun import FORWARD_PASSES_PER_STEP, flops_by_part, flops_per_byte
from tests.tiny import VARIANTS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PATCH = 4
SLACK = 0.004
"""The row's first patch has one byte and a full gather, and the products of a byte with the k slices of its patch run
as sums, which PyTorch does not count."""


@pytest.fixture(autouse=True)
def dense_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformerConfig, "visible_keys", lambda self, context: float(context))


def counted(forward: Callable[[], Tensor]) -> tuple[int, int]:
    """FLOPs of a forward pass, and of one with its backward pass."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as alone:
            forward()
        with FlopCounterMode(display=False) as both:
            forward().sum().backward()
    return alone.get_total_flops(), both.get_total_flops()


def without_windows(path: str) -> Any:
    config = load_config(CONFIGS / f"{path}.yaml")
    parts = ["model.encoder.", "model.decoder."] if isinstance(config, BLTRun) else ["model."]
    return load_config(CONFIGS / f"{path}.yaml", [f"{part}window=null" for part in parts])


def count_blt(config: BLTConfig, n_bytes: int) -> tuple[int, int]:
    """FLOPs of one row, whose first patch has one byte and whose other patches have PATCH bytes."""
    with torch.device("meta"):
        model = BLT(config)
        ids_BN = torch.zeros(1, n_bytes, dtype=torch.int64)
        lengths_BP = torch.zeros(1, 1 + n_bytes // PATCH, dtype=torch.int64)
    return counted(lambda: model(ids_BN, lengths_BP, PATCH))


@pytest.mark.parametrize("name", ["tiny-entropy", "demo-entropy", "entropy-100m", "tiny-bpe"])
def test_byte_and_token_models(name: str) -> None:
    config = without_windows(name)
    context = config.batch.byte_buckets[-1]
    with torch.device("meta"):
        model = (TokenModel if name.endswith("bpe") else EntropyModel)(config.model)
        ids_BN = torch.zeros(2, context, dtype=torch.int64)
    forward, both = counted(lambda: model(ids_BN))
    assert forward == 2 * context * config.model.flops_per_byte(context)
    assert both == FORWARD_PASSES_PER_STEP * forward
    assert flops_per_byte(config, bytes_per_token=2.5) * (2.5 if name.endswith("bpe") else 1) == pytest.approx(
        forward / (2 * context)
    )


@pytest.mark.parametrize("name", ["demo", "blt-400m", "blt-1b", "blt-8b"])
def test_blt(name: str) -> None:
    config = without_windows(name)
    assert isinstance(config, BLTRun)
    context = config.batch.byte_buckets[0]
    forward, both = count_blt(config.model, context)
    assert forward == pytest.approx(context * config.model.flops_per_byte(PATCH, context), rel=SLACK)
    assert both == pytest.approx(FORWARD_PASSES_PER_STEP * forward, rel=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_of_the_architecture(name: str) -> None:
    """At a width at which products with the few keys of a cross-attention are small compared with the others."""
    small = VARIANTS[name][0]
    wide = {part: widened(getattr(small, part)) for part in ("encoder", "latent", "decoder")}
    config = BLTConfig.model_validate(small.model_dump() | {part: c.model_dump() for part, c in wide.items()})
    forward, both = count_blt(config, 512)
    assert forward == pytest.approx(512 * config.flops_per_byte(PATCH, 512), rel=SLACK)
    assert both == pytest.approx(FORWARD_PASSES_PER_STEP * forward, rel=1e-6)


def widened(part: TransformerConfig) -> TransformerConfig:
    scale = 16
    hidden = None if part.ffn_dim is None else scale * part.ffn_dim
    return part.model_copy(update={"dim": scale * part.dim, "ffn_dim": hidden, "window": None})


def test_the_entropy_model_is_counted_where_it_cuts_the_patches() -> None:
    config, entropy = load_config(CONFIGS / "demo.yaml"), load_config(CONFIGS / "demo-entropy.yaml").model
    assert isinstance(entropy, EntropyConfig)
    context = config.batch.byte_buckets[-1]
    found = flops_by_part(config, entropy=entropy)
    assert found["entropy model"] == entropy.flops_per_byte(context)
    assert sum(found.values()) == flops_per_byte(config) + entropy.flops_per_byte(context)
    space = load_config(CONFIGS / "demo.yaml", ["patching.scheme=space"])
    assert flops_per_byte(space, entropy=entropy) == flops_per_byte(space)
    assert flops_per_byte(config, patch_size=8.0) < flops_per_byte(config)


@pytest.mark.parametrize(("window", "context"), [(None, 40), (7, 40), (40, 40), (64, 40), (1, 5)])
def test_visible_keys_are_those_of_the_mask(window: int | None, context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    config = TransformerConfig(dim=4, n_layers=1, n_heads=1, window=window)
    mask_NN = causal_mask(torch.zeros(1, context, dtype=torch.int64), window)[0]
    assert config.visible_keys(context) == pytest.approx(mask_NN.sum().item() / context)
