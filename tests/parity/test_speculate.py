"""Speculative decoding generates the slow reference's text: PyTorch steps and both bundle flavours, every variant.

A pass over S bytes and S single steps differ by rounding. Greedy text may therefore differ where the two likeliest
ids are within MARGIN of each other; the tests count such positions and compare nothing after them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from blt.checkpoint.models import Checkpoint
from blt.generate import reference
from blt.generate.torch_backend import open_model
from blt_export import pipeline
from blt_runtime import Drafter, Model
from blt_runtime.ids import EOS
from blt_runtime.sampling import Sampler
from blt_runtime.speculation.speculate import Speculate
from tests import exports
from tests.greedy import greedy_text
from tests.tiny import VARIANTS, WINDOW, hard_text, prompts, tiny

NEW = 60
MARGIN = 1e-5
"""Least distance of the two largest logits at which rounding cannot swap them; logits agree to 2e-5 at worst, mostly
1e-6."""
EXPORTED = ("plain", "all_layers_gqa_projection", "cross_windows_own_heads_newlines", "no_hash_space_causal_latent")


class Oracle(Drafter):
    """Drafts the true text, with one id in eight wrong."""

    def __init__(self, text: Sequence[int], seed: int = 0) -> None:
        wrong_N = np.random.default_rng(seed).random(len(text)) < 0.125
        self._text = [int(id ^ 1) if wrong else int(id) for id, wrong in zip(text, wrong_N, strict=True)]

    def propose(self, ids_N: np.ndarray, limit: int) -> Sequence[int]:
        return self._text[len(ids_N) : len(ids_N) + limit]


class Script(Sampler):
    """Chooses given ids and keeps the logits that it is called with."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(0.0)
        self._ids, self.seen = iter(ids), list[np.ndarray]()

    def __call__(self, logits_V: np.ndarray) -> int:
        self.seen.append(logits_V.copy())
        return int(next(self._ids))


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return tiny(request.param)


def drafters(model: Model, text: Sequence[int]) -> list[Speculate | Drafter]:
    named: list[Speculate | Drafter] = ["lookup", "decoder", "auto", Oracle(text)]
    return ["entropy", *named] if model.spec.patch_rule.needs_entropy else named


def assert_greedy(model: Model, prompt: Sequence[int], expected: Sequence[int]) -> int:
    """Compares the text of every drafter with `expected`; returns how many ended at a near tie."""
    ties = 0
    for drafter in drafters(model, [*prompt, *expected]):
        stream = model.stream(bos=False)
        stream.append_ids(prompt)
        for n, id in enumerate(
            stream.generate_ids(len(expected), sampler=Watched(0.0), stop_at_eos=False, speculate=drafter, draft=6)
        ):
            if id != expected[n]:
                assert Watched.margin < MARGIN, f"{drafter}: {id} for {expected[n]} at {n}, margin {Watched.margin}"
                ties += 1
                break
        if not isinstance(drafter, str):
            assert stream.speculation.accepted > 10
    return ties


class Watched(Sampler):
    """Greedy; keeps the distance between the two largest logits."""

    margin = 0.0

    def __call__(self, logits_V: np.ndarray) -> int:
        second, first = np.partition(logits_V, -2)[-2:]
        Watched.margin = float(first - second)
        return super().__call__(logits_V)


def test_torch_steps_generate_the_same(checkpoint: Checkpoint) -> None:
    model = open_model(checkpoint, chunk=16)
    ties = 0
    for prompt in [prompts()[1], hard_text()[:150].tolist()]:
        ties += assert_greedy(model, prompt, greedy_text(checkpoint, prompt, NEW))
    assert ties == 0  # none in these texts; a change of torch may move that, the margin is asserted above


def test_logits_along_the_hard_text(checkpoint: Checkpoint) -> None:
    """EOS twice in a row, newlines, windows that wrap: the logits of speculative passes against the reference's."""
    blt, _ = checkpoint.require_blt()
    ids = hard_text()
    expected = reference.forward(blt, ids.tolist(), reference.lengths_of(checkpoint, ids.tolist())).logits.numpy()
    assert len(ids) > 5 * WINDOW
    assert (ids == EOS).sum() >= 3
    assert_logits(open_model(checkpoint, chunk=16), ids, expected)


def assert_logits(model: Model, ids: np.ndarray, expected: np.ndarray) -> None:
    stream, script = model.stream(bos=False), Script(ids[1:].tolist())
    stream.append_ids(ids[:1])
    list(stream.generate_ids(len(ids) - 1, sampler=script, stop_at_eos=False, speculate=Oracle(ids.tolist())))
    np.testing.assert_allclose(np.stack(script.seen), expected[:-1], rtol=0, atol=2e-5)
    assert stream.speculation.passes < 0.6 * len(ids)


@pytest.fixture(scope="module", params=EXPORTED)
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, list[Model]]:
    """A checkpoint and its model in both flavours, with caches short enough to wrap and to evict."""
    folder, opened = tmp_path_factory.mktemp("bundles"), []
    for flavour in ("ort", "portable"):
        state = exports.prepare(request.param, flavour)
        opened.append(Model.open(pipeline.run(state, folder / flavour).path, threads=1))
    return tiny(request.param), opened


def test_bundles_generate_the_same(bundles: tuple[Checkpoint, list[Model]]) -> None:
    checkpoint, models = bundles
    ties = 0
    for prompt in [prompts()[1], hard_text()[:150].tolist()]:
        expected = greedy_text(checkpoint, prompt, NEW)
        ties += sum(assert_greedy(model, prompt, expected) for model in models)
    assert ties == 0


def test_bundles_logits_along_the_hard_text(bundles: tuple[Checkpoint, list[Model]]) -> None:
    checkpoint, models = bundles
    blt, _ = checkpoint.require_blt()
    ids = hard_text()
    expected = reference.forward(blt, ids.tolist(), reference.lengths_of(checkpoint, ids.tolist())).logits.numpy()
    for model in models:
        assert_logits(model, ids, expected)


def test_seeded_sampling_is_the_same_text(bundles: tuple[Checkpoint, list[Model]]) -> None:
    for model in bundles[1]:
        texts = []
        for speculate in ("off", "auto", "decoder"):
            stream = model.stream()
            stream.append("Once upon a time")
            texts.append(list(stream.generate(60, temperature=0.7, seed=3, stop_at_eos=False, speculate=speculate)))
        assert texts[0] == texts[1] == texts[2]
