"""Speculative decoding: bytes per round and per call, acceptance rate, and time relative to plain decoding.

    python benchmarks/speculation.py BUNDLE code=a.rs prose=b.md             # files with text, one kind each
    python benchmarks/speculation.py BUNDLE code=a.rs --record rounds.json   # also writes accepted drafts by round
    python benchmarks/speculation.py LARGE --replay rounds.json              # the same rounds with a larger model

Prompts are cut from the files at evenly spaced positions. All drafters run interleaved on the same prompts, in one
process and on one thread. Times are CPU seconds, so that other load changes the ratios little. They exclude prefill.

"1B" is computed, not measured: calls of this run times the float32 weights in MB that the released 1B model's graphs
read in a call; the sum of plain decoding divided by the sum with drafts. This assumes that a call over a few tokens
costs as much as a call over one, and the same acceptance rate.

A replay forces a text on another model, whose weights may be random. In each round it drafts as many tokens, and makes
as many of them correct, as were recorded. All patches have the same length. So large shapes are timed without a trained
model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blt.bench.runs import Forced, Text, bench_text, with_changes
from blt_runtime import Drafter, Model, Stream
from blt_runtime.sampling import Sampler
from blt_runtime.speculation.adaptive import Costs
from blt_runtime.speculation.drafters import DecoderDrafter, EntropyDrafter, FirstOf, LookupDrafter

RELEASED_MB = {"entropy": 404, "encoder": 59, "latent": 5258, "decoder": 545}
DRAFTERS: dict[str, Callable[[Sampler], str | Drafter]] = {
    "off": lambda _: "off",
    "lookup": lambda _: "lookup",
    "entropy": lambda sampler: EntropyDrafter(sampler=sampler),
    "entropy>.7": lambda sampler: EntropyDrafter(0.7, sampler),
    "decoder": lambda sampler: DecoderDrafter(0.0, sampler),
    "decoder>.3": lambda sampler: DecoderDrafter(0.3, sampler),
    "decoder>.7": lambda sampler: DecoderDrafter(0.7, sampler),
    "both": lambda sampler: FirstOf(LookupDrafter(1 << 16), DecoderDrafter(0.3, sampler)),
    "auto": lambda _: "auto",
    "auto, 1B": lambda _: "auto",
}
REPLAYED = ("lookup", "entropy", "entropy>.7", "decoder", "decoder>.3", "decoder>.7")
Rounds = list[list[int]]
"""[drafted, accepted] tokens of each round."""


class ReleasedCosts(Costs):
    """Costs of calls as if weights of the released model were read at 10 GB/s, plus 5 % for each further token."""

    def note(self, graph: str, n: int, seconds: float) -> None:
        super().note(graph, n, 1e-4 * RELEASED_MB[graph] * (1 + 0.05 * (n - 1)))

    def note_step(self, closed: bool, seconds: float) -> None:
        super().note_step(closed, 1e-4 * sum(mb for graph, mb in RELEASED_MB.items() if closed or graph != "latent"))


class Replay(Drafter):
    """Drafts the forced text with the recorded numbers of drafted and accepted tokens. The rounds repeat."""

    def __init__(self, source: Any, rounds: Rounds, text: Sequence[int]) -> None:
        self.source, self._rounds, self._text, self._next = source, rounds, text, 0
        self._drafts: list[int] = []
        self._begin = 0

    def propose(self, ids_N: Any, limit: int) -> Sequence[int]:
        drafted, accepted = self._rounds[self._next % len(self._rounds)]
        self._next += 1
        self._begin = len(ids_N)
        text = self._text[self._begin : self._begin + drafted]
        self._drafts = [id if i < accepted else id ^ 1 for i, id in enumerate(text)]
        return [] if self.source else self._drafts[:limit]

    def extend(self, ids_N: Any, logits_V: Any) -> tuple[int, None] | None:
        place = len(ids_N) - self._begin
        return (self._drafts[place], None) if place < len(self._drafts) else None


def prompts_of(file: Path, count: int, length: int) -> list[bytes]:
    data = file.read_bytes()
    starts = [len(data) * (2 * i + 1) // (2 * count) for i in range(count)]
    return [data[start : start + length].replace(b"\0", b"\n") for start in starts]


def run(stream: Stream, prompt: Any, sampler: Sampler, *, speculate: Any, new: int, draft: int) -> dict[str, Any]:
    """One generation, timed after its first byte."""
    stream.reset()
    stream.append_ids(prompt)
    stats, patches = stream.speculation, len(stream.patch_lengths)
    before, rounds = vars(stats).copy(), Rounds()
    generated = stream.generate_ids(new, sampler=sampler, stop_at_eos=False, speculate=speculate, draft=draft)
    ids, start, cpu = [], 0.0, 0.0
    for id in generated:
        if not ids:
            start, cpu = time.perf_counter(), time.process_time()
        ids.append(id)
        if speculate != "off":
            rounds += [[0, 0]] * (stats.passes - before["passes"] - len(rounds))
            rounds[-1] = [stats.drafts - before["drafts"] - sum(drafted for drafted, _ in rounds[:-1]), 0]
            rounds[-1][1] = stats.accepted - before["accepted"] - sum(accepted for _, accepted in rounds[:-1])
    out = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - start, "ids": ids, "new": new}
    used = {name: value - before[name] for name, value in vars(stats).items()}
    return out | used | {"patches": len(stream.patch_lengths) - patches, "rounds": rounds}


def compare(drafters: dict[str, list[Callable[[], dict[str, Any]]]]) -> tuple[list[dict[str, Any]], dict[str, Rounds]]:
    """One row per drafter over the same runs, which are interleaved; and the rounds of each drafter."""
    totals: dict[str, dict[str, Any]] = {}
    different, rounds = dict.fromkeys(drafters, 0), {name: Rounds() for name in drafters}
    for turn in zip(*drafters.values(), strict=True):
        plain: list[int] = []
        for drafter, generate in zip(drafters, turn, strict=True):
            got = generate()
            ids = got.pop("ids")
            rounds[drafter] += got.pop("rounds")
            plain = ids if drafter == "off" else plain
            different[drafter] += ids != plain
            total = totals.setdefault(drafter, dict.fromkeys(got, 0))
            totals[drafter] = {name: total[name] + value for name, value in got.items()}
    off = totals["off"]
    off |= {f"{graph}_calls": off["patches" if graph == "latent" else "new"] for graph in RELEASED_MB}
    return [row_of(name, total, off, different=different[name]) for name, total in totals.items()], rounds


def row_of(drafter: str, total: dict[str, Any], off: dict[str, Any], *, different: int) -> dict[str, Any]:
    new, drafts = total["new"], total["drafts"]
    read, plain = (sum(mb * of[f"{graph}_calls"] for graph, mb in RELEASED_MB.items()) for of in (total, off))
    return {
        "way": drafter,
        "bytes_per_round": round(new / (total["passes"] or new), 2),
        "right": round(total["accepted"] / drafts, 2) if drafts else None,
        "bytes_per_patch": round(new / max(1, total["patches"]), 2),
        **{f"bytes_per_{graph}": round(new / max(1, total[f"{graph}_calls"]), 2) for graph in RELEASED_MB},
        "1B": round(plain / read, 2),
        "ms_per_byte": round(1000 * total["cpu"] / new, 3),
        "speedup_cpu": round(off["cpu"] / total["cpu"], 2),
        "speedup_wall": round(off["wall"] / total["wall"], 2),
        "texts_that_differ": different,
    }


def generations(model: Model, prompts: list[bytes], args: Any, *, temperature: float) -> dict[str, list[Any]]:
    streams = {"auto, 1B": model.stream()}
    streams["auto, 1B"]._speculator.costs = ReleasedCosts()
    default = model.stream()

    def one(drafter: str, prompt: bytes, seed: int) -> dict[str, Any]:
        stream = streams.get(drafter, default)
        sampler = Sampler(temperature, seed=seed)
        ids = Text.of(prompt + bytes(2), len(prompt), 2).prompt
        speculate = DRAFTERS[drafter](sampler)
        return run(stream, ids, sampler, speculate=speculate, new=args.new_bytes, draft=args.draft)

    turns = list(enumerate(prompts)) * args.repeat
    return {name: [lambda n=name, p=p, s=s: one(n, p, s) for s, p in turns] for name in args.drafters.split(";")}


def replays(model: Model, rounds: dict[str, Rounds], args: Any) -> dict[str, list[Any]]:
    stream, text = model.stream(), Text.of(bench_text(4096), args.prompt_bytes, args.new_bytes)
    whole = [1, *text.prompt.tolist(), *text.new.tolist()]

    def one(name: str) -> dict[str, Any]:
        source = None if name == "lookup" else name.split(">")[0]
        drafter = "off" if name == "off" else Replay(source, rounds[name], whole)
        sampler = Forced(text.new.tolist(), 0.0)
        return run(stream, text.prompt, sampler, speculate=drafter, new=args.new_bytes, draft=args.draft)

    return {name: [lambda n=name: one(n)] * args.repeat for name in ("off", *rounds)}


def with_patches_of(model: Model, length: int) -> Model:
    """The model with patches of a fixed length. Its entropy model still runs for every byte."""
    rule = replace(model.spec.patch_rule, threshold=1e9, monotonic=False, threshold_add=None, max_patch_length=length)
    return with_changes(model, spec=replace(model.spec, patch_rule=rule))


def show(kind: str, temperature: float, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [{"kind": kind, "temperature": temperature, **row} for row in rows]
    for row in rows:
        print("  ".join(f"{value!s:>10}" for value in row.values()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("kinds", nargs="*", metavar="KIND=FILE")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-bytes", type=int, default=512)
    parser.add_argument("--new-bytes", type=int, default=256)
    parser.add_argument("--draft", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--temperatures", default="0,0.8")
    parser.add_argument("--drafters", "--ways", default=";".join(DRAFTERS), help="separated by ;, off first")
    parser.add_argument("--record", type=Path, help="write the rounds of each kind and temperature here")
    parser.add_argument("--replay", type=Path, help="replay the rounds in this file")
    parser.add_argument("--patch-bytes", type=int, default=5, help="patch length of a replay")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, rows, recorded = Model.open(args.bundle, threads=1), [], {}
    regular = with_patches_of(model, args.patch_bytes)
    for kind, file in (pair.split("=", 1) for pair in args.kinds):
        prompts = prompts_of(Path(file), args.prompts, args.prompt_bytes)
        for temperature in map(float, args.temperatures.split(",")):
            found, rounds = compare(generations(model, prompts, args, temperature=temperature))
            rows += show(kind, temperature, found)
            recorded[f"{kind} {temperature}"] = {name: rounds[name] for name in rounds if name in REPLAYED}
    for name, rounds in json.loads(args.replay.read_text()).items() if args.replay else ():
        kind, temperature = name.split()
        rows += show(f"({kind})", float(temperature), compare(replays(regular, rounds, args))[0])
    if args.record:
        args.record.write_text(json.dumps(recorded))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
