"""The adapter for lm-evaluation-harness: the scorers' likelihoods, windows, generation, and the harness itself.

Where the library is not installed (CI leaves it out: it brings much with it), a stand-in of the two classes that the
adapter touches takes its place, and what runs the harness itself is skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blt.checkpoint.models import Checkpoint, load, save
from blt.cli import run
from blt.cli.commands import lm_eval as commands
from blt.evaluate.rows import scorer_of
from blt.evaluate.scoring import Scored, Scorer, Unit
from blt_runtime.errors import UsageError
from tests.runtime.bundles import write_bundle
from tests.tiny import tiny

INSTALLED = importlib.util.find_spec("lm_eval") is not None
Make = Callable[..., Any]


class Request:
    """The attributes of the harness's `Instance` that the adapter reads."""

    def __init__(self, *args: Any):
        self.args = args


class Hook:
    def add_partial(self, *args: Any) -> None:
        """The harness's cache."""


class StandIn:
    """The harness's LM, as far as the adapter uses it."""

    def __init__(self) -> None:
        self.cache_hook = Hook()


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with the real library or with the replacement above."""
    if not INSTALLED:
        modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api")}
        modules |= {f"lm_eval.api.{name}": types.ModuleType(name) for name in ("model", "registry")}
        contents = {
            "lm_eval.api.model": ("LM", StandIn),
            "lm_eval.api.registry": ("register_model", lambda name: lambda made: made),
        }
        for name, (attribute, value) in contents.items():
            setattr(modules[name], attribute, value)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "blt.evaluate.lm_eval", raising=False)
    return importlib.import_module("blt.evaluate.lm_eval")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lm_eval")
    both = tiny()
    save(folder / "model.pt", both)
    save(folder / "byte.pt", Checkpoint(None, both.entropy, None))
    return {path.stem: path for path in folder.iterdir()}


def test_likelihoods_are_the_scorers(adapter: Any, files: dict[str, Path]) -> None:
    model, scorer = adapter.ByteModel(files["model"], batch_size=8), scorer_of(load(files["model"]))
    requests = [Request("The größte ", "city"), Request("", "alone"), Request("x", "")]
    found = model.loglikelihood(requests, disable_tqdm=True)
    for (logarithm, _), request in zip(found, requests, strict=True):
        context, continuation = request.args
        assert logarithm == pytest.approx(-scorer.bits(continuation.encode(), context.encode()) * math.log(2))
    assert found[2] == (0.0, True)
    (rolling,) = model.loglikelihood_rolling([Request("a whole text")], disable_tqdm=True)
    assert rolling == pytest.approx(-scorer.bits(b"a whole text") * math.log(2))


def test_generated_text_is_scored_as_greedy(adapter: Any, files: dict[str, Path]) -> None:
    model = adapter.ByteModel(files["model"])
    (written,) = model.generate_until([Request("Once upon", {"until": [], "max_gen_toks": 2})], disable_tqdm=True)
    text = adapter.generate(model.opened.model, b"Once upon", {"max_gen_toks": 2}, seed=0)
    assert len(text) == 8
    assert written == text.decode(errors="replace")
    scorer = model.opened.scorer
    assert adapter.score(scorer, text, b"Once upon").greedy
    assert not adapter.score(scorer, text[:-1] + bytes([text[-1] ^ 1]), b"Once upon").greedy


def test_a_bundle_has_a_provider_and_a_checkpoint_a_device(
    adapter: Any, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr("blt_runtime.Model.open", lambda path, **options: found.append(options))
    write_bundle(tmp_path / "bundle")
    given = {"provider": "tensorrt", "trust_engines": "true", "engine_cache": "cache"}
    adapter.ByteModel(tmp_path / "bundle", device="cpu", **given)
    assert found == [{"threads": None, **given, "trust_engines": True}]
    with pytest.raises(UsageError, match="is a checkpoint: provider, trust_engines and engine_cache are for bundles"):
        adapter.ByteModel(files["model"], provider="cuda")


@pytest.mark.parametrize("option", [[], ["--provider", "cuda", "--trust-engines"]])
def test_the_command_passes_options_of_devices_on(
    option: list[str], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[list[str]] = []
    monkeypatch.setattr(commands, "_run", passed.append)
    assert run(["lm-eval", str(files["model"]), "--tasks", "x", *option]) == 0
    arguments = passed[0][passed[0].index("--model_args") + 1]
    assert arguments.endswith("provider=cuda,trust_engines=True" if option else "provider=cpu")


def test_generation_stops_before_a_stop_string_and_accepts_long_contexts(adapter: Any, files: dict[str, Path]) -> None:
    model = adapter.ByteModel(files["model"]).opened.model
    text = adapter.generate(model, b"Once upon", {"max_gen_toks": 4}, seed=0)
    stop = text[5:7].decode("latin-1")
    cut = adapter.generate(model, b"Once upon", {"max_gen_toks": 4, "until": [stop.encode("latin-1")]}, seed=0)
    assert cut == text[: text.find(text[5:7])]
    assert adapter.generate(model, b"many words " * 100, {"max_gen_toks": 3, "until": "\0\0\0"}, seed=0)


def test_sampling_follows_the_seed(adapter: Any, files: dict[str, Path]) -> None:
    model = adapter.ByteModel(files["model"]).opened.model
    options = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    once, again, other = (adapter.generate(model, b"Once", options, seed=seed) for seed in (1, 1, 2))
    assert once == again != other


class Counting(Scorer):
    """One bit per byte of text; records the calls."""

    unit: Unit = "byte"
    capacity = 10

    def __init__(self) -> None:
        self.calls: list[tuple[bytes, bytes]] = []

    def measure(self, text: bytes, prompt: bytes = b"", eos: bool = False, before: bytes = b"") -> Scored:
        assert len(text) + len(prompt) <= self.capacity
        self.calls.append((prompt, text))
        return Scored(float(len(text)), 1, True)


@pytest.mark.parametrize(
    ("text", "prompt", "calls"),
    [
        (b"0123456789", b"", [(b"", b"0123456789")]),
        (b"0123456789abcdefghijkl", b"", [(b"", b"0123456789"), (b"", b"abcdefghij"), (b"cdefghij", b"kl")]),
        (b"xy", b"a long prompt", [(b"g prompt", b"xy")]),
        (b"0123456789ab", b"prompt", [(b"", b"0123456789"), (b"23456789", b"ab")]),
    ],
)
def test_windows_predict_each_byte_once_with_as_much_context_as_fits(
    adapter: Any, text: bytes, prompt: bytes, calls: list[tuple[bytes, bytes]]
) -> None:
    scorer = Counting()
    assert adapter.score(scorer, text, prompt).bits == len(text)
    assert scorer.calls == calls


def test_a_byte_level_model_scores_and_cannot_generate(adapter: Any, files: dict[str, Path]) -> None:
    model = adapter.ByteModel(files["byte"])
    assert model.loglikelihood([Request("a", "b")], disable_tqdm=True)[0][0] < 0
    with pytest.raises(UsageError, match="no BLT"):
        model.generate_until([Request("a", {})], disable_tqdm=True)


def test_weights_and_hash_tables_are_on_the_device(adapter: Any, files: dict[str, Path]) -> None:
    scorer = adapter.ByteModel(files["model"], device="meta").opened.scorer
    assert scorer.device == "meta"
    held = dict(scorer.blt.named_parameters())
    assert any("hash" in name for name in held)
    assert {parameter.device.type for parameter in held.values()} == {"meta"}


@pytest.mark.slow
def test_a_bundle_gives_the_results_of_its_checkpoint(adapter: Any, files: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert run(["export", str(files["model"]), "-o", str(tmp_path / "bundle"), "--no-check", "-q"]) == 0
    bundle, checkpoint = adapter.ByteModel(tmp_path / "bundle"), adapter.ByteModel(files["model"])
    request = [Request("The größte ", "city")]
    ours, theirs = (m.loglikelihood(request, disable_tqdm=True)[0] for m in (bundle, checkpoint))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    with pytest.raises(UsageError, match="bundle"):
        adapter.ByteModel(tmp_path / "bundle", device="cuda")


TASK = """
task: yes_or_no
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of two questions."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": f"Is it {n}?", "answer": n % 2}) + "\n" for n in range(2)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "yes_or_no.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.mark.skipif(not INSTALLED, reason="the extra lm-eval is not installed (CI leaves it out): pip install lm-eval")
def test_the_harness_runs_a_task(task: Path, files: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["--tasks", "yes_or_no", "--include_path", task, "--output_path", tmp_path / "results"]
    assert run(["lm-eval", str(files["byte"]), *map(str, arguments), "--log_samples"]) == 0
    (results,) = (tmp_path / "results").rglob("results_*.json")
    report = json.loads(results.read_text())["results"]["yes_or_no"]
    scorer = scorer_of(load(files["byte"]))
    right = 0
    for n in range(2):
        costs = [scorer.bits(choice, f"Is it {n}?".encode()) for choice in (b" yes", b" no")]
        right += costs.index(min(costs)) == n % 2
    assert report["acc,none"] == right / 2


def test_usage_errors_are_reported_before_the_harness_is_loaded(files: dict[str, Path], capsys: Any) -> None:
    assert run(["lm-eval", str(files["byte"]), "--model", "hf"]) == 2
    assert run(["lm-eval", "/nowhere/model.pt"]) == 2
    assert "leave it out" in capsys.readouterr().err


def test_a_missing_harness_names_its_extra(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(["lm-eval", str(files["byte"]), "--tasks", "x"]) == 4
    assert "blt-lm[lm-eval]" in capsys.readouterr().err
