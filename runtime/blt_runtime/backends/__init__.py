"""Backends: what executes the graphs. `protocol` says what one must offer."""
