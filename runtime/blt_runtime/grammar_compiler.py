"""Compiles grammars with llguidance. As a script, it tries one under limits, where a crash harms no other process.

A few hundred bytes can make llguidance compute for minutes (intersections of regular expressions), and a long chain of
references overflows its stack, which ends the process. No parameter of llguidance prevents either. The script imports
nothing of ours, so that it starts quickly.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

TRIAL_SECONDS, TRIAL_MEMORY = 2, 1 << 30
"""Processor time and address space of a trial."""
TRIAL_STACK = 1 << 20
"""A trial's stack: an eighth of a thread's usual one, so that the process that tried a grammar has room for it."""
LIMITS = {"initial_lexer_fuel": 500_000, "max_lexer_states": 50_000, "verbose_errors": False}
"""Of llguidance, where not its defaults: a state takes 1 to 2 KB."""
FIXED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
FLEXIBLE = {"whitespace_flexible": True}


class Source(NamedTuple):
    """A grammar as it was given. kind: schema, regex or lark. flexible: JSON with any whitespace."""

    kind: str
    text: str
    flexible: bool = False


class _Bytes:
    """The vocabulary as llguidance asks for it: four special ids, then the bytes."""

    eos_token_id, bos_token_id, special_token_ids = 2, 1, (0, 1, 2, 3)
    tokens = tuple(f"<special {id}>".encode() for id in range(4)) + tuple(bytes([value]) for value in range(256))

    def __call__(self, text: str | bytes) -> list[int]:
        return [value + 4 for value in (text.encode() if isinstance(text, str) else text)]


@functools.cache
def tokenizer() -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])


def compiled(source: Source) -> LLMatcher | str:
    """A matcher at the beginning of a text, or why there is none."""
    from llguidance import LLMatcher, LLParserLimits

    make: dict[str, Any] = {"regex": LLMatcher.grammar_from_regex, "lark": LLMatcher.grammar_from_lark}
    try:
        if source.kind == "schema":
            options = FLEXIBLE if source.flexible else FIXED
            grammar = LLMatcher.grammar_from_json_schema(source.text, overrides=options)  # type: ignore[arg-type]
        else:
            grammar = make[source.kind](source.text)
        matcher = LLMatcher(tokenizer(), grammar, log_level=0, limits=LLParserLimits(**LIMITS))  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the library's language; no Exception
            raise
        return f"llguidance failed: {error}"
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error() or matcher


def _try(line: str) -> None:
    found = compiled(Source(*json.loads(line)))
    print(json.dumps(found if isinstance(found, str) else None), flush=True)


def main() -> None:
    """Tries the grammar in the line on stdin. Prints null, or why it cannot be used, as JSON. The one argument is the
    folder that holds llguidance."""
    for what, limit in (
        (resource.RLIMIT_CPU, TRIAL_SECONDS),
        (resource.RLIMIT_AS, TRIAL_MEMORY),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError):  # a lower limit is set already
            resource.setrlimit(what, (limit, limit))
    sys.path.insert(0, sys.argv[1])
    threading.stack_size(TRIAL_STACK)
    trial = threading.Thread(target=_try, args=(sys.stdin.readline(),))
    trial.start()
    trial.join()


if __name__ == "__main__":
    main()
