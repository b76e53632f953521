/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The order of a group's collectives. Every rank sends to every other in each exchange, so a daemon
 * with a member of a group sees the headers of all its ranks, without a message of its own. The
 * first announcement of each number fixes what it is; a rank that says otherwise fails the job, so
 * that all hear of it. A rank can be ahead of another by one exchange at most, for it needs a
 * block of everyone: four numbers per group are more than can be open.
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <assert.h>
#include <string.h>

#define OPEN_MAX 4u /* exchanges of one group that are kept */

struct ae_order {
        struct ae_local_xhead first[OPEN_MAX]; /* by number % OPEN_MAX; magic is 0 at first */
};

/* The groups by index: EP groups, then EDP groups, then the world. */
static uint32_t n_orders(const struct ae_group_topology *t)
{
        return t->edp_size + t->ep_size + 1;
}

/* False when @dst is not in @src's group of that kind. */
static bool find(const struct ae_job *job, const struct ae_local_xhead *head, uint32_t src,
                 uint32_t dst, struct ae_order **ret_order)
{
        const struct ae_group_topology *t = &job->topology;
        uint32_t of_src[] = { ae_group_ep_index(t, src), ae_group_edp_index(t, src), 0 };
        uint32_t of_dst[] = { ae_group_ep_index(t, dst), ae_group_edp_index(t, dst), 0 };
        uint32_t base[] = { 0, t->edp_size, t->edp_size + t->ep_size };

        static_assert(AE_ARRAY_LEN(base) == AE_LOCAL_XGROUPS, "one each");
        if (head->group >= AE_LOCAL_XGROUPS || of_src[head->group] != of_dst[head->group])
                return false;
        assert(base[head->group] + of_src[head->group] < n_orders(t));
        *ret_order = &job->orders[base[head->group] + of_src[head->group]];
        return true;
}

void ae_order_see(struct ae_job *job, const void *message, uint32_t src, uint32_t dst)
{
        char first_text[AE_LOCAL_XTEXT], text[AE_LOCAL_XTEXT];
        struct ae_local_xhead head, *first;
        struct ae_order *order;

        memcpy(&head, message, sizeof(head)); /* shared with the sender: looked at once */
        /* What is no header is refused by the library that receives it, which names the sender. */
        if (head.magic != AE_LOCAL_MAGIC || !find(job, &head, src, dst, &order))
                return;
        head.src = (uint16_t)src;
        first = &order->first[head.seq % OPEN_MAX];
        if (first->magic == 0 || head.seq > first->seq) {
                *first = head;
                return;
        }
        if (!ae_local_same_collective(&head, first))
                ae_job_fail(job, AE_EMISMATCH,
                            "rank %u calls %s in round %llu, rank %u %s in round %llu: all must "
                            "call in the same order", src,
                            ae_local_print_collective(&head, text),
                            (unsigned long long)head.round, first->src,
                            ae_local_print_collective(first, first_text),
                            (unsigned long long)first->round);
}

void ae_order_init(struct ae_job *job)
{
        job->orders = ae_table_new(job->core, n_orders(&job->topology), sizeof(*job->orders));
}

void ae_order_deinit(struct ae_job *job)
{
        job->orders = ae_table_free(job->core, job->orders);
}
