"""What the commands that generate share: text on stdout as it comes, and the numbers of `--stats`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blt.cli import console

if TYPE_CHECKING:
    from blt_runtime import Stream


@dataclass
class Timing:
    """When each piece was generated, in seconds since `started`, which is before the prompt is read."""

    prompt_bytes: int
    started: float = field(default_factory=time.perf_counter)
    first_byte: float | None = None
    last_byte: float = 0.0
    n_bytes: int = 0

    def timed(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yields `pieces` and records their times."""
        for piece in pieces:
            self.last_byte = time.perf_counter() - self.started
            if piece and self.first_byte is None:
                self.first_byte = self.last_byte
            self.n_bytes += len(piece)
            yield piece

    def summary(self, stream: Stream) -> dict[str, Any]:
        """Numbers of `--stats` and `--json`. Bytes per second leave out the first byte, and with it the prompt."""
        first = self.first_byte if self.first_byte is not None else self.last_byte
        spent = self.last_byte - first
        lengths = [int(n) for n in stream.patch_lengths]
        lengths[-1] -= 1  # the next token, which is not generated yet
        lengths = [n for n in lengths[1:] if n > 0]  # the first patch is BOS alone
        return {
            "prompt_bytes": self.prompt_bytes,
            "new_bytes": self.n_bytes,
            "seconds": round(self.last_byte, 6),
            "time_to_first_byte_s": round(first, 6),
            "bytes_per_s": round((self.n_bytes - 1) / spent, 2) if spent > 0 and self.n_bytes > 1 else None,
            "mean_patch_bytes": round(sum(lengths) / len(lengths), 3) if lengths else None,
            "forgotten_bytes": stream.forgotten,
            "bytes_per_pass": round(stream.speculation.tokens_per_pass, 3) if stream.speculation.passes else None,
        }


def stats_line(stats: dict[str, Any]) -> str:
    """`Timing.summary` as a line."""
    speed, patch, per_pass = stats["bytes_per_s"], stats["mean_patch_bytes"], stats["bytes_per_pass"]
    parts = [f"{stats['new_bytes']:,} bytes in {stats['seconds']:.2f} s"]
    parts += [f"{speed:,.0f} bytes/s"] if speed is not None else []
    parts += [f"time to first byte {1000 * stats['time_to_first_byte_s']:,.0f} ms"]
    parts += [f"mean patch {patch:.2f} bytes"] if patch is not None else []
    parts += [f"{per_pass:.2f} bytes per decoder pass"] if per_pass is not None else []
    parts += [f"forgot the oldest {stats['forgotten_bytes']:,} bytes"] if stats["forgotten_bytes"] else []
    return ", ".join(parts)


def write_bytes(data: bytes) -> None:
    """Writes to stdout at once."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def write_text(pieces: Iterable[bytes]) -> None:
    """Writes generated text to stdout as its characters become complete.

    A model may write anything, so a terminal gets it as `console.plain` writes it: it obeys no escape sequence.
    """
    on_terminal = sys.stdout.isatty()
    for text in texts(pieces):
        write_bytes((console.plain(text) if on_terminal else text).encode())


def texts(pieces: Iterable[bytes]) -> Iterator[str]:
    """Complete characters; what is no UTF-8 becomes U+FFFD."""
    from blt_runtime.text import Utf8Stream

    decoder = Utf8Stream()
    for piece in pieces:
        if text := decoder.feed(piece):
            yield text
    if tail := decoder.flush():
        yield tail
