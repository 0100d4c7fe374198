"""What a run says about itself: FLOP/s and MFU, memory, the wait for data, validation by group, norms of parts, and
a profile of steps."""

from __future__ import annotations

import gzip
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from blt.data.dataset import Documents
from blt.train import Trainer, train
from blt.train.config import EntropyRun, load_config
from blt.train.dryrun import FORWARD_PASSES_PER_STEP
from blt.train.norms import KINDS
from blt.train.profile import FOLDER, StepProfile
from blt.train.progress import FEW_GROUPS, fields, scalars
from blt.train.setup import prepare_run
from blt.train.speed import peak_flops, used_memory
from blt_runtime.errors import UsageError

SPACE = ["patching.scheme=space", "schedule={steps: 4, warmup: 1}", "run.log_every=1", "run.valid_every=100"]


def blt_trainer(repo: Path, data: Path, out: Path, *settings: str) -> Trainer:
    return prepare_run(load_config(repo / "configs" / "tiny.yaml", [*SPACE, *settings]), out, data)[0]


def records(out: Path, key: str) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if key in record]


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA A40", "fp32", 37.4),
        ("Tesla T4", "bf16", None),  # no bfloat16
        ("NVIDIA GeForce RTX 4099", "bf16", None),
        ("", "fp32", None),  # a CPU
    ],
)
def test_the_peak_of_a_device(name: str, dtype: str, tera: float | None) -> None:
    assert peak_flops(name, dtype) == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_line_has_flops_memory_and_the_wait_for_data(repo: Path, data: Path, tmp_path: Path) -> None:
    trainer = blt_trainer(repo, data, tmp_path / "run")
    trainer.run(2)
    for record in records(tmp_path / "run", "loss"):
        assert "mfu" not in record  # no peak of a CPU is known
        per_byte = record["flops_per_s"] / record["bytes_per_s"]  # type: ignore[operator]
        assert per_byte == pytest.approx(FORWARD_PASSES_PER_STEP * trainer.flops_per_byte)
        assert record["memory_bytes"] > 0  # type: ignore[operator]
        assert 0 <= record["data_wait"] <= 1  # type: ignore[operator]
        assert record["data_wait_s"] >= 0  # type: ignore[operator]
        words = ", ".join(fields(record))
        assert "FLOP/s" in words
        assert "memory " in words
        assert "% for data" in words


def test_mfu_is_the_share_of_the_given_peak(repo: Path, data: Path, tmp_path: Path) -> None:
    trainer = blt_trainer(repo, data, tmp_path / "run", "run.peak_flops=1.0e+12")
    trainer.run(1)
    (record,) = records(tmp_path / "run", "loss")
    assert record["mfu"] == pytest.approx(record["flops_per_s"] / 1e12)  # type: ignore[operator]
    assert "% MFU" in ", ".join(fields(record))


def test_the_entropy_model_is_no_part_of_mfu(repo: Path, data: Path, entropy_run: Path, tmp_path: Path) -> None:
    config = load_config(repo / "configs" / "tiny.yaml", SPACE[1:])
    trainer = prepare_run(config, tmp_path / "run", data, entropy_model=entropy_run)[0]
    assert 0 < trainer.speed.flops_per_byte < trainer.flops_per_byte


def test_resident_memory_grows_with_what_is_held() -> None:
    size = 64 << 20
    before = used_memory(torch.device("cpu"))
    held = torch.ones(size // 4)
    assert used_memory(torch.device("cpu")) >= before + size // 2
    del held


def test_waiting_is_counted_in_the_window(repo: Path, data: Path, tmp_path: Path) -> None:
    trainer = blt_trainer(repo, data, tmp_path / "run")
    window = trainer.state.window
    trainer.train_step()
    assert 0 < window.waited <= window.elapsed
    state = window.state()
    window.reset()
    assert window.waited == 0
    window.restore({key: value for key, value in state.items() if key != "waited"})  # of an earlier version
    assert window.waited == 0


def nats_by_group(trainer: Trainer) -> dict[str, tuple[float, int]]:
    """Nats and bytes of each group, position by position: the document of a target follows from its place in the
    tokens of the block."""
    assert trainer.valid is not None
    loader = trainer.valid()
    documents = loader.documents
    assert isinstance(documents, Documents)
    found: dict[str, tuple[float, int]] = {}
    for batch in loader.one_pass():
        members = loader._blocks(0)[batch.block]
        ends = np.cumsum(documents.lengths[members] + 2)
        losses_BN = trainer.objective(batch)[1].reshape(batch.mask.shape)
        for row, position in zip(*np.nonzero(batch.mask), strict=True):
            place = batch.starts[row] + position + 1
            name = documents.group(int(members[np.searchsorted(ends, place, side="right")]))
            nats, n_bytes = found.get(name, (0.0, 0))
            is_byte = int(batch.targets[row, position] >= 4)
            found[name] = nats + losses_BN[row, position].item(), n_bytes + is_byte
    return found


@pytest.mark.parametrize("kind", ["tiny", "tiny-entropy"])
def test_validation_by_group_is_that_of_every_position(
    repo: Path, groups_of_text: Path, tmp_path: Path, kind: str
) -> None:
    settings = ["data.valid_bytes=1200", "schedule={steps: 4, warmup: 1}", "run.valid_every=100"]
    settings += ["patching.scheme=space", "batch.micro_rows=2"] if kind == "tiny" else []
    config = load_config(repo / "configs" / f"{kind}.yaml", settings)
    trainer = prepare_run(config, tmp_path / "run", groups_of_text)[0]
    trainer.run(4)
    (record,) = records(tmp_path / "run", "valid_bpb_by_group")
    expected = nats_by_group(trainer)
    bits = record["valid_bpb_by_group"]
    assert isinstance(bits, dict)
    assert bits == pytest.approx({name: nats / math.log(2) / n for name, (nats, n) in expected.items()}, rel=1e-5)
    assert len(bits) == 3
    assert sum(n for _, n in expected.values()) == record["valid_bytes"] == 1200
    total = sum(bits[name] * n for name, (_, n) in expected.items()) / 1200
    assert total == pytest.approx(record["valid_bpb"], rel=1e-5)
    assert scalars(record)["valid/bpb_by_group/digits"] == bits["digits"]
    assert f"digits {bits['digits']:.3f}, letters" in ", ".join(fields(record))
    many = {f"group {i}": 1.0 for i in range(FEW_GROUPS + 1)}
    assert "group 0" not in ", ".join(fields({**record, "valid_bpb_by_group": many}))


def test_one_group_is_not_listed(repo: Path, data: Path, tmp_path: Path) -> None:
    trainer = blt_trainer(repo, data, tmp_path / "run")
    assert trainer.validate().keys() == {"valid_bpb", "valid_bytes"}


def plain_norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([tensor.flatten().double() for tensor in tensors]).norm())


