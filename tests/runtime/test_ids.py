"""Ids equal those of facebookresearch/blt's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_runtime import ids
from blt_runtime.errors import InputError


def test_golden_tokenizer(golden: Path) -> None:
    for case in json.loads((golden / "tokenizer.json").read_text()):
        text = case["text"]
        assert ids.encode(text, eos=True).tolist() == case["with_bos_eos"]
        assert ids.encode(text).tolist() == case["bos_only"]
        assert ids.decode(case["with_bos_eos"]).decode("utf-8", errors="ignore") == case["decoded"]


@given(st.binary())
def test_bytes_survive(data: bytes) -> None:
    encoded = ids.encode(data, eos=True)
    assert encoded.dtype == "int64"
    assert (encoded[0], encoded[-1]) == (ids.BOS, ids.EOS)
    assert ids.decode(encoded) == data


@pytest.mark.parametrize("bad", [[-1], [260], [5, 300]])
def test_foreign_ids_are_refused(bad: list[int]) -> None:
    with pytest.raises(InputError, match=r"0\.\.259"):
        ids.decode(bad)
