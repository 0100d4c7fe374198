"""Short texts for BPE vocabularies."""

from __future__ import annotations

TEXTS = [b"the cat sat on the mat, and the cat saw the other cat 1234567", "ähnlich, älter, ähnlich".encode()] * 3
