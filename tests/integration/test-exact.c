/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The exact layer over topologies: nodes, workers (uneven too), expert groups, orders,
 * micro-batches, optimizers, clipping, transports. Without arguments a selection in which every
 * topology comes with every pair of the other choices somewhere; with "all-1" and "all-2" the
 * halves of the full product; with "few" what a sanitizer has time for.
 */
#include "tests/lib/exact.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "tests/lib/test.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WORKERS_MAX 3
#define NODES_MAX 4

/* The choices besides the topology, one bit each. */
enum { CHOICE_ACCUMULATE, CHOICE_ORDER, CHOICE_SGD, CHOICE_CLIP, N_CHOICES };

static bool all;
static uint32_t half; /* which of the uneven topologies */
static uint32_t n_runs;

/* The last reference; runs of one world that follow each other often share it. */
static struct exact_reference *reference;

static const struct exact_reference *reference_for(const struct exact_job *job)
{
        if (reference && memcmp(&reference->job, job, sizeof(*job)) == 0)
                return reference;
        exact_reference_free(reference);
        reference = exact_reference_new(job);
        return reference;
}

static uint32_t experts_for(uint32_t ep_size)
{
        return (uint32_t)(ae_div_up(4, ep_size) * ep_size);
}

static void describe(const struct exact_run *run)
{
        char shape[64] = "";

        for (uint32_t node = 0; node < run->cluster.n_nodes; node++)
                snprintf(shape + strlen(shape), sizeof(shape) - strlen(shape), " %u",
                         run->cluster.workers[node]);
        print_error(
                "in: workers%s, %s, ep_size %u, order %u, accumulate %u, %s, max_norm %g, slots "
                "%u\n",
                shape, run->cluster.transport, run->ep_size, run->order, run->job.accumulate,
                run->job.optimizer == AUTOEP_SGD ? "sgd" : "adamw", run->job.max_norm, run->slots);
}

static void run_choice(const struct cluster_spec *cluster, uint32_t ep_size, uint32_t choices)
{
        struct exact_run run = {
                .cluster = *cluster, .ep_size = ep_size,
                .order = choices >> CHOICE_ORDER & 1 ? AUTOEP_D_THEN_E : AUTOEP_E_THEN_D,
        };

        memset(&run.job, 0, sizeof(run.job)); /* compared as bytes */
        run.job.world = cluster_world(cluster);
        run.job.accumulate = choices >> CHOICE_ACCUMULATE & 1 ? 3 : 1;
        run.job.optimizer = choices >> CHOICE_SGD & 1 ? AUTOEP_SGD : AUTOEP_ADAMW;
        run.job.max_norm = choices >> CHOICE_CLIP & 1 ? 20.0 : 0;
        run.job.n_experts = experts_for(ep_size);
        run.job.seed = 1;
        run.cluster.transport = n_runs % 3 == 2 ? "tcp" : "shm";
        run.slots = n_runs % 2 ? 2 : 0;
        n_runs++;
        if (exact_run(&run, reference_for(&run.job), NULL) != 0) {
                describe(&run);
                fail();
        }
}

static void run_topology(const struct cluster_spec *cluster)
{
        const uint32_t world = cluster_world(cluster);
        /* Rows of an orthogonal array: any two columns hold all four pairs. */
        static const uint8_t rows[] = { 0x0, 0x9, 0xa, 0x3, 0xc, 0x5, 0x6, 0xf };
        static uint32_t row;

        for (uint32_t ep_size = 1; ep_size <= world; ep_size++) {
                if (world % ep_size != 0)
                        continue;
                for (uint32_t choices = 0; all && choices < 1u << N_CHOICES; choices++)
                        run_choice(cluster, ep_size, choices);
                if (!all)
                        run_choice(cluster, ep_size, rows[row++ % sizeof(rows)]);
        }
}

