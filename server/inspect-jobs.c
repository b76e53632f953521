/* SPDX-License-Identifier: Apache-2.0 */
/*
 * status, nodes, jobs and workers for autoep-ctl. Loop thread. What only the decider or another
 * node knows is null elsewhere; nobody is asked for it.
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/inspect-private.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#ifndef AE_VERSION
#define AE_VERSION "unknown"
#endif

static const char *transport(const struct ae_inspect_query *query)
{
        return query->core->options.n_nodes > 1 ? query->core->options.transport : "none";
}

/* ---- nodes ------------------------------------------------------------------------------ */

static const char *node_state(const struct ae_node_peer_info *info)
{
        if (info->self)
                return "self";
        if (info->up)
                return "up";
        return info->incarnation ? "lost" : "connecting";
}

static void put_node(struct ae_inspect_query *query, uint32_t node)
{
        struct ae_json *json = &query->json;
        struct ae_node_peer_info info;
        char incarnation[17];

        ae_node_peer_info(query->inspect->node, node, &info);
        (void)snprintf(incarnation, sizeof(incarnation), "%016" PRIx64, info.incarnation);
        ae_json_object_begin(json);
        ae_json_put_u64(json, "id", node);
        ae_json_put_string(json, "state", node_state(&info));
        ae_json_put_string(json, "incarnation", info.self || info.incarnation ? incarnation : NULL);
        ae_json_put_string(json, "address",
                           info.self ? ae_node_address(query->inspect->node) : info.address);
        ae_json_put_string(json, "transport", transport(query));
        ae_inspect_put_u64(json, "sent_len", info.sent_len);
        ae_inspect_put_u64(json, "received_len", info.received_len);
        ae_json_object_end(json);
}

void ae_inspect_nodes(struct ae_inspect_query *query)
{
        ae_json_key(&query->json, "nodes");
        ae_json_array_begin(&query->json);
        for (uint32_t i = 0; i < query->core->options.n_nodes && !ae_inspect_full(query); i++)
                put_node(query, i);
        ae_json_array_end(&query->json);
}

/* ---- jobs ------------------------------------------------------------------------------- */

static bool somebody_left(const struct ae_job *job)
{
        const struct ae_worker *worker;

        if (ae_wait_n_present(job) < job->world)
                return true;
        ae_list_for_each(worker, &job->core->workers, link) {
                if (worker->job == job && !worker->reader && worker->left)
                        return true;
        }
        return false;
}

static const char *live_state(const struct ae_job *job)
{
        if (somebody_left(job))
                return "leaving";
        return job->n_closed || job->closed_since_ns || job->round_state != AE_ROUND_OPEN
                       ? "stepping"
                       : "running";
}

static const char *job_state(const struct ae_job *job)
{
        switch (job->state) {
        case AE_JOB_FORMING:
                return ae_core_is_decider(job->core) && job->n_joined == job->world ? "registering"
                                                                                    : "joining";
        case AE_JOB_STARTING:
        case AE_JOB_LOADING:
                return "registering";
        case AE_JOB_LIVE:
                return live_state(job);
        case AE_JOB_ENDED:
                return "leaving";
        case AE_JOB_FAILED:
        case AE_JOB_N_STATES:
                break;
        }
        return "failed";
}

/* Of a job that has failed a node knows its own ranks alone. */
static bool n_attached(const struct ae_job *job, uint32_t *ret_n)
{
        *ret_n = 0;
        for (uint32_t rank = 0; rank < job->world; rank++) {
                if (job->rank_node ? job->rank_node[rank] != job->core->options.node
                                   : !job->members[rank].joined)
                        return false;
                *ret_n += ae_inspect_worker(job, rank) != NULL;
        }
        return true;
}

static void put_present(struct ae_json *json, const struct ae_job *job)
{
        uint32_t n = ae_wait_n_present(job);
        bool known = job->state < AE_JOB_FAILED ? n != AE_WIRE_NONE : n_attached(job, &n);

        if (known)
                ae_json_put_u64(json, "ranks_present", n);
        else
                ae_inspect_put_null(json, "ranks_present");
}

/* What the ranks of a forming job are shown; without any here, the decider knows who is missing. */
static void forming_text(const struct ae_job *job, char *text, size_t size)
{
        const struct ae_worker *worker;
        size_t len = 0;

        ae_list_for_each(worker, &job->core->workers, link) {
                if (worker->job != job || worker->registered || !worker->page)
                        continue;
                ae_local_text_get(&((struct ae_local_page *)worker->page->base)->why, text);
                return;
        }
        if (!ae_core_is_decider(job->core))
                return;
        for (uint32_t rank = 0; rank < job->world && len + 16 < size; rank++) {
                if (!job->members[rank].joined)
                        len += (size_t)snprintf(text + len, size - len, "%s%u",
                                                len ? ", " : "rank ", rank);
        }
}

