"""Chat templates: rendered in a sandbox, with errors of one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from blt_runtime import Model
from blt_runtime.chat_template import ChatTemplate
from blt_runtime.errors import InputError, ManifestError, UsageError
from blt_runtime.server import Settings, create_app
from tests.runtime.bundles import edit, write_bundle
from tests.runtime.server.clients import Client

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
