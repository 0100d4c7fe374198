"""Samples of text while a model trains (`run.sample_every`). The weights, the random state and the loader stay as they
are, so a run with samples equals one without."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from blt.checkpoint.models import Checkpoint
from blt.model import BLT, EntropyModel
from blt.model.token import TokenModel
from blt.model.vocabulary import Vocabulary
from blt_runtime.ids import BOS, EOS, OFFSET
from blt_runtime.patching import PatchRule
from blt_runtime.sampling import Sampler

Model = TypeVar("Model", bound=nn.Module)
LENGTH = 100
"""Bytes of a sample, or tokens of a token model."""
TEMPERATURE = 0.8


class TextSampler:
    """Draws a text from the model as it is now; every text has the same random numbers."""

    def __init__(
        self,
        model: BLT | EntropyModel,
        entropy: EntropyModel | None = None,
        rule: PatchRule | None = None,
        vocabulary: Vocabulary | None = None,
    ):
        self.model, self.entropy, self.rule, self.vocabulary = model, entropy, rule, vocabulary

    def __call__(self) -> bytes:
        model, entropy = _on_cpu(self.model), None if self.entropy is None else _on_cpu(self.entropy)
        training = model.training
        model.eval()
        try:
            return self._of_blt(model, entropy) if isinstance(model, BLT) else self._of_tokens(model)
        finally:
            model.train(training)

    def _of_blt(self, model: BLT, entropy: EntropyModel | None) -> bytes:
        """Generation with caches, as `blt generate` does it."""
        from blt.generate.torch_backend import open_model

        stream = open_model(Checkpoint(model, entropy, self.rule), capacity=2 * LENGTH).stream()
        return b"".join(stream.generate(LENGTH, temperature=TEMPERATURE, seed=0))

    @torch.no_grad()
    def _of_tokens(self, model: EntropyModel) -> bytes:
        """The whole row again for every token: these models are small, and no cache is needed."""
        sampler, ids = Sampler(TEMPERATURE, seed=0), [BOS]
        while len(ids) < min(LENGTH, model.config.max_seqlen) and ids[-1] != EOS:
            ids.append(sampler(model(torch.tensor([ids]))[0, -1].float().numpy()))
        if isinstance(model, TokenModel):
            assert self.vocabulary is not None
            return self.vocabulary.decode(id for id in ids if OFFSET <= id < self.vocabulary.size)
        return bytes(id - OFFSET for id in ids if id >= OFFSET)


def _on_cpu(model: Model) -> Model:
    """The model itself, or a copy if it is on another device."""
    return model if next(model.parameters()).device.type == "cpu" else copy.deepcopy(model).cpu()
