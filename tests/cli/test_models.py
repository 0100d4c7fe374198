"""Commands that run a model: generate, score, eval, inspect, export; on PyTorch and on a bundle."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blt.checkpoint.models import Checkpoint, save
from blt.cli import run
from blt.cli.commands import evaluate
from blt.model import BLT, BLTConfig, EntropyConfig, EntropyModel, HashConfig, TransformerConfig
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.errors import CheckFailed
from blt_runtime.patching import PatchRule

REPO = Path(__file__).resolve().parents[2]
Call = Callable[..., Any]
TEXT = "The quick brown fox – naïve – jumps over the lazy dog. "


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 16 dimensions with everything on disk in one model.pt."""
    part: dict[str, Any] = {"dim": 16, "n_layers": 1, "n_heads": 2, "ffn_dim": 32, "max_seqlen": 512}
    local = TransformerConfig(**part, window=64)
    latent = TransformerConfig(**{**part, "dim": 32})
    config = BLTConfig(encoder=local, latent=latent, decoder=local, hash=HashConfig(rows=50, sizes=(3, 4)))
    blt, entropy = BLT(config), EntropyModel(EntropyConfig(**part, window=64))
    generator = torch.Generator().manual_seed(0)
    blt.init_weights(generator)
    entropy.init_weights(generator)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save(path, Checkpoint(blt, entropy, PatchRule(threshold=5.2)))
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    """The same model exported by the command line, also into the Triton repository `models` next to it."""
    out, models = checkpoint.parent / "bundle", checkpoint.parent / "models"
    assert run(["export", str(checkpoint), "-o", str(out), "--triton", str(models), "-q"]) == 0
    return out


@pytest.fixture(params=["checkpoint", "bundle"])
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_generate_writes_the_new_bytes_and_nothing_else(blt: Call, model: Path) -> None:
    options = ["-n", 40, "--temperature", 0, "--raw", "--ignore-eos"]
    whole = blt("generate", model, TEXT, *options)
    assert whole.code == 0
    assert whole.err == ""
    assert 30 <= len(whole.out) <= 40  # special ids write nothing
    assert blt("generate", model, "-", *options, stdin=TEXT.encode()).out == whole.out
    assert blt("generate", model, TEXT, *options, "--no-stream").out == whole.out


def test_both_backends_write_the_same(blt: Call, checkpoint: Path, bundle: Path) -> None:
    options = ["-n", 60, "--temperature", 0, "--raw"]
    assert blt("generate", checkpoint, TEXT, *options).out == blt("generate", bundle, TEXT, *options).out


def test_text_is_complete_utf8(blt: Call, model: Path) -> None:
    """The random model writes arbitrary bytes; text output replaces what is no UTF-8."""
    options = ["-n", 50, "--seed", 3, "--temperature", 1, "--ignore-eos"]
    raw = blt("generate", model, TEXT, *options, "--raw").out
    assert blt("generate", model, TEXT, *options).out.decode() == raw.decode(errors="replace")
    with pytest.raises(UnicodeDecodeError):
        raw.decode()


