"""The search for a threshold, against an exhaustive search, and on held-out text of a real entropy model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blt.bench import bench_text
from blt.checkpoint.models import load
from blt.data.threshold import Piece, base_rule, find_rule, halves, mean_patch_size, relative_error, sizes
from blt.model import entropy_of
from blt_runtime.errors import InputError, UsageError
from blt_runtime.ids import encode
from blt_runtime.patching import PatchRule, to_bfloat16

GLOBAL = PatchRule(threshold=0.0)
MONOTONIC = PatchRule(threshold=0.0, monotonic=True)
RULES = {
    "global": GLOBAL,
    "monotonic": MONOTONIC,
    "longest 4": replace(GLOBAL, max_patch_length=4),
    "monotonic, longest 5": replace(MONOTONIC, max_patch_length=5),
    "level and rise": replace(GLOBAL, threshold_add=-0.5),
    "bfloat16": replace(GLOBAL, entropy_dtype="bfloat16"),
    "monotonic, bfloat16": replace(MONOTONIC, entropy_dtype="bfloat16"),
}


def piece(entropies: list[float], eos: bool = True) -> Piece:
    """BOS, letters, EOS with these entropies."""
    ids = encode(b"x" * (len(entropies) - 1 - eos), bos=True, eos=eos)
    return Piece(ids, np.array(entropies, np.float32))


def random_pieces(seed: int, n: int = 6) -> list[Piece]:
    random = np.random.default_rng(seed)
    return [piece(random.gamma(2.0, 0.7, random.integers(3, 90)).tolist(), bool(i % 2)) for i in range(n)]


def all_means(rule: PatchRule, pieces: list[Piece]) -> dict[float, float]:
    """Mean patch size by threshold, for a threshold at each value that is compared, and one below all values."""
    seen = [to_bfloat16(p.entropies) if rule.entropy_dtype == "bfloat16" else p.entropies for p in pieces]
    values = np.concatenate([f(row) for row in seen for f in (np.asarray, np.diff)])
    values = to_bfloat16(values) if rule.entropy_dtype == "bfloat16" else values
    thresholds = [float(values.min()) - 1, *np.unique(values).tolist()]
    return {t: mean_patch_size(replace(rule, threshold=t), pieces) for t in thresholds}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_no_other_threshold_is_closer(name: str, seed: int) -> None:
    rule, pieces = RULES[name], random_pieces(seed)
    means = sorted(set(all_means(rule, pieces).values()))
    assert len(means) > 20  # there are many thresholds to choose from
    for wanted in np.linspace(means[0], means[-1], 23).tolist():
        found = mean_patch_size(find_rule(rule, pieces, wanted), pieces)
        assert abs(found - wanted) == pytest.approx(min(abs(mean - wanted) for mean in means), abs=1e-12)


levels = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 1.5000001, 3.0]) | st.floats(0, 6, width=32)
texts = st.lists(st.tuples(st.lists(levels, min_size=3, max_size=40), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=150)
@given(texts, st.sampled_from(sorted(RULES)), st.floats(0, 1))
def test_the_closest_reachable_mean_is_returned(rows: list[tuple[list[float], bool]], name: str, share: float) -> None:
    rule, pieces = RULES[name], [piece(*row) for row in rows]
    means = all_means(rule, pieces).values()
    wanted = min(means) + share * (max(means) - min(means))
    wanted = min(max(wanted, min(means)), max(means))
    found = find_rule(rule, pieces, wanted)
    closest = min(abs(mean - wanted) for mean in means)
    assert abs(mean_patch_size(found, pieces) - wanted) == pytest.approx(closest, abs=1e-12)
    assert replace(found, threshold=0.0) == replace(rule, threshold=0.0)  # nothing else changed


def test_the_mean_never_falls_with_the_threshold() -> None:
    """The bisection relies on this, also with a longest patch."""
    for rule in RULES.values():
        means = list(all_means(rule, random_pieces(7)).values())
        assert means == sorted(means)


def test_the_threshold_is_short_and_between_its_neighbours() -> None:
    pieces = [piece([9.0, 0.5, 2.0, 0.1, 1.0, 0.2, 3.0, 0.3, 9.0])]
    assert find_rule(GLOBAL, pieces, 7 / 3).threshold == 1.5  # opens at 2.0 and 3.0, not at 1.0
    close = [piece([9.0, 1.0001, 1.0002, 0.0, 0.0, 9.0])]
    assert find_rule(GLOBAL, close, 2.0).threshold == 1.00015


def test_neighbours_without_a_number_between_them() -> None:
    low = np.float32(1.0)
    high = np.nextafter(low, np.float32(2))
    pieces = [piece([0.0, float(low), float(high), 0.0, 0.0, 9.0])]
    found = find_rule(GLOBAL, pieces, 2.0)
    assert found.threshold == 1.0  # the comparison is strict: a patch begins only at `high`
    assert mean_patch_size(found, pieces) == 2.0


def test_bytes_per_patch_are_counted_as_eval_does() -> None:
    """BOS is not counted as a patch. EOS begins one but is no byte. The virtual next token is not counted."""
    one = piece([9.0, 0.0, 9.0, 0.0, 9.0, 9.0])  # BOS | x x | x x | EOS
    assert sizes(replace(GLOBAL, threshold=1.0), [one]).lengths.tolist() == [2, 2, 1]
    assert mean_patch_size(replace(GLOBAL, threshold=1.0), [one]) == 4 / 3
    cut = piece([9.0, 0.0, 9.0, 0.0, 9.0], eos=False)
    assert mean_patch_size(replace(GLOBAL, threshold=1.0), [cut]) == 2.0
    assert mean_patch_size(replace(GLOBAL, threshold=1.0), [one, cut]) == 8 / 5


def test_sizes() -> None:
    found = sizes(PatchRule("static", patch_size=3), [piece([0.0] * 9), piece([0.0] * 9)])
    assert found.lengths.tolist() == [3, 3, 2, 3, 3, 2]
    assert found.mean == pytest.approx(14 / 6)
    assert (found.percentile(50), found.percentile(95)) == (3, 3)


@pytest.mark.parametrize("wanted", [0.2, 7.9])
def test_means_out_of_reach_are_named(wanted: float) -> None:
    with pytest.raises(UsageError, match=r"only 0\.86 to 2\.00 \(max_patch_length 3\)"):
        find_rule(replace(GLOBAL, max_patch_length=3), [piece([1.0] * 4 + [2.0] * 4)], wanted)


def test_damaged_entropies_are_an_error() -> None:
    with pytest.raises(InputError, match="not finite"):
        find_rule(GLOBAL, [piece([0.0, np.nan, 1.0, 1.0])], 2.0)


def test_halves_need_two_pieces() -> None:
    pieces = random_pieces(0, 5)
    assert halves(pieces) == (pieces[::2], pieces[1::2])
    with pytest.raises(InputError, match="two"):
        halves(pieces[:1])


def test_the_form_of_the_rule() -> None:
    own = PatchRule(threshold=1.0, threshold_add=0.5, max_patch_length=9, reset_newlines=True)
    assert base_rule(own) == own
    assert base_rule(own, "global") == replace(own, threshold_add=None)
    assert base_rule(own, "monotonic") == replace(own, threshold_add=None, monotonic=True)
    assert base_rule(None) == GLOBAL
    assert base_rule(PatchRule("space", max_patch_length=8), "global") == replace(GLOBAL, max_patch_length=8)
    with pytest.raises(UsageError, match="'space', which has no threshold"):
        base_rule(PatchRule("space"))
    with pytest.raises(UsageError, match="--rule local"):
        base_rule(own, "local")


def test_miss() -> None:
    assert relative_error(4.41, 4.5) == pytest.approx(0.02)
    assert relative_error(4.59, 4.5) == pytest.approx(0.02)
    assert relative_error(float("nan"), 4.5) == float("inf")


# --- a real entropy model on text that it has not seen -----------------------------------------------------


@pytest.fixture(scope="module")
def pages(repo: Path) -> list[Piece]:
    """64 KB of English words in pieces of 1 KB, with the entropies of the shipped entropy model."""
    model = load(repo / "configs" / "demo" / "model.pt").entropy
    assert model is not None
    text = bench_text(64 << 10)
    rows = torch.stack([torch.from_numpy(encode(text[at : at + 1024], bos=True)) for at in range(0, len(text), 1024)])
    with torch.inference_mode():
        entropies = [entropy_of(model(part)) for part in rows.split(16)]
    return [Piece(ids.numpy(), e.numpy()) for ids, e in zip(rows, torch.cat(entropies), strict=True)]


@pytest.mark.parametrize("wanted", [2.0, 3.0, 4.5, 6.0])
@pytest.mark.parametrize("name", ["global", "monotonic", "longest 16"])
def test_held_out_text_is_within_two_percent(pages: list[Piece], name: str, wanted: float) -> None:
    rule = (RULES | {"longest 16": replace(GLOBAL, max_patch_length=16)})[name]
    chosen_on, held_out = halves(pages)
    found = find_rule(rule, chosen_on, wanted)
    assert relative_error(mean_patch_size(found, chosen_on), wanted) < 1e-3
    assert relative_error(mean_patch_size(found, held_out), wanted) < 0.02
    assert found.threshold is not None
    other = replace(found, threshold=found.threshold - 0.3)
    assert relative_error(mean_patch_size(other, held_out), wanted) > 0.02  # the assertion above can fail
