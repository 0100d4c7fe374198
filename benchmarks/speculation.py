"""What guessing ahead brings: bytes per decoder pass and per latent call, and bytes/s against plain decoding.

    python benchmarks/speculation.py BUNDLE code=a.py prose=b.txt           # files with text, one kind each

Prompts are cut from the files at even places. For each kind, temperature and way of guessing: bytes per decoder
pass, guesses that came true, bytes per latent call, and the ratio of plain time to time with guesses. All ways take
turns on the same prompts in one process, on one thread, in CPU seconds, so that a busy machine does little to the
ratios; reading the prompts is not in them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blt_runtime import Drafter, EntropyDrafter, FirstOf, LookupDrafter, Model, Sampler, Stream

CAPACITY = 1 << 16
WAYS: dict[str, Callable[[Sampler], str | Drafter]] = {
    "off": lambda _: "off",
    "lookup": lambda _: "lookup",
    "entropy": lambda _: EntropyDrafter(),
    "entropy<1": lambda _: EntropyDrafter(limit=1.0),
    "entropy<0.5": lambda _: EntropyDrafter(limit=0.5),
    "drawn": lambda sampler: EntropyDrafter(sampler=sampler),
    "both": lambda _: FirstOf(LookupDrafter(CAPACITY), EntropyDrafter(limit=1.0)),
    "auto": lambda _: "auto",
}


def prompts_of(file: Path, count: int, length: int) -> list[bytes]:
    data = file.read_bytes()
    places = [len(data) * (2 * i + 1) // (2 * count) for i in range(count)]
    return [data[place : place + length].replace(b"\0", b"\n") for place in places]


def run(stream: Stream, prompt: bytes, way: str, temperature: float, new: int, draft: int, seed: int) -> dict[str, Any]:
    stream.reset()
    stream.append(prompt)
    sampler = Sampler(temperature, seed=seed)
    before, patches = vars(stream.speculation).copy(), len(stream.patch_lengths)
    made = stream.generate_ids(new, sampler, speculate=WAYS[way](sampler), draft=draft)
    first = next(made)
    start, cpu = time.perf_counter(), time.process_time()
    ids = [first, *made]
    out = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - start, "ids": ids, "new": new}
    used = {name: value - before[name] for name, value in vars(stream.speculation).items()}
    return out | used | {"patches": len(stream.patch_lengths) - patches}


def measure(model: Model, prompts: list[bytes], ways: list[str], temperature: float, args: Any) -> list[dict[str, Any]]:
    stream = model.stream()
    totals: dict[str, dict[str, Any]] = {}
    different = dict.fromkeys(ways, 0)
    for _ in range(args.repeat):
        for seed, prompt in enumerate(prompts):
            plain: list[int] = []
            for way in ways:
                got = run(stream, prompt, way, temperature, args.new_bytes, args.draft, seed)
                ids = got.pop("ids")
                plain = ids if way == "off" else plain
                different[way] += ids != plain
                total = totals.setdefault(way, dict.fromkeys(got, 0))
                totals[way] = {name: total[name] + value for name, value in got.items()}
    rows = []
    for way, total in totals.items():
        passes, guesses = total["passes"] or total["new"], total["guesses"]
        rows.append(
            {
                "way": way,
                "bytes_per_pass": round(total["new"] / passes, 2),
                "right_share": round(total["right"] / guesses, 2) if guesses else None,
                "bytes_per_latent_call": round(total["new"] / max(1, total["patches"]), 2),
                "cpu_ms_per_byte": round(1000 * total["cpu"] / total["new"], 3),
                "speedup_cpu": round(totals["off"]["cpu"] / total["cpu"], 2),
                "speedup_wall": round(totals["off"]["wall"] / total["wall"], 2),
                "texts_that_differ": different[way],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("kinds", nargs="+", metavar="KIND=FILE")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-bytes", type=int, default=512)
    parser.add_argument("--new-bytes", type=int, default=256)
    parser.add_argument("--draft", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--temperatures", default="0,0.8")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, rows = Model.open(args.bundle, threads=1), []
    for kind, file in (pair.split("=", 1) for pair in args.kinds):
        prompts = prompts_of(Path(file), args.prompts, args.prompt_bytes)
        for temperature in map(float, args.temperatures.split(",")):
            for row in measure(model, prompts, args.ways.split(","), temperature, args):
                rows.append({"kind": kind, "temperature": temperature, **row})
                print("  ".join(f"{value!s:>11}" for value in rows[-1].values()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
