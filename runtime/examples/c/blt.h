/* Generate bytes with an exported Byte Latent Transformer, from C.
 *
 *     blt_model *model = blt_open("bundle", 0);
 *     if (!model || blt_generate(model, prompt, strlen(prompt), 200, NULL, print, NULL) < 0)
 *         fprintf(stderr, "error: %s\n", blt_error());
 *     blt_close(model);
 *
 * The library runs blt_runtime in an embedded Python. The first blt_open of a process starts it.
 *
 * Threads: every function may be called from any thread, also by several threads on one model. The caller never needs
 * Python's lock; a callback runs without it. Texts on one model share its weights and nothing else.
 * Errors: a function returns NULL or -1, and blt_error() describes it. Nothing is printed, and the process goes on.
 * The one exception is an embedded Python that cannot start: Python describes that on stderr.
 */
#ifndef BLT_H
#define BLT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* An open bundle: a number, not an address. A closed or made-up one is an error, never a crash. */
typedef struct blt_model blt_model;

/* How bytes are chosen. A struct of zeros is greedy. NULL in its place stands for blt_runtime's defaults. */
typedef struct {
    double temperature; /* 0: the most likely byte; otherwise the logits are divided by it and a byte is drawn */
    int64_t top_k;      /* draw from this many most likely bytes; 0: all */
    double top_p;       /* draw from the most likely bytes that have this share of the probability; 0: all */
    double min_p;       /* drop bytes with less than this share of the most likely byte's probability; 0: none */
    int64_t seed;       /* makes the draws repeatable; negative: a different text each time */
    const char *stop;   /* end before this text (ends with NUL); NULL: none */
} blt_options;

/* Receives the next bytes of a text. They are not terminated, may end within a UTF-8 character, and are valid until
 * the callback returns. Return 0 to go on, another value to end the text here. It must return: no longjmp, no C++
 * exception. It may call any function of this header. */
typedef int (*blt_callback)(void *user, const uint8_t *bytes, size_t size);

/* Opens the bundle folder `path` (any bytes that the file system takes). threads: of one call; 0 lets ONNX Runtime
 * choose. Returns a model that the caller closes, or NULL. */
blt_model *blt_open(const char *path, int threads);

/* Reads `prompt` (any bytes; NULL if prompt_size is 0) and calls `callback` with up to n bytes that continue it. Blocks
 * until the text ends: after n bytes, at an end of document, before `stop`, or when the callback ends it.
 * Returns the number of bytes that the callback received, or -1; it may have received bytes before an error. */
int64_t blt_generate(blt_model *model, const uint8_t *prompt, size_t prompt_size, int64_t n,
                     const blt_options *options, blt_callback callback, void *user);

/* Closes a model. NULL and closed models are ignored. Texts that other threads generate with it go on; its memory is
 * freed when the last one ends. */
void blt_close(blt_model *model);

/* This thread's last error: one line in UTF-8, empty before the first. Valid until the thread's next error or end. */
const char *blt_error(void);

#ifdef __cplusplus
}
#endif
#endif
