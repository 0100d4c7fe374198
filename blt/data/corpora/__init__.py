"""Named corpora: every build gives the same text.

`tiny` is read from the running Python installation, `base` is made of Debian packages (`blt.data.corpora.base`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blt.data.corpora import base, tiny
from blt.data.corpora.text import of_groups, write_texts
from blt.data.prepare import check_target, prepare
from blt.files import scratch
from blt_runtime.errors import UsageError, nearest

NAMES = ("base", "tiny")
__all__ = ["NAMES", "build"]


def build(
    name: str,
    out: str | Path,
    *,
    debs: str | Path | None = None,
    groups: Sequence[str] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Builds a corpus as a data folder and returns its manifest; the options in it name the inputs.

    debs: the folder with the packages of `base`.  groups: shell patterns; only groups that match one are kept.
    Raises UsageError for bad arguments, InputError for packages that are missing or differ from the lock file.
    """
    if name not in NAMES:
        raise UsageError(f"no corpus {name!r}: {nearest(name, NAMES)}")
    if debs is not None and name != "base":
        raise UsageError(f"--debs belongs to the corpus base; {name} needs no packages")
    out = Path(out).resolve()
    check_target(out, force, [])  # before minutes of work
    texts, about = base.texts(debs) if name == "base" else tiny.texts()
    if groups is not None:
        texts, about = of_groups(texts, groups), {**about, "only": list(groups)}
    with scratch(out) as temporary:
        folder = temporary / "text"
        write_texts(folder, texts)
        return prepare([folder], out, group_by="file", force=force, about={"corpus": name, **about})
