"""Cached equals uncached, alone equals together: a bench that checks it for one checkpoint over mixed text.

`check` runs streams in every way a caller may (text cut anywhere, EOS anywhere, rewound, reset, several streams of one
model in turn, patch rules that make one patch of a row or one of each byte) and compares every entropy, boundary and
vector of logits that they compute with whole rows recomputed by the training form, which has no caches. Rows of the
slow `blt.generate.reference` hold the training form itself to account.

text: rows of mixed text.  truth: the uncached side.  watch: what a stream computed.  scripts: what is done to
streams.  judge: the comparison.  bench: all of it in order.
"""

from __future__ import annotations

from blt.evaluate.cache_check.bench import check
from blt.evaluate.cache_check.judge import TOLERANCE, Line, Report

__all__ = ["TOLERANCE", "Line", "Report", "check"]
