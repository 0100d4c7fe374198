"""`blt check --provider`: what a comparison fails on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from blt.evaluate.provider_check import Comparison, compare
from blt_runtime import Model
from blt_runtime.ids import encode
from tests.runtime.device_backend import FarBackend
from tests.runtime.streams import SPECS, random_ids, tables_for

GOOD = Comparison(1000, 1000, 1e-6, 1e-6, 1e-5, 3, 0, 0, 32, 32, 2e-5)


def test_a_device_that_computes_the_same() -> None:
    spec = SPECS["linear"]
    models = [Model(spec, FarBackend(spec), tables_for(spec)) for _ in range(2)]
    done: list[int] = []
    found = compare(models[0], models[1], random_ids(40), "fp32", 8, done.append)
    assert (found.positions, found.compared, found.agreement, found.flips, found.logits) == (40, 25, 8, 0, 0.0)
    assert found.failure is None
    assert sum(done) == 40


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"logits": 1e-4}, "logits have a relative error of 1.0e-04, more than 2e-05"),
        ({"logits": float("nan")}, "logits have a relative error of nan"),
        ({"entropies": float("inf")}, "entropies have a relative error of inf"),
        ({"lost": 1, "new": 2}, r"3 of 1,000 patch decisions differ, more than 0.2% (1 boundaries lost, 2 new)"),
    ],
)
def test_what_fails(changed: dict[str, float], words: str) -> None:
    assert words in str(replace(GOOD, **changed).failure)  # type: ignore[arg-type]


def test_what_passes() -> None:
    assert replace(GOOD, entropies=None, lost=2, agreement=1, tolerance=4e-2, logits=3e-2).failure is None


def test_text_of_one_id() -> None:
    spec = SPECS["linear"]
    model = Model(spec, FarBackend(spec), tables_for(spec))
    assert compare(model, model, np.asarray(encode("", bos=True)), "fp32", 0).failure is None
