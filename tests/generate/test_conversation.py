"""A conversation in one stream: what the stream holds after answers, rewinds, interruptions and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from blt.generate.chat_format import PLAIN, ChatFormat, format_of
from blt.generate.conversation import Conversation
from blt_runtime import GenerateOptions, Model, PatchRule, Stream
from blt_runtime.backends.null import null_spec
from blt_runtime.chat import Message, plain
from blt_runtime.errors import Cancelled, CapacityError, InputError, UsageError
from blt_runtime.ids import BOE, BOS, EOS, decode, encode
from blt_runtime.sampling import Sampler
from tests.runtime.bundles import edit, write_bundle
from tests.runtime.streams import model_of

Says = Callable[..., None]
QUESTION, NEXT = "What is a byte?", "And a patch?"


class Scripted(Sampler):
    """Chooses the given ids whatever the logits are, then EOS."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__(0.0)
        self._ids = iter(ids)

    def __call__(self, logits_V: np.ndarray) -> int:
        return next(self._ids, EOS)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    """`says(one, other)`: the texts of the next answers, or their ids."""

    def script(*answers: str | list[int]) -> None:
        left = [Scripted(encode(a, bos=False).tolist() if isinstance(a, str) else a) for a in answers]
        monkeypatch.setattr(GenerateOptions, "sampler", lambda self, random=None: left.pop(0))

    return script


def conversation(
    system: str | None = None, seed: int | None = 3, capacity: int = 512, template: str | None = None
) -> tuple[Conversation, Stream]:
    stream = model_of(null_spec(capacity_bytes=capacity)).stream()
    format = PLAIN if template is None else of_template(template)
    return Conversation(stream, system, format=format, seed=seed), stream


def of_template(source: str) -> ChatFormat:
    """The format of a bundle with this chat template."""
    with TemporaryDirectory() as folder:
        write_bundle(Path(folder) / "bundle", null_spec())
        edit(Path(folder) / "bundle", chat_template=source)
        return format_of(Model.open(Path(folder) / "bundle", "null"))


def ask(talk: Conversation, message: str = QUESTION, n: int = 20) -> bytes:
    return b"".join(talk.ask(message, n))


def assert_same_state(one: Stream, other: Stream) -> None:
    """Also after more bytes, which read the caches."""
    for stream in (one, other):
        stream.append("go on")
    assert one.ids.tolist() == other.ids.tolist()
    assert one.patch_lengths.tolist() == other.patch_lengths.tolist()
    np.testing.assert_array_equal(one.logits, other.logits)


def assert_holds_its_messages(talk: Conversation, stream: Stream) -> None:
    assert stream.ids[0] == BOS
    assert decode(stream.ids) + b"\nassistant: " == plain(talk.messages)
    read_at_once = model_of(stream.spec).stream()
    read_at_once.append(decode(stream.ids))
    assert_same_state(stream, read_at_once)


def test_the_stream_holds_the_text_of_all_messages() -> None:
    talk, stream = conversation("Be brief.")
    first, second = ask(talk), ask(talk, NEXT)
    assert talk.messages[0] == Message("system", "Be brief.")
    assert [m.content for m in talk.messages[1:]] == [QUESTION.encode(), first, NEXT.encode(), second]
    assert_holds_its_messages(talk, stream)


def test_an_exchange_appends_its_own_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    talk, stream = conversation()
    ask(talk)
    read: list[bytes] = []
    monkeypatch.setattr(stream, "append", lambda text, cancelled: read.append(text))
    talk.ask(NEXT, 20)
    assert read == [f"\nuser: {NEXT}\nassistant: ".encode()]


@pytest.mark.parametrize("then", ["", "user: No.", "system:"])
def test_an_answer_ends_where_the_next_message_would_begin(says: Says, then: str) -> None:
    says(f"Eight bits.\nuser:{then}")
    talk, stream = conversation()
    assert ask(talk, n=40) == b"Eight bits."
    assert talk.exchanges[-1].finish == "stop"
    assert_holds_its_messages(talk, stream)


