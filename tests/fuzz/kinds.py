"""The kinds of files that are fuzzed: how a mutated one is written into a folder, and what reads it."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from blt.checkpoint import llama, native
from blt.checkpoint.formats import open_source
from blt.checkpoint.models import save
from blt.checkpoint.tensors import read_safetensors, write_safetensors
from blt.cli import inputs
from blt.data import Dataset, prepare
from blt.figures.metrics import read_runs
from blt.model.vocabulary import read_vocabulary, train_vocabulary
from blt.train import checkpoints
from blt.train.config import load_config
from blt_runtime import Bundle
from tests.checkpoint.facebook import write_facebook
from tests.checkpoint.folders import write as write_huggingface
from tests.fuzz import mutate
from tests.runtime.bundles import write_bundle
from tests.tiny import tiny

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
Random = random.Random


@dataclass(frozen=True)
class Kind:
    """seed: writes good files into a folder.  change: makes them bad, in place.  read: reads them, and writes at most
    into `out`, a path that does not exist."""

    seed: Callable[[Path], object]
    change: Callable[[Random, Path], object]
    read: Callable[[Path, Path], object]


def bytes_of(name: str) -> Callable[[Random, Path], object]:
    return lambda rng, folder: (folder / name).write_bytes(mutate.raw(rng, (folder / name).read_bytes()))


def json_of(name: str) -> Callable[[Random, Path], object]:
    return lambda rng, folder: (folder / name).write_bytes(mutate.json_or_bytes(rng, (folder / name).read_bytes()))


# --- checkpoints -------------------------------------------------------------------------------------------------


def read_checkpoint(folder: Path, out: Path) -> None:
    path = folder / "model.pt" if (folder / "model.pt").exists() else folder
    source = open_source(path)
    source.check_finite()
    native.write(source, out)


def change_state(rng: Random, folder: Path) -> None:
    """Changes values and tensors of model.pt, and at times its bytes."""
    path = folder / "model.pt"
    content = torch.load(path, weights_only=True)
    for _ in range(rng.choice((1, 1, 2))):
        part = rng.choice(("blt", "entropy", "config", "config", "whole"))
        if part == "config":
            more = (mutate.nested(), torch.zeros(2), b"x", (1, 2))
            content["config"] = mutate.json_value(rng, content["config"], more)
        elif part == "whole":
            content[rng.choice(list(content))] = rng.choice((*mutate.VALUES, mutate.nested(), torch.zeros(3)))
        elif isinstance(content.get(part), dict) and content[part]:
            name = rng.choice(list(content[part]))
            changed = mutate.tensor(rng, content[part][name]) if torch.is_tensor(content[part][name]) else 1
            content[part][rng.choice((name, name, name, mutate.ESCAPES, 7))] = changed
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.8)
    if rng.random() < 0.3:
        bytes_of("model.pt")(rng, folder)


def change_safetensors(rng: Random, path: Path) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    if rng.random() < 0.7:
        text = mutate.json_text(rng, header)
        text += b" " * (-len(text) % 8)
        size = len(text) if rng.random() < 0.9 else rng.choice(mutate.NUMBERS)
        data = struct.pack("<Q", size) + text + rest
    if rng.random() < 0.4:
        data = mutate.raw(rng, data)
    path.write_bytes(data)


def seed_safetensors(folder: Path) -> None:
    write_safetensors(folder / "m.safetensors", native.read(tiny_file(folder)).models()["blt"].weights)


def tiny_file(folder: Path) -> Path:
    save(folder / "model.pt", tiny("static"))
    return folder / "model.pt"


def read_stored(folder: Path, out: Path) -> None:
    for tensor in read_safetensors(folder / "m.safetensors").values():
        if tensor.dtype.is_floating_point:
            tensor.not_finite()


def change_huggingface(rng: Random, folder: Path) -> None:
    if rng.random() < 0.7:
        json_of("config.json")(rng, folder)
    else:
        change_safetensors(rng, folder / "model.safetensors")


def seed_facebook(folder: Path) -> None:
    (folder / "f").mkdir()
    write_facebook(folder / "f", tiny("static"))


def seed_gguf(folder: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_feed_forward_length(16)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("numbers", [1, 2, 3])
    for name in llama.GGUF_NAMES.names.values():
        wide = {"ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16)}
        shape = (8,) if "norm" in name else wide.get(name, (8, 8))
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(folder: Path, out: Path) -> None:
    found = llama.read(folder / "m.gguf")
    for name in llama.GGUF_NAMES.names:
        found.read(f"layers.0.{name}.weight")


# --- small files -------------------------------------------------------------------------------------------------


def change_yaml(rng: Random, folder: Path) -> None:
    path = folder / "c.yaml"
    value = yaml.safe_load(path.read_text())
    if rng.random() < 0.7:
        value = mutate.json_value(rng, value)
    text = yaml.safe_dump(value)
    extra = ("a: &a [*a]\n", "b: !!bool maybe\n", "kind: x\n", "? [a]\n: 1\n", "a: " + "[" * 5000, "a: 0x" + "f" * 5000,
             "a: &a {b: 1}\n<<: *a\n", "a: !!timestamp x\n", "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n")  # fmt: skip
    if rng.random() < 0.3:
        text += rng.choice(extra)
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(mutate.raw(rng, data) if rng.random() < 0.3 else data)


def seed_metrics(folder: Path) -> None:
    lines = [{"step": n, "loss": 1.0 / n, "bpb": 2.0, "tokens": n} for n in range(1, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_lines(name: str) -> Callable[[Random, Path], object]:
    def change(rng: Random, folder: Path) -> None:
        lines = (folder / name).read_bytes().splitlines()
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(len(lines))
            lines[at] = mutate.json_or_bytes(rng, lines[at])
        data = b"\n".join(lines) + b"\n"
        (folder / name).write_bytes(mutate.raw(rng, data) if rng.random() < 0.2 else data)

    return change


def seed_state(folder: Path) -> None:
    checkpoints.write(folder, 7, {"a": torch.zeros(3)}, {"config": {"kind": "blt"}, "position": 3}, keep=1)


def change_state_files(rng: Random, folder: Path) -> None:
    inside = folder / "step-00000007"
    name = rng.choice(sorted(path.name for path in inside.iterdir()))
    if name.endswith(".safetensors"):
        change_safetensors(rng, inside / name)
    else:
        json_of(name)(rng, inside)
    if rng.random() < 0.5:  # the one who changed it also wrote the checksum
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            held = json.loads((inside / "manifest.json").read_text(errors="replace"))
            size, digest = (inside / name).stat().st_size, checkpoints._sha256(inside / name)
            held["files"][name] = {"size": size, "sha256": digest}
            (inside / "manifest.json").write_text(json.dumps(held))


def read_state(folder: Path, out: Path) -> None:
    checkpoints.read(folder / "step-00000007").load({"a": torch.zeros(3)})


def change_npy(rng: Random, folder: Path) -> None:
    path = folder / "ids.npy"
    data = path.read_bytes()
    header = rng.choice((b"(4,)", b"(99999999999999,)", b"(-1,)", b"(" + b"0," * 50 + b")", b"(4.0,)", b"((4,),)"))
    if rng.random() < 0.5:
        data = data.replace(b"(4,)", header)
    path.write_bytes(mutate.raw(rng, data) if rng.random() < 0.7 else data)


def seed_tokenizer(folder: Path) -> None:
    (folder / "t.json").write_text(train_vocabulary([b"some text, some more text"] * 3, 270).text)


# --- data --------------------------------------------------------------------------------------------------------


def seed_jsonl(folder: Path) -> None:
    lines = [{"text": f"document {n} " * 3, "meta": {"n": n}, "tags": ["a", None]} for n in range(8)]
    (folder / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_text(name: str) -> Callable[[Path, Path], object]:
    return lambda folder, out: prepare([folder / name], out)


def seed_gzip(folder: Path) -> None:
    seed_jsonl(folder)
    (folder / "t.jsonl.gz").write_bytes(gzip.compress((folder / "t.jsonl").read_bytes(), mtime=0))


def seed_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["one", "two", None], "n": [1, 2, 3]}), folder / "t.parquet")


def change_parquet(rng: Random, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: tuple[Any, ...] = (
        pa.array([b"\xff", b"a", None]), pa.array([1, 2, 3]), pa.array([["a"], [], None]), pa.array([{"a": "b"}] * 3),
        pa.array(["x" * 10_000] * 3), pa.array([None] * 3), pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array([mutate.ESCAPES] * 3), pa.array([], pa.string()), pa.array(["ä"] * 3, pa.large_string()),
    )  # fmt: skip
    if rng.random() < 0.4:
        column = rng.choice(columns)
        names = rng.choice((["text", "n"], ["text", "text"], [mutate.ESCAPES, "text"], ["n", "m"], ["", "text"]))
        pq.write_table(pa.Table.from_arrays([column, column], names), folder / "t.parquet")
    if rng.random() < 0.8:
        bytes_of("t.parquet")(rng, folder)


def seed_data(folder: Path) -> None:
    seed_jsonl(folder)
    prepare([folder / "t.jsonl"], folder / "data")


def change_data(rng: Random, folder: Path) -> None:
    name = rng.choice(sorted(path.name for path in (folder / "data").iterdir()))
    (json_of if name == "manifest.json" else bytes_of)(name)(rng, folder / "data")


def read_data(folder: Path, out: Path) -> None:
    dataset = Dataset(folder / "data")
    for name in dataset.manifest["splits"]:
        for index in range(len(dataset.split(name))):
            dataset.split(name).ids(index)
    dataset.verify()


KINDS: dict[str, Kind] = {
    "manifest": Kind(
        lambda folder: write_bundle(folder / "b"),
        lambda rng, folder: json_of("manifest.json")(rng, folder / "b"),
        lambda folder, out: Bundle.open(folder / "b"),
    ),
    "hash tables": Kind(
        lambda folder: write_bundle(folder / "b"),
        lambda rng, folder: bytes_of("hash_tables.npy")(rng, folder / "b"),
        lambda folder, out: Bundle.open(folder / "b", "sizes"),
    ),
    "safetensors": Kind(seed_safetensors, lambda rng, f: change_safetensors(rng, f / "m.safetensors"), read_stored),
    "model.pt": Kind(tiny_file, change_state, read_checkpoint),
    "model.pt bytes": Kind(tiny_file, bytes_of("model.pt"), read_checkpoint),
    "huggingface": Kind(lambda folder: write_huggingface(tiny("plain"), folder / "h"),
                        lambda rng, folder: change_huggingface(rng, folder / "h"),
                        lambda folder, out: read_checkpoint(folder / "h", out)),
    "facebook": Kind(seed_facebook,
                     lambda rng, folder: json_of("params.json")(rng, folder / "f/blt"),
                     lambda folder, out: read_checkpoint(folder / "f/blt", out)),
    "gguf": Kind(seed_gguf, bytes_of("m.gguf"), read_gguf),
    "configuration": Kind(lambda folder: shutil.copy(CONFIGS / "demo.yaml", folder / "c.yaml"), change_yaml,
                          lambda folder, out: load_config(folder / "c.yaml")),
    "metrics": Kind(seed_metrics, change_lines("metrics.jsonl"), lambda folder, out: read_runs([folder])),
    "training state": Kind(seed_state, change_state_files, read_state),
    "tokenizer": Kind(seed_tokenizer, json_of("t.json"), lambda folder, out: read_vocabulary(folder / "t.json")),
    "npy": Kind(lambda folder: np.save(folder / "ids.npy", np.arange(4)), change_npy,
                lambda folder, out: inputs.load_ids(folder / "ids.npy", 260)),
    "jsonl": Kind(seed_jsonl, change_lines("t.jsonl"), read_text("t.jsonl")),
    "gzip": Kind(seed_gzip, bytes_of("t.jsonl.gz"), read_text("t.jsonl.gz")),
    "parquet": Kind(seed_parquet, change_parquet, read_text("t.parquet")),
    "data folder": Kind(seed_data, change_data, read_data),
}  # fmt: skip
