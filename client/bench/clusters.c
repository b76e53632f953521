/* SPDX-License-Identifier: Apache-2.0 */
/* The suites gather and scatter: which clusters are started, for which sizes. */
#include "client/bench/iperf.h"
#include "client/bench/suites.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#define STREAMS 2 /* of the tcp transport, by default */
#define IPERF_SECONDS 2

static const char *const transports[] = { "tcp", "shm" };

/* @n of the sizes that were given, otherwise of the suite's own. */
struct sizes {
        const uint64_t *lens;
        size_t n;
};

static struct sizes sizes_of(const struct ae_bench_options *options, const uint64_t *full,
                             size_t n_full, const uint64_t *quick)
{
        if (options->n_sizes)
                return (struct sizes){ options->sizes, options->n_sizes };
        return options->quick ? (struct sizes){ quick, 1 } : (struct sizes){ full, n_full };
}

static bool wants_transport(const struct ae_bench *bench, const char *transport)
{
        return !bench->options->transport || bench->options->transport == transport ||
               bench->options->transport[0] == transport[0];
}

/* ---- gather ----------------------------------------------------------------------------- */

static int gather_one_node(struct ae_bench *bench)
{
        const struct ae_bench_cluster clusters[] = {
                { "gather", "view", 1, 1, "shm", 64 * AE_KIB },
                { "gather", "miss", 1, 1, "shm", 64 * AE_KIB },
                { "gather", "copy", 1, 1, "shm", bench->memory_len },
        };
        int r = 0;

        for (size_t i = 0; r == 0 && i < AE_ARRAY_LEN(clusters); i++)
                r = ae_bench_launch(bench, &clusters[i]);
        return r;
}

static int gather_over(struct ae_bench *bench, uint32_t nodes, const char *transport)
{
        static const uint64_t full[] = { AE_MIB, 16 * AE_MIB, 64 * AE_MIB, 256 * AE_MIB };
        static const uint64_t quick[] = { AE_MIB };
        const struct sizes sizes = sizes_of(bench->options, full, AE_ARRAY_LEN(full), quick);
        struct ae_bench_cluster cluster = { "gather", "miss", nodes, 1, transport, 64 * AE_KIB };
        int r = ae_bench_launch(bench, &cluster);

        cluster.which = "fetch";
        for (size_t i = 0; r == 0 && i < sizes.n; i++) {
                cluster.len = sizes.lens[i];
                r = ae_bench_launch(bench, &cluster);
        }
        return r;
}

int ae_bench_gather(struct ae_bench *bench)
{
        const struct ae_bench_options *options = bench->options;
        const uint32_t nodes = options->nodes ? options->nodes : 2;
        int r = 0;

        if (options->nodes <= 1)
                r = gather_one_node(bench);
        for (size_t i = 0; r == 0 && nodes > 1 && i < AE_ARRAY_LEN(transports); i++) {
                if (wants_transport(bench, transports[i]))
                        r = gather_over(bench, nodes, transports[i]);
        }
        if (r == 0 && nodes > 1 && !options->quick && wants_transport(bench, "tcp"))
                r = ae_bench_iperf(bench, STREAMS, IPERF_SECONDS);
        return r;
}

/* ---- scatter ---------------------------------------------------------------------------- */

static int scatter_over(struct ae_bench *bench, struct ae_bench_cluster *cluster)
{
        static const uint64_t full[] = { 4 * AE_MIB, 64 * AE_MIB };
        static const uint64_t quick[] = { 2 * AE_MIB };
        const struct sizes sizes = sizes_of(bench->options, full, AE_ARRAY_LEN(full), quick);
        int r = 0;

        for (size_t i = 0; r == 0 && i < sizes.n; i++) {
                cluster->len = sizes.lens[i];
                r = ae_bench_launch(bench, cluster);
        }
        return r;
}

static int scatter_on(struct ae_bench *bench, uint32_t nodes, const char *transport)
{
        const struct ae_bench_options *options = bench->options;
        const uint32_t most = options->workers ? options->workers : options->quick ? 1 : 2;
        int r = 0;

        for (uint32_t workers = options->workers ? most : 1; r == 0 && workers <= most; workers++) {
                struct ae_bench_cluster cluster = { "scatter", "scatter", nodes, workers, transport,
                                                    0 };

                r = scatter_over(bench, &cluster);
        }
        return r;
}

int ae_bench_scatter(struct ae_bench *bench)
{
        const struct ae_bench_options *options = bench->options;
        const uint32_t nodes = options->nodes ? options->nodes : 2;
        int r = 0;

        if (options->nodes <= 1)
                r = scatter_on(bench, 1, "shm");
        for (size_t i = 0; r == 0 && nodes > 1 && i < AE_ARRAY_LEN(transports); i++) {
                if (wants_transport(bench, transports[i]))
                        r = scatter_on(bench, nodes, transports[i]);
        }
        return r;
}