def test_norms_of_parts_are_those_of_their_parameters(repo: Path, data: Path, tmp_path: Path) -> None:
    """At step 2 of 2: against gradients before clipping and against weights before and after the step."""
    trainer = blt_trainer(repo, data, tmp_path / "run", "run.norms_every=2", "optimizer.clip=1.0e-3")
    model = trainer.objective.model
    gradients: dict[str, torch.Tensor] = {}
    trainer.train_step()
    assert not trainer.norms.take()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
    trainer.train_step()
    record = trainer.norms.take()
    assert not trainer.norms.take()
    assert record.keys() == set(KINDS)
    assert record["weight_norm"].keys() == {"tables", "encoder", "latent", "decoder", "output"}
    after = dict(model.named_parameters())
    for part in record["weight_norm"]:
        names = [name for name in before if trainer.norms.part_of(name) == part]
        weight = plain_norm([before[name] for name in names])
        update = plain_norm([after[name].detach() - before[name] for name in names])
        assert record["gradient_norm"][part] == pytest.approx(plain_norm([gradients[n] for n in names]), rel=1e-5)
        assert record["weight_norm"][part] == pytest.approx(weight, rel=1e-5)
        assert record["update_ratio"][part] == pytest.approx(update / weight, rel=1e-4)
    squares = sum(value**2 for value in record["gradient_norm"].values())
    assert squares**0.5 == pytest.approx(trainer.state.norm, rel=1e-5)


def test_norms_are_recorded_and_change_no_weight(repo: Path, data: Path, tmp_path: Path) -> None:
    plain, watched = (
        blt_trainer(repo, data, tmp_path / f"run-{every}", f"run.norms_every={every}") for every in (0, 2)
    )
    for trainer in (plain, watched):
        trainer.run(4)
    found = records(tmp_path / "run-2", "gradient_norm")
    assert [record["step"] for record in found] == [2, 4]
    assert {"train/update_ratio/latent", "train/gradient_norm/tables"} <= scalars(found[0]).keys()
    assert "update / weight " in ", ".join(fields(found[0]))
    pairs = zip(plain.objective.model.parameters(), watched.objective.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_entropy_model_is_one_part_and_its_output(entropy_config: EntropyRun, data: Path, tmp_path: Path) -> None:
    trainer = prepare_run(entropy_config, tmp_path / "run", data)[0]
    trainer.norms.every = 1
    trainer.train_step()
    assert trainer.norms.take()["gradient_norm"].keys() == {"entropy model", "output"}


def test_a_profile_has_a_trace_and_a_table(
    repo: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("blt").propagate = True  # a test of the command line may have switched it off
    caplog.set_level(logging.INFO, logger="blt.train")
    plain, profiled = (blt_trainer(repo, data, tmp_path / name) for name in ("plain", "profiled"))
    before = set(profiled.objective.model.__dict__)
    profiled.profile = StepProfile(2, 3, tmp_path / "profiled" / FOLDER)
    for trainer in (plain, profiled):
        trainer.run(4)
    with gzip.open(tmp_path / "profiled" / FOLDER / "steps-2-3.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("blt/step") == 2
    (text,) = {message for message in caplog.messages if "profiled (trace" in message}  # other tests may add a handler
    rows = [line.split()[0] for line in text.splitlines()[1:]]
    assert rows == ["step", "data", "forward", "encoder", "latent", "decoder", "backward", "optimizer"]
    assert set(profiled.objective.model.__dict__) == before
    pairs = zip(plain.objective.model.parameters(), profiled.objective.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_profile_ends_with_an_error_in_its_steps(
    repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = blt_trainer(repo, data, tmp_path / "run")
    trainer.profile = StepProfile(1, 2, tmp_path / "run" / FOLDER)

    def broken() -> float:
        raise ZeroDivisionError

    monkeypatch.setattr(trainer, "train_step", broken)
    with pytest.raises(ZeroDivisionError):
        trainer.run(2)
    assert not (tmp_path / "run" / FOLDER).exists()
    with torch.profiler.profile():  # another one can start
        pass


def test_steps_that_the_run_does_not_make_are_not_profiled(repo: Path, data: Path, tmp_path: Path) -> None:
    config = load_config(repo / "configs" / "tiny.yaml", SPACE)
    with pytest.raises(UsageError, match="makes the steps 1 to 4"):
        train(config, tmp_path / "run", data=data, profile=(3, 5))
