"""Amounts, counts and times as text, in one style for all log lines."""

from __future__ import annotations


def amount(n_bytes: float) -> str:
    """`812 B`, `61.5 kB`, `1.25 MB`, `11.1 GB`: powers of 1,000, three digits."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if n_bytes >= 0.9995 * 10**power:
            value = n_bytes / 10**power
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:,.{digits}f} {unit}"
    return f"{n_bytes:.0f} B"


def count(n: float) -> str:
    """`812`, `61.5 k`, `7.62 M`, `1.05 G`: of parameters or FLOPs."""
    return amount(n).removesuffix("B").rstrip()


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
