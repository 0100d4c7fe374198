"""The Python model of a Triton repository, driven in this process on the null backend."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blt.triton import repository
from blt_runtime.engine.batch import Batch
from blt_runtime.ids import BOS, OFFSET
from tests.runtime.streams import model_of
from tests.triton import fake
from tests.triton.fake import SPEC, MetricFamily, Request, Sender, TritonError, eventually

Load = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("triton")
    return repository.write(fake.bundle(top / "bundle"), top / "models", "tiny")


@pytest.fixture
def load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    made = []

    def call(**settings: str) -> Any:
        made.append(fake.loaded(folder, monkeypatch, **({"streams": "4"} | settings)))
        return made[-1]

    fake.misused.clear()
    yield call
    for model in made:
        if model._thread.is_alive():
            model.finalize()
    assert not fake.misused


@pytest.fixture
def model(load: Load) -> Any:
    return load()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Rounds run only while it is set."""
    opened, plain = threading.Event(), Batch.round

    def gated(self: Batch) -> Any:
        opened.wait(60)
        return plain(self)

    monkeypatch.setattr(Batch, "round", gated)
    yield opened
    opened.set()


def alone(prompt: str, n: int, **options: Any) -> list[int]:
    """The ids of what `Stream` generates."""
    stream = model_of(SPEC).stream()
    stream.append(prompt)
    return [byte + OFFSET for byte in b"".join(stream.generate(n, **options))]


def ask(model: Any, **inputs: Any) -> Request:
    request = Request.of(**inputs)
    assert model.execute([request]) is None
    return request


# --- texts -----------------------------------------------------------------------------------------------------


def test_a_request_gets_the_text_of_a_stream_in_one_response(model: Any) -> None:
    response = ask(model, PROMPT="Once", MAX_TOKENS=40, TEMPERATURE=0.8, SEED=3, IGNORE_EOS=True).only()
    ids = alone("Once", 40, temperature=0.8, seed=3, stop_at_eos=False)
    assert response["OUTPUT_IDS"] == ids
    assert response["TEXT"] == bytes(id - OFFSET for id in ids).decode(errors="replace")
    assert response["FINISH_REASON"] == "length"
    assert (response["PROMPT_TOKENS"], response["COMPLETION_TOKENS"]) == (4, 40)


def test_a_stream_is_the_same_text_in_pieces(model: Any) -> None:
    for _ in range(50):  # where this thread is late, all text is there at once
        responses = ask(model, PROMPT="Once", MAX_TOKENS=40, SEED=3, IGNORE_EOS=True, STREAM=True).responses()
        if len(responses) > 1:
            break
    assert len(responses) > 1
    ids = [id for response in responses for id in response["OUTPUT_IDS"]]
    assert ids == alone("Once", 40, seed=3, stop_at_eos=False)
    assert "".join(r["TEXT"] for r in responses) == bytes(id - OFFSET for id in ids).decode(errors="replace")
    assert [r["FINISH_REASON"] for r in responses] == [""] * (len(responses) - 1) + ["length"]
    assert responses[-1]["COMPLETION_TOKENS"] == 40


def test_a_slow_server_gets_longer_pieces(model: Any) -> None:
    request = Request.of(PROMPT="Once", MAX_TOKENS=200, SEED=3, IGNORE_EOS=True, STREAM=True)
    request.sender.seconds = 0.02
    model.execute([request])
    responses = request.responses()
    assert len(responses) < 100
    assert [id for r in responses for id in r["OUTPUT_IDS"]] == alone("Once", 200, seed=3, stop_at_eos=False)


def test_requests_run_at_the_same_time_and_each_gets_its_own_text(model: Any) -> None:
    inputs = [{"PROMPT": f"prompt {i}", "MAX_TOKENS": 20 + i, "SEED": i} for i in range(10)]
    requests = [Request.of(**each, IGNORE_EOS=True, STREAM=i % 2 == 0) for i, each in enumerate(inputs)]
    model.execute(requests[:5])
    model.execute(requests[5:])
    for i, request in enumerate(requests):
        assert request.ids() == alone(f"prompt {i}", 20 + i, seed=i, stop_at_eos=False)


@pytest.mark.parametrize("ids", [[103, 104], [BOS, 103, 104]], ids=["without BOS", "with BOS"])
def test_ids_are_a_prompt_and_bos_is_put_in_front_once(model: Any, ids: list[int]) -> None:
    response = ask(model, INPUT_IDS=ids, MAX_TOKENS=20, TEMPERATURE=0, IGNORE_EOS=True).only()
    assert response["OUTPUT_IDS"] == alone("cd", 20, temperature=0, stop_at_eos=False)
    assert response["PROMPT_TOKENS"] == len(ids)


