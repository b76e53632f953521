/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A job's beginning as a record and its end: states and legal moves, failing, leaving, freeing. A
 * lost member fails the job, the last leave ends it; its memory goes when no task and no put of it
 * is under way any more.
 */
#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static const bool legal_moves[AE_JOB_N_STATES][AE_JOB_N_STATES] = {
        [AE_JOB_FORMING] = { [AE_JOB_STARTING] = true, [AE_JOB_FAILED] = true,
                             [AE_JOB_ENDED] = true },
        [AE_JOB_STARTING] = { [AE_JOB_LOADING] = true, [AE_JOB_FAILED] = true,
                              [AE_JOB_ENDED] = true },
        [AE_JOB_LOADING] = { [AE_JOB_LIVE] = true, [AE_JOB_FAILED] = true,
                             [AE_JOB_ENDED] = true },
        [AE_JOB_LIVE] = { [AE_JOB_FAILED] = true, [AE_JOB_ENDED] = true },
};

void ae_job_move(struct ae_job *job, enum ae_job_state to)
{
        assert(legal_moves[job->state][to]);
        job->state = to;
}

struct ae_job *ae_job_new(struct ae_core *core, const char *name, uint32_t world,
                              const char *token, uint32_t uid)
{
        struct ae_job *job = ae_table_new(core, 1, sizeof(*job));

        job->core = core;
        job->name = strdup(name);
        job->token = strdup(token);
        if (!job->name || !job->token)
                abort();
        job->world = world;
        job->uid = uid;
        job->id = AE_WIRE_NONE;
        job->epoch = 1;
        job->n_present = AE_WIRE_NONE;
        job->members = ae_table_new(core, world, sizeof(*job->members));
        ae_list_init(&job->unsent);
        ae_ahead_init(&job->early, core->options.n_nodes);
        ae_list_init(&job->applies);
        ae_list_init(&job->deferred);
        ae_list_init(&job->stages);
        ae_list_init(&job->requests);
        ae_list_init(&job->ranges);
        ae_list_push(&core->jobs, &job->link);
        if (ae_core_is_decider(core)) {
                while (ae_core_job(core, core->next_job % AE_WIRE_MAX_JOBS))
                        core->next_job++;
                job->id = core->next_job++ % AE_WIRE_MAX_JOBS;
        }
        return job;
}

static void free_peers(struct ae_job *job)
{
        for (uint32_t i = 0; job->peers && i < job->core->options.n_nodes; i++) {
                struct ae_job_peer *peer = &job->peers[i];

                ae_table_free(job->core, peer->xin);
                ae_table_free(job->core, peer->free_slots);
                ae_table_free(job->core, peer->arrived);
                ae_table_free(job->core, peer->credit);
                ae_table_free(job->core, peer->scattered);
                ae_table_free(job->core, peer->vote);
                ae_table_free(job->core, peer->want);
                ae_table_free(job->core, peer->own_xin);
        }
        ae_table_free(job->core, job->peers);
}

bool ae_job_has_workers(const struct ae_job *job)
{
        struct ae_worker *worker;

        ae_list_for_each(worker, &job->core->workers, link) {
                if (worker->job == job)
                        return true;
        }
        return false;
}

void ae_job_release(struct ae_job *job)
{
        job->released = true;
        if (job->n_tasks_out || job->n_puts_out || ae_job_has_workers(job))
                return;
        ae_list_unlink(&job->link);
        ae_ahead_deinit(&job->early);
        ae_state_free(job);
        ae_apply_free(job);
        ae_owner_free(job);
        ae_fold_free(job);
        ae_cache_free(job);
        ae_flow_free(job);
        ae_memory_free(job); /* revokes what the peers were granted */
        free_peers(job);
        for (uint32_t i = 0; i < job->n_groups; i++)
                ae_table_free(job->core, job->groups[i].ranks);
        ae_table_free(job->core, job->groups);
        ae_table_free(job->core, job->group_index);
        ae_table_free(job->core, job->locals);
        ae_order_deinit(job);
        ae_table_free(job->core, job->n_uses);
        ae_table_free(job->core, job->rank_node);
        ae_table_free(job->core, job->rank_local);
        for (uint32_t rank = 0; rank < job->world; rank++)
                free(job->members[rank].pause_why);
        ae_table_free(job->core, job->members);
        ae_table_free(job->core, job->counts);
        ae_layout_free(job->layout);
        ae_model_free(job->model);
        ae_model_free(job->offer);
        free(job->name);
        free(job->token);
        ae_table_free(job->core, job);
}

/* ---- failing ---------------------------------------------------------------------------- */

