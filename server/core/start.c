/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From a full house to a live job: the decider sends Start, each node makes groups and memory and
 * grants its peers what they may write, ranks register and are compared, and with the initial
 * values in place the job is live.
 */
#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- start ------------------------------------------------------------------------------ */

void ae_start_maybe(struct ae_job *job)
{
        Autoep__Start start = AUTOEP__START__INIT;
        AE_CLEANUP(ae_cleanup_free) uint32_t *nodes = NULL;

        if (job->state != AE_JOB_FORMING || job->n_joined < job->world || !job->offer)
                return;
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++) {
                if (!job->core->peers[node].up)
                        return; /* ae_form_tick() tries again */
        }
        nodes = ae_core_alloc(job->world, sizeof(*nodes));
        for (uint32_t rank = 0; rank < job->world; rank++)
                nodes[rank] = job->members[rank].node;
        start.job = job->name;
        start.model = job->offer->message;
        start.world = job->world;
        start.rank_node = nodes;
        start.n_rank_node = job->world;
        start.uid = job->uid;
        start.token = job->token;
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++)
                ae_job_control(job, node, AE_CONTROL_START, &start.base);
        ae_model_free(job->offer);
        job->offer = NULL;
        ae_job_move(job, AE_JOB_STARTING);
}

static void add_group(struct ae_job *job, uint32_t node, const uint32_t *ranks, uint32_t n)
{
        struct ae_sum_group *group = &job->groups[job->n_groups++];

        job->peers[node].n_groups++;
        group->node = node;
        group->first_rank = ranks[0];
        group->n_ranks = n;
        group->ranks = ae_table_new(job->core, n, sizeof(*group->ranks));
        memcpy(group->ranks, ranks, n * sizeof(*ranks));
}

static int compare_groups(const void *a, const void *b)
{
        const struct ae_sum_group *ga = a;
        const struct ae_sum_group *gb = b;

        return ga->first_rank < gb->first_rank ? -1 : ga->first_rank > gb->first_rank;
}

static int node_groups(struct ae_job *job, uint32_t node, const uint32_t *ranks)
{
        uint32_t per = job->model->message->sum_group;
        uint32_t n = job->peers[node].n_ranks;

        if (n == 0)
                return 0;
        if (per == 0)
                per = n;
        if (n % per != 0 || n / per > AE_WIRE_MAX_NODE_SUM_GROUPS)
                return ae_fail(
                        AE_EINVAL,
                        "sum_group %u does not cut the %u ranks of node %u into at most %u equal "
                        "groups",
                        per, n, node, AE_WIRE_MAX_NODE_SUM_GROUPS);
        for (uint32_t i = 0; i < n; i += per)
                add_group(job, node, ranks + i, per);
        return 0;
}

/* From a node and its own number of a group to the group. */
static void index_groups(struct ae_job *job)
{
        const struct ae_job_peer *self = &job->peers[job->core->options.node];
        uint32_t n = 0;

        job->group_index = ae_table_new(job->core, job->n_groups, sizeof(*job->group_index));
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++) {
                struct ae_job_peer *peer = &job->peers[node];

                peer->groups = job->group_index + n;
                n += peer->n_groups;
                peer->n_groups = 0;
        }
        for (uint32_t i = 0; i < job->n_groups; i++) {
                struct ae_job_peer *peer = &job->peers[job->groups[i].node];

                job->groups[i].local = peer->n_groups;
                peer->groups[peer->n_groups++] = i;
        }
        job->local_groups = self->groups;
        job->n_local_groups = self->n_groups;
}

static int make_groups(struct ae_job *job)
{
        uint32_t n_nodes = job->core->options.n_nodes;
        AE_CLEANUP(ae_cleanup_free) uint32_t *ranks = ae_core_alloc(job->world, sizeof(*ranks));
        AE_CLEANUP(ae_cleanup_free) uint32_t *first = ae_core_alloc(n_nodes, sizeof(*first));
        int r;

        job->groups = ae_table_new(job->core, job->world, sizeof(*job->groups));
        job->rank_local = ae_table_new(job->core, job->world, sizeof(*job->rank_local));
        for (uint32_t rank = 0; rank < job->world; rank++)
                job->rank_local[rank] = job->peers[job->rank_node[rank]].n_ranks++;
        for (uint32_t node = 1; node < n_nodes; node++)
                first[node] = first[node - 1] + job->peers[node - 1].n_ranks;
        for (uint32_t rank = 0; rank < job->world; rank++)
                ranks[first[job->rank_node[rank]] + job->rank_local[rank]] = rank;
        for (uint32_t node = 0; node < n_nodes; node++) {
                r = node_groups(job, node, ranks + first[node]);
                if (r < 0)
                        return r;
        }
        qsort(job->groups, job->n_groups, sizeof(*job->groups), compare_groups);
        index_groups(job);
        return 0;
}

