"""Build libblt, the runtime as a C library: python build.py [FOLDER]

Writes FOLDER/libblt.so (default: build). The library starts the Python environment that runs this script. Needs cffi,
setuptools, a C compiler, Python's headers and a Python with a shared libpython.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
API = """
typedef struct blt_model blt_model;
typedef struct { double temperature; int64_t top_k; double top_p; double min_p; int64_t seed; const char *stop; ...; }
    blt_options;
typedef int (*blt_callback)(void *user, const uint8_t *bytes, size_t size);
extern "Python" {
    blt_model *python_open(const char *path, int threads);
    int64_t python_generate(blt_model *model, const uint8_t *prompt, size_t prompt_size, int64_t n,
                            const blt_options *options, blt_callback callback, void *user);
    void python_close(blt_model *model);
}
static void set_error(const char *text);
"""


def build(folder: Path) -> Path:
    """Compiles the library into `folder` and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    libraries = sysconfig.get_config_var("LIBDIR")
    ffi = cffi.FFI()
    ffi.cdef(API)
    ffi.embedding_api("")
    ffi.embedding_init_code((HERE / "embedded.py").read_text())
    ffi.set_source(
        "_blt",
        (HERE / "library.c").read_text(),
        include_dirs=[str(HERE)],
        define_macros=[("PYTHON", f'"{sys.executable}"')],
        library_dirs=[libraries],
        extra_link_args=[f"-Wl,-rpath,{libraries}"],
    )
    return Path(ffi.compile(tmpdir=str(folder), target="libblt.*"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Build libblt, the runtime as a C library.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build"))
    folder = parser.parse_args().folder
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        sys.exit(
            "error: this Python has no shared libpython: pyenv builds it with PYTHON_CONFIGURE_OPTS=--enable-shared"
        )
    print(build(folder))


if __name__ == "__main__":
    main()
