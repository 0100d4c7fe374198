"""Run exported Byte Latent Transformers: numpy and a backend's library, no torch, no onnx.

from blt_runtime import Model
model = Model.open("bundle")
stream = model.stream()
stream.append("Once upon a time")
for piece in stream.generate(200): sys.stdout.buffer.write(piece)
"""

from .bundle.bundle import Bundle
from .bundle.manifest import Manifest
from .bundle.spec import ModelSpec
from .engine.snapshot import Snapshot
from .errors import BltError
from .model import Model
from .options import GenerateOptions
from .patching import PatchRule, PatchState, patch_lengths
from .sampling import Sampler
from .scheduler import Request, Scheduler
from .speculation.drafters import DecoderDrafter, Drafter, EntropyDrafter, FirstOf, LookupDrafter
from .speculation.speculate import SpeculationStats
from .stream import Score, Stream
from .text import StopMatcher, Utf8Stream

__all__ = [
    "BltError",
    "Bundle",
    "DecoderDrafter",
    "Drafter",
    "EntropyDrafter",
    "FirstOf",
    "GenerateOptions",
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