static void attach_locals(struct ae_job *job)
{
        struct ae_worker *worker;

        job->n_local = job->peers[job->core->options.node].n_ranks;
        job->locals = ae_table_new(job->core, job->n_local, sizeof(struct ae_worker *));
        job->outboxes = ae_table_new(job->core, job->n_local, sizeof(struct ae_outbox *));
        ae_list_for_each(worker, &job->core->workers, link) {
                if (worker->job != job || worker->reader)
                        continue;
                worker->local = job->rank_local[worker->rank];
                job->locals[worker->local] = worker;
        }
        for (uint32_t g = 0; g < job->n_local_groups; g++) {
                const struct ae_sum_group *group = &job->groups[job->local_groups[g]];

                for (uint32_t i = 0; i < group->n_ranks; i++) {
                        worker = job->locals[job->rank_local[group->ranks[i]]];
                        if (!worker)
                                continue; /* gone: the job is failing */
                        worker->group = g;
                        worker->lane0 = i;
                }
        }
}

static int take_start(struct ae_job *job, const Autoep__Start *start)
{
        uint32_t n_nodes = job->core->options.n_nodes;
        struct ae_model offered = { .message = start->model };
        int r;

        /* rank 0's model went through ae_model_new() at its own node, so this one is sound */
        r = ae_model_copy(&offered, &job->model);
        if (r < 0)
                return r;
        r = ae_model_layout(job->model, n_nodes, &job->layout);
        if (r < 0)
                return r;
        r = ae_group_init(job->world, job->model->message->ep_size, job->model->message->order,
                          &job->topology);
        if (r < 0)
                return r;
        ae_order_init(job);
        if (start->n_rank_node != job->world)
                return ae_fail(AE_EPROTO, "Start places %zu of %u ranks", start->n_rank_node,
                               job->world);
        job->rank_node = ae_table_new(job->core, job->world, sizeof(*job->rank_node));
        for (uint32_t rank = 0; rank < job->world; rank++) {
                if (start->rank_node[rank] >= n_nodes)
                        return ae_fail(AE_EPROTO, "Start places rank %u on node %u of %u", rank,
                                       start->rank_node[rank], n_nodes);
                job->rank_node[rank] = start->rank_node[rank];
        }
        r = make_groups(job);
        if (r < 0)
                return r;
        attach_locals(job);
        job->n_uses = ae_table_new(job->core, job->layout->n_units, sizeof(*job->n_uses));
        ae_layout_count_uses(job->layout, job->n_uses);
        return ae_memory_new(job);
}

/* What peers may write. The decider is connected to all nodes before Start, these two may not be to
 * each other yet: ae_start_peer_up() then goes on. */
static int grant_all(struct ae_job *job)
{
        int r;

        for (uint32_t node = 0; node < job->core->options.n_nodes; node++) {
                if (node == job->core->options.node || job->peers[node].own ||
                    !job->core->peers[node].up)
                        continue;
                r = ae_memory_grant(job, node);
                if (r < 0)
                        return r;
        }
        return 0;
}

static int make_parts(struct ae_job *job)
{
        int r;

        r = ae_cache_new(job);
        if (r < 0)
                return r;
        r = ae_fold_new(job);
        if (r < 0)
                return r;
        r = ae_owner_new(job);
        if (r < 0)
                return r;
        ae_serve_new(job);
        r = ae_apply_new(job);
        if (r < 0)
                return r;
        for (uint32_t i = 0; i < job->n_local; i++) {
                r = job->locals[i] ? ae_memory_worker(job->locals[i]) : 0;
                if (r < 0)
                        return r;
        }
        return grant_all(job);
}

static void tell_ready(struct ae_job *job, int status, const char *text)
{
        Autoep__Ready ready = AUTOEP__READY__INIT;

        ready.status = status;
        ready.text = (char *)(uintptr_t)text;
        ae_job_control(job, 0, AE_CONTROL_READY, &ready.base);
}

