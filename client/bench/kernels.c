/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The suite kernels: sums, optimizers and conversions on 1 to all processors, each thread with its
 * part of one working set, beside the floor kernels or a plain copy of as many bytes.
 */
#include "client/bench/measure.h"
#include "client/bench/suites.h"

#include "kernels/floor.h"
#include "kernels/ops.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <stdio.h>
#include <string.h>

#define SUM_TARGET 0.80
#define ADAMW_TARGET 0.95
#define QUICK_REPEATS 2
#define REPEATS 7

/* Bytes read and written per element. */
#define ADAMW_LEN (4 * 7 + 2)
#define SGD_LEN (4 * 5 + 2)
#define CONVERT_LEN (4 + 2)

struct kernels {
        struct ae_bench *bench;    /* borrowed */
        struct ae_bench_team *team;
        uint32_t n_threads;
        uint32_t repeats;
        uint8_t *memory;           /* owned; len bytes */
        uint64_t len;
        double copy_gbps;          /* of memcpy, read and written, on these threads */
};

/* ---- what threads run ------------------------------------------------------------------- */

struct copy {
        uint8_t *to;
        const uint8_t *from;
        uint64_t len;
};

static void run_copy(void *arg, uint32_t index, uint32_t n)
{
        const struct copy *copy = arg;
        uint64_t first, len = ae_bench_share(copy->len, index, n, &first);

        memcpy(copy->to + first, copy->from + first, len);
}

struct sum {
        float *acc;
        const ae_bf16 *inputs[AE_OPS_SUM_MAX];
        size_t n_inputs;
        uint64_t n;
        bool keep;
};

static void sum_part(const struct sum *sum, uint32_t index, uint32_t of,
                     void (*run)(struct ae_ops_sum *part))
{
        struct ae_ops_input inputs[AE_OPS_SUM_MAX];
        uint64_t first, n = ae_bench_share(sum->n, index, of, &first);
        struct ae_ops_sum part = { .acc = sum->acc + first, .n = n, .inputs = inputs,
                                   .n_inputs = sum->n_inputs, .keep = sum->keep };

        for (size_t i = 0; i < sum->n_inputs; i++)
                inputs[i] = (struct ae_ops_input){ sum->inputs[i] + first, AE_DTYPE_BF16 };
        run(&part);
}

static void floor_sum(struct ae_ops_sum *part)
{
        ae_floor_sum(part);
}

static void run_sum(void *arg, uint32_t index, uint32_t n)
{
        sum_part(arg, index, n, ae_ops()->sum);
}

static void run_floor_sum(void *arg, uint32_t index, uint32_t n)
{
        sum_part(arg, index, n, floor_sum);
}

struct state {
        float *p, *m, *v, *g;
        ae_bf16 *weight;
        uint64_t n;
        struct ae_adamw adamw;
        struct ae_sgd sgd;
};

static void run_adamw(void *arg, uint32_t index, uint32_t n_threads)
{
        const struct state *s = arg;
        uint64_t at, n = ae_bench_share(s->n, index, n_threads, &at);

        ae_ops()->adamw(&s->adamw, s->p + at, s->m + at, s->v + at, s->g + at, s->weight + at,
                        AE_DTYPE_BF16, n);
}

static void run_floor_adamw(void *arg, uint32_t index, uint32_t n_threads)
{
        const struct state *s = arg;
        uint64_t at, n = ae_bench_share(s->n, index, n_threads, &at);

        ae_floor_adamw(s->p + at, s->m + at, s->v + at, s->g + at, s->weight + at, n);
}

static void run_sgd(void *arg, uint32_t index, uint32_t n_threads)
{
        const struct state *s = arg;
        uint64_t at, n = ae_bench_share(s->n, index, n_threads, &at);

        ae_ops()->sgd(&s->sgd, s->p + at, s->m + at, s->g + at, s->weight + at, AE_DTYPE_BF16, n);
}

static void run_narrow(void *arg, uint32_t index, uint32_t n_threads)
{
        const struct state *s = arg;
        uint64_t at, n = ae_bench_share(s->n, index, n_threads, &at);

        ae_ops()->f32_to_bf16(s->weight + at, s->p + at, n);
}

