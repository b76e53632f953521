/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What came before its time: from a peer that heard of Start or Commit before us. A peer that keeps
 * the protocol has little to say then, so what is kept of one peer has a limit, and nothing is kept
 * longer than the connection that it came by. The core's thread.
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <stdlib.h>
#include <string.h>

void ae_ahead_init(struct ae_ahead *ahead, uint32_t n_nodes)
{
        ae_list_init(&ahead->list);
        ahead->n_nodes = n_nodes;
        ahead->lens = ae_core_alloc(n_nodes, sizeof(*ahead->lens));
}

void ae_ahead_deinit(struct ae_ahead *ahead)
{
        for (uint32_t node = 0; node < ahead->n_nodes; node++)
                ae_early_drop(ahead, node);
        free(ahead->lens);
}

static int keep(struct ae_ahead *ahead, const struct ae_early *what, const void *data)
{
        uint64_t len = sizeof(*what) + what->len;
        struct ae_early *early;

        if (ahead->lens[what->node] + len > AE_EARLY_MAX)
                return ae_fail(AE_EPROTO, "node %u is ahead by more than %llu bytes of messages",
                               what->node, (unsigned long long)AE_EARLY_MAX);
        ahead->lens[what->node] += len;
        early = ae_core_alloc(1, len);
        *early = *what;
        memcpy(early->data, data, what->len);
        ae_list_init(&early->link);
        ae_list_push(&ahead->list, &early->link);
        return 0;
}

int ae_early_msg(struct ae_ahead *ahead, uint32_t job, uint32_t node, const void *data,
                 size_t len)
{
        return keep(ahead, &(struct ae_early){ .node = node, .job = job, .len = len }, data);
}

int ae_early_note(struct ae_ahead *ahead, uint32_t node, uint64_t note, uint64_t off,
                  uint64_t len)
{
        const struct ae_early early = { .node = node, .job = ae_note_job(note), .notify = true,
                                        .note = note, .off = off, .put_len = len };

        return keep(ahead, &early, "");
}

static void move(struct ae_ahead *ahead, struct ae_early *early, struct ae_list *to)
{
        ahead->lens[early->node] -= sizeof(*early) + early->len;
        ae_list_unlink(&early->link);
        ae_list_push(to, &early->link);
}

void ae_early_take(struct ae_ahead *ahead, uint32_t job, struct ae_list *taken)
{
        struct ae_early *early;

        ae_list_for_each_safe(early, &ahead->list, link) {
                if (early->job == job)
                        move(ahead, early, taken);
        }
}

void ae_early_drop(struct ae_ahead *ahead, uint32_t node)
{
        struct ae_list dropped = AE_LIST_INIT(dropped);
        struct ae_early *early;
        struct ae_list *entry;

        ae_list_for_each_safe(early, &ahead->list, link) {
                if (early->node == node)
                        move(ahead, early, &dropped);
        }
        while ((entry = ae_list_pop(&dropped)))
                free(ae_list_entry(entry, struct ae_early, link));
}
