"""Constrained generation: milliseconds a byte without a grammar, and with forced bytes chosen, drafted or appended.

    python benchmarks/grammar.py BUNDLE

Each way writes the same JSON texts, one process and one thread, interleaved. Times are CPU seconds without the prompt,
medians over the seeds. `chosen` runs the decoder for each forced byte, `drafted` is what `Stream.generate` does,
`appended` is what a `Scheduler` does: it reads forced bytes as it reads a prompt. `free` writes as many bytes without a
grammar.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from blt_runtime import Drafter, Model, Stream
from blt_runtime.grammar import Grammar
from blt_runtime.ids import EOS, decode

SCHEMA = {
    "type": "object",
    "properties": {
        "temperature_in_degrees": {"type": "integer", "minimum": -40, "maximum": 60},
        "description": {"type": "string", "maxLength": 24},
        "measured_indoors": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["morning", "noon", "evening"]}, "minItems": 2, "maxItems": 3},
    },
    "required": ["temperature_in_degrees", "description", "measured_indoors", "tags"],
    "additionalProperties": False,
}
LIMIT = 300


def generated(stream: Stream, grammar: Grammar, seed: int, drafter: Drafter | None) -> bytes:
    sampler = grammar.sampler(0.8, seed=seed)
    speculate = "off" if drafter is None else drafter
    return b"".join(stream.generate(LIMIT, sampler=sampler, speculate=speculate))


def appended(stream: Stream, grammar: Grammar, seed: int) -> bytes:
    sampler, made = grammar.sampler(0.8, seed=seed), list[int]()
    while len(made) < LIMIT:
        ids = [sampler(stream.logits)]
        if ids[0] == EOS:
            break
        ids += sampler.forced()
        stream.append_ids([id for id in ids if id != EOS])
        made += ids
    return decode([id for id in made if id != EOS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--seeds", type=int, default=20)
    a = parser.parse_args()
    stream, grammar = Model.open(a.bundle, threads=1).stream(), Grammar(schema=SCHEMA)
    stream.append("The weather: ")
    start = stream.snapshot()
    ways: dict[str, Callable[[int], bytes]] = {
        "chosen": lambda seed: generated(stream, grammar, seed, Drafter()),
        "drafted": lambda seed: generated(stream, grammar, seed, None),
        "appended": lambda seed: appended(stream, grammar, seed),
    }
    spent: dict[str, list[float]] = {name: [] for name in ("free", *ways)}
    forced = total = 0
    for seed in range(a.seeds):
        texts = set()
        for name, way in ways.items():
            stream.restore(start)
            began = time.process_time()
            text = way(seed)
            spent[name].append((time.process_time() - began) / len(text))
            texts.add(text)
        assert len(texts) == 1, texts
        stream.restore(start)
        began = time.process_time()
        free = list(stream.generate_ids(len(text), temperature=0.8, seed=seed, stop_at_eos=False))
        spent["free"].append((time.process_time() - began) / len(free))
        total += len(text)
        forced += len(text) - _choices(grammar, text)
    print(f"{total / a.seeds:.0f} bytes a text, {forced / total:.0%} of them forced")
    for name, seconds in spent.items():
        print(f"{name:9} {1e3 * statistics.median(seconds):6.3f} ms a byte")


def _choices(grammar: Grammar, text: bytes) -> int:
    """Bytes of the text that had an alternative."""
    from blt_runtime.grammar import GrammarText

    read, count = GrammarText(grammar), 0
    for id in [byte + 4 for byte in text]:
        count += len(read.allowed()) > 1
        read.take(id)
    return count


if __name__ == "__main__":
    main()
