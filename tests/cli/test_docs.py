"""README.md and docs/cli.md: their commands, options, make targets, links and configurations exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]
REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text()
CLI = (REPO / "docs" / "cli.md").read_text()
GROUPS = ("data", "train", "bench")

COMMANDS = re.findall(r"^blt .*$", README, re.MULTILINE) + re.findall(r"^\| `(blt .*?)`", CLI, re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_documented_command_exists_with_its_options(blt: Call, line: str) -> None:
    words = shlex.split(re.sub(r"\\\||[\[\]]", " ", line))[1:]
    name = words[: 2 if words[0] in GROUPS else 1]
    shown = blt(*name, "-h")
    assert shown.code == 0, shown.err
    for option in (word for word in words if word.startswith("-") and word != "-"):
        assert re.search(rf"{re.escape(option)}\b", shown.text), f"{option} of {line}"


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 12


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)`", README)) <= targets
    assert {"demo", "test", "check", "format"} <= targets


def test_extras_of_installations_exist() -> None:
    """In every page and example: `blt-lm[cpu]` and `.[cpu]`, `blt-runtime[cpu]` and `./runtime[cpu]`."""
    extras = {
        name: set(tomllib.loads((REPO / folder / "pyproject.toml").read_text())["project"]["optional-dependencies"])
        for name, folder in (("blt-lm", "."), (".", "."), ("blt-runtime", "runtime"), ("./runtime", "runtime"))
    }
    files = [
        file for folder in ("", "docs/", "export/", "runtime/", "runtime/examples/") for file in REPO.glob(f"{folder}*")
    ]
    pages = [file for file in files if file.suffix in (".md", ".py", ".ipynb")]
    found = [
        (name, extra)
        for page in pages
        for name, listed in re.findall(r"(blt-lm|blt-runtime|\./runtime|(?<=')\.)\[([\w,-]+)\]", page.read_text())
        for extra in listed.split(",")
    ]
    assert {name for name, _ in found} == set(extras)
    assert [(name, extra) for name, extra in found if extra not in extras[name]] == []


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{p.name}" for p in (REPO / "docs").glob("*.md"))])
def test_links_lead_to_files(page: str) -> None:
    file = REPO / page
    for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text()):
        assert (file.parent / target).exists(), target


def test_configs_that_the_readme_names_exist() -> None:
    for name in re.findall(r"configs/[\w-]+\.yaml", README):
        assert (REPO / name).is_file(), name
