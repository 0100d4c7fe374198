"""Documents whose token ids encode the document and the position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from blt.data.batches import never

STRIDE = 1000  # a token id is document * STRIDE + position


@dataclass
class Numbered:
    """Documents whose token ids encode document and position, with random bytes per token and random patches."""

    sizes: list[int]
    prompts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        random = np.random.default_rng(len(self.sizes))
        self.lengths = np.array(self.sizes, np.int64)
        self.prompt_lengths = np.minimum([*self.prompts, *[0] * len(self.sizes)][: len(self.sizes)], self.lengths)
        self.token_bytes = random.integers(1, 5, STRIDE * len(self.sizes))
        self.token_bytes[[self.ids(i)[[0, -1]] for i in range(len(self.sizes))]] = 0
        self.patches = [random.random(n + 2) < 0.4 for n in self.sizes]
        for starts in self.patches:
            starts[:2] = True

    def __len__(self) -> int:
        return len(self.sizes)

    def ids(self, index: int) -> np.ndarray:
        return index * STRIDE + np.arange(self.sizes[index] + 2, dtype=np.int32)

    def read(self, documents: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        pieces = zip(documents, begin, end, strict=True)
        return np.concatenate([self.ids(int(document))[first:last] for document, first, last in pieces])

    def boundaries(self, members: np.ndarray) -> np.ndarray:
        return np.flatnonzero(np.concatenate([self.starts(int(document)) for document in members]))

    def starts(self, document: int) -> np.ndarray:
        return self.patches[document]

    def compute(self, members: np.ndarray, stopped: Callable[[], bool] = never) -> None:
        """The patches exist already."""

    def computed(self, members: np.ndarray) -> bool:
        return True

    @property
    def counted(self) -> np.ndarray:
        """Ids of the tokens after BOS and the prompt."""
        return np.concatenate([self.ids(i)[1 + prompt :] for i, prompt in enumerate(self.prompt_lengths)])