/* Counts of workers, node by node, as digits. */
static void next_shape(struct cluster_spec *cluster)
{
        for (uint32_t node = 0; node < cluster->n_nodes; node++) {
                if (++cluster->workers[node] <= WORKERS_MAX)
                        return;
                cluster->workers[node] = 1;
        }
        if (++cluster->n_nodes <= NODES_MAX)
                cluster->workers[cluster->n_nodes - 1] = 1;
}

static bool is_even(const struct cluster_spec *cluster)
{
        for (uint32_t node = 1; node < cluster->n_nodes; node++) {
                if (cluster->workers[node] != cluster->workers[0])
                        return false;
        }
        return true;
}

static void test_even_topologies(void **state)
{
        struct cluster_spec cluster = { .n_nodes = 1, .workers = { 1 } };

        (void)state;
        for (; cluster.n_nodes <= NODES_MAX; next_shape(&cluster)) {
                if (is_even(&cluster))
                        run_topology(&cluster);
        }
}

static void test_uneven_topologies(void **state)
{
        struct cluster_spec cluster = { .n_nodes = 1, .workers = { 1 } };
        uint32_t i = 0;

        (void)state;
        for (; cluster.n_nodes <= NODES_MAX; next_shape(&cluster)) {
                if (!is_even(&cluster) && (all ? i % 2 == half : i % 9 == 4))
                        run_topology(&cluster);
                i += !is_even(&cluster);
        }
}

static void test_momentum(void **state)
{
        const struct exact_job job = { .world = 3, .accumulate = 2, .optimizer = AUTOEP_SGD,
                                       .momentum = 0.5, .n_experts = 3, .seed = 3 };
        const struct exact_run run = { .cluster = { .n_nodes = 2, .workers = { 2, 1 } },
                                       .job = job, .ep_size = 3 };

        (void)state;
        assert_int_equal(exact_run(&run, reference_for(&job), NULL), 0);
}

/* Sums of groups that travel as bf16: each is rounded once, to nearest even, wherever its owner is;
 * one group alone isn't. */
static void check_bf16(size_t n_cases)
{
        static const struct {
                struct cluster_spec cluster;
                uint32_t group, accumulate, slots, optimizer;
                double max_norm;
        } cases[] = {
                { { .n_nodes = 2, .workers = { 1, 3 } }, 1, 2, 2, AUTOEP_ADAMW, 20 },
                { { .n_nodes = 1, .workers = { 4 } }, 2, 2, 0, AUTOEP_SGD, 0 },
                { { .n_nodes = 2, .workers = { 2, 2 } }, 2, 3, 0, AUTOEP_ADAMW, 20 },
                { { .n_nodes = 3, .workers = { 2, 2, 2 }, .transport = "tcp" },
                  2, 1, 2, AUTOEP_SGD, 20 },
                { { .n_nodes = 4, .workers = { 1, 1, 1, 1 } }, 1, 1, 0, AUTOEP_ADAMW, 0 },
                { { .n_nodes = 1, .workers = { 4 } }, 4, 2, 0, AUTOEP_ADAMW, 20 },
        };

        assert_true(n_cases <= AE_ARRAY_LEN(cases));
        for (size_t i = 0; i < n_cases; i++) {
                struct exact_run run = { .cluster = cases[i].cluster, .ep_size = 2,
                                         .slots = cases[i].slots };
                const uint32_t world = cluster_world(&run.cluster);
                const struct exact_reference *ref;

                memset(&run.job, 0, sizeof(run.job)); /* compared as bytes */
                run.job.world = world;
                run.job.accumulate = cases[i].accumulate;
                run.job.optimizer = cases[i].optimizer;
                run.job.max_norm = cases[i].max_norm;
                run.job.n_experts = 4;
                run.job.bf16_group = cases[i].group;
                run.job.seed = 5;
                ref = reference_for(&run.job);
                assert_int_equal(ref->n_rounded > 100000, cases[i].group < world);
                assert_int_equal(ref->n_halfway > 100, cases[i].group < world);
                if (exact_run(&run, ref, NULL) != 0) {
                        describe(&run);
                        fail();
                }
        }
}

