/* SPDX-License-Identifier: Apache-2.0 */
/*
 * State from outside, views and order, as stories: put and get, an external optimizer, readers,
 * evaluation, held views, double scatters, layers in opposite orders. See contract.h for the job.
 */
#include "tests/lib/contract.h"

#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/wire/local.h"
#include "tests/lib/test.h"

#include <sched.h>
#include <string.h>

static const struct cluster_spec two_by_two = { .n_nodes = 2, .workers = { 2, 2 } };
static const struct cluster_spec uneven = { .n_nodes = 2, .workers = { 1, 3 } };
static const struct autoep_model adamw = { .optimizer = AUTOEP_ADAMW };
static const struct autoep_model sgd = { .optimizer = AUTOEP_SGD };

#define RUN(spec, fn) assert_int_equal(cluster_run(&(spec), fn, NULL), 0)

/* Calls that report their own failures. */
#define DO(call)                                                                                  \
        do {                                                                                      \
                if ((call) < 0)                                                                   \
                        return -1;                                                                \
        } while (0)
#define MEET(worker) DO(cluster_barrier(worker))

/* ---- put -------------------------------------------------------------------------------- */

static void fill(float *data, uint64_t n, float value)
{
        for (uint64_t i = 0; i < n; i++)
                data[i] = value;
}

/* Masters of both units, as one put. */
static int put_both(struct cluster_worker *w, autoep *handle, uint64_t version, float a, float b)
{
        float data_a[CONTRACT_N_A], data_b[CONTRACT_N_B];
        const struct autoep_put_item items[] = {
                { .size = sizeof(items[0]), .tensor = CONTRACT_A, .what = AUTOEP_MASTER,
                  .n = CONTRACT_N_A, .data = data_a },
                { .size = sizeof(items[0]), .tensor = CONTRACT_B, .what = AUTOEP_MASTER,
                  .n = CONTRACT_N_B, .data = data_b },
        };

        (void)w;
        fill(data_a, CONTRACT_N_A, a);
        fill(data_b, CONTRACT_N_B, b);
        return autoep_put(handle, version, items, AE_ARRAY_LEN(items), AUTOEP_DEFAULT_TIMEOUT);
}

/* One step of SGD from a and b; all ranks have read before anybody goes on. */
static int step_from(struct cluster_worker *w, float a, float b, uint64_t version)
{
        struct autoep_step step = contract_step(contract_sgd);
        struct autoep_verdict v;

        DO(contract_scatter(w, CONTRACT_UNIT_A, 0.25f));
        DO(contract_scatter(w, CONTRACT_UNIT_B, 0.5f));
        DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
        CLUSTER_CHECK(w, v.version == version, "version %llu", (unsigned long long)v.version);
        DO(contract_check_gathered(w, CONTRACT_A, a - 1, version));
        DO(contract_check_gathered(w, CONTRACT_B, b - 2, version));
        DO(contract_is(w, CONTRACT_A, AUTOEP_MASTER, a - 1));
        MEET(w);
        return 0;
}

static int put_story(struct cluster_worker *w)
{
        DO(contract_register(w, &sgd));
        if (w->rank == 3) {
                CLUSTER_REFUSED(w, put_both(w, w->handle, 7, 1, 2), AUTOEP_ESTATE, "version 0");
                CLUSTER_TRY(w, put_both(w, w->handle, 0, 0.11f, 3));
        }
        MEET(w);
        /* One new version for all; the weight is the master rounded, an alias sees it as well. */
        DO(contract_check_gathered(w, CONTRACT_A, 0.11f, 1));
        DO(contract_check_gathered(w, CONTRACT_B, 3, 1));
        DO(contract_is(w, CONTRACT_TIED, AUTOEP_MASTER, 0.11f));
        DO(contract_is(w, CONTRACT_NORM, AUTOEP_MASTER, 1));
        MEET(w);
        DO(step_from(w, 0.11f, 3, 2));
        /* Nobody may put once a rank has begun to scatter. */
        if (w->rank == 1)
                DO(contract_scatter(w, CONTRACT_UNIT_A, 1));
        MEET(w);
        if (w->rank == 2)
                CLUSTER_REFUSED(w, put_both(w, w->handle, 2, 5, 5), AUTOEP_ESTATE, "");
        MEET(w);
        DO(contract_check_gathered(w, CONTRACT_B, 1, 2));
        return 0;
}

