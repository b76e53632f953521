/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The plan of one token exchange in an EP group: a stable counting sort of a rank's (token, k)
 * pairs by expert, and the exchange of counts from which every rank knows what comes from where.
 * Dropless. Built once per layer and micro-batch and used by dispatch and combine, forward and
 * backward; nothing is exchanged again.
 *
 * Flat order: pair i = t * K + k. Sorted order: by global expert, in flat order within one; since
 * position p holds experts [p * E_local, (p + 1) * E_local), the rows for each position lie back to
 * back in position order. Received rows come source-major: by source position, in its sorted
 * order. Expert-major, what expert kernels work on: by local expert, then source position.
 *
 * A plan belongs to one thread; its arrays may be read by others while it is not being built.
 */
#pragma once

#include "client/experts/buffer.h"
#include "client/experts/comm.h"
#include "proto/wire/group.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AE_PLAN_ROWS_MAX UINT32_MAX /* rows that one rank sends or receives in one exchange */

struct ae_plan {
        uint32_t ep_size, n_experts, n_local, top_k;
        size_t n_tokens;       /* of this rank */
        size_t n_sent;         /* n_tokens * top_k */
        size_t n_rows;         /* rows received: the work of the local experts */
        uint64_t *counts;      /* [n_experts]: this rank's pairs by global expert */
        uint64_t *recv_counts; /* [ep_size][n_local]: rows by source position and local expert */
        uint64_t *send_rows;   /* [ep_size]: row sums of counts by position */
        uint64_t *recv_rows;   /* [ep_size] */
        uint64_t *expert_first; /* [n_local + 1]: first expert-major row of each local expert */
        uint64_t *run_first;   /* [ep_size][n_local]: first expert-major row of each run of rows
                                * from one source position for one local expert */
        struct ae_buffer slots; /* of uint32_t[n_sent], see ae_plan_slots() */
        uint64_t *lens;         /* [2 * ep_size], scratch of the count exchange */
        uint64_t *memory;       /* owned; all arrays above lie in it */
};

/*
 * For a layer of @n_experts with @top_k per token. AE_EINVAL when ep_size does not divide the
 * experts or top_k is not 1..n_experts; AE_ENOMEM. Deinit accepts a zeroed struct.
 */
int ae_plan_init(struct ae_plan *plan, const struct ae_group_topology *topology,
                 uint32_t n_experts, uint32_t top_k);
void ae_plan_deinit(struct ae_plan *plan);

/*
 * Plans the exchange of @n_tokens tokens with experts @idx ([n_tokens][top_k]) over the EP group
 * @ep, of the size and order that the plan was made for. Every rank of the group calls it, also
 * with 0 tokens. AE_EINVAL for an index that is no expert, AE_EOVERFLOW above AE_PLAN_ROWS_MAX
 * rows (both before the exchange, so that the others run into their deadline), AE_EPROTO for
 * counts from a peer that cannot be; errors of the exchange. After an error the plan is empty
 * until it is built again.
 */
int ae_plan_build(struct ae_plan *plan, struct ae_comm *ep, const int32_t *idx, size_t n_tokens,
                  uint64_t deadline_ns);

/* [n_sent]: where pair i stands in sorted order. */
static inline const uint32_t *ae_plan_slots(const struct ae_plan *plan)
{
        return plan->slots.data;
}

/* Whether source-major and expert-major are the same order. */
static inline bool ae_plan_is_grouped(const struct ae_plan *plan)
{
        return plan->ep_size == 1 || plan->n_local == 1;
}
