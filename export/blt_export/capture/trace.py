"""Capture: a step module and its `GraphSpec` become an ONNX graph that holds bare `blt` operators.

Sizes: every letter of the spec (B, S, P, L, N, R) is dynamic, integers are static. Example sizes are 2 and more,
because the exporter specialises a size that is 1 in the example. Their values have no effect: tracing is symbolic.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch
from torch import nn
from torch._dynamo import config as _dynamo
from torch.onnx._internal.exporter import _registration

from blt_runtime.bundle.spec import GraphSpec, TensorSpec

from .translate import translation_table

log = logging.getLogger("blt_export")

OPSET = 24

_PREFIX = "step."
_EXAMPLE = {"B": 2, "S": 5, "P": 3, "L": 4, "N": 7, "R": 6}  # all different: the exporter may identify equal sizes


def capture(module: nn.Module, spec: GraphSpec) -> ir.Model:
    """The graph of `module.forward(*inputs, *caches)`, inputs and outputs in the order of `spec`.

    Tracing keeps no cache of symbolic results: two of three look-ups miss, and the cache costs a quarter of the time.
    Raises the errors of torch.export, for example if the module branches on a tensor's value.
    """
    sizes = {letter: torch.export.Dim(letter) for letter in _letters(spec.inputs)}
    arguments = tuple(_example(t) for t in spec.inputs)
    shapes = tuple(_dynamic(t, sizes) for t in spec.inputs)
    with _quiet(), torch.no_grad(), _dynamo.patch(fake_tensor_cache_enabled=False):
        program = torch.export.export(_Flat(module).eval(), (arguments,), dynamic_shapes=(shapes,), strict=False)
        model = _to_onnx(program)
    for name in list(model.graph.initializers):
        _rename(model.graph, name, name.removeprefix(_PREFIX))
    return model


def _to_onnx(program: torch.export.ExportedProgram) -> ir.Model:
    """Translate the program as traced; decompose its operators only if one of them has no translation.

    The exporter always decomposes first. That traces the program twice more and takes nearly half of the time (10.5
    instead of 5.7 s for a model of two layers a stage). Its translations and the few in `translate` cover all operators
    that we use, without decomposition. The graphs after the passes are the same.
    """
    program.run_decompositions = lambda *_, **__: program
    try:
        return _export(program)
    except torch.onnx.OnnxExporterError as error:
        log.debug("decomposing first: %s", str(error).splitlines()[-1])
    del program.run_decompositions
    return _export(program)


def _export(program: torch.export.ExportedProgram) -> ir.Model:
    with _translations_read_once():
        result = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            optimize=False,
            custom_translation_table=translation_table(),
        )
    assert result is not None
    model: ir.Model = result.model
    return model


def _translations_read_once() -> contextlib.AbstractContextManager[object]:
    """Each export parses the sources of onnxscript's 500 translations, half of the time of a capture. Here a process
    parses them once. A torch that reads them elsewhere is only slower."""
    library = getattr(_registration, "onnxscript_apis", None)
    read = getattr(library, "get_torchlib_ops", None)
    if read is None:
        return contextlib.nullcontext()
    return mock.patch.object(library, "get_torchlib_ops", partial(_read, read))


@cache
def _read(translations: Callable[[], list[Any]]) -> list[Any]:
    return translations()


def _rename(graph: ir.Graph, old: str, new: str) -> None:
    if old != new:
        graph.initializers[old].name = new


class _Flat(nn.Module):
    """One tuple argument, so that the dynamic sizes are a flat list that does not depend on the signature's names."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(self.step(*inputs))


def _letters(tensors: tuple[TensorSpec, ...]) -> set[str]:
    return {size for t in tensors for size in t.shape if isinstance(size, str)}


def _example(tensor: TensorSpec) -> torch.Tensor:
    shape = [size if isinstance(size, int) else _EXAMPLE[size] for size in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


def _dynamic(tensor: TensorSpec, sizes: dict[str, torch.export.Dim]) -> dict[int, torch.export.Dim]:
    return {axis: sizes[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which logs about torchvision and warns about its internals, and stop garbage collection.

    Tracing makes millions of small objects and next to no garbage: without the collector it takes 15 % less time.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    collecting = gc.isenabled()
    gc.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
            if collecting:
                gc.enable()