/* Ready when all grants are here and all local ranks have registered and agree. */
static void maybe_ready(struct ae_job *job)
{
        char who[32];

        if (job->state != AE_JOB_STARTING || !job->params || job->peers[0].ready)
                return;
        if (job->n_granted < job->core->options.n_nodes - 1)
                return;
        for (uint32_t i = 0; i < job->n_local; i++) {
                struct ae_worker *worker = job->locals[i];

                if (!worker || !worker->model)
                        return;
                (void)snprintf(who, sizeof(who), "rank %u", worker->rank);
                if (ae_model_compare(job->model, "rank 0", worker->model, who) < 0) {
                        job->peers[0].ready = true;
                        tell_ready(job, AE_EMISMATCH, ae_error_text());
                        return;
                }
        }
        job->peers[0].ready = true; /* said; the decider counts in n_ready */
        tell_ready(job, 0, "");
}

void ae_start_on(struct ae_core *core, uint32_t id, const Autoep__Start *start)
{
        struct ae_job *job = ae_core_job(core, id);
        int r;

        if (!job)
                job = ae_job_new(core, start->job, start->world, start->token, start->uid);
        job->id = id;
        job->n_present = job->world; /* until the decider hears otherwise */
        if (!ae_core_is_decider(core))
                ae_job_move(job, AE_JOB_STARTING);
        job->peers = ae_table_new(job->core, core->options.n_nodes, sizeof(*job->peers));
        for (uint32_t node = 0; node < core->options.n_nodes; node++) {
                ae_list_init(&job->peers[node].sends);
                ae_list_init(&job->peers[node].unsent);
        }
        r = take_start(job, start);
        if (r == 0)
                r = make_parts(job);
        if (r < 0) {
                job->peers[0].ready = true;
                tell_ready(job, r, ae_error_text());
                return;
        }
        maybe_ready(job);
        ae_early_play(core, &core->early, id);
}

void ae_start_peer_up(struct ae_job *job)
{
        if (job->state != AE_JOB_STARTING || !job->peers || job->peers[0].ready)
                return;
        if (grant_all(job) < 0) {
                job->peers[0].ready = true;
                tell_ready(job, AE_ELOST, ae_error_text());
        }
}

void ae_form_granted(struct ae_job *job)
{
        maybe_ready(job);
}

/* The decider counts; when all are ready it says so to all. */
void ae_start_ready(struct ae_job *job, uint32_t node, const Autoep__Ready *ready)
{
        job->peers[node].ready = true;
        if (node == 0 && job->core->options.node != 0) { /* the decider's word: all are */
                ae_job_move(job, AE_JOB_LOADING);
        } else if (ready->status < 0) {
                ae_job_fail(job, ready->status, "%s", ready->text);
                return;
        } else if (++job->n_ready < job->core->options.n_nodes) {
                return;
        } else {
                for (uint32_t i = 1; i < job->core->options.n_nodes; i++)
                        ae_job_control(job, i, AE_CONTROL_READY, &ready->base);
                ae_job_move(job, AE_JOB_LOADING);
        }
        if (job->rank_node[0] == job->core->options.node)
                ae_state_initial(job->locals[0]);
}

/* ---- register and live ------------------------------------------------------------------ */

static void send_registered(struct ae_worker *worker)
{
        Autoep__Registered message = AUTOEP__REGISTERED__INIT;
        struct ae_job *job = worker->job;
        struct ae_core_options *options = &worker->core->options;
        int fds[3] = { job->params->fd_ro, worker->xout ? worker->xout->fd : -1,
                       worker->xin ? worker->xin->fd_ro : -1 };

        message.model = job->model->message;
        message.rank = worker->rank;
        message.world = job->world;
        message.params_len = job->params->len;
        message.xout_len = worker->xout ? worker->xout->len : 0;
        message.xin_len = worker->xin ? worker->xin->len : 0;
        message.rank_node = job->rank_node;
        message.n_rank_node = job->world;
        if (!worker->hold_len) /* a reader's: ranks have got theirs with the plan */
                worker->hold_len = ae_memory_allowance(job);
        message.hold_len = worker->hold_len;
        worker->registered = true;
        worker->asked = false;
        options->ops->worker_send(options->user, worker, AE_CONTROL_REGISTERED, &message.base, fds,
                                  worker->reader ? 1 : 3);
}

