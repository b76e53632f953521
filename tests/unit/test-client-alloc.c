/* SPDX-License-Identifier: Apache-2.0 */
/* Opening and registering with each allocation failing in turn. */
#include "tests/lib/client-job.h"
#include "tests/lib/fault.h"
#include "tests/lib/test.h"

static int join_job(const struct fake_daemon *d, const struct job_model *m)
{
        struct autoep_options options = job_options(d, 0);
        autoep *h = NULL;
        int r = autoep_open(&options, &h);

        if (r == 0)
                r = autoep_register(h, &m->model, 10000);
        autoep_close(h);
        return r;
}

static void every_allocation_may_fail(void **state)
{
        static const uint8_t init[8 * JOB_BIG_N];
        struct job_model m;
        uint64_t n = 0;
        bool failed = true;

        (void)state;
        job_model_fill(&m);
        m.model.n_tensors = JOB_BIG;
        m.model.init = AUTOEP_INIT_ALL_EQUAL;
        for (uint32_t i = 0; i < JOB_BIG; i++)
                m.tensors[i].init = i == JOB_TIED || i == JOB_EXPERT ? NULL : init;
        while (failed) {
                struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
                int r;

                fault_alloc_arm(++n);
                r = join_job(d, &m);
                failed = fault_alloc_disarm();
                if (r != (failed ? AUTOEP_ENOMEM : 0))
                        fail_msg("allocation %u: %d %s", (unsigned)n, r, autoep_last_error());
                fake_daemon_stop(d);
        }
        assert_in_range(n, 30, 2000);
}

int main(void)
{
        const struct CMUnitTest tests[] = { cmocka_unit_test(every_allocation_may_fail) };

        return cmocka_run_group_tests_name("client-alloc", tests, NULL, NULL);
}
