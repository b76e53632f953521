/* SPDX-License-Identifier: Apache-2.0 */
/* What a handle can be asked without waiting: names, facts about the job, figures. Any thread. */
#include "client/error.h"
#include "client/handle.h"

#include <stdio.h>

uint32_t autoep_unit(const autoep *h, const char *name)
{
        if (ae_handle_enter(h) < 0 || !name)
                return AUTOEP_NONE;
        return ae_layout_find_unit(h->layout, name);
}

uint32_t autoep_tensor(const autoep *h, const char *name)
{
        if (ae_handle_enter(h) < 0 || !name)
                return AUTOEP_NONE;
        return ae_layout_find_tensor(h->layout, name);
}

static void fill_job(const struct autoep *h, struct autoep_info *info)
{
        const struct ae_group_topology *t = &h->topology;

        info->ep_size = t->ep_size;
        info->edp_size = t->edp_size;
        if (!h->reader) {
                info->ep_rank = ae_group_ep_rank(t, h->rank);
                info->edp_rank = ae_group_edp_rank(t, h->rank);
        }
        info->n_units = h->layout->n_units;
        info->n_tensors = h->layout->n_tensors;
        info->version = atomic_load_explicit(&h->params->job_version, memory_order_acquire);
        info->round = ae_handle_round(h);
        info->epoch = atomic_load_explicit(&h->params->epoch, memory_order_acquire);
}

/* Before registration too: where the process is, with zeros for what isn't known yet. */
static int get_info(const struct autoep *h, struct autoep_info *ret_info)
{
        struct autoep_info info = { .size = sizeof(info) };
        int r = ae_handle_enter(h);
        bool is_new = h && r == AE_ESTATE && atomic_load(&h->gate) == AE_GATE_NEW;

        if (r < 0 && !is_new)
                return r;
        if (!ret_info)
                return ae_fail(AE_EINVAL, "there is no struct to fill");
        r = ae_check_size("autoep_info", ret_info->size, sizeof(*ret_info));
        if (r < 0)
                return r;
        info.rank = h->rank;
        info.world = h->world;
        info.node = h->node;
        info.n_nodes = h->n_nodes;
        (void)snprintf(info.transport, sizeof(info.transport), "%s", h->transport);
        if (!is_new)
                fill_job(h, &info);
        *ret_info = info;
        return 0;
}

int autoep_info(const autoep *h, struct autoep_info *ret_info)
{
        return ae_api("autoep_info", get_info(h, ret_info));
}

static uint64_t figure(const _Atomic uint64_t *counter)
{
        return atomic_load_explicit(counter, memory_order_relaxed);
}

static int get_stats(const struct autoep *h, struct autoep_stats *ret_stats)
{
        const struct ae_counters *c;
        int r = ae_handle_enter(h);

        if (r < 0)
                return r;
        if (!ret_stats)
                return ae_fail(AE_EINVAL, "there is no struct to fill");
        r = ae_check_size("autoep_stats", ret_stats->size, sizeof(*ret_stats));
        if (r < 0)
                return r;
        c = &h->counters;
        *ret_stats = (struct autoep_stats){
                .size = sizeof(*ret_stats),
                .gathers = figure(&c->gathers),
                .gather_hits = figure(&c->gather_hits),
                .gather_len = figure(&c->gather_len),
                .gather_wait_ns = figure(&c->gather_wait_ns),
                .scatters = figure(&c->scatters),
                .scatter_len = figure(&c->scatter_len),
                .scatter_wait_ns = figure(&c->scatter_wait_ns),
                .exchanges = figure(&c->exchanges),
                .exchange_len = figure(&c->exchange_len),
                .exchange_wait_ns = figure(&c->exchange_wait_ns),
                .steps = figure(&c->steps),
                .step_wait_ns = figure(&c->step_wait_ns),
                .node_gather_recv_len = figure(&h->params->gather_recv_len),
                .node_scatter_sent_len = figure(&h->params->scatter_sent_len),
                .node_exchange_sent_len = figure(&h->params->exchange_sent_len),
                .node_messages_sent = figure(&h->params->messages_sent),
        };
        return 0;
}

int autoep_stats(const autoep *h, struct autoep_stats *ret_stats)
{
        return ae_api("autoep_stats", get_stats(h, ret_stats));
}
