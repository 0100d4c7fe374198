"""Rows of mixed text, made from a seed: many writing systems, code, raw bytes, runs, repetitions, ends of documents.

The text need not mean anything. It must reach every table, window and boundary. A given text is cut into rows and gets
the same ends of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from blt_runtime.ids import BOE, BOS, BPE, EOS, Ids, encode
from blt_runtime.patching import PatchRule

WORDS = (
    "the quick brown fox, which never sleeps. In 1984 it cost 3.50 or so; isn't that odd?",
    "Grüße an die naïve façade, señor Łukasz, ça va, þetta er íslenska, smørrebrød, İstanbul",
    "В начале было слово, а потом ещё одно; їжак і ґанок",
    "Η γρήγορη αλεπού πηδά πάνω από το σκυλί",
    "שלום עולם, איפה הספר הזה",
    "مرحبا بالعالم كيف حالك اليوم",
    "नमस्ते दुनिया यह एक वाक्य है",
    "สวัสดีชาวโลก นี่คือประโยค",
    "東京 は 日本 の 首都 です 。 今日 天气 很好 我们 去 公园",
    "안녕하세요 세계 오늘 날씨가 좋습니다",
    "🚀 👩‍👩‍👧 🇮🇸 ∑ ≤ ∞ → ½ “quoted” – dash … é",
)
KEYWORDS = ("def", "return", "if", "for", "import", "class", "None", "self", "x", "y", "i", "data", "value", "unsigned")
CODE = (
    "    {0} {1} = {2}({3}, {4})\n",
    "{0}.{1}[{2}] += {3};\n",
    "\t/* {0} {1} */ {2} = {{{3}: {4}}};\n",
    '<{0} id="{1}">',
)
RUN = 700
"""Longest run of one byte: longer than a chunk, and longer than any patch that a call was bound for before."""
Random = np.random.Generator


def _words(random: Random) -> bytes:
    words = str(random.choice(WORDS)).split(" ")
    chosen = random.choice(words, size=int(random.integers(3, 40)))
    return " ".join(chosen.tolist()).encode() + bytes(random.choice(list(b" \n.")))


def _code(random: Random) -> bytes:
    lines = [
        str(random.choice(CODE)).format(*random.choice(KEYWORDS, size=5).tolist())
        for _ in range(random.integers(2, 12))
    ]
    return "".join(lines).encode()


def _noise(random: Random) -> bytes:
    return bytes(random.integers(0, 256, int(random.integers(1, 120)), dtype=np.uint8))


def _all_bytes(random: Random) -> bytes:
    return bytes(random.permutation(256).astype(np.uint8)) if random.random() < 0.5 else bytes(range(256))


def _run(random: Random) -> bytes:
    return bytes([int(random.integers(0, 256))]) * int(random.integers(20, RUN))


def _repetition(random: Random) -> bytes:
    return _words(random)[: int(random.integers(2, 30))] * int(random.integers(3, 20))


def _broken(random: Random) -> bytes:
    """Characters cut in the middle."""
    text = _words(random)
    start, end = sorted(random.integers(0, len(text) + 1, 2).tolist())
    return text[start:end]


def _numbers(random: Random) -> bytes:
    rows = random.integers(0, 10**6, (int(random.integers(1, 12)), 4))
    return "\n".join(",".join(map(str, row)) for row in rows.tolist()).encode() + b"\n\n"


PIECES: tuple[Callable[[Random], bytes], ...] = (
    _words, _words, _code, _code, _noise, _all_bytes, _run, _repetition, _broken, _numbers,
)  # fmt: skip


def mixed_bytes(random: Random) -> Iterator[bytes]:
    """An endless sequence of pieces; every round of len(PIECES) pieces holds each entry of PIECES once."""
    while True:
        for kind in random.permutation(len(PIECES)).tolist():
            yield PIECES[kind](random)


def given_bytes(text: bytes, random: Random) -> Iterator[bytes]:
    """`text` in pieces of up to 400 bytes, over and over."""
    at = 0
    while True:
        size = int(random.integers(1, 400))
        yield text[at : at + size]
        at = at + size if at + size < len(text) else 0


def with_specials(pieces: Iterator[bytes], random: Random, rule: PatchRule) -> Iterator[Ids]:
    """Ids of the pieces with EOS at random places, sometimes doubled or followed by BOS; rarely another special id."""
    for piece in pieces:
        ids_N = encode(piece, bos=False)
        special = [EOS] if random.random() < 0.9 else [EOS, EOS] if random.random() < 0.5 else [EOS, BOS]
        if random.random() < 0.1:
            special = [BOE] if random.random() < 0.5 else [BPE]
        if rule.scheme == "bpe":
            special = [BPE]
        if rule.scheme == "bpe" or random.random() < 0.7:
            ids_N = np.insert(ids_N, int(random.integers(0, len(ids_N) + 1)), special)
        yield ids_N


def take(pieces: Iterator[Ids], n_ids: int, bos: bool) -> Ids:
    """A row of `n_ids` ids, preceded by BOS if `bos`."""
    parts, total = [np.array([BOS] * bos, np.int64)], 0
    while total < n_ids:
        parts.append(next(pieces)[: n_ids - total])
        total += len(parts[-1])
    return np.concatenate(parts)


def forced_lengths(n_ids: int, chunk: int, random: Random) -> Ids:
    """Patch lengths [P], sum n_ids + 1, the first 1: runs of ones, short patches, at most two longer than a chunk."""
    lengths, giants = [1], 2
    while sum(lengths) <= n_ids:
        kind = random.random()
        if giants and kind < 0.2:
            lengths.append(int(random.integers(chunk + 1, 4 * chunk)))
            giants -= 1
        elif kind < 0.5:
            lengths += [1] * int(random.integers(2, chunk))
        else:
            lengths += random.integers(1, 24, 8).tolist()
    ends_P = np.minimum(np.cumsum(lengths), n_ids + 1)
    return np.diff(np.unique(ends_P), prepend=0)
