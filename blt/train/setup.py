"""Sets up a run of each kind: its model, its objective, its trainer, and the model checkpoint that it ends with."""

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
from blt.train import initial_weights
from blt.train.config import BLTRun, BPERun, RunConfig
from blt.train.inputs import RunInputs, prepare_inputs
from blt.train.loop import Trainer
from blt.train.objective import Objective, count_parameters
from blt.train.parameters import freeze
from blt.train.samples import TextSampler

log = logging.getLogger("blt.train")
Model = EntropyModel | BLT  # a TokenModel is an EntropyModel over other ids
TOKENIZER_FILE = "tokenizer.json"


def prepare_run(
    config: RunConfig,
    out: Path,
    data: str | Path | None = None,
    *,
    entropy_model: str | Path | None = None,
    boundaries: str | Path | None = None,
    compile: bool | None = None,
    device: str = "cpu",
) -> tuple[Trainer, Callable[[], Checkpoint]]:
    """The trainer of a run at step 0, and a function that makes its final model checkpoint.

    Raises as `prepare_inputs`, and ConfigError for parameters to freeze or initial weights that do not fit.
    """
    compiled = config.run.compile if compile is None else compile
    inputs = prepare_inputs(
        config, data, entropy_model=entropy_model, boundaries=boundaries, compile=compiled, device=device
    )
    config = inputs.config
    if inputs.loaders["valid"] is None:
        log.warning(
            "%s has no validation text, so no validation loss is measured; `blt data prepare --split 98/2/0` "
            "cuts some off",
            config.data.path if data is None else data,
        )
    model = _initial_model(config, device, compiled)
    longest = config.patching.longest_patch if isinstance(config, BLTRun) else 0
    objective = Objective(model, longest, bf16=config.run.dtype == "bf16", compile=compiled, device=device)
    trainer = Trainer(
        config, objective, loader=inputs.training, valid=inputs.loaders["valid"], out=out, extra=inputs.extra,
        flops_per_byte=inputs.flops_per_byte, model_flops_per_byte=inputs.model_flops_per_byte,
        sample=TextSampler(model, entropy=inputs.entropy, rule=inputs.rule, vocabulary=inputs.vocabulary),
    )  # fmt: skip
    return trainer, lambda: _final_checkpoint(model, inputs, out)


def _initial_model(config: RunConfig, device: str, compiled: bool) -> Model:
    if isinstance(config, BPERun):
        model: Model = TokenModel(config.model)
    else:
        model = BLT(config.model) if isinstance(config, BLTRun) else EntropyModel(config.model)
    model.init_weights(torch.Generator().manual_seed(config.run.seed))
    if not isinstance(config, BPERun):
        initial_weights.initialise(model, config.init.checkpoint, config.init.latent)
    choose_attention(model, attention=config.run.attention, device=device, compiled=compiled)
    frozen = freeze(model, config.optimizer.freeze)
    log.info(
        "%s parameters%s", f"{count_parameters(model):,}", f", {len(frozen):,} tensors of them frozen" if frozen else ""
    )
    return model.to(device).train()


def _final_checkpoint(model: Model, inputs: RunInputs, out: Path) -> Checkpoint:
    if isinstance(model, BLT):
        return Checkpoint(model, inputs.entropy, inputs.rule)
    if isinstance(model, TokenModel):
        assert inputs.vocabulary is not None
        save_vocabulary(inputs.vocabulary, out / TOKENIZER_FILE)
        return Checkpoint(blt=None, entropy=None, patch_rule=None, bpe=model, vocabulary=inputs.vocabulary)
    return Checkpoint(blt=None, entropy=model, patch_rule=None)
