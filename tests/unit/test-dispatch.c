/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Plans, dispatch and combine against oracles that know the routing of every rank, over worlds of
 * 1..8 threads, both group orders, fp32 and double.
 */
#include "client/experts/dispatch.h"
#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include "tests/lib/comm-local.h"
#include "tests/lib/test.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define WIDTH 5

enum scenario { BALANCED, HOT_EXPERT, HOT_RANK, ZERO_TOKEN_RANK, ZERO_TOKEN_EXPERT, ALL_EXPERTS,
                ONE_PER_RANK, ONE_TAKES_ALL, NO_TOKENS, N_SCENARIOS };

static const char *const scenario_names[] = { "balanced", "hot expert", "hot rank",
                                              "zero-token rank", "zero-token expert", "K = E",
                                              "one expert per rank", "one takes all",
                                              "no tokens" };

struct job {
        enum scenario scenario;
        enum ae_real real;
        uint32_t n_experts, top_k;
        /* Inner products, by rank; of small integers, so every sum is exact. */
        double dispatch_lhs[8], dispatch_rhs[8];
        double combine_lhs[8], combine_rhs[8], weight_rhs[8];
};

static void set_up(struct job *job, const struct ae_group_topology *topology)
{
        job->n_experts = 4 * topology->ep_size;
        job->top_k = 2;
        if (job->scenario == ALL_EXPERTS)
                job->top_k = job->n_experts;
        if (job->scenario == ONE_PER_RANK) {
                job->n_experts = topology->ep_size;
                job->top_k = AE_MIN(2u, job->n_experts);
        }
        if (job->scenario == ONE_TAKES_ALL)
                job->top_k = 1;
}

static size_t tokens_of(const struct job *job, uint32_t rank)
{
        if (job->scenario == NO_TOKENS || (job->scenario == ZERO_TOKEN_RANK && rank % 2 == 0))
                return 0;
        return 5 + 3 * rank;
}

/* The expert of pair (t, k) of a rank: every rank can compute everyone's. */
static int32_t expert_of(const struct job *job, uint32_t rank, size_t t, uint32_t k)
{
        const uint32_t n = job->n_experts;
        const uint32_t spread = (uint32_t)(rank * 7 + t * 3 + k * (n / job->top_k)) % n;

        switch (job->scenario) {
        case HOT_EXPERT:
                return (int32_t)(k == 0 ? n / 2 : (n / 2 + 1 + spread % (n - 1)) % n);
        case HOT_RANK:
                return (int32_t)((n - 4 + (t + 2 * k) % 4) % n);
        case ZERO_TOKEN_EXPERT:
                return (int32_t)(spread == 1 ? 0 : spread);
        case ALL_EXPERTS:
                return (int32_t)((t + k) % n);
        case ONE_TAKES_ALL:
                return (int32_t)n - 1;
        default:
                return (int32_t)spread;
        }
}

/* A small whole number for element h of token t: distinct tokens differ. */
static double token_value(uint32_t rank, size_t t, size_t h)
{
        return (double)((rank * 64 + t) * 8 + h) - 900;
}

/* Multiples of 1/8 that differ along k. */
static double weight_value(uint32_t rank, size_t t, uint32_t k)
{
        return (double)((rank + 3 * t + 5 * k) % 16) / 8 - 0.875;
}

/* What the other side of an inner product holds: for tokens, and for expert rows by position. */
static double probe_value(uint32_t rank, size_t row, size_t h)
{
        return (double)((rank * 31 + row * 17 + h * 5) % 41) - 20;
}

/* What expert @e makes of a value: not exact, so that the order of sums shows. */
static double expert_value(enum ae_real real, uint32_t e, double value)
{
        const double factor = 0.1 * (double)(e + 1);

        return real == AE_REAL_F32 ? (double)((float)factor * (float)value) : factor * value;
}

/* Where a row that one rank holds for its experts comes from. */
struct origin {
        uint32_t rank, k, expert;
        size_t t;
};

