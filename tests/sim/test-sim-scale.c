/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a step costs as the cluster grows: control messages and their bytes per peer and step, and
 * memory per daemon, at 10, 100 and more nodes with one worker each. Every unit is cut over all
 * nodes, so that everybody fetches from and sends to everybody; tensors are addresses alone.
 * Arguments: --units N for one number of units alone; the numbers of nodes, ascending.
 */
#include "tests/lib/test.h"

#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "server/core/core.h"
#include "tests/lib/simjob.h"

#include <stdlib.h>
#include <string.h>

#define MS UINT64_C(1000000)
#define N_STEPS 3
#define N_STEPS_MANY 2 /* for more than 100 nodes */
#define MOST_MSGS 32.0 /* per peer and step, ARCHITECTURE.md, "Costs at scale" */
#define MOST_GROWTH 1.5  /* from the fewest nodes on */
#define MOST_BEND 0.1    /* of a line */
#define SIZES_MAX 8

static uint32_t sizes[SIZES_MAX] = { 10, 30, 100 };
static uint32_t n_sizes = 3;
static uint32_t only_units; /* 0: all */

struct cost {
        double msgs, msg_bytes; /* per peer and step, the first step left out */
        double tables, regions; /* bytes of the daemon that has most */
        double s;               /* it took */
};

/* Of all nodes together. */
static void count_msgs(struct simjob *job, uint32_t n_nodes, uint64_t *ret_n, uint64_t *ret_len)
{
        struct ae_net_stats stats;

        *ret_n = *ret_len = 0;
        for (uint32_t node = 0; node < n_nodes; node++) {
                ae_net_stats(simjob_net(job, node), &stats);
                *ret_n += stats.msgs_sent;
                *ret_len += stats.msg_bytes_sent;
        }
}

static void run_until_step(struct simjob *job, uint32_t step)
{
        for (int i = 0; simjob_step(job) < step; i++) {
                assert_true(i < 1000000);
                (void)simjob_run(job, MS / 10);
        }
}

static struct cost measure(uint32_t n_nodes, uint32_t n_units)
{
        struct simjob_params params = {
                .seed = n_nodes,
                .n_nodes = n_nodes,
                .n_ranks = n_nodes,
                .n_steps = 1000,
                .slots = 4,
                .no_data = true,
                .n_units = n_units,
                .slices_per_unit = n_nodes,
                .may_fail = true,
                .net = { .no_data = true, .pieces_max = 1 },
        };
        uint32_t n_steps = n_nodes > 100 ? N_STEPS_MANY : N_STEPS;
        double n_pairs = (double)n_nodes * (n_nodes - 1) * (n_steps - 1);
        uint64_t begin = ae_now_ns();
        struct simjob *job = simjob_new(&params);
        struct ae_core_stats stats;
        struct cost cost = { 0 };
        uint64_t n[2];
        uint64_t len[2];

        run_until_step(job, 1);
        count_msgs(job, n_nodes, &n[0], &len[0]);
        run_until_step(job, n_steps);
        count_msgs(job, n_nodes, &n[1], &len[1]);
        cost.msgs = (double)(n[1] - n[0]) / n_pairs;
        cost.msg_bytes = (double)(len[1] - len[0]) / n_pairs;
        for (uint32_t node = 0; node < n_nodes; node++) {
                ae_core_stats(simjob_core(job, node), &stats);
                cost.tables = AE_MAX(cost.tables, (double)stats.tables_len);
                cost.regions = AE_MAX(cost.regions, (double)stats.memory_len);
        }
        simjob_free(job);
        cost.s = (double)(ae_now_ns() - begin) / 1e9;
        return cost;
}

/* Memory is a fixed part and so much for each peer, whatever their number. */
static void check_linear(const char *what, uint32_t i, double first, double second, double before,
                         double now)
{
        double should = (second - first) / (sizes[1] - sizes[0]);
        double is = (now - before) / (sizes[i] - sizes[i - 1]);

        print_message("%6u nodes: %s take %.0f bytes and %.0f for each peer\n", sizes[i], what,
                      now - is * (sizes[i] - 1), is);
        if (is > should * (1 + MOST_BEND) || is < should * (1 - MOST_BEND))
                fail_msg("from %u to %u nodes %s take %.0f bytes for each more, from %u to %u %.0f",
                         sizes[i - 1], sizes[i], what, is, sizes[0], sizes[1], should);
}

static void check_msgs(uint32_t i, uint32_t units, const struct cost *cost,
                       const struct cost *first)
{
        if (cost->msgs > MOST_MSGS)
                fail_msg("%u nodes, %u units: %.2f messages per peer and step, at most %.0f",
                         sizes[i], units, cost->msgs, MOST_MSGS);
        if (cost->msgs > MOST_GROWTH * first->msgs)
                fail_msg("%u nodes, %u units: %.2f messages per peer and step, %.2f at %u nodes",
                         sizes[i], units, cost->msgs, first->msgs, sizes[0]);
        if (cost->msg_bytes > MOST_GROWTH * first->msg_bytes)
                fail_msg("%u nodes, %u units: %.0f bytes of messages per peer and step, %.0f at %u "
                         "nodes", sizes[i], units, cost->msg_bytes, first->msg_bytes, sizes[0]);
}

/* Messages per peer stay level: those of the whole cluster grow with the pairs, no faster. A daemon
 * has a slice of each unit here whatever the number of nodes, so the tensors, of which a cache and
 * sums take their share, grow with the nodes too. */
static void test_growth(void **state)
{
        static const uint32_t units[] = { 8, 16 };
        struct cost costs[SIZES_MAX];

        (void)state;
        for (uint32_t u = 0; u < AE_ARRAY_LEN(units); u++) {
                if (only_units && units[u] != only_units)
                        continue;
                print_message("%6s %6s %22s %8s %12s %12s %8s\n", "nodes", "units",
                              "msgs per peer and step", "bytes", "KiB tables", "MiB regions", "s");
                for (uint32_t i = 0; i < n_sizes; i++) {
                        costs[i] = measure(sizes[i], units[u]);
                        print_message("%6u %6u %22.2f %8.0f %12.1f %12.1f %8.1f\n", sizes[i],
                                      units[u], costs[i].msgs, costs[i].msg_bytes,
                                      costs[i].tables / 1024, costs[i].regions / AE_MIB,
                                      costs[i].s);
                        check_msgs(i, units[u], &costs[i], &costs[0]);
                        if (i == 0)
                                continue;
                        check_linear("tables", i, costs[0].tables, costs[1].tables,
                                     costs[i - 1].tables, costs[i].tables);
                        check_linear("regions", i, costs[0].regions, costs[1].regions,
                                     costs[i - 1].regions, costs[i].regions);
                }
        }
}

int main(int argc, char **argv)
{
        const struct CMUnitTest tests[] = { cmocka_unit_test(test_growth) };

        int i = 1;

        if (argc > 2 && strcmp(argv[1], "--units") == 0) {
                only_units = (uint32_t)strtoul(argv[2], NULL, 10);
                i = 3;
        }
        if (argc > i)
                n_sizes = 0;
        for (; i < argc && n_sizes < AE_ARRAY_LEN(sizes); i++)
                sizes[n_sizes++] = (uint32_t)strtoul(argv[i], NULL, 10);
        return cmocka_run_group_tests(tests, NULL, NULL);
}
