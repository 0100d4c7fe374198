"""The help of every command: options say their defaults, and arguments name what the command accepts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from blt.cli import app

OFF = {  # options that do nothing unless they are given
    "--baseline", "--by", "--debs", "--eval-data", "--fail-above", "--file", "--grammar", "--out", "--plot", "--regex",
    "--schema", "--set", "--stop", "--suite", "--triton",
}  # fmt: skip
WITHOUT_BUNDLES = ("calibrate", "convert")


def commands(group: Any, *names: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield " ".join((*names, name)), command


COMMANDS = dict(commands(typer.main.get_command(app)))


def options_of(name: str) -> list[Any]:
    return [parameter for parameter in COMMANDS[name].params if parameter.opts[0].startswith("-")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_its_default(name: str) -> None:
    """A switch is off unless its help says otherwise; typer shows other defaults that are values."""
    silent = [
        option.opts[-1]
        for option in options_of(name)
        if option.default in (None, "")
        and not option.required
        and "default: " not in option.help
        and option.opts[-1] not in OFF
    ]
    assert not silent


@pytest.mark.parametrize("name", COMMANDS)
def test_every_text_is_a_sentence(name: str) -> None:
    command = COMMANDS[name]
    texts = [command.help, *(p.help for p in command.params if p.name != "context")]
    assert all(text and text.endswith((".", "...")) for text in texts), texts


def test_every_option_that_does_nothing_unless_given_exists() -> None:
    names = {option.opts[-1] for name in COMMANDS for option in options_of(name)}
    assert names >= OFF


@pytest.mark.parametrize("name", COMMANDS)
def test_only_commands_that_accept_a_bundle_offer_one(name: str) -> None:
    offers = [parameter.help for parameter in COMMANDS[name].params if parameter.opts[0] == "model"]
    if offers:
        assert ("bundle" in offers[0]) == (name not in WITHOUT_BUNDLES)