/* One rank's state in a body; arrays have room for everything of the scenario. */
struct bench {
        const struct local_rank *self;
        struct job *job;
        struct ae_plan plan;
        struct ae_dispatch dispatch;
        struct ae_dispatch_call call;
        size_t n_tokens;
        int32_t *idx;
        struct origin *origins; /* of the expert rows, by the oracle */
        size_t n_rows;
        void *tokens, *rows, *weight, *kept, *out; /* of job->real */
        void *drows, *dtokens, *dweight;
};

static double get(const struct bench *b, const void *data, size_t i)
{
        return ae_real_get(b->job->real, data, i);
}

static void set(const struct bench *b, void *data, size_t i, double value)
{
        ae_real_set(b->job->real, data, i, value);
}

/* The expert rows this rank must receive: by expert, then source position, then flat order. */
static void list_origins(struct bench *b)
{
        const struct local_rank *self = b->self;
        const struct ae_group_topology *topology = self->topology;
        const uint32_t group = ae_group_ep_index(topology, self->rank);
        const uint32_t n_local = b->job->n_experts / topology->ep_size;
        const uint32_t first = ae_group_expert_first(topology, b->job->n_experts,
                                                     ae_group_ep_rank(topology, self->rank));

        for (uint32_t e = first; e < first + n_local; e++) {
                for (uint32_t p = 0; p < topology->ep_size; p++) {
                        const uint32_t rank = ae_group_ep_member(topology, group, p);

                        for (size_t i = 0; i < tokens_of(b->job, rank) * b->job->top_k; i++) {
                                const size_t t = i / b->job->top_k;
                                const uint32_t k = (uint32_t)(i % b->job->top_k);

                                if (expert_of(b->job, rank, t, k) == (int32_t)e)
                                        b->origins[b->n_rows++] = (struct origin){ rank, k, e, t };
                        }
                }
        }
}

static void *array(const struct bench *b, size_t n)
{
        return calloc(n + 1, b->job->real);
}

static int bench_init(struct bench *b, const struct local_rank *self, struct job *job)
{
        size_t n_all = 0, n_sent;

        *b = (struct bench){ .self = self, .job = job, .n_tokens = tokens_of(job, self->rank) };
        for (uint32_t r = 0; r < self->topology->world; r++)
                n_all += tokens_of(job, r) * job->top_k;
        n_sent = b->n_tokens * job->top_k;
        b->idx = calloc(n_sent + 1, sizeof(*b->idx));
        b->origins = calloc(n_all + 1, sizeof(*b->origins));
        list_origins(b);
        b->tokens = array(b, b->n_tokens * WIDTH);
        b->out = array(b, b->n_tokens * WIDTH);
        b->dtokens = array(b, b->n_tokens * WIDTH);
        b->weight = array(b, n_sent);
        b->dweight = array(b, n_sent);
        b->kept = array(b, n_sent * WIDTH);
        b->rows = array(b, b->n_rows * WIDTH);
        b->drows = array(b, b->n_rows * WIDTH);
        for (size_t i = 0; i < n_sent; i++) {
                const uint32_t k = (uint32_t)(i % job->top_k);

                b->idx[i] = expert_of(job, self->rank, i / job->top_k, k);
                set(b, b->weight, i, weight_value(self->rank, i / job->top_k, k));
        }
        for (size_t i = 0; i < b->n_tokens * WIDTH; i++)
                set(b, b->tokens, i, token_value(self->rank, i / WIDTH, i % WIDTH));
        b->call = (struct ae_dispatch_call){ .ep = self->ep, .plan = &b->plan, .real = job->real,
                                             .width = WIDTH, .deadline_ns = self->deadline_ns };
        return ae_plan_init(&b->plan, self->topology, job->n_experts, job->top_k);
}

static void bench_deinit(struct bench *b)
{
        void *const owned[] = { b->idx, b->origins, b->tokens, b->rows, b->weight, b->kept, b->out,
                                b->drows, b->dtokens, b->dweight };

        for (size_t i = 0; i < AE_ARRAY_LEN(owned); i++)
                free(owned[i]);
        ae_plan_deinit(&b->plan);
        ae_dispatch_deinit(&b->dispatch);
}

