"""Choosing the next id from logits: greedy, or a draw from a trimmed distribution (float64 inside)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import number, whole

Array = npt.NDArray[Any]


class Sampler:
    """Chooses ids from logits [V].

    temperature 0 is argmax (the lowest id wins ties). Otherwise the logits are divided by the temperature and trimmed
    in this order: the `top_k` most likely ids; the smallest set of most likely ids whose probabilities sum to `top_p`;
    ids with at least `min_p` times the probability of the most likely. `seed` makes the draws repeatable; None uses
    fresh entropy. Raises UsageError for a value out of range.
    """

    def __init__(
        self,
        temperature: float,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        check_sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        self.temperature, self.top_p, self.min_p = float(temperature), top_p, min_p
        self.top_k = None if top_k is None else int(top_k)
        self._random = generator(seed)

    def __call__(self, logits_V: Array) -> int:
        """The next id."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        order_V, mass_V = self.candidates(logits_V)
        total_V = np.cumsum(mass_V)
        drawn = np.searchsorted(total_V, self._random.random() * total_V[-1], side="right")
        return int(order_V[min(int(drawn), len(order_V) - 1)])

    def forced(self) -> Sequence[int]:
        """Ids that must follow the one just chosen: a subclass may know them. They count as chosen."""
        return ()

    def copy(self) -> Sampler:
        """A sampler that will draw the same random numbers, and does not advance this one."""
        made = copy.copy(self)
        made._random = copy.deepcopy(self._random)
        return made

    def follow(self, ids_N: Array, forgotten: int = 0) -> None:
        """Before this sampler continues in a stream: the ids [N] that are there since it began, without the first
        `forgotten` that the stream no longer holds. A subclass that remembers its choices follows a rewind."""

    def skip(self) -> None:
        """Discards the random number of one id."""
        if self.temperature > 0:
            self._random.random()

    def candidates(self, logits_V: Array) -> tuple[Array, Array]:
        """The ids that remain after trimming, most likely first, and their probabilities (not renormalised)."""
        scaled_V = logits_V.astype(np.float64) / max(self.temperature, 1e-6)
        order_V = np.argsort(-scaled_V, kind="stable")[: self.top_k]
        mass_V = np.exp(scaled_V[order_V] - scaled_V[order_V[0]])
        mass_V /= mass_V.sum()
        keep = len(order_V)
        if self.top_p is not None:
            keep = min(keep, int(np.searchsorted(np.cumsum(mass_V), self.top_p)) + 1)
        if self.min_p is not None:
            keep = min(keep, int((mass_V >= self.min_p * mass_V[0]).sum()))
        return order_V[:keep], mass_V[:keep]

    def draft(self, logits_V: Array) -> tuple[int, Array]:
        """An id drawn from a drafter's logits, and its distribution [V], for `verify`."""
        q_V = self.probabilities(logits_V)
        return self._draw(q_V), q_V

    def verify(self, logits_V: Array, id: int, q_V: Array) -> int:
        """`id` if it is accepted, else another id: the result is distributed exactly as `self(logits_V)` is.

        `id` was drawn from q [V]. It is accepted with probability min(1, p/q), and else replaced by a draw from
        max(0, p - q) (Leviathan et al. 2023, arXiv 2211.17192, appendix A.1).
        """
        p_V = self.probabilities(logits_V)
        if self._random.random() * q_V[id] < p_V[id]:
            return id
        rest_V = np.maximum(p_V - q_V, 0.0)
        return self._draw(rest_V if rest_V.any() else p_V)

    def probabilities(self, logits_V: Array) -> Array:
        """The distribution of `self(logits_V)`: [V] float64, sum 1; one-hot at temperature 0."""
        p_V = np.zeros(len(logits_V))
        if self.temperature == 0:
            p_V[int(logits_V.argmax())] = 1.0
            return p_V
        order_V, mass_V = self.candidates(logits_V)
        p_V[order_V] = mass_V / mass_V.sum()
        return p_V

    def _draw(self, mass_V: Array) -> int:
        total_V = np.cumsum(mass_V)
        drawn = int(np.searchsorted(total_V, self._random.random() * total_V[-1], side="right"))
        return min(drawn, int(np.flatnonzero(mass_V)[-1]))


def check_sampling(
    temperature: float,
    *,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int | np.random.Generator | None,
) -> None:
    """Raises UsageError for a value of the wrong type or out of range."""
    number("temperature", temperature, lambda value: value >= 0, "a number from 0 up")
    if top_k is not None:
        whole("top_k", top_k, 1)
    if top_p is not None:
        number("top_p", top_p, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
    if min_p is not None:
        number("min_p", min_p, lambda value: 0 <= value <= 1, "a number between 0 and 1")
    _check_seed(seed)


def generator(seed: int | np.random.Generator | None) -> np.random.Generator:
    """The generator of a seed; None uses fresh entropy. Raises UsageError."""
    _check_seed(seed)
    return np.random.default_rng(seed)


def _check_seed(seed: int | np.random.Generator | None) -> None:
    if seed is not None and not isinstance(seed, np.random.Generator):
        whole("seed", seed, wanted="a whole number from 0 up")