static void test_put(void **state)
{
        (void)state;
        RUN(two_by_two, put_story);
        RUN(uneven, put_story);
}

/* A range of a tensor's moments, and a frozen tensor's weights. */
static int put_parts(struct cluster_worker *w)
{
        const float moment[] = { 1, 2, 3 }, frozen[] = { 8, 9 };
        const struct autoep_put_item items[] = {
                { .size = sizeof(items[0]), .tensor = CONTRACT_B, .what = AUTOEP_MOMENT2,
                  .first = 100, .n = 3, .data = moment },
                { .size = sizeof(items[0]), .tensor = CONTRACT_FROZEN, .what = AUTOEP_WEIGHT,
                  .first = 7, .n = 2, .data = frozen },
        };
        float got[CONTRACT_N_B];

        DO(contract_register(w, &adamw));
        if (w->rank == 0)
                CLUSTER_TRY(w, autoep_put(w->handle, 0, items, 2, AUTOEP_DEFAULT_TIMEOUT));
        MEET(w);
        CLUSTER_TRY(w, autoep_get(w->handle, CONTRACT_B, AUTOEP_MOMENT2, 99, 5, got,
                                  AUTOEP_DEFAULT_TIMEOUT));
        CLUSTER_CHECK(w, got[0] == 0 && memcmp(got + 1, moment, sizeof(moment)) == 0 && got[4] == 0,
                      "moments %g %g %g %g %g", (double)got[0], (double)got[1], (double)got[2],
                      (double)got[3], (double)got[4]);
        CLUSTER_TRY(w, autoep_get(w->handle, CONTRACT_FROZEN, AUTOEP_WEIGHT, 6, 3, got,
                                  AUTOEP_DEFAULT_TIMEOUT));
        CLUSTER_CHECK(w, got[0] == 5 && got[1] == 8 && got[2] == 9, "frozen %g %g %g",
                      (double)got[0], (double)got[1], (double)got[2]);
        return contract_is(w, CONTRACT_B, AUTOEP_MASTER, -0.7f);
}

static void test_put_parts(void **state)
{
        (void)state;
        RUN(two_by_two, put_parts);
}

/* Weights that steps don't change are in the cache already when a put changes them: beside others
 * that a step changes, and alone in their unit. */
static int put_frozen(struct cluster_worker *w)
{
        static const float ones[9] = { 1, 1, 1, 1, 1, 1, 1, 1, 1 }, twos[5] = { 2, 2, 2, 2, 2 };
        const struct autoep_tensor tensors[] = {
                { .size = sizeof(tensors[0]), .name = "w", .unit = "mixed", .dtype = AUTOEP_F32,
                  .tensor_class = AUTOEP_DENSE, .n_dims = 1, .dims = { 9 }, .init = ones },
                { .size = sizeof(tensors[0]), .name = "x", .unit = "mixed", .dtype = AUTOEP_F32,
                  .tensor_class = AUTOEP_DENSE, .n_dims = 1, .dims = { 9 }, .flags = AUTOEP_FROZEN,
                  .init = ones },
                { .size = sizeof(tensors[0]), .name = "y", .unit = "frozen", .dtype = AUTOEP_F32,
                  .tensor_class = AUTOEP_DENSE, .n_dims = 1, .dims = { 9 }, .flags = AUTOEP_FROZEN,
                  .init = ones },
        };
        const struct autoep_model model = { .size = sizeof(model), .optimizer = AUTOEP_SGD,
                                            .tensors = tensors, .n_tensors = 3 };
        struct autoep_put_item items[2] = { { 0 } };

        CLUSTER_TRY(w, autoep_register(w->handle, &model, AUTOEP_DEFAULT_TIMEOUT));
        for (uint32_t i = 0; i < 2; i++)
                items[i] = (struct autoep_put_item){ .size = sizeof(items[i]), .tensor = 1 + i,
                                                     .what = AUTOEP_WEIGHT, .first = 2, .n = 5,
                                                     .data = twos };
        for (uint64_t version = 0; version < 2; version++) {
                for (uint32_t t = 1; t < 3; t++) {
                        struct autoep_view view = AUTOEP_VIEW_INIT;
                        const float *x;

                        CLUSTER_TRY(w, autoep_gather(w->handle, t - 1, AUTOEP_DEFAULT_TIMEOUT,
                                                     &view));
                        x = autoep_view_tensor(w->handle, &view, t);
                        CLUSTER_CHECK(w, x[1] == 1 && x[2] == (float)(1 + version),
                                      "tensor %u at version %llu: %g %g", t,
                                      (unsigned long long)version, (double)x[1], (double)x[2]);
                        CLUSTER_TRY(w, autoep_release(w->handle, &view));
                }
                MEET(w);
                if (version == 0 && w->rank == 1)
                        CLUSTER_TRY(w, autoep_put(w->handle, 0, items, 2, AUTOEP_DEFAULT_TIMEOUT));
                MEET(w);
        }
        return 0;
}

