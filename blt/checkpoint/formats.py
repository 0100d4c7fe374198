"""Checkpoint formats, one module each: `matches(path)`, `read(path) -> Source`, and for two of them `write`."""

from blt.checkpoint import facebook, huggingface, native

ADAPTERS = (native, facebook, huggingface)
"""In the order in which a path is offered to them."""