static int differ(const struct bench *b, const char *what, size_t i, double got, double want)
{
        return ae_fail(AE_EMISMATCH, "%s, world %u, ep %u, order %u: %s %zu is %.17g, not %.17g",
                       scenario_names[b->job->scenario], b->self->topology->world,
                       b->self->topology->ep_size, b->self->topology->order, what, i, got, want);
}

#define CHECK(b, what, i, got, want)                                                              \
        do {                                                                                      \
                const double got_ = (double)(got), want_ = (double)(want);                        \
                if (got_ != want_)                                                                \
                        return differ(b, what, i, got_, want_);                                   \
        } while (0)

static int check_slots(const struct bench *b)
{
        const size_t n = b->n_tokens * b->job->top_k;

        for (size_t i = 0; i < n; i++) {
                size_t before = 0;

                for (size_t j = 0; j < n; j++)
                        before += b->idx[j] < b->idx[i] || (b->idx[j] == b->idx[i] && j < i);
                CHECK(b, "slot", i, ae_plan_slots(&b->plan)[i], before);
        }
        return 0;
}

static int check_plan(const struct bench *b)
{
        const struct ae_plan *plan = &b->plan;
        uint64_t *per_expert = plan->expert_first;

        CHECK(b, "received rows", 0, plan->n_rows, b->n_rows);
        CHECK(b, "sent rows", 0, plan->n_sent, b->n_tokens * b->job->top_k);
        for (uint32_t e = 0; e < plan->n_local; e++) {
                for (uint64_t j = per_expert[e]; j < per_expert[e + 1]; j++)
                        CHECK(b, "expert of row", j, b->origins[j].expert % plan->n_local, e);
        }
        CHECK(b, "end of the last expert", 0, per_expert[plan->n_local], b->n_rows);
        return check_slots(b);
}

static int check_dispatch(struct bench *b)
{
        int r = ae_dispatch_forward(&b->dispatch, &b->call, b->tokens, b->rows);

        for (size_t i = 0; r == 0 && i < b->n_rows * WIDTH; i++) {
                const struct origin *from = &b->origins[i / WIDTH];

                CHECK(b, "dispatched element", i, get(b, b->rows, i),
                      token_value(from->rank, from->t, i % WIDTH));
        }
        return r;
}

/* Rows go back unchanged: unpermute undoes permute, and the backward adds the K copies. */
static int check_identity(struct bench *b)
{
        const uint32_t top_k = b->job->top_k;
        struct ae_combine combine = { .rows = b->rows, .weight = b->weight, .kept = b->kept,
                                      .out = b->out };
        int r = ae_combine_forward(&b->dispatch, &b->call, &combine);

        if (r == 0)
                r = ae_dispatch_backward(&b->dispatch, &b->call, b->rows, b->dtokens);
        for (size_t i = 0; r == 0 && i < b->n_tokens * top_k; i++) {
                for (size_t h = 0; h < WIDTH; h++)
                        CHECK(b, "returned row of pair", i,
                              get(b, b->kept, ae_plan_slots(&b->plan)[i] * WIDTH + h),
                              token_value(b->self->rank, i / top_k, h));
        }
        for (size_t i = 0; r == 0 && i < b->n_tokens * WIDTH; i++)
                CHECK(b, "token gradient", i, get(b, b->dtokens, i),
                      top_k * token_value(b->self->rank, i / WIDTH, i % WIDTH));
        return r;
}

/* The weighted sum of element @h of token @t in k order, in the element's type. */
static double ordered_sum(const struct bench *b, size_t t, size_t h)
{
        const uint32_t rank = b->self->rank;
        float sum_f32 = 0;
        double sum = 0;

        for (uint32_t k = 0; k < b->job->top_k; k++) {
                const double row = expert_value(b->job->real,
                                                (uint32_t)expert_of(b->job, rank, t, k),
                                                token_value(rank, t, h));
                const double weight = weight_value(rank, t, k);

                sum_f32 = k ? sum_f32 + (float)weight * (float)row : (float)weight * (float)row;
                sum = k ? sum + weight * row : weight * row;
        }
        return b->job->real == AE_REAL_F32 ? (double)sum_f32 : sum;
}

