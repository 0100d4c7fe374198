"""Where patches start (spec section 5): vectorised over a whole sequence, and token by token.

Both forms decide the same question, "does token t + 1 start a new patch?", which is known at token t. Patch
0 is always token 0 alone. A sequence of N tokens has patch lengths that sum to N + 1: the last patch
contains one virtual next token, and no graph reads that patch. Entropies, differences and thresholds are
compared in the rule's `entropy_dtype`: float32, or bfloat16 as in facebookresearch/blt's loader (section 4).

Letters: N tokens, P patches. `closes_N[t]`: token t is the last of its patch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from .arguments import is_number, is_whole
from .errors import InputError, RuleError, shown
from .ids import BPE, OFFSET, Ids
from .records import from_dict, to_dict

Scheme = Literal["entropy", "space", "static", "byte", "bpe"]
EntropyDtype = Literal["float32", "bfloat16"]
Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]
LARGEST_FLOAT = float(np.finfo(np.float32).max)
LONGEST_PATCH = 2**31 - 1


@dataclass(frozen=True)
class PatchSettings:
    """The settings that a patch rule and the section `patching` of a training run share. Values are not checked.

    scheme entropy: a patch ends at t when e[t] > threshold (nats); with `monotonic` when e[t] - e[t-1] >
    threshold; with `threshold_add` when e[t] > threshold and e[t] - e[t-1] > threshold_add. `patch_size`
    belongs to static (lengths 1, s, s, ...). `max_patch_length` splits longer patches. `reset_newlines`
    resets the entropy model's context at newlines.
    """

    scheme: Scheme = "entropy"
    threshold: float | None = None
    threshold_add: float | None = None
    monotonic: bool = False
    patch_size: int | None = None
    max_patch_length: int | None = None
    reset_newlines: bool = False


@dataclass(frozen=True)
class PatchRule(PatchSettings):
    """How a model divides text into patches: complete, checked settings. Raises RuleError if they contradict.

    Example:
        rule = PatchRule("entropy", threshold=1.335, max_patch_length=16)

    `entropy_dtype` bfloat16 rounds (to nearest, ties to even) entropies, their differences and the thresholds before
    they are compared. Only the scheme entropy allows it.
    """

    entropy_dtype: EntropyDtype = "float32"

    def __post_init__(self) -> None:
        self._check_types()
        if self.scheme == "entropy" and self.threshold is None:
            raise RuleError("patch scheme 'entropy' needs a threshold in nats")
        if self.scheme == "static" and (self.patch_size is None or self.patch_size < 1):
            raise RuleError("patch scheme 'static' needs patch_size >= 1")
        if self.max_patch_length is not None and self.max_patch_length < 1:
            raise RuleError("max_patch_length must be at least 1")
        if self.entropy_dtype != "float32" and not self.needs_entropy:
            raise RuleError(f"entropy_dtype {self.entropy_dtype} needs the patch scheme 'entropy', not {self.scheme!r}")
        if self.monotonic and self.threshold_add is not None:
            raise RuleError("choose monotonic (difference) or threshold_add (level and difference), not both")

    def _check_types(self) -> None:
        """Raises RuleError for a value of a wrong type. Numbers of numpy become Python's, which manifests can hold."""
        if not isinstance(self.scheme, str) or self.scheme not in get_args(Scheme):
            raise RuleError(f"patch scheme {shown(self.scheme)} is unknown; known: {', '.join(get_args(Scheme))}")
        for name in ("threshold", "threshold_add"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and abs(value) <= LARGEST_FLOAT):
                raise RuleError(f"{name} must be a finite number of nats in float32, not {shown(value)}")
        for name in ("patch_size", "max_patch_length"):
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and abs(int(value)) <= LONGEST_PATCH):
                raise RuleError(f"{name} must be a whole number up to {LONGEST_PATCH}, not {shown(value)}")
        for name in ("monotonic", "reset_newlines"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise RuleError(f"{name} must be True or False, not {shown(getattr(self, name))}")
        if not isinstance(self.entropy_dtype, str) or self.entropy_dtype not in get_args(EntropyDtype):
            raise RuleError(f"entropy_dtype must be 'float32' or 'bfloat16', not {shown(self.entropy_dtype)}")
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), np.generic):
                object.__setattr__(self, field.name, value.item())

    @property
    def needs_entropy(self) -> bool:
        return self.scheme == "entropy"

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises ConfigError for an unknown key (names the nearest) or a value of the wrong type."""
        return from_dict(cls, data, "patch rule")


def to_bfloat16(values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """float32 values rounded to the nearest bfloat16, ties to even; as float32."""
    exact = np.asarray(values, dtype=np.float32)
    bits = exact.view(np.uint32)
    # The array is added last: for two scalars numpy would warn that a NaN's bits overflow.
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(exact), exact, rounded.view(np.float32))


def _to_float32(values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)


def _rounding(rule: PatchRule) -> Callable[[npt.ArrayLike], npt.NDArray[np.float32]]:
    """The function that rounds to the type in which the rule compares."""
    return to_bfloat16 if rule.entropy_dtype == "bfloat16" else _to_float32


def patch_lengths(
    rule: PatchRule,
    ids: npt.ArrayLike,
    entropies: npt.ArrayLike | None = None,
    include_next_token: bool = True,
) -> Ids:
    """Patch lengths [P] int64 of ids [N] and their entropies [N] in nats; they sum to N + 1.

    Without the virtual next token they sum to N, and the last entropy is not used.
    """
    ids_N = np.asarray(ids, dtype=np.int64).reshape(-1)
    total = len(ids_N) + include_next_token
    if total == 0:
        return np.zeros(0, dtype=np.int64)
    closes_N = _closes(rule, ids_N, _check(rule, ids_N, entropies))
    if rule.scheme == "bpe":
        closes_N[1:][len(ids_N) - 2 :] = False  # section 5: a delimiter at the end closes no patch yet
    lengths_P = lengths_from_closes(closes_N[: total - 1], total)
    return lengths_P if rule.max_patch_length is None else _split_long(lengths_P, rule.max_patch_length)


def lengths_from_closes(closes: Bools, total: int) -> Ids:
    """Lengths [P] of `total` tokens when a patch ends at every True entry of closes [total - 1]."""
    edges = np.concatenate([[0], np.flatnonzero(closes) + 1, [total]])
    return np.diff(edges).astype(np.int64)


def closes_from_lengths(lengths: npt.ArrayLike) -> Bools:
    """The inverse: closes [N] of patch lengths [P] that sum to N + 1."""
    lengths_P = np.asarray(lengths, dtype=np.int64)
    closes_N = np.zeros(int(lengths_P.sum()) - 1, dtype=np.bool_)
    closes_N[np.cumsum(lengths_P)[:-1] - 1] = True
    return closes_N


def checked_closes(lengths: npt.ArrayLike, n_ids: int) -> Bools:
    """`closes_from_lengths` for a caller's lengths of `n_ids` ids. Raises InputError if they do not fit."""
    try:
        given_P = np.asarray(lengths).reshape(-1)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # ragged lists, tensors of other devices
        raise InputError("patch lengths must be whole numbers of at least 1") from error
    if given_P.size == 0 or given_P.dtype.kind not in "iu":
        raise InputError("patch lengths must be whole numbers of at least 1")
    lengths_P = np.trim_zeros(given_P, "b")  # facebookresearch/blt pads with zeros
    if lengths_P.size == 0 or lengths_P.min() < 1:
        raise InputError("patch lengths must be whole numbers of at least 1")
    if lengths_P.max() > n_ids + 1 or lengths_P.sum() != n_ids + 1 or lengths_P[0] != 1:
        raise InputError(f"patch lengths must begin with 1 and sum to {n_ids + 1} (the ids and one next token)")
    return closes_from_lengths(lengths_P)


