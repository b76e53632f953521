/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What goes wrong in a job, from seeds: nodes and workers that die, nodes that are cut off, links
 * that lose packets. Every worker that waits must hear of it in bounded virtual time, and by name;
 * nothing may stay behind. And what is no fault: rounds redone, skipped, refused, puts in between.
 */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/wire.h"
#include "tests/lib/simjob.h"

#include <string.h>

#define MS UINT64_C(1000000)
#define CUT_NS (500 * MS)
#define N_SEEDS 12

/* A job in the middle of its work, and a delay of chance. */
static struct simjob *begin(uint64_t seed, uint32_t loss_ppm)
{
        struct simjob_params params;
        struct simjob *job;

        simjob_draw(seed, &params);
        params.n_ranks = params.n_nodes;
        params.n_steps = 1000000;
        params.may_fail = true;
        params.net.cut_ns = CUT_NS;
        params.net.loss_ppm = loss_ppm;
        job = simjob_new(&params);
        for (int i = 0; i < 2000 && !simjob_live_ns(job) && !loss_ppm; i++)
                (void)simjob_run(job, MS);
        if (!loss_ppm)
                assert_true(simjob_live_ns(job) > 0);
        (void)simjob_run(job, ae_sim_random(simjob_sim(job)) % (40 * MS));
        return job;
}

/* Every rank but those that we killed has failed by @until_ns, in words that say @name. */
static void check_ends(struct simjob *job, uint32_t n_ranks, uint32_t except_node,
                       uint64_t until_ns, const char *name)
{
        struct simjob_end end;

        for (uint32_t rank = 0; rank < n_ranks; rank++) {
                simjob_end(job, rank, &end);
                assert_true(end.ended);
                if (end.killed || simjob_rank_node(job, rank) == except_node)
                        continue;
                assert_true(end.failed);
                if (end.status != AE_ELOST || end.at_ns > until_ns || !strstr(end.why, name))
                        fail_msg(
                                "rank %u ended at %llu ms (limit %llu) with %d: '%s', not with "
                                "'%s'",
                                rank, (unsigned long long)(end.at_ns / MS),
                                (unsigned long long)(until_ns / MS), end.status, end.why, name);
        }
}

static uint32_t n_nodes_of(uint64_t seed)
{
        struct simjob_params params;

        simjob_draw(seed, &params);
        return params.n_nodes;
}

static void test_killed_node(void **state)
{
        (void)state;
        for (uint64_t seed = 0; seed < N_SEEDS; seed++) {
                struct simjob *job = begin(seed, 0);
                uint32_t n = n_nodes_of(seed);
                uint32_t node = seed % 4 == 0 ? 0 : (uint32_t)(ae_sim_random(simjob_sim(job)) % n);
                uint64_t now = ae_sim_now(simjob_sim(job));
                char name[48];

                (void)snprintf(name, sizeof(name), "node %u was lost in round", node);
                simjob_kill_node(job, node);
                simjob_run_to_end(job, 1000 * MS);
                check_ends(job, n, AE_WIRE_NONE, now + 200 * MS, name);
                simjob_free(job);
        }
}

static void test_killed_worker(void **state)
{
        (void)state;
        for (uint64_t seed = 100; seed < 100 + N_SEEDS; seed++) {
                struct simjob *job = begin(seed, 0);
                uint32_t n = n_nodes_of(seed);
                uint32_t rank = (uint32_t)(ae_sim_random(simjob_sim(job)) % n);
                uint64_t now = ae_sim_now(simjob_sim(job));
                char name[48];

                (void)snprintf(name, sizeof(name), "rank %u (pid %u, node %u) was lost", rank,
                               5000 + rank, simjob_rank_node(job, rank));
                simjob_kill_worker(job, rank);
                simjob_run_to_end(job, 1000 * MS);
                check_ends(job, n, AE_WIRE_NONE, now + 200 * MS, name);
                simjob_free(job);
        }
}

/* The node hears of nobody and nobody of it: both sides notice when their connections time out. */
static void test_partition(void **state)
{
        (void)state;
        for (uint64_t seed = 200; seed < 200 + N_SEEDS; seed++) {
                struct simjob *job = begin(seed, 0);
                uint32_t n = n_nodes_of(seed);
                uint32_t node = seed % 4 == 0 ? 0 : (uint32_t)(ae_sim_random(simjob_sim(job)) % n);
                uint64_t now = ae_sim_now(simjob_sim(job));
                char name[48];

                (void)snprintf(name, sizeof(name), "node %u was lost in round", node);
                ae_sim_place(simjob_net(job, node), 1);
                simjob_run_to_end(job, 2000 * MS);
                check_ends(job, n, node, now + CUT_NS + 200 * MS, name);
                simjob_free(job);
        }
}