static int check_combine(struct bench *b)
{
        struct ae_combine combine = { .rows = b->rows, .weight = b->weight, .kept = b->kept,
                                      .out = b->out };
        int r;

        for (size_t i = 0; i < b->n_rows * WIDTH; i++) {
                const struct origin *from = &b->origins[i / WIDTH];

                set(b, b->rows, i, expert_value(b->job->real, from->expert,
                                                token_value(from->rank, from->t, i % WIDTH)));
        }
        r = ae_combine_forward(&b->dispatch, &b->call, &combine);
        for (size_t i = 0; r == 0 && i < b->n_tokens * WIDTH; i++)
                CHECK(b, "combined element", i, get(b, b->out, i),
                      ordered_sum(b, i / WIDTH, i % WIDTH));
        return r;
}

/* <dispatch(x), y> = <x, dispatch'(y)>, summed over ranks by the main thread. */
static int probe_dispatch(struct bench *b)
{
        struct job *job = b->job;
        const uint32_t rank = b->self->rank;
        int r = ae_dispatch_forward(&b->dispatch, &b->call, b->tokens, b->rows);

        for (size_t i = 0; i < b->n_rows * WIDTH; i++) {
                const double y = probe_value(rank, i / WIDTH, i % WIDTH);

                job->dispatch_lhs[rank] += get(b, b->rows, i) * y;
                set(b, b->drows, i, y);
        }
        if (r == 0)
                r = ae_dispatch_backward(&b->dispatch, &b->call, b->drows, b->dtokens);
        for (size_t i = 0; i < b->n_tokens * WIDTH; i++)
                job->dispatch_rhs[rank] += get(b, b->tokens, i) * get(b, b->dtokens, i);
        return r;
}

/* <combine(y, w), z> = <y, combine'_y(z)> = <w, combine'_w(z)>. */
static int probe_combine(struct bench *b)
{
        struct job *job = b->job;
        const uint32_t rank = b->self->rank;
        struct ae_combine combine = { .rows = b->rows, .weight = b->weight, .kept = b->kept,
                                      .out = b->out };
        struct ae_combine_grads grads = { .dout = b->dtokens, .weight = b->weight,
                                          .kept = b->kept, .drows = b->drows,
                                          .dweight = b->dweight };
        int r = ae_combine_forward(&b->dispatch, &b->call, &combine);

        for (size_t i = 0; i < b->n_tokens * WIDTH; i++) {
                const double z = probe_value(rank + 1, i / WIDTH, i % WIDTH);

                job->combine_lhs[rank] += get(b, b->out, i) * z;
                set(b, b->dtokens, i, z);
        }
        if (r == 0)
                r = ae_combine_backward(&b->dispatch, &b->call, &grads);
        for (size_t i = 0; i < b->n_rows * WIDTH; i++)
                job->combine_rhs[rank] += get(b, b->rows, i) * get(b, b->drows, i);
        for (size_t i = 0; i < b->n_tokens * job->top_k; i++)
                job->weight_rhs[rank] += get(b, b->weight, i) * get(b, b->dweight, i);
        return r;
}

static int run_checks(struct bench *b)
{
        int (*const checks[])(struct bench *bench) = { check_dispatch, check_identity,
                                                       check_combine };
        int r = ae_plan_build(&b->plan, b->self->ep, b->idx, b->n_tokens, b->self->deadline_ns);

        if (r == 0)
                r = check_plan(b);
        for (size_t i = 0; r == 0 && i < AE_ARRAY_LEN(checks); i++)
                r = checks[i](b);
        return r;
}

/* The second time nothing grows. */
static int run_twice(struct bench *b)
{
        struct ae_dispatch grown;
        void *slots;
        int r = run_checks(b);

        if (r < 0)
                return r;
        grown = b->dispatch;
        slots = b->plan.slots.data;
        r = ae_plan_build(&b->plan, b->self->ep, b->idx, b->n_tokens, b->self->deadline_ns);
        if (r == 0)
                r = check_plan(b);
        if (r == 0)
                r = check_dispatch(b);
        if (r == 0)
                r = check_combine(b);
        if (r == 0 && (memcmp(&grown, &b->dispatch, sizeof(grown)) != 0 ||
                       slots != b->plan.slots.data))
                return ae_fail(AE_ESTATE, "the workspace grew again for the same exchange");
        return r;
}

