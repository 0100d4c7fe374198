"""Byte Latent Transformers: the model, its training and the command line."""

__version__ = "0.1.0"

__all__ = ["__version__"]
