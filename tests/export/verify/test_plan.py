"""The sequence and the calls of the parity check contain the hard cases that they promise."""

from __future__ import annotations

import numpy as np
import pytest

from blt_export.verify.plan import graph_calls, make_plan, sequence
from blt_runtime.ids import BOS, EOS, OFFSET, decode
from tests.export.variants import FLAVOURS, VARIANTS, Prepare


def test_the_sequence_is_fixed_and_hard() -> None:
    ids = sequence(700)
    np.testing.assert_array_equal(ids, sequence(700))
    assert ids[0] == BOS
    assert (ids == EOS).sum() == 2
    assert set(range(OFFSET, OFFSET + 256)) <= set(ids.tolist())
    assert "🙂".encode() in decode(ids)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_calls_wrap_the_ring_and_respect_the_flavour(prepare: Prepare, flavour: str) -> None:
    spec = prepare(VARIANTS[0], flavour).spec
    plan, graph = make_plan(spec), spec.graphs["encoder"]
    assert graph.cache is not None
    n = len(plan.ids_N)
    assert n > 2 * graph.cache.capacity
    cuts = list(graph_calls(n, graph, spec, plan.doc_start["encoder"]))
    assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])]
    lengths = {b - a for a, b in cuts}
    assert 1 in lengths
    assert max(lengths) == spec.chunk
    for a, b in cuts:
        if flavour == "portable":
            assert a // graph.cache.capacity == (b - 1) // graph.cache.capacity
        else:
            assert len(set(plan.doc_start["encoder"][a:b])) == 1


def test_patches_as_a_slow_loop_finds_them(prepare: Prepare) -> None:
    spec = prepare(VARIANTS[1], "portable").spec
    plan = make_plan(spec)
    own = plan.patch_length_P - plan.own_start_P
    ends = np.cumsum(own)
    assert ends[-1] == len(plan.ids_N)
    for t in range(0, len(plan.ids_N), 7):
        complete = [p for p, end in enumerate(ends) if end <= t + 1]
        want = [complete[-1 - back] if back < len(complete) else -1 for back in reversed(range(spec.decoder_window))]
        assert plan.patch_row_NW[t].tolist() == want
    for p in range(1, len(ends)):
        first = ends[p] - own[p] - own[p - 1]
        assert plan.byte_index_PL[p, : plan.patch_length_P[p]].tolist() == list(range(first, ends[p]))
        assert (plan.byte_index_PL[p, plan.patch_length_P[p] :] == 0).all()


def test_documents_start_after_eos(prepare: Prepare) -> None:
    plan = make_plan(prepare(VARIANTS[1], "portable").spec)
    after = int(np.flatnonzero(plan.ids_N == EOS)[0]) + 1
    assert plan.doc_start["encoder"][after - 1] == 0
    assert plan.doc_start["encoder"][after] == after
    assert plan.doc_start["entropy"][after - 1] > 0  # this variant also resets the entropy model at newlines
    assert 0 < plan.doc_start["latent"][-1] < len(plan.patch_length_P)