static void run_widen(void *arg, uint32_t index, uint32_t n_threads)
{
        const struct state *s = arg;
        uint64_t at, n = ae_bench_share(s->n, index, n_threads, &at);

        ae_ops()->bf16_to_f32(s->p + at, s->weight + at, n);
}

/* ---- rows ------------------------------------------------------------------------------- */

static int add_row(const struct kernels *k, const char *name, double figure, double floor,
                   const char *floor_name, double target)
{
        struct ae_bench_row row = { .suite = "kernels", .len = k->len, .unit = AE_BENCH_GBPS,
                                    .figure = figure, .floor = floor, .target = target,
                                    .aim = target > 0 ? AE_BENCH_AIM_RATIO : AE_BENCH_AIM_NONE };

        (void)snprintf(row.name, sizeof(row.name), "%.20s, %u thread%s", name, k->n_threads,
                       k->n_threads > 1 ? "s" : "");
        (void)snprintf(row.floor_name, sizeof(row.floor_name), "%s", floor_name);
        return ae_bench_add(k->bench, &row);
}

static int measure_copy(struct kernels *k)
{
        struct copy copy = { .to = k->memory, .from = k->memory + k->len / 2, .len = k->len / 2 };
        const struct ae_bench_pair pair = { run_copy, run_copy, &copy, &copy, 2 * k->repeats };
        uint64_t figure_ns, floor_ns;

        ae_bench_team_pair(k->team, &pair, &figure_ns, &floor_ns);
        k->copy_gbps = ae_bench_gbps(2 * copy.len, AE_MIN(figure_ns, floor_ns));
        return 0;
}

/* The inputs behind the sums, all in one working set; values are those of fill(). */
static int measure_sum(struct kernels *k, size_t n_inputs, bool keep)
{
        const uint64_t each = 2 * n_inputs + (keep ? 8 : 4);
        struct sum sum = { .acc = (float *)(void *)k->memory, .n_inputs = n_inputs, .keep = keep,
                           .n = k->len / (2 * n_inputs + 4) / 4096 * 4096 };
        const struct ae_bench_pair pair = { run_sum, run_floor_sum, &sum, &sum, k->repeats };
        uint64_t figure_ns, floor_ns;
        char name[32];
        int r;

        for (size_t i = 0; i < n_inputs; i++)
                sum.inputs[i] = (const ae_bf16 *)(void *)(k->memory + sum.n * (4 + 2 * i));
        memset(k->memory, 0, sum.n * 4);
        ae_bench_team_pair(k->team, &pair, &figure_ns, &floor_ns);
        (void)snprintf(name, sizeof(name), "sum of %zu%s", n_inputs, keep ? " kept" : "");
        r = add_row(k, name, ae_bench_gbps(each * sum.n, figure_ns),
                    ae_bench_gbps(each * sum.n, floor_ns), "no arithmetic", SUM_TARGET);
        if (r < 0)
                return r;
        return add_row(k, name, ae_bench_gbps(each * sum.n, figure_ns), k->copy_gbps, "memcpy", 0);
}

static void lay_state(const struct kernels *k, struct state *ret_state)
{
        const struct ae_hyper hyper = { .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                                        .weight_decay = 0.1 };
        uint64_t n = k->len / 18 / 4096 * 4096;
        float *at = (float *)(void *)k->memory;

        *ret_state = (struct state){ .p = at, .m = at + n, .v = at + 2 * n, .g = at + 3 * n,
                                     .weight = (ae_bf16 *)(at + 4 * n), .n = n };
        ae_adamw_scalars(&hyper, 10, 1.0, &ret_state->adamw);
        ae_sgd_scalars(&hyper, 1.0, &ret_state->sgd);
        memset(ret_state->m, 0, 2 * n * sizeof(float));
        for (uint64_t i = 0; i < n; i++) {
                ret_state->p[i] = (float)(i % 1024) * 0x1p-10F;
                ret_state->g[i] = (float)(i % 512) * 0x1p-12F + 0x1p-10F;
        }
}