#define N_REALS 2

/* Every scenario in both types; the threads of a world go through all of them. */
struct jobs {
        struct job jobs[N_SCENARIOS][N_REALS];
};

static void set_up_all(struct jobs *jobs, const struct ae_group_topology *topology)
{
        static const enum ae_real reals[N_REALS] = { AE_REAL_F32, AE_REAL_F64 };

        *jobs = (struct jobs){ 0 };
        for (int i = 0; i < N_SCENARIOS * N_REALS; i++) {
                struct job *job = &jobs->jobs[i / N_REALS][i % N_REALS];

                job->scenario = (enum scenario)(i / N_REALS);
                job->real = reals[i % N_REALS];
                set_up(job, topology);
        }
}

static int with_bench(const struct local_rank *self, struct job *job,
                      int (*run)(struct bench *bench))
{
        struct bench b;
        int r = bench_init(&b, self, job);

        if (r == 0)
                r = run(&b);
        bench_deinit(&b);
        return r;
}

static int oracle_body(const struct local_rank *self)
{
        struct jobs *jobs = self->arg;
        int r = 0;

        for (int i = 0; r == 0 && i < N_SCENARIOS * N_REALS; i++)
                r = with_bench(self, &jobs->jobs[i / N_REALS][i % N_REALS], run_twice);
        return r;
}

static void run_oracle(uint32_t world, uint32_t ep_size, uint32_t order)
{
        struct ae_group_topology topology;
        struct jobs jobs;

        assert_int_equal(ae_group_init(world, ep_size, order, &topology), 0);
        set_up_all(&jobs, &topology);
        if (local_world_run(&topology, oracle_body, &jobs) < 0)
                fail_msg("%s", ae_error_text());
}

static void scenarios_match_the_oracle(void **state)
{
        static const uint32_t worlds[][2] = { { 1, 1 }, { 2, 1 }, { 2, 2 }, { 3, 3 }, { 4, 2 },
                                              { 5, 5 }, { 6, 2 }, { 6, 3 }, { 7, 7 }, { 8, 2 },
                                              { 8, 4 }, { 8, 8 } };

        (void)state;
        for (size_t w = 0; w < AE_ARRAY_LEN(worlds); w++) {
                run_oracle(worlds[w][0], worlds[w][1], AE_ORDER_ED);
                run_oracle(worlds[w][0], worlds[w][1], AE_ORDER_DE);
        }
}

static int probe(struct bench *b)
{
        int r = ae_plan_build(&b->plan, b->self->ep, b->idx, b->n_tokens, b->self->deadline_ns);

        if (r == 0)
                r = probe_dispatch(b);
        return r == 0 ? probe_combine(b) : r;
}

static int adjoint_body(const struct local_rank *self)
{
        struct jobs *jobs = self->arg;
        int r = 0;

        for (int i = 0; r == 0 && i < N_SCENARIOS * N_REALS; i++)
                r = with_bench(self, &jobs->jobs[i / N_REALS][i % N_REALS], probe);
        return r;
}

static double sum8(const double *values)
{
        double sum = 0;

        for (size_t i = 0; i < 8; i++)
                sum += values[i];
        return sum;
}

static void check_adjoint(const struct job *job)
{
        assert_true(sum8(job->dispatch_lhs) == sum8(job->dispatch_rhs));
        assert_true(sum8(job->combine_lhs) == sum8(job->combine_rhs));
        assert_true(sum8(job->combine_lhs) == sum8(job->weight_rhs));
        if (job->scenario != NO_TOKENS)
                assert_true(sum8(job->dispatch_lhs) != 0 && sum8(job->combine_lhs) != 0);
}

/* Whole numbers and eighths: both sides are exact, in fp32 too, so they are equal. */
static void combine_and_dispatch_have_adjoints(void **state)
{
        struct ae_group_topology topology;
        struct jobs jobs;

        (void)state;
        assert_int_equal(ae_group_init(8, 4, AE_ORDER_DE, &topology), 0);
        set_up_all(&jobs, &topology);
        if (local_world_run(&topology, adjoint_body, &jobs) < 0)
                fail_msg("%s", ae_error_text());
        for (int i = 0; i < N_SCENARIOS * N_REALS; i++)
                check_adjoint(&jobs.jobs[i / N_REALS][i % N_REALS]);
}

