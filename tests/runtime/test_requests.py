"""What a request reports: tokens with logprobs, entropies and patches, on threads and on event loops."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from blt_runtime import Request, Scheduler, Token
from blt_runtime.backends.null import null_spec
from blt_runtime.errors import Cancelled, UsageError
from blt_runtime.ids import EOS, OFFSET, encode
from blt_runtime.requests import Outbox, Work
from blt_runtime.sampling import Sampler
from tests.runtime.streams import model_of

SPEC = null_spec(local_kind="window", capacity_bytes=300, capacity_patches=300)
PROMPT = "A prompt of some words"


@pytest.fixture(scope="module")
def scheduler() -> Iterator[Scheduler]:
    with Scheduler(model_of(SPEC), streams=3, slice=4) as made:
        yield made


def whole(n: int = 40) -> bytes:
    stream = model_of(SPEC).stream(seed=1)
    stream.append(PROMPT)
    return b"".join(stream.generate(n, stop_at_eos=False))


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    wide_V = logits_V.astype(np.float64) - logits_V.max()
    found: np.ndarray = wide_V - np.log(np.exp(wide_V).sum())
    return found


def test_tokens_report_what_a_whole_forward_computes(scheduler: Scheduler) -> None:
    request = scheduler.submit(PROMPT, 40, seed=1, stop_at_eos=False, tokens=True, logprobs=3, prompt_logprobs=True)
    tokens = list(request.tokens())
    assert b"".join(token.piece for token in tokens) == whole()
    every = [*(request.prompt or []), *tokens]
    ids = [token.id or 0 for token in every]
    score = model_of(SPEC).score(ids)
    starts = np.cumsum(score.patch_lengths)[:-1]
    assert (every[0].id, every[0].logprob, every[0].top, math.isnan(every[0].entropy)) == (1, None, (), True)
    for t, token in enumerate(every[1:]):
        expected_V = log_softmax(score.logits[t])
        assert token.logprob == pytest.approx(expected_V[ids[t + 1]], abs=1e-5)
        assert [id for id, _ in token.top] == np.argsort(-expected_V, kind="stable")[:3].tolist()
        assert dict(token.top).get(ids[t + 1], token.logprob) == token.logprob
        assert token.entropy == pytest.approx(score.entropies[t], abs=1e-5, nan_ok=True)
        assert token.starts_patch == (t + 1 in starts)


def test_a_prompt_is_scored_without_generating(scheduler: Scheduler) -> None:
    request = scheduler.submit(PROMPT, 0, tokens=True, logprobs=0, prompt_logprobs=True)
    assert (request.result(), request.finish) == (b"", "length")
    assert request.prompt is not None
    assert [token.id for token in request.prompt] == encode(PROMPT).tolist()
    assert all(token.top == () for token in request.prompt)


def test_the_last_token_carries_bytes_that_were_held_back(scheduler: Scheduler) -> None:
    text = whole()
    request = scheduler.submit(PROMPT, 40, seed=1, stop=text[-2:] + b"?", stop_at_eos=False, tokens=True)
    tokens = list(request.tokens())
    assert (tokens[-1].id, tokens[-1].piece) == (None, text[-2:])
    assert b"".join(token.piece for token in tokens) == text


def test_details_that_contradict_are_refused(scheduler: Scheduler) -> None:
    with pytest.raises(UsageError, match="tokens=True"):
        scheduler.submit("x", 1, logprobs=3)
    with pytest.raises(UsageError, match="whole prompt"):
        scheduler.submit("x", 1, prompt_logprobs=True, after=scheduler.read("ab"))
    with pytest.raises(UsageError, match="pieces of bytes"):
        scheduler.submit("x", 1).tokens()
    with pytest.raises(UsageError, match="call Scheduler"):
        Request(None)  # type: ignore[arg-type]


class Forcing(Sampler):
    """Greedy; after each choice it forces three ids."""

    def forced(self) -> Sequence[int]:
        return [OFFSET + 65, OFFSET + 66, OFFSET + 67]


@pytest.mark.parametrize("n", [40, 41, 42])
def test_forced_ids_are_read_like_chosen_ones(scheduler: Scheduler, n: int) -> None:
    request = scheduler.submit_ids(encode(PROMPT), n, sampler=Forcing(0.0), stop_at_eos=False)
    stream = model_of(SPEC).stream()
    stream.append(PROMPT)
    expected = b""
    while len(expected) < n:
        (id,) = stream.generate_ids(1, temperature=0, stop_at_eos=False)
        stream.append("ABC")
        expected += bytes([max(0, id - OFFSET)] if id >= OFFSET else []) + b"ABC"
    assert request.result() == expected[:n]
    assert request.generated == n


def test_forced_ids_end_at_stop_strings_and_at_eos(scheduler: Scheduler) -> None:
    class Ending(Sampler):
        def forced(self) -> Sequence[int]:
            return [OFFSET + 65, EOS, OFFSET + 66]

    assert scheduler.submit_ids(encode("x"), 9, sampler=Ending(0.0)).result().endswith(b"A")
    stopped = scheduler.submit_ids(encode("x"), 90, sampler=Forcing(0.0), stop="BC", stop_at_eos=False)
    assert (stopped.result()[1:], stopped.finish) == (b"A", "stop")


def test_requests_are_read_on_an_event_loop(scheduler: Scheduler) -> None:
    async def read(i: int) -> bytes:
        request = scheduler.submit(PROMPT, 40, seed=1, stop_at_eos=False, tokens=i % 3 == 0)
        if i % 3 == 0:
            return b"".join([token.piece async for token in request.tokens()])
        return b"".join([piece async for piece in request]) if i % 3 == 1 else await request.result_async()

    async def run() -> list[bytes]:
        return await asyncio.gather(*(read(i) for i in range(9)))

    assert asyncio.run(run()) == [whole()] * 9


@pytest.mark.parametrize("how", ["task cancelled", "left"])
def test_a_reader_that_leaves_its_event_loop_cancels_the_request(scheduler: Scheduler, how: str) -> None:
    async def run() -> Work:
        request = scheduler.submit(PROMPT, 250, seed=1, stop_at_eos=False)
        task = asyncio.create_task(read(request))
        while not request.generated:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return request._work

    async def read(request: Request) -> None:
        async for _ in request:
            if how == "left":
                break

    work = asyncio.run(run())
    gc.collect()
    assert work.cancelled
    assert scheduler.submit(PROMPT, 40, seed=1, stop_at_eos=False).result() == whole()


def test_errors_reach_an_event_loop(scheduler: Scheduler) -> None:
    async def run() -> None:
        request = scheduler.submit("b" * 250, 2)
        request.cancel()
        for _ in range(2):
            with pytest.raises(Cancelled):
                await request.result_async()

    asyncio.run(run())


def test_a_closed_event_loop_does_not_disturb_the_scheduler() -> None:
    outbox = Outbox()
    loop = asyncio.new_event_loop()
    reading = loop.create_task(outbox.get_async())
    loop.run_until_complete(asyncio.sleep(0))
    reading.cancel()
    loop.run_until_complete(asyncio.gather(reading, return_exceptions=True))
    loop.close()
    outbox.put(b"x")
    assert outbox.get() == b"x"


def test_a_token_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Token(5, b"\x01", None, (), 0.5, True).id = 6  # type: ignore[misc]
