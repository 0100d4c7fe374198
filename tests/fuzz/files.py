"""Mutated files of every kind: each is read, or refused with one typed line, quickly and within bounds of memory.

    python -m tests.fuzz.files --inputs 20000              the long form: every kind, in worker processes
    python -m tests.fuzz.files --kinds gguf --first 1234 --inputs 1    one input again

It prints the inputs tried, hangs, the peak of memory and every error that is none of this project's, and ends with exit
code 1 if there is one of them. A number gives the same input on every machine.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from blt_runtime.errors import LONGEST_MESSAGE, BltError
from tests.fuzz.kinds import KINDS

HANG_S = 10.0
SLOW_S = 1.0
MEMORY_MB = 500
ADDRESS_SPACE = 6 << 30
"""Bytes that a worker may map beyond those at its start: a claim of more is a MemoryError, and the machine survives."""


@dataclass
class Outcome:
    """One input. `problem` is empty if it was read, or refused with a typed line."""

    kind: str
    number: int
    refused: bool = False
    problem: str = ""
    seconds: float = 0.0
    memory_mb: float = 0.0


def attempt(kind: str, number: int, seeds: Path, work: Path) -> Outcome:
    """Makes the input `number` of a kind in the folder `work`, and reads it."""
    rng, outcome = random.Random(f"{kind} {number}"), Outcome(kind, number)
    if not (seeds / kind).exists():
        (seeds / kind).mkdir()
        KINDS[kind].seed(seeds / kind)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(seeds / kind, work / "in")
    KINDS[kind].change(rng, work / "in")
    before, start = _reset_peak(), time.thread_time()
    try:
        KINDS[kind].read(work / "in", work / "out")
    except BltError as error:
        outcome.refused = True
        message = str(error)
        if not message.isprintable() and any(c != " " and not c.isprintable() and ord(c) < 0xA0 for c in message):
            outcome.problem = "a control character in a message"
        if len(message) > LONGEST_MESSAGE + 100:
            outcome.problem = f"a message of {len(message)} characters"
        if (work / "out").exists():
            outcome.problem = "an output is left by a refused input"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if "/blt" in f.filename), frame)
        place = f"{Path(where.filename).name}:{where.lineno}"
        outcome.problem = f"{type(error).__name__} at {place}: {str(error)[:120]!r}"
    outcome.seconds, outcome.memory_mb = time.thread_time() - start, _peak() - before
    if not outcome.problem and outcome.seconds > SLOW_S:
        outcome.problem = f"{outcome.seconds:.1f} s of CPU"
    if not outcome.problem and outcome.memory_mb > MEMORY_MB:
        outcome.problem = f"{outcome.memory_mb:.0f} MB"
    return outcome


def _status(key: str) -> float:
    """A size of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _reset_peak() -> float:
    """Begins a new peak, and returns the memory in use, in MB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def _peak() -> float:
    return _status("VmHWM")


def quiet() -> None:
    """No warnings and no log lines, and one thread: as many inputs as cores are tried at a time."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


# --- workers -------------------------------------------------------------------------------------------------------


def _work(pipe: Connection, seeds: Path, work: Path) -> None:
    quiet()
    limit = int(_status("VmSize") * 1024 * 1024) + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        kind, number = pipe.recv()
        pipe.send(attempt(kind, number, seeds, work))


@dataclass
class Worker:
    """A process that tries one input after another, and is replaced after one that hangs or kills it."""

    folder: Path
    _pipe: Connection | None = field(default=None, init=False)
    _process: multiprocessing.process.BaseProcess | None = field(default=None, init=False)

    def attempt(self, kind: str, number: int) -> Outcome:
        if self._process is None:
            fork = multiprocessing.get_context("fork")
            self._pipe, end = fork.Pipe()
            folders = (self.folder / "seeds", self.folder / "work")
            self._process = fork.Process(target=_work, args=(end, *folders), daemon=True)
            self._process.start()
            end.close()
        assert self._pipe is not None
        self._pipe.send((kind, number))
        try:
            if self._pipe.poll(HANG_S):
                outcome: Outcome = self._pipe.recv()
                return outcome
            problem = f"hangs: more than {HANG_S:g} s"
        except (EOFError, OSError):
            problem = "kills the process"
        self.close()
        return Outcome(kind, number, problem=problem, seconds=HANG_S)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.files")
    parser.add_argument("--inputs", type=int, default=20_000, help="inputs of all kinds together")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--kinds", default=",".join(KINDS), help="the kinds, with commas between them")
    options = parser.parse_args(arguments)
    kinds = options.kinds.split(",")
    quiet()
    found, counts, refused, peak, started = [], Counter[str](), 0, 0.0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="blt-fuzz-") as name:
        folder = Path(name)
        (folder / "seeds").mkdir()
        for kind in kinds:  # in this process: workers inherit the folders and the imported libraries
            (folder / "seeds" / kind).mkdir()
            KINDS[kind].seed(folder / "seeds" / kind)
        worker = Worker(folder)
        for i in range(options.inputs):
            outcome = worker.attempt(kinds[i % len(kinds)], options.first + i // len(kinds))
            counts[outcome.kind] += 1
            refused += outcome.refused
            peak = max(peak, outcome.memory_mb)
            if outcome.problem:
                found.append(outcome)
                print(f"{outcome.kind} {outcome.number}: {outcome.problem}", flush=True)
        worker.close()
    hangs = sum("hangs" in o.problem or "of CPU" in o.problem for o in found)
    foreign = sum(" at " in o.problem or "kills" in o.problem for o in found)
    others = len(found) - hangs - foreign
    print(f"inputs {sum(counts.values()):,} ({refused:,} refused) in {time.monotonic() - started:.0f} s")
    print(f"hangs {hangs}, peak memory {peak:.0f} MB, foreign errors {foreign}, other problems {others}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
