"""benchmarks/tokens.py: the token model's size follows from FLOPs per byte. Nothing is built or timed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def tokens(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tokens")


def test_flops_count_every_multiplication_of_a_token(tokens: ModuleType) -> None:
    model = tokens.Llama(dim=128, layers=2, vocabulary=1000)
    block = 4 * 128 * 128 + 3 * 128 * 512  # queries, keys, values, output; gate, up, down (8/3 x 128, to 256s)
    keys = (1 + 2 + 3 + 4) / 4  # of 4 tokens in 8 bytes
    token = 2 * (2 * block + 1000 * 128) + 2 * 4 * 128 * keys
    assert model.flops_per_byte(2.0, context=8) == pytest.approx(token / 2.0)
    norms = 2 * 2 * 128 + 128
    assert model.weights_read() == 2 * block + 1000 * 128 + norms + 128


@pytest.mark.parametrize("tokenizer", ["llama3", "llama2"])
@pytest.mark.parametrize("mflops", [34.8, 278.2, 1500.0])
def test_the_llama_has_the_same_flops_per_byte(tokens: ModuleType, tokenizer: str, mflops: float) -> None:
    vocabulary, bytes_per_token = tokens.TOKENIZERS[tokenizer]
    model = tokens.llama_of(1e6 * mflops, vocabulary, bytes_per_token)
    assert model.flops_per_byte(bytes_per_token) == pytest.approx(1e6 * mflops, rel=0.01)
    assert 32 <= model.dim / model.layers <= 128
    assert model.vocabulary == vocabulary


def test_an_output_layer_that_is_too_large_is_refused(tokens: ModuleType) -> None:
    with pytest.raises(ValueError, match="128,256 tokens"):
        tokens.llama_of(1e6, 128_256, 4.4)


def test_the_share_of_the_floor(tokens: ModuleType) -> None:
    assert tokens.share_of_floor(bytes_per_s=10.0, weight_bytes=2e9, bandwidth=40e9) == 0.5
