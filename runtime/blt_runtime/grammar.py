"""Constrained generation: a text that matches a JSON schema, a regular expression or a Lark grammar.

llguidance (extra `grammar`) says which bytes may come next. `GrammarSampler` chooses among those only. Where a single
byte may come next, it is forced: it needs no choice and takes no random number.

Letters: V vocabulary, A allowed ids, N tokens so far.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from . import grammar_compiler
from .arguments import choice, flag
from .errors import BackendError, InputError, MissingExtra, UsageError, shown
from .grammar_compiler import Source
from .ids import EOS, OFFSET, VOCAB, Ids
from .sampling import Array, Sampler
from .speculation.drafters import Drafter

if TYPE_CHECKING:
    from llguidance import LLMatcher

Whitespace = Literal["fixed", "flexible"]
MOST_CHARACTERS = 1 << 17
"""Of a grammar. Below it, one step of generation stays within a fraction of a second, whatever the grammar."""
TRIAL_WAIT = 30.0
"""Seconds until a trial is given up that gets no processor."""
NEVER = 0b1011
"""The bits of the special ids that no text contains: all but EOS."""
KINDS = {"schema": "the JSON schema", "regex": "the regular expression", "lark": "the Lark grammar"}


class Grammar:
    """What a text must match: exactly one of `schema`, `regex` and `lark`. Compiled once, for any number of texts.

    schema: a JSON schema, as a dict or as JSON. The text is one JSON value. regex: a regular expression that the whole
    text matches (Rust's syntax, without look-around and back references). lark: a grammar in llguidance's variant of
    Lark, whose first rule is `start`. whitespace: of JSON. "fixed" writes `, ` and `: ` and no other whitespace between
    tokens. "flexible" allows any, also without end: models then often write spaces until the limit.

    trusted: compile without a trial in a process of its own, which takes 0.1 s. It bounds what a grammar may cost:
    2 seconds and 1 GiB. Leave it out for a grammar that a stranger wrote.

    The model decides how long a text is: bound it with `maxLength`, `maxItems` or `{1,20}`. A text that the limit of
    `generate` ends is a prefix of a match.

    Example:
        person = {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
        text = b"".join(stream.generate(200, grammar=Grammar(schema=person)))

    Raises UsageError for bad arguments, InputError for a grammar that is malformed, not supported, too complex or
    matched by no text, and MissingExtra.
    """

    def __init__(
        self,
        *,
        schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        lark: str | None = None,
        whitespace: Whitespace = "fixed",
        trusted: bool = False,
    ) -> None:
        choice("whitespace", whitespace, get_args(Whitespace))
        given = {"schema": schema, "regex": regex, "lark": lark}
        kinds = [kind for kind, value in given.items() if value is not None]
        if len(kinds) != 1:
            raise UsageError("a grammar needs exactly one of schema, regex and lark")
        source = Source(kinds[0], _text_of(kinds[0], given[kinds[0]]), whitespace == "flexible")
        if importlib.util.find_spec("llguidance") is None:
            raise MissingExtra("llguidance", "grammar")
        if reason := None if flag("trusted", trusted) else _tried(source):
            raise _unusable(source, reason)
        self._source = source
        self._start = self._compile()

    def _compile(self) -> LLMatcher:
        found = grammar_compiler.compiled(self._source)
        if isinstance(found, str):
            raise _unusable(self._source, found)
        return found

    def _start_after(self, failed: LLMatcher | None) -> LLMatcher:
        """A matcher at the beginning of a text that shares no state with `failed`.

        The copies of a matcher share the states of its lexer, and with them the limit that one text may have reached.
        """
        if self._start is failed:
            self._start = self._compile()
        return self._start

    def sampler(
        self,
        temperature: float = 0.8,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | np.random.Generator | None = None,
    ) -> GrammarSampler:
        """A sampler for one text. The options are those of `Sampler`, and apply to the bytes that are allowed."""
        return GrammarSampler(self, temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)

    def drafter(self) -> Drafter:
        """A drafter for one text that proposes the bytes that are forced."""
        return _ForcedDrafter(GrammarText(self))


class GrammarText:
    """One text under a grammar: the ids so far, and those that may follow."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar, self._renewed = grammar, False
        self.ids: list[int] = []
        self._begin(None)
        self._make_buffer()

    def _begin(self, failed: LLMatcher | None) -> None:
        self._start = self._grammar._start_after(failed)
        self._matcher = self._start.deep_copy()

    def _make_buffer(self) -> None:
        self._bits = np.zeros((VOCAB + 31) // 32, dtype=np.int32)
        self._address = self._bits.ctypes.data
        self._bytes = self._bits.view(np.uint8)

    def copy(self) -> GrammarText:
        """The same text, to be continued apart from this one."""
        made = copy.copy(self)
        made.ids, made._matcher = self.ids.copy(), self._matcher.deep_copy()
        made._make_buffer()
        return made

    @property
    def ended(self) -> bool:
        """Whether EOS was chosen."""
        return self.ids[-1:] == [EOS]

    @property
    def complete(self) -> bool:
        """Whether the text so far matches the grammar."""
        return self.ended or bool(self._matcher.is_accepting())

    def allowed(self) -> Array:
        """The ids that may follow [A], ascending: bytes, and EOS where the text may end.

        Raises InputError where the grammar has become too complex, and UsageError after EOS.
        """
        if self.ended:
            raise UsageError("this text has ended: rewind it, or begin another one with another sampler")
        ids_A = self._mask()
        if not len(ids_A) and self._read_again():
            ids_A = self._mask()
        if not len(ids_A):
            raise self._failure()
        return ids_A

    def _mask(self) -> Array:
        """The ids that may follow [A]; none in a failed matcher, which allows EOS."""
        self._matcher.unsafe_compute_mask_ptr(self._address, self._bits.nbytes)
        self._bits[0] &= ~NEVER
        ids_A: Array = np.flatnonzero(np.unpackbits(self._bytes, count=VOCAB, bitorder="little"))
        return ids_A[:0] if self._matcher.is_error() else ids_A

    def take(self, id: int) -> None:
        """Continues with an id that is allowed. Raises InputError where the grammar has become too complex."""
        taken = id == EOS or self._matcher.consume_token(id)
        if not taken and not (self._read_again() and self._matcher.consume_token(id)):
            raise self._failure()
        self.ids.append(id)

    def _read_again(self) -> bool:
        """Reads the text with a new matcher, once, since other texts may have used up a limit. False if that fails."""
        if self._renewed:
            return False
        self._begin(self._start)
        self._renewed = True
        return bool(self._matcher.consume_tokens(self.ids))

    def _failure(self) -> InputError:
        return InputError(f"the grammar allows no byte after {len(self.ids)}: {_reason(self._matcher.get_error())}")

    def forced(self) -> list[int]:
        """The ids that must follow, each without an alternative. The text stays as it is."""
        ids: list[int] = [] if self.ended else self._matcher.compute_ff_tokens()
        return ids

    def become(self, ids: list[int]) -> bool:
        """Makes `ids` the text. False if they do not match: the text is then the part of them that does."""
        same = next((at for at, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), None)
        kept = min(len(self.ids), len(ids)) if same is None else same
        drop = len(self.ids) - kept - self.ended
        if self._matcher.is_error() or (drop > 0 and not self._matcher.rollback(drop)):
            self._begin(self._start)
            kept = 0
        del self.ids[kept:]
        rest = ids[kept:]
        ends = rest[-1:] == [EOS]
        read = self._matcher.try_consume_tokens(rest[: len(rest) - ends])
        self.ids += rest[:read]
        if ends and read == len(rest) - 1 and self.complete:
            self.ids.append(EOS)
        return len(self.ids) == len(ids)


class GrammarSampler(Sampler):
    """Chooses among the ids that a grammar allows, and remembers the text so far. Made by `Grammar.sampler`.

    One sampler is for one text. It chooses EOS where the text may end. An id without an alternative takes no random
    number, so a seed gives the same text whether forced ids are chosen, drafted or appended.
    """

    def __init__(
        self,
        grammar: Grammar,
        temperature: float,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        super().__init__(temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        self._text = GrammarText(grammar)
        self._chooser = self._make_chooser()

    def _make_chooser(self) -> Sampler:
        """Chooses from the logits of the allowed ids alone, with this sampler's random numbers."""
        return Sampler(self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=self._random)

    @property
    def complete(self) -> bool:
        """Whether the text so far matches the grammar. False: it is a prefix of a match."""
        return self._text.complete

    def __call__(self, logits_V: Array) -> int:
        ids_A = self._text.allowed()
        id = int(ids_A[0] if len(ids_A) == 1 else ids_A[self._chooser(logits_V[ids_A])])
        self._text.take(id)
        return id

    def forced(self) -> Sequence[int]:
        ids = self._text.forced()
        for id in ids:
            self._text.take(id)
        return ids

    def drafter(self) -> Drafter:
        """A drafter that proposes the ids that the text forces, for this sampler's generation alone."""
        return _OwnDrafter(self._text)

    def follow(self, ids_N: Ids, forgotten: int = 0) -> None:
        """Continues from a text that was changed since: rewound, or with bytes that were appended.

        Raises InputError for a text that does not match the grammar."""
        ids = [*self._text.ids[:forgotten], *ids_N.tolist()]
        if not self._text.become(ids):
            at = len(self._text.ids)
            raise InputError(f"the text does not match the grammar from byte {at} on: {shown(_bytes(ids[at:]))}")

    def copy(self) -> GrammarSampler:
        made = super().copy()
        assert isinstance(made, GrammarSampler)
        made._text, made._chooser = self._text.copy(), made._make_chooser()
        return made

    def skip(self) -> None:
        """Raises UsageError: what follows depends on the id that is skipped."""
        raise UsageError("a sampler with a grammar cannot skip an id: give it a copy that has chosen the id")

    def candidates(self, logits_V: Array) -> tuple[Array, Array]:
        ids_A = self._text.allowed()
        order_A, mass_A = self._chooser.candidates(logits_V[ids_A])
        return ids_A[order_A], mass_A

    def probabilities(self, logits_V: Array) -> Array:
        ids_A = self._text.allowed()
        p_V = np.zeros(len(logits_V))
        p_V[ids_A] = self._chooser.probabilities(logits_V[ids_A])
        return p_V

    def verify(self, logits_V: Array, id: int, q_V: Array) -> int:
        id = super().verify(logits_V, id, q_V)
        self._text.take(id)
        return id


class _OwnDrafter(Drafter):
    """Proposes the ids that the sampler's own text forces."""

    def __init__(self, text: GrammarText) -> None:
        self._text = text

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        return self._text.forced()[:limit]


class _ForcedDrafter(Drafter):
    """Proposes forced ids. The grammar's text begins with the first id of the first round."""

    def __init__(self, text: GrammarText) -> None:
        self._text = text
        self._start: int | None = None

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        if self._start is None:
            self._start = len(ids_N) - 1
        ids: list[int] = ids_N[self._start :].tolist()
        return self._text.forced()[:limit] if self._text.become(ids) else ()


def _unusable(source: Source, reason: str) -> InputError:
    return InputError(f"{KINDS[source.kind]} cannot be used: {_reason(reason)}")


def _text_of(kind: str, value: object) -> str:
    """The grammar as text. Raises UsageError for another type, InputError for too much or for no JSON object."""
    wanted = "text or a dict" if kind == "schema" else "text"
    if not isinstance(value, str) and not (kind == "schema" and isinstance(value, Mapping)):
        raise UsageError(f"{kind} must be {wanted}, not {shown(value)}")
    text = _json_of(value) if isinstance(value, Mapping) else value
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{KINDS[kind]} has {len(text):,} characters; the most is {MOST_CHARACTERS:,}")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise InputError(f"{KINDS[kind]} is no valid text: it has lone surrogates")
    if kind == "schema" and not isinstance(value, Mapping):
        _check_object(text)
    return text


def _json_of(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the JSON schema has no JSON: {_reason(str(error))}") from error


def _check_object(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the JSON schema is no JSON: {_reason(str(error))}") from error
    if not isinstance(schema, dict):
        raise InputError(f"the JSON schema must be an object, not {shown(schema)}")


def _tried(source: Source) -> str | None:
    """Why the grammar cannot be used, found out by compiling it in another process."""
    place = importlib.util.find_spec("llguidance")
    folder = str(Path(place.origin).parent.parent) if place is not None and place.origin else ""
    command = [sys.executable, "-I", grammar_compiler.__file__, folder]
    complex = "it is too complex to compile"
    try:
        done = subprocess.run(
            command, input=json.dumps(source), capture_output=True, text=True, timeout=TRIAL_WAIT, check=False
        )
    except subprocess.TimeoutExpired:
        return complex
    except OSError as error:
        raise _no_trial(str(error)) from error
    if done.returncode < 0:
        return complex
    try:
        reason: str | None = json.loads(done.stdout)
    except ValueError as error:
        raise _no_trial(done.stderr.strip().rpartition("\n")[2]) from error
    return reason


def _no_trial(reason: str) -> BackendError:
    return BackendError(
        f"the trial of the grammar in a process of its own failed ({_reason(reason)}): for a grammar of your own, "
        "pass trusted=True"
    )


def _reason(message: str) -> str:
    """llguidance's message as a part of a line: its first line, or that of a regular expression's error."""
    if "NoExtension" in message:
        return "no text matches it"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    found = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "no reason is known")
    text = found.removeprefix("error: ")
    return text if len(text) <= 300 else f"{text[:300]}..."


def _bytes(ids: list[int]) -> bytes:
    return bytes(id - OFFSET for id in ids if id >= OFFSET)
