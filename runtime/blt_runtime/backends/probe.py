"""Inputs for probes of captured calls: a call that replays must compute what it computes uncaptured.

Some graphs replay wrongly without an error. So before a captured call is used, several inputs run captured and
uncaptured, and the results are compared.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..bundle.spec import GraphSpec
from ..hashing import bfloat16_bits, widen
from .protocol import Array, Buffer

PROBES = 3
"""Inputs of a probe: the first call captures, later ones replay."""


def memory_values(spec: GraphSpec, random: np.random.Generator) -> dict[str, Array]:
    """Random contents of a graph's caches, by input."""
    found = {}
    for name in dict.fromkeys(spec.aliases.values()):
        tensor = spec.tensor(name)
        values = random.normal(0, 1, tensor.resolve(B=1)).astype(np.float32)
        found[name] = bfloat16_bits(values) if tensor.dtype == "bfloat16" else values.astype(tensor.dtype)
    return found


def input_values(
    spec: GraphSpec, buffers: Mapping[str, Buffer], number: int, random: np.random.Generator
) -> dict[str, Array]:
    """The inputs of a probe, caches left out. Positions are the last of the cache, so that attention reads all of it.
    Other whole numbers are number + 1, which any index may be. Half values are not set: only graphs make them."""
    last = 0 if spec.cache is None else max(0, spec.cache.capacity - PROBES)
    special = {"positions": last + number, "doc_start": 0}
    memory, found = {*spec.aliases, *spec.aliases.values()}, {}
    for tensor in spec.inputs:
        if tensor.name in memory or tensor.dtype not in ("int64", "float32"):
            continue
        shape = buffers[tensor.name].shape
        if tensor.dtype == "int64":
            found[tensor.name] = np.full(shape, special.get(tensor.name, number + 1), np.int64)
        else:
            found[tensor.name] = random.normal(0, 0.1, shape).astype(np.float32)
    return found


def differ(a: Array, b: Array) -> bool:
    """Whether two results differ by more than the order of additions explains. uint16 is bfloat16."""
    x, y = (widen(array).astype(np.float32) for array in (a, b))
    return not np.abs(x - y).max(initial=0.0) <= 1e-2 * np.abs(x).max(initial=0.0)