/* The floor scrambles what it writes, so it works on the same memory after the figure. */
static int measure_optimizers(struct kernels *k)
{
        struct state s;
        uint64_t figure_ns = UINT64_MAX, floor_ns = UINT64_MAX;
        int r;

        for (uint32_t i = 0; i <= k->repeats; i++) {
                lay_state(k, &s);
                figure_ns = AE_MIN(figure_ns, ae_bench_team_run(k->team, run_adamw, &s));
                floor_ns = AE_MIN(floor_ns, ae_bench_team_run(k->team, run_floor_adamw, &s));
        }
        r = add_row(k, "AdamW", ae_bench_gbps(ADAMW_LEN * s.n, figure_ns),
                    ae_bench_gbps(ADAMW_LEN * s.n, floor_ns), "no arithmetic", ADAMW_TARGET);
        if (r < 0)
                return r;
        lay_state(k, &s);
        for (uint32_t i = 0, all = k->repeats; i <= all; i++) {
                uint64_t ns = ae_bench_team_run(k->team, run_sgd, &s);

                figure_ns = i == 0 ? UINT64_MAX : AE_MIN(figure_ns, ns);
        }
        return add_row(k, "SGD with momentum", ae_bench_gbps(SGD_LEN * s.n, figure_ns),
                       k->copy_gbps, "memcpy", 0);
}

static int measure_conversion(struct kernels *k, const char *name, ae_bench_fn *fn)
{
        uint64_t n = k->len / CONVERT_LEN / 4096 * 4096;
        struct state s = { .p = (float *)(void *)k->memory, .n = n,
                           .weight = (ae_bf16 *)(void *)(k->memory + 4 * n) };
        const struct ae_bench_pair pair = { fn, fn, &s, &s, k->repeats };
        uint64_t a_ns, b_ns;

        ae_bench_team_pair(k->team, &pair, &a_ns, &b_ns);
        return add_row(k, name, ae_bench_gbps(CONVERT_LEN * n, AE_MIN(a_ns, b_ns)), k->copy_gbps,
                       "memcpy", 0);
}

/* Small normal numbers in bf16 and in fp32 alike. */
static void fill(uint8_t *memory, uint64_t len)
{
        uint16_t *at = (uint16_t *)(void *)memory;

        for (uint64_t i = 0; i < len / sizeof(*at); i++)
                at[i] = (uint16_t)(0x3c00 + i * 37 % 1024);
}

static int measure_all(struct kernels *k)
{
        static const size_t counts[] = { 1, 2, 4, 8, 16 };
        int r = measure_copy(k);

        fill(k->memory, k->len);
        for (size_t i = 0; r == 0 && i < AE_ARRAY_LEN(counts); i++) {
                fill(k->memory, k->len);
                r = measure_sum(k, counts[i], false);
                if (r == 0)
                        r = measure_sum(k, counts[i], true);
        }
        if (r == 0)
                r = measure_optimizers(k);
        fill(k->memory, k->len);
        if (r == 0)
                r = measure_conversion(k, "fp32 to bf16", run_narrow);
        if (r == 0)
                r = measure_conversion(k, "bf16 to fp32", run_widen);
        return r;
}

static int with_threads(struct kernels *k, uint32_t n_threads)
{
        int r;

        k->n_threads = n_threads;
        r = ae_bench_team_new(n_threads, &k->team);
        if (r < 0)
                return r;
        r = measure_all(k);
        ae_bench_team_free(k->team);
        return r;
}

static int with_len(struct ae_bench *bench, uint64_t len)
{
        struct kernels k = { .bench = bench, .len = len,
                             .repeats = bench->options->quick ? QUICK_REPEATS : REPEATS };
        int r = 0;

        k.memory = ae_bench_memory_new(len);
        if (!k.memory)
                return AE_ENOMEM;
        for (uint32_t n = 1; r == 0 && n < bench->n_cpus; n *= 2)
                r = with_threads(&k, n);
        if (r == 0)
                r = with_threads(&k, bench->n_cpus);
        ae_bench_memory_free(k.memory, len);
        return r;
}

int ae_bench_kernels(struct ae_bench *bench)
{
        const struct ae_bench_options *options = bench->options;
        int r = 0;

        if (options->n_sizes == 0)
                return with_len(bench, bench->memory_len);
        for (uint32_t i = 0; r == 0 && i < options->n_sizes; i++)
                r = with_len(bench, AE_MAX(options->sizes[i], AE_MIB));
        return r;
}
