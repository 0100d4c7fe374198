"""The page at `/` in headless Chromium, against a real server of the null backend, which writes every byte value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests import browser as browser_tests
from tests.runtime.server.servers import eventually, idle, metric, served

browser_tests.demand()
SHOWN = {"\n": "↵", "\t": "⇥", "\r": "␍", " ": "\u00a0"}
MARKUP = "<script>document.title = 'run'</script><img src=x onerror=alert(1)>"
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browser_tests.chromium() as started:
        yield started


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as (found, _):
        yield found


@pytest.fixture
def slow_url() -> Iterator[str]:
    """Of a server that takes 15 s for its longest answer, so that a busy machine stops it in time."""
    with served(seconds=0.05) as (found, _):
        yield found


@pytest.fixture
def opened(browser: Any, url: str) -> Iterator[Open]:
    """Opens the page. At the end nothing was logged, and nothing was asked of another origin."""
    contexts, wrong = [], []

    def open_page(address: str = url, width: int = 1200, allowed: str = "") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: wrong.append(message.text) if not allowed else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith((address, "data:")) else wrong.append(request.url)
        )
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


CLICK_STOP = """() => new Promise((done) => {
  const look = () => {
    if (document.querySelectorAll(".cell").length < 4) return setTimeout(look, 5);
    document.getElementById("stop-button").click();
    done();
  };
  look();
})"""
"""Clicks while the text streams, however late the browser hears of a test's click."""


def generate(page: Any, n: int, seed: int = 1, prompt: str = "abc") -> None:
    for field, value in (("prompt", prompt), ("max_tokens", n), ("seed", seed)):
        page.fill(f"#{field}", str(value))
    page.click("#generate")


def asked(url: str, n: int, seed: int = 1) -> dict[str, Any]:
    body = {"prompt": "abc", "max_tokens": n, "temperature": 0.8, "seed": seed, "return_patches": True}
    choice: dict[str, Any] = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    return choice


def test_the_text_its_patches_and_entropies_are_those_of_the_server(opened: Open, url: str) -> None:
    page = opened()
    generate(page, 120)
    page.get_by_text("done:").wait_for()
    page.wait_for_timeout(50)
    expected = asked(url, 120)["patches"]
    cells = page.locator(".cell").evaluate_all(
        "cells => cells.map(c => [c.firstChild.textContent, c.className, c.querySelectorAll('i').length])"
    )
    text = bytes(expected["bytes"]).decode(errors="surrogateescape")
    wanted = [f"\\x{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) <= 0xDCFF else SHOWN.get(c, c) for c in text]
    assert [shown if shown != "□" else None for shown, *_ in cells] == [
        None if len(c) == 1 and not c.isprintable() and c not in SHOWN.values() else c for c in wanted
    ]
    assert sum(bars for *_, bars in cells) == len(expected["bytes"])
    bars = page.locator(".bars i").evaluate_all("bars => bars.map(b => b.style.getPropertyValue('--e'))")
    assert [float(bar) for bar in bars] == pytest.approx([min(1.0, e / 4) for e in expected["entropies"]])
    marked = page.locator(".cell.starts, .bars i.starts").count()
    assert marked == sum(expected["starts"]) > 5
    assert page.locator("#bytes").text_content() == str(len(expected["bytes"]))


def test_stop_frees_the_row(opened: Open, slow_url: str) -> None:
    page = opened(slow_url)
    generate(page, 290, seed=3)
    page.evaluate(CLICK_STOP)
    page.get_by_text("stopped").wait_for()
    eventually(lambda: idle(slow_url))
    assert page.locator(".cell").count() < 290
    assert page.locator("#generate").is_enabled()


def test_the_keyboard_generates_and_stops(opened: Open, slow_url: str) -> None:
    before = metric(slow_url, "vllm:prompt_tokens_total")
    page = opened(slow_url)
    page.fill("#max_tokens", "290")
    page.press("#prompt", "Control+Enter")
    page.locator(".cell").first.wait_for()
    page.press("#prompt", "Escape")
    page.get_by_text("stopped").wait_for()
    assert metric(slow_url, "vllm:prompt_tokens_total") > before
    eventually(lambda: idle(slow_url))


def test_markup_is_shown_as_text(opened: Open) -> None:
    page = opened()
    generate(page, 3, prompt=MARKUP)
    page.get_by_text("done:").wait_for()
    assert page.locator("#text .prompt").text_content() == MARKUP
    assert page.title() == "blt"
    assert page.locator("#text img, #text script").count() == 0


def test_errors_of_the_server_are_shown(opened: Open) -> None:
    page = opened(allowed="the browser logs the status")
    page.locator("#model", has_text="tiny").wait_for()  # the page sets `max` when it knows the model
    page.evaluate("() => document.getElementById('max_tokens').removeAttribute('max')")
    generate(page, 10_000)
    page.get_by_role("alert").filter(has_text="exceed").wait_for()
    assert page.locator("#generate").is_enabled()


def test_a_server_with_keys_asks_for_one(opened: Open) -> None:
    with served(60.0, "secret") as (address, _):
        page = opened(address, allowed="the browser logs the status")
        generate(page, 3)
        page.get_by_role("alert").filter(has_text="key").wait_for()
        page.fill("#key", "secret")
        generate(page, 3)
        page.get_by_text("done:").wait_for()


def test_a_narrow_window_does_not_scroll_sideways(opened: Open) -> None:
    page = opened(width=360)
    generate(page, 60)
    page.get_by_text("done:").wait_for()
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360


def test_the_page_may_load_nothing_from_elsewhere(url: str) -> None:
    policy = httpx.get(url).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
