"""The work of `blt check`: compare cached streams with whole rows, for one checkpoint, over mixed text.

`check` runs streams in every way that the public interface allows: text cut anywhere, EOS anywhere, rewinds, resets,
interleaved streams of one model, and patch rules that make one patch of a row or one of each byte. It compares every
entropy, boundary and vector of logits that the streams compute with whole rows. The training form, which has no caches,
computes those rows. The slow `blt.generate.reference` checks the training form on a few short rows.

    text        rows of mixed text
    uncached    the reference: whole rows without caches
    cases       which rows are checked, under which patch rules
    scripts     what is done to a stream on its way through a row
    recorder    records what a stream computes
    candidates  a model's streams, used in all these ways
    comparison  candidate against reference
    report      the lines that `blt check` prints
    check       all of it in order
"""

from __future__ import annotations

from blt.evaluate.cache_check.check import check
from blt.evaluate.cache_check.report import TOLERANCE, Line, Report

__all__ = ["TOLERANCE", "Line", "Report", "check"]
