"""The entropies of several documents from one pass, document by document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blt.data.entropies import Float, Ids, make_pass
from blt.model import EntropyModel


def document_entropies(
    model: EntropyModel, documents: Sequence[Ids], reset_newlines: bool = False, compile: bool = False
) -> list[Float]:
    """Next-byte entropies in nats of each document's tokens (BOS ... EOS), float32 [length] each.

    Each document must end with an EOS; or the next document would attend to it.
    """
    if not documents:
        return []
    ids_N = np.concatenate(documents)
    found = np.concatenate(list(make_pass(model, len(ids_N), reset_newlines, compile).run(ids_N)))
    return np.split(found, np.cumsum([len(ids) for ids in documents])[:-1])
