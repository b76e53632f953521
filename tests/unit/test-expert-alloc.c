/* SPDX-License-Identifier: Apache-2.0 */
/* Memory of the experts part: every allocation may fail, and a grown exchange makes none. */
#include "client/experts/dispatch.h"
#include "client/experts/optimizer.h"
#include "client/experts/route.h"
#include "proto/base/clock.h"
#include "proto/base/status.h"

#include "tests/lib/comm-local.h"
#include "tests/lib/fault.h"
#include "tests/lib/test.h"

#include <string.h>

#define N_TOKENS 6
#define N_EXPERTS 4
#define TOP_K 2
#define WIDTH 3

static struct comm_local *group;
static struct ae_comm *comm;

static int make_group(void **state)
{
        const uint32_t rank = 0;

        (void)state;
        group = comm_local_new(&rank, 1);
        return group ? comm_local_join(group, 0, &comm) : -1;
}

static int drop_group(void **state)
{
        (void)state;
        comm_local_leave(comm);
        comm_local_free(group);
        return 0;
}

static int try_comm(void *arg)
{
        static const uint32_t ranks[3] = { 1, 2, 3 };
        struct ae_comm made;
        int r = ae_comm_init(&made, comm->ops, ranks, 3, 1);

        (void)arg;
        if (r == 0)
                ae_comm_deinit(&made);
        return r;
}

static int try_route(void *arg)
{
        static const struct ae_route_config config = { .n_experts = N_EXPERTS, .top_k = TOP_K,
                                                       .scale = 1 };
        struct ae_route route;
        int r = ae_route_init(&route, &config);

        (void)arg;
        if (r == 0)
                ae_route_deinit(&route);
        return r;
}

struct exchange {
        struct ae_plan plan;
        struct ae_dispatch dispatch;
        float tokens[N_TOKENS * WIDTH], rows[N_TOKENS * TOP_K * WIDTH];
        float kept[N_TOKENS * TOP_K * WIDTH], out[N_TOKENS * WIDTH];
        float weight[N_TOKENS * TOP_K], dweight[N_TOKENS * TOP_K];
        int32_t idx[N_TOKENS * TOP_K];
};

static int exchange_init(struct exchange *x)
{
        struct ae_group_topology topology;
        int r = ae_group_init(1, 1, AE_ORDER_ED, &topology);

        *x = (struct exchange){ .dispatch = AE_DISPATCH_INIT };
        for (int32_t i = 0; i < N_TOKENS * TOP_K; i++)
                x->idx[i] = i * 3 % N_EXPERTS;
        return r < 0 ? r : ae_plan_init(&x->plan, &topology, N_EXPERTS, TOP_K);
}

static void exchange_deinit(struct exchange *x)
{
        ae_plan_deinit(&x->plan);
        ae_dispatch_deinit(&x->dispatch);
}

/* All that one layer does in a micro-batch. */
static int exchange_run(struct exchange *x, size_t n_tokens)
{
        const uint64_t deadline_ns = ae_now_ns() + 10 * AE_NS_PER_S;
        const struct ae_dispatch_call call = { .ep = comm, .plan = &x->plan, .real = AE_REAL_F32,
                                               .width = WIDTH, .deadline_ns = deadline_ns };
        const struct ae_combine combine = { .rows = x->rows, .weight = x->weight,
                                            .kept = x->kept, .out = x->out };
        const struct ae_combine_grads grads = { .dout = x->out, .weight = x->weight,
                                                .kept = x->kept, .drows = x->rows,
                                                .dweight = x->dweight };
        int r = ae_plan_build(&x->plan, comm, x->idx, n_tokens, deadline_ns);

        if (r == 0)
                r = ae_dispatch_forward(&x->dispatch, &call, x->tokens, x->rows);
        if (r == 0)
                r = ae_combine_forward(&x->dispatch, &call, &combine);
        if (r == 0)
                r = ae_combine_backward(&x->dispatch, &call, &grads);
        return r == 0 ? ae_dispatch_backward(&x->dispatch, &call, x->rows, x->tokens) : r;
}

