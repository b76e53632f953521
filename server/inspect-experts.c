/* SPDX-License-Identifier: Apache-2.0 */
/*
 * experts, groups and stats for autoep-ctl. Loop thread.
 *
 * A registration doesn't say which experts a tensor of class expert holds; two customs are
 * understood. One tensor per expert: its name has a part that is the expert's number behind a part
 * "expert" or "experts" ("layer.0.experts.7.up"), and the unit has as many experts as the highest
 * number says. Stacked: a tensor of two or more dimensions, the first of which counts the experts.
 * Tensors that fit neither have one row, in which expert and ranks are null.
 *
 * Load counts come per element of the buffers (autoep_step.counts). The k-th unit with experts is
 * the k-th buffer with one element per expert, in order of registration, when there are as many
 * such buffers as such units; otherwise nobody knows what is counted, and tokens is null.
 */
#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "server/inspect-private.h"

#include <assert.h>
#include <ctype.h>
#include <string.h>

/* ---- experts ---------------------------------------------------------------------------- */

#define NO_COUNTS UINT64_MAX
#define NUMBER_MAX 1000000u /* of an expert in a name */

/* A unit that has experts. */
struct layer {
        uint32_t n_experts;    /* 0: not known */
        uint64_t counts_first; /* in job->counts; NO_COUNTS: not counted */
};

/* The number behind "expert." or "experts."; AE_LAYOUT_NONE when the name has none. */
static uint32_t number_in(const char *name)
{
        for (const char *at = strstr(name, "expert"); at; at = strstr(at + 1, "expert")) {
                const char *number = at + strlen("expert");
                uint32_t value = 0;

                number += *number == 's';
                if ((at > name && at[-1] != '.') || *number != '.' ||
                    !isdigit((unsigned char)number[1]))
                        continue;
                for (number++; isdigit((unsigned char)*number) && value < NUMBER_MAX; number++)
                        value = 10 * value + (uint32_t)(*number - '0');
                if ((!*number || *number == '.') && value < NUMBER_MAX)
                        return value;
        }
        return AE_LAYOUT_NONE;
}

/* How many experts of its layer a tensor makes known. */
static uint32_t experts_known(const struct ae_layout_tensor *tensor)
{
        uint32_t number = number_in(tensor->name);

        if (number != AE_LAYOUT_NONE)
                return number + 1;
        return tensor->n_dims >= 2 && tensor->dims[0] <= UINT32_MAX ? (uint32_t)tensor->dims[0] : 0;
}

/* Of the units that have experts: their common number of experts, 0 when they differ. */
static uint32_t find_layers(const struct ae_layout *layout, struct layer *layers,
                            uint32_t *ret_n_layers)
{
        uint32_t common = 0;
        bool same = true;

        *ret_n_layers = 0;
        for (uint32_t u = 0; u < layout->n_units; u++)
                layers[u] = (struct layer){ .counts_first = NO_COUNTS };
        for (uint32_t t = 0; t < layout->n_tensors; t++) {
                struct layer *layer = &layers[layout->tensors[t].unit];

                if (layout->tensors[t].class == AE_CLASS_EXPERT)
                        layer->n_experts = AE_MAX(layer->n_experts,
                                                  experts_known(&layout->tensors[t]));
        }
        for (uint32_t u = 0; u < layout->n_units; u++) {
                if (!layers[u].n_experts)
                        continue;
                ++*ret_n_layers;
                same &= !common || common == layers[u].n_experts;
                common = layers[u].n_experts;
        }
        return same ? common : 0;
}

static bool is_count_buffer(const struct ae_layout_tensor *tensor, uint32_t n_experts)
{
        return tensor->class == AE_CLASS_BUFFER && tensor->home == tensor->id &&
               tensor->n == n_experts;
}

/* Finds each layer's counts among those of the last step, see the head of the file. */
static void map_counts(const struct ae_job *job, struct layer *layers, uint32_t n_layers,
                       uint32_t n_experts)
{
        const struct ae_layout *layout = job->layout;
        uint32_t n_buffers = 0, u = 0;
        uint64_t first = 0;

        for (uint32_t t = 0; t < layout->n_tensors; t++)
                n_buffers += is_count_buffer(&layout->tensors[t], n_experts);
        if (!n_experts || n_buffers != n_layers || !job->n_counts ||
            job->verdict.kind != AE_VERDICT_APPLIED)
                return;
        assert(job->n_counts == job->n_buffer_counts);
        for (uint32_t t = 0; t < layout->n_tensors; t++) {
                const struct ae_layout_tensor *tensor = &layout->tensors[t];

                if (is_count_buffer(tensor, n_experts)) {
                        while (!layers[u].n_experts)
                                u++;
                        layers[u++].counts_first = first;
                        assert(first + n_experts <= job->n_counts);
                }
                if (tensor->class == AE_CLASS_BUFFER && tensor->home == t)
                        first += tensor->n;
        }
}

