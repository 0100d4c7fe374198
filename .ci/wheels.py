"""Checks what the two wheels hold: python .ci/wheels.py DIST"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

CONTENTS = {"blt_runtime": {"blt_runtime"}, "blt_lm": {"blt", "blt_export"}}


def main(dist: Path) -> None:
    for name, packages in CONTENTS.items():
        (wheel,) = dist.glob(f"{name}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            files = archive.namelist()
            (info,) = {file.split("/")[0] for file in files if ".dist-info/" in file}
            metadata = archive.read(f"{info}/METADATA").decode()
        assert {file.split("/")[0] for file in files} == packages | {info}, f"{wheel.name} holds other packages"
        assert f"{info}/licenses/LICENSE" in files, f"{wheel.name} has no licence"
        assert all(f"{package}/py.typed" in files for package in packages), f"{wheel.name} is not typed"
        readme = metadata.partition("\n\n")[2]
        assert readme.startswith("# "), f"{wheel.name} has no README"
        print(wheel.name, f"{len(files)} files, {wheel.stat().st_size:,} bytes")


main(Path(sys.argv[1]))
