"""Patch rules reproduce 190 cases of facebookresearch/blt, and the token-by-token form equals the vectorised one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_runtime.errors import ConfigError, RuleError
from blt_runtime.ids import BPE
from blt_runtime.patching import EntropyDtype, PatchRule, PatchState, closes_from_lengths, patch_lengths, to_bfloat16


def static_lengths(total: int, size: int) -> list[int]:
    """The static form of facebookresearch/blt, which no model accepts: all `size`, remainder last."""
    return [size] * (total // size) + [total % size] * (total % size > 0)


def case_lengths(case: dict[str, Any]) -> list[list[int]]:
    include = case["include_next_token"]
    if case["mode"] == "static":
        return [static_lengths(len(case["tokens"]) + include, case["patch_size"])]
    rule = PatchRule(
        case["mode"],
        threshold=case.get("threshold"),
        threshold_add=case.get("threshold_add"),
        monotonic=case.get("monotonicity", False),
        max_patch_length=case.get("max_patch_length"),
    )
    if case["mode"] != "entropy":
        return [patch_lengths(rule, case["tokens"], None, include).tolist()]
    return [patch_lengths(rule, np.zeros(len(row)), row, include).tolist() for row in case["entropies"]]


def test_golden_patching(golden: Path) -> None:
    cases = json.loads((golden / "patching.json").read_text())
    assert len(cases) == 190
    for case in cases:
        expected = case["patch_lengths"]
        rows = expected if isinstance(expected[0], list) else [expected]
        assert case_lengths(case) == [[n for n in row if n] for row in rows], case


longest = st.none() | st.integers(1, 5)
thresholds = st.sampled_from([-0.5, 0.0, 0.2, 1.3354420661926270])
more = {"max_patch_length": longest, "entropy_dtype": st.sampled_from(["float32", "bfloat16"])}
rules = st.one_of(
    st.builds(PatchRule, st.just("entropy"), thresholds, **more),
    st.builds(PatchRule, st.just("entropy"), thresholds, monotonic=st.just(True), **more),
    st.builds(PatchRule, st.just("entropy"), thresholds, threshold_add=thresholds, **more),
    st.builds(PatchRule, st.sampled_from(["space", "byte", "bpe"]), max_patch_length=longest),
    st.builds(PatchRule, st.just("static"), patch_size=st.integers(1, 6), max_patch_length=longest),
)
near = st.integers(-3, 3).map(lambda ulps: float(np.float32(1.335442) + np.float32(ulps / 512)))  # a tie or near it
entropies = st.floats(0, 5, width=32) | near
tokens = st.lists(st.tuples(st.integers(0, 259), entropies), max_size=60)


@given(rules, tokens)
def test_token_by_token_equals_vectorised(rule: PatchRule, sequence: list[tuple[int, float]]) -> None:
    ids, entropies = [i for i, _ in sequence], [e for _, e in sequence]
    if rule.scheme == "bpe" and ids and ids[-1] == BPE:
        ids[-1] = 5  # facebookresearch/blt ignores a delimiter at the end; the stream does not
    lengths = patch_lengths(rule, ids, entropies)
    state = PatchState(rule)
    closes = [state.closes(i, e) for i, e in sequence_of(ids, entropies)]
    assert lengths.sum() == len(ids) + 1
    assert closes == closes_from_lengths(lengths).tolist()
    assert state.open == lengths[-1] - 1
    without = patch_lengths(rule, ids, entropies, include_next_token=False)
    assert closes[:-1] == (closes_from_lengths(without).tolist() if ids else [])


def sequence_of(ids: list[int], entropies: list[float]) -> list[tuple[int, float]]:
    return list(zip(ids, entropies, strict=True))


@given(rules, tokens, st.integers(0, 59))
def test_a_copied_state_continues_alike(rule: PatchRule, sequence: list[tuple[int, float]], cut: int) -> None:
    state = PatchState(rule)
    for id, entropy in sequence[:cut]:
        state.closes(id, entropy)
    twin = state.copy()
    for id, entropy in sequence[cut:]:
        assert state.closes(id, entropy) == twin.closes(id, entropy)


def test_model_form_of_static() -> None:
    assert patch_lengths(PatchRule("static", patch_size=4), [1] * 10).tolist() == [1, 4, 4, 2]


def test_strict_threshold_in_float32() -> None:
    rule = PatchRule("entropy", threshold=1.335442066192627)
    at = float(np.float32(1.335442066192627))
    above = float(np.nextafter(np.float32(at), np.float32(9)))
    assert patch_lengths(rule, [1, 5, 6], [0, at, above]).tolist() == [1, 2, 1]
    state = PatchState(rule)
    assert [state.closes(5, e) for e in (0, at, above)] == [True, False, True]


def test_strict_threshold_in_bfloat16() -> None:
    """Spec section 4: 1.335442 becomes 1.3359375, and an entropy of just that starts no patch."""
    rule = PatchRule("entropy", threshold=1.335442066192627, entropy_dtype="bfloat16")
    at, above = 1.3359375, 1.34375  # neighbours in bfloat16
    half = (at + above) / 2  # a tie: to the even one, which is above
    for entropy, closes in ((at, False), (above, True), (half, True), (np.nextafter(np.float32(half), 0), False)):
        assert patch_lengths(rule, [1, 5, 6], [0, 0, entropy]).tolist() == ([1, 2, 1] if closes else [1, 3])
        state = PatchState(rule)
        assert [state.closes(5, e) for e in (0, 0, entropy)] == [True, False, closes]
    assert patch_lengths(replace(rule, entropy_dtype="float32"), [1, 5, 6], [0, 0, at]).tolist() == [1, 2, 1]


def test_differences_are_rounded_to_bfloat16() -> None:
    """2 - 215/512 lies above 202/128 and below 203/128, its neighbours in bfloat16, and nearer to the first."""
    rule = PatchRule("entropy", threshold=202 / 128, monotonic=True, entropy_dtype="bfloat16")
    for entropy_dtype, closes in (("float32", True), ("bfloat16", False)):
        rule = replace(rule, entropy_dtype=cast(EntropyDtype, entropy_dtype))
        assert patch_lengths(rule, [1, 5, 6], [0, 215 / 512, 2]).tolist() == ([1, 1, 1, 1] if closes else [1, 1, 2])
        state = PatchState(rule)
        assert [state.closes(5, e) for e in (0, 215 / 512, 2)] == [True, True, closes]


def tie(upper: int) -> float:
    """Halfway between two bfloat16 numbers."""
    return float(np.array(upper << 16 & 0xFFFF0000 | 0x8000, np.uint32).view(np.float32))


@given(st.floats(width=32) | st.integers(0, 1 << 16).map(tie))
def test_bfloat16_is_rounded_as_the_definition_says(value: float) -> None:
    rounded = to_bfloat16(value)
    if not math.isfinite(value):
        np.testing.assert_array_equal(rounded, np.float32(value))
        return
    bits = int(np.abs(rounded).view(np.uint32))
    assert bits & 0xFFFF == 0
    neighbours = np.array([max(bits - 0x10000, 0), bits + 0x10000], np.uint32).view(np.float32)
    if np.isfinite(neighbours).all():
        gaps = [abs(abs(Fraction(value)) - Fraction(float(other))) for other in (*neighbours, abs(rounded))]
        assert gaps[2] <= min(gaps)
        assert gaps[2] < min(gaps[:2]) or bits >> 16 & 1 == 0 or bits == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"scheme": "entropie", "threshold": 1.0}, "scheme"),
        ({"scheme": "entropy"}, "threshold"),
        ({"scheme": "static"}, "patch_size"),
        ({"scheme": "byte", "max_patch_length": 0}, "max_patch_length"),
        ({"scheme": "byte", "treshold": 1.0}, "did you mean 'threshold'"),
        ({"scheme": "entropy", "threshold": "high"}, "must be float"),
        ({"scheme": "entropy", "threshold": 1.0, "entropy_dtype": "float16"}, "'float32' or 'bfloat16'"),
        ({"scheme": "space", "entropy_dtype": "bfloat16"}, "needs the patch scheme 'entropy'"),
        ({"scheme": "entropy", "threshold": 1.0, "monotonic": True, "threshold_add": 0.1}, "not both"),
    ],
)
def test_bad_rules(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        PatchRule.from_dict(data)
    assert "\n" not in str(error.value)


def test_rule_survives_json() -> None:
    rule = PatchRule("entropy", threshold=1.0, max_patch_length=9, reset_newlines=True, entropy_dtype="bfloat16")
    assert PatchRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


def test_entropies_are_required() -> None:
    with pytest.raises(RuleError, match="entropies"):
        patch_lengths(PatchRule("entropy", threshold=1.0), [1, 2])


@pytest.mark.parametrize(
    "values",
    [
        {"threshold": "high"},
        {"threshold": float("nan")},
        {"threshold": 1.0, "threshold_add": float("inf")},
        {"threshold": 1.0, "max_patch_length": 2.5},
        {"threshold": 1.0, "entropy_dtype": "half"},
        {"scheme": "static", "patch_size": 4.5},
    ],
)
def test_a_rule_refuses_values_of_the_wrong_kind(values: dict[str, Any]) -> None:
    with pytest.raises(RuleError, match="must be"):
        PatchRule(**values)
