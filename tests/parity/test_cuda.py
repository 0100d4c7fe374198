"""The flavour cuda generates what the flavour ort generates: on the CPU, and on a device through WebGPU.

The device is SwiftShader, a Vulkan driver in software that Chromium brings, so these tests need no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blt_export import pipeline
from blt_runtime import Model
from blt_runtime.backends.onnx import load_library
from blt_runtime.backends.providers import PROVIDERS, check_available
from blt_runtime.errors import BackendError
from blt_runtime.ids import EOS, encode
from tests.exports import prepare

DRIVER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
VARIANTS = ("cross_windows_own_heads_newlines", "no_hash_space_causal_latent")
IDS = np.concatenate([encode("Grüße\naus 東京", bos=True), [EOS], encode("def f(x):\n  return", bos=False)])
Bundle = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """(variant, flavour) -> its folder, exported once."""
    done: dict[tuple[str, str], Path] = {}

    def export(variant: str, flavour: str) -> Path:
        if (variant, flavour) not in done:
            folder = tmp_path_factory.mktemp("cuda") / flavour
            pipeline.run(prepare(variant, flavour, capacity=192), folder)
            done[variant, flavour] = folder
        return done[variant, flavour]

    return export


@pytest.fixture(params=["cpu", "webgpu"])
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "webgpu":
        pytest.importorskip("onnxruntime_ep_webgpu")
        monkeypatch.setenv("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")
        if "VK_ICD_FILENAMES" not in os.environ and DRIVER.exists():
            monkeypatch.setenv("VK_ICD_FILENAMES", str(DRIVER))
        try:
            check_available(load_library("1.32"), PROVIDERS["webgpu"])
        except BackendError as error:
            pytest.skip(str(error))
    return name


@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_equal_those_of_the_flavour_ort(bundle: Bundle, variant: str, provider: str) -> None:
    want = Model.open(bundle(variant, "ort")).stream(bos=False)
    model = Model.open(bundle(variant, "cuda"), provider=provider)
    stream, other = model.stream(bos=False), model.stream(bos=False)
    for ids in (IDS[:1], IDS[1:20], IDS[20:21], IDS[21:]):
        for some in (want, stream):
            some.append_ids(ids)
        np.testing.assert_allclose(stream.logits, want.logits, atol=2e-5)
    np.testing.assert_array_equal(stream.patch_lengths, want.patch_lengths)
    kept = stream.snapshot()
    made = list(want.generate_ids(12, temperature=0.0, stop_at_eos=False))
    assert list(stream.generate_ids(12, temperature=0.0, stop_at_eos=False)) == made
    stream.rewind(12)
    assert list(stream.generate_ids(12, temperature=0.0, stop_at_eos=False)) == made
    other.restore(kept)
    assert list(other.generate_ids(12, temperature=0.0, stop_at_eos=False)) == made
    np.testing.assert_allclose(other.logits, want.logits, atol=2e-5)
