"""A Byte Latent Transformer on Triton's Python backend. Written by `blt export --triton`; inputs, outputs and settings
are in config.pbtxt.

Requests run in one batch (`blt_runtime.Scheduler`): a request's bytes are the same whatever else runs with it. The
interpreter of the Python backend needs `pip install 'blt-runtime[cpu]'`, or `[gpu]` for the provider cuda.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from blt_runtime import BltError, Model, Request, Scheduler
from blt_runtime.errors import Cancelled, CapacityError, QueueFull, UsageError, nearest, shown
from blt_runtime.ids import BOS, encode

SETTINGS = {
    "bundle": "",
    "provider": "cpu",
    "streams": "16",
    "max_queue": "256",
    "capacity": "",
    "threads": "",
    "prefix_bytes": "0",
}
"""The parameters of config.pbtxt, and what they are if left out. bundle: the folder next to this file."""
MAX_TOKENS = 256
SERVER = threading.Lock()
"""Held in every call of the Python backend: it crashes when several threads send responses and set metrics at once."""
POLL = 0.05
"""Seconds between two looks at which requests were cancelled."""
DRAIN = 25.0
"""Seconds that running requests have when the model is unloaded."""
LAST = 5.0
"""Seconds to send the last responses after that."""


class TritonPythonModel:
    """The model, for as long as the server has it loaded.

    `execute` submits requests; one thread, with an event loop, sends all responses. What calls the server holds SERVER.
    """

    def initialize(self, args: dict[str, str]) -> None:
        try:
            settings = _settings(json.loads(args["model_config"]))
            folder = Path(settings["bundle"] or Path(__file__).parent / "bundle")
            threads, provider = _whole(settings, "threads"), settings["provider"]
            model = Model.open(folder, threads=threads, provider=provider, batched=True)
            self._scheduler = Scheduler(
                model,
                streams=_whole(settings, "streams") or 0,
                capacity=_whole(settings, "capacity"),
                waiting=_whole(settings, "max_queue") or 0,
                prefix_bytes=_whole(settings, "prefix_bytes") or 0,
            )
        except BltError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._metrics = Metrics({"model": args["model_name"], "version": args["model_version"]})
        self._calls: set[Call] = set()
        self._ending = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="blt-responses", daemon=True)
        self._thread.start()
        self._watcher = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    def execute(self, requests: list[Any]) -> None:
        """Begins the requests and returns."""
        with SERVER:
            for request in requests:
                sender = request.get_response_sender()
                try:
                    call = self._submit(request, sender)
                except Exception as error:  # of this request; the others go on
                    sender.send(_failure(error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                else:
                    self._calls.add(call)
                    asyncio.run_coroutine_threadsafe(self._answer(call), self._loop)

    def finalize(self) -> None:
        """Waits for the running requests, then ends what still runs."""
        self._wait(DRAIN)
        self._scheduler.close()
        self._wait(LAST)
        self._ending = True
        self._watcher.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._metrics.close()

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._calls and time.monotonic() < until:
            time.sleep(POLL)

    def _submit(self, request: Any, sender: Any) -> Call:
        prompt = _prompt(request)
        ids = np.array(prompt if prompt[:1] == [BOS] else [BOS, *prompt], np.int64)
        n = _scalar(request, "MAX_TOKENS")
        submitted = self._scheduler.submit_ids(ids, MAX_TOKENS if n is None else n, **_options(request))
        return Call(submitted, sender, len(prompt), streams=bool(_scalar(request, "STREAM")))

    async def _answer(self, call: Call) -> None:
        try:
            await call.answer()
        except Exception as error:
            call.fail(error)
        finally:
            call.cancel()
            self._metrics.add("vllm:prompt_tokens_total", call.prompt_tokens)
            self._metrics.add("vllm:generation_tokens_total", call.generated)
            self._metrics.add("vllm:request_success_total", call.succeeded)
            self._calls.discard(call)

    async def _watch(self) -> None:
        """Cancels the requests that their clients have cancelled, and keeps the gauges."""
        while not self._ending:
            await asyncio.sleep(POLL)
            for call in list(self._calls):
                call.look()
            running, waiting = self._scheduler.load
            self._metrics.set("vllm:num_requests_running", running)
            self._metrics.set("vllm:num_requests_waiting", waiting)
            if (counts := self._scheduler.counts).patches:
                self._metrics.set("blt:bytes_per_patch", counts.tokens / counts.patches)


class Call:
    """One request between Triton and the scheduler. All methods run in the thread that sends responses. Nothing is
    asked of Triton after the last response: the server has forgotten the request then."""

    def __init__(self, request: Request, sender: Any, prompt_tokens: int, *, streams: bool) -> None:
        self._request, self._sender, self._streams = request, sender, streams
        self.prompt_tokens = prompt_tokens
        self._held, self._posting, self._ended = b"", False, False

    @property
    def generated(self) -> int:
        return self._request.generated

    @property
    def succeeded(self) -> bool:
        return self._request.finish in ("stop", "eos", "length")

    async def answer(self) -> None:
        """Sends the text: as it is generated, or in one response. Raises the BltError that ended the request."""
        loop, characters = asyncio.get_running_loop(), Characters()
        async for piece in self._request:
            self._held += characters.feed(piece)
            if self._streams and self._held and not self._posting:
                self._posting = True
                loop.call_soon(self._post)  # after all pieces that are there already: a slow server gets longer ones
        self._held += characters.flush()
        finish = "length" if self._request.finish == "length" else "stop"
        self._send(lambda: self._response(finish), final=True)

    def fail(self, error: Exception) -> None:
        """Sends the error as the last response."""
        _quietly(self._send, lambda: _failure(error), True)

    def look(self) -> None:
        """Cancels the request if its client has."""
        with SERVER:
            if not self._ended and self._sender.is_cancelled():
                self._request.cancel()

    def cancel(self) -> None:
        """Frees the row, if the request still has one."""
        self._request.cancel()

    def _post(self) -> None:
        """Sends what there is."""
        self._posting = False
        try:
            if self._held:
                self._send(self._response)
        except Exception:
            self.cancel()
            raise

    def _send(self, make: Callable[[], Any], final: bool = False) -> None:
        with SERVER:
            if not self._ended:
                self._ended = final
                self._sender.send(make(), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)

    def _response(self, finish: str = "") -> Any:
        data, self._held = self._held, b""
        text = np.array([data.decode(errors="replace").encode()], np.object_)
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor("TEXT", text),
                pb_utils.Tensor("OUTPUT_IDS", encode(data, bos=False).astype(np.int32)),
                pb_utils.Tensor("FINISH_REASON", np.array([finish.encode()], np.object_)),
                pb_utils.Tensor("PROMPT_TOKENS", np.array([self.prompt_tokens], np.int32)),
                pb_utils.Tensor("COMPLETION_TOKENS", np.array([self.generated], np.int32)),
            ]
        )


class Characters:
    """Holds back bytes that begin a character, until it is complete or cannot be one."""

    def __init__(self) -> None:
        self._decoder, self._held = codecs.getincrementaldecoder("utf-8")(errors="replace"), b""

    def feed(self, piece: bytes) -> bytes:
        """The bytes up to the end of the last whole character."""
        self._held += piece
        self._decoder.decode(piece)
        size = len(self._held) - len(self._decoder.getstate()[0])
        whole, self._held = self._held[:size], self._held[size:]
        return whole

    def flush(self) -> bytes:
        """The bytes held back."""
        rest, self._held = self._held, b""
        return rest


# --- inputs ----------------------------------------------------------------------------------------------------


def _prompt(request: Any) -> list[int]:
    """The ids as they were sent, without a BOS of ours. Raises UsageError unless there is one prompt."""
    text, ids = _values(request, "PROMPT"), _values(request, "INPUT_IDS")
    if (text is None) == (ids is None):
        raise UsageError("give either PROMPT or INPUT_IDS")
    if ids is not None:
        return [int(id) for id in ids]
    return [int(id) for id in encode(text[0] if text else b"", bos=False)]


def _options(request: Any) -> dict[str, Any]:
    """The keywords of `Scheduler.submit_ids`; an input that was not sent is left out."""
    found = {
        "temperature": _scalar(request, "TEMPERATURE"),
        "top_p": _scalar(request, "TOP_P"),
        "min_p": _scalar(request, "MIN_P"),
        "seed": _scalar(request, "SEED"),
        "stop": _values(request, "STOP"),
    }
    if (top_k := _scalar(request, "TOP_K")) is not None and top_k > 0:
        found["top_k"] = top_k
    if _scalar(request, "IGNORE_EOS"):
        found["stop_at_eos"] = False
    return {name: value for name, value in found.items() if value is not None}


def _scalar(request: Any, name: str) -> Any:
    values = _values(request, name)
    return values[0] if values else None


def _values(request: Any, name: str) -> list[Any] | None:
    """The values of an input as Python's; None if it was not sent. A float32 is read as the decimal number that a
    client wrote: 0.8, not 0.800000011920929."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    array: npt.NDArray[Any] = tensor.as_numpy().reshape(-1)
    return [float(str(value)) for value in array] if array.dtype == np.float32 else array.tolist()


