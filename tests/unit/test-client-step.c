/* SPDX-License-Identifier: Apache-2.0 */
/* Step requests and verdicts, pauses, get and put, against a fake daemon. */
#include "tests/lib/client-job.h"
#include "tests/lib/test.h"

#include "proto/base/num.h"

#include <math.h>
#include <string.h>

static int setup(void **state)
{
        *state = fake_daemon_start(&(struct fake_config){ .world = 1 });
        return 0;
}

static int teardown(void **state)
{
        fake_daemon_stop(*state);
        return 0;
}

/* ---- the request ------------------------------------------------------------------------ */

static void a_request_arrives_whole(void **state)
{
        struct fake_daemon *d = *state;
        const struct ae_local_step *got = &d->workers[0].step;
        static const uint64_t counts[4] = { 5, 0, 7, 1 };
        struct autoep_step step = job_step();
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;
        autoep *h = job_join(d);

        step.flags = AUTOEP_USE_TOKENS;
        step.tokens = 4096;
        step.balance_rate = 0.001;
        step.counts = counts;
        step.n_counts = 4;
        assert_int_equal(autoep_norm2_add(&step.expert_norm2, 0.5), 0);
        assert_int_equal(autoep_norm2_add(&step.expert_norm2, 2), 0);
        step.expert_nonfinite = "layer.expert";
        assert_int_equal(autoep_micro_batch_end(h), 0);
        assert_int_equal(autoep_micro_batch_end(h), 0);
        assert_int_equal(autoep_step(h, &step, 5000, &v), 0);
        fake_sync(d);
        assert_int_equal(got->round, 1);
        assert_int_equal(got->tokens, 4096);
        assert_int_equal(got->micro_batches, 2);
        assert_true(ae_longacc_round(&got->expert_norm2) == 2.5);
        assert_int_equal(got->bad_expert, 1);
        assert_string_equal(got->bad_text, "layer.expert");
        assert_int_equal(got->n_counts, 4);
        assert_memory_equal(got->counts, counts, sizeof(counts));
        assert_int_equal(got->redo, 0);
        assert_int_equal(got->ask.use_tokens, 1);
        assert_true(got->ask.scale == 0);
        assert_true(got->ask.max_norm == 1.5);
        assert_true(got->ask.hyper[0].beta2 == 0.999);
        assert_int_equal(v.kind, AUTOEP_APPLIED);
        assert_int_equal(v.version, 1);
        assert_int_equal(v.round, 2);
        assert_int_equal(v.epoch, 1);
        assert_int_equal(v.tokens, 4096);
        assert_int_equal(v.n_groups, 1);
        assert_true(v.hyper[0].weight_decay == 0.1);
        assert_true(v.norm == 2 && v.clip == 0.5 && v.scale == 0.25 && v.grad_scale == 0.125);
        assert_int_equal(v.bad_unit, AUTOEP_NONE);
        autoep_close(h);
}

static void wrong_requests_are_refused(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_hyper hyper[2] = { { .lr = NAN }, { .lr = 1 } };
        static const uint64_t counts[4] = { 0, 1, AE_WIRE_COUNT_MAX + 1, 0 };
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;
        struct autoep_step good = job_step();
        struct autoep_step step = good;
        autoep *h = job_join(d);

        step.hyper = hyper;
        assert_int_equal(autoep_step(h, &step, 100, &v), AUTOEP_EINVAL);
        job_assert_error_names("lr of optimizer group 0");
        step = good;
        step.n_groups = 0;
        assert_int_equal(autoep_step(h, &step, 100, &v), AUTOEP_EINVAL);
        step.n_groups = 33;
        assert_int_equal(autoep_step(h, &step, 100, &v), AUTOEP_EINVAL);
        step = good;
        step.absent_groups = 2;
        assert_int_equal(autoep_step(h, &step, 100, &v), AUTOEP_EINVAL);
        step = good;
        step.balance_rate = 0.1; /* without counts */
        assert_int_equal(autoep_step(h, &step, 100, &v), AUTOEP_EINVAL);
        step = good;
        step.tokens = UINT64_MAX;
        assert_int_equal(autoep_step(h, &step, 100, &v), AUTOEP_EINVAL);
        job_assert_error_names("tokens is 18446744073709551615, the limit is 140737488355328");
        step = good;
        step.counts = counts;
        step.n_counts = 4;
        assert_int_equal(autoep_step(h, &step, 100, &v), AUTOEP_EINVAL);
        job_assert_error_names("counts[2] is 140737488355329 tokens");
        step = good;
        step.max_norm = -1;
        assert_int_equal(autoep_step(h, &step, 100, &v), AUTOEP_EINVAL);
        step = good;
        memset(&step.expert_norm2, 0xee, sizeof(step.expert_norm2));
        assert_int_equal(autoep_step(h, &step, 100, &v), AUTOEP_EINVAL);
        job_assert_error_names("autoep_norm2_add");
        step = good;
        step.flags = 64;
        assert_int_equal(autoep_step(h, &step, 100, &v), AUTOEP_EINVAL);
        step = good;
        step.size = 1;
        assert_int_equal(autoep_step(h, &step, 100, &v), AUTOEP_EINVAL);
        assert_int_equal(autoep_step(h, &good, 100, NULL), AUTOEP_EINVAL);
        assert_int_equal(autoep_step(h, NULL, 100, &v), AUTOEP_EINVAL);
        v.size = 1;
        assert_int_equal(autoep_step(h, &good, 100, &v), AUTOEP_EINVAL);
        assert_int_equal(atomic_load(&d->workers[0].page->sq_tail), 0);
        autoep_close(h);
}

