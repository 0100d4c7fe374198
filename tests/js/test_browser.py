"""The JavaScript runtime in headless Chromium: WebAssembly, one thread, the same ids as the Python runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import browser as browser_tests
from tests.js import bundles
from tests.js.bundles import DEMO_CASES, DRIVER, MODULE, TINY_CASES, assert_equal, demo_bundle, expected, tiny_bundle

bundles.demand_packages("onnxruntime-web")
browser_tests.demand()

LIBRARY = "node_modules/onnxruntime-web/dist"
RUN = """async ({ bundle, cases }) => {
  const blt = await import("/js/blt.js"), ort = await import("/js/LIBRARY/ort.wasm.min.mjs");
  const { drive } = await import("/tests/drive.mjs");
  const from = bundle ?? document.querySelector("input").files;
  try {
    return await drive(blt, from, { ort, threads: 1 }, cases);
  } catch (error) {
    return `${error.name}: ${error.message}`;
  }
}""".replace("LIBRARY", LIBRARY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.shared_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def site(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server: /js is runtime/js, /bundles the bundles."""
    root = tmp_path_factory.mktemp("site")
    for name, target in (("js", MODULE.parent), ("tests", DRIVER), ("bundles", folder)):
        (root / name).symlink_to(target)
    (root / "index.html").write_text("<!doctype html><input type=file webkitdirectory>")
    with browser_tests.static_files(root) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browser_tests.chromium() as started:
        yield started


@pytest.fixture
def page(browser: Any, site: str) -> Iterator[Any]:
    context = browser.new_context()
    opened = context.new_page()
    opened.set_default_timeout(120_000)
    opened.goto(site)
    yield opened
    context.close()


def test_the_shipped_model_continues_fifteen_prompts_as_the_python_runtime_does(page: Any, folder: Path) -> None:
    bundle = demo_bundle(folder)
    cases = [case.to_json() for case in DEMO_CASES]
    found = page.evaluate(RUN, {"bundle": f"/bundles/{bundle.name}", "cases": cases})
    assert_equal(found, expected(bundle, DEMO_CASES))


def test_a_portable_bundle_with_tables_of_8_bits_generates_the_ids_of_the_python_runtime(
    page: Any, folder: Path
) -> None:
    bundle = tiny_bundle(folder, "all_layers_gqa_projection", "portable", "int8")
    cases = [case.to_json() for case in TINY_CASES]
    assert_equal(
        page.evaluate(RUN, {"bundle": f"/bundles/{bundle.name}/", "cases": cases}), expected(bundle, TINY_CASES)
    )


def test_a_folder_chosen_in_the_page_opens(page: Any, folder: Path, tmp_path: Path) -> None:
    bundle, cases = demo_bundle(folder), DEMO_CASES[1:2]
    page.locator("input").set_input_files(bundle)
    found = page.evaluate(RUN, {"bundle": None, "cases": [case.to_json() for case in cases]})
    assert_equal(found, expected(bundle, cases))


def test_a_chosen_folder_that_is_no_bundle_is_one_clear_error(page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    page.locator("input").set_input_files(tmp_path)
    found = page.evaluate(RUN, {"bundle": None, "cases": []})
    assert found.startswith("BundleError: manifest.json is missing")


def test_a_signal_stops_an_append_and_the_page_stays_alive(page: Any, folder: Path) -> None:
    run = """async (bundle) => {
      const { Model } = await import("/js/blt.js"), ort = await import("/js/LIBRARY/ort.wasm.min.mjs");
      const stream = await (await Model.open(bundle, { ort })).stream(), controller = new AbortController();
      let ticks = 0;
      const timer = setInterval(() => ++ticks === 5 && (clearInterval(timer), controller.abort()), 1);
      const error = await stream.append("x ".repeat(3000), { signal: controller.signal }).catch((error) => error);
      return [error?.name, ticks, stream.position];
    }""".replace("LIBRARY", LIBRARY)
    assert page.evaluate(run, f"/bundles/{demo_bundle(folder).name}") == ["AbortError", 5, 1]
