"""Ten small languages: models of equal FLOPs per byte, trained on all of them together, and how well they model each.

    groups='*.dz,*.km,*.om,*.eu,*.gl,*.et,*.sl,*.hi,*.ta,*.mr,lohelp.en,gnomehelp.en'
    blt data corpus base -o DATA --debs packages/ --groups "$groups"
    python benchmarks/languages.py DATA --debs packages/ -o OUT

trains models of benchmarks/study.py with `blt train`, as there, and measures two things on the test split. Bits per
byte of each language. And whether a model finds the translation of a page: the prompt is the beginning of an English
page, and the completions are the beginnings of the page in a language (the right one) and of WRONG other pages in the
same language. The model chooses the completion that the prompt makes most likely: the largest log p(completion |
prompt) - log p(completion). Chance is 1 in WRONG + 1. The paper measures translation itself (section 6.1), which models
of this size cannot do.

It writes languages.md and languages.json into OUT. A killed run continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import study

from blt.data.corpora.base import SHORT, split_of
from blt.data.corpora.packages import find_packages, package_files, read_lock
from blt.data.corpora.sources import SOURCES
from blt.evaluate.rows import load_on, scorer_of
from blt.evaluate.scoring import Scorer

LANGUAGES = ("dz", "et", "eu", "gl", "hi", "km", "mr", "om", "sl", "ta")
PACKAGES = ("gnome-user-docs", *(f"libreoffice-help-{name}" for name in ("en-us", *LANGUAGES)))
MODELS = "blt-space,blt-static-6,bpe,bpe-with-n-grams"
WRONG = 5
PROMPT, COMPLETION = 400, 400
"""Bytes at most. With a separator, both are shorter than a row of training."""
Pages = Mapping[str, Mapping[str, str]]
"""Of each language, the text of a page by its key. Translations share a key."""


class Question(NamedTuple):
    """completions[0] is the right one."""

    language: str
    prompt: bytes
    completions: tuple[bytes, ...]


def test_pages(debs: Path) -> Pages:
    """The pages of the test split in LANGUAGES and English. Raises UsageError and InputError for missing packages."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    lock = [entry for entry in read_lock() if entry.package in PACKAGES]
    for name, path in find_packages(debs, lock).items():
        for page in SOURCES[name](package_files(path)):
            wanted = page.language in (*LANGUAGES, "en") and split_of(page.key) == "test"
            if wanted and len(page.text.strip()) >= SHORT:
                found[page.language][page.key] = page.text.strip()
    return found


def questions(pages: Pages, language: str, seed: int = 0) -> Iterator[Question]:
    """A question for each page that is translated from English, with wrong pages of the same source where there are
    enough."""
    rng = random.Random(f"{seed} {language}")
    english, ours = pages["en"], pages[language]
    for key in sorted(ours.keys() & english.keys()):
        others = [other for other in sorted(ours) if other != key]
        rng.shuffle(others)
        others.sort(key=lambda other: other.split("/")[0] != key.split("/")[0])
        if len(others) >= WRONG and ours[key] != english[key]:
            completions = tuple(beginning(ours[other], COMPLETION) for other in (key, *others[:WRONG]))
            if completions.count(completions[0]) == 1:
                yield Question(language, beginning(english[key], PROMPT) + b"\n\n", completions)


def beginning(text: str, size: int) -> bytes:
    """Whole characters of the beginning of a text, at most `size` bytes."""
    return text.encode()[:size].decode(errors="ignore").encode()


def chosen(scorer: Scorer, question: Question, alone: dict[bytes, float]) -> int:
    """The completion that the prompt makes most likely. alone: bits of completions without a prompt, kept between
    questions."""
    gains = []
    for completion in question.completions:
        if completion not in alone:
            alone[completion] = scorer.bits(completion)
        gains.append(alone[completion] - scorer.bits(completion, question.prompt))
    return max(range(len(gains)), key=gains.__getitem__)


def answers(model: Path, asked: Sequence[Question], entropy_model: Path | None) -> dict[str, float]:
    """The share of right answers in each language."""
    scorer = scorer_of(load_on("cpu", model, entropy_model=entropy_model))
    alone: dict[bytes, float] = {}
    right: dict[str, list[bool]] = defaultdict(list)
    for question in asked:
        right[question.language].append(chosen(scorer, question, alone) == 0)
    return {language: sum(found) / len(found) for language, found in right.items()}


def tables(rows: Sequence[Mapping[str, Any]], asked: Sequence[Question]) -> list[str]:
    """Markdown: bits per byte, and the share of right answers, of each model in each language."""
    counts = {language: sum(question.language == language for question in asked) for language in LANGUAGES}
    lines = [f"| bits per byte | {' | '.join(('en', *LANGUAGES))} |", "|---" * (2 + len(LANGUAGES)) + "|"]
    lines += [_line(row["model"], [row["bits"].get(name) for name in ("en", *LANGUAGES)]) for row in rows]
    lines += ["", f"| right answers | all | {' | '.join(LANGUAGES)} |", "|---" * (2 + len(LANGUAGES)) + "|"]
    lines.append(f"| questions | {len(asked)} | {' | '.join(str(n) for n in counts.values())} |")
    for row in rows:
        total = sum(share * counts[language] for language, share in row["right"].items()) / len(asked)
        lines.append(_line(row["model"], [total, *(row["right"].get(name) for name in LANGUAGES)]))
    return lines


def _line(name: str, values: Sequence[float | None]) -> str:
    return f"| {name} | {' | '.join('' if value is None else f'{value:.3f}' for value in values)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study.add_arguments(parser, models=MODELS, pairs=0)
    parser.add_argument("--debs", type=Path, required=True, help="the folder with the packages of the corpus")
    arguments = parser.parse_args()
    pages = test_pages(arguments.debs)
    asked = [question for language in LANGUAGES for question in questions(pages, language)]
    runs = study.Study(arguments)
    rows = []
    for run, report in runs.reports():
        entropy_model = runs.out / study.ENTROPY / "model.pt" if run.reads_entropies else None
        right = answers(runs.train(run), asked, entropy_model)
        rows.append(
            {
                "model": run.variant.name,
                "seed": run.seed,
                "test_bits_per_byte": report["bits_per_byte"],
                "bits": study.bits_by(1, report["groups"]),
                "right": right,
            }
        )
    (runs.out / "languages.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = tables(rows, asked)
    (runs.out / "languages.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
