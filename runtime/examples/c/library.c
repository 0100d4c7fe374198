/* The C half of libblt: it starts Python and keeps each thread's error. embedded.py is the other half. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include "blt.h"

#define MESSAGE_SIZE 4096

/* Defined in embedded.py. */
static blt_model *python_open(const char *path, int threads);
static int64_t python_generate(blt_model *model, const uint8_t *prompt, size_t prompt_size, int64_t n,
                               const blt_options *options, blt_callback callback, void *user);
static void python_close(blt_model *model);

static _Thread_local char message[MESSAGE_SIZE];

static void set_error(const char *text) { snprintf(message, sizeof message, "%s", text); }

/* Starts the Python environment that built this library, or that of the interpreter BLT_PYTHON. */
static void start_python(void) {
    PyConfig config;
    PyStatus status;
    const char *python = getenv("BLT_PYTHON");
    if (Py_IsInitialized()) return; /* this process runs Python itself */
    PyConfig_InitPythonConfig(&config);
    config.install_signal_handlers = 0; /* Ctrl-C belongs to the program */
    status = PyConfig_SetBytesString(&config, &config.program_name, python && *python ? python : PYTHON);
    if (!PyStatus_Exception(status)) status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))
        fprintf(stderr, "%s\n", status.err_msg ? status.err_msg : "Python cannot start");
    else
        PyEval_SaveThread(); /* releases the lock for all threads */
}

/* Whether embedded.py is loaded. The library may be used from any thread afterwards. */
static int started(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, start_python);
    if (Py_IsInitialized() && cffi_start_python() == 0) return 1;
    set_error("the embedded Python could not start or import blt_runtime: see its messages on stderr");
    return 0;
}

blt_model *blt_open(const char *path, int threads) { return started() ? python_open(path, threads) : NULL; }

int64_t blt_generate(blt_model *model, const uint8_t *prompt, size_t prompt_size, int64_t n,
                     const blt_options *options, blt_callback callback, void *user) {
    return started() ? python_generate(model, prompt, prompt_size, n, options, callback, user) : -1;
}

void blt_close(blt_model *model) {
    if (model && started()) python_close(model);
}

const char *blt_error(void) { return message; }