@pytest.mark.parametrize("special", [EOS, BOS, BOE])
def test_a_special_id_ends_an_answer_and_is_not_kept(says: Says, special: int) -> None:
    says([*encode("Yes\nus", bos=False).tolist(), special, 70, 71])
    talk, stream = conversation()
    assert ask(talk) == b"Yes\nus"
    assert talk.exchanges[-1].finish == "eos"
    assert_holds_its_messages(talk, stream)


def test_an_answer_of_n_bytes_keeps_what_might_have_begun_a_stop_string(says: Says) -> None:
    says("Yes\nuser")
    talk, stream = conversation()
    assert ask(talk, n=6) == b"Yes\nus"
    assert talk.exchanges[-1].finish == "length"
    assert_holds_its_messages(talk, stream)


@pytest.mark.parametrize("read", range(1, 9))
def test_an_answer_that_is_left_is_what_was_yielded(says: Says, read: int) -> None:
    says("Yes\nusers", "No")
    talk, stream = conversation()
    pieces = talk.ask(QUESTION, 20)
    given = b"".join(next(pieces) for _ in range(read))
    assert talk.messages[-1] == Message("assistant", given)
    assert talk.exchanges[-1].finish is None
    assert ask(talk, NEXT, 2) == b"No"
    assert_holds_its_messages(talk, stream)


def test_a_rewind_leaves_the_state_of_a_conversation_without_the_exchange() -> None:
    talk, stream = conversation("Be brief.")
    never, other = conversation("Be brief.")
    ask(talk), ask(never)
    ask(talk, "And this is taken back?", 60)
    assert talk.rewind().message == b"And this is taken back?"
    assert ask(talk, NEXT) == ask(never, NEXT)
    assert talk.messages == never.messages
    assert_same_state(stream, other)


@pytest.mark.parametrize("read", [0, 3])
def test_an_exchange_is_taken_back_while_its_answer_is_left(read: int) -> None:
    talk, stream = conversation()
    pieces = talk.ask(QUESTION, 20)
    for _ in range(read):
        next(pieces)
    talk.rewind()
    assert not talk.messages
    assert_same_state(stream, conversation()[1])


def test_without_an_exchange_nothing_is_taken_back() -> None:
    with pytest.raises(UsageError, match="there is no exchange"):
        conversation("Be brief.")[0].rewind()


def test_a_reset_forgets_all_but_the_system_message() -> None:
    talk, stream = conversation("Be brief.")
    never, other = conversation("Be brief.")
    ask(talk), ask(talk, NEXT)
    talk.reset()
    assert talk.messages == [Message("system", "Be brief.")]
    assert ask(talk, NEXT) == ask(never, NEXT)
    assert_same_state(stream, other)


def test_a_seed_repeats_the_answers_and_each_exchange_has_its_own_draws() -> None:
    def answers(seed: int | None) -> list[bytes]:
        talk, _ = conversation(seed=seed)
        return [ask(talk), ask(talk)]

    assert answers(1) == answers(1) != answers(2)
    assert answers(None) != answers(None)


@pytest.mark.parametrize("spare", [-1, 0])
def test_a_message_needs_room_for_itself_and_one_byte(spare: int) -> None:
    needed = len(plain([Message("user", QUESTION)])) + 1
    talk, stream = conversation(capacity=1 + needed + spare)
    if spare < 0:
        with pytest.raises(CapacityError, match=f"needs {needed - 1} bytes and one for an answer, and {needed - 1} of"):
            talk.ask(QUESTION, 5)
        assert not talk.messages
        assert stream.position == 1
    else:
        assert len(ask(talk, n=5)) == 1
        assert talk.exchanges[-1].finish == "full"


def test_a_full_conversation_refuses_messages_and_goes_on_after_a_rewind(says: Says) -> None:
    says("Yes", "n" * 200, "No")
    talk, stream = conversation(capacity=120)
    ask(talk), ask(talk, NEXT, 200)
    assert talk.exchanges[-1].finish == "full"
    assert stream.position == 120
    held = stream.ids
    with pytest.raises(CapacityError):
        ask(talk)
    assert stream.ids.tolist() == held.tolist()
    talk.rewind()
    assert ask(talk, n=2) == b"No"
    assert_holds_its_messages(talk, stream)


