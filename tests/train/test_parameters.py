"""Which parameters train, and their learning rates: patterns of names, groups, and frozen parameters."""

from __future__ import annotations

import pytest
import torch

from blt.model import BLT
from blt.train.config import OptimizerConfig
from blt.train.optim import make_optimizer
from blt.train.parameters import freeze, parameter_groups, scale_of
from blt_runtime.errors import ConfigError
from tests.tiny import PLAIN


def made() -> BLT:
    model = BLT(PLAIN)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_groups_hold_every_parameter_once() -> None:
    model = made()
    config = OptimizerConfig(lr_scale={"latent.*": 0.1, "*norm.weight": 0.5})
    groups = parameter_groups(model, config)
    assert [group["scale"] for group in groups] == [1.0, 0.5, 0.1]
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(parameter)].startswith("latent.") for parameter in groups[2]["params"])
    assert all(names[id(parameter)].endswith("norm.weight") for parameter in groups[1]["params"])


def test_the_last_pattern_counts() -> None:
    scales = {"latent.*": 0.1, "latent.layers.0.*": 0.2}
    assert scale_of("latent.layers.0.attention.wq.weight", scales) == 0.2
    assert scale_of("latent.layers.1.attention.wq.weight", scales) == 0.1
    assert scale_of("decoder.output.weight", scales) == 1.0


def test_frozen_parameters_do_not_move() -> None:
    model = made()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = OptimizerConfig(lr=0.1, freeze=("latent.*", "hash_embedding.*"))
    frozen = freeze(model, config.freeze)
    assert frozen
    optimizer = make_optimizer(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen)
        assert (name in frozen) == name.startswith(("latent.", "hash_embedding."))


def test_patterns_that_match_nothing_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.freeze: 'latnet.\*' matches no parameter"):
        freeze(made(), ["latnet.*"])
    with pytest.raises(ConfigError, match=r"optimizer.lr_scale: 'latent' matches no parameter"):
        parameter_groups(made(), OptimizerConfig(lr_scale={"latent": 0.1}))
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        freeze(made(), ["*"])
