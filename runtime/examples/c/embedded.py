"""The Python half of libblt, which build.py stores inside the library. library.c calls the three functions."""

from __future__ import annotations

import itertools
import os
from typing import Any

from _blt import ffi, lib

from blt_runtime import GenerateOptions, Model
from blt_runtime.errors import BltError, UsageError

_models: dict[int, Model] = {}
_handles = itertools.count(1)


def _failed(kind: type[BaseException], error: BaseException, _: object) -> None:
    text = str(error) if isinstance(error, BltError) else f"unexpected {kind.__name__}: {error}"
    lib.set_error(text.encode("utf-8", "replace"))


@ffi.def_extern(onerror=_failed, error=ffi.NULL)
def python_open(path: Any, threads: int) -> Any:
    if path == ffi.NULL:
        raise UsageError("path is NULL: give a bundle folder")
    model = Model.open(os.fsdecode(ffi.string(path)), threads=threads or None)
    handle = next(_handles)
    _models[handle] = model
    return ffi.cast("blt_model *", handle)


@ffi.def_extern(onerror=_failed, error=-1)
def python_generate(handle: Any, prompt: Any, prompt_size: int, n: int, options: Any, callback: Any, user: Any) -> int:
    model = _models.get(_number(handle))
    if model is None:
        raise UsageError("the model is closed or was never opened: pass what blt_open returned")
    if prompt == ffi.NULL and prompt_size:
        raise UsageError(f"prompt is NULL, and prompt_size is {prompt_size}")
    if callback == ffi.NULL:
        raise UsageError("callback is NULL: give a function that receives the bytes")
    if n < 0:
        raise UsageError(f"n must be a number of bytes that is not negative, not {n}")
    chosen = _options(options)
    stream = model.stream()
    stream.append(bytes(ffi.buffer(prompt, prompt_size)) if prompt_size else b"")
    received = 0
    for piece in stream.generate(n, options=chosen):
        received += len(piece)
        if piece and callback(user, piece, len(piece)):
            break
    return received


@ffi.def_extern(onerror=_failed)
def python_close(handle: Any) -> None:
    _models.pop(_number(handle), None)


def _number(handle: Any) -> int:
    return int(ffi.cast("uintptr_t", handle))


def _options(options: Any) -> GenerateOptions:
    if options == ffi.NULL:
        return GenerateOptions()
    return GenerateOptions(
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p or None,
        min_p=options.min_p or None,
        seed=None if options.seed < 0 else options.seed,
        stop=None if options.stop == ffi.NULL else ffi.string(options.stop),
    )
