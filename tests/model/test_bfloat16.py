"""Entropies in bfloat16, as facebookresearch/blt's loader computes them: golden outputs, and steps against rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from blt.checkpoint.models import Checkpoint, load
from blt.generate import reference
from blt.generate.torch_backend import open_model
from blt.model import EntropyModel, entropy_of
from blt.model.bfloat16 import BFloat16EntropyModel, to_bfloat16
from blt_runtime.errors import RuleError, UsageError
from blt_runtime.patching import PatchRule, patch_lengths
from blt_runtime.patching import to_bfloat16 as round_to_bfloat16
from tests.tiny import hard_text, tiny

# The kernels for which the counts below were measured; others group their sums differently.
SAME_KERNELS = (
    torch.backends.cpu.get_cpu_capability() == "AVX512"
    and not torch.cpu._is_amx_tile_supported()  # AMX multiplies bfloat16 by other kernels
    and torch.__version__ >= "2.12"
)
ENTROPY_RULES = ("plain", "all_layers_gqa_projection", "cross_windows_own_heads_newlines", "max_patch_length")


@pytest.fixture(scope="module")
def checkpoint(golden: Path) -> Checkpoint:
    return load(golden / "a" / "blt")


@pytest.fixture(scope="module")
def arrays(golden: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "a" / "cases.npz"))


@pytest.fixture(scope="module")
def cases(golden: Path) -> list[str]:
    return [*json.loads((golden / "a" / "cases.json").read_text())["cases"]]


def whole_row(model: EntropyModel | None, ids: np.ndarray, reset_newlines: bool = False) -> np.ndarray:
    assert model is not None
    with torch.no_grad():
        return entropy_of(model(torch.from_numpy(ids)[None], reset_newlines))[0].numpy()


def test_golden_entropies_and_patches(checkpoint: Checkpoint, arrays: dict[str, np.ndarray], cases: list[str]) -> None:
    rounded = checkpoint.with_entropy_dtype("bfloat16")
    equal = same_patches = in_float32 = 0
    for case in cases:
        ids, expected = arrays[f"{case}/tokens"], arrays[f"{case}/entropies_bf16_loader"]
        lengths = arrays[f"{case}/patch_lengths_bf16_loader"].tolist()
        entropies = whole_row(rounded.entropy, ids)
        assert np.abs(entropies - expected).max() < (0.06 if SAME_KERNELS else 0.15)
        equal += int((entropies == expected).sum())
        same_patches += reference.lengths_of(rounded, ids.tolist()) == lengths
        in_float32 += reference.lengths_of(checkpoint, ids.tolist()) == lengths
    assert len(cases) == 15
    assert in_float32 == 11
    if SAME_KERNELS:
        assert (equal, same_patches) == (2260, 15)
    else:
        assert same_patches >= 11


@pytest.mark.parametrize("variant", ENTROPY_RULES)
def test_steps_equal_rows(variant: str) -> None:
    """Chunks and single bytes are bit-identical to whole rows, also across cache wraps, documents, newline resets."""
    rounded = tiny(variant).with_entropy_dtype("bfloat16")
    ids, rule = hard_text(), rounded.patch_rule
    assert rule is not None
    whole = whole_row(rounded.entropy, ids, rule.reset_newlines)
    np.testing.assert_array_equal(whole, round_to_bfloat16(whole))
    assert (whole != whole_row(tiny(variant).entropy, ids, rule.reset_newlines)).mean() > 0.5
    model = open_model(rounded, chunk=32)
    score = model.score(ids)
    np.testing.assert_array_equal(score.entropies, whole)
    assert score.patch_lengths.tolist() == patch_lengths(rule, ids, whole).tolist()
    bytewise = open_model(rounded, chunk=1).score(ids)
    np.testing.assert_array_equal(bytewise.entropies, whole)


def test_generated_bytes_equal_the_reference() -> None:
    rounded = tiny().with_entropy_dtype("bfloat16")
    prompt = hard_text()[:60].tolist()
    stream = open_model(rounded).stream(bos=False)
    stream.append_ids(prompt)
    found = list(stream.generate_ids(40, temperature=0, stop_at_eos=False))
    assert found == reference.generate(rounded, prompt, 40)


def entropy_model(checkpoint: Checkpoint | None = None) -> EntropyModel:
    model = (checkpoint or tiny()).entropy
    assert model is not None
    return model


@pytest.mark.parametrize("length", [1, 2, 3, 31, 33, 511, 513, 600])
def test_a_prefix_has_the_entropies_of_its_row(length: int) -> None:
    model = to_bfloat16(entropy_model())
    ids = np.random.default_rng(0).integers(3, 260, 640)
    np.testing.assert_array_equal(whole_row(model, ids[:length]), whole_row(model, ids)[:length])


def test_rows_of_a_batch_are_independent() -> None:
    model = to_bfloat16(entropy_model())
    ids = np.stack([hard_text()[:300], hard_text()[-300:]])
    with torch.no_grad():
        both = entropy_of(model(torch.from_numpy(ids))).numpy()
    for row, row_ids in zip(both, ids, strict=True):
        np.testing.assert_array_equal(row, whole_row(model, row_ids))


def test_conversion_does_not_change_the_checkpoint(checkpoint: Checkpoint) -> None:
    rounded = checkpoint.with_entropy_dtype("bfloat16")
    assert rounded.blt is checkpoint.blt
    assert checkpoint.patch_rule is not None
    assert rounded.patch_rule == replace(checkpoint.patch_rule, entropy_dtype="bfloat16")
    assert {p.dtype for p in entropy_model(rounded).parameters()} == {torch.bfloat16}
    assert {b.dtype for b in entropy_model(rounded).buffers()} == {torch.float32}
    assert {p.dtype for p in entropy_model(checkpoint).parameters()} == {torch.float32}
    assert rounded.with_entropy_dtype("bfloat16").entropy is rounded.entropy
    back = replace(checkpoint, patch_rule=rounded.patch_rule).with_entropy_dtype("float32")
    assert (back.entropy, back.patch_rule) == (checkpoint.entropy, checkpoint.patch_rule)


def test_an_entropy_model_alone_is_converted() -> None:
    alone = Checkpoint(None, tiny().entropy, None).with_entropy_dtype("bfloat16")
    assert isinstance(alone.entropy, BFloat16EntropyModel)
    assert alone.patch_rule is None


def test_conversions_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RuleError, match="has none"):
        tiny("static").with_entropy_dtype("bfloat16")
    with pytest.raises(RuleError, match="has no hash n-grams"):
        tiny("hash_entropy").with_entropy_dtype("bfloat16")
    with pytest.raises(RuleError, match="load the checkpoint again"):
        tiny().with_entropy_dtype("bfloat16").with_entropy_dtype("float32")
    with pytest.raises(RuleError, match="needs the patch scheme 'entropy'"):
        replace(tiny(), patch_rule=PatchRule("space")).with_entropy_dtype("bfloat16")


def test_bfloat16_entropies_are_not_exported() -> None:
    pipeline = pytest.importorskip("blt_export.pipeline")
    with pytest.raises(UsageError, match="float32, not bfloat16"):
        pipeline.prepare(tiny().with_entropy_dtype("bfloat16"), "portable")