static void test_bf16_wire(void **state)
{
        (void)state;
        check_bf16(6);
}

static void test_bf16_wire_once(void **state)
{
        (void)state;
        check_bf16(1);
}

/* An Inf in one expert of one rank: the round is skipped everywhere, with no bit changed in any
 * daemon or worker, and what comes after it is what would have come without it. */
static void test_bad_expert(void **state)
{
        static const struct exact_run runs[] = {
                { .cluster = { .n_nodes = 2, .workers = { 2, 2 }, .transport = "tcp" },
                  .ep_size = 2, .bad = true, .bad_step = 1, .bad_rank = 3 },
                { .cluster = { .n_nodes = 2, .workers = { 1, 3 } },
                  .ep_size = 2, .order = AUTOEP_D_THEN_E, .bad = true, .bad_step = 2 },
                { .cluster = { .n_nodes = 2, .workers = { 2, 2 } },
                  .ep_size = 4, .bad = true, .bad_rank = 1 },
        };

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(runs); i++) {
                struct exact_run run = runs[i];

                memset(&run.job, 0, sizeof(run.job)); /* compared as bytes */
                run.job.world = 4;
                run.job.accumulate = 2;
                run.job.optimizer = AUTOEP_ADAMW;
                run.job.max_norm = 20;
                run.job.n_experts = 4;
                run.job.seed = 5;
                assert_int_equal(exact_run(&run, reference_for(&run.job), NULL), 0);
        }
}

/* Where ranks of two jobs wait for each other, in order: each rank says that it is there. */
struct meeting {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        uint32_t n_begun;         /* ranks of both jobs that begin */
        uint32_t n_lost;          /* ranks of the failing one that have heard */
        uint32_t n_late;          /* waits that were in vain */
};

static void await(struct meeting *meeting, const uint32_t *count, uint32_t least)
{
        struct timespec until;

        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += CLUSTER_TIMEOUT_MS / 1000;
        while (*count < least) {
                if (pthread_cond_timedwait(&meeting->changed, &meeting->lock, &until) != 0) {
                        meeting->n_late++;
                        return;
                }
        }
}

/* Adds a rank to @count, if there is one, and waits until @least are there. */
static void meet(struct meeting *meeting, uint32_t *count, const uint32_t *awaited, uint32_t least)
{
        pthread_mutex_lock(&meeting->lock);
        if (count) {
                (*count)++;
                pthread_cond_broadcast(&meeting->changed);
        }
        await(meeting, awaited, least);
        pthread_mutex_unlock(&meeting->lock);
}

static void at_failing(void *arg, uint32_t step)
{
        struct meeting *meeting = arg;

        if (step == 0)
                meet(meeting, &meeting->n_begun, &meeting->n_begun, 7);
        if (step == EXACT_STEPS)
                meet(meeting, &meeting->n_lost, &meeting->n_lost, 0);
}

/* Has two steps beside the other job's rounds and one after its end. */
static void at_lasting(void *arg, uint32_t step)
{
        struct meeting *meeting = arg;

        if (step == 0)
                meet(meeting, &meeting->n_begun, &meeting->n_begun, 7);
        if (step == 2)
                meet(meeting, NULL, &meeting->n_lost, 3);
}

/* Two jobs of other shapes, optimizers, placements and numbers on the same daemons: one has a round
 * that is skipped and then fails, and both are equal to their references in every bit. */