static void only_squares_are_added(void **state)
{
        static const double wrong[] = { -1, NAN, INFINITY, 0x1p-299, 1e-100, 0x1p320 };
        struct autoep_norm2 sum = { { 0 } }, again = { { 0 } }, before;

        (void)state;
        assert_int_equal(autoep_norm2_add(&sum, 0x1p-298), 0);
        assert_int_equal(autoep_norm2_add(&sum, 0x1p200), 0);
        assert_int_equal(autoep_norm2_add(&again, 0x1p200), 0);
        assert_int_equal(autoep_norm2_add(&again, 0x1p-298), 0);
        assert_memory_equal(&sum, &again, sizeof(sum));
        assert_int_equal(sum.limb[0], 1);
        before = sum;
        for (size_t i = 0; i < AE_ARRAY_LEN(wrong); i++) {
                assert_int_equal(autoep_norm2_add(&sum, wrong[i]), AUTOEP_EINVAL);
                job_assert_error_names("squares of fp32");
        }
        assert_memory_equal(&sum, &before, sizeof(sum));
        assert_int_equal(autoep_norm2_add(NULL, 1), AUTOEP_EINVAL);
        memset(&sum, 0xee, sizeof(sum));
        assert_int_equal(autoep_norm2_add(&sum, 1), AUTOEP_EINVAL);
        job_assert_error_names("zero it");
}

/* ---- verdicts --------------------------------------------------------------------------- */

static int step_once(autoep *h, struct autoep_verdict *v)
{
        struct autoep_step step = job_step();

        return autoep_step(h, &step, 5000, v);
}

static void a_skipped_round_names_the_gradient(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;
        autoep *h = job_join(d);

        fake_set_verdict(d, AE_VERDICT_SKIPPED,
                         &(struct ae_wire_bad){ .found = 1, .rank = 3, .unit = JOB_UNIT_LAYER,
                                                .tensor = JOB_NORM, .text = "NaN" });
        assert_int_equal(step_once(h, &v), 0);
        assert_int_equal(v.kind, AUTOEP_SKIPPED);
        assert_int_equal(v.version, 0);
        assert_int_equal(v.round, 2);
        assert_int_equal(v.bad_unit, JOB_UNIT_LAYER);
        assert_int_equal(v.bad_tensor, JOB_NORM);
        assert_int_equal(v.bad_rank, 3);
        assert_string_equal(v.why, "NaN");
        fake_set_verdict(d, AE_VERDICT_REDO, NULL);
        assert_int_equal(step_once(h, &v), 0);
        assert_int_equal(v.kind, AUTOEP_REDO);
        autoep_close(h);
}

static void stop_makes_an_error_of_it(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;
        struct job_model m;
        autoep *h = job_open(d, 0);

        job_model_fill(&m);
        m.model.nonfinite = AUTOEP_NONFINITE_STOP;
        assert_int_equal(autoep_register(h, &m.model, 5000), 0);
        fake_set_verdict(d, AE_VERDICT_SKIPPED,
                         &(struct ae_wire_bad){ .found = 1, .rank = 3, .unit = JOB_UNIT_LAYER,
                                                .tensor = JOB_NORM });
        assert_int_equal(step_once(h, &v), AUTOEP_ENONFINITE);
        job_assert_error_names("rank 3");
        job_assert_error_names("'layer.norm' (2) of unit 'layer' (1)");
        assert_int_equal(v.kind, 0); /* untouched */
        autoep_close(h);
}

/* As the decider counts groups; a step that it would refuse is an error of the caller's here. */
static void groups_of_experts_count(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;
        struct job_model m;
        autoep *h = job_open(d, 0);

        job_model_fill(&m);
        m.tensors[JOB_EXPERT].group = 1;
        assert_int_equal(autoep_register(h, &m.model, 5000), 0);
        assert_int_equal(step_once(h, &v), AUTOEP_EINVAL);
        job_assert_error_names("hyper-parameters of 1 optimizer groups, but the model's tensors "
                               "name 2");
        autoep_close(h);
}

