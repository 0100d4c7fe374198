"""Chat templates: rendered in a sandbox, with errors of one line."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from blt_runtime import Model, chat_template
from blt_runtime.chat_template import ChatTemplate
from blt_runtime.errors import InputError, ManifestError, UsageError
from blt_runtime.server import Settings, create_app
from tests.runtime.bundles import edit, write_bundle
from tests.runtime.server.clients import Client, error_of, null_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Größe?"}]
Bundle = Callable[[str], Path]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle that holds a template."""

    def write(template: str) -> Path:
        write_bundle(tmp_path / "bundle")
        edit(tmp_path / "bundle", chat_template=template)
        return tmp_path / "bundle"

    return write


def test_messages_become_one_prompt() -> None:
    template = ChatTemplate(TEMPLATE)
    assert template.render(MESSAGES).decode() == "<user>Größe?<|eos|>\n<assistant>"
    assert template.render(MESSAGES, generation_prompt=False).decode() == "<user>Größe?<|eos|>\n"


@pytest.mark.parametrize(
    "source", ["{% for m in messages %}", "{{ }", "{{ a b }}", "x" * 100_000], ids=["open", "brace", "words", "long"]
)
def test_a_source_that_is_no_template(source: str) -> None:
    with pytest.raises(UsageError, match="the chat template") as error:
        ChatTemplate(source)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('only\nusers') }}",
        "{{ messages[7].content }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ range(10**9) }}",
        "{{ 1 // 0 }}",
    ],
    ids=["raised", "index", "classes", "files", "changes", "range", "division"],
)
def test_what_a_template_may_not_do_is_one_error(source: str) -> None:
    with pytest.raises(InputError, match="the chat template refuses these messages: ") as error:
        ChatTemplate(source).render(MESSAGES)
    assert "\n" not in str(error.value)


LIMITED = {
    "silent loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "0.02 s"),
    "kept text": (
        "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}.{% endfor %}{% endfor %}{% endset %}",
        "0.02 s",
    ),
    "macro": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "0.02 s",
    ),
    "text": ("{% for i in range(2000) %}{{ i }}{% endfor %}", "more than 1,000 characters"),
    "repeated text": ("{{ 'x' * 1001 }}", "more than 1,000 items"),
    "repeated list": ("{{ 1001 * [7] }}", "more than 1,000 items"),
    "power": ("{{ 7 ** 9999999999 }}", "more than 4,096 bits"),
    "product": ("{{ 7 ** 1000 * 7 ** 1000 }}", "more than 4,096 bits"),
}


@pytest.mark.parametrize("name", LIMITED)
def test_a_rendering_has_limits(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.02)
    monkeypatch.setattr(chat_template, "MOST_CHARACTERS", 1000)
    source, reason = LIMITED[name]
    template = ChatTemplate(source)  # computes nothing yet
    for _ in range(2):
        with pytest.raises(InputError, match=reason):
            template.render(MESSAGES)


def test_values_within_the_limits_are_those_of_jinja() -> None:
    template = ChatTemplate("{{ 'ab' * 3 }}{{ -2 * [1] }}{{ 2 ** 10 }}{{ 2 ** -1 }}{{ 0.5 * 3 }}{{ True * 2 }}")
    assert template.render(MESSAGES).decode() == "ababab[]10240.51.52"


@pytest.mark.parametrize("address", ["/v1/chat/completions", "/tokenize"])
def test_the_event_loop_goes_on_while_a_template_renders(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    held, begun = threading.Event(), threading.Event()

    def later(*_: object) -> bytes:
        begun.set()
        held.wait()
        return b"hi"

    monkeypatch.setattr(ChatTemplate, "render", later)
    app = create_app(null_model(), Settings(name="tiny", chat_template="x", deadline=0.05))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as many:
            waiting = asyncio.create_task(many.post(address, json={"messages": MESSAGES}))
            await asyncio.to_thread(begun.wait)
            assert (await many.get("/health")).status_code == 200
            return await waiting

    assert error_of(asyncio.run(ask()), 503)["code"] == "deadline_exceeded"
    assert "503" in Client(app).get("/openapi.json").json()["paths"][address]["post"]["responses"]
    held.set()
    app.state.service.template.close()
    app.state.service.scheduler.close()


def test_a_server_uses_the_template_of_its_bundle(bundle: Bundle) -> None:
    model = Model.open(bundle(TEMPLATE), backend="null")
    for settings, wanted in ((Settings(), "<user>Größe?<|eos|>\n<assistant>"), (Settings(chat_template="own"), "own")):
        app = create_app(model, settings)
        client = Client(app)
        tokens = client.ok("/tokenize", messages=MESSAGES, add_special_tokens=False)["tokens"]
        assert client.ok("/detokenize", tokens=tokens)["prompt"] == wanted
        assert client.get("/tokenizer_info").json()["chat_template"] == (settings.chat_template or TEMPLATE)
        app.state.service.scheduler.close()


def test_a_stored_template_is_bounded(bundle: Bundle) -> None:
    with pytest.raises(ManifestError, match="'chat_template' of over 65,536 characters"):
        Model.open(bundle("x" * 70_000), backend="null")