def _check(rule: PatchRule, ids_N: Ids, entropies: npt.ArrayLike | None) -> Floats:
    if not rule.needs_entropy:
        return np.zeros(len(ids_N), dtype=np.float32)
    if entropies is None:
        raise RuleError("patch scheme 'entropy' needs the entropies of the ids")
    entropies_N = np.asarray(entropies).reshape(-1).astype(np.float32)
    if len(entropies_N) != len(ids_N):
        raise RuleError(f"{len(ids_N)} ids but {len(entropies_N)} entropies")
    return entropies_N


def _closes(rule: PatchRule, ids_N: Ids, entropies_N: Floats) -> Bools:
    """Places where the scheme ends a patch, before max_patch_length."""
    closes_N = _SCHEMES[rule.scheme](rule, ids_N, entropies_N)
    closes_N[:1] = True  # token 0 is a patch alone
    return closes_N


def _entropy_closes(rule: PatchRule, ids_N: Ids, entropies_N: Floats) -> Bools:
    assert rule.threshold is not None
    rounded = _rounding(rule)
    entropies_N = rounded(entropies_N)
    closes_N = entropies_N > rounded(rule.threshold)
    if not rule.monotonic and rule.threshold_add is None:
        return closes_N
    rises_N = rounded(np.diff(entropies_N, prepend=entropies_N[:1]))
    if rule.monotonic:
        closes_N = rises_N > rounded(rule.threshold)
    else:
        assert rule.threshold_add is not None
        closes_N &= rises_N > rounded(rule.threshold_add)
        closes_N[2:3] = False  # facebookresearch/blt never starts a patch at 3 (spec section 5)
    closes_N[1:2] = True  # and always starts one at 2
    return closes_N


