"""The engine: caches, memory, and the four graphs over the bytes of one stream or of a batch."""