/* A partition that heals before connections time out costs nothing but time. */
static void test_healed(void **state)
{
        (void)state;
        for (uint64_t seed = 300; seed < 300 + N_SEEDS; seed++) {
                struct simjob_params params;
                struct simjob *job;

                simjob_draw(seed, &params);
                job = simjob_new(&params);
                while (!simjob_live_ns(job))
                        (void)simjob_run(job, MS);
                (void)simjob_run(job, ae_sim_random(simjob_sim(job)) % (10 * MS));
                ae_sim_place(simjob_net(job, params.n_nodes / 2), 1);
                (void)simjob_run(job, 300 * MS);
                ae_sim_place(simjob_net(job, params.n_nodes / 2), 0);
                simjob_run_to_end(job, 60000 * MS);
                assert_int_equal(simjob_step(job), params.n_steps);
                simjob_free(job);
        }
}

/* A rank in other collectives than the others: nobody waits for ever, all hear what differs. */
static void test_misorder(void **state)
{
        (void)state;
        for (uint64_t seed = 350; seed < 350 + N_SEEDS; seed++) {
                struct simjob_params params;
                struct simjob *job;
                struct simjob_end end;
                char name[48];

                simjob_draw(seed, &params);
                params.n_ranks = params.n_nodes;
                params.n_steps = 1000000;
                params.exchange = params.misorder = params.may_fail = true;
                job = simjob_new(&params);
                (void)snprintf(name, sizeof(name), "rank %u ", simjob_misordered(job));
                simjob_run_to_end(job, 1000 * MS);
                for (uint32_t rank = 0; rank < params.n_ranks; rank++) {
                        simjob_end(job, rank, &end);
                        assert_true(end.ended && end.failed);
                        if (end.status != AE_EMISMATCH || !strstr(end.why, name) ||
                            !strstr(end.why, "all must call in the same order"))
                                fail_msg("rank %u ended with %d: '%s', not with '%s'", rank,
                                         end.status, end.why, name);
                }
                simjob_free(job);
        }
}

/* Links that break now and then, from the first handshake on. */
static void test_loss(void **state)
{
        uint32_t n_failed = 0;

        (void)state;
        for (uint64_t seed = 400; seed < 400 + N_SEEDS; seed++) {
                struct simjob *job = begin(seed, 20);
                struct simjob_end end;

                (void)simjob_run(job, 2000 * MS);
                for (uint32_t rank = 0; rank < n_nodes_of(seed); rank++) {
                        simjob_end(job, rank, &end);
                        if (!end.ended)
                                continue;
                        n_failed++;
                        if (end.status != AE_ELOST ||
                            (!strstr(end.why, "node ") && !strstr(end.why, "rank ")))
                                fail_msg("rank %u ended with %d: '%s'", rank, end.status, end.why);
                }
                simjob_free(job);
        }
        assert_true(n_failed > 0);
}

/* Jobs with one kind of unusual rounds alone; how many verdicts of @kind they saw. */
static uint32_t run_kind(uint64_t first_seed, uint32_t kind)
{
        uint32_t n = 0;

        for (uint64_t seed = first_seed; seed < first_seed + N_SEEDS; seed++) {
                struct simjob_params params;
                struct simjob *job;

                simjob_draw(seed, &params);
                params.n_steps = 5;
                params.tight_overflow = false;
                params.redo = kind == AE_VERDICT_REDO;
                params.nan = kind == AE_VERDICT_SKIPPED;
                params.refuse = kind == AE_VERDICT_REFUSED;
                params.puts = kind == AE_VERDICT_PUT;
                job = simjob_new(&params);
                simjob_run_to_end(job, 60000 * MS);
                assert_int_equal(simjob_step(job), params.n_steps);
                n += simjob_n_verdicts(job, kind) -
                     (kind == AE_VERDICT_PUT); /* the initial values */
                simjob_free(job);
        }
        return n;
}

static void test_redo(void **state)
{
        (void)state;
        assert_true(run_kind(500, AE_VERDICT_REDO) > N_SEEDS);
}

static void test_skip(void **state)
{
        (void)state;
        assert_true(run_kind(600, AE_VERDICT_SKIPPED) > N_SEEDS / 2);
}

static void test_refuse(void **state)
{
        (void)state;
        assert_true(run_kind(700, AE_VERDICT_REFUSED) > N_SEEDS / 2);
}

static void test_put(void **state)
{
        (void)state;
        assert_true(run_kind(800, AE_VERDICT_PUT) > N_SEEDS / 2);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_killed_node), cmocka_unit_test(test_killed_worker),
                cmocka_unit_test(test_partition),   cmocka_unit_test(test_healed),
                cmocka_unit_test(test_loss),        cmocka_unit_test(test_misorder),
                       cmocka_unit_test(test_redo),
                cmocka_unit_test(test_skip),        cmocka_unit_test(test_refuse),
                cmocka_unit_test(test_put),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