def _space_closes(rule: PatchRule, ids_N: Ids, entropies_N: Floats) -> Bools:
    spacelike_N = SPACELIKE[ids_N]
    closes_N: Bools = spacelike_N.copy()
    closes_N[1:] &= ~spacelike_N[:-1]
    closes_N |= ids_N < OFFSET
    return closes_N


def _static_closes(rule: PatchRule, ids_N: Ids, entropies_N: Floats) -> Bools:
    assert rule.patch_size is not None
    return np.asarray(np.arange(len(ids_N)) % rule.patch_size == 0)


def _byte_closes(rule: PatchRule, ids_N: Ids, entropies_N: Floats) -> Bools:
    return np.ones(len(ids_N), dtype=np.bool_)


def _bpe_closes(rule: PatchRule, ids_N: Ids, entropies_N: Floats) -> Bools:
    return np.asarray(ids_N == BPE)


_SCHEMES = {
    "entropy": _entropy_closes,
    "space": _space_closes,
    "static": _static_closes,
    "byte": _byte_closes,
    "bpe": _bpe_closes,
}


def _spacelike() -> Bools:
    """Per id: not an ASCII letter or digit and not a UTF-8 continuation byte; special ids count as such."""
    byte = np.arange(256)
    word = ((byte >= 48) & (byte <= 57)) | ((byte >= 65) & (byte <= 90)) | ((byte >= 97) & (byte <= 122))
    continuation = (byte >= 0x80) & (byte <= 0xBF)
    return np.concatenate([np.ones(OFFSET, dtype=np.bool_), ~(word | continuation)])


SPACELIKE = _spacelike()


def _split_long(lengths_P: Ids, longest: int) -> Ids:
    """Every length > longest becomes longest, longest, ..., rest."""
    parts_P = -(-lengths_P // longest)
    split = np.full(int(parts_P.sum()), longest, dtype=np.int64)
    split[np.cumsum(parts_P) - 1] = lengths_P - (parts_P - 1) * longest
    return split


class PatchState:
    """The same rules one token at a time. `copy()` saves a state to roll back to."""

    def __init__(self, rule: PatchRule) -> None:
        self.rule = rule
        self.position = 0
        """Tokens read."""
        self.open = 0
        """Tokens of the open patch."""
        self._previous_entropy = 0.0
        self._previous_spacelike = True
        self._rounded = _rounding(rule)
        self._in_float32 = rule.entropy_dtype == "float32"
        self._limit = np.float32(self._rounded(0.0 if rule.threshold is None else rule.threshold))
        self._rise = np.float32(self._rounded(0.0 if rule.threshold_add is None else rule.threshold_add))

    def copy(self) -> PatchState:
        return copy.copy(self)

    def closes(self, id: int, entropy: float) -> bool:
        """Reads the next token and its entropy (nats; for the scheme entropy). True if its patch ends there."""
        closes = self._scheme_closes(id, entropy) or self.position == 0
        self.position += 1
        self.open += 1
        if self.rule.max_patch_length is not None and self.open >= self.rule.max_patch_length:
            closes = True
        if closes:
            self.open = 0
        return closes

    def _scheme_closes(self, id: int, entropy: float) -> bool:
        scheme = self.rule.scheme
        if scheme == "entropy":
            return self._entropy_closes(entropy)
        if scheme == "space":
            before, self._previous_spacelike = self._previous_spacelike, bool(SPACELIKE[id])
            return id < OFFSET or (self._previous_spacelike and not before)
        if scheme == "static":
            assert self.rule.patch_size is not None
            return self.position % self.rule.patch_size == 0
        return scheme == "byte" or id == BPE

    def _entropy_closes(self, entropy: float) -> bool:
        rule = self.rule
        if not self._in_float32:
            entropy = float(self._rounded(entropy))
        if not rule.monotonic and rule.threshold_add is None:
            return bool(entropy > self._limit)
        rise = np.float32(entropy) - np.float32(self._previous_entropy)
        if not self._in_float32:
            rise = np.float32(self._rounded(rise))
        self._previous_entropy = entropy
        if self.position == 1:
            return True
        if rule.monotonic:
            return bool(rise > self._limit)
        return self.position > 2 and bool(entropy > self._limit) and bool(rise > self._rise)
