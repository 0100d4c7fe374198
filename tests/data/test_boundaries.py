"""Boundaries stored as bits: those of the rule, for every shard, part and kill, and of what their plan says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from blt.data import Dataset, PatchIndex, boundaries, boundary_pass, prepare
from blt.data.boundaries import Bools, Flips, Plan, StoredBoundaries
from blt.data.boundary_pass import Request
from blt.data.entropies import CHUNK, ChunkedPass, Float, Tokens
from blt.data.patches import sample_documents, starts_of
from blt.model import EntropyModel
from blt_runtime.errors import InputError, UsageError
from blt_runtime.patching import PatchRule, patch_lengths
from tests.data.test_patches import small_model

RULE = PatchRule(threshold=5.4, max_patch_length=9)
LENGTHS = (1, 700, 5, 1500, 30, 510, 511, 300, 20, 3000, 2)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Shards of at least 800 bytes that begin inside chunks of 128 tokens, some with an odd number of tokens."""
    return make_dataset(tmp_path, monkeypatch)


def make_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 1) -> Dataset:
    monkeypatch.setitem(CHUNK, "cpu", 128)
    random = np.random.default_rng(seed)
    for split in ("train", "valid"):
        documents = [bytes(random.integers(97, 103, n).astype(np.uint8)) for n in LENGTHS]
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.txt").write_bytes(b"\0".join(documents))
    prepare([folder / f"{split}.txt" for split in ("train", "valid")], folder / "data", shard_bytes=800)
    dataset = Dataset(folder / "data")
    assert len(dataset.split("train").shard_names) == 4
    return dataset


def make(dataset: Dataset, model: EntropyModel, folder: Path, request: Request) -> Plan:
    plan = boundary_pass.plan_for(dataset, model, request, folder)
    boundary_pass.compute(dataset, model, plan, folder)
    return plan


def request_of(rule: PatchRule = RULE, **more: object) -> Request:
    return dataclasses.replace(Request(("train", "valid"), rule), **more)  # type: ignore[arg-type]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        PatchRule(threshold=0.02, monotonic=True, max_patch_length=5),
        PatchRule(threshold=5.3, threshold_add=0.01, max_patch_length=16),
        PatchRule(threshold=5.4, max_patch_length=9, reset_newlines=True),
    ],
)
def test_bits_are_the_boundaries_of_the_rule(dataset: Dataset, tmp_path: Path, rule: PatchRule) -> None:
    """The reference: `patch_lengths` over the entropies that training caches."""
    model = small_model(n_layers=2)
    plan = make(dataset, model, tmp_path / "out", request_of(rule))
    for split in ("train", "valid"):
        index = PatchIndex(dataset, split, model, reset_newlines=rule.reset_newlines)
        stored = StoredBoundaries(tmp_path / "out", plan, dataset, split)
        assert stored.key == index.key
        found = []
        for i in range(len(index.documents)):
            lengths = patch_lengths(rule, index.documents.ids(i), index.entropies(i), include_next_token=False)
            np.testing.assert_array_equal(np.flatnonzero(stored.starts(i)), np.cumsum(lengths) - lengths)
            assert len(stored.starts(i)) == index.documents.lengths[i] + 2
            found.append(len(lengths))
        n = len(index.documents)
        members = np.random.default_rng(0).permutation(np.repeat(np.arange(n), 2))  # a mixture repeats documents
        block = np.flatnonzero(np.concatenate([stored.starts(int(i)) for i in members]))
        np.testing.assert_array_equal(stored.boundaries(members), block)
        np.testing.assert_array_equal(index.with_rule(rule).boundaries(members), block)
        records = [boundaries.record_of(tmp_path / "out", shard) for shard in plan.shards[split]]
        assert sum(record.patches for record in records if record) == sum(found)
        assert 2 * len(found) < sum(found) < sum(LENGTHS)


