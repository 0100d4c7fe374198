"""The null backend with batched graphs: each row runs on the graph of a single stream, after a check of what
GroupQueryAttention requires of a call with `query_seqlens` (ONNX Runtime 1.32)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import numpy as np

from blt_runtime.backends.null import NullBackend
from blt_runtime.backends.protocol import Buffer
from blt_runtime.bundle.spec import GraphSpec, row_spec


class NullRowBackend(NullBackend):
    def row_session(self, group: str) -> NullRowSession:
        return NullRowSession(self, self.spec.graphs[group])


class NullRowSession:
    def __init__(self, backend: NullBackend, single: GraphSpec) -> None:
        self.spec = row_spec(single)
        self._backend, self._single = backend, single

    def bind(self, buffers: Mapping[str, Buffer]) -> Callable[[], None]:
        arrays = {name: buffer.array for name, buffer in buffers.items()}
        assert set(arrays) == {t.name for t in (*self.spec.inputs, *self.spec.outputs)}

        def call() -> None:
            self._check(arrays)
            for row in np.flatnonzero(arrays["counts"]).tolist():
                self._run(row, arrays)

        return call

    def _check(self, arrays: dict[str, np.ndarray]) -> None:
        length_Q, count_Q, room = arrays["lengths"], arrays["counts"], arrays["slots"].shape[1]
        tokens, slots = arrays["positions"].shape[1], arrays["past_key.0"].shape[2]
        assert tokens % 2 == 0
        assert (length_Q >= 1).all()
        assert (count_Q <= np.minimum(room, length_Q)).all()
        assert (arrays["slots"][..., 0] == 0).all()
        assert (arrays["slots"][..., 1] < tokens).all()
        assert (arrays["back"][..., 0] < len(count_Q)).all()
        assert (arrays["back"][..., 1] < room).all()
        if self._single.name != "latent" and count_Q.max() > 1:  # single tokens and longer segments in separate calls
            assert (count_Q != 1).all()
        assert self._single.cache is not None
        if self._single.cache.kind == "linear":
            assert (length_Q - count_Q + room <= slots).all()

    def _run(self, row: int, arrays: dict[str, np.ndarray]) -> None:
        count, length = int(arrays["counts"][row]), int(arrays["lengths"][row])
        tokens = arrays["slots"][row, :count, 1]
        assert arrays["back"][0, tokens].tolist() == [[row, place] for place in range(count)]
        positions = arrays["positions"][:, tokens]
        single = {"doc_start": np.full((1, count), positions[0, -1] + 1 - length)}
        outputs = [t.name for t in self._single.outputs if t.name not in self._single.aliases]
        for tensor in (*self._single.inputs, *self._single.outputs):
            name = tensor.name
            if name in self._single.aliases or name in self._single.aliases.values():
                single[name] = arrays[name][row : row + 1]
            elif tensor.shape[0] in ("N", "R"):
                single[name] = arrays[name]
            elif name != "doc_start":
                single[name] = arrays[name][:, tokens]
        bound = {name: SimpleNamespace(array=array, shape=array.shape) for name, array in single.items()}
        self._backend.session(self._single.name).bind(bound)()
        for name in outputs:
            arrays[name][:, tokens] = single[name]