static void test_put_frozen(void **state)
{
        (void)state;
        RUN(two_by_two, put_frozen);
}

/* A micro-batch that scattered nothing does not stop a put, and the round goes on after it. */
static int put_after_micro_batch(struct cluster_worker *w)
{
        DO(contract_register(w, &sgd));
        if (w->rank == 1)
                CLUSTER_TRY(w, autoep_micro_batch_end(w->handle));
        MEET(w);
        if (w->rank == 0)
                CLUSTER_TRY(w, put_both(w, w->handle, 0, 4, 6));
        MEET(w);
        return step_from(w, 4, 6, 2);
}

static void test_put_after_micro_batch(void **state)
{
        (void)state;
        RUN(two_by_two, put_after_micro_batch);
}

/* A rank that is slow to read its verdict finds it although another has put twice since. */
static int put_before_verdict_is_read(struct cluster_worker *w)
{
        struct autoep_step step = contract_step(contract_sgd);
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;

        DO(contract_register(w, &sgd));
        DO(contract_scatter(w, CONTRACT_UNIT_B, 0.5f));
        if (w->rank == 3)
                CLUSTER_REFUSED(w, autoep_step(w->handle, &step, 0, &v), AUTOEP_ETIMEDOUT, "");
        MEET(w); /* the others have not asked: there is no verdict yet */
        if (w->rank != 3)
                DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
        MEET(w);
        if (w->rank == 0) {
                CLUSTER_TRY(w, put_both(w, w->handle, 1, 4, 5));
                CLUSTER_TRY(w, put_both(w, w->handle, 2, 6, 7));
        }
        MEET(w);
        if (w->rank == 3)
                DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
        CLUSTER_CHECK(w, v.version == 1 && v.round == 2, "version %llu after round %llu",
                      (unsigned long long)v.version, (unsigned long long)v.round);
        return step_from(w, 6, 7, 4);
}

static void test_put_before_verdict_is_read(void **state)
{
        (void)state;
        RUN(two_by_two, put_before_verdict_is_read);
}

/* The ranks step; rank 0 takes the gradient and puts what its own optimizer makes of it. */
static int external(struct cluster_worker *w)
{
        struct autoep_step step = contract_step(contract_sgd);
        float a = 0.3333333f, b = -0.7f, g[CONTRACT_N_A];
        struct autoep_verdict v;

        DO(contract_register(w, &(struct autoep_model){ .optimizer = AUTOEP_EXTERNAL }));
        for (uint32_t i = 0; i < 3; i++) {
                DO(contract_scatter(w, CONTRACT_UNIT_A, 0.5f));
                DO(contract_scatter(w, CONTRACT_UNIT_B, 1 + (float)i));
                step.max_norm = 3;
                DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
                DO(contract_is(w, CONTRACT_A, AUTOEP_MASTER, a));
                CLUSTER_TRY(w, autoep_get(w->handle, CONTRACT_B, AUTOEP_GRADIENT, 0, 1, g,
                                          AUTOEP_DEFAULT_TIMEOUT));
                CLUSTER_CHECK(w, g[0] == 4 * (1 + (float)i), "gradient %g", (double)g[0]);
                a -= 2 * (float)v.grad_scale;
                b -= g[0] * (float)v.grad_scale;
                MEET(w);
                if (w->rank == 0)
                        CLUSTER_TRY(w, put_both(w, w->handle, v.version, a, b));
                MEET(w);
                DO(contract_check_gathered(w, CONTRACT_A, a, v.version + 1));
                DO(contract_check_gathered(w, CONTRACT_B, b, v.version + 1));
                MEET(w);
        }
        return 0;
}