def test_seeds(blt: Call, bundle: Path) -> None:
    def sample(seed: int) -> bytes:
        out: bytes = blt("generate", bundle, "x", "-n", 32, "--seed", seed, "--raw").out
        return out

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_stats_and_json(blt: Call, model: Path) -> None:
    result = blt("generate", model, TEXT, "-n", 20, "--temperature", 0, "--stats", "--json", "--ignore-eos")
    report = json.loads(result.text)
    assert report["schema"] == "blt.generate/1"
    assert report["prompt_bytes"] == len(TEXT.encode())
    assert 0 < report["new_bytes"] <= 20
    assert report["mean_patch_bytes"] > 0
    assert "bytes/s" in result.err
    assert "mean patch" in result.err


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["--schema", '{"enum": ["ja", {"größe": 1}]}'], r'"ja"|\{"größe": 1\}'),
        (["--schema", "schema.json"], r'\{"größe": (1|2\.5)\}'),
        (["--regex", "[a-z]{3,9} = [0-9]{2}"], "[a-z]{3,9} = [0-9]{2}"),
        (["--grammar", "numbers.lark"], "x[0-9]{1,3}"),
    ],
)
def test_generate_under_a_grammar(
    blt: Call, model: Path, options: list[str], pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = {"type": "object", "properties": {"größe": {"enum": [1, 2.5]}}, "required": ["größe"]}
    (tmp_path / "schema.json").write_text(json.dumps({**schema, "additionalProperties": False}))
    (tmp_path / "numbers.lark").write_text('start: "x" /[0-9]{1,3}/\n')
    monkeypatch.chdir(tmp_path)
    done = blt("generate", model, TEXT, *options, "--seed", 1, "--json")
    report = json.loads(done.text)
    assert re.fullmatch(pattern, report["text"])
    assert report["complete"] is True
    assert done.err == ""


def test_a_text_that_the_limit_ends_within_its_grammar_is_a_warning(blt: Call, bundle: Path) -> None:
    done = blt("generate", bundle, TEXT, "--regex", "[a-z]{30}", "-n", 10)
    assert (done.code, len(done.out)) == (0, 10)
    assert done.err == "the text ended before it matched the grammar: it is a prefix of a match (-n 10)\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "(("], "the regular expression cannot be used: unclosed group"),
        (["--schema", "nowhere.json"], "--schema 'nowhere.json': neither a file nor a JSON object"),
        (["--schema", '{"type": "x"}'], "the JSON schema cannot be used: Invalid type: x"),
        (["--grammar", "nowhere"], "the Lark grammar cannot be used: "),
        (["--regex", "a", "--schema", "{}"], "--schema and --regex: a text matches one grammar"),
        (["--regex", "a", "--ignore-eos"], "--ignore-eos: a text ends where its grammar does"),
    ],
    ids=range(6),
)
def test_a_grammar_that_cannot_be_used(blt: Call, bundle: Path, options: list[str], message: str) -> None:
    done = blt("generate", bundle, TEXT, *options)
    assert (done.code, done.out) == (2, b"")
    assert done.err.startswith(f"blt: error: {message}")
    assert len(done.err.splitlines()) == 1


def test_stop(blt: Call, bundle: Path) -> None:
    options = ["-n", 40, "--temperature", 0, "--raw"]
    whole = blt("generate", bundle, TEXT, *options).out
    ascii_only = [bytes([b]) for b in whole if b < 128]
    stop = ascii_only[-1].decode()
    assert blt("generate", bundle, TEXT, *options, "--stop", stop).out == whole[: whole.index(stop.encode())]


def test_unconditional(blt: Call, model: Path) -> None:
    assert blt("generate", model, "--unconditional", "-n", 8, "--raw", "--ignore-eos").code == 0


def test_a_prompt_beyond_the_capacity_is_one_line(blt: Call, model: Path) -> None:
    result = blt("generate", model, "-", stdin=b"x" * 600)
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "512" in result.err


def test_score_is_the_same_on_both(blt: Call, checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    for name, model in (("torch", checkpoint), ("onnx", bundle)):
        assert blt("score", model, tmp_path / "text", "--npz", tmp_path / f"{name}.npz").code == 0
    a, b = np.load(tmp_path / "torch.npz"), np.load(tmp_path / "onnx.npz")
    n = len(TEXT.encode()) + 1
    assert set(a) == set(b) == {"ids", "entropies", "patch_lengths", "logits"}
    assert a["ids"].tolist() == [1, *(4 + byte for byte in TEXT.encode())]
    assert a["patch_lengths"].sum() == n + 1
    assert (a["patch_lengths"] == b["patch_lengths"]).all()
    assert a["logits"].shape == (n, 260)
    assert np.abs(a["logits"] - b["logits"]).max() < 2e-5
    assert np.abs(a["entropies"] - b["entropies"]).max() < 2e-5


def test_a_checkpoint_runs_on_onnx_through_a_temporary_bundle(blt: Call, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    for backend in ("torch", "onnx"):
        options = ["--backend", backend, "--npz", tmp_path / f"{backend}.npz"]
        assert blt("score", checkpoint, tmp_path / "text", *options).code == 0
    a, b = np.load(tmp_path / "torch.npz"), np.load(tmp_path / "onnx.npz")
    assert 0 < np.abs(a["logits"] - b["logits"]).max() < 2e-5  # not the same code, and the same result


def test_score_takes_ids_and_patches_as_they_are(blt: Call, checkpoint: Path, tmp_path: Path) -> None:
    ids, lengths = np.array([1, 70, 2, 71, 72]), np.array([1, 2, 3])
    np.save(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "lengths.npy", lengths)
    npz = tmp_path / "out.npz"
    result = blt("score", checkpoint, tmp_path / "ids.npy", "--patch-lengths", tmp_path / "lengths.npy", "--npz", npz)
    assert result.code == 0, result.err
    assert (np.load(npz)["ids"] == ids).all()
    assert (np.load(npz)["patch_lengths"] == lengths).all()


def test_eval_counts_bits_per_byte(blt: Call, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode() + b"\0" + b"second document")
    result = blt("eval", model, tmp_path / "a.txt", "--json", "--by", "group", "--baseline", "ppmd,xz")
    report = json.loads(result.text)
    assert report["schema"] == "blt.eval/1"
    assert report["documents"] == 2
    assert report["bytes"] == len(TEXT.encode()) + len("second document")
    assert 6 < report["bits_per_byte"] < 12  # random weights: near log2(260)
    assert set(report["baselines"]) == {"ppmd", "xz"}
    assert list(report["groups"]) == ["a"]


def test_eval_equals_the_sum_over_scores(blt: Call, checkpoint: Path, tmp_path: Path) -> None:
    data = b"just one document"
    (tmp_path / "a.txt").write_bytes(data)
    np.save(tmp_path / "ids.npy", np.array([1, *(4 + b for b in data), 2]))
    blt("score", checkpoint, tmp_path / "ids.npy", "--npz", tmp_path / "s.npz")
    logits = torch.from_numpy(np.load(tmp_path / "s.npz")["logits"]).double()
    targets = torch.tensor([*(4 + b for b in data), 2])
    nats = torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum")
    report = json.loads(blt("eval", checkpoint, tmp_path / "a.txt", "--json").text)
    assert report["bits_per_byte"] == pytest.approx(nats.item() / np.log(2) / len(data), abs=1e-4)


@pytest.mark.parametrize("context", [4096, 9])
def test_eval_reads_prompts_and_counts_completions(blt: Call, checkpoint: Path, tmp_path: Path, context: int) -> None:
    prompt, completion = b"a question: ", b"and its answer"
    pair = json.dumps({"q": prompt.decode(), "a": completion.decode()})
    (tmp_path / "pairs.jsonl").write_text(pair)
    keys = ("--prompt-field", "q", "--completion-field", "a", "--split", "1/0/0")
    assert blt("data", "prepare", tmp_path / "pairs.jsonl", "-o", tmp_path / "data", *keys).code == 0
    nats, whole = 0.0, prompt + completion
    for start in range(0, len(whole), context):
        piece, end = whole[start : start + context], [2] if start + context >= len(whole) else []
        np.save(tmp_path / "ids.npy", np.array([1, *(4 + b for b in piece), *end]))
        assert blt("score", checkpoint, tmp_path / "ids.npy", "--npz", tmp_path / "s.npz").code == 0
        logits = torch.from_numpy(np.load(tmp_path / "s.npz")["logits"]).double()
        first = max(len(prompt) - start, 0)
        targets = torch.tensor([*(4 + b for b in piece), *end])[first:]
        nats += torch.nn.functional.cross_entropy(logits[first:-1], targets, reduction="sum").item()
    arguments = ("eval", checkpoint, tmp_path / "data", "--split", "train", "--context", context, "--json")
    report = json.loads(blt(*arguments).text)
    assert report["bytes"] == len(completion)
    assert report["bits_per_byte"] == pytest.approx(nats / np.log(2) / len(completion), abs=1e-4)


def test_eval_of_a_data_folder(blt: Call, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for split in ("train", "test"):
        (tmp_path / "in" / split).mkdir()
        for group in ("one", "two"):
            (tmp_path / "in" / split / f"{group}.txt").write_text(f"{split} {group}\0more of {group}\0")
    assert blt("data", "prepare", tmp_path / "in", "-o", tmp_path / "out").code == 0
    info = json.loads(blt("data", "info", tmp_path / "out", "--json").text)
    assert info["schema"] == "blt.data/1"
    assert info["splits"]["test"]["documents"] == 4
    table = blt("eval", checkpoint, tmp_path / "out", "--by", "group", "--limit", "10").text
    assert [line.split()[0] for line in table.splitlines()] == ["group", "one", "two", "ALL"]
    assert table.splitlines()[-1].split()[2] == "20"  # ten bytes of each group


def test_fail_above_exits_3_after_the_result(blt: Call, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    assert blt("eval", bundle, tmp_path / "a.txt", "--fail-above", "20").code == 0
    result = blt("eval", bundle, tmp_path / "a.txt", "--fail-above", "1.5")
    assert result.code == 3
    assert "bits/byte" in result.text
    assert "--fail-above" in result.err
    for bits in (float("nan"), float("inf")):
        with pytest.raises(CheckFailed):
            evaluate._check(bits, 20.0)


def test_a_group_named_all_is_counted_once(blt: Call, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "ALL.txt").write_text(TEXT)
    report = json.loads(blt("eval", checkpoint, tmp_path / "ALL.txt", "--by", "group", "--json").text)
    assert report["bytes"] == report["groups"]["ALL"]["bytes"] == len(TEXT.encode())


def test_eval_says_when_a_text_is_longer_than_the_model_reads_at_once(
    blt: Call, checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    """The rows of this model have 510 bytes."""
    text, short = tmp_path / "long.txt", tmp_path / "short.txt"
    text.write_bytes(b"0123456789" * 60)
    short.write_bytes(b"0123456789" * 51)
    slow = blt("eval", checkpoint, text)
    assert "texts have up to 600 bytes, a whole row of this model 510: they are scored as a stream" in slow.err
    assert "--context 510" in slow.err
    assert blt("eval", checkpoint, text, "--context", 510).err == ""
    assert "reads 510 bytes at once" in blt("eval", bundle, text).err
    for model in (checkpoint, bundle):
        assert blt("eval", model, short).err == ""


def test_eval_chooses_a_split_that_holds_text(blt: Call, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three")
    assert blt("data", "prepare", tmp_path / "a.txt", "-o", tmp_path / "d", "--split", "1/0/0").code == 0
    chosen = blt("eval", checkpoint, tmp_path / "d", "--json")
    assert json.loads(chosen.text)["bytes"] == 13
    assert "holds no text in the split test: using train (--split chooses)" in chosen.err
    refused = blt("eval", checkpoint, tmp_path / "d", "--split", "test")
    assert refused.code == 2
    assert "holds no text in the split 'test'; choose another with --split: train" in refused.err


def test_inspect(blt: Call, checkpoint: Path, bundle: Path) -> None:
    from blt.checkpoint.models import load

    loaded = load(checkpoint, trainable=True)
    report = json.loads(blt("inspect", checkpoint, "--json", "--tensors").text)
    assert loaded.blt is not None
    assert loaded.entropy is not None
    counted = sum(p.numel() for m in (loaded.blt, loaded.entropy) for p in m.parameters())
    assert report["parameters"]["total"] == counted
    assert "blt.decoder.output.weight" in {t["name"] for t in report["tensors"]}
    read = sum(loaded.blt.config.weights_read(4.5).values()) + loaded.entropy.config.weights_read()
    weight_bytes = report["weight_bytes_per_byte"]
    assert weight_bytes["total"] == pytest.approx(4 * read)
    assert report["patch_rule"]["entropy_dtype"] == "float32"
    inspected = json.loads(blt("inspect", bundle, "--json").text)
    of_bundle = inspected["weight_bytes_per_byte"]
    assert of_bundle["hash_tables"] == weight_bytes["hash_tables"]
    assert of_bundle["latent"] == pytest.approx(weight_bytes["latent_transformer"], rel=0.01)
    assert of_bundle["total"] == pytest.approx(weight_bytes["total"], rel=0.01)  # rotary tables are read by row
    text = blt("inspect", bundle, "--tensors").text
    assert "parity with PyTorch" in text
    assert "decoder.logits" in text
    assert json.loads(blt("inspect", bundle, "--json").text)["manifest"]["format"] == "blt-bundle"


def test_patch_with_a_bundle(blt: Call, checkpoint: Path, bundle: Path) -> None:
    lengths = [
        json.loads(blt("patch", TEXT, "--model", m, "--json").text)["patch_lengths"] for m in (checkpoint, bundle)
    ]
    assert lengths[0] == lengths[1]


def test_a_quantised_graph_is_evaluated_and_shown(blt: Call, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT * 3)
    out = tmp_path / "bundle"
    options = ["--precision-of", "latent=int4", "--eval-data", tmp_path / "text", "--capacity", 128]
    exported = blt("export", checkpoint, "-o", out, *options, "-q")
    assert exported.code == 0, exported.err
    shown = blt("inspect", out)
    for text in (exported.text, shown.text):
        assert "encoder fp32, latent int4, decoder fp32" in " ".join(text.split())
        assert "latent.weights" in text
        assert "bits per byte" in text
        assert "0 lost, 0 new" in text
    assert blt("generate", out, TEXT, "-n", 5, "--raw", "--ignore-eos").code == 0


def test_the_exported_bundle_is_also_in_the_triton_repository(bundle: Path) -> None:
    model = bundle.parent / "models/bundle"
    assert (model / "config.pbtxt").is_file()
    assert Bundle.open(model / "1/bundle", "full").manifest == Bundle.open(bundle).manifest


def test_export_refuses_a_folder_that_is_not_empty(blt: Call, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep me")
    result = blt("export", checkpoint, "-o", tmp_path)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert (tmp_path / "precious").read_text() == "keep me"


def test_bundle_and_backend_must_fit(blt: Call, bundle: Path, checkpoint: Path) -> None:
    for arguments in (
        ["generate", bundle, "x", "--backend", "torch"],
        ["generate", bundle, "x", "--entropy-model", checkpoint],
        ["export", bundle, "-o", bundle.parent / "again"],
        ["generate", bundle, "x", "--device", "tpu"],
    ):
        result = blt(*arguments)
        assert result.code == 2
        assert result.err.count("\n") == 1


def test_a_bundle_runs_without_torch_and_onnx(blt_process: Call, bundle: Path) -> None:
    done = blt_process("generate", bundle, "x", "-n", 4, "--raw", PYTHONPROFILEIMPORTTIME="1")
    assert done.code == 0
    loaded = {line.split("|")[-1].strip() for line in done.err.splitlines()}
    assert "onnxruntime" in loaded
    assert not {"torch", "onnx", "blt.checkpoint"} & loaded


def test_an_export_stores_a_chat_template(blt: Call, checkpoint: Path, tmp_path: Path) -> None:
    template, out = tmp_path / "chat.jinja", tmp_path / "bundle"
    template.write_text("{% for m in messages %}")
    command = ("export", checkpoint, "-o", out, "-q", "--no-check", "--chat-template", template)
    refused = blt(*command)
    assert refused.code == 2
    assert "the chat template is not valid" in refused.err
    template.write_text("{{ messages[0].content }}")
    assert blt(*command).code == 0
    assert json.loads(blt("inspect", out, "--json").text)["manifest"]["chat_template"] == template.read_text()
    assert "25 characters" in blt("inspect", out).text
    missing = blt("export", checkpoint, "-o", out, "--force", "--chat-template", tmp_path / "none")
    assert "--chat-template: cannot read" in missing.err


def test_a_closed_pipe_is_silent(bundle: Path) -> None:
    program = f"{sys.executable} -m blt.cli generate {bundle} x -n 200 --raw --ignore-eos | head -c 1"
    path = os.pathsep.join(str(REPO / part) for part in ("", "export", "runtime"))
    done = subprocess.run(["bash", "-c", program], capture_output=True, env={**os.environ, "PYTHONPATH": path})
    assert len(done.stdout) == 1
    assert done.stderr == b""


def test_the_python_example_of_the_readme_runs(bundle: Path) -> None:
    readme = (REPO / "README.md").read_text()
    example = readme.split("```python\n")[1].split("```")[0]
    path = os.pathsep.join(str(REPO / part) for part in ("export", "runtime"))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, cwd=bundle.parent, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout


def test_bfloat16_entropies_equal_those_of_facebook(blt: Call, golden: Path, bundle: Path, tmp_path: Path) -> None:
    """The switch reproduces what facebookresearch/blt computes (spec section 4); bundles and exports refuse it."""
    with np.load(golden / "a" / "cases.npz", allow_pickle=False) as cases:
        ids, theirs = cases["code/tokens"], cases["code/entropies_bf16_loader"]
    np.save(tmp_path / "ids.npy", ids)
    found = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.npz"
        assert (
            blt("score", golden / "a" / "blt", tmp_path / "ids.npy", "--npz", out, "--entropy-dtype", dtype).code == 0
        )
        with np.load(out) as arrays:
            found[dtype] = arrays["entropies"].astype(np.float32)
    rounded = found["bfloat16"]
    assert not (rounded.view(np.uint32) & 0xFFFF).any()
    assert (found["float32"].view(np.uint32) & 0xFFFF).any()
    np.testing.assert_allclose(rounded, theirs, atol=0.12)  # older kernels sum otherwise
    switch = ("--entropy-dtype", "bfloat16")
    assert "computes entropies in float32" in blt("generate", bundle, "x", *switch).err
    assert "entropies in float32" in blt("generate", golden / "a" / "blt", "x", "--backend", "onnx", *switch).err
    assert blt("generate", bundle, "x", "--entropy-dtype", "float16").code == 2
    converted = blt("convert", golden / "a" / "blt", "-o", tmp_path / "model.pt", "--to", "native", *switch)
    assert converted.code == 0, converted.err
    rule = json.loads(blt("inspect", tmp_path / "model.pt", "--json").text)["patch_rule"]
    assert rule["entropy_dtype"] == "bfloat16"
