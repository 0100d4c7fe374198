"""What guessing ahead brings: bytes per round and per call, and the time against plain decoding.

    python benchmarks/speculation.py BUNDLE code=a.rs prose=b.md             # files with text, one kind each
    python benchmarks/speculation.py BUNDLE code=a.rs --record rounds.json   # also writes what came true, by round
    python benchmarks/speculation.py LARGE --replay rounds.json              # the same rounds with a larger model

Prompts are cut from the files at even places. All ways of guessing take turns on the same prompts in one process, on
one thread, in CPU seconds, so that a busy machine does little to the ratios; reading the prompts is not in them.

"1B" is a count, not a measurement: the calls made here times the fp32 weights in MB that the released 1B model's graphs
read in a call, plain decoding's divided by those with guesses. It takes for granted that a call over a few tokens costs
what a call over one does, and that guesses come true as often as here.

A replay forces a text upon a model (random weights will do) and lets an oracle guess it as far, and err after as many
guesses, as was recorded round by round, with patches of one length; so it times large shapes without their text.
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
WAYS: dict[str, Callable[[Sampler], str | Drafter]] = {
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
"""Guesses made and guesses that came true, of every round."""


class ReleasedCosts(Costs):
    """Calls that take what reading the released model's weights takes at 10 GB/s, and 5 % more for each more token."""

    def note(self, graph: str, n: int, seconds: float) -> None:
        super().note(graph, n, 1e-4 * RELEASED_MB[graph] * (1 + 0.05 * (n - 1)))

    def note_step(self, closed: bool, seconds: float) -> None:
        super().note_step(closed, 1e-4 * sum(mb for graph, mb in RELEASED_MB.items() if closed or graph != "latent"))


class Replay(Drafter):
    """Guesses the text as far, and errs behind as many guesses, as the rounds say; they come round again."""

    def __init__(self, source: Any, rounds: Rounds, text: Sequence[int]) -> None:
        self.source, self._rounds, self._text, self._next = source, rounds, text, 0
        self._guesses: list[int] = []
        self._begin = 0

    def propose(self, ids_N: Any, limit: int) -> Sequence[int]:
        made, right = self._rounds[self._next % len(self._rounds)]
        self._next += 1
        self._begin = len(ids_N)
        true = self._text[self._begin : self._begin + made]
        self._guesses = [id if i < right else id ^ 1 for i, id in enumerate(true)]
        return [] if self.source else self._guesses[:limit]

    def extend(self, ids_N: Any, logits_V: Any) -> tuple[int, None] | None:
        place = len(ids_N) - self._begin
        return (self._guesses[place], None) if place < len(self._guesses) else None


def prompts_of(file: Path, count: int, length: int) -> list[bytes]:
    data = file.read_bytes()
    places = [len(data) * (2 * i + 1) // (2 * count) for i in range(count)]
    return [data[place : place + length].replace(b"\0", b"\n") for place in places]


def run(stream: Stream, prompt: Any, sampler: Sampler, speculate: Any, new: int, draft: int) -> dict[str, Any]:
    """One generation, timed behind its first byte."""
    stream.reset()
    stream.append_ids(prompt)
    stats, patches = stream.speculation, len(stream.patch_lengths)
    before, rounds = vars(stats).copy(), Rounds()
    made = stream.generate_ids(new, sampler=sampler, stop_at_eos=False, speculate=speculate, draft=draft)
    ids, start, cpu = [], 0.0, 0.0
    for id in made:
        if not ids:
            start, cpu = time.perf_counter(), time.process_time()
        ids.append(id)
        if speculate != "off":
            rounds += [[0, 0]] * (stats.passes - before["passes"] - len(rounds))
            rounds[-1] = [stats.drafts - before["drafts"] - sum(made for made, _ in rounds[:-1]), 0]
            rounds[-1][1] = stats.accepted - before["accepted"] - sum(right for _, right in rounds[:-1])
    out = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - start, "ids": ids, "new": new}
    used = {name: value - before[name] for name, value in vars(stats).items()}
    return out | used | {"patches": len(stream.patch_lengths) - patches, "rounds": rounds}