void ae_form_committed(struct ae_job *job)
{
        struct ae_worker *worker;

        job->committed = true;
        ae_job_move(job, AE_JOB_LIVE);
        atomic_store_explicit(&job->page->state, AE_LOCAL_LIVE, memory_order_release);
        ae_core_log(job->core, 2, "job is live job=%s world=%u units=%u tensors=%u memory=%" PRIu64,
                    job->name, job->world, job->layout->n_units, job->layout->n_tensors,
                    job->memory_len);
        ae_list_for_each(worker, &job->core->workers, link) {
                if (worker->job == job && worker->asked)
                        send_registered(worker);
        }
}

/* Copied, for the worker could shrink or change what it passed. */
static int read_init(struct ae_worker *worker, uint64_t len, int fd)
{
        uint64_t most = worker->core->options.memory_len;
        uint64_t done = 0;
        char *base;

        if (len == 0)
                return 0;
        if (len > most)
                return ae_fail(AE_EBUDGET,
                               "the initial values have %" PRIu64 " bytes, node %u has %" PRIu64
                               " in all: raise its memory",
                               len, worker->core->options.node, most);
        base = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                    -1, 0);
        if (base == MAP_FAILED)
                return ae_fail(AE_ENOMEM, "no memory for %" PRIu64 " bytes of initial values", len);
        worker->init = ae_core_alloc(1, sizeof(*worker->init));
        *worker->init = (struct ae_region){ .base = base, .len = len, .fd = -1, .fd_ro = -1 };
        while (done < len) {
                ssize_t got = pread(fd, base + done, len - done, (off_t)done);

                if (got <= 0)
                        return ae_fail(AE_EPROTO,
                                       "the initial values are %" PRIu64 " bytes, not %" PRIu64,
                                       done, len);
                done += (uint64_t)got;
        }
        return 0;
}

/* Start adds names and the place of each rank, and so does Registered. */
static int check_record(const struct ae_worker *worker)
{
        size_t len = ae_control_size(&worker->model->message->base);
        size_t most = AE_CONTROL_FRAME_MAX - 8192 - 4 * (size_t)worker->job->world;

        if (len <= most)
                return 0;
        return ae_fail(AE_EOVERFLOW,
                       "the record of a model of %zu tensors has %zu bytes, the limit is %zu",
                       worker->model->message->n_tensors, len, most);
}

static int take_register(struct ae_worker *worker, Autoep__Register *message, int fd)
{
        Autoep__Offer offer = AUTOEP__OFFER__INIT;
        Autoep__Model *model = message->model;
        int r;

        if (worker->model || worker->registered)
                return ae_fail(AE_ESTATE, "rank %u has registered already", worker->rank);
        if (!model)
                return ae_fail(AE_EINVAL, "a rank registers a model; only readers go without");
        message->model = NULL; /* taken over */
        r = ae_model_new(model, &worker->model);
        if (r < 0)
                return r;
        r = worker->rank == 0 ? read_init(worker, message->init_len, fd) : 0;
        if (r < 0 || worker->rank != 0)
                return r;
        r = check_record(worker);
        if (r < 0)
                return r;
        offer.model = worker->model->message;
        ae_job_control(worker->job, 0, AE_CONTROL_OFFER, &offer.base);
        return 0;
}

void ae_form_register(struct ae_worker *worker, Autoep__Register *message, int fd)
{
        struct ae_job *job = worker->job;
        int r = 0;

        if (!job || worker->dead)
                r = ae_fail(AE_ESTATE, "this process did not join a job");
        else if (job->state >= AE_JOB_FAILED)
                r = ae_fail(job->fail_status, "%s", job->why);
        else if (worker->reader && (worker->asked || worker->registered))
                r = ae_fail(AE_ESTATE, "the reader with pid %d has registered already",
                            worker->pid);
        else if (!worker->reader)
                r = take_register(worker, message, fd);
        ae_control_free(&message->base);
        ae_cleanup_close(&fd);
        if (r < 0) {
                ae_worker_error(worker, 0, r, ae_error_text());
                return;
        }
        worker->asked = true;
        if (worker->reader && job->committed)
                send_registered(worker);
        else if (job->params)
                maybe_ready(job);
}
