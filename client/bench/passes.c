/* SPDX-License-Identifier: Apache-2.0 */
/* Each pass with its own memory, best of some times. */
#include "client/bench/passes.h"

#include "client/bench/measure.h"
#include "client/bench/plain-tcp.h"

#include "kernels/floor.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <string.h>

#define STREAMS 2 /* of the tcp transport, by default */
#define RING_LEN (32 * AE_MIB) /* of a worker's gradients, by default */

const char *ae_bench_pass_words(enum ae_bench_pass pass)
{
        static const char *const words[AE_BENCH_N_PASSES] = {
#define PASS_ROW(name, text) text,
                AE_BENCH_PASS_TABLE(PASS_ROW)
#undef PASS_ROW
        };

        assert(pass < AE_BENCH_N_PASSES);
        return words[pass];
}

/* Memory for one pass at a time: room for the largest of them. */
struct floor {
        uint8_t *memory; /* owned; len bytes */
        uint64_t len;
        uint64_t n;      /* elements, or bytes of a copy */
        uint64_t to;     /* where a copy goes, behind what it reads */
        uint32_t n_inputs;
        uint32_t dtype;
};

static void run_copy(void *arg, uint32_t index, uint32_t n)
{
        const struct floor *f = arg;
        uint64_t at, len = ae_bench_share(f->n, index, n, &at);

        memcpy(f->memory + f->n + f->to + at, f->memory + at, len);
}

static void run_sum(void *arg, uint32_t index, uint32_t of)
{
        const struct floor *f = arg;
        uint64_t at, n = ae_bench_share(f->n, index, of, &at);
        struct ae_ops_input inputs[AE_OPS_SUM_MAX];
        struct ae_ops_sum sum = { .acc = (float *)(void *)f->memory + at, .n = n, .inputs = inputs,
                                  .n_inputs = f->n_inputs };
        const uint64_t size = ae_dtype_size(f->dtype);

        for (uint32_t i = 0; i < f->n_inputs; i++)
                inputs[i] = (struct ae_ops_input){
                        f->memory + 4 * f->n + (i * f->n + at) * size, f->dtype };
        ae_floor_sum(&sum);
}

static void run_adamw(void *arg, uint32_t index, uint32_t of)
{
        const struct floor *f = arg;
        uint64_t at, n = ae_bench_share(f->n, index, of, &at);
        float *p = (float *)(void *)f->memory;

        ae_floor_adamw(p + at, p + f->n + at, p + 2 * f->n + at, p + 3 * f->n + at,
                       (ae_bf16 *)(void *)(p + 4 * f->n) + at, n);
}

/* A copy goes through @ring_len bytes in turn, where that is more than it has. Ranges that more
 * inputs than one call takes would need are folded in more calls. */
static int time_ring(const struct floor *f, ae_bench_fn *fn, const struct ae_bench_passes_of *of,
                     uint32_t n_threads, uint64_t ring_len, uint64_t *ret_ns)
{
        struct ae_bench_team *team;
        struct floor own = *f;
        int r = ae_bench_team_new(AE_MIN(n_threads, of->n_cpus), &team);

        if (r < 0)
                return r;
        *ret_ns = UINT64_MAX;
        for (uint32_t i = 0; i <= of->repeats; i++) {
                uint64_t ns = ae_bench_team_run(team, fn, &own);

                own.to = fn == run_copy && own.to + 2 * f->n <= ring_len ? own.to + f->n : 0;
                if (i > 0 || of->repeats == 0)
                        *ret_ns = AE_MIN(*ret_ns, ns);
        }
        ae_bench_team_free(team);
        return 0;
}

static int time_pass(const struct floor *f, ae_bench_fn *fn, const struct ae_bench_passes_of *of,
                     uint32_t n_threads, uint64_t *ret_ns)
{
        return time_ring(f, fn, of, n_threads, 0, ret_ns);
}

/* Between each pair of nodes both ways at once; of shm one copy by each node's loop. */
static int time_wire(const struct floor *f, const struct ae_bench_passes_of *of, uint64_t *ret_ns)
{
        const uint64_t len = 4 * of->n / of->nodes; /* of each node to each other one */
        const struct ae_bench_tcp tcp = { .len = len, .streams = STREAMS, .n_from = 1, .n_to = 1,
                                          .both_ways = true, .repeats = of->repeats };
        struct floor part = *f;
        int r;

        if (of->nodes == 1) {
                *ret_ns = 0;
                return 0;
        }
        if (!of->tcp) {
                part.n = len * (of->nodes - 1) * of->nodes;
                return time_pass(&part, run_copy, of, of->nodes, ret_ns);
        }
        r = ae_bench_tcp_run(&tcp, ret_ns);
        *ret_ns *= of->nodes * (of->nodes - 1) / 2;
        return r;
}

static uint64_t memory_len(const struct ae_bench_passes_of *of)
{
        const uint64_t ranks = (uint64_t)of->nodes * of->workers;
        uint64_t len = ranks * (2 * of->n + AE_MAX(2 * of->n, RING_LEN));

        len = AE_MAX(len, of->nodes * of->n * (4 + 2 * (uint64_t)of->workers));
        len = AE_MAX(len, 2 * of->n * 4 * of->nodes);                  /* wire of shm */
        len = AE_MAX(len, of->n * (4 + 4 * (uint64_t)of->nodes));      /* owner fold */
        return AE_MAX(len, of->n * 18);                                /* apply */
}

static int time_passes(struct floor *f, const struct ae_bench_passes_of *of, uint64_t *ns)
{
        const uint32_t compute = of->nodes * of->node_threads;
        const uint32_t ranks = of->nodes * of->workers;
        int r;

        f->n = 2 * of->n * ranks;
        r = time_ring(f, run_copy, of, ranks, ranks * RING_LEN, &ns[AE_BENCH_PASS_RING]);
        f->n = of->n * of->nodes;
        f->n_inputs = of->workers;
        f->dtype = AE_DTYPE_BF16;
        if (r == 0)
                r = time_pass(f, run_sum, of, compute, &ns[AE_BENCH_PASS_FOLD]);
        if (r == 0)
                r = time_wire(f, of, &ns[AE_BENCH_PASS_WIRE]);
        f->n = of->n;
        f->n_inputs = of->nodes;
        f->dtype = AE_DTYPE_F32;
        if (r == 0)
                r = time_pass(f, run_sum, of, compute, &ns[AE_BENCH_PASS_OWNER_FOLD]);
        if (r == 0)
                r = time_pass(f, run_adamw, of, compute, &ns[AE_BENCH_PASS_APPLY]);
        f->n = 2 * of->n * of->nodes;
        if (r == 0)
                r = time_pass(f, run_copy, of, compute, &ns[AE_BENCH_PASS_CACHE]);
        return r;
}

int ae_bench_passes(const struct ae_bench_passes_of *of, uint64_t ret_ns[AE_BENCH_N_PASSES])
{
        struct floor f = { .len = memory_len(of) };
        int r;

        assert(of->workers <= AE_OPS_SUM_MAX && of->nodes <= AE_OPS_SUM_MAX);
        f.memory = ae_bench_memory_new(f.len);
        if (!f.memory)
                return AE_ENOMEM;
        r = time_passes(&f, of, ret_ns);
        ae_bench_memory_free(f.memory, f.len);
        return r;
}