static int wrong_index_body(const struct local_rank *self)
{
        static const int32_t wrong[2][4] = { { 0, 1, 2, 4 }, { 0, -1, 2, 3 } };
        struct ae_plan plan = { 0 };
        int r = ae_plan_init(&plan, self->topology, 4, 2);

        if (r == 0)
                r = ae_plan_build(&plan, self->ep, wrong[*(int *)self->arg], 2,
                                  self->deadline_ns);
        ae_plan_deinit(&plan);
        return r;
}

static void a_wrong_expert_is_named(void **state)
{
        struct ae_group_topology topology;
        struct ae_plan plan;
        int which = 0;

        (void)state;
        assert_int_equal(ae_group_init(1, 1, AE_ORDER_ED, &topology), 0);
        assert_int_equal(local_world_run(&topology, wrong_index_body, &which), AE_EINVAL);
        assert_non_null(strstr(ae_error_text(), "token 1: its choice 1 is expert 4"));
        which = 1;
        assert_int_equal(local_world_run(&topology, wrong_index_body, &which), AE_EINVAL);
        assert_non_null(strstr(ae_error_text(), "token 0: its choice 1 is expert -1"));
        assert_int_equal(ae_plan_init(&plan, &topology, 4, 0), AE_EINVAL);
        assert_int_equal(ae_plan_init(&plan, &topology, 4, 5), AE_EINVAL);
        assert_int_equal(ae_group_init(3, 3, AE_ORDER_ED, &topology), 0);
        assert_int_equal(ae_plan_init(&plan, &topology, 4, 1), AE_EINVAL);
}

/* A backend that loses this rank's own counts and, if asked, a peer that announces too much. */
static bool peer_lies;

static int lying_alltoallv(struct ae_comm *comm, const void *send, const uint64_t *send_len,
                           void *recv, const uint64_t *recv_len, uint64_t deadline_ns)
{
        (void)send, (void)send_len, (void)deadline_ns;
        memset(recv, 0, comm->size * recv_len[0]);
        ((uint64_t *)recv)[2] = 7;
        ((uint64_t *)recv)[3] = peer_lies ? UINT64_MAX : 0;
        return 0;
}

static void impossible_counts_are_refused(void **state)
{
        static const struct ae_comm_ops ops = { .name = "lying", .alltoallv = lying_alltoallv };
        static const uint32_t ranks[2] = { 4, 6 };
        static const int32_t idx[1] = { 0 };
        struct ae_group_topology topology;
        struct ae_plan plan;
        struct ae_comm comm;

        (void)state;
        assert_int_equal(ae_group_init(2, 2, AE_ORDER_ED, &topology), 0);
        assert_int_equal(ae_plan_init(&plan, &topology, 4, 1), 0);
        assert_int_equal(ae_comm_init(&comm, &ops, ranks, 2, 0), 0);
        peer_lies = true;
        assert_int_equal(ae_plan_build(&plan, &comm, idx, 1, 0), AE_EPROTO);
        assert_non_null(strstr(ae_error_text(), "rank 6"));
        assert_int_equal(plan.n_rows, 0);
        peer_lies = false;
        assert_int_equal(ae_plan_build(&plan, &comm, idx, 1, 0), AE_EPROTO);
        assert_non_null(strstr(ae_error_text(), "rank 4 sent to itself"));
        assert_int_equal(ae_plan_build(&plan, &comm, idx, SIZE_MAX, 0), AE_EOVERFLOW);
        ae_comm_deinit(&comm);
        ae_plan_deinit(&plan);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(scenarios_match_the_oracle),
                cmocka_unit_test(combine_and_dispatch_have_adjoints),
                cmocka_unit_test(a_wrong_expert_is_named),
                cmocka_unit_test(impossible_counts_are_refused),
        };

        return cmocka_run_group_tests_name("dispatch", tests, NULL, NULL);
}