def test_a_message_with_too_many_patches_is_refused_and_nothing_is_lost() -> None:
    stream = model_of(null_spec(capacity_patches=12)).stream()
    talk = Conversation(stream, seed=1)
    ask(talk, "a", 1)
    held = stream.ids
    with pytest.raises(CapacityError, match=r"the message does not fit: the text needs more than .* 12 patches"):
        talk.ask(QUESTION * 9, 1)
    assert stream.ids.tolist() == held.tolist()
    assert len(talk.exchanges) == 1


def test_a_system_message_must_leave_room() -> None:
    with pytest.raises(CapacityError, match="the system message does not fit"):
        conversation("Be brief." * 9, capacity=64)


def test_a_message_that_is_cancelled_while_it_is_read_leaves_nothing() -> None:
    talk, stream = conversation()
    ask(talk)
    held, calls = stream.ids, iter([False, True])
    with pytest.raises(Cancelled):
        talk.ask(NEXT * 3, 20, cancelled=lambda: next(calls))
    assert stream.ids.tolist() == held.tolist()
    assert len(talk.exchanges) == 1


BRACKETS = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}[assistant]"
NEWEST = "{{ messages[-1].content }}|"


def test_a_bundles_template_writes_the_messages_and_an_answer_ends_at_eos(says: Says) -> None:
    says("Eight\nuser: bits", "No")
    talk, stream = conversation("Be brief.", template=BRACKETS)
    assert ask(talk) == b"Eight\nuser: bits"
    assert decode(stream.ids) == f"[system]Be brief.[user]{QUESTION}[assistant]Eight\nuser: bits".encode()
    ask(talk, NEXT)
    assert decode(stream.ids).endswith(f"user: bits[user]{NEXT}[assistant]No".encode())


@pytest.mark.parametrize(("template", "text"), [(BRACKETS, f"[user]{QUESTION}[assistant]Yes[user]{NEXT}[assistant]No"),
                                                (NEWEST, f"{NEXT}|No")])  # fmt: skip
def test_what_a_template_writes_differently_than_before_is_read_again(says: Says, template: str, text: str) -> None:
    says("Yes  ", "No")
    talk, stream = conversation(template=template)
    ask(talk), ask(talk, NEXT)
    assert decode(stream.ids) == text.encode()
    read_at_once = model_of(stream.spec).stream()
    read_at_once.append(text)
    assert_same_state(stream, read_at_once)


@pytest.mark.parametrize("template", [BRACKETS, NEWEST])
def test_a_rewound_exchange_of_a_template_was_never_said(says: Says, template: str) -> None:
    says("Yes  ", "Never ", "No", "Yes  ", "No")
    talk, stream = conversation(template=template)
    never, other = conversation(template=template)
    ask(talk), ask(talk, "And this is taken back?"), talk.rewind(), ask(talk, NEXT)
    ask(never), ask(never, NEXT)
    assert talk.messages == never.messages
    assert_same_state(stream, other)


@pytest.mark.parametrize("fails", ["full", "cancelled", "refused"])
def test_a_message_that_fails_after_a_template_has_changed_the_text_leaves_it(says: Says, fails: str) -> None:
    says("Yes  ")
    refuses = "{% if 'x' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}"
    stream = model_of(null_spec(PatchRule("static", patch_size=8), capacity_patches=12)).stream()
    talk = Conversation(stream, format=of_template(refuses * (fails == "refused") + BRACKETS))
    ask(talk, "a")
    held, calls = stream.ids, iter([False, True])
    with pytest.raises({"full": CapacityError, "cancelled": Cancelled, "refused": InputError}[fails]):
        talk.ask("x b " * (60 if fails == "full" else 4), 5, cancelled=lambda: fails == "cancelled" and next(calls))
    assert stream.ids.tolist() == held.tolist()
    assert [message.content for message in talk.messages] == [b"a", b"Yes  "]


def test_an_answer_that_is_not_utf8_is_shown_to_a_template_with_replacements(says: Says) -> None:
    says([4 + 0xFF], "No")
    talk, stream = conversation(template=BRACKETS)
    ask(talk), ask(talk, NEXT)
    assert decode(stream.ids).decode() == f"[user]{QUESTION}[assistant]\ufffd[user]{NEXT}[assistant]No"
