/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Exchange plans: histogram, prefix sums and a stable scatter, all in integers, so that the same
 * routing gives the same permutation everywhere. Runs on the caller's thread.
 */
#include "client/experts/plan.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

int ae_plan_init(struct ae_plan *plan, const struct ae_group_topology *topology,
                 uint32_t n_experts, uint32_t top_k)
{
        const uint32_t ep_size = topology->ep_size;
        struct ae_plan made = { .ep_size = ep_size, .n_experts = n_experts, .top_k = top_k };
        uint64_t *at;
        int r = ae_group_check_experts(topology, n_experts);

        if (r < 0)
                return r;
        if (top_k == 0 || top_k > n_experts)
                return ae_fail(AE_EINVAL, "top_k is %u: it must be 1..n_experts (%u)", top_k,
                               n_experts);
        made.n_local = n_experts / ep_size;
        at = calloc(3 * (size_t)n_experts + 4 * (size_t)ep_size + made.n_local + 1, sizeof(*at));
        if (!at)
                return ae_fail_sys(ENOMEM, "cannot prepare the exchange of a layer with %u experts",
                                   n_experts);
        made.memory = at;
        made.counts = at;
        made.recv_counts = made.counts + n_experts;
        made.run_first = made.recv_counts + n_experts;
        made.send_rows = made.run_first + n_experts;
        made.recv_rows = made.send_rows + ep_size;
        made.lens = made.recv_rows + ep_size;
        made.expert_first = made.lens + 2 * (size_t)ep_size;
        *plan = made;
        return 0;
}

void ae_plan_deinit(struct ae_plan *plan)
{
        ae_buffer_deinit(&plan->slots);
        free(plan->memory);
        *plan = (struct ae_plan){ 0 };
}

static void clear(struct ae_plan *plan)
{
        const size_t n_words = 3 * (size_t)plan->n_experts + 4 * (size_t)plan->ep_size +
                               plan->n_local + 1;

        memset(plan->memory, 0, n_words * sizeof(*plan->memory));
        plan->n_tokens = plan->n_sent = plan->n_rows = 0;
}

static int count_pairs(struct ae_plan *plan, const int32_t *idx, size_t n)
{
        for (size_t i = 0; i < n; i++) {
                if (idx[i] < 0 || (uint32_t)idx[i] >= plan->n_experts)
                        return ae_fail(AE_EINVAL,
                                       "cannot dispatch token %zu: its choice %zu is expert %d and "
                                       "the layer has %u",
                                       i / plan->top_k, i % plan->top_k, idx[i], plan->n_experts);
                plan->counts[idx[i]]++;
        }
        return 0;
}

/* Stable: pairs of one expert keep their flat order. Borrows run_first for the next free slots. */
static void sort_pairs(struct ae_plan *plan, const int32_t *idx, size_t n)
{
        uint32_t *slots = plan->slots.data;
        uint64_t *next = plan->run_first;
        uint64_t first = 0;

        for (uint32_t e = 0; e < plan->n_experts; e++) {
                next[e] = first;
                first += plan->counts[e];
                plan->send_rows[e / plan->n_local] += plan->counts[e];
        }
        assert(first == n);
        for (size_t i = 0; i < n; i++)
                slots[i] = (uint32_t)next[idx[i]]++;
}

static int exchange_counts(struct ae_plan *plan, struct ae_comm *ep, uint64_t deadline_ns)
{
        uint64_t *lens = plan->lens;

        for (uint32_t p = 0; p < plan->ep_size; p++)
                lens[p] = plan->n_local * sizeof(*plan->counts);
        return ae_comm_alltoallv(ep, plan->counts, lens, plan->recv_counts, lens, deadline_ns);
}

/*
 * Counts come from peers, so their sum is checked against the limit as it grows; and what this rank
 * sends to itself must have come back as it was, for the lengths of later exchanges rest on it.
 */
static int sum_received(struct ae_plan *plan, const struct ae_comm *ep)
{
        uint64_t total = 0;

        for (size_t i = 0; i < plan->n_experts; i++) {
                const uint32_t position = (uint32_t)(i / plan->n_local);
                const uint64_t count = plan->recv_counts[i];

                if (count > AE_PLAN_ROWS_MAX - total)
                        return ae_fail(AE_EPROTO,
                                       "cannot receive tokens: rank %u announces %llu rows for "
                                       "local expert %zu, beyond the limit of %u with those before",
                                       ep->ranks[position], (unsigned long long)count,
                                       i % plan->n_local, AE_PLAN_ROWS_MAX);
                total += count;
                plan->recv_rows[position] += count;
        }
        if (memcmp(plan->counts + (size_t)ep->position * plan->n_local,
                   plan->recv_counts + (size_t)ep->position * plan->n_local,
                   plan->n_local * sizeof(*plan->counts)) != 0)
                return ae_fail(AE_EPROTO,
                               "cannot receive tokens: the counts that rank %u sent to itself came "
                               "back changed",
                               ep->ranks[ep->position]);
        plan->n_rows = total;
        return 0;
}

static void place_runs(struct ae_plan *plan)
{
        uint64_t row = 0;

        for (uint32_t e = 0; e < plan->n_local; e++) {
                plan->expert_first[e] = row;
                for (uint32_t p = 0; p < plan->ep_size; p++) {
                        const size_t run = (size_t)p * plan->n_local + e;

                        plan->run_first[run] = row;
                        row += plan->recv_counts[run];
                }
        }
        plan->expert_first[plan->n_local] = row;
        assert(row == plan->n_rows);
}

static int build(struct ae_plan *plan, struct ae_comm *ep, const int32_t *idx, size_t n,
                 uint64_t deadline_ns)
{
        int r = count_pairs(plan, idx, n);

        if (r < 0)
                return r;
        r = ae_buffer_reserve(&plan->slots, n * sizeof(uint32_t));
        if (r < 0)
                return r;
        sort_pairs(plan, idx, n);
        r = exchange_counts(plan, ep, deadline_ns);
        if (r < 0)
                return r;
        r = sum_received(plan, ep);
        if (r < 0)
                return r;
        place_runs(plan);
        return 0;
}

int ae_plan_build(struct ae_plan *plan, struct ae_comm *ep, const int32_t *idx, size_t n_tokens,
                  uint64_t deadline_ns)
{
        size_t n;
        int r;

        assert(ep->size == plan->ep_size);
        clear(plan);
        if (ae_mul_overflows(n_tokens, (size_t)plan->top_k, &n) || n > AE_PLAN_ROWS_MAX)
                return ae_fail(AE_EOVERFLOW,
                               "cannot dispatch %zu tokens to %u experts each: more than %u rows",
                               n_tokens, plan->top_k, AE_PLAN_ROWS_MAX);
        r = build(plan, ep, idx, n, deadline_ns);
        if (r < 0) {
                clear(plan);
                return r;
        }
        plan->n_tokens = n_tokens;
        plan->n_sent = n;
        return 0;
}
