"""What a run of each kind is made of: its model, its objective, and the checkpoint that it ends with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from blt.checkpoint.models import Checkpoint
from blt.data.token_cache import save_vocabulary
from blt.model import BLT, EntropyModel
from blt.model.token import TokenModel
from blt.model.windows import choose_attention
from blt.train import start
from blt.train.config import BLTRun, BPERun, RunConfig
from blt.train.loop import Trainer
from blt.train.material import Material, gather
from blt.train.objective import Objective, count_parameters
from blt.train.parts import freeze

log = logging.getLogger("blt.train")
Model = EntropyModel | BLT  # a TokenModel is an EntropyModel over other ids
TOKENIZER_FILE = "tokenizer.json"


def prepare_run(
    config: RunConfig,
    out: Path,
    data: str | Path | None = None,
    entropy_model: str | Path | None = None,
    compile: bool | None = None,
    device: str = "cpu",
) -> tuple[Trainer, Callable[[], Checkpoint]]:
    """The trainer of a run at step 0, and what makes its final checkpoint. Raises as `gather`, and ConfigError for
    parts to freeze or to start from that do not fit."""
    compiled = config.run.compile if compile is None else compile
    material = gather(config, data, entropy_model, compiled, device)
    config = material.config
    model = _initial(config, device, compiled)
    longest = config.patching.longest_patch if isinstance(config, BLTRun) else 0
    objective = Objective(model, longest, bf16=config.run.dtype == "bf16", compile=compiled, device=device)
    valid, flops = material.loaders["valid"], material.flops_per_byte
    trainer = Trainer(config, objective, material.training, valid, out, material.extra, flops)
    return trainer, lambda: _finished(model, material, out)


def _initial(config: RunConfig, device: str, compiled: bool) -> Model:
    if isinstance(config, BPERun):
        model: Model = TokenModel(config.model)
    else:
        model = BLT(config.model) if isinstance(config, BLTRun) else EntropyModel(config.model)
    model.init_weights(torch.Generator().manual_seed(config.run.seed))
    if not isinstance(config, BPERun):
        start.initialise(model, config.init.checkpoint, config.init.latent)
    choose_attention(model, config.run.attention, device, compiled)
    frozen = freeze(model, config.optimizer.freeze)
    log.info("%d parameters, %d tensors of them frozen", count_parameters(model), len(frozen))
    return model.to(device).train()


def _finished(model: Model, material: Material, out: Path) -> Checkpoint:
    if isinstance(model, BLT):
        return Checkpoint(model, material.entropy, material.rule)
    if isinstance(model, TokenModel):
        assert material.vocabulary is not None
        save_vocabulary(material.vocabulary, out / TOKENIZER_FILE)
        return Checkpoint(None, None, None, model, material.vocabulary)
    return Checkpoint(None, model, None)
