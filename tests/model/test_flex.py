"""The forward pass of FlexAttention equals the dense masks. Without CUDA it cannot train, and the option is refused."""

from __future__ import annotations

import pytest
import torch

from blt.model import BLT
from blt.model.flex import flex_attend
from blt.model.masks import causal_mask, dense_attend
from blt.model.windows import choose_attention
from blt_runtime.errors import ConfigError
from tests.tiny import VARIANTS


@pytest.mark.parametrize(("n", "window", "heads"), [(200, 32, 4), (130, None, 4), (200, 150, 2)])
def test_flex_equals_the_dense_mask(n: int, window: int | None, heads: int) -> None:
    generator = torch.Generator().manual_seed(n)
    document = torch.randint(0, 5, (2, n), generator=generator).sort(1).values
    q = torch.randn(2, 4, n, 16, generator=generator)
    k, v = torch.randn(2, 2, heads, n, 16, generator=generator)
    found = flex_attend(document, window)(q, k, v)
    torch.testing.assert_close(found, dense_attend(causal_mask(document, window))(q, k, v), atol=2e-6, rtol=1e-5)


def test_the_option_sets_the_attention_of_every_stack() -> None:
    config, _ = VARIANTS["static"]
    model = BLT(config)
    choose_attention(model, "flex", "cuda", compiled=True)
    assert all(stack.flex for stack in (model.encoder, model.latent, model.decoder))
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(4, 260, (2, 40), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([[1] + [5] * 8] * 2)
    with torch.no_grad():
        by_flex = model(ids, lengths, 5)
        choose_attention(model, "auto", "cpu", compiled=False)
        assert not model.latent.flex
        torch.testing.assert_close(by_flex, model(ids, lengths, 5), atol=1e-5, rtol=1e-5)


def test_flex_is_refused_where_it_cannot_train() -> None:
    model = BLT(VARIANTS["static"][0])
    with pytest.raises(ConfigError, match=r"run\.attention: flex trains only on CUDA"):
        choose_attention(model, "flex", "cpu", compiled=True)
    with pytest.raises(ConfigError, match=r"run\.attention: flex needs run\.compile"):
        choose_attention(model, "flex", "cuda", compiled=False)
