"""Sets up a run of each kind: its model, its objective, its trainer, and the model checkpoint that it ends with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from blt.checkpoint.models import Checkpoint
from blt.data.token_cache import save_vocabulary
from blt.model import BLT
from blt.model.init import allocate
from blt.model.token import TokenModel
from blt.model.windows import choose_attention
from blt.train import initial_weights, parallel
from blt.train.config import BLTRun, BPERun, RunConfig
from blt.train.inputs import RunInputs, prepare_inputs
from blt.train.loop import Trainer
from blt.train.models import Model, make_model
from blt.train.objective import Objective, count_parameters
from blt.train.parallel import SINGLE, Ranks
from blt.train.parameters import sparse_table
from blt.train.samples import TextSampler

log = logging.getLogger("blt.train")
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
    ranks: Ranks = SINGLE,
    resumes: bool = False,
) -> tuple[Trainer, Callable[[], Checkpoint]]:
    """The trainer of a run at step 0, and a function that makes its final model checkpoint. Every rank calls it.

    compile (default: the configuration's): the whole step, or with several ranks blocks and cross-attention alone,
    because FSDP gathers parameters between blocks.  resumes: a checkpoint follows, so weights are left undefined.

    Raises as `prepare_inputs`, and ConfigError for parameters to freeze or initial weights that do not fit.
    """
    compiled = config.run.compile if compile is None else compile
    whole_step = compiled and ranks.single
    inputs = ranks.first_then_others(
        lambda: prepare_inputs(
            config, data, entropy_model=entropy_model, boundaries=boundaries, compile=whole_step, device=device
        )
    )
    config = inputs.config
    if inputs.loaders["valid"] is None:
        log.warning(
            "%s has no validation text, so no validation loss is measured; `blt data prepare --split 98/2/0` "
            "cuts some off",
            config.data.path if data is None else data,
        )
    model = _sharded_model(config, ranks, torch.device(device), compiled)
    if not resumes:
        ranks.on_each(lambda: _fill(model, config))
    longest = config.patching.longest_patch if isinstance(config, BLTRun) else 0
    objective = Objective(model, longest, bf16=config.run.dtype == "bf16", compile=whole_step, device=device)
    trainer = Trainer(
        config, objective, loader=inputs.training, valid=inputs.loaders["valid"], out=out, ranks=ranks,
        extra=inputs.extra, flops_per_byte=inputs.flops_per_byte, model_flops_per_byte=inputs.model_flops_per_byte,
        sample=TextSampler(model, entropy=inputs.entropy, rule=inputs.rule, vocabulary=inputs.vocabulary),
    )  # fmt: skip
    return trainer, lambda: _final_checkpoint(model, inputs, out)


def _sharded_model(config: RunConfig, ranks: Ranks, device: torch.device, compiled: bool) -> Model:
    """The model with this rank's rows of its parameters, which have any values: no rank ever holds the whole."""
    with torch.device("meta"):
        model = make_model(config)
    choose_attention(model, attention=config.run.attention, device=device, compiled=compiled)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    log.info(
        "%s parameters%s", f"{count_parameters(model):,}", f", {len(frozen):,} tensors of them frozen" if frozen else ""
    )
    table = sparse_table(model, config.optimizer)
    parallel.shard(
        model,
        ranks,
        device,
        group=config.run.shard_ranks,
        bf16=config.run.dtype == "bf16",
        compile=compiled,
        by_row=() if table is None else (table,),
    )
    allocate(model, device)
    return model.train()


def _fill(model: Model, config: RunConfig) -> None:
    initial_weights.draw(model, config.run.seed)
    if not isinstance(config, BPERun):
        initial_weights.initialise(model, config.init.checkpoint, config.init.latent)


def _final_checkpoint(model: Model, inputs: RunInputs, out: Path) -> Checkpoint:
    if isinstance(model, BLT):
        return Checkpoint(model, inputs.entropy, inputs.rule)
    if isinstance(model, TokenModel):
        assert inputs.vocabulary is not None
        save_vocabulary(inputs.vocabulary, out / TOKENIZER_FILE)
        return Checkpoint(blt=None, entropy=None, patch_rule=None, bpe=model, vocabulary=inputs.vocabulary)
    return Checkpoint(blt=None, entropy=model, patch_rule=None)
