"""The JavaScript runtime in node: the same ids as the Python runtime, and its own features."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blt_runtime.ids import encode
from tests.js import bundles
from tests.js.bundles import (
    DEMO_CASES,
    DRIVER,
    MODULE,
    PACKAGES,
    TINY_CASES,
    Case,
    assert_equal,
    demo_bundle,
    expected,
    tiny_bundle,
    with_rule,
    with_spec,
)

bundles.demand_packages("onnxruntime-node", "onnxruntime-web")

RULES: dict[str, dict[str, Any]] = {
    "monotonic": {"monotonic": True, "threshold": 0.05},
    "level": {"monotonic": False, "threshold": 3.0},
    "threshold_add": {"monotonic": False, "threshold": 3.0, "threshold_add": 0.02},
    "bfloat16": {"monotonic": False, "threshold": 3.0, "threshold_add": 0.02, "entropy_dtype": "bfloat16"},
    "newlines": {"reset_newlines": True, "max_patch_length": 5},
    "space": {"scheme": "space"},
    "static": {"scheme": "static", "patch_size": 3},
    "byte": {"scheme": "byte"},
    "bpe": {"scheme": "bpe"},
}
WINDOWS, LAYERS = "cross_windows_own_heads_newlines", "all_layers_gqa_projection"
EXPORTS = ((LAYERS, "ort", "float16"), (LAYERS, "portable", "int8"), (WINDOWS, "ort", "bfloat16"),
           (WINDOWS, "portable", "float32"), ("hash_entropy_without_layers", "ort", "int8"))  # fmt: skip
NODE, WEB = "onnxruntime-node", "onnxruntime-web"


def run(library: str, jobs: Sequence[tuple[Path, Sequence[Case]]]) -> list[Any]:
    """The results of all jobs by one process of node."""
    sent = [{"bundle": str(bundle), "cases": [case.to_json() for case in cases]} for bundle, cases in jobs]
    command = ["node", str(DRIVER / "node.mjs"), str(MODULE), library]
    done = subprocess.run(command, input=json.dumps(sent), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.shared_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def tiny_bundles(folder: Path) -> dict[str, Path]:
    made = {"-".join(options): tiny_bundle(folder, *options) for options in EXPORTS}
    first = next(iter(made.values()))
    return made | {name: with_rule(first, name, **changes) for name, changes in RULES.items()}


@pytest.fixture(scope="module")
def tiny_results(tiny_bundles: dict[str, Path]) -> dict[str, Any]:
    """What one process of node generates from all tiny bundles."""
    found = run(NODE, [(bundle, TINY_CASES) for bundle in tiny_bundles.values()])
    return dict(zip(tiny_bundles, found, strict=True))


@pytest.mark.parametrize("name", [*map("-".join, EXPORTS), *RULES])
def test_a_bundle_generates_the_ids_of_the_python_runtime(
    tiny_bundles: dict[str, Path], tiny_results: dict[str, Any], name: str
) -> None:
    assert_equal(tiny_results[name], expected(tiny_bundles[name], TINY_CASES))


@pytest.mark.parametrize("library", [NODE, WEB])
def test_the_shipped_model_continues_fifteen_prompts_as_the_python_runtime_does(folder: Path, library: str) -> None:
    bundle = demo_bundle(folder)
    assert_equal(run(library, [(bundle, DEMO_CASES)])[0], expected(bundle, DEMO_CASES))


def test_a_quantised_bundle_generates_the_ids_of_the_python_runtime(folder: Path) -> None:
    bundle = demo_bundle(folder, "int8")
    assert_equal(run(NODE, [(bundle, DEMO_CASES[:3])])[0], expected(bundle, DEMO_CASES[:3]))


def test_webassembly_runs_a_quantised_bundle_with_activations_in_float32(folder: Path) -> None:
    bundle, case = demo_bundle(folder, "int4"), DEMO_CASES[1]
    mine, theirs = run(WEB, [(bundle, [case])])[0][0], expected(bundle, [case])[0]
    told = len(case.ids)
    np.testing.assert_allclose(mine["entropies"][:told], theirs["entropies"][:told], atol=0.1)


def test_equal_seeds_draw_the_ids_of_the_python_runtime(folder: Path) -> None:
    bundle, prompt = demo_bundle(folder), encode("The ").tolist()
    cases = [
        Case(tuple(prompt), 60, {"temperature": 1.0, "seed": 0}),
        Case(tuple(prompt), 60, {"temperature": 0.7, "seed": 2**53 - 1, "top_p": 0.9, "min_p": 0.01}),
        Case(tuple(prompt), 60, {"temperature": 1.3, "seed": 7, "top_k": 50}),
    ]
    assert_equal(run(NODE, [(bundle, cases)])[0], expected(bundle, cases))


@pytest.fixture
def project(folder: Path, tmp_path: Path) -> Path:
    """A folder where the package is installed, with a bundle and the example in TypeScript."""
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "blt-runtime").symlink_to(MODULE.parent)
    (tmp_path / "bundle").symlink_to(demo_bundle(folder))
    for name in ("types.ts", "tsconfig.json"):
        shutil.copy(DRIVER / name, tmp_path)
    return tmp_path


DECLARATIONS = (MODULE.parent / "blt.d.ts").read_text(encoding="utf-8")


def test_the_declarations_name_what_the_package_exports(project: Path) -> None:
    script = "import('blt-runtime').then((m) => console.log(JSON.stringify(Object.keys(m))))"
    done = subprocess.run(["node", "-e", script], cwd=project, capture_output=True, text=True, check=True)
    assert {*re.findall(r"^export class (\w+)", DECLARATIONS, re.MULTILINE), "Stream"} == set(json.loads(done.stdout))


@pytest.mark.skipif(not (PACKAGES / "typescript").is_dir(), reason="typescript is not installed")
def test_a_program_in_typescript_compiles(project: Path) -> None:
    compiler = PACKAGES / "typescript" / "bin" / "tsc"
    done = subprocess.run(["node", str(compiler), "-p", str(project)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_program_in_typescript_uses_every_declaration() -> None:
    members = re.findall(r"^  (?:static |readonly )*(\w+)\??[(:]", DECLARATIONS, re.MULTILINE)
    names = {*members, *re.findall(r"^export \w+ (\w+)", DECLARATIONS, re.MULTILINE)}
    assert len(names) > 35
    program = (DRIVER / "types.ts").read_text(encoding="utf-8")
    assert {name for name in names if not re.search(rf"\b{name}\b", program)} == set()


def test_the_example_of_the_readme_runs(project: Path) -> None:
    readme = (MODULE.parent / "README.md").read_text(encoding="utf-8")
    (project / "example.mjs").write_text(readme.split("```js\n")[1].split("```")[0], encoding="utf-8")
    done = subprocess.run(["node", "example.mjs"], cwd=project, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "startsPatch: true" in done.stdout


def test_no_telemetry_is_kept_or_sent(folder: Path, tmp_path: Path) -> None:
    """onnxruntime-node would write an identifier of the machine and its events below the home folder."""
    program = 'const { Model } = await import(process.argv[1]); await Model.open(process.argv[2]); console.log("open");'
    command = ["node", "--input-type=module", "-e", program, str(MODULE), str(demo_bundle(folder))]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "open\n"
    assert list(tmp_path.rglob("*")) == []


FEATURES = re.findall(r'^test\("(.+?)"', (DRIVER / "features.mjs").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def features(folder: Path) -> dict[str, str | None]:
    """What failed in each test of features.mjs, or None."""
    small = with_spec(demo_bundle(folder), "small", capacity_bytes=40, capacity_patches=12, chunk=16)
    command = ["node", str(DRIVER / "features.mjs"), str(MODULE), str(demo_bundle(folder)), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", FEATURES)
def test_features(features: dict[str, str | None], name: str) -> None:
    assert features[name] is None, features[name]