static void test_two_jobs(void **state)
{
        struct meeting meeting = { .lock = PTHREAD_MUTEX_INITIALIZER,
                                   .changed = PTHREAD_COND_INITIALIZER };
        const struct exact_job jobs[2] = {
                { .world = 3, .accumulate = 3, .optimizer = AUTOEP_SGD, .momentum = 0.5,
                  .n_experts = 6, .seed = 7 },
                { .world = 4, .accumulate = 1, .optimizer = AUTOEP_ADAMW, .max_norm = 20,
                  .n_experts = 4, .seed = 21 },
        };
        const struct exact_run runs[2] = {
                { .cluster = { .n_nodes = 2, .workers = { 1, 2 }, .threads = 2 }, .job = jobs[0],
                  .ep_size = 3, .slots = 2, .bad = true, .bad_step = 1, .bad_rank = 2,
                  .lost = true, .at = at_failing, .arg = &meeting },
                { .cluster = { .n_nodes = 2, .workers = { 3, 1 } }, .job = jobs[1], .ep_size = 2,
                  .at = at_lasting, .arg = &meeting },
        };
        struct exact_reference *references[2];

        (void)state;
        for (int i = 0; i < 2; i++)
                references[i] = exact_reference_new(&jobs[i]);
        assert_int_equal(exact_run_both(runs, references), 0);
        assert_int_equal(meeting.n_late, 0);
        for (int i = 0; i < 2; i++)
                exact_reference_free(references[i]);
}

/* One node and several, even and not, with several sizes of expert groups each. */
static void test_few_topologies(void **state)
{
        static const struct cluster_spec few[] = {
                { .n_nodes = 1, .workers = { 2 } },
                { .n_nodes = 2, .workers = { 1, 3 } },
                { .n_nodes = 4, .workers = { 1, 1, 1, 1 } },
        };

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(few); i++)
                run_topology(&few[i]);
}

/* A cluster of threads starts, takes three steps and stops in a moment: the median of five. */
static int compare_ns(const void *a, const void *b)
{
        const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

        return x < y ? -1 : x > y;
}

static void test_time(void **state)
{
        const struct exact_job job = { .world = 4, .accumulate = 1, .optimizer = AUTOEP_ADAMW,
                                       .n_experts = 4, .seed = 3 };
        const struct exact_run run = { .cluster = { .n_nodes = 2, .workers = { 2, 2 } },
                                       .job = job, .ep_size = 2 };
        uint64_t took[5];

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(took); i++) {
                const uint64_t begin = ae_now_ns();

                assert_int_equal(exact_run(&run, reference_for(&job), NULL), 0);
                took[i] = ae_now_ns() - begin;
        }
        qsort(took, AE_ARRAY_LEN(took), sizeof(took[0]), compare_ns);
        print_message("a 2x2 cluster with three steps takes %.1f ms\n", (double)took[2] / 1e6);
}

static int free_reference(void **state)
{
        (void)state;
        reference = exact_reference_free(reference);
        return 0;
}

int main(int argc, char **argv)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_time),
                cmocka_unit_test(test_momentum),
                cmocka_unit_test(test_bf16_wire),
                cmocka_unit_test(test_bad_expert),
                cmocka_unit_test(test_two_jobs),
                cmocka_unit_test(test_even_topologies),
                cmocka_unit_test(test_uneven_topologies),
        };

        const struct CMUnitTest second[] = {
                cmocka_unit_test(test_uneven_topologies),
        };
        const struct CMUnitTest few[] = {
                cmocka_unit_test(test_momentum),
                cmocka_unit_test(test_bf16_wire_once),
                cmocka_unit_test(test_bad_expert),
                cmocka_unit_test(test_two_jobs),
                cmocka_unit_test(test_few_topologies),
        };

        all = argc > 1 && strncmp(argv[1], "all", 3) == 0;
        half = all && strcmp(argv[1], "all-2") == 0;
        if (argc > 1 && strcmp(argv[1], "few") == 0)
                return cmocka_run_group_tests(few, NULL, free_reference);
        if (half == 1)
                return cmocka_run_group_tests(second, NULL, free_reference);
        return cmocka_run_group_tests(tests, NULL, free_reference);
}
