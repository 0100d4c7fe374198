"""Run exported Byte Latent Transformers with numpy and a backend's library, without torch and onnx.

    from blt_runtime import Model

    model = Model.open("bundle")
    stream = model.stream()
    stream.append("Once upon a time")
    for piece in stream.generate(200):
        sys.stdout.buffer.write(piece)

These names are what an application needs. Everything else is imported from its module: errors (`blt_runtime.errors`),
samplers (`.sampling`), drafters (`.speculation.drafters`), text helpers (`.text`), manifests (`.bundle.manifest`).
"""

from .bundle.bundle import Bundle
from .engine.snapshot import Snapshot
from .errors import BltError
from .model import Model
from .options import GenerateOptions
from .patching import PatchRule
from .requests import Request, Token
from .scheduler import Scheduler
from .speculation.drafters import Drafter
from .stream import Score, Stream

__version__ = "0.1.0"

__all__ = [
    "BltError",
    "Bundle",
    "Drafter",
    "GenerateOptions",
    "Model",
    "PatchRule",
    "Request",
    "Scheduler",
    "Score",
    "Snapshot",
    "Stream",
    "Token",
]