static void put_waiting(struct ae_json *json, const struct ae_job *job)
{
        char text[sizeof(((struct ae_local_text *)0)->text)] = "";

        if (job->state < AE_JOB_LIVE)
                forming_text(job, text, sizeof(text));
        else if (job->state == AE_JOB_LIVE)
                ae_local_text_get(&job->page->waiting, text);
        if (job->state == AE_JOB_LIVE && !*text)
                ae_wait_pauses(job, text, sizeof(text)); /* nobody waits for them yet */
        ae_json_put_string(json, "waiting", text);
}

static void put_budget(struct ae_json *json, const struct ae_job *job)
{
        uint64_t budget = job->core->options.memory_len;

        if (job->model && job->model->message->budget_len)
                budget = AE_MIN(budget, job->model->message->budget_len);
        if (budget > INT64_MAX)
                ae_inspect_put_null(json, "budget_len");
        else
                ae_json_put_u64(json, "budget_len", budget);
}

static void put_job(struct ae_json *json, const struct ae_job *job)
{
        ae_json_object_begin(json);
        ae_json_put_string(json, "name", job->name);
        ae_json_put_string(json, "state", job_state(job));
        ae_json_put_string(json, "why", job->state == AE_JOB_FAILED ? job->why : "");
        ae_inspect_put_u64(json, "epoch", job->epoch);
        ae_inspect_put_u64(json, "round", job->round);
        ae_inspect_put_u64(json, "version", job->version);
        ae_json_put_u64(json, "world", job->world);
        put_present(json, job);
        put_waiting(json, job);
        ae_inspect_put_u64(json, "memory_len", job->memory_len);
        put_budget(json, job);
        ae_json_object_end(json);
}

void ae_inspect_jobs(struct ae_inspect_query *query)
{
        const char *name = query->request->job;
        const struct ae_job *job;

        ae_json_key(&query->json, "jobs");
        ae_json_array_begin(&query->json);
        ae_list_for_each(job, &query->core->jobs, link) {
                if (job->released || ae_inspect_full(query))
                        continue;
                if (!*name || strcmp(job->name, name) == 0)
                        put_job(&query->json, job);
        }
        ae_json_array_end(&query->json);
}

/* ---- status ----------------------------------------------------------------------------- */

/* The first trouble in words, a lost node before a failed job; false when there is none. */
static bool trouble(const struct ae_inspect_query *query, char *text, size_t size)
{
        const struct ae_job *job;

        for (uint32_t i = 0; i < query->core->options.n_nodes; i++) {
                struct ae_node_peer_info info;

                ae_node_peer_info(query->inspect->node, i, &info);
                if (info.up)
                        continue;
                (void)snprintf(text, size, "%s: node %u is not connected%s%s",
                               ae_status_code(info.incarnation ? AE_ELOST : AE_ESTATE), i,
                               *info.why ? ": " : "", info.why);
                return true;
        }
        ae_list_for_each(job, &query->core->jobs, link) {
                if (job->released || job->state != AE_JOB_FAILED)
                        continue;
                (void)snprintf(text, size, "%s: job '%.64s' failed: %s",
                               ae_status_code(job->fail_status), job->name, job->why);
                return true;
        }
        return false;
}

static void put_memory(struct ae_inspect_query *query)
{
        struct ae_json *json = &query->json;
        struct ae_core_stats stats;

        ae_core_stats(query->core, &stats);
        ae_json_key(json, "memory");
        ae_json_object_begin(json);
        ae_inspect_put_u64(json, "used", stats.memory_len);
        ae_inspect_put_u64(json, "tables", stats.tables_len);
        if (query->core->options.memory_len > INT64_MAX)
                ae_inspect_put_null(json, "limit");
        else
                ae_json_put_u64(json, "limit", query->core->options.memory_len);
        ae_json_object_end(json);
}

void ae_inspect_status(struct ae_inspect_query *query)
{
        struct ae_json *json = &query->json;
        char why[1024] = "";
        bool bad = trouble(query, why, sizeof(why));

        ae_json_put_u64(json, "node", query->core->options.node);
        ae_json_put_u64(json, "n_nodes", query->core->options.n_nodes);
        ae_json_put_string(json, "version", AE_VERSION);
        ae_json_put_string(json, "transport", transport(query));
        ae_json_put_double(json, "uptime_s", (double)query->inspect->uptime_ns / 1e9);
        ae_json_put_string(json, "health", bad ? "degraded" : "ok");
        ae_json_put_string(json, "why", why);
        put_memory(query);
        ae_inspect_jobs(query);
}

/* ---- workers ---------------------------------------------------------------------------- */

static const char *worker_state(const struct ae_worker *worker)
{
        if (worker->left)
                return "left";
        if (!worker->registered)
                return "joining";
        if (worker->closed)
                return "stepping";
        if (!worker->reader && ae_wait_pause_ns(worker->job, worker->rank))
                return "paused";
        return "running";
}