static void test_external_optimizer(void **state)
{
        (void)state;
        RUN(two_by_two, external);
}

/* ---- readers and evaluation -------------------------------------------------------------- */

static int read_weights(struct cluster_worker *w, autoep *reader, float a, uint64_t version)
{
        struct cluster_worker as_reader = *w;

        as_reader.handle = reader;
        DO(contract_check_gathered(&as_reader, CONTRACT_A, a, version));
        return contract_is(&as_reader, CONTRACT_A, AUTOEP_MASTER, a);
}

static int reader_story(struct cluster_worker *w, autoep *reader)
{
        if (w->rank == 2) {
                CLUSTER_TRY(w, autoep_register(reader, NULL, AUTOEP_DEFAULT_TIMEOUT));
                DO(read_weights(w, reader, 0.3333333f, 0));
                CLUSTER_CHECK(w, autoep_micro_batch_end(reader) != 0, "a reader takes part");
        }
        MEET(w);
        DO(step_from(w, 0.3333333f, -0.7f, 1));
        if (w->rank == 2) {
                DO(read_weights(w, reader, 0.3333333f - 1, 1));
                CLUSTER_TRY(w, put_both(w, reader, 1, 1, 2));
                DO(read_weights(w, reader, 1, 2));
                CLUSTER_TRY(w, autoep_leave(reader, AUTOEP_DEFAULT_TIMEOUT));
        }
        MEET(w);
        return step_from(w, 1, 2, 3);
}

static int with_reader(struct cluster_worker *w)
{
        const struct autoep_options options = cluster_reader_options(w);
        autoep *reader = NULL;
        int r;

        DO(contract_register(w, &sgd));
        if (w->rank == 2)
                CLUSTER_TRY(w, autoep_open(&options, &reader));
        r = reader_story(w, reader);
        autoep_close(reader);
        return r;
}

static void test_reader(void **state)
{
        (void)state;
        RUN(two_by_two, with_reader);
}

/* Rank 1 evaluates alone: units in any order, again and again, nested, and scatters nothing. */
static int evaluate(struct cluster_worker *w)
{
        DO(contract_register(w, &sgd));
        for (uint32_t i = 0; w->rank == 1 && i < 20; i++) {
                struct autoep_view outer = AUTOEP_VIEW_INIT, inner = AUTOEP_VIEW_INIT;

                CLUSTER_TRY(w, autoep_gather(w->handle, i % 2, AUTOEP_DEFAULT_TIMEOUT, &outer));
                CLUSTER_TRY(w, autoep_gather(w->handle, i % 2, AUTOEP_DEFAULT_TIMEOUT, &inner));
                CLUSTER_CHECK(w, outer.data == inner.data, "a nested view lies elsewhere");
                DO(contract_check_gathered(w, i % 2 ? CONTRACT_A : CONTRACT_B,
                                           i % 2 ? 0.3333333f : -0.7f, 0));
                CLUSTER_TRY(w, autoep_release(w->handle, &outer));
                CLUSTER_TRY(w, autoep_release(w->handle, &inner));
        }
        return step_from(w, 0.3333333f, -0.7f, 1);
}

static void test_evaluation(void **state)
{
        (void)state;
        RUN(two_by_two, evaluate);
}

/* ---- scatters and views ------------------------------------------------------------------ */

static const struct cluster_spec smallest_ring = { .n_nodes = 1, .workers = { 2 },
                                                   .ring_len = AE_LOCAL_RING_MIN };

#define SIZED_MAX 5u
#define SIZED_N (1u << 22)
static float sized_values[SIZED_N];