def test_an_empty_prompt_is_bos_alone(model: Any) -> None:
    assert ask(model, PROMPT="", MAX_TOKENS=9, SEED=1, IGNORE_EOS=True).ids() == alone("", 9, seed=1, stop_at_eos=False)


def test_the_options_are_those_of_a_stream(model: Any) -> None:
    request = ask(model, PROMPT="a", MAX_TOKENS=60, TEMPERATURE=0.7, TOP_P=0.9, TOP_K=50, MIN_P=0.001, SEED=5)
    assert request.ids() == alone("a", 60, temperature=0.7, top_p=0.9, top_k=50, min_p=0.001, seed=5)


def test_a_top_k_of_zero_is_off(model: Any) -> None:
    assert ask(model, PROMPT="a", MAX_TOKENS=30, TOP_K=0, SEED=5).ids() == alone("a", 30, seed=5)


def test_a_stop_string_ends_the_text_before_it(model: Any) -> None:
    whole = bytes(id - OFFSET for id in alone("a", 60, temperature=0, stop_at_eos=False))
    stop = whole[20:23]
    response = ask(model, PROMPT="a", MAX_TOKENS=60, TEMPERATURE=0, IGNORE_EOS=True, STOP=[b"not in it", stop]).only()
    assert bytes(id - OFFSET for id in response["OUTPUT_IDS"]) == whole[: whole.index(stop)]
    assert response["FINISH_REASON"] == "stop"


def test_a_character_is_not_divided(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces(data: bytes) -> list[bytes]:
        characters = fake.program(folder, monkeypatch).Characters()
        fed = [characters.feed(data[i : i + 1]) for i in range(len(data))]
        return [piece for piece in [*fed, characters.flush()] if piece]

    data = "aé€🚀".encode()
    assert pieces(data) == [c.encode() for c in "aé€🚀"]
    assert pieces(data[:-1]) == [b"a", "é".encode(), "€".encode(), data[6:-1]]
    assert b"".join(pieces(b"\xff\xc3a\xe2\x82")) == b"\xff\xc3a\xe2\x82"


# --- errors ----------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"MAX_TOKENS": 5}, "either PROMPT or INPUT_IDS"),
    "two prompts": ({"PROMPT": "a", "INPUT_IDS": [70]}, "either PROMPT or INPUT_IDS"),
    "an unknown id": ({"INPUT_IDS": [70, 260]}, "ids must be in 0..259"),
    "a temperature below 0": ({"PROMPT": "a", "TEMPERATURE": -1.0}, "temperature"),
    "no bytes": ({"PROMPT": "a", "MAX_TOKENS": 0}, "n must be"),
    "an empty stop string": ({"PROMPT": "a", "STOP": [""]}, "stop string"),
    "more than fits": ({"PROMPT": "a" * 280, "MAX_TOKENS": 50}, "exceed the 300"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_an_error_of_that_request_alone(model: Any, name: str) -> None:
    inputs, message = WRONG[name]
    good, bad, other = (Request.of(PROMPT="b", MAX_TOKENS=20, SEED=1), Request.of(**inputs), Request.of(PROMPT="c"))
    model.execute([good, bad, other])
    error = bad.error()
    assert error.code == TritonError.INVALID_ARG
    assert message in error.message
    assert good.ids() == alone("b", 20, seed=1)
    assert other.only().error is None


def test_a_full_queue_is_unavailable(load: Load, gate: threading.Event) -> None:
    model = load(streams="1", max_queue="1")
    requests = [ask(model, PROMPT="a", MAX_TOKENS=5, SEED=i) for i in range(3)]
    assert requests[2].error().code == TritonError.UNAVAILABLE
    gate.set()
    for i in range(2):
        assert requests[i].ids() == alone("a", 5, seed=i)


def test_a_model_that_fails_in_a_round_is_an_internal_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Batch) -> Any:
        raise ZeroDivisionError("a fault of ours")

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "round", fail)
        error = ask(model, PROMPT="a").error()
    assert error.code == TritonError.INTERNAL
    assert "a fault of ours" in error.message
    assert ask(model, PROMPT="a", MAX_TOKENS=9, SEED=1).ids() == alone("a", 9, seed=1)


# --- cancellation and the end ----------------------------------------------------------------------------------


def idle(model: Any) -> bool:
    return bool(model._scheduler.load == (0, 0) and not model._calls)


