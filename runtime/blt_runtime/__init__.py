"""Run exported Byte Latent Transformers: numpy and a backend's library, no torch, no onnx.

from blt_runtime import Model
model = Model.open("bundle")
stream = model.stream()
stream.append("Once upon a time")
for piece in stream.generate(200): sys.stdout.buffer.write(piece)
"""

from .bundle import Bundle
from .drafters import DecoderDrafter, Drafter, EntropyDrafter, FirstOf, LookupDrafter
from .errors import BltError
from .manifest import Manifest
from .model import Model
from .patching import PatchRule, PatchState, patch_lengths
from .sampling import Sampler
from .scheduler import Request, Scheduler
from .snapshot import Snapshot
from .spec import ModelSpec
from .speculate import SpeculationStats
from .stream import Score, Stream
from .text import StopMatcher, Utf8Stream

__all__ = [
    "BltError",
    "Bundle",
    "DecoderDrafter",
    "Drafter",
    "EntropyDrafter",
    "FirstOf",
    "LookupDrafter",
    "Manifest",
    "Model",
    "ModelSpec",
    "PatchRule",
    "PatchState",
    "Request",
    "Sampler",
    "Scheduler",
    "Score",
    "Snapshot",
    "SpeculationStats",
    "StopMatcher",
    "Stream",
    "Utf8Stream",
    "patch_lengths",
]
