"""The model of a run before it has weights: what its configuration says about modules, without any number."""

from __future__ import annotations

from blt.model import BLT, EntropyModel
from blt.model.token import TokenModel
from blt.train.config import BLTRun, BPERun, RunConfig
from blt.train.parameters import freeze
from blt.train.recompute import recompute_parts

Model = EntropyModel | BLT  # a TokenModel is an EntropyModel over other ids


def make_model(config: RunConfig) -> Model:
    """The model on torch's current device, with frozen parameters and recomputation. Raises ConfigError."""
    if isinstance(config, BPERun):
        model: Model = TokenModel(config.model)
    else:
        model = BLT(config.model) if isinstance(config, BLTRun) else EntropyModel(config.model)
    freeze(model, config.optimizer.freeze)
    if config.run.activation_checkpointing != "none":
        recompute_parts(model, selective=config.run.activation_checkpointing == "selective")
    return model
