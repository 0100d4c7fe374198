"""What a command left (its exit code and what it wrote), commands without PyTorch, a small training configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PATHS = ":".join(str(Path(__file__).resolve().parents[2] / part) for part in ("", "export", "runtime"))
"""PYTHONPATH of a fresh interpreter."""
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from blt.cli import run; sys.exit(run(sys.argv[1:]))"
"""The command line where PyTorch is not installed: `python -c WITHOUT_TORCH COMMAND ...`."""


@dataclass(frozen=True)
class Result:
    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()


CONFIG = """
kind: entropy
model: {dim: 16, n_layers: 1, n_heads: 2, ffn_dim: 32, window: 32, max_seqlen: 128}
batch: {rows: 2, byte_buckets: [32]}
schedule: {steps: 3, warmup: 1}
run: {compile: false, log_every: 1, valid_every: 100, checkpoint_every: 100}
"""