/* The ranks that hold @expert, in order; null when the groups don't divide the experts. */
static void put_holders(struct ae_json *json, const struct ae_job *job, uint32_t n_experts,
                        uint32_t expert)
{
        const struct ae_group_topology *topology = &job->topology;
        uint32_t home;

        if (!topology->ep_size || expert >= n_experts || n_experts % topology->ep_size != 0) {
                ae_inspect_put_null(json, "ranks");
                return;
        }
        home = ae_group_expert_home(topology, n_experts, expert);
        ae_json_key(json, "ranks");
        ae_json_array_begin(json);
        for (uint32_t i = 0; i < topology->edp_size; i++)
                ae_json_u64(json, ae_group_edp_member(topology, home, i));
        ae_json_array_end(json);
}

/* @expert: AE_LAYOUT_NONE when it isn't known. */
static void put_expert(struct ae_inspect_query *query, const struct ae_layout_tensor *tensor,
                       const struct layer *layer, uint32_t expert)
{
        const struct ae_job *job = query->job;
        struct ae_json *json = &query->json;
        bool known = expert != AE_LAYOUT_NONE;

        ae_json_object_begin(json);
        ae_json_put_string(json, "unit", job->layout->units[tensor->unit].name);
        ae_json_put_string(json, "tensor", tensor->name);
        if (known)
                ae_json_put_u64(json, "expert", expert);
        else
                ae_inspect_put_null(json, "expert");
        put_holders(json, job, layer->n_experts, expert);
        if (known && layer->counts_first != NO_COUNTS)
                ae_inspect_put_u64(json, "tokens", job->counts[layer->counts_first + expert]);
        else
                ae_inspect_put_null(json, "tokens");
        ae_json_object_end(json);
}

static void put_experts_of(struct ae_inspect_query *query, uint32_t id, const struct layer *layers)
{
        const struct ae_layout_tensor *tensor = &query->job->layout->tensors[id];
        const struct layer *layer = &layers[tensor->unit];
        uint32_t number = number_in(tensor->name);
        uint32_t n = experts_known(tensor);

        if (number != AE_LAYOUT_NONE || n == 0) {
                put_expert(query, tensor, layer, number);
                return;
        }
        for (uint32_t expert = 0; expert < n && !ae_inspect_full(query); expert++)
                put_expert(query, tensor, layer, expert);
}

static void put_all_experts(struct ae_inspect_query *query)
{
        const struct ae_layout *layout = query->job->layout;
        AE_CLEANUP(ae_cleanup_free) struct layer *layers = NULL;
        uint32_t n_layers, n_experts;

        layers = ae_core_alloc(layout->n_units, sizeof(*layers));
        n_experts = find_layers(layout, layers, &n_layers);
        map_counts(query->job, layers, n_layers, n_experts);
        for (uint32_t t = 0; t < layout->n_tensors && !ae_inspect_full(query); t++) {
                if (layout->tensors[t].class == AE_CLASS_EXPERT &&
                    (query->tensor == AE_LAYOUT_NONE || query->tensor == t))
                        put_experts_of(query, t, layers);
        }
}

static void put_ep_size(struct ae_json *json, const struct ae_job *job)
{
        if (job->topology.ep_size)
                ae_json_put_u64(json, "ep_size", job->topology.ep_size);
        else
                ae_inspect_put_null(json, "ep_size"); /* no model yet */
}

void ae_inspect_experts(struct ae_inspect_query *query)
{
        struct ae_json *json = &query->json;

        put_ep_size(json, query->job);
        ae_json_key(json, "experts");
        ae_json_array_begin(json);
        if (query->job->layout)
                put_all_experts(query);
        ae_json_array_end(json);
}

/* ---- groups ----------------------------------------------------------------------------- */

static void group_begin(struct ae_json *json, const char *kind, uint32_t index)
{
        ae_json_object_begin(json);
        ae_json_put_string(json, "kind", kind);
        ae_json_put_u64(json, "index", index);
}

typedef uint32_t (*member_fn)(const struct ae_group_topology *topology, uint32_t index,
                              uint32_t position);

static void put_groups(struct ae_inspect_query *query, const char *kind, member_fn member,
                       uint32_t n_groups, uint32_t n_members)
{
        struct ae_json *json = &query->json;

        for (uint32_t i = 0; i < n_groups && !ae_inspect_full(query); i++) {
                group_begin(json, kind, i);
                ae_json_key(json, "ranks");
                ae_json_array_begin(json);
                for (uint32_t position = 0; position < n_members; position++)
                        ae_json_u64(json, member(&query->job->topology, i, position));
                ae_json_array_end(json);
                ae_json_object_end(json);
        }
}

static void put_sum_groups(struct ae_inspect_query *query)
{
        const struct ae_job *job = query->job;

        for (uint32_t i = 0; i < job->n_groups && !ae_inspect_full(query); i++) {
                group_begin(&query->json, "sum", i);
                ae_inspect_put_u32s(&query->json, "ranks", job->groups[i].ranks,
                                    job->groups[i].n_ranks);
                ae_json_object_end(&query->json);
        }
}