void ae_job_failed(struct ae_job *job, int status, const char *text)
{
        struct ae_worker *worker;

        if (job->state >= AE_JOB_FAILED)
                return;
        ae_job_move(job, status == AE_ECLOSED ? AE_JOB_ENDED : AE_JOB_FAILED);
        job->fail_status = status;
        (void)snprintf(job->why, sizeof(job->why), "%s", text);
        if (status != AE_ECLOSED)
                ae_core_log(job->core, 0, "job failed: %s job=%s", text, job->name);
        if (job->page) {
                ae_local_text_set(&job->page->why, text);
                job->page->fail_status = status;
                atomic_store_explicit(&job->page->state, AE_LOCAL_FAILED, memory_order_release);
        }
        ae_list_for_each(worker, &job->core->workers, link) {
                if (worker->job != job)
                        continue;
                if (status == AE_ECLOSED && !worker->reader && !worker->joined && !worker->dead) {
                        ae_form_again(worker);
                        continue;
                }
                if (worker->page && (!worker->joined || worker->asked) && !worker->left)
                        ae_worker_error(worker, 0, status, text);
                if (worker->n_waiting) /* its gathers are about to be answered with this */
                        ae_local_text_set(&((struct ae_local_page *)worker->page->base)->why, text);
                ae_worker_wake(worker);
        }
        ae_cache_fail(job);
        ae_state_fail(job);
        if (!ae_job_has_workers(job))
                job->released = true; /* freed at the end of the event */
}

void ae_job_fail(struct ae_job *job, int status, const char *format, ...)
{
        Autoep__Fail message = AUTOEP__FAIL__INIT;
        char text[AE_WIRE_TEXT * 2];
        va_list args;

        if (job->state >= AE_JOB_FAILED)
                return;
        va_start(args, format);
        (void)vsnprintf(text, sizeof(text), format, args);
        va_end(args);
        message.status = status;
        message.text = text;
        if (job->id != AE_WIRE_NONE) {
                for (uint32_t node = 0; node < job->core->options.n_nodes; node++) {
                        if (node != job->core->options.node && job->core->peers[node].up)
                                ae_job_control(job, node, AE_CONTROL_FAIL, &message.base);
                }
        }
        ae_job_failed(job, status, text);
}

/* ---- leaving ---------------------------------------------------------------------------- */

void ae_form_leave(struct ae_worker *worker, uint64_t id)
{
        Autoep__Left left = AUTOEP__LEFT__INIT;
        Autoep__Done done = AUTOEP__DONE__INIT;
        struct ae_core_options *options = &worker->core->options;
        struct ae_job *job = worker->job;

        if (job && !worker->reader && worker->joined && !worker->left &&
            job->state < AE_JOB_FAILED) {
                ae_flow_leave(worker);
                left.rank = worker->rank;
                ae_job_control(job, 0, AE_CONTROL_LEFT, &left.base);
        }
        worker->left = true;
        done.id = id;
        options->ops->worker_send(options->user, worker, AE_CONTROL_DONE, &done.base, NULL, 0);
}

/* Tasks and peers may still be at a rank's rings: they stay until the job is freed. */
static void bury(struct ae_job *job, struct ae_region *region)
{
        job->buried = ae_table_grow(job->core, job->buried,
                                    (job->n_buried + 1) * sizeof(struct ae_region *));
        job->buried[job->n_buried++] = region;
}

void ae_worker_drop_init(struct ae_worker *worker)
{
        if (!worker->init)
                return;
        munmap(worker->init->base, worker->init->len);
        free(worker->init);
        worker->init = NULL;
}

static void free_worker(struct ae_worker *worker, struct ae_job *job)
{
        const struct ae_core_options *options = &worker->core->options;
        struct ae_region *const regions[] = { worker->page, worker->grad, worker->xout,
                                              worker->xin };

        for (size_t i = 0; i < AE_ARRAY_LEN(regions); i++) {
                if (regions[i] && job && !worker->reader)
                        bury(job, regions[i]);
                else if (regions[i])
                        options->ops->region_free(options->user, regions[i]);
        }
        ae_worker_drop_init(worker);
        ae_model_free(worker->model);
        ae_table_free(worker->core, worker->order);
        ae_table_free(worker->core, worker->pins);
        ae_table_free(worker->core, worker->step);
        ae_table_free(worker->core, worker->flow_in);
        ae_table_free(worker->core, worker->flow_acked);
        ae_table_free(worker->core, worker);
}

void ae_core_worker_gone(struct ae_worker *worker, const char *text)
{
        struct ae_core *core = worker->core;
        struct ae_job *job = worker->job;

        ae_list_unlink(&worker->link);
        if (job && worker->joined && !worker->left && !worker->reader && !worker->dead)
                ae_job_fail(job, AE_ELOST, "rank %u (pid %d, node %u) was lost in round %" PRIu64
                            " of job '%s': %s", worker->rank, worker->pid, core->options.node,
                            job->round, job->name, text);
        if (job) {
                ae_cache_worker_gone(worker);
                ae_fold_worker_gone(worker);
                ae_state_worker_gone(worker);
                ae_flow_worker_gone(worker);
                if (job->locals && !worker->reader)
                        job->locals[worker->local] = NULL;
                ae_form_gone(worker);
                worker->job = NULL;
                if (job->state >= AE_JOB_FAILED && !ae_job_has_workers(job))
                        job->released = true;
        }
        free_worker(worker, job);
        ae_core_settle(core);
}
