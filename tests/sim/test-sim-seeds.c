/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Jobs whose every choice comes from a seed: topology, model, order, delays, skipped and redone
 * rounds. None may hang, and all bits must be those of the reference. --seeds FIRST-LAST.
 */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/wire/wire.h"
#include "tests/lib/simjob.h"

#include <stdlib.h>
#include <string.h>

#define LIMIT_NS (UINT64_C(60) * 1000000000)

static unsigned long long first_seed, last_seed = 19;

/* @n_reads: NULL for a run without readers. */
static void run_seed(uint64_t seed, bool wild, uint32_t *n_verdicts, uint32_t *n_reads)
{
        struct simjob_params params;
        struct simjob *job;

        simjob_draw(seed, &params);
        if (!n_reads)
                params.n_readers = 0;
        params.wild &= wild;
        if (getenv("SIMJOB_VERBOSE"))
                fprintf(stderr, "seed %llu: %u nodes %u ranks\n", (unsigned long long)seed,
                        params.n_nodes, params.n_ranks);
        job = simjob_new(&params);
        simjob_run_to_end(job, LIMIT_NS);
        assert_true(simjob_step(job) == params.n_steps);
        for (uint32_t kind = 0; kind < 8; kind++)
                n_verdicts[kind] += simjob_n_verdicts(job, kind);
        if (n_reads)
                *n_reads += simjob_n_reads(job);
        simjob_free(job);
}

static void test_seeds(void **state)
{
        uint32_t n_verdicts[8] = { 0 };
        uint32_t n_reads = 0;

        (void)state;
        for (uint64_t seed = first_seed; seed <= last_seed; seed++)
                run_seed(seed, true, n_verdicts, &n_reads);
        print_message(
                "seeds %llu to %llu: %u applied, %u skipped, %u redone, %u puts, %u refused, "
                "%u reads\n",
                first_seed, last_seed, n_verdicts[AE_VERDICT_APPLIED],
                n_verdicts[AE_VERDICT_SKIPPED], n_verdicts[AE_VERDICT_REDO],
                n_verdicts[AE_VERDICT_PUT], n_verdicts[AE_VERDICT_REFUSED], n_reads);
        assert_true(n_verdicts[AE_VERDICT_APPLIED] > 0);
        assert_true(n_reads > 0 || last_seed - first_seed < 40);
}

/* Seeds that have failed once; most are older than readers and run as they did then. */
static void test_named_seeds(void **state)
{
        static const uint64_t seeds[] = {
                0, 42, /* a put that was called off while its bytes were still being sent */
                16, 21, 25, /* groups of one node filled the slots that a lower one needed */
                231, 1046, /* a get beside a put */
                540, /* a node voted before its last sum had found a NaN */
                873, /* a sum given up after END did not let the owner's parts go on */
                1296, /* a round that ran out of overflow memory was reported as a NaN */
        };
        static const uint64_t with_readers[] = {
                84, /* a reader was told twice that it had registered */
                627, /* what was left out before a piece that stays was not free */
                563, 659, /* a ring of two pieces stayed full, see test_smallest_ring() */
        };
        uint32_t n_verdicts[8] = { 0 };
        uint32_t n_reads = 0;

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(seeds); i++)
                run_seed(seeds[i], false, n_verdicts, NULL);
        for (size_t i = 0; i < AE_ARRAY_LEN(with_readers); i++)
                run_seed(with_readers[i], false, n_verdicts, &n_reads);
}

int main(int argc, char **argv)
{
        const struct CMUnitTest tests[] = { cmocka_unit_test(test_named_seeds),
                                             cmocka_unit_test(test_seeds) };

        if (argc == 3 && (strcmp(argv[1], "--seeds") != 0 ||
                          sscanf(argv[2], "%llu-%llu", &first_seed, &last_seed) != 2)) {
                fprintf(stderr, "usage: %s --seeds FIRST-LAST\n", argv[0]);
                return 2;
        }
        return cmocka_run_group_tests(tests, NULL, NULL);
}
