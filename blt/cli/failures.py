"""Turns an exception into one line on stderr and an exit code.

0 done; 1 failed while running; 2 usage; 3 a check failed; 4 a backend, device or extra is missing; 130 Ctrl-C; 141 a
closed pipe.
"""

from __future__ import annotations

import contextlib
import sys
import traceback

from blt.cli.console import verbose
from blt_runtime.errors import install_command, printable

OK, FAILED, USAGE, MISSING, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 4, 130, 141
SHOWN = 300  # characters of an unexpected error shown from its beginning, and from its end

TEXT_COMMANDS = ("generate", "patch")
"""Commands with a text as an argument."""

# top-level module -> the extra that installs it
EXTRAS = {
    "gguf": "gguf",
    "huggingface_hub": "hub",
    "jinja2": "serve",
    "llguidance": "grammar",
    "lm_eval": "lm-eval",
    "matplotlib": "plot",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxruntime": "cpu",
    "onnxscript": "export",
    "prometheus_client": "serve",
    "pyarrow": "parquet",
    "pydantic": "train",
    "pyppmd": "dev",
    "safetensors": "hub",
    "starlette": "serve",
    "tensorrt_rtx": "aot",
    "tokenizers": "bpe",
    "torch": "train",
    "uvicorn": "serve",
    "zstandard": "train",
}


def original(error: BaseException) -> BaseException:
    """The error that typer or rich turned into an exit; any other error unchanged.

    Both libraries exit with 1 if stdout is a closed pipe, and typer reports an EOFError as an interruption.
    """
    exits = isinstance(error, SystemExit) or type(error).__name__ == "Abort"
    while exits and (handled := error.__context__) is not None:
        if isinstance(handled, BrokenPipeError | EOFError):
            return handled
        error = handled
    return error


def describe(error: BaseException) -> tuple[str, int]:
    """The line to print (empty: none) and the exit code for `error`."""
    from blt_runtime.errors import BltError

    if isinstance(error, BltError):
        return one_line(error), error.exit_code
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return "interrupted", INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return "", BROKEN_PIPE
    if isinstance(error, ModuleNotFoundError):
        return _missing_module(error)
    if type(error).__name__ == "NoArgsIsHelpError":  # the help has been printed
        return "", USAGE
    if callable(format_message := getattr(error, "format_message", None)):  # typer's and click's own errors
        line = f"{one_line(format_message())}{_text_hint(error)} (-h shows the usage)"
        return line, int(getattr(error, "exit_code", USAGE))
    if isinstance(error, OSError) and error.strerror:
        where = f": {one_line(error.filename)}" if error.filename else ""
        return f"{error.strerror}{where}", FAILED
    if isinstance(error, MemoryError):
        return "not enough memory; a smaller --capacity or batch needs less", FAILED
    return f"{type(error).__name__}: {shortened(one_line(error))} (-v shows the traceback)", FAILED


def _text_hint(error: BaseException) -> str:
    """How to write a text that the command line took for options or for several arguments."""
    command = getattr(getattr(error, "ctx", None), "command", None)
    if getattr(command, "name", None) not in TEXT_COMMANDS:
        return ""
    if type(error).__name__ == "NoSuchOption":
        return "; a text that begins with - is written last, after --"
    return "; quote a text with spaces, and write options before --" if "extra argument" in str(error) else ""


def _missing_module(error: ModuleNotFoundError) -> tuple[str, int]:
    module = (error.name or "").split(".")[0]
    extra = EXTRAS.get(module)
    if extra is None:
        return f"the module {error.name!r} is missing; reinstall blt-lm", FAILED
    return f"{module} is not installed; run: {install_command(extra)}", MISSING


def one_line(error: object) -> str:
    """The message without line breaks."""
    return printable(" ".join(str(error).split()))


def shortened(line: str) -> str:
    """The beginning and the end of a long line. A compiler's output names the failed command first and the reason
    last."""
    return line if len(line) <= 2 * SHOWN else f"{line[:SHOWN]} ... {line[-SHOWN:]}"


def report(error: BaseException) -> int:
    """Prints the error as `blt: error: ...` and returns the exit code. -v also prints the traceback."""
    line, code = describe(error)
    if verbose():
        traceback.print_exception(error, file=sys.stderr)
    if line:
        with contextlib.suppress(BrokenPipeError):  # of stderr: the exit code is all that is left to give
            print(f"blt: error: {line}", file=sys.stderr, flush=True)
    return code
