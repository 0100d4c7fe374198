"""Quantization of weights and hash tables."""
