/* SPDX-License-Identifier: Apache-2.0 */
/* The suites gather and scatter: which clusters are started, for which sizes. */
#include "client/bench/iperf.h"
#include "client/bench/suites.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <string.h>

#define STREAMS 2 /* of the tcp transport, by default */
#define IPERF_SECONDS 2
#define CPUS_PER_NODE 4 /* a loop, a thread that computes, two workers */

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

/* ---- which nodes, transports and workers ------------------------------------------------ */

/* The list that was given; otherwise 1, 2 and so on, twice as many each time, up to @most. */
static uint32_t list_nodes(const struct ae_bench_options *options, uint32_t most,
                           uint32_t nodes[AE_BENCH_NODES_MAX])
{
        uint32_t n = 0;

        if (options->n_nodes) {
                memcpy(nodes, options->nodes, options->n_nodes * sizeof(*nodes));
                return options->n_nodes;
        }
        for (uint32_t i = 1; i <= AE_MIN(most, (uint32_t)AE_BENCH_NODES_MAX); i *= 2)
                nodes[n++] = i;
        return n;
}

typedef int on_fn(struct ae_bench *bench, uint32_t nodes, const char *transport);

static int on_nodes(struct ae_bench *bench, uint32_t most, on_fn *on)
{
        uint32_t nodes[AE_BENCH_NODES_MAX];
        const uint32_t n = list_nodes(bench->options, most, nodes);
        int r = 0;

        for (uint32_t i = 0; r == 0 && i < n; i++) {
                if (nodes[i] == 1)
                        r = on(bench, 1, "shm");
                for (size_t t = 0; r == 0 && nodes[i] > 1 && t < AE_ARRAY_LEN(transports); t++) {
                        if (wants_transport(bench, transports[t]))
                                r = on(bench, nodes[i], transports[t]);
                }
        }
        return r;
}

typedef int with_fn(struct ae_bench *bench, struct ae_bench_cluster *cluster);

/* As many workers as were given, otherwise 1 up to @most. */
static int with_workers(struct ae_bench *bench, const struct ae_bench_cluster *base, uint32_t most,
                        with_fn *with)
{
        const uint32_t given = bench->options->workers;
        struct ae_bench_cluster cluster = *base;
        int r = 0;

        for (uint32_t n = given ? given : 1; r == 0 && n <= (given ? given : most); n++) {
                cluster.workers = n;
                r = with(bench, &cluster);
        }
        return r;
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

/* All sizes with two nodes of one worker; one for the rest, so that the sweep ends soon. */
static int fetch_sizes(struct ae_bench *bench, struct ae_bench_cluster *cluster)
{
        static const uint64_t all[] = { AE_MIB, 16 * AE_MIB, 64 * AE_MIB, 256 * AE_MIB };
        static const uint64_t one[] = { 64 * AE_MIB };
        static const uint64_t quick[] = { AE_MIB };
        const bool least = cluster->nodes == 2 && cluster->workers == 1;
        const struct sizes sizes = least ? sizes_of(bench->options, all, AE_ARRAY_LEN(all), quick)
                                         : sizes_of(bench->options, one, AE_ARRAY_LEN(one), quick);
        int r = 0;

        for (size_t i = 0; r == 0 && i < sizes.n; i++) {
                cluster->len = sizes.lens[i];
                r = ae_bench_launch(bench, cluster);
        }
        return r;
}

static int gather_on(struct ae_bench *bench, uint32_t nodes, const char *transport)
{
        struct ae_bench_cluster cluster = { "gather", "miss", nodes, 1, transport, 64 * AE_KIB };
        int r;

        if (nodes == 1)
                return gather_one_node(bench);
        r = ae_bench_launch(bench, &cluster);
        cluster.which = "fetch";
        return r < 0 ? r : with_workers(bench, &cluster, 2, fetch_sizes);
}

int ae_bench_gather(struct ae_bench *bench)
{
        const struct ae_bench_options *options = bench->options;
        const uint32_t most = options->quick ? 2 : AE_MAX(bench->n_cpus / CPUS_PER_NODE, 2u);
        int r = on_nodes(bench, most, gather_on);
        bool several = options->n_nodes == 0;

        for (uint32_t i = 0; i < options->n_nodes; i++)
                several |= options->nodes[i] > 1;
        if (r == 0 && several && !options->quick && wants_transport(bench, "tcp"))
                r = ae_bench_iperf(bench, STREAMS, IPERF_SECONDS);
        return r;
}

/* ---- scatter ---------------------------------------------------------------------------- */

static int scatter_sizes(struct ae_bench *bench, struct ae_bench_cluster *cluster)
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
        const struct ae_bench_cluster cluster = { "scatter", "scatter", nodes, 0, transport, 0 };

        return with_workers(bench, &cluster, bench->options->quick ? 1 : 2, scatter_sizes);
}

int ae_bench_scatter(struct ae_bench *bench)
{
        return on_nodes(bench, 2, scatter_on);
}