static void a_refused_request_may_be_repeated(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;
        autoep *h = job_join(d);

        assert_int_equal(autoep_micro_batch_end(h), 0);
        fake_set_verdict(d, AE_VERDICT_REFUSED,
                         &(struct ae_wire_bad){ .text = "rank 2 asks for lr 0.1, rank 0 for 0.2" });
        assert_int_equal(step_once(h, &v), AUTOEP_EMISMATCH);
        job_assert_error_names("rank 2 asks for lr 0.1, rank 0 for 0.2");
        assert_int_equal(step_once(h, &v), 0);
        fake_sync(d);
        assert_int_equal(d->workers[0].step.round, 2);
        assert_int_equal(v.round, 3);
        assert_int_equal(v.micro_batches, 1); /* not lost, and not counted twice */
        autoep_close(h);
}

static void a_put_in_between_is_not_a_verdict(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;
        autoep *h = job_join(d);

        fake_set_verdict(d, AE_VERDICT_PUT, NULL);
        assert_int_equal(step_once(h, &v), 0);
        assert_int_equal(v.kind, AUTOEP_APPLIED);
        assert_int_equal(v.round, 3);
        autoep_close(h);
}

static void lies_in_verdicts_are_found(void **state)
{
        static const enum fake_lie lies[] = { FAKE_VERDICT_ROUND, FAKE_VERDICT_KIND };

        (void)state;
        for (size_t i = 0; i < 2; i++) {
                struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .lie = lies[i] });
                struct autoep_verdict v = AUTOEP_VERDICT_INIT;
                autoep *h = job_join(d);

                assert_int_equal(step_once(h, &v), AUTOEP_EPROTO);
                assert_int_equal(v.kind, 0);
                autoep_close(h);
                fake_daemon_stop(d);
        }
}

/* ---- time ------------------------------------------------------------------------------- */

static void a_step_in_time_out_is_taken_up_again(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_step step = job_step();
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;
        autoep *h = job_join(d);
        uint64_t start = job_now_ms();

        fake_set_holds(d, FAKE_HOLD_STEP);
        ae_local_text_set(&d->params->waiting, "rank 5 on node 1 has not asked for the step");
        assert_int_equal(autoep_step(h, &step, 50, &v), AUTOEP_ETIMEDOUT);
        job_assert_took(job_now_ms() - start, 50);
        job_assert_error_names("rank 5 on node 1 has not asked for the step");
        job_assert_error_names("round 1");
        assert_int_equal(autoep_micro_batch_end(h), AUTOEP_ESTATE);
        assert_int_equal(autoep_step(h, &step, 0, &v), AUTOEP_ETIMEDOUT);
        fake_set_holds(d, 0);
        assert_int_equal(autoep_step(h, &step, 5000, &v), 0);
        assert_int_equal(v.round, 2);
        fake_sync(d);
        assert_int_equal(d->workers[0].n_log, 1); /* asked once */
        autoep_close(h);
}

static void a_pause_is_said(void **state)
{
        struct fake_daemon *d = *state;
        autoep *h = job_join(d);
        uint64_t start;

        assert_int_equal(autoep_pause(h, "checkpoint", 30), 0);
        assert_int_equal(autoep_pause(h, "", 30), AUTOEP_EINVAL);
        assert_int_equal(autoep_pause(h, "x", 0), AUTOEP_EINVAL);
        start = job_now_ms();
        fake_set_holds(d, FAKE_HOLD_STATE);
        assert_int_equal(autoep_leave(h, 50), AUTOEP_ETIMEDOUT);
        job_assert_took(job_now_ms() - start, 50);
        autoep_close(h);
}

/* ---- state ------------------------------------------------------------------------------ */

