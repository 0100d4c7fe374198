"""A bundle in Python, in node, and with WebAssembly in node and in Chromium: bytes per second of one stream.

    python benchmarks/javascript.py BUNDLE...                  # all runtimes
    python benchmarks/javascript.py BUNDLE --full-caches       # also a copy of the first without free lengths

Every runtime has one thread, reads the same prompts (text of this repository) and draws the same bytes with the same
seed; a line says where they differ. Runtimes take turns, and the fastest run of each is printed, since slower ones
measure the machine's other work. WebAssembly copies caches into its memory and back in each call: with --full-caches
always the full capacity, otherwise as much as the text needs. The packages of runtime/js are needed (`npm ci --prefix
runtime/js --ignore-scripts`), and for the browser playwright and Chromium.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import onnx_ir as ir

from blt_runtime import Model

REPO = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_suffix(".mjs")
MODULE = REPO / "runtime" / "js" / "blt.js"
PACKAGES = MODULE.parent / "node_modules"
NODE, WEB = "onnxruntime-node/dist/index.js", "onnxruntime-web/dist/ort.node.min.mjs"
BROWSER = "onnxruntime-web/dist/ort.wasm.min.mjs"
TEXT = REPO / "runtime" / "blt_runtime" / "stream.py"
Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--full-caches",
        action="store_true",
        help="also measure a copy of the first bundle whose latent caches have no free length",
    )
    parser.add_argument("--prompt-bytes", type=int, nargs="+", default=[64, 2048])
    parser.add_argument("--bytes", type=int, default=200, help="to generate")
    parser.add_argument("--rounds", type=int, default=3, help="of two runs of each runtime; the fastest is printed")
    parser.add_argument("--chromium", type=Path, default=Path("/usr/bin/chromium"))
    options = parser.parse_args()
    text = TEXT.read_text()
    prompts = [text[:size] for size in options.prompt_bytes]
    runtimes: dict[str, Callable[[Found], Found]] = {
        "Python": in_python,
        "onnxruntime-node": functools.partial(in_node, NODE),
        "WebAssembly, node": functools.partial(in_node, WEB),
        "WebAssembly, Chromium": functools.partial(in_browser, options.chromium),
    }
    results: dict[tuple[str, str], Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        copies = [with_full_caches(options.bundles[0], Path(folder))] if options.full_caches else []
        for _ in range(options.rounds):
            for bundle, name in itertools.product((*options.bundles, *copies), runtimes):
                job = {"bundle": str(bundle.resolve()), "prompts": prompts, "bytes": options.bytes, "runs": 2}
                found = runtimes[name](job)
                if found["texts"] != results.get((bundle.name, "Python"), found)["texts"]:
                    print(f"{bundle.name}: {name} draws other bytes than Python")
                add(results.setdefault((bundle.name, name), found), found)
    show(results, options.prompt_bytes, options.bytes)


def add(total: Found, found: Found) -> None:
    """Keeps the fastest of each."""
    total["opening"] = [min(total["opening"] + found["opening"])]
    for key in ("reading", "writing"):
        total[key] = [[min(old + new)] for old, new in zip(total[key], found[key], strict=True)]


def show(results: dict[tuple[str, str], Found], sizes: list[int], written: int) -> None:
    columns = "".join(f"{f'after {size}':>12}" for size in sizes)
    print(f"bytes/s of {written} new bytes after prompts of {sizes} bytes, and of reading the last prompt; one thread")
    print(f"{'bundle':<20} {'runtime':<22} {'opening':>8}{columns}{f'prompt of {sizes[-1]}':>17}")
    for (bundle, name), found in results.items():
        speeds = "".join(f"{written / best:>12,.0f}" for (best,) in found["writing"])
        read = sizes[-1] / found["reading"][-1][0]
        print(f"{bundle:<20} {name:<22} {found['opening'][0]:6.2f} s{speeds}{read:>17,.0f}")


def with_full_caches(bundle: Path, folder: Path) -> Path:
    """A copy whose latent graph demands caches of the full capacity, as exports before free lengths did."""
    copy = folder / f"{bundle.name}-full"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    capacity, name = manifest["spec"]["graphs"]["latent"]["cache"]["capacity"], manifest["graphs"]["latent"]["file"]
    model = ir.load(copy / name)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and "C" in [getattr(size, "value", size) for size in value.shape]:
            value.shape = ir.Shape([*value.shape[:2], capacity, *value.shape[3:]])
    ir.save(model, copy / name)
    data = (copy / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def in_python(job: Found) -> Found:
    began = time.perf_counter()
    model = Model.open(job["bundle"], threads=1)
    found: Found = {"opening": [time.perf_counter() - began], "texts": [], "reading": [], "writing": []}
    for run, prompt in itertools.product(range(job["runs"]), job["prompts"]):
        stream, start = model.stream(), time.perf_counter()
        stream.append(prompt)
        read = time.perf_counter()
        text = list(stream.generate_ids(job["bytes"], temperature=0.8, seed=1, stop_at_eos=False))
        found["reading"].append(read - start)
        found["writing"].append(time.perf_counter() - read)
        if run == 0:
            found["texts"].append(text)
    size = len(job["prompts"])
    return found | {key: [found[key][i::size] for i in range(size)] for key in ("reading", "writing")}


def in_node(library: str, job: Found) -> Found:
    sent = json.dumps({**job, "module": str(MODULE), "library": str(PACKAGES / library)})
    done = subprocess.run(["node", str(SCRIPT), "-"], input=sent, stdout=subprocess.PIPE, text=True, check=True)
    found: Found = json.loads(done.stdout)
    return found


class Files(SimpleHTTPRequestHandler):
    """/js is runtime/js, /script this folder, /bundle the bundle."""

    def __init__(self, *args: Any, bundle: str, **options: Any) -> None:
        self.roots = {"js": MODULE.parent, "script": SCRIPT.parent, "bundle": Path(bundle)}
        super().__init__(*args, **options)

    def translate_path(self, path: str) -> str:
        root, _, rest = path.lstrip("/").partition("/")
        return str(self.roots[root] / rest) if root in self.roots else "/nowhere"

    def log_message(self, *_: object) -> None:
        pass


def in_browser(chromium: Path, job: Found) -> Found:
    from playwright.sync_api import sync_playwright

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, bundle=job["bundle"]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    run = f"""async (job) => {{
      const blt = await import("/js/blt.js"), ort = await import("/js/node_modules/{BROWSER}");
      const {{ measure }} = await import("/script/javascript.mjs");
      return measure(blt, {{ ort, threads: 1 }}, {{ ...job, bundle: "/bundle/" }});
    }}"""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/js/package.json")
        found: Found = page.evaluate(run, job)
        browser.close()
    server.shutdown()
    return found


if __name__ == "__main__":
    main()
