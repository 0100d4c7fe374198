"""Training of entropy models and of BLTs: one loop, exact resume, one compiled step per batch shape."""

from blt.train.dryrun import dry_run
from blt.train.loop import Terminated, Trainer
from blt.train.run import train

__all__ = ["Terminated", "Trainer", "dry_run", "train"]
