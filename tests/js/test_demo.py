"""runtime/js/demo in headless Chromium: the page draws what the Python runtime generates with the shipped model."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blt_runtime.ids import decode, encode
from tests import browser as browser_tests
from tests.js import bundles
from tests.js.bundles import MODULE, Case, demo_bundle, expected

bundles.demand_packages("onnxruntime-web")
browser_tests.demand()

BUILD = MODULE.parent / "demo" / "build.mjs"
PROMPT = "Grüße\ndef read(self, path):"
SHOWN = {"↵": "\n", "⇥": "\t", "\u00a0": " "}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_bundle(bundles.shared_folder(tmp_path_factory))


def build(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["node", str(BUILD), *map(str, args)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What build.mjs writes."""
    folder = tmp_path_factory.mktemp("demo") / "site"
    done = build(bundle, folder)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browser_tests.chromium() as started:
        yield started


class Opened:
    """Pages of one context, of any folder. `wrong`: what they logged, and what they asked of other sites."""

    def __init__(self, browser: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 860})
        self.stack = ExitStack()
        self.wrong: list[str] = []

    def __call__(self, root: Path, query: str = "", quiet: bool = True) -> Any:
        address = self.stack.enter_context(browser_tests.static_files(root))
        page = self.context.new_page()
        page.set_default_timeout(30_000)
        if quiet:
            page.on("console", lambda message: self.wrong.append(message.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda request: self.asked(request.url, address))
        page.goto(f"{address}/{query}")
        return page

    def asked(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:")):
            self.wrong.append(url)


@pytest.fixture(scope="module")
def opened(browser: Any) -> Iterator[Opened]:
    made = Opened(browser)
    yield made
    made.context.close()
    made.stack.close()


@pytest.fixture(autouse=True)
def nothing_is_wrong(opened: Opened) -> Iterator[None]:
    opened.wrong.clear()
    yield
    assert opened.wrong == []


@pytest.fixture(scope="module")
def shared(opened: Opened, site: Path) -> Any:
    return opened(site)


@pytest.fixture
def page(shared: Any) -> Any:
    """The page with the shipped model, which is opened once."""
    shared.bring_to_front()
    shared.locator("#generate:enabled").wait_for()
    return shared


def without(site: Path, folder: Path, name: str) -> Path:
    """A copy of the site that lacks a folder."""
    shutil.copytree(site, folder, ignore=shutil.ignore_patterns(name))
    return folder


def generate(page: Any, n: int, prompt: str = PROMPT, stop: str = "") -> None:
    """Greedily."""
    for field, value in (("prompt", prompt), ("max_tokens", n), ("temperature", 0), ("stop", stop)):
        page.fill(f"#{field}", str(value))
    page.click("#generate")


def drawn(page: Any) -> bytes:
    cells = page.locator(".cell > :first-child").all_text_contents()
    return "".join(SHOWN.get(cell, cell) for cell in cells).encode()


def continued(bundle: Path, n: int) -> tuple[bytes, list[float], int]:
    """What the Python runtime generates: bytes, the entropies before them, and how many patches begin with them."""
    ids = encode(PROMPT)
    found = expected(bundle, [Case(tuple(ids.tolist()), n)])[0]
    starts = np.cumsum(found["patch_lengths"])[:-1]
    begun = int(((starts >= len(ids)) & (starts < len(ids) + n)).sum())
    return decode(found["ids"]), found["entropies"][len(ids) - 1 : -1].tolist(), begun


def test_the_page_draws_the_greedy_bytes_patches_and_entropies_of_the_python_runtime(page: Any, bundle: Path) -> None:
    generate(page, 100)
    page.get_by_text("done: the length was reached").wait_for()
    page.wait_for_timeout(50)
    text, entropies, starts = continued(bundle, 100)
    assert drawn(page) == text
    bars = page.locator(".bars i").evaluate_all("bars => bars.map(b => Number(b.style.getPropertyValue('--e')))")
    assert bars == pytest.approx([min(1.0, entropy / 4) for entropy in entropies], abs=1e-4)
    assert page.locator(".cell.starts, .bars i.starts").count() == starts > 10
    assert page.locator("#bytes").text_content() == "100"
    assert int(page.locator("#speed").text_content()) > 0
    assert "32.0 MB, fp32" in page.locator("#model").text_content()


def test_a_stop_string_is_not_drawn(page: Any, bundle: Path) -> None:
    text = continued(bundle, 60)[0].decode()
    stop = text[20:24]
    generate(page, 60, stop=stop.replace("\n", "\\n"))
    page.get_by_text("done: the model or a stop string").wait_for()
    page.wait_for_timeout(50)
    assert drawn(page).decode() == text[: text.index(stop)]


def test_stop_ends_a_generation_and_the_next_one_begins_anew(page: Any, bundle: Path) -> None:
    generate(page, 4000)
    page.locator(".cell").nth(3).wait_for()
    page.click("#stop-button")
    page.get_by_text("stopped").wait_for()
    generate(page, 20)
    page.get_by_text("done:").wait_for()
    page.wait_for_timeout(50)
    assert drawn(page) == continued(bundle, 20)[0]


def test_escape_stops_the_reading_of_a_long_prompt(page: Any) -> None:
    generate(page, 5, prompt="x " * 4000)
    page.press("#prompt", "Escape")
    page.get_by_text("stopped").wait_for()
    assert page.locator(".cell").count() == 0


def test_a_text_beyond_the_capacity_is_one_line(page: Any) -> None:
    generate(page, 5, prompt="x" * 9000)
    page.get_by_role("alert").filter(has_text="exceed the capacity of 8192").wait_for()
    assert page.locator("#generate").is_enabled()


def test_a_page_without_onnxruntime_web_says_how_to_get_it(opened: Opened, site: Path, tmp_path: Path) -> None:
    page = opened(without(site, tmp_path / "site", "ort"), quiet=False)
    page.get_by_role("alert").filter(has_text="ort/ort.wasm.min.mjs is missing").filter(has_text="npm ci").wait_for()
    assert page.locator("#generate").is_disabled()


def test_a_page_without_its_modules_says_how_to_build_it(opened: Opened, site: Path, tmp_path: Path) -> None:
    page = opened(without(site, tmp_path / "site", "blt"), quiet=False)
    page.get_by_role("alert").filter(has_text="node runtime/js/demo/build.mjs BUNDLE OUT").wait_for()


def test_a_page_without_a_bundle_opens_a_chosen_folder(
    opened: Opened, site: Path, bundle: Path, tmp_path: Path
) -> None:
    page = opened(without(site, tmp_path / "site", "bundle"), quiet=False)
    page.get_by_role("alert").filter(has_text="404").wait_for()
    page.get_by_text("choose a bundle").wait_for()
    page.set_input_files("#folder", bundle)
    page.get_by_text("ready").wait_for()
    generate(page, 20)
    page.get_by_text("done:").wait_for()
    page.wait_for_timeout(50)
    assert drawn(page) == continued(bundle, 20)[0]
    assert page.locator("#model").text_content().startswith(bundle.name)


def test_a_chosen_folder_that_is_no_bundle_leaves_the_open_one(page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    page.set_input_files("#folder", tmp_path)
    page.get_by_role("alert").filter(has_text="manifest.json is missing").wait_for()
    generate(page, 3)
    page.get_by_text("done:").wait_for()


def test_dropped_files_open(page: Any, bundle: Path) -> None:
    drop = """async (names) => {
      const transfer = new DataTransfer();
      for (const name of names)
        transfer.items.add(new File([await (await fetch(`bundle/${name}`)).arrayBuffer()], name));
      document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(drop, [path.name for path in bundle.iterdir()])
    page.get_by_text("the dropped bundle:").wait_for()


def test_a_bundle_of_another_site_is_not_opened(opened: Opened, site: Path) -> None:
    page = opened(site, "?bundle=https://example.invalid/x")
    page.get_by_role("alert").filter(has_text="of this site only").wait_for()


def test_a_narrow_window_does_not_scroll_sideways(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 800})
    generate(page, 30)
    page.get_by_text("done:").wait_for()
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    page.set_viewport_size({"width": 1280, "height": 860})


def test_the_build_replaces_only_what_it_wrote(site: Path, bundle: Path, tmp_path: Path) -> None:
    refused = build(bundle, site)
    assert (refused.returncode, "--force" in refused.stderr, refused.stderr.count("\n")) == (2, True, 1)
    (tmp_path / "notes.txt").write_text("x")
    refused = build(bundle, tmp_path, "--force")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_build_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    for args in ((), (tmp_path,), (tmp_path, tmp_path / "out", "more"), ("--what", tmp_path)):
        assert build(*args).returncode == 2
    done = build(tmp_path, tmp_path / "out")
    assert (done.returncode, "blt export" in done.stderr, done.stderr.count("\n")) == (1, True, 1)
    assert list(tmp_path.iterdir()) == []