def test_a_file_has_one_bit_a_token(dataset: Dataset, tmp_path: Path) -> None:
    plan = make(dataset, small_model(), tmp_path / "out", request_of())
    for split, shard in plan.names():
        stored = StoredBoundaries(tmp_path / "out", plan, dataset, split)
        first, last = stored.documents.shard_offsets[int(shard.name[-5:]) :][:2]
        bits = np.load(boundaries.bits_path(tmp_path / "out", shard.name))
        assert (bits.dtype, bits.shape) == (np.uint8, (-(-shard.tokens // 8),))
        tokens = np.concatenate([stored.starts(i) for i in range(first, last)])
        np.testing.assert_array_equal(np.unpackbits(bits, bitorder="little")[: shard.tokens], tokens)


class Killed(BaseException):
    pass


def test_a_killed_pass_keeps_the_shards_that_are_complete(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    plan = make(dataset, model, tmp_path / "whole", request_of())
    run, left = ChunkedPass.run, 20

    def counting(self: ChunkedPass, ids: Tokens, begin: int = 0, end: int | None = None) -> Iterator[Float]:
        nonlocal left
        for values in run(self, ids, begin, end):
            left -= 1
            if not left:
                raise Killed
            yield values

    monkeypatch.setattr(ChunkedPass, "run", counting)
    missing = []
    with pytest.raises(Killed):
        make(dataset, model, tmp_path / "out", request_of())
    for budget in (30, 1000):
        missing.append(len(boundaries.missing(tmp_path / "out", plan)))
        left = budget
        try:
            make(dataset, model, tmp_path / "out", request_of())
        except Killed:
            continue
    assert 8 > missing[0] > missing[1] > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not boundary_pass.compute(dataset, model, plan, tmp_path / "out")  # nothing is left


def test_parts_in_any_order_make_the_whole(dataset: Dataset, tmp_path: Path) -> None:
    model = small_model()
    plan = make(dataset, model, tmp_path / "whole", request_of())
    tokens = []
    for part in (2, 0, 1):
        ours = boundary_pass.plan_for(dataset, model, request_of(), tmp_path / "out")
        tokens.append(boundary_pass.compute(dataset, model, ours, tmp_path / "out", part, 3))
    assert min(tokens) > 0
    assert sum(tokens) == sum(shard.tokens for _, shard in plan.names())
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    with pytest.raises(UsageError, match="from 0 to 2"):
        boundary_pass.compute(dataset, model, plan, tmp_path / "out", 3, 3)


def test_a_target_chooses_the_threshold_that_training_chooses(dataset: Dataset, tmp_path: Path) -> None:
    from blt.data import choose_threshold

    model = small_model()
    plan = make(dataset, model, tmp_path / "out", request_of(target_patch_size=4.0))
    index = PatchIndex(dataset, "train", model)
    assert plan.rule.threshold == choose_threshold(index, RULE, 4.0, np.arange(len(index.documents)))
    again = make(dataset, model, tmp_path / "out", request_of(target_patch_size=4.0))
    assert again == plan == boundaries.read_plan(tmp_path / "out")


def test_a_folder_of_other_boundaries_is_refused(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = small_model(), tmp_path / "out"
    make(dataset, model, folder, request_of())
    wrong: dict[str, tuple[Dataset, EntropyModel, Request]] = {
        "another entropy model": (dataset, small_model(seed=1), request_of()),
        "threshold 5.4, not 5.3": (dataset, model, request_of(PatchRule(threshold=5.3, max_patch_length=9))),
        "target_patch_size None, not 4": (dataset, model, request_of(target_patch_size=4.0)),
        "dtype float32, not bfloat16": (dataset, model, request_of(dtype="bfloat16")),
        "other splits": (dataset, model, Request(("train",), RULE)),
        "other text": (make_dataset(tmp_path / "other", monkeypatch, seed=2), model, request_of()),
    }
    for message, (data, entropy, request) in wrong.items():
        with pytest.raises(InputError, match=f"other boundaries: .*{message}"):
            boundary_pass.plan_for(data, entropy, request, folder)


def test_damaged_files_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    plan = make(dataset, small_model(), folder, request_of())
    shard = plan.shards["train"][1]
    path, document = boundaries.bits_path(folder, shard.name), int(dataset.split("train").shard_offsets[1])

    def read() -> None:
        StoredBoundaries(folder, plan, dataset, "train").starts(document)

    read()
    good = path.read_bytes()
    for bad, message in {
        good[:-1] + bytes([good[-1] ^ 1]): "sha256",
        good[:-1]: "damaged",
        b"": "damaged",
    }.items():
        path.write_bytes(bad)
        with pytest.raises(InputError, match=message):
            read()
    path.unlink()
    with pytest.raises(InputError, match="damaged"):
        read()
    record = folder / f"{shard.name}.json"
    record.write_text(json.dumps({"tokens": "many", "patches": 2, "sha256": ""}))
    with pytest.raises(InputError, match="tokens must be int"):
        read()
    record.write_text(json.dumps({"tokens": 3, "patches": 2, "sha256": ""}))
    with pytest.raises(InputError, match="does not fit"):
        read()
    record.unlink()
    with pytest.raises(InputError, match="lacks the shard"):
        read()
    boundary_pass.compute(dataset, small_model(), plan, folder)
    assert path.read_bytes() == good


def test_a_damaged_plan_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    make(dataset, small_model(), folder, request_of())
    plan = json.loads((folder / "boundaries.json").read_text())
    for bad, message in {
        "{": "damaged",
        "[]": "no plan",
        json.dumps(plan | {"version": 9}): "newer",
        json.dumps(plan | {"rule": {"scheme": "entropy"}}): "needs a threshold",
        json.dumps(plan | {"dtype": "int8"}): "dtype",
        json.dumps({key: plan[key] for key in plan if key != "shards"}): "lacks the key 'shards'",
    }.items():
        (folder / "boundaries.json").write_text(bad)
        with pytest.raises(InputError, match=message):
            boundaries.read_plan(folder)
    with pytest.raises(InputError, match="blt data boundaries"):
        boundaries.read_plan(tmp_path)


def test_the_flips_of_bfloat16_are_counted(dataset: Dataset, tmp_path: Path) -> None:
    """The reference: one pass over the sample, which is all of the text, document by document in the sample's order.

    In the shards, documents have other places in chunks and round otherwise, so their flips are only about as many.
    """
    model, documents = small_model(n_layers=2), dataset.split("train")
    with torch.no_grad():
        model.output.weight *= 20  # entropies that differ from byte to byte
    plan = make(dataset, model, tmp_path / "bf16", request_of(target_patch_size=3.0, dtype="bfloat16"))
    exact = make(dataset, model, tmp_path / "fp32", request_of(target_patch_size=3.0))
    assert (exact.flips, exact.rule) == (None, plan.rule)
    assert plan.key != exact.key
    stored = {
        p.dtype: StoredBoundaries(tmp_path / f, p, dataset, "train") for f, p in (("bf16", plan), ("fp32", exact))
    }
    sample = sample_documents(documents, np.arange(len(documents))).tolist()
    ids = [documents.ids(i) for i in sample]
    entropies = np.concatenate(list(ChunkedPass(model, chunk=128, bf16=True).run(np.concatenate(ids))))
    ours = [
        starts_of(plan.rule, x, e) for x, e in zip(ids, np.split(entropies, np.cumsum([*map(len, ids)])), strict=False)
    ]
    theirs = [stored["float32"].starts(i) for i in sample]

    def flips(ours: list[Bools], theirs: list[Bools]) -> tuple[int, int]:
        pairs = list(zip(ours, theirs, strict=True))
        return sum(int((b & ~a).sum()) for a, b in pairs), sum(int((a & ~b).sum()) for a, b in pairs)

    tokens, found = sum(map(len, ids)), sum(int(starts.sum()) for starts in theirs)
    lost, new = flips(ours, theirs)
    assert plan.flips == Flips(tokens, found, lost=lost, new=new)
    assert 10 < min(lost, new) < max(lost, new) < 0.1 * found
    in_shards = flips([stored["bfloat16"].starts(i) for i in sample], theirs)
    assert in_shards == pytest.approx((lost, new), rel=0.5)