/* Of a rank that is not attached here. */
static const char *absent_state(const struct ae_job *job, uint32_t rank)
{
        const struct ae_member *member = &job->members[rank];
        uint32_t self = job->core->options.node;

        if (member->left)
                return "left";
        if (!job->rank_node)
                return member->joined ? "joining" : "missing";
        if (job->rank_node[rank] == self) /* the loss of one that had not left fails the job */
                return job->state == AE_JOB_FAILED ? "lost" : "left";
        if (!job->core->peers[job->rank_node[rank]].up)
                return "lost";
        if (!job->committed)
                return "joining";
        if (member->closed)
                return "stepping";
        return ae_wait_pause_ns(job, rank) ? "paused" : "running";
}

/* -1 as long as this node hasn't heard of the rank. */
static int64_t node_of(const struct ae_job *job, uint32_t rank)
{
        if (job->rank_node)
                return job->rank_node[rank];
        return job->members[rank].joined ? (int64_t)job->members[rank].node : -1;
}

/* Bytes of the slots that it marks as held in its page; which bytes they are is ours to know. */
static uint64_t held_len(const struct ae_worker *worker)
{
        const struct ae_job *job = worker->job;
        struct ae_local_page *page = (struct ae_local_page *)worker->page->base;
        uint64_t len = 0;

        for (uint32_t i = 0; job->slots && i < job->n_slots; i++) {
                if (job->slots[i].state != AE_SLOT_FREE &&
                    atomic_load_explicit(&page->holds[i], memory_order_relaxed))
                        len += job->slots[i].len;
        }
        return len;
}

/* Bytes from the oldest piece that isn't freed to the end of the newest. */
static uint64_t ring_used(const struct ae_worker *worker)
{
        const struct ae_piece *last;

        if (worker->order_head == worker->order_tail)
                return 0;
        last = worker->order[(worker->order_tail - 1) % worker->order_cap];
        return last->ring_pos + last->len - worker->grad_free;
}

/* @state: as it is shown, of a rank or a reader. */
static void put_pause(struct ae_json *json, const struct ae_job *job, uint32_t rank,
                      const char *state)
{
        bool paused = strcmp(state, "paused") == 0;

        if (paused)
                ae_json_put_double(json, "pause_s", (double)ae_wait_pause_ns(job, rank) / 1e9);
        else
                ae_inspect_put_null(json, "pause_s");
        ae_json_put_string(json, "why", paused ? job->members[rank].pause_why : "");
}

static void put_worker(struct ae_json *json, const struct ae_worker *worker)
{
        ae_json_object_begin(json);
        ae_json_put_i64(json, "rank", worker->reader ? -1 : (int64_t)worker->rank);
        ae_json_put_u64(json, "node", worker->core->options.node);
        ae_json_put_i64(json, "pid", worker->pid);
        ae_json_put_u64(json, "uid", worker->uid);
        ae_json_put_string(json, "state", worker_state(worker));
        put_pause(json, worker->job, worker->rank, worker_state(worker));
        ae_json_put_u64(json, "micro", worker->micro);
        ae_inspect_put_u64(json, "held_len", held_len(worker));
        ae_inspect_put_u64(json, "hold_len", worker->hold_len);
        ae_inspect_put_u64(json, "ring_used", ring_used(worker));
        ae_inspect_put_u64(json, "ring_len", worker->grad->len);
        ae_json_object_end(json);
}

static void put_absent(struct ae_json *json, const struct ae_job *job, uint32_t rank)
{
        static const char *const unknown[] = { "micro", "held_len", "hold_len", "ring_used",
                                               "ring_len" };

        ae_json_object_begin(json);
        ae_json_put_u64(json, "rank", rank);
        ae_json_put_i64(json, "node", node_of(job, rank));
        ae_inspect_put_null(json, "pid");
        ae_inspect_put_null(json, "uid");
        ae_json_put_string(json, "state", absent_state(job, rank));
        put_pause(json, job, rank, absent_state(job, rank));
        for (size_t i = 0; i < AE_ARRAY_LEN(unknown); i++)
                ae_inspect_put_null(json, unknown[i]);
        ae_json_object_end(json);
}

void ae_inspect_workers(struct ae_inspect_query *query)
{
        const struct ae_job *job = query->job;
        struct ae_json *json = &query->json;
        const struct ae_worker *worker;

        ae_json_key(json, "workers");
        ae_json_array_begin(json);
        for (uint32_t rank = 0; rank < job->world && !ae_inspect_full(query); rank++) {
                worker = ae_inspect_worker(job, rank);
                if (worker)
                        put_worker(json, worker);
                else
                        put_absent(json, job, rank);
        }
        ae_list_for_each(worker, &query->core->workers, link) {
                if (worker->job == job && worker->reader && !ae_inspect_full(query))
                        put_worker(json, worker);
        }
        ae_json_array_end(json);
}
