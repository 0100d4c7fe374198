"""Speculative decoding: drafters, verification, and the choice between drafters."""
