/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ranks of test-ctl-live.py: a small model with all kinds of tensors, one step, and then
 * waiting at the places where the test looks. Run by autoep-run; $D is the test's directory.
 * Without a launcher, "ctl-worker layout NODES" prints what ae_layout_new() makes of the model:
 * "slice NODE SEGMENT FIRST N" and "tensor NAME SEGMENT FIRST N".
 *
 * With $PAUSE the last rank announces a pause of an hour before it makes its ready file.
 *
 * Files that ranks make:  socket.NODE (its text: the daemon's socket), ready.RANK (after step 1)
 * Files that they await:  join (the last rank, before it opens), step (the others, before step 2),
 *                         last (the last rank, before it asks for step 2), then early (the last
 *                         rank) and leave (the others)
 */
#include "client/autoep.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/layout.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define N_EXPERTS 4
#define WAIT_S 60
#define WAIT_MS (WAIT_S * 1000)

#define ROW(name_, unit_, dtype_, class_, n_dims_, ...)                                           \
        { .size = sizeof(struct autoep_tensor), .name = name_, .unit = unit_,                     \
          .dtype = AUTOEP_##dtype_, .tensor_class = AUTOEP_##class_, .n_dims = n_dims_,           \
          .dims = { __VA_ARGS__ } }

/* The bytes of the embedding are cut between two nodes, in the middle of a row. */
static struct autoep_tensor tensors[] = {
        ROW("embed.weight", "embed", BF16, DENSE, 2, 1000, 333),
        ROW("layer.0.norm", "layer.0", F32, DENSE, 1, 64),
        ROW("layer.0.w", "layer.0", BF16, DENSE, 3, 30, 10, 700),
        ROW("layer.0.table", "layer.0", BF16, DENSE, 2, 100, 7),
        ROW("layer.0.bias", "layer.0", F32, BUFFER, 1, N_EXPERTS),
        ROW("layer.0.up", "layer.0.experts", BF16, EXPERT, 3, N_EXPERTS, 8, 16),
        ROW("layer.1.norm", "layer.1", F32, DENSE, 1, 64),
        ROW("layer.1.bias", "layer.1", F32, BUFFER, 1, N_EXPERTS),
        ROW("layer.1.experts.0.up", "layer.1.experts", BF16, EXPERT, 2, 8, 16),
        ROW("layer.1.experts.1.up", "layer.1.experts", BF16, EXPERT, 2, 8, 16),
        ROW("layer.1.experts.2.up", "layer.1.experts", BF16, EXPERT, 2, 8, 16),
        ROW("layer.1.experts.3.up", "layer.1.experts", BF16, EXPERT, 2, 8, 16),
        ROW("head.scale", "head", F32, DENSE, 0, 0),
        ROW("head.weight", "head", BF16, DENSE, 2, 1000, 333),
        ROW("head.none", "head", F32, DENSE, 2, 0, 5),
        /* with $ODD alone: what autoep-ctl can't tell, and more rows than it can be sent */
        ROW("layer.1.odd", "layer.1.experts", BF16, EXPERT, 1, 16),
        ROW("huge.up", "huge.experts", BF16, EXPERT, 2, 4000000, 1),
};
#define N_ODD 2

static uint32_t n_tensors = AE_ARRAY_LEN(tensors) - N_ODD;

static float zeros[1000 * 333]; /* initial values and gradients */

static void fill_in(void)
{
        if (getenv("ODD"))
                n_tensors += N_ODD;
        for (size_t i = 0; i < n_tensors; i++) {
                if (strcmp(tensors[i].name, "layer.0.table") == 0)
                        tensors[i].flags = AUTOEP_FROZEN;
                if (strcmp(tensors[i].name, "head.weight") == 0)
                        tensors[i].alias_of = "embed.weight";
                else if (tensors[i].tensor_class != AUTOEP_EXPERT)
                        tensors[i].init = zeros;
        }
}

static int print_layout(uint32_t n_nodes)
{
        struct ae_tensor_spec specs[AE_ARRAY_LEN(tensors)];
        struct ae_layout *layout;

        for (size_t i = 0; i < n_tensors; i++) {
                specs[i] = (struct ae_tensor_spec){
                        .name = tensors[i].name, .unit = tensors[i].unit, .dtype = tensors[i].dtype,
                        .class = tensors[i].tensor_class, .n_dims = tensors[i].n_dims,
                        .frozen = tensors[i].flags & AUTOEP_FROZEN, .alias_of = tensors[i].alias_of,
                };
                memcpy(specs[i].dims, tensors[i].dims, sizeof(specs[i].dims));
        }
        if (ae_layout_new(specs, n_tensors, n_nodes, &layout) < 0) {
                fprintf(stderr, "%s\n", ae_error_text());
                return 1;
        }
        for (uint32_t s = 0; s < layout->n_slices; s++)
                printf("slice %u %u %" PRIu64 " %" PRIu64 "\n", layout->slices[s].node,
                       layout->slices[s].segment, layout->slices[s].first, layout->slices[s].n);
        for (uint32_t t = 0; t < layout->n_tensors; t++) {
                const struct ae_layout_tensor *home = &layout->tensors[layout->tensors[t].home];

                printf("tensor %s %d %" PRIu64 " %" PRIu64 "\n", layout->tensors[t].name,
                       (int)home->segment, home->first, home->n);
        }
        ae_layout_free(layout);
        return 0;
}

/* ---- a rank ----------------------------------------------------------------------------- */

static autoep *handle;
static struct autoep_info info = { .size = sizeof(info) };

static void must(int r, const char *what)
{
        if (r == 0)
                return;
        fprintf(stderr, "ctl-worker: %s: %s\n", what, autoep_last_error());
        exit(1);
}

static void path_of(char path[512], const char *name, const char *suffix)
{
        (void)snprintf(path, 512, "%s/%s%s", getenv("D"), name, suffix);
}

static void await(const char *name)
{
        const struct timespec nap = { .tv_nsec = 5000000 };
        char path[512];

        path_of(path, name, "");
        for (int i = 0; i < WAIT_S * 200; i++) {
                if (access(path, F_OK) == 0)
                        return;
                nanosleep(&nap, NULL);
        }
        fprintf(stderr, "ctl-worker: nobody made %s within %d s\n", path, WAIT_S);
        exit(1);
}

/* Makes NAME.SUFFIX appear with its text. */
static void tell(const char *name, const char *suffix, const char *text)
{
        char dotted[64], half[512], path[512];
        FILE *file;

        (void)snprintf(dotted, sizeof(dotted), ".%s.half", suffix);
        path_of(half, name, dotted);
        (void)snprintf(dotted, sizeof(dotted), ".%s", suffix);
        path_of(path, name, dotted);
        file = fopen(half, "w");
        if (!file || fputs(text, file) < 0 || fclose(file) != 0 || rename(half, path) < 0) {
                perror(path);
                exit(1);
        }
}

static void join(int rank, int world)
{
        const struct autoep_options options = AUTOEP_OPTIONS_INIT;
        const struct autoep_model model = {
                .size = sizeof(model), .tensors = tensors, .n_tensors = n_tensors,
                .ep_size = world % 2 == 0 ? 2 : 1,
        };

        if (getenv("AUTOEP_LOCAL_RANK") && strcmp(getenv("AUTOEP_LOCAL_RANK"), "0") == 0)
                tell("socket", getenv("AUTOEP_NODE"), getenv("AUTOEP_SOCKET"));
        if (rank == world - 1)
                await("join");
        must(autoep_open(&options, &handle), "open");
        must(autoep_register(handle, &model, WAIT_MS), "register");
        must(autoep_info(handle, &info), "info");
}

/* A whole micro-batch but for the head: its unit is nobody's this time. */
static void scatter_all(void)
{
        static const char *const units[] = { "embed", "layer.0", "layer.1" };

        for (size_t u = 0; u < AE_ARRAY_LEN(units); u++) {
                struct autoep_gradient gradients[4];
                size_t n = 0;

                for (uint32_t t = 0; t < n_tensors; t++) {
                        if (strcmp(tensors[t].unit, units[u]) != 0 || tensors[t].flags ||
                            tensors[t].tensor_class != AUTOEP_DENSE)
                                continue;
                        gradients[n++] = (struct autoep_gradient){
                                .size = sizeof(gradients[0]), .tensor = t, .dtype = AUTOEP_F32,
                                .data = zeros,
                        };
                }
                must(autoep_scatter(handle, autoep_unit(handle, units[u]), gradients, n, 0,
                                    WAIT_MS), "scatter");
        }
        must(autoep_micro_batch_end(handle), "micro_batch_end");
}

/* Expert e of layer l gets 100 * l + 10 * e + 1 tokens from every rank. */
static void step(void)
{
        const struct autoep_hyper hyper = { .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8 };
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        uint64_t counts[2 * N_EXPERTS];
        struct autoep_step request = {
                .size = sizeof(request), .hyper = &hyper, .n_groups = 1, .counts = counts,
                .n_counts = AE_ARRAY_LEN(counts), .balance_rate = 1e-3,
        };

        for (uint32_t i = 0; i < AE_ARRAY_LEN(counts); i++)
                counts[i] = 100 * (i / N_EXPERTS) + 10 * (i % N_EXPERTS) + 1;
        must(autoep_step(handle, &request, WAIT_MS, &verdict), "step");
        if (verdict.kind != AUTOEP_APPLIED) {
                fprintf(stderr, "ctl-worker: the step was not applied: %s\n", verdict.why);
                exit(1);
        }
}

static autoep *attach_reader(void)
{
        struct autoep_options options = AUTOEP_OPTIONS_INIT;
        autoep *reader = NULL;

        options.reader = 1;
        must(autoep_open(&options, &reader), "open a reader");
        must(autoep_register(reader, NULL, WAIT_MS), "register a reader");
        return reader;
}

static void run(int rank, int world)
{
        struct autoep_view view = AUTOEP_VIEW_INIT;
        autoep *reader = NULL;
        char word[16];

        join(rank, world);
        scatter_all();
        step();
        must(autoep_gather(handle, autoep_unit(handle, "layer.0"), WAIT_MS, &view), "gather");
        if (rank != 0)
                must(autoep_release(handle, &view), "release");
        else
                reader = attach_reader();
        scatter_all(); /* rank 0 holds a view of layer.0, all are one micro-batch into round 2 */
        if (getenv("PAUSE") && rank == world - 1)
                must(autoep_pause(handle, getenv("PAUSE"), 3600), "pause");
        (void)snprintf(word, sizeof(word), "%d", rank);
        tell("ready", word, "");
        await("step");
        if (rank == 0)
                must(autoep_release(handle, &view), "release");
        if (rank == world - 1)
                await("last");
        step();
        await(rank == world - 1 ? "early" : "leave");
        autoep_close(reader);
        must(autoep_leave(handle, WAIT_MS), "leave");
        autoep_close(handle);
}

int main(int argc, char **argv)
{
        fill_in();
        if (argc == 3 && strcmp(argv[1], "layout") == 0)
                return print_layout((uint32_t)strtoul(argv[2], NULL, 10));
        if (argc != 1 || !getenv("D") || !getenv("AUTOEP_RANK") || !getenv("AUTOEP_WORLD")) {
                fprintf(stderr,
                        "usage: D=DIR autoep-run ... -- ctl-worker, or ctl-worker layout N\n");
                return 2;
        }
        run(atoi(getenv("AUTOEP_RANK")), atoi(getenv("AUTOEP_WORLD")));
        return 0;
}
