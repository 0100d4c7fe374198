"""One pass over a stream of documents: equal to each document alone, to generation's caches, and to the plain form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from blt.data.entropies import CHUNK, BFloat16Pass, ChunkedPass, make_pass
from blt.generate import reference
from blt.model import EntropyConfig, EntropyModel, entropy_of
from blt.model.bfloat16 import to_bfloat16
from blt.model.graphs import cache_spec
from blt.model.steps import EntropyStep
from blt_runtime.ids import BOS, EOS, OFFSET
from tests.data.each_document import document_entropies

Ids = np.ndarray
TOLERANCE = 2e-5
"""float32 rounding: the angles of positions near 6,000 alone are rounded to 0.0005 and differ by that."""


def small_model(n_layers: int = 3, window: int | None = 64, seed: int = 0, **sizes: Any) -> EntropyModel:
    config: dict[str, Any] = {
        "dim": 16,
        "n_heads": 2,
        "ffn_dim": 32,
        "max_seqlen": 8192,
        "n_layers": n_layers,
        "window": window,
    }
    model = EntropyModel(EntropyConfig(**(config | sizes)))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def documents(*lengths: int, seed: int = 1) -> list[Ids]:
    random = np.random.default_rng(seed)
    bodies = [random.choice(list(b"abcde \n"), n).astype(np.int16) + OFFSET for n in lengths]
    return [np.concatenate([[BOS], body, [EOS]]).astype(np.int16) for body in bodies]


@torch.no_grad()
def alone(model: EntropyModel, ids: Ids, reset_newlines: bool = False) -> Ids:
    return entropy_of(model(torch.as_tensor(ids[None].astype(np.int64)), reset_newlines))[0].numpy()


LENGTHS = [1, 700, 5, 6000, 30, 510, 1, 300, 2]


@pytest.mark.parametrize("reset_newlines", [False, True])
@pytest.mark.parametrize(("n_layers", "window"), [(1, 64), (3, 64), (2, 200), (2, 1), (3, None)])
def test_equal_to_each_document_alone(n_layers: int, window: int | None, reset_newlines: bool) -> None:
    """A document much longer than the receptive field and than a chunk, and documents of one byte."""
    model = small_model(n_layers, window, n_kv_heads=1, head_dim=4, max_seqlen=8192 if window else 1024)
    ids = documents(*(length for length in LENGTHS if window or length < 1000))
    for found, document in zip(document_entropies(model, ids, reset_newlines), ids, strict=True):
        np.testing.assert_allclose(found, alone(model, document, reset_newlines), atol=TOLERANCE)


def test_equal_to_the_plain_form() -> None:
    model = small_model()
    ids = documents(1, 900, 40)
    for found, document in zip(document_entropies(model, ids), ids, strict=True):
        with torch.no_grad():
            plain, _ = reference.entropies(model, document.tolist())
        np.testing.assert_allclose(found, plain.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("n_layers", [0, 2])
def test_n_grams_read_the_ids_before_a_chunk_and_a_document(n_layers: int) -> None:
    """Equal to the plain form over the row of all documents, and from any chunk on."""
    model = small_model(n_layers, 4, hash={"sizes": (2, 9), "rows": 31})
    ids = np.concatenate(documents(1, 200, 3, 126, 60))
    with torch.no_grad():
        plain, _ = reference.entropies(model, ids.tolist())
    passed = ChunkedPass(model, chunk=128)
    whole = np.concatenate(list(passed.run(ids)))
    np.testing.assert_allclose(whole, plain.numpy(), atol=TOLERANCE)
    for begin in (128, 256, 384):
        np.testing.assert_array_equal(np.concatenate(list(passed.run(ids, begin))), whole[begin:])


def test_equal_to_the_stream_with_ring_caches() -> None:
    """Equal, byte for byte, to the step that generation runs, over a document longer than several rings."""
    model = small_model()
    (ids,) = documents(3000)
    calls, capacity = 100, 8192
    ring = cache_spec(model.config, capacity, calls, "ring")
    assert ring is not None
    assert ring.capacity < 200
    step = EntropyStep(model, capacity).eval()
    shape = (1, model.config.kv_heads, ring.capacity, model.config.head_size)
    caches = [torch.zeros(shape) for _ in range(2 * model.config.n_layers)]
    streamed = []
    for start in range(0, len(ids), calls):
        part = torch.as_tensor(ids[start : start + calls].astype(np.int64))[None]
        positions = torch.arange(start, start + part.shape[1])[None]
        with torch.inference_mode():
            streamed.append(step(part, positions, torch.zeros_like(positions), *caches)[0][0].numpy())
    (found,) = document_entropies(model, [ids])
    np.testing.assert_allclose(found, np.concatenate(streamed), atol=TOLERANCE)


def test_the_result_does_not_depend_on_the_chunk() -> None:
    model = small_model()
    stream = np.concatenate(documents(*LENGTHS))
    runs = [np.concatenate(list(ChunkedPass(model, chunk=chunk).run(stream))) for chunk in (128, 1000, 4096)]
    for other in runs[1:]:
        np.testing.assert_allclose(other, runs[0], atol=TOLERANCE)


@pytest.mark.parametrize("done", [512, 1024, 4096, 7168])
def test_a_later_start_gives_the_same_bits(done: int) -> None:
    model = small_model(2)
    stream = np.concatenate(documents(*LENGTHS))
    forward = ChunkedPass(model, chunk=512)
    assert forward.replay == 1
    whole = np.concatenate(list(forward.run(stream)))
    np.testing.assert_array_equal(np.concatenate(list(forward.run(stream, done))), whole[done:])
    part = np.concatenate(list(forward.run(stream, done - 512, done)))
    np.testing.assert_array_equal(part, whole[done - 512 : done])


def test_documents_do_not_see_each_other() -> None:
    model = small_model()
    first, second, other = documents(200, 300, 200)
    _, after_first = document_entropies(model, [first, second])
    _, after_other = document_entropies(model, [other, second])
    np.testing.assert_array_equal(after_first, after_other)


def test_one_graph_serves_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph breaks and no second compilation. Code generation is not tested here."""
    model = small_model(2)
    ids = documents(300, 900)
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=count, **options))
    monkeypatch.setitem(CHUNK, "cpu", 256)
    torch._dynamo.reset()
    compiled = document_entropies(model, ids, compile=True)
    assert len(graphs) == 1
    for found, expected in zip(compiled, document_entropies(model, ids), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_no_documents_have_no_entropies() -> None:
    assert document_entropies(small_model(), []) == []


def test_bfloat16_is_each_document_alone_to_the_bit() -> None:
    """Its sums depend on where a document begins, so every document is a row. Long rows are cut with a long overlap."""
    model = to_bfloat16(small_model(2, 512, dim=64, ffn_dim=64, max_seqlen=4096))
    ids = documents(3, 700, 1, 5000)
    found = document_entropies(model, ids)
    for one, document in zip(found[:3], ids[:3], strict=True):
        np.testing.assert_array_equal(one, alone(model, document))
    row = alone(model, ids[3][:4096])
    np.testing.assert_array_equal(found[3][:4096], row)
    assert len(found[3]) == 5002
    forward = make_pass(model, 10)
    assert isinstance(forward, BFloat16Pass)
    stream = np.concatenate(ids)
    np.testing.assert_array_equal(np.concatenate(list(forward.run(stream, 400))), np.concatenate(found)[400:])
    for begin, end in [(0, 5), (5, 707), (600, 720), (5000, 5100)]:
        np.testing.assert_array_equal(
            np.concatenate(list(forward.run(stream, begin, end))), np.concatenate(found)[begin:end]
        )
