"""Streams on a device with memory of its own: the engine holds no view of what stays there, and copies the rest.

Byte states and patch vectors are copied to the host and back, or stay on the device (`resident`).
"""

from __future__ import annotations

import numpy as np
import pytest

from blt_runtime import Model, PatchRule, Scheduler
from blt_runtime.backends.null import null_spec
from blt_runtime.bundle.spec import resident_spec
from blt_runtime.errors import BackendError, CapacityError
from blt_runtime.speculation.speculate import Speculate
from tests.runtime.device_backend import ComposingFarBackend, FarBackend
from tests.runtime.streams import SPECS, assert_matches_reference, calls_of, random_ids, tables_for

IDS = random_ids(150)


RESIDENT = pytest.mark.parametrize("resident", [False, True], ids=["copied", "resident"])


def far(name: str, resident: bool = False) -> Model:
    spec = resident_spec(SPECS[name]) if resident else SPECS[name]
    return Model(spec, FarBackend(spec), tables_for(spec))


@RESIDENT
@pytest.mark.parametrize("name", SPECS)
def test_text_in_pieces_and_steps(name: str, resident: bool) -> None:
    stream = far(name, resident).stream(bos=False)
    for start, end in ((0, 1), (1, 40), (40, 41), (41, 42), (42, 150)):
        stream.append_ids(IDS[start:end])
        assert_matches_reference(stream, IDS[:end])


@RESIDENT
@pytest.mark.parametrize("name", ["hash", "window", "linear", "all windows"])
def test_rewinds_snapshots_and_a_second_stream(name: str, resident: bool) -> None:
    model = far(name, resident)
    stream, other = model.stream(bos=False), model.stream(bos=False)
    stream.append_ids(IDS[:90])
    other.append_ids(IDS[::-1])
    kept = stream.snapshot()
    stream.rewind(20)
    assert_matches_reference(stream, IDS[:70])
    other.restore(kept)
    assert_matches_reference(other, IDS[:90])
    other.append_ids(IDS[90:])
    assert_matches_reference(other, IDS)
    stream.append_ids(IDS[70:])
    np.testing.assert_array_equal(stream.logits, other.logits)


@RESIDENT
@pytest.mark.parametrize("speculate", ["lookup", "decoder", "entropy"])
def test_speculation_drafts_and_rolls_back(speculate: Speculate, resident: bool) -> None:
    stream, plain = far("linear", resident).stream(), far("linear").stream()
    for some in (stream, plain):
        some.append(b"abcabcabc" * 5)
    want = list(plain.generate_ids(200, temperature=0.0))
    assert list(stream.generate_ids(200, temperature=0.0, speculate=speculate, draft=5)) == want


def test_a_text_with_too_many_patches_leaves_no_trace() -> None:
    spec = SPECS["linear"]
    model = Model(spec, FarBackend(spec), tables_for(spec))
    stream = model.stream(bos=False)
    stream.append_ids(IDS[:30])
    before = stream.snapshot()
    with pytest.raises(CapacityError):
        stream.append_ids(random_ids(spec.capacity_bytes))
    after = stream.snapshot()
    for name, array in before.arrays.items():
        np.testing.assert_array_equal(array, after.arrays[name], err_msg=name)


def test_batched_streams_are_refused() -> None:
    with pytest.raises(BackendError, match="no parts"):
        Scheduler(far("window"), streams=2)


class TestForkedSteps:
    """Encoder and decoder run beside the entropy model, and the decoder again where a patch closes."""

    @pytest.fixture
    def model(self) -> Model:
        spec = resident_spec(SPECS["linear"])
        return Model(spec, ComposingFarBackend(spec), tables_for(spec))

    def test_equal_plain_steps(self, model: Model) -> None:
        stream = model.stream(bos=False)
        stream.append_ids(IDS[:40])
        for end in range(41, len(IDS) + 1):
            stream.append_ids(IDS[end - 1 : end])
            assert_matches_reference(stream, IDS[:end])
        stream.rewind(30)
        stream.append_ids(IDS[-30:])
        assert_matches_reference(stream, IDS)

    def test_run_the_decoder_twice_where_a_patch_closes(self, model: Model) -> None:
        stream, calls = model.stream(), calls_of(model)
        before, patches = dict(calls), len(stream.patch_lengths)
        list(stream.generate_ids(50, temperature=0.0, stop_at_eos=False))
        made = {name: calls[name] - before[name] for name in calls}
        closed = made["latent"]
        assert closed >= len(stream.patch_lengths) - patches - 1 > 5
        assert made == {"entropy": 50, "encoder": 50, "decoder": 50 + closed, "latent": closed}

    @pytest.mark.parametrize("name", ["window", "no entropy"])
    def test_are_not_used_where_they_would_be_wrong_or_useless(self, name: str) -> None:
        spec = resident_spec(SPECS[name] if name in SPECS else null_spec(PatchRule("space"), entropy=False))
        model = Model(spec, ComposingFarBackend(spec), tables_for(spec))
        stream = model.stream(bos=False)
        for end in range(1, len(IDS) + 1):
            stream.append_ids(IDS[end - 1 : end])
        assert_matches_reference(stream, IDS)
        assert calls_of(model)["decoder"] == len(IDS)