# --- settings, errors and metrics ------------------------------------------------------------------------------


def _settings(config: dict[str, Any]) -> dict[str, str]:
    """The parameters of config.pbtxt. Names in capital letters are the Python backend's own. Raises UsageError."""
    given = {name: value["string_value"] for name, value in config.get("parameters", {}).items() if not name.isupper()}
    for name in given:
        if name not in SETTINGS:
            raise UsageError(f"config.pbtxt: unknown parameter {shown(name)}: {nearest(name, SETTINGS)}")
    return SETTINGS | given


def _whole(settings: dict[str, str], name: str) -> int | None:
    """A whole number; None if it is empty. Raises UsageError."""
    try:
        return int(settings[name]) if settings[name] else None
    except ValueError as error:
        raise UsageError(f"config.pbtxt: {name} must be a whole number, not {shown(settings[name])}") from error


def _failure(error: Exception) -> Any:
    """The response to a request that failed."""
    if isinstance(error, Cancelled):
        code = pb_utils.TritonError.CANCELLED
    elif isinstance(error, QueueFull):
        code = pb_utils.TritonError.UNAVAILABLE
    elif isinstance(error, CapacityError) or (isinstance(error, BltError) and error.exit_code == 2):
        code = pb_utils.TritonError.INVALID_ARG
    else:
        code = pb_utils.TritonError.INTERNAL
        pb_utils.Logger.log_error(f"blt: a request failed: {error!r}")
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error), code))