/* A unit of @n[i] elements for each of @n_units. */
static int sized_register(struct cluster_worker *w, const uint64_t *n, uint32_t n_units)
{
        static const char *const names[SIZED_MAX] = { "v", "w", "x", "y", "z" };
        struct autoep_tensor tensors[SIZED_MAX] = { { 0 } };
        struct autoep_model model = sgd;

        for (uint32_t i = 0; i < n_units; i++)
                tensors[i] = (struct autoep_tensor){
                        .size = sizeof(tensors[i]), .name = names[i], .unit = names[i],
                        .dtype = AUTOEP_F32, .n_dims = 1, .dims = { n[i] },
                        .tensor_class = AUTOEP_DENSE, .init = sized_values
                };
        model.size = sizeof(model);
        model.tensors = tensors;
        model.n_tensors = n_units;
        CLUSTER_TRY(w, autoep_register(w->handle, &model, AUTOEP_DEFAULT_TIMEOUT));
        return 0;
}

static int sized_scatter(struct cluster_worker *w, uint32_t i, int timeout_ms)
{
        const struct autoep_gradient gradient = { .size = sizeof(gradient), .tensor = i,
                                                  .dtype = AUTOEP_F32, .data = sized_values };

        return autoep_scatter(w->handle, i, &gradient, 1, 0, timeout_ms);
}

/* Without rank 0, whose turn it is: in a ring of 8 MiB the second piece was a little less than
 * half, and the third didn't fit behind it. */
static int fill_ring(struct cluster_worker *w)
{
        static const uint64_t n[] = { (1 << 19) + 4096, (1 << 20) - 4096, 1 << 20, 1 << 20,
                                      1 << 20 };
        struct autoep_step step = contract_step(contract_sgd);
        struct autoep_verdict v;

        DO(sized_register(w, n, AE_ARRAY_LEN(n)));
        if (w->rank == 0)
                MEET(w);
        for (uint32_t i = 0; i < AE_ARRAY_LEN(n); i++)
                CLUSTER_TRY(w, sized_scatter(w, i, 5000));
        if (w->rank == 1)
                MEET(w);
        return contract_ask(w, &step, AUTOEP_APPLIED, &v);
}

static void test_smallest_ring(void **state)
{
        (void)state;
        RUN(smallest_ring, fill_ring);
}

/* Rank 1 asks again and again for room for most of the ring, without waiting for it, while a
 * quarter of the ring has what waits for rank 0. */
static int poll_for_room(struct cluster_worker *w)
{
        static const uint64_t n[] = { 2 << 20, 7 << 19 };
        const uint64_t limit_ns = ae_now_ns() + 5 * AE_NS_PER_S;
        struct autoep_step step = contract_step(contract_sgd);
        struct autoep_verdict v;

        DO(sized_register(w, n, AE_ARRAY_LEN(n)));
        if (w->rank == 0)
                MEET(w);
        for (uint32_t i = 0; i < AE_ARRAY_LEN(n); i++) {
                int r;

                do {
                        r = sized_scatter(w, i, 0);
                } while (r == AUTOEP_EAGAIN && ae_now_ns() < limit_ns && sched_yield() == 0);
                CLUSTER_TRY(w, r);
        }
        if (w->rank == 1)
                MEET(w);
        return contract_ask(w, &step, AUTOEP_APPLIED, &v);
}

static void test_poll_for_room(void **state)
{
        (void)state;
        RUN(smallest_ring, poll_for_room);
}

/* Even ranks scatter a before the exchange and b after it, odd ones the other way round. */
static int opposite(struct cluster_worker *w)
{
        const uint32_t first = w->rank % 2, second = 1 - first;
        struct autoep_step step = contract_step(contract_sgd);
        struct autoep_verdict v;

        DO(contract_register(w, &sgd));
        for (uint32_t i = 0; i < 3; i++) {
                for (uint32_t micro = 0; micro < 2; micro++) {
                        DO(contract_scatter(w, first, 0.125f));
                        DO(contract_exchange(w));
                        DO(contract_scatter(w, second, 0.125f));
                        CLUSTER_TRY(w, autoep_micro_batch_end(w->handle));
                }
                DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
                DO(contract_is(w, CONTRACT_A, AUTOEP_GRADIENT, 1));
                DO(contract_is(w, CONTRACT_B, AUTOEP_MASTER, -0.7f - 1 - (float)i));
                MEET(w);
        }
        return 0;
}

static void test_opposite_orders(void **state)
{
        (void)state;
        RUN(two_by_two, opposite);
}

