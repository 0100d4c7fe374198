"""Prompts that begin alike: what the prefix cache keeps, and that nothing but time changes."""

from __future__ import annotations

import numpy as np

from blt_runtime import Scheduler, Snapshot
from blt_runtime.backends.null import null_spec
from blt_runtime.engine.prefixes import LEAST, MOST_PROMPTS, PrefixCache
from blt_runtime.ids import encode
from tests.runtime.streams import model_of

SPEC = null_spec(local_kind="window", capacity_bytes=900, capacity_patches=900)
SYSTEM = "You are a system prompt that is longer than the least length of a snapshot, by a few words. "
LIMIT = 1 << 24


def snapshot(text: str) -> Snapshot:
    stream = model_of(SPEC).stream()
    stream.append(text)
    return stream.snapshot()


def test_turns_of_a_conversation_are_read_once() -> None:
    turns = [SYSTEM + "a question of the user. " * i for i in range(1, 6)]
    with Scheduler(model_of(SPEC), streams=1, prefix_bytes=LIMIT) as scheduler:
        for i, turn in enumerate(turns):
            before, request = scheduler.counts.tokens, scheduler.submit(turn, 9, seed=1, stop_at_eos=False)
            stream = model_of(SPEC).stream(seed=1)
            stream.append(turn)
            assert request.result() == b"".join(stream.generate(9, stop_at_eos=False))
            read = scheduler.counts.tokens - before
            ends = (len(turns[i - 1])) // 8 * 8  # with BOS in front, without the last token
            assert request.reused == (ends if i else 0)
            assert read == len(encode(turn)) - request.reused + 8
        assert scheduler.prefix_counts == (
            sum(len(encode(turn)) for turn in turns),
            sum(len(t) // 8 * 8 for t in turns[:-1]),
        )


def test_a_shared_beginning_is_kept_when_the_second_prompt_leaves_it() -> None:
    with Scheduler(model_of(SPEC), streams=1, prefix_bytes=LIMIT) as scheduler:
        reused = []
        for question in ("first question", "second one", "third", "fourth"):
            request = scheduler.submit(SYSTEM + question, 3, seed=1)
            request.result()
            reused.append(request.reused)
        assert reused == [0, 0, (1 + len(SYSTEM)) // 8 * 8, (1 + len(SYSTEM)) // 8 * 8]


def test_groups_do_not_share() -> None:
    with Scheduler(model_of(SPEC), streams=1, prefix_bytes=LIMIT) as scheduler:
        reused = []
        for group in ("a", "b", "a", None, "b", None):
            request = scheduler.submit(SYSTEM, 3, prefix_group=group)
            request.result()
            reused.append(request.reused)
        assert [n > 0 for n in reused] == [False, False, True, False, True, True]


def test_scored_prompts_are_read_whole() -> None:
    with Scheduler(model_of(SPEC), streams=1, prefix_bytes=LIMIT) as scheduler:
        scheduler.submit(SYSTEM, 3).result()
        request = scheduler.submit(SYSTEM, 1, tokens=True, logprobs=1, prompt_logprobs=True)
        request.result()
        assert request.reused == 0
        assert len(request.prompt or []) == len(encode(SYSTEM))


def test_the_least_recently_used_snapshots_are_dropped() -> None:
    texts = [f"{i}" * 100 for i in range(4)]
    kept = snapshot(texts[0])
    cache = PrefixCache(2 * kept.nbytes + 10, slice=8)
    for text in texts[:2]:
        cache.add(encode(text), kept, None)
    longer = [encode(text + "and more") for text in texts]
    assert cache.longest(longer[0], None) is not None
    cache.add(encode(texts[2]), kept, None)
    assert [cache.longest(ids, None) is not None for ids in longer] == [True, False, True, False]
    assert cache.nbytes <= 2 * kept.nbytes + 10
    cache.add(encode(texts[2]), kept, None)  # again: replaced, not counted twice
    assert cache.longest(longer[0], None) is not None
    PrefixCache(kept.nbytes - 1, slice=8).add(encode(texts[0]), kept, None)


def test_the_whole_prompt_is_never_skipped() -> None:
    cache, ids = PrefixCache(LIMIT, slice=8), encode("x" * 200)
    cache.add(ids, snapshot("x" * 200), None)
    assert cache.longest(ids, None) is None
    assert cache.longest(np.append(ids, 5), None) is not None


def test_places_are_multiples_of_the_slice_and_long_enough() -> None:
    cache = PrefixCache(LIMIT, slice=8)
    assert cache.places(encode("x" * (LEAST - 1)), 0, None) == []
    assert cache.places(encode("y" * LEAST), 0, None) == [LEAST]
    assert cache.places(encode("y" * 90 + "z" * 90), 0, None) == [64, 176]
    assert cache.places(encode("y" * 90 + "z" * 91), 176, None) == []
    for i in range(2 * MOST_PROMPTS):
        cache.places(encode(f"{i}"), 0, None)
    assert len(cache._prompts) == MOST_PROMPTS