def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Batch.round

    def slowly(self: Batch) -> Any:
        time.sleep(0.005)
        return plain(self)

    monkeypatch.setattr(Batch, "round", slowly)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_cancelled_request_ends_before_its_limit(model: Any, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    slow(monkeypatch)
    request = ask(model, PROMPT="a", MAX_TOKENS=280, IGNORE_EOS=True, STREAM=stream)
    request.sender.cancelled = True
    assert request.error().code == TritonError.CANCELLED
    eventually(lambda: idle(model))
    assert MetricFamily.all["vllm:generation_tokens_total"].value < 280


def test_a_waiting_request_is_cancelled(load: Load, gate: threading.Event) -> None:
    model = load(streams="1")
    running = ask(model, PROMPT="a", MAX_TOKENS=20, SEED=2)
    waiting = ask(model, PROMPT="b", MAX_TOKENS=280, IGNORE_EOS=True)
    waiting.sender.cancelled = True
    time.sleep(3 * 0.05)
    gate.set()
    assert waiting.error().code == TritonError.CANCELLED
    assert running.ids() == alone("a", 20, seed=2)


def test_a_client_that_is_gone_frees_its_row(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    request = Request.of(PROMPT="a", MAX_TOKENS=280, IGNORE_EOS=True, STREAM=True)
    request.sender.gone = True
    model.execute([request])
    eventually(lambda: idle(model))
    assert MetricFamily.all["vllm:generation_tokens_total"].value < 280


def test_unloading_waits_for_the_running_requests(load: Load, gate: threading.Event) -> None:
    model = load()
    requests = [ask(model, PROMPT="a", MAX_TOKENS=50, SEED=i) for i in range(8)]
    ending = threading.Thread(target=model.finalize)
    ending.start()
    gate.set()
    ending.join()
    for i, request in enumerate(requests):
        assert request.ids() == alone("a", 50, seed=i)


def test_unloading_ends_what_does_not_end(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load()
    monkeypatch.setitem(type(model).finalize.__globals__, "DRAIN", 0.0)
    slow(monkeypatch)
    request = ask(model, PROMPT="a", MAX_TOKENS=280, IGNORE_EOS=True)
    model.finalize()
    assert request.error().code == TritonError.CANCELLED


# --- settings and metrics --------------------------------------------------------------------------------------


def test_metrics_count_tokens_and_requests(model: Any) -> None:
    for i in range(3):
        ask(model, PROMPT="four", MAX_TOKENS=10, SEED=i, IGNORE_EOS=True).only()
    ask(model, MAX_TOKENS=5).error()
    eventually(lambda: idle(model))
    found = MetricFamily.all
    assert found["vllm:prompt_tokens_total"].value == 12
    assert found["vllm:generation_tokens_total"].value == 30
    assert found["vllm:request_success_total"].value == 3
    eventually(lambda: found["blt:bytes_per_patch"].value >= 1)
    assert found["vllm:num_requests_running"].labels == {"model": "tiny", "version": "1"}


def test_metrics_end_before_their_families(load: Load) -> None:
    model = load()
    assert len(MetricFamily.all) == 6
    model.finalize()
    assert not MetricFamily.all
    assert not fake.misused


def test_a_server_without_metrics_serves(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetricFamily, "off", True)
    assert ask(load(), PROMPT="a", MAX_TOKENS=9, SEED=1).ids() == alone("a", 9, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stream": "4"}, "did you mean 'streams'"),
        ({"streams": "many"}, "streams must be a whole number"),
        ({"streams": "0"}, "streams must be"),
        ({"capacity": "9000"}, "capacity"),
    ],
    ids=["an unknown name", "no number", "no streams", "too much"],
)
def test_wrong_settings_fail_when_the_model_is_loaded(load: Load, settings: dict[str, str], message: str) -> None:
    with pytest.raises(fake.TritonModelException, match=message):
        load(**settings)


def test_settings_of_the_python_backend_are_left_to_it(load: Load) -> None:
    model = load(EXECUTION_ENV_PATH="/opt/venv", prefix_bytes="1000000", capacity="200", threads="1")
    assert ask(model, PROMPT="a" * 150, MAX_TOKENS=60).error().code == TritonError.INVALID_ARG


def test_a_damaged_bundle_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repository.write(fake.bundle(tmp_path / "bundle"), tmp_path / "models", "tiny")
    (folder / "1/bundle/latent.onnx").unlink()
    with pytest.raises(fake.TritonModelException, match=r"latent\.onnx is missing"):
        fake.program(folder, monkeypatch).TritonPythonModel().initialize(fake.arguments())


def test_a_call_after_the_last_response_is_found() -> None:
    fake.misused.clear()
    sender = Sender()
    sender.send(fake.InferenceResponse([]), fake.FINAL)
    sender.is_cancelled()
    assert fake.misused == ["is_cancelled after the last response"]


def test_two_calls_at_the_same_time_are_found() -> None:
    fake.misused.clear()
    with fake.entered("send"):
        fake.Metric({}).set(1)
    assert fake.misused == ["set during another call"]
