"""Which parameters train, and their learning rates: patterns of names, groups, and frozen parameters."""

from __future__ import annotations

import pytest
import torch

from blt.model import BLT
from blt.train.config import OptimizerConfig
from blt.train.optim import make_optimizer
from blt.train.parameters import TABLES, freeze, parameter_groups, settings_of
from blt.train.patterns import factor_of
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
    assert [group["scale"] for group in groups] == [1.0, 1.0, 0.5, 0.1]
    assert [group["eps"] for group in groups] == [1e-8, 1e-15, 1e-8, 1e-8]
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in groups[1]["params"]] == [TABLES]
    assert all(names[id(parameter)].startswith("latent.") for parameter in groups[3]["params"])
    assert all(names[id(parameter)].endswith("norm.weight") for parameter in groups[2]["params"])


def test_the_last_pattern_counts() -> None:
    scales = {"latent.*": 0.1, "latent.layers.0.*": 0.2}
    assert factor_of("latent.layers.0.attention.wq.weight", scales) == 0.2
    assert factor_of("latent.layers.1.attention.wq.weight", scales) == 0.1
    assert factor_of("decoder.output.weight", scales) == 1.0


def test_the_first_group_that_matches_gives_the_settings() -> None:
    groups = ({"match": "*norm.weight", "weight_decay": 0.0}, {"match": "latent.*", "betas": (0.8, 0.99), "eps": 1e-6})
    config = OptimizerConfig.model_validate({"eps": 1e-7, "lr_scale": {"latent.*": 0.1}, "groups": groups})
    assert settings_of("latent.layers.0.ffn_norm.weight", config) == (0.1, (0.9, 0.95), 1e-7, 0.0)
    assert settings_of("latent.layers.0.attention.wq.weight", config) == (0.1, (0.8, 0.99), 1e-6, 0.1)
    assert settings_of("decoder.output.weight", config) == (1.0, (0.9, 0.95), 1e-7, 0.1)
    assert settings_of(TABLES, config) == (1.0, (0.9, 0.95), 1e-15, 0.1)
    tables = OptimizerConfig.model_validate({"groups": [{"match": "hash_*", "eps": 1e-9}]})
    assert settings_of(TABLES, tables).eps == 1e-9


def test_each_parameter_is_updated_by_its_settings() -> None:
    """Compared with AdamW written out, in float64."""
    groups = [
        {"match": "decoder.*", "betas": [0.5, 0.6], "eps": 0.1, "weight_decay": 0.3},
        {"match": "*", "eps": 0.01},
    ]
    config = OptimizerConfig.model_validate({"lr": 0.1, "groups": groups})
    model = made()
    before = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, config)
    gradients = (0.02, -0.03)
    for gradient in gradients:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    for name, parameter in model.named_parameters():
        decoder = name.startswith("decoder.")
        (beta1, beta2), eps, decay = ((0.5, 0.6), 0.1, 0.3) if decoder else ((0.9, 0.95), 0.01, 0.1)
        w, m, v = before[name], 0.0, 0.0
        for t, g in enumerate(gradients, 1):
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            update = m / (1 - beta1**t) / ((v / (1 - beta2**t)) ** 0.5 + eps)
            w = w * (1 - 0.1 * decay) - 0.1 * update
        assert torch.allclose(parameter.double(), w, rtol=0, atol=1e-6), name


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of Muon's polynomial, applied to each singular value in float64."""
    u, s, v = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def test_muon_updates_matrices_and_adamw_the_others() -> None:
    """Muon in bfloat16 is within 3 % of the update written out in float64; the rest is AdamW to the bit."""
    groups = [{"match": "latent.*", "weight_decay": 0.3}]
    settings = {"lr": 0.1, "groups": groups, "lr_scale": {"decoder.*": 0.5}}
    models, optimizers = {}, {}
    for name in ("muon", "adamw"):
        models[name] = made()
        optimizers[name] = make_optimizer(models[name], OptimizerConfig.model_validate({"name": name, **settings}))
        for group in optimizers[name].param_groups:  # as a step of the trainer does
            group["lr"] = 0.1 * group["scale"]
    before = {name: p.detach().double().clone() for name, p in models["muon"].named_parameters()}
    generator = torch.Generator().manual_seed(1)
    gradients = [{name: torch.randn(w.shape, generator=generator) for name, w in before.items()} for _ in range(2)]
    for gradient in gradients:
        for kind, model in models.items():
            for name, parameter in model.named_parameters():
                parameter.grad = gradient[name].clone()
            optimizers[kind].step()
    theirs, matrices = dict(models["adamw"].named_parameters()), 0
    for name, parameter in models["muon"].named_parameters():
        if not name.endswith((".wq.weight", ".wk.weight", ".wv.weight", ".wo.weight", "projection.weight")) and (
            ".feed_forward." not in name
        ):
            assert torch.equal(parameter, theirs[name]), name
            continue
        matrices += 1
        rate, decay = 0.05 if name.startswith("decoder.") else 0.1, 0.3 if name.startswith("latent.") else 0.1
        w, momentum, moved = before[name], torch.zeros_like(before[name]), torch.zeros_like(before[name])
        for gradient in gradients:
            g = gradient[name].double()
            momentum = 0.95 * momentum + 0.05 * g
            update = orthogonalised(0.05 * g + 0.95 * momentum)
            update *= rate * 0.2 * max(w.shape) ** 0.5
            w, moved = w * (1 - rate * decay) - update, moved + update
        assert (parameter - w).norm() < 0.03 * moved.norm(), name
    assert matrices > 20


def test_muon_needs_a_matrix_that_trains() -> None:
    model = made()
    freeze(model, ["encoder.*", "latent.*", "decoder.layers.*", "decoder.cross.*", "decoder.patch_projection.*"])
    with pytest.raises(ConfigError, match=r"optimizer\.name is muon, but no matrix of a block trains"):
        make_optimizer(model, OptimizerConfig(name="muon"))


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
    groups = [{"match": "latent.*"}, {"match": "latnet.*", "eps": 1e-9}]
    with pytest.raises(ConfigError, match=r"optimizer.groups: 'latnet.\*' matches no parameter"):
        make_optimizer(made(), OptimizerConfig.model_validate({"groups": groups}))
    groups = [{"match": "latent.*"}, {"match": "latent.layers.*", "eps": 1e-9}]
    with pytest.raises(ConfigError, match=r"all parameters of 'latent.layers.\*' belong to earlier groups"):
        make_optimizer(made(), OptimizerConfig.model_validate({"groups": groups}))
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        freeze(made(), ["*"])