static int double_scatter(struct cluster_worker *w)
{
        const float g[CONTRACT_N_B] = { 0 };
        const struct autoep_gradient gradient = { .size = sizeof(gradient), .tensor = CONTRACT_B,
                                                  .dtype = AUTOEP_F32, .data = g };

        DO(contract_register(w, &sgd));
        DO(contract_scatter(w, CONTRACT_UNIT_B, 0.5f));
        CLUSTER_REFUSED(w, autoep_scatter(w->handle, CONTRACT_UNIT_B, &gradient, 1, 0,
                                          AUTOEP_DEFAULT_TIMEOUT), AUTOEP_EEXIST, "'b'");
        CLUSTER_REFUSED(w, autoep_scatter(w->handle, CONTRACT_UNIT_A, &gradient, 1, 0,
                                          AUTOEP_DEFAULT_TIMEOUT), AUTOEP_EINVAL, "b.w");
        DO(contract_scatter(w, CONTRACT_UNIT_A, 0.25f));
        {
                struct autoep_step step = contract_step(contract_sgd);
                struct autoep_verdict v;

                DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
        }
        DO(contract_is(w, CONTRACT_B, AUTOEP_GRADIENT, 2));
        return contract_is(w, CONTRACT_A, AUTOEP_GRADIENT, 1);
}

static void test_double_scatter(void **state)
{
        (void)state;
        RUN(two_by_two, double_scatter);
}

/* After a request that was refused the gradients stand: the round can only be asked for again. */
static int scatter_after_refusal(struct cluster_worker *w)
{
        const float g[CONTRACT_N_B] = { 0 };
        const struct autoep_gradient gradient = { .size = sizeof(gradient), .tensor = CONTRACT_B,
                                                  .dtype = AUTOEP_F32, .data = g };
        struct autoep_step step = contract_step(contract_sgd);
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;

        DO(contract_register(w, &sgd));
        DO(contract_scatter(w, CONTRACT_UNIT_A, 0.25f));
        step.max_norm = w->rank == 0 ? 1 : 0;
        CLUSTER_REFUSED(w, autoep_step(w->handle, &step, AUTOEP_DEFAULT_TIMEOUT, &v),
                        AUTOEP_EMISMATCH, "max_norm");
        if (w->rank == 3)
                CLUSTER_REFUSED(w, autoep_scatter(w->handle, CONTRACT_UNIT_B, &gradient, 1, 0,
                                                  AUTOEP_DEFAULT_TIMEOUT), AUTOEP_ESTATE, "step");
        step.max_norm = 0;
        DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
        DO(contract_is(w, CONTRACT_A, AUTOEP_GRADIENT, 1));
        MEET(w);
        return step_from(w, 0.3333333f - 1, -0.7f, 2);
}

static void test_scatter_after_refusal(void **state)
{
        (void)state;
        RUN(two_by_two, scatter_after_refusal);
}

static int held(struct cluster_worker *w)
{
        struct autoep_step step = contract_step(contract_sgd);
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;
        struct autoep_view view = AUTOEP_VIEW_INIT;

        DO(contract_register(w, &sgd));
        CLUSTER_TRY(w, autoep_gather(w->handle, CONTRACT_UNIT_B, AUTOEP_DEFAULT_TIMEOUT, &view));
        CLUSTER_REFUSED(w, autoep_step(w->handle, &step, AUTOEP_DEFAULT_TIMEOUT, &v), AUTOEP_EHELD,
                        "b");
        CLUSTER_REFUSED(w, autoep_leave(w->handle, AUTOEP_DEFAULT_TIMEOUT), AUTOEP_EHELD, "b");
        CLUSTER_TRY(w, autoep_release(w->handle, &view));
        CLUSTER_CHECK(w, autoep_release(w->handle, &view) == AUTOEP_EINVAL, "released twice");
        return step_from(w, 0.3333333f, -0.7f, 1);
}

static void test_held_view(void **state)
{
        (void)state;
        RUN(two_by_two, held);
}

