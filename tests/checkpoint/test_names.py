"""State dicts whose names have the prefixes of wrappers are read in every format; errors about many names are short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blt.checkpoint.facebook import HUB_WEIGHTS, WEIGHTS
from blt.checkpoint.formats import open_source
from blt.checkpoint.models import load, save
from blt.checkpoint.names import mismatch, without_wrappers
from blt_runtime.errors import CheckpointError
from tests.checkpoint.facebook import write_facebook
from tests.checkpoint.folders import load_state, save_state, shard, write
from tests.tiny import tiny

PREFIXES = ("_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod.", "_fsdp_wrapped_module.", "inside")
State = dict[str, torch.Tensor]


def wrapped(state: State, prefix: str) -> State:
    """With the prefix, or (`inside`) with a wrapper around every layer."""
    if prefix == "inside":
        return {name.replace(".layers.0.", ".layers.0._orig_mod."): tensor for name, tensor in state.items()}
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_same_weights(path: Path) -> None:
    expected, found = tiny().require_blt()[0].state_dict(), load(path, trainable=True).require_blt()[0].state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_in_our_format(prefix: str, tmp_path: Path) -> None:
    save(tmp_path / "model.pt", tiny())
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save(content | {key: wrapped(content[key], prefix) for key in ("blt", "entropy")}, tmp_path / "model.pt")
    assert_same_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_in_the_facebook_format(prefix: str, tmp_path: Path) -> None:
    for form in ("training", "hub"):
        (tmp_path / form).mkdir()
        folder = write_facebook(tmp_path / form, tiny(), form)
        if form == "training":
            state = torch.load(folder / WEIGHTS, weights_only=True)["model"]
            torch.save({"model": wrapped(state, prefix)}, folder / WEIGHTS)
        else:
            save_state(folder, wrapped(load_state(folder), prefix), HUB_WEIGHTS)
            (folder / "train_args.json").write_text('{"data": {"patcher_args": {"threshold": 1.3}}}')
        assert_same_weights(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_prefixes_of_wrappers_in_hugging_faces_format(tmp_path: Path, sharded: bool) -> None:
    folder = write(tiny(), tmp_path / "hf")
    save_state(folder, wrapped(load_state(folder), "module."))
    if sharded:
        shard(folder)
    assert_same_weights(folder)


def test_the_counter_of_averaged_weights_is_left_out() -> None:
    state = {"n_averaged": 1, "module.a.weight": 2}
    assert without_wrappers(state, Path("x")) == {"a.weight": 2}
    assert without_wrappers({"n_averaged": 1, "a": 2}, Path("x")) == {"n_averaged": 1, "a": 2}


def test_two_tensors_of_one_parameter_are_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"x: a\.b and module\.a\.b are the same parameter"):
        without_wrappers({"a.b": 1, "module.a.b": 2}, Path("x"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: f"student.{name}", r"missing \(.*; they fit without the prefix 'student\.'"),
        (lambda name: name + "x", r"\d+ missing .* and \d+ more.*\d+ unknown .* more"),
    ],
)
def test_an_error_about_many_tensors_is_short(change: Callable[[str], str], message: str, tmp_path: Path) -> None:
    save(tmp_path / "model.pt", tiny())
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["blt"] = {change(name): tensor for name, tensor in content["blt"].items()}
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(tmp_path / "model.pt")
    assert len(str(caught.value)) < 1200


def test_few_mismatches_are_listed_and_many_are_counted() -> None:
    assert mismatch(["a"], ["b is (1,)"], ["c"]) == "missing a; b is (1,); unknown c"
    names = [f"layers.{i}" for i in range(9)]
    assert mismatch(names, [], []) == (
        "9 missing (layers.0, layers.1, layers.2, layers.3, layers.4 and 4 more; all begin with 'layers.')"
    )
    assert mismatch([], [f"{name} is wrong" for name in names], ["x"]).endswith("4 more like this; 1 unknown (x)")