void ae_inspect_groups(struct ae_inspect_query *query)
{
        const struct ae_group_topology *topology = &query->job->topology;
        struct ae_json *json = &query->json;
        const char *order = topology->order == AE_ORDER_DE ? "d+e" : "e+d";

        ae_json_put_u64(json, "world", query->job->world);
        put_ep_size(json, query->job);
        ae_json_put_string(json, "order", topology->ep_size ? order : NULL);
        ae_json_key(json, "groups");
        ae_json_array_begin(json);
        put_groups(query, "ep", ae_group_ep_member, topology->edp_size, topology->ep_size);
        put_groups(query, "edp", ae_group_edp_member, topology->ep_size, topology->edp_size);
        put_sum_groups(query);
        ae_json_array_end(json);
}

/* ---- stats ------------------------------------------------------------------------------ */

/* All there is to count, taken at one moment. */
struct figures {
        struct ae_core_stats core;
        struct ae_net_stats net;
        uint64_t n_jobs, n_workers, n_peers_up;
};

static const struct stat_row {
        const char *name;
        size_t off;
        const char *unit;
        const char *help;
} stat_rows[] = {
#define STAT(name, member, unit, help) { name, offsetof(struct figures, member), unit, help }
        STAT("jobs", n_jobs, "count", "Jobs that this daemon hosts."),
        STAT("workers", n_workers, "count", "Processes attached to this daemon."),
        STAT("peers_up", n_peers_up, "count", "Other daemons that are connected."),
        STAT("memory_used", core.memory_len, "bytes", "Memory of all jobs."),
        STAT("memory_tables", core.tables_len, "bytes", "The daemon's own tables, beside that."),
        STAT("messages_sent", core.msgs_sent, "count", "Messages to other daemons."),
        STAT("messages_received", core.msgs_received, "count", "Messages from other daemons."),
        STAT("message_bytes_sent", net.msg_bytes_sent, "bytes", "Bytes of messages sent."),
        STAT("message_bytes_received", net.msg_bytes_received, "bytes",
             "Bytes of messages received."),
        STAT("puts_sent", net.puts_sent, "count", "Pieces put into other daemons' memory."),
        STAT("puts_received", net.puts_received, "count", "Pieces that other daemons put here."),
        STAT("put_bytes_sent", net.put_bytes_sent, "bytes",
             "Bytes put into other daemons' memory."),
        STAT("put_bytes_received", net.put_bytes_received, "bytes",
             "Bytes that other daemons put here."),
        STAT("late_puts", net.late_puts, "count",
             "Pieces that came for memory no longer granted and were dropped."),
        STAT("late_put_bytes", net.late_put_bytes, "bytes", "Bytes of late pieces."),
        STAT("handshakes_refused", net.refused, "count", "Connections refused at the handshake."),
#undef STAT
};

static void collect(const struct ae_inspect_query *query, struct figures *ret_figures)
{
        const struct ae_core *core = query->core;
        const struct ae_worker *worker;
        const struct ae_job *job;

        *ret_figures = (struct figures){ 0 };
        ae_core_stats(core, &ret_figures->core);
        ae_node_net_stats(query->inspect->node, &ret_figures->net);
        ae_list_for_each(job, &core->jobs, link)
                ret_figures->n_jobs += !job->released;
        ae_list_for_each(worker, &core->workers, link)
                ret_figures->n_workers++;
        for (uint32_t i = 0; i < core->options.n_nodes; i++)
                ret_figures->n_peers_up += i != core->options.node && core->peers[i].up;
}

static void stat_begin(struct ae_json *json, const char *name)
{
        ae_json_object_begin(json);
        ae_json_put_string(json, "name", name);
}

static void stat_end(struct ae_json *json, const char *unit, const char *help)
{
        ae_json_put_string(json, "unit", unit);
        ae_json_put_string(json, "help", help);
        ae_json_object_end(json);
}

void ae_inspect_stats(struct ae_inspect_query *query)
{
        struct ae_json *json = &query->json;
        struct figures figures;

        collect(query, &figures);
        ae_json_put_u64(json, "node", query->core->options.node);
        ae_json_key(json, "stats");
        ae_json_array_begin(json);
        stat_begin(json, "uptime");
        ae_json_put_double(json, "value", (double)query->inspect->uptime_ns / 1e9);
        stat_end(json, "seconds", "Time since this daemon started.");
        for (size_t i = 0; i < AE_ARRAY_LEN(stat_rows); i++) {
                const uint64_t *value = (const void *)((const char *)&figures + stat_rows[i].off);

                stat_begin(json, stat_rows[i].name);
                ae_inspect_put_u64(json, "value", *value);
                stat_end(json, stat_rows[i].unit, stat_rows[i].help);
        }
        ae_json_array_end(json);
}
