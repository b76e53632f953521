/* SPDX-License-Identifier: Apache-2.0 */
/*
 * As little room as there may be, as a story: rings, slots and exchange of the least size, with
 * gradients larger than a ring. See contract.h for the helpers; the job is its own.
 */
#include "tests/lib/contract.h"

#include "proto/base/num.h"
#include "proto/wire/local.h"
#include "tests/lib/test.h"

#include <stdlib.h>

/* Calls that report their own failures. */
#define DO(call)                                                                                  \
        do {                                                                                      \
                if ((call) < 0)                                                                   \
                        return -1;                                                                \
        } while (0)

enum { TIGHT_UNITS = 3, TIGHT_MICROS = 3, TIGHT_STEPS = 2 };
/* Two gradients that are larger than a ring; what nobody scatters in the second step. */
static const uint64_t tight_n[TIGHT_UNITS] = { 5000000, 4200000, 300000 };

/* Rank r takes r % 3 + 1 micro-batches; the last unit is left out here and there. */
static bool tight_scatters(uint32_t step, uint32_t micro, uint32_t rank, uint32_t unit)
{
        if (micro > rank % TIGHT_MICROS)
                return false;
        return unit != 2 || (step != 1 && (micro + rank) % 2 == 0);
}

/* Of element @i, in eighths: differs with all it may be mixed up with. */
static float tight_gradient(uint32_t step, uint32_t micro, uint32_t rank, uint64_t i)
{
        return (float)((int)(i % 11) + (int)(rank * 5 + micro * 3 + step)) * 0.125f;
}

static int tight_scatter(struct cluster_worker *w, float *room, uint32_t step, uint32_t micro,
                         uint32_t unit)
{
        const struct autoep_gradient gradient = { .size = sizeof(gradient), .tensor = unit,
                                                  .dtype = AUTOEP_F32, .data = room };

        if (!tight_scatters(step, micro, w->rank, unit))
                return 0;
        for (uint64_t i = 0; i < tight_n[unit]; i++)
                room[i] = tight_gradient(step, micro, w->rank, i);
        CLUSTER_TRY(w, autoep_scatter(w->handle, unit, &gradient, 1, 0, AUTOEP_DEFAULT_TIMEOUT));
        return 0;
}

/* Even ranks from the first unit to the last, odd ones from the last to the first; after each unit
 * all exchange, also those that have no micro-batch left. */
static int tight_micro_batch(struct cluster_worker *w, float *room, uint32_t step, uint32_t micro)
{
        for (uint32_t i = 0; i < TIGHT_UNITS; i++) {
                DO(tight_scatter(w, room, step, micro, w->rank % 2 ? TIGHT_UNITS - 1 - i : i));
                DO(contract_exchange(w));
        }
        if (micro <= w->rank % TIGHT_MICROS)
                CLUSTER_TRY(w, autoep_micro_batch_end(w->handle));
        return 0;
}

/* The reduced gradient of a unit, which each rank reads in part. */
static int tight_check(struct cluster_worker *w, float *room, uint32_t step, uint32_t unit)
{
        const uint64_t part = ae_div_up(tight_n[unit], w->world);
        const uint64_t first = part * w->rank;
        const uint64_t n = AE_MIN(part, tight_n[unit] - first);

        CLUSTER_TRY(w, autoep_get(w->handle, unit, AUTOEP_GRADIENT, first, n, room,
                                  AUTOEP_DEFAULT_TIMEOUT));
        for (uint64_t i = 0; i < n; i++) {
                float want = 0;

                for (uint32_t micro = 0; micro < TIGHT_MICROS; micro++)
                        for (uint32_t rank = 0; rank < w->world; rank++)
                                if (tight_scatters(step, micro, rank, unit))
                                        want += tight_gradient(step, micro, rank, first + i);
                CLUSTER_CHECK(w, room[i] == want, "step %u: gradient %llu of unit %u is %g, not %g",
                              step, (unsigned long long)(first + i), unit, (double)room[i],
                              (double)want);
        }
        return 0;
}

static int tight_steps(struct cluster_worker *w, float *room)
{
        const struct autoep_step step = contract_step(contract_sgd);
        struct autoep_verdict v;

        for (uint32_t i = 0; i < TIGHT_STEPS; i++) {
                for (uint32_t micro = 0; micro < TIGHT_MICROS; micro++)
                        DO(tight_micro_batch(w, room, i, micro));
                DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
                for (uint32_t unit = 0; unit < TIGHT_UNITS; unit++)
                        DO(tight_check(w, room, i, unit));
                DO(cluster_barrier(w));
        }
        return 0;
}

static int tight_register(struct cluster_worker *w, const float *room)
{
        static const char *const names[TIGHT_UNITS] = { "x", "y", "z" };
        struct autoep_tensor tensors[TIGHT_UNITS] = { { 0 } };
        struct autoep_model model = { .size = sizeof(model), .tensors = tensors,
                                      .n_tensors = TIGHT_UNITS, .optimizer = AUTOEP_SGD,
                                      .slots = 2, .slot_len = 1, .exchange_len = 1 };

        for (uint32_t i = 0; i < TIGHT_UNITS; i++)
                tensors[i] = (struct autoep_tensor){
                        .size = sizeof(tensors[i]), .name = names[i], .unit = names[i],
                        .dtype = AUTOEP_BF16, .n_dims = 1, .dims = { tight_n[i] }, .group = i % 2,
                        .tensor_class = AUTOEP_DENSE, .init = room
                };
        CLUSTER_TRY(w, autoep_register(w->handle, &model, AUTOEP_DEFAULT_TIMEOUT));
        return 0;
}

static int tight(struct cluster_worker *w)
{
        float *room = calloc(tight_n[0], sizeof(*room));
        int r;

        CLUSTER_CHECK(w, room, "no memory");
        r = tight_register(w, room);
        if (r == 0)
                r = tight_steps(w, room);
        free(room);
        return r;
}

/* Rings, slots and exchange as small as they may be, ranks that scatter in opposite orders, other
 * numbers of micro-batches, units left out, and an exchange between any two scatters: nobody waits
 * for ever, and every gradient arrives once. */
static void test_least_room(void **state)
{
        struct cluster_spec spec = { .n_nodes = 2, .workers = { 2, 2 },
                                     .ring_len = AE_LOCAL_RING_MIN };

        (void)state;
        assert_int_equal(cluster_run(&spec, tight, NULL), 0);
        spec = (struct cluster_spec){ .n_nodes = 2, .workers = { 3, 1 }, .transport = "tcp",
                                      .ring_len = AE_LOCAL_RING_MIN };
        assert_int_equal(cluster_run(&spec, tight, NULL), 0);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_least_room),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
