/* Calls the C interface for test_c.py: check SCENARIO BUNDLE */
#include <dirent.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "blt.h"

enum { N = 40 };
static const char PROMPT[] = "Once upon a time";
static const blt_options GREEDY = {0};

/* The bytes of a text. most: callbacks until one ends the text, 0: never. closes: a model that the callback closes. */
typedef struct { char bytes[4096]; size_t size; int calls, most; blt_model *closes; } text;

static int64_t generate(blt_model *model, text *into, int64_t n, const blt_options *options);

static void show(const text *from) {
    for (size_t at = 0; at < from->size; at++) printf("%02x", (unsigned char)from->bytes[at]);
    printf("\n");
}

static int receive(void *user, const uint8_t *bytes, size_t size) {
    text *into = user;
    memcpy(into->bytes + into->size, bytes, size);
    into->size += size;
    if (into->closes && into->calls == 0) { /* a callback may call every function */
        text inner = {0};
        generate(into->closes, &inner, 3, &GREEDY);
        show(&inner);
        blt_close(into->closes);
    }
    return ++into->calls == into->most;
}

static int64_t generate(blt_model *model, text *into, int64_t n, const blt_options *options) {
    return blt_generate(model, (const uint8_t *)PROMPT, strlen(PROMPT), n, options, receive, into);
}

static void failed(int64_t result) { printf("%" PRId64 " %s\n", result, blt_error()); }

static void arguments(const char *bundle) {
    text into = {0};
    blt_options options = {.stop = ""};
    printf("%d [%s]\n", blt_open(NULL, 0) != NULL, blt_error());
    printf("%d %s\n", blt_open("no\xff\x1bsuch", 0) != NULL, blt_error());
    printf("%d %s\n", blt_open(bundle, -1) != NULL, blt_error());
    blt_model *model = blt_open(bundle, 1);
    failed(generate(model, &into, -1, &GREEDY));
    failed(generate(model, &into, INT64_MAX, &options));
    options = (blt_options){.temperature = -1};
    failed(generate(model, &into, 1, &options));
    options = (blt_options){.top_p = 2};
    failed(generate(model, &into, 1, &options));
    failed(blt_generate(model, NULL, 5, 1, &GREEDY, receive, &into));
    failed(blt_generate(model, (const uint8_t *)PROMPT, 5, 1, &GREEDY, NULL, NULL));
    failed(generate(NULL, &into, 1, &GREEDY));
    failed(generate((blt_model *)12345, &into, 1, &GREEDY));
    static uint8_t giant[100000];
    failed(blt_generate(model, giant, sizeof giant, 1, &GREEDY, receive, &into));
    failed(blt_generate(model, NULL, 0, 0, &GREEDY, receive, &into)); /* no error: nothing asked, nothing received */
    blt_close(model);
    blt_close(model);
    blt_close(NULL);
    failed(generate(model, &into, 1, &GREEDY));
}

static void stop(const char *bundle) {
    blt_model *model = blt_open(bundle, 1);
    text first = {.most = 3}, closing = {.closes = model}, sampled[2] = {0};
    blt_options seeded = {.temperature = 1, .top_k = 50, .top_p = 0.9, .min_p = 0.001, .seed = 7};
    int64_t received = generate(model, &first, N, &GREEDY);
    printf("%" PRId64 " %d\n", received, first.calls);
    for (int k = 0; k < 2; k++) {
        generate(model, &sampled[k], N, &seeded);
        show(&sampled[k]);
    }
    generate(model, &closing, N, &GREEDY);
    show(&closing);
}

typedef struct { blt_model *model; const char *bundle; text into; char error[200]; } job;

static void *run(void *given) {
    job *one = given;
    blt_model *model = one->model ? one->model : blt_open(one->bundle, 1);
    if (generate(model, &one->into, N, &GREEDY) < 0) printf("%s\n", blt_error());
    blt_open(one->model ? NULL : "missing", 0);
    snprintf(one->error, sizeof one->error, "%s", blt_error());
    if (!one->model) blt_close(model);
    return NULL;
}

static void threads(const char *bundle) { /* the first four threads start Python at the same time */
    pthread_t ids[6];
    static job jobs[6];
    blt_model *shared = NULL;
    for (int k = 0; k < 6; k++) {
        if (k == 4) shared = blt_open(bundle, 1);
        jobs[k] = (job){.model = shared, .bundle = bundle};
        pthread_create(&ids[k], NULL, run, &jobs[k]);
    }
    for (int k = 0; k < 6; k++) pthread_join(ids[k], NULL);
    for (int k = 0; k < 6; k++) {
        printf("%s ", jobs[k].error);
        show(&jobs[k].into);
    }
    printf("[%s]\n", blt_error());
}

static int entries(const char *folder) {
    int count = 0;
    DIR *open = opendir(folder);
    while (readdir(open)) count++;
    closedir(open);
    return count;
}

static int mapped(const char *bundle) {
    char line[8192];
    int count = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, maps)) count += strstr(line, bundle) != NULL;
    fclose(maps);
    return count;
}

static void leaks(const char *bundle) {
    for (int k = 0; k < 12; k++) {
        text into = {0};
        blt_model *model = blt_open(bundle, 2);
        generate(model, &into, 4, NULL);
        generate(model, &into, -1, NULL);
        blt_close(model);
        if (k == 1 || k == 11)
            printf("%d files, %d threads, %d maps\n", entries("/proc/self/fd"), entries("/proc/self/task"), mapped(bundle));
    }
}

int main(int count, char **given) {
    if (count != 3) return 2;
    if (!strcmp(given[1], "arguments")) arguments(given[2]);
    if (!strcmp(given[1], "stop")) stop(given[2]);
    if (!strcmp(given[1], "threads")) threads(given[2]);
    if (!strcmp(given[1], "leaks")) leaks(given[2]);
    return 0;
}