static void get_brings_a_range(void **state)
{
        struct fake_daemon *d = *state;
        float values[5] = { 0 };
        autoep *h = job_join(d);

        assert_int_equal(autoep_get(h, JOB_W, AUTOEP_MOMENT2, 10, 5, values, 5000), 0);
        for (int i = 0; i < 5; i++)
                assert_true(values[i] == 1000 * JOB_W + 10 * AUTOEP_MOMENT2 + 10 + i);
        assert_int_equal(autoep_get(h, JOB_TIED, AUTOEP_MASTER, 0, 1, values, 5000), 0);
        /* an alias's state is its home's */
        assert_true(values[0] == 1000 * JOB_EMBED + 10 * AUTOEP_MASTER);
        assert_int_equal(autoep_get(h, JOB_W, AUTOEP_MASTER, 1000, 0, NULL, 5000), 0);
        assert_int_equal(autoep_get(h, JOB_W, AUTOEP_MASTER, 999, 2, values, 5000), AUTOEP_EINVAL);
        assert_int_equal(autoep_get(h, JOB_W, 6, 0, 1, values, 5000), AUTOEP_EINVAL);
        assert_int_equal(autoep_get(h, JOB_FROZEN, AUTOEP_MASTER, 0, 1, values, 5000),
                         AUTOEP_EINVAL);
        assert_int_equal(autoep_get(h, JOB_EXPERT, AUTOEP_WEIGHT, 0, 1, values, 5000),
                         AUTOEP_EINVAL);
        assert_int_equal(autoep_get(h, 99, AUTOEP_WEIGHT, 0, 1, values, 5000), AUTOEP_ENOENT);
        fake_set_state_status(d, AUTOEP_ELOST);
        assert_int_equal(autoep_get(h, JOB_W, AUTOEP_MASTER, 0, 1, values, 5000), AUTOEP_ELOST);
        job_assert_error_names("'layer.w' in round 1: node 1 has no such state");
        autoep_close(h);
}

static void late_answers_are_dropped(void **state)
{
        struct fake_daemon *d = *state;
        static const struct ae_control_frame late = { .len = 2, .type = AE_CONTROL_DONE };
        static const uint8_t body[2] = { 0x08, 0x01 }; /* id 1 */
        float value = 0;
        autoep *h = job_join(d);

        fake_set_holds(d, FAKE_HOLD_STATE);
        assert_int_equal(autoep_get(h, JOB_W, AUTOEP_MASTER, 0, 1, &value, 30), AUTOEP_ETIMEDOUT);
        fake_set_holds(d, 0);
        fake_send_raw(d, &late, sizeof(late));
        fake_send_raw(d, body, sizeof(body));
        assert_int_equal(autoep_get(h, JOB_W, AUTOEP_MASTER, 3, 1, &value, 5000), 0);
        assert_true(value == 1000 * JOB_W + 10 * AUTOEP_MASTER + 3);
        autoep_close(h);
}

static void put_brings_all_items(void **state)
{
        struct fake_daemon *d = *state;
        static const float masters[3] = { 1, 2, 3 };
        static const uint16_t frozen[2] = { 7, 8 };
        struct autoep_put_item items[] = {
                { .size = sizeof(items[0]), .tensor = JOB_W, .what = AUTOEP_MASTER, .first = 7,
                  .n = 3, .data = masters },
                { .size = sizeof(items[0]), .tensor = JOB_FROZEN, .what = AUTOEP_WEIGHT, .n = 2,
                  .data = frozen },
        };
        autoep *h = job_join(d);

        assert_int_equal(autoep_put(h, 0, items, 2, 5000), 0);
        fake_sync(d);
        assert_int_equal(d->put_len, 16);
        assert_memory_equal(d->put, masters, 12);
        assert_memory_equal(d->put + 12, frozen, 4);
        fake_set_state_status(d, AUTOEP_ESTATE);
        assert_int_equal(autoep_put(h, 3, items, 2, 5000), AUTOEP_ESTATE);
        job_assert_error_names("version 3 in round 1: the version is another one");
        assert_int_equal(autoep_put(h, 0, items, 0, 5000), AUTOEP_EINVAL);
        items[1].data = NULL;
        assert_int_equal(autoep_put(h, 0, items, 2, 5000), AUTOEP_EINVAL);
        items[1].data = frozen;
        items[0].what = AUTOEP_WEIGHT; /* a trainable one's follows from its master */
        assert_int_equal(autoep_put(h, 0, items, 2, 5000), AUTOEP_EINVAL);
        items[0].what = AUTOEP_GRADIENT;
        assert_int_equal(autoep_put(h, 0, items, 2, 5000), AUTOEP_EINVAL);
        autoep_close(h);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
        const struct CMUnitTest tests[] = {
                TEST(a_request_arrives_whole),
                TEST(wrong_requests_are_refused),
                cmocka_unit_test(only_squares_are_added),
                TEST(a_skipped_round_names_the_gradient),
                TEST(stop_makes_an_error_of_it),
                TEST(groups_of_experts_count),
                TEST(a_refused_request_may_be_repeated),
                TEST(a_put_in_between_is_not_a_verdict),
                cmocka_unit_test(lies_in_verdicts_are_found),
                TEST(a_step_in_time_out_is_taken_up_again),
                TEST(a_pause_is_said),
                TEST(get_brings_a_range),
                TEST(late_answers_are_dropped),
                TEST(put_brings_all_items),
        };

        return cmocka_run_group_tests_name("client-step", tests, NULL, NULL);
}
