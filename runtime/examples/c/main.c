/* Continues a prompt: generate BUNDLE PROMPT [N [TEMPERATURE]] */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "blt.h"

static int print(void *file, const uint8_t *bytes, size_t size) {
    return fwrite(bytes, 1, size, file) != size || fflush(file) != 0; /* a closed pipe ends the text */
}

int main(int count, char **arguments) {
    blt_options options = {.temperature = 0.8, .seed = -1};
    if (count < 3 || count > 5) {
        fprintf(stderr, "usage: %s BUNDLE PROMPT [N [TEMPERATURE]]\n", arguments[0]);
        return 2;
    }
    const char *prompt = arguments[2];
    int64_t n = count > 3 ? atoll(arguments[3]) : 200;
    if (count > 4) options.temperature = atof(arguments[4]);

    blt_model *model = blt_open(arguments[1], 0);
    int64_t received = -1;
    if (model) received = blt_generate(model, (const uint8_t *)prompt, strlen(prompt), n, &options, print, stdout);
    if (received < 0) fprintf(stderr, "error: %s\n", blt_error());
    blt_close(model);
    return received < 0;
}
