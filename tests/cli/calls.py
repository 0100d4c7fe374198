"""What a command left: its exit code and what it wrote."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()
