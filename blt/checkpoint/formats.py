"""Checkpoint formats, one module each: `matches(path)`, `read(path) -> Source`, and for two of them `write`."""

from blt.adapters import huggingface, native, reference

ADAPTERS = (native, reference, huggingface)
"""In the order in which a path is offered to them."""
