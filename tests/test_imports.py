"""The order of the rooms, the libraries each package may import, what an import loads, and the public names."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.metadata
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGES = {"blt": REPO / "blt", "blt_export": REPO / "export/blt_export", "blt_runtime": REPO / "runtime/blt_runtime"}

# Libraries that a package may import, besides the standard library and itself.
MAY = {
    "blt_runtime": {"numpy"},
    "blt_runtime.server": {"numpy", "jinja2", "prometheus_client", "pydantic", "pydantic_core", "starlette", "uvicorn"},
    "blt": {"numpy", "torch", "pydantic", "yaml", "zstandard", "matplotlib", "lm_eval", "tqdm", "blt_runtime"},
    "blt.triton": {"numpy", "triton_python_backend_utils", "blt_runtime"},
    "blt_export": {
        "numpy", "torch", "pydantic", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt_rtx", "ml_dtypes",
        "blt", "blt_runtime",
    },
    "blt.cli": {
        "numpy", "typer", "rich", "torch", "onnxruntime", "matplotlib", "pyppmd", "lm_eval", "blt", "blt_export",
        "blt_runtime",
    },
}  # fmt: skip
# Libraries that it may import only inside functions, so that importing the module stays fast.
LAZY = {
    "blt_runtime": {"onnxruntime", "onnxruntime_ep_webgpu", "llguidance", "jinja2"},
    "blt_runtime.server": set(),
    "blt": {
        "gguf",
        "huggingface_hub",
        "lz4",
        "matplotlib",
        "pyarrow",
        "rich",
        "safetensors",
        "tokenizers",
        "zstandard",
    },
    "blt.triton": set(),
    "blt_export": {"tensorrt_rtx", "onnxruntime"},
    "blt.cli": {"torch", "onnx", "onnxruntime", "matplotlib", "pyppmd", "pydantic", "lm_eval", "blt_export"},
}
# The rooms from the ground up. A room imports rooms before it, never one after it: also lazily, also for types only.
ROOMS = (
    "blt_runtime.errors", "blt_runtime.arguments", "blt_runtime.reading", "blt_runtime.ids", "blt_runtime.records",
    "blt_runtime.hashing",
    "blt_runtime.patching", "blt_runtime.sampling", "blt_runtime.text", "blt_runtime.chat",
    "blt_runtime.bundle", "blt_runtime.chat_template", "blt_runtime.backends",
    "blt_runtime.engine", "blt_runtime.speculation", "blt_runtime.grammar_compiler", "blt_runtime.grammar",
    "blt_runtime.options", "blt_runtime.stream", "blt_runtime.model",
    "blt_runtime.requests", "blt_runtime.scheduler", "blt_runtime",
    "blt_runtime.server",
    "blt.files", "blt.model", "blt.checkpoint", "blt", "blt.generate", "blt.data", "blt.evaluate", "blt.figures",
    "blt.train", "blt.bench", "blt.share", "blt.triton",
    "blt_export.versions", "blt_export.graph_files",
    "blt_export.capture", "blt_export.rewrite", "blt_export.rules", "blt_export.lower", "blt_export.passes",
    "blt_export.quantize", "blt_export.specs", "blt_export.verify", "blt_export.state",
    "blt_export.bundle", "blt_export.tensorrt", "blt_export.aot", "blt_export.build",
    "blt_export.steps", "blt_export.pipeline", "blt_export",
    "blt.cli",
)  # fmt: skip
CLI_MAY_LOAD = (
    "blt.__version__", "blt.cli", "blt.files", "blt.figures", "blt.evaluate",
    "blt_runtime.errors", "blt_runtime.reading", "blt_runtime.ids", "blt_runtime.grammar", "blt_runtime.options",
    "blt_runtime.patching",
)  # fmt: skip


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    module: str
    lazy: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file.relative_to(REPO)}:{self.line} imports {self.module}"


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(file: Path) -> Iterator[Import]:
    """Every import that runs: at the top (lazy False) or inside a function (lazy True)."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if is_typing_only(child):
                continue
            if isinstance(child, ast.Import):
                yield from (Import(file, child.lineno, alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level == 0 and child.module:
                inside = child.module in PACKAGES or child.module == "blt.cli"
                names = [f"{child.module}.{a.name}" if inside else child.module for a in child.names]
                yield from (Import(file, child.lineno, name, lazy) for name in names)
            yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from walk(ast.parse(file.read_text()), lazy=False)


def package_of(file: Path) -> str:
    for name, folder in PACKAGES.items():
        if file.is_relative_to(folder):
            inner = (
                part
                for part in MAY
                if part.startswith(f"{name}.") and file.is_relative_to(folder / part[len(name) + 1 :])
            )
            return next(inner, name)
    raise AssertionError(file)


ALL_IMPORTS = [i for folder in PACKAGES.values() for file in sorted(folder.rglob("*.py")) for i in imports_of(file)]


def module_of(file: Path) -> str:
    package = next(name for name, folder in PACKAGES.items() if file.is_relative_to(folder))
    inside = file.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join((package, *inside)).removesuffix(".__init__")


MODULES = {module_of(file): file for folder in PACKAGES.values() for file in folder.rglob("*.py")}


def imported_modules(module: str) -> set[str]:
    """Our modules that a module imports: at the top, in a function or under TYPE_CHECKING; absolute or relative."""
    file = MODULES[module]
    here = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{source}.{a.name}" if f"{source}.{a.name}" in MODULES else source for a in node.names}
    return found & set(MODULES) - {module}


ARROWS = {module: imported_modules(module) for module in MODULES}


def room_of(module: str) -> str:
    """The longest room whose name begins the module's. A package's own `__init__` is above its rooms."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def upward(arrows: dict[str, set[str]]) -> list[str]:
    rank = {room: at for at, room in enumerate(ROOMS)}
    return [
        f"{room_of(module)} imports {room_of(other)}, a room above it: {module} imports {other}"
        for module, others in arrows.items()
        for other in others
        if rank[room_of(other)] > rank[room_of(module)]
    ]


def test_rooms_import_only_rooms_before_them() -> None:
    assert sum(map(len, ARROWS.values())) > 400  # the walk found the imports
    assert not upward(ARROWS)


def test_every_room_exists_and_every_module_is_in_one() -> None:
    assert all(room in MODULES for room in ROOMS)
    packages = set(PACKAGES)
    loose = [m for m in MODULES if room_of(m) in packages and m not in packages and m != "blt.__main__"]
    assert not loose


def test_no_module_imports_itself_through_others() -> None:
    graphlib.TopologicalSorter(ARROWS).prepare()  # raises CycleError with the circle


def test_an_upward_import_is_found() -> None:
    assert upward({"blt.model.layers": {"blt.checkpoint.source"}})


def test_every_import_is_allowed() -> None:
    assert len(ALL_IMPORTS) > 100  # the walk found the packages
    wrong = []
    for found in ALL_IMPORTS:
        package = package_of(found.file)
        own = package.split(".")[0]
        known = found.top in sys.stdlib_module_names or found.top == own or found.top in MAY[package] | LAZY[package]
        if not known:
            wrong.append(str(found))
    assert not wrong


def test_heavy_libraries_are_imported_inside_functions() -> None:
    wrong = [str(i) for i in ALL_IMPORTS if not i.lazy and i.top in LAZY[package_of(i.file)]]
    assert not wrong


def test_the_runtime_imports_a_backends_library_only_in_that_backend() -> None:
    wrong = [
        str(i)
        for i in ALL_IMPORTS
        if package_of(i.file) == "blt_runtime" and i.top == "onnxruntime" and i.file.parent.name != "backends"
    ]
    assert not wrong


def test_only_the_command_line_imports_the_command_line() -> None:
    wrong = [str(i) for i in ALL_IMPORTS if package_of(i.file) != "blt.cli" and i.module.startswith("blt.cli")]
    assert not wrong


def test_the_command_line_loads_only_light_modules_at_the_top() -> None:
    """CLI_MAY_LOAD only; a command imports all other modules of ours inside its function."""
    ours = [i for i in ALL_IMPORTS if package_of(i.file) == "blt.cli" and not i.lazy and i.top in PACKAGES]
    assert not [str(i) for i in ours if not i.module.startswith(CLI_MAY_LOAD)]


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    program = (
        f"import sys; sys.path[:0] = {[str(REPO), str(REPO / 'export'), str(REPO / 'runtime')]!r}\n"
        f"{code}\nimport json; print('\\n' + json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_runtime_loads_numpy_and_nothing_else() -> None:
    heavy = {"torch", "onnx", "onnxruntime", "pydantic", "typer", "rich", "yaml", "blt", "blt_export"}
    loaded = loaded_by("import blt_runtime")
    assert "blt_runtime" in loaded
    assert not heavy & loaded


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["train", "blt", "--help"], ["--version"]])
def test_help_loads_neither_torch_nor_onnx(arguments: list[str]) -> None:
    loaded = loaded_by(f"from blt.cli import run; assert run({arguments!r}) == 0")
    assert "typer" in loaded
    assert not {"torch", "onnx", "onnxruntime", "matplotlib", "blt_export"} & loaded


def test_data_is_read_without_torch() -> None:
    assert not {"torch", "onnx", "onnxruntime"} & loaded_by("import blt.data.dataset, blt.data.prepare")


def test_engines_are_built_without_torch() -> None:
    loaded = loaded_by("import blt_export.build")
    assert "onnx_ir" in loaded
    assert not {"torch", "tensorrt", "cuda", "onnxscript"} & loaded


def test_importing_blt_is_light() -> None:
    assert "torch" not in loaded_by("import blt; blt.__version__")


def sort_key(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions: the order that ruff (RUF022) keeps."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_and_complete(package: str) -> None:
    module = importlib.import_module(package)
    names = list(module.__all__)
    assert names == sorted(names, key=sort_key)
    assert len(names) == len(set(names))
    for name in names:
        assert getattr(module, name) is not None
    tree = ast.parse((PACKAGES[package] / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] in PACKAGES)
        for alias in node.names
    }
    assert imported <= set(names)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def distribution(folder: str) -> dict[str, Any]:
    """[project] of a distribution: "." is blt-lm, "runtime" is blt-runtime."""
    project: dict[str, Any] = tomllib.loads((REPO / folder / "pyproject.toml").read_text())["project"]
    return project


def test_one_version() -> None:
    tools, runtime = distribution("."), distribution("runtime")
    versions = {importlib.import_module(name).__version__ for name in ("blt", "blt_runtime")}
    assert versions == {tools["version"], runtime["version"]}
    assert f"blt-runtime=={runtime['version']}" in tools["dependencies"]


def test_the_two_distributions_agree() -> None:
    tools, runtime = distribution("."), distribution("runtime")
    assert tools["requires-python"] == runtime["requires-python"]
    for extra in runtime["optional-dependencies"]:
        assert tools["optional-dependencies"][extra] == [f"blt-runtime[{extra}]"]
    assert (REPO / "LICENSE").read_text() == (REPO / "runtime/LICENSE").read_text()


def test_the_runtime_has_at_most_a_dozen_public_names() -> None:
    assert len(importlib.import_module("blt_runtime").__all__) <= 12


def test_the_extras_that_the_cli_names_exist() -> None:
    from blt.cli.failures import EXTRAS

    project = distribution(".")
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])