def compare(ways: dict[str, list[Callable[[], dict[str, Any]]]]) -> tuple[list[dict[str, Any]], dict[str, Rounds]]:
    """One row for each way, over the same runs; the ways take turns. And the rounds of each."""
    totals: dict[str, dict[str, Any]] = {}
    different, rounds = dict.fromkeys(ways, 0), {way: Rounds() for way in ways}
    for turn in zip(*ways.values(), strict=True):
        plain: list[int] = []
        for way, go in zip(ways, turn, strict=True):
            got = go()
            ids = got.pop("ids")
            rounds[way] += got.pop("rounds")
            plain = ids if way == "off" else plain
            different[way] += ids != plain
            total = totals.setdefault(way, dict.fromkeys(got, 0))
            totals[way] = {name: total[name] + value for name, value in got.items()}
    off = totals["off"]
    off |= {f"{graph}_calls": off["patches" if graph == "latent" else "new"] for graph in RELEASED_MB}
    return [row_of(way, total, off, different[way]) for way, total in totals.items()], rounds


def row_of(way: str, total: dict[str, Any], off: dict[str, Any], different: int) -> dict[str, Any]:
    new, drafts = total["new"], total["drafts"]
    read, plain = (sum(mb * of[f"{graph}_calls"] for graph, mb in RELEASED_MB.items()) for of in (total, off))
    return {
        "way": way,
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


def generations(model: Model, prompts: list[bytes], temperature: float, args: Any) -> dict[str, list[Any]]:
    streams = {"auto, 1B": model.stream()}
    streams["auto, 1B"]._speculator.costs = ReleasedCosts()
    ordinary = model.stream()

    def one(way: str, prompt: bytes, seed: int) -> dict[str, Any]:
        stream = streams.get(way, ordinary)
        sampler = Sampler(temperature, seed=seed)
        ids = Text.of(prompt + bytes(2), len(prompt), 2).prompt
        return run(stream, ids, sampler, WAYS[way](sampler), args.new_bytes, args.draft)

    turns = list(enumerate(prompts)) * args.repeat
    return {way: [lambda w=way, p=p, s=s: one(w, p, s) for s, p in turns] for way in args.ways.split(";")}


def replays(model: Model, rounds: dict[str, Rounds], args: Any) -> dict[str, list[Any]]:
    stream, text = model.stream(), Text.of(bench_text(4096), args.prompt_bytes, args.new_bytes)
    whole = [1, *text.prompt.tolist(), *text.new.tolist()]

    def one(way: str) -> dict[str, Any]:
        source = None if way == "lookup" else way.split(">")[0]
        drafter = "off" if way == "off" else Replay(source, rounds[way], whole)
        return run(stream, text.prompt, Forced(text.new.tolist(), 0.0), drafter, args.new_bytes, args.draft)

    return {way: [lambda w=way: one(w)] * args.repeat for way in ("off", *rounds)}


def with_patches_of(model: Model, length: int) -> Model:
    """The model, its entropy model still running for every byte, but patches all of that length."""
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
    parser.add_argument("--ways", default=";".join(WAYS), help="with ; between, off first")
    parser.add_argument("--record", type=Path, help="write the rounds of each kind and temperature here")
    parser.add_argument("--replay", type=Path, help="take the rounds from here and an oracle's guesses")
    parser.add_argument("--patch-bytes", type=int, default=5, help="of a replay: random weights end patches anywhere")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, rows, recorded = Model.open(args.bundle, threads=1), [], {}
    regular = with_patches_of(model, args.patch_bytes)
    for kind, file in (pair.split("=", 1) for pair in args.kinds):
        prompts = prompts_of(Path(file), args.prompts, args.prompt_bytes)
        for temperature in map(float, args.temperatures.split(",")):
            found, rounds = compare(generations(model, prompts, temperature, args))
            rows += show(kind, temperature, found)
            recorded[f"{kind} {temperature}"] = {way: rounds[way] for way in rounds if way in REPLAYED}
    for name, rounds in json.loads(args.replay.read_text()).items() if args.replay else ():
        kind, temperature = name.split()
        rows += show(f"({kind})", float(temperature), compare(replays(regular, rounds, args))[0])
    if args.record:
        args.record.write_text(json.dumps(recorded))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
