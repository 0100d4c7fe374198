"""The model: configurations, the modules over whole rows, and the same modules as incremental steps."""

from blt.model.blt import BLT
from blt.model.config import BLTConfig, EntropyConfig, HashConfig, TransformerConfig
from blt.model.entropy import EntropyModel, entropy_of

__all__ = [
    "BLT",
    "BLTConfig",
    "EntropyConfig",
    "EntropyModel",
    "HashConfig",
    "TransformerConfig",
    "entropy_of",
]
