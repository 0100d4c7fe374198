"""Fixtures and settings of all tests: the golden data, one thread for torch, no deadlines in property tests."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.runtime", "tests.export")  # helper modules assert, too
settings.register_profile(  # the same examples in every run, however busy the machine is
    "blt", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("blt")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it gains

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's top folder."""
    return REPO


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with outputs of facebookresearch/blt (tests/golden/README.md describes each file)."""
    folder = REPO / "tests" / "golden"
    assert (folder / "hash.json").is_file(), "tests/golden is missing; it belongs to the checkout"
    return folder


@pytest.fixture(scope="session")
def benchmark() -> Callable[[str], ModuleType]:
    """A script of benchmarks/ as a module, by its name. It is imported, not run."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", REPO / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up their module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def no_collector() -> Iterator[None]:
    """The garbage collector is off: an object that only the collector would free is a leak in these tests."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
