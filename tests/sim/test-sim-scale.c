/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a step costs as the cluster grows: control messages per peer and step, and memory per
 * daemon, at 10, 100 and more nodes with one worker each. Every unit is cut over all nodes, so that
 * everybody fetches from and sends to everybody; tensors are addresses alone. Arguments: the
 * numbers of nodes.
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
#define MOST_MSGS 32.0 /* per peer and step, design.md section 4, "Costs at scale" */

static uint32_t sizes[8] = { 10, 30, 100 };
static uint32_t n_sizes = 3;
static uint32_t only_units; /* 0: all */

struct cost {
        double msgs;          /* per peer and step, the first step left out */
        double memory_len;    /* largest of all daemons, without what tensors and their sums take */
        double s;             /* it took */
};

static uint64_t msgs_of(struct simjob *job, uint32_t n_nodes)
{
        struct ae_core_stats stats;
        uint64_t n = 0;

        for (uint32_t node = 0; node < n_nodes; node++) {
                ae_core_stats(simjob_core(job, node), &stats);
                n += stats.msgs_sent;
        }
        return n;
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
        uint64_t begin = ae_now_ns();
        struct simjob *job = simjob_new(&params);
        struct ae_core_stats stats;
        struct cost cost;
        uint32_t n_steps = n_nodes > 100 ? N_STEPS_MANY : N_STEPS;
        uint64_t n;

        run_until_step(job, 1);
        n = msgs_of(job, n_nodes);
        run_until_step(job, n_steps);
        n = msgs_of(job, n_nodes) - n;
        cost.msgs = (double)n / n_nodes / (n_nodes - 1) / (n_steps - 1);
        ae_core_stats(simjob_core(job, 0), &stats);
        cost.memory_len = (double)stats.memory_len;
        simjob_free(job);
        cost.s = (double)(ae_now_ns() - begin) / 1e9;
        return cost;
}

/* Messages per peer stay level: those of the whole cluster grow with the pairs, no faster. Memory
 * per daemon is what its tensors take, which grow with the nodes here, as do the inboxes. */
static void test_growth(void **state)
{
        static const uint32_t units[] = { 8, 16 };

        (void)state;
        print_message("%6s %6s %22s %16s %8s\n", "nodes", "units", "msgs per peer and step",
                      "MiB per daemon", "s");
        for (uint32_t u = 0; u < AE_ARRAY_LEN(units); u++) {
                struct cost first = { 0 };

                if (only_units && units[u] != only_units)
                        continue;
                for (uint32_t i = 0; i < n_sizes; i++) {
                        struct cost cost = measure(sizes[i], units[u]);

                        if (i == 0)
                                first = cost;
                        print_message("%6u %6u %22.2f %16.1f %8.1f\n", sizes[i], units[u],
                                      cost.msgs, cost.memory_len / (double)AE_MIB, cost.s);
                        if (cost.msgs > MOST_MSGS)
                                fail_msg(
                                        "%u nodes, %u units: %.2f control messages per peer and "
                                        "step, at most %.0f",
                                        sizes[i], units[u], cost.msgs, MOST_MSGS);
                        if (cost.msgs > 1.5 * first.msgs)
                                fail_msg(
                                        "%u nodes, %u units: %.2f messages per peer and step, "
                                        "%.2f at %u nodes",
                                        sizes[i], units[u], cost.msgs, first.msgs, sizes[0]);
                        if (cost.memory_len / first.memory_len > 1.2 * sizes[i] / sizes[0])
                                fail_msg(
                                        "%u nodes, %u units: %.0f bytes per daemon, %.0f at %u "
                                        "nodes",
                                        sizes[i], units[u], cost.memory_len, first.memory_len,
                                        sizes[0]);
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