def _quietly(call: Callable[..., object], *arguments: object) -> None:
    """For calls into a server that may have dropped the request meanwhile."""
    try:
        call(*arguments)
    except Exception as error:
        pb_utils.Logger.log_verbose(f"blt: {error!r}")


class Metrics:
    """Metrics of the server, under the names of those of `blt serve`; none where the server has metrics off. Families
    are kept, since a metric ends with its family, and end after their metrics: the backend crashes otherwise."""

    def __init__(self, labels: dict[str, str]) -> None:
        counter, gauge = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        described = {
            "vllm:prompt_tokens_total": ("Prompt tokens of all requests.", counter),
            "vllm:generation_tokens_total": ("Generated tokens.", counter),
            "vllm:request_success_total": ("Requests that ended at their limit, a stop string or EOS.", counter),
            "vllm:num_requests_running": ("Requests that run.", gauge),
            "vllm:num_requests_waiting": ("Requests that wait for a row.", gauge),
            "blt:bytes_per_patch": ("Mean bytes of a patch so far.", gauge),
        }
        self._families, self._metrics = dict[str, Any](), dict[str, Any]()
        try:
            for name, (text, kind) in described.items():
                self._families[name] = pb_utils.MetricFamily(name=name, description=text, kind=kind)
                self._metrics[name] = self._families[name].Metric(labels=labels)
        except pb_utils.TritonModelException as error:
            pb_utils.Logger.log_warn(f"blt: no metrics: {error}")

    def add(self, name: str, value: float) -> None:
        if (metric := self._metrics.get(name)) is not None:
            with SERVER:
                _quietly(metric.increment, value)

    def set(self, name: str, value: float) -> None:
        if (metric := self._metrics.get(name)) is not None:
            with SERVER:
                _quietly(metric.set, value)

    def close(self) -> None:
        with SERVER:
            self._metrics.clear()
            self._families.clear()