static int ranges(struct cluster_worker *w)
{
        struct autoep_view view = AUTOEP_VIEW_INIT;

        DO(contract_register(w, &sgd));
        DO(step_from(w, 0.3333333f, -0.7f, 1));
        CLUSTER_TRY(w, autoep_gather_range(w->handle, CONTRACT_B, 70, 3, AUTOEP_DEFAULT_TIMEOUT,
                                           &view));
        CLUSTER_CHECK(w, view.len == 12 && view.version == 1, "%llu bytes of version %llu",
                      (unsigned long long)view.len, (unsigned long long)view.version);
        for (uint32_t i = 0; i < 3; i++)
                CLUSTER_CHECK(w, ((const float *)view.data)[i] == -0.7f - 2, "element %u", 70 + i);
        CLUSTER_TRY(w, autoep_release(w->handle, &view));
        CLUSTER_REFUSED(
                w,
                autoep_gather_range(w->handle, CONTRACT_B, 130, 2, AUTOEP_DEFAULT_TIMEOUT, &view),
                AUTOEP_EINVAL, "131");
        return 0;
}

static void test_gather_range(void **state)
{
        (void)state;
        RUN(two_by_two, ranges);
}

/* All views of ranges that two processes may hold, while the cache has the unit, which is past
 * their allowance. */
static int many_ranges(struct cluster_worker *w)
{
        static struct autoep_view views[2][AE_LOCAL_RANGES_MAX + 1];
        static float init[1 << 16];
        const struct autoep_tensor tensor = {
                .size = sizeof(tensor), .name = "table", .unit = "table", .dtype = AUTOEP_F32,
                .tensor_class = AUTOEP_DENSE, .n_dims = 1, .dims = { AE_ARRAY_LEN(init) },
                .init = init
        };
        const struct autoep_model model = { .size = sizeof(model), .tensors = &tensor,
                                            .n_tensors = 1, .optimizer = AUTOEP_SGD };
        struct autoep_view *view = views[w->rank];

        for (uint32_t i = 0; w->rank == 0 && i < AE_ARRAY_LEN(init); i++)
                init[i] = (float)i;
        MEET(w);
        CLUSTER_TRY(w, autoep_register(w->handle, &model, AUTOEP_DEFAULT_TIMEOUT));
        for (uint32_t i = 0; i <= AE_LOCAL_RANGES_MAX; i++)
                view[i] = (struct autoep_view)AUTOEP_VIEW_INIT;
        for (uint32_t i = 0; i < AE_LOCAL_RANGES_MAX; i++) {
                CLUSTER_TRY(w, autoep_gather_range(w->handle, 0, 3 * i, 2, 5000, &view[i]));
                CLUSTER_CHECK(w, *(const float *)view[i].data == (float)(3 * i), "range %u", i);
        }
        CLUSTER_REFUSED(w, autoep_gather_range(w->handle, 0, 1, 1, 5000,
                                               &view[AE_LOCAL_RANGES_MAX]),
                        AUTOEP_EBUDGET, "256 views of ranges");
        MEET(w);
        CLUSTER_TRY(w, autoep_release(w->handle, &view[7]));
        CLUSTER_TRY(w, autoep_gather_range(w->handle, 0, 7, 1, 5000, &view[7]));
        for (uint32_t i = 0; i < AE_LOCAL_RANGES_MAX; i++)
                CLUSTER_TRY(w, autoep_release(w->handle, &view[i]));
        return 0;
}

static void test_many_ranges(void **state)
{
        const struct cluster_spec spec = { .n_nodes = 1, .workers = { 2 }, .hold_len = 1 << 17 };

        (void)state;
        RUN(spec, many_ranges);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_put),
                cmocka_unit_test(test_put_parts),
                cmocka_unit_test(test_put_frozen),
                cmocka_unit_test(test_put_after_micro_batch),
                cmocka_unit_test(test_put_before_verdict_is_read),
                cmocka_unit_test(test_external_optimizer),
                cmocka_unit_test(test_reader),
                cmocka_unit_test(test_evaluation),
                cmocka_unit_test(test_smallest_ring),
                cmocka_unit_test(test_poll_for_room),
                cmocka_unit_test(test_opposite_orders),
                cmocka_unit_test(test_double_scatter),
                cmocka_unit_test(test_scatter_after_refusal),
                cmocka_unit_test(test_held_view),
                cmocka_unit_test(test_gather_range),
                cmocka_unit_test(test_many_ranges),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