static int try_exchange(void *arg)
{
        struct exchange x;
        int r = exchange_init(&x);

        (void)arg;
        if (r == 0)
                r = exchange_run(&x, N_TOKENS);
        exchange_deinit(&x);
        return r;
}

static int opt_make(float *weight, struct ae_expert_opt **ret_opt)
{
        const struct ae_expert_opt_config config = { .rule = AE_EXPERT_ADAMW, .n_groups = 1,
                                                     .keep_reduced = true };
        const struct ae_expert_tensor tensor = { .name = "w", .dtype = AE_DTYPE_F32,
                                                 .weight = weight, .n = 5 };
        uint32_t index;
        int r = ae_expert_opt_new(&config, ret_opt);

        if (r == 0)
                r = ae_expert_opt_add(*ret_opt, &tensor, &index);
        return r == 0 ? ae_expert_opt_seal(*ret_opt, comm, UINT64_MAX) : r;
}

static int try_opt(void *arg)
{
        float weight[5] = { 0 };
        struct ae_expert_opt *opt = NULL;
        struct ae_expert_checksum checksum;
        int r = opt_make(weight, &opt);

        (void)arg;
        if (r == 0)
                r = ae_expert_opt_checksum(opt, true, &checksum);
        if (r == 0)
                r = ae_expert_opt_compare(opt, comm, UINT64_MAX);
        ae_expert_opt_free(opt);
        return r;
}

static void every_allocation_may_fail(void **state)
{
        (void)state;
        assert_int_equal(fault_alloc_sweep(try_comm, NULL, AE_ENOMEM), 3);
        assert_int_equal(fault_alloc_sweep(try_route, NULL, AE_ENOMEM), 2);
        assert_true(fault_alloc_sweep(try_exchange, NULL, AE_ENOMEM) >= 4);
        assert_true(fault_alloc_sweep(try_opt, NULL, AE_ENOMEM) >= 8);
}

static void a_grown_exchange_allocates_nothing(void **state)
{
        struct exchange x;

        (void)state;
        assert_int_equal(exchange_init(&x), 0);
        assert_int_equal(exchange_run(&x, N_TOKENS), 0);
        fault_alloc_arm(UINT64_MAX);
        assert_int_equal(exchange_run(&x, N_TOKENS - 1), 0);
        assert_int_equal(exchange_run(&x, 0), 0);
        assert_int_equal(exchange_run(&x, N_TOKENS), 0);
        assert_int_equal(fault_alloc_count(), 0);
        (void)fault_alloc_disarm();
        exchange_deinit(&x);
}

static void a_round_allocates_nothing(void **state)
{
        const struct ae_expert_group_step step = { .hyper = { .lr = 1e-3, .beta1 = 0.9,
                                                              .beta2 = 0.99, .eps = 1e-8 } };
        const struct ae_expert_verdict verdict = { .applied = true, .grad_scale = 1,
                                                   .groups = &step, .n_groups = 1 };
        struct ae_expert_report report;
        struct ae_expert_opt *opt;
        float weight[5] = { 0 };

        (void)state;
        assert_int_equal(opt_make(weight, &opt), 0);
        fault_alloc_arm(UINT64_MAX);
        for (int i = 0; i < 3; i++) {
                ae_expert_opt_grad(opt, 0)[0] = 1;
                assert_int_equal(ae_expert_opt_reduce(opt, comm, UINT64_MAX, &report), 0);
                assert_int_equal(ae_expert_opt_step(opt, &verdict), 0);
        }
        assert_int_equal(fault_alloc_count(), 0);
        (void)fault_alloc_disarm();
        assert_true(weight[0] < 0);
        ae_expert_opt_free(opt);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(every_allocation_may_fail),
                cmocka_unit_test(a_grown_exchange_allocates_nothing),
                cmocka_unit_test(a_round_allocates_nothing),
        };

        return cmocka_run_group_tests_name("expert-alloc", tests, make_group, drop_group);
}
