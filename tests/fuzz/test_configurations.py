"""The short form of the configuration fuzzer: a few seeds without bundles, and fewer with both flavours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from blt.model.config import BLTConfig, TransformerConfig
from tests.fuzz.configurations import Disagreement, check, draw, expect, main

SEEDS, EXPORTED = range(16), (2, 6)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_forms_in_pytorch_agree(seed: int) -> None:
    assert {"whole rows", "PyTorch, chunks", "native"} <= set(check(draw(seed), export=False))


@pytest.mark.parametrize("seed", EXPORTED)
def test_the_bundles_agree(seed: int) -> None:
    assert {"ort, chunks", "portable, chunks"} <= set(check(draw(seed)))


def test_a_seed_always_draws_the_same_case() -> None:
    one, other = draw(3), draw(3)
    assert one.describe() == other.describe()
    assert one.ids.tolist() == other.ids.tolist()


def test_the_seeds_use_every_option() -> None:
    """Every field of the configurations has several values, but for the vocabulary and the trained lengths."""
    configs = [draw(seed).checkpoint.require_blt()[0].config for seed in range(80)]
    for name in set(BLTConfig.model_fields) - {"vocab_size", "encoder", "latent", "decoder"}:
        assert len({str(getattr(config, name)) for config in configs}) > 1, name
    for name in set(TransformerConfig.model_fields) - {"max_seqlen"}:
        for stack in ("encoder", "latent", "decoder"):
            assert len({str(getattr(getattr(config, stack), name)) for config in configs}) > 1, (stack, name)
    rules = [draw(seed).checkpoint.require_blt()[1] for seed in range(80)]
    assert {rule.scheme for rule in rules} == {"entropy", "space", "static", "byte", "bpe"}
    for name in ("threshold_add", "monotonic", "patch_size", "max_patch_length", "reset_newlines", "entropy_dtype"):
        assert len({getattr(rule, name) for rule in rules}) > 1, name


def test_a_wrong_form_is_found() -> None:
    case = draw(0)
    expected = expect(case)
    with pytest.raises(Disagreement, match="differs from the reference by"):
        expected.compare("wrong", expected.logits + 1e-3)
    blt, _ = case.checkpoint.require_blt()
    with torch.no_grad():
        blt.decoder.output.weight[7] += 0.01
    again = replace(expect(case), logits=expected.logits)
    with pytest.raises(Disagreement):
        again.compare("another model", expect(case).logits)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "7", "--no-export"]) == 0
    assert "seed 7: 5 forms agree" in capsys.readouterr().out
