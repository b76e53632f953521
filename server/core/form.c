/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How ranks come together: workers say hello, the decider lets their ranks join, and everybody is
 * told who is still missing. start.c goes on from there, life.c ends it.
 */
#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define WAITING_EVERY_NS (200 * UINT64_C(1000000))

/* ---- joining ---------------------------------------------------------------------------- */

static void send_join(struct ae_worker *worker, bool withdrawn)
{
        Autoep__Join join = AUTOEP__JOIN__INIT;
        struct ae_job *job = worker->job;

        join.job = job->name;
        join.token = job->token;
        join.rank = worker->rank;
        join.world = job->world;
        join.node = job->core->options.node;
        join.pid = worker->pid;
        join.uid = worker->uid;
        join.incarnation = worker->incarnation;
        join.withdrawn = withdrawn;
        if (job->core->peers[0].up)
                ae_core_control(job->core, 0, AE_WIRE_NONE, AE_CONTROL_JOIN, &join.base);
}

void ae_core_peer_up(struct ae_core *core, uint32_t node, uint64_t incarnation)
{
        struct ae_worker *worker;
        struct ae_job *job;

        core->peers[node].up = true;
        core->peers[node].incarnation = incarnation;
        ae_core_peer_note(core, node, NULL);
        ae_list_for_each(worker, &core->workers, link) {
                if (node == 0 && worker->job && !worker->reader && !worker->joined &&
                    worker->job->state == AE_JOB_FORMING)
                        send_join(worker, false);
        }
        ae_list_for_each(job, &core->jobs, link)
                ae_start_peer_up(job);
        ae_core_settle(core);
}

static int check_join(const struct ae_job *job, const Autoep__Join *join)
{
        const struct ae_member *member;

        if (strcmp(job->token, join->token) != 0)
                return ae_fail(AE_EAUTH, "wrong token for job '%s'", job->name);
        if (job->world != join->world)
                return ae_fail(AE_EMISMATCH, "job '%s' has %u ranks, rank %u says %u", job->name,
                               job->world, join->rank, join->world);
        if (job->uid != join->uid && join->uid != 0)
                return ae_fail(AE_EAUTH,
                               "job '%s' belongs to uid %u, but rank %u on node %u has uid %u",
                               job->name, job->uid, join->rank, join->node, join->uid);
        member = &job->members[join->rank];
        if (member->joined && member->incarnation != join->incarnation)
                return ae_fail(AE_EEXIST, "rank %u of job '%s' is claimed by pid %d on node %u",
                               join->rank, job->name, member->pid, member->node);
        if (job->state != AE_JOB_FORMING && !member->joined)
                return ae_fail(AE_ESTATE, "job '%s' is running without rank %u", job->name,
                               join->rank);
        return 0;
}

/* A forming job that no rank claims any more is none, here and where its last rank was. */
static void release_unclaimed(struct ae_job *job)
{
        if (job->state == AE_JOB_FORMING && job->n_joined == 0 && !ae_job_has_workers(job))
                job->released = true;
}

/* The rank's place is free again; if the job has begun to start with it, it fails. */
static void unjoin(struct ae_job *job, uint32_t rank, const char *how)
{
        struct ae_member *member = &job->members[rank];

        if (job->state > AE_JOB_FORMING) {
                ae_job_fail(job, AE_ELOST, "rank %u (pid %d, node %u) %s while job '%s' started",
                            rank, member->pid, member->node, how, job->name);
                return;
        }
        *member = (struct ae_member){ .joined = false };
        job->n_joined--;
        release_unclaimed(job);
}

/* It came behind the JOIN that it takes back, so a successor's JOIN comes behind it. */
static void on_withdrawn(struct ae_core *core, uint32_t node, const Autoep__Join *join)
{
        struct ae_job *job = ae_core_job_named(core, join->job);
        const struct ae_member *member;

        if (!job || join->rank >= job->world)
                return; /* it was refused */
        member = &job->members[join->rank];
        if (member->joined && member->node == node && member->incarnation == join->incarnation)
                unjoin(job, join->rank, "was lost");
}

static void on_join(struct ae_core *core, uint32_t node, const Autoep__Join *join)
{
        Autoep__JoinReply reply = AUTOEP__JOIN_REPLY__INIT;
        struct ae_job *job = ae_core_job_named(core, join->job);
        int r;

        if (job && join->rank < job->world && job->members[join->rank].left)
                return; /* of the next job: it is asked again once this one has ended */
        reply.job = join->job;
        reply.rank = join->rank;
        reply.incarnation = join->incarnation;
        if (!job && ae_core_jobs_full(core)) {
                reply.status = AE_EOVERFLOW;
                reply.text = (char *)(uintptr_t)"the decider has no room for another job";
                ae_core_control(core, node, AE_WIRE_NONE, AE_CONTROL_JOIN_REPLY, &reply.base);
                return;
        }
        if (!job)
                job = ae_job_new(core, join->job, join->world, join->token, join->uid);
        reply.job_id = job->id;
        r = check_join(job, join);
        if (r < 0) {
                reply.status = r;
                reply.text = (char *)(uintptr_t)ae_error_text();
        } else if (!job->members[join->rank].joined) {
                job->members[join->rank] = (struct ae_member){
                        .joined = true, .node = node, .pid = join->pid,
                        .incarnation = join->incarnation,
                };
                job->n_joined++;
        }
        ae_core_control(core, node, job->id, AE_CONTROL_JOIN_REPLY, &reply.base);
        ae_start_maybe(job);
}

static struct ae_worker *find_rank(struct ae_core *core, const char *job, uint32_t rank,
                                   uint64_t incarnation)
{
        struct ae_worker *worker;

        ae_list_for_each(worker, &core->workers, link) {
                if (worker->job && !worker->reader && worker->rank == rank &&
                    worker->incarnation == incarnation && strcmp(worker->job->name, job) == 0)
                        return worker;
        }
        return NULL;
}

static void send_hello_ok(struct ae_worker *worker)
{
        Autoep__HelloOk ok = AUTOEP__HELLO_OK__INIT;
        struct ae_core_options *options = &worker->core->options;
        int fds[3] = { worker->page->fd, worker->grad->fd, worker->bell };

        ok.version = AE_WIRE_VERSION;
        ok.node = options->node;
        ok.n_nodes = options->n_nodes;
        ok.transport = (char *)(uintptr_t)(options->n_nodes > 1 ? options->transport : "none");
        ok.page_len = worker->page->len;
        ok.grad_len = worker->grad->len;
        worker->joined = true;
        options->ops->worker_send(options->user, worker, AE_CONTROL_HELLO_OK, &ok.base, fds, 3);
}

static void on_join_reply(struct ae_core *core, const Autoep__JoinReply *reply)
{
        struct ae_worker *worker = find_rank(core, reply->job, reply->rank, reply->incarnation);
        struct ae_job *job;

        if (!worker)
                return; /* it is gone, and its JOIN taken back */
        job = worker->job;
        if (reply->status < 0) {
                worker->job = NULL;
                worker->dead = true;
                ae_worker_error(worker, 0, reply->status, reply->text);
                release_unclaimed(job);
                return;
        }
        job->id = reply->job_id;
        if (!worker->joined)
                send_hello_ok(worker);
}

/* ---- hello ------------------------------------------------------------------------------ */

static int check_hello(struct ae_core *core, const struct ae_worker_spec *spec,
                       struct ae_job **ret_job)
{
        const Autoep__Hello *hello = spec->hello;
        struct ae_job *job = ae_core_job_named(core, hello->job);

        if (hello->version != AE_WIRE_VERSION)
                return ae_fail(AE_EVERSION,
                               "the library speaks protocol version %u, this daemon version %u",
                               hello->version, AE_WIRE_VERSION);
        if (!hello->job[0])
                return ae_fail(AE_EINVAL, "the job has no name: set AUTOEP_JOB or options.job");
        if (hello->reader && !job)
                return ae_fail(AE_ENOENT, "unknown job '%s' on node %u", hello->job,
                               core->options.node);
        if (!hello->reader && (!hello->world || hello->world > AE_WIRE_MAX_WORLD ||
                               hello->rank >= hello->world))
                return ae_fail(AE_EINVAL, "rank %u of a world of %u", hello->rank, hello->world);
        if (!job && ae_core_jobs_full(core))
                return ae_fail(AE_EOVERFLOW, "no room for job '%s' beside %u others", hello->job,
                               AE_WIRE_MAX_JOBS);
        if (!job)
                job = ae_job_new(core, hello->job, hello->world, hello->token, spec->uid);
        if (strcmp(job->token, hello->token) != 0)
                return ae_fail(AE_EAUTH, "wrong token for job '%s'", hello->job);
        if (job->uid != spec->uid && spec->uid != 0)
                return ae_fail(AE_EAUTH, "job '%s' belongs to uid %u, not to uid %u", hello->job,
                               job->uid, spec->uid);
        if (!hello->reader && job->world != hello->world)
                return ae_fail(AE_EMISMATCH, "job '%s' has %u ranks, rank %u says %u", hello->job,
                               job->world, hello->rank, hello->world);
        *ret_job = job;
        return 0;
}

static int check_rank_free(struct ae_job *job, uint32_t rank)
{
        struct ae_worker *worker;

        ae_list_for_each(worker, &job->core->workers, link) {
                if (worker->job == job && !worker->reader && worker->rank == rank)
                        return ae_fail(AE_EEXIST,
                                       "rank %u of job '%s' is claimed by pid %d on node %u", rank,
                                       job->name, worker->pid, job->core->options.node);
        }
        return 0;
}

static int make_pages(struct ae_worker *worker, uint64_t ring_len)
{
        const struct ae_core_options *options = &worker->core->options;
        struct ae_region_spec page = { .name = "autoep-page", .shared = true,
                                       .len = ae_align_up(sizeof(struct ae_local_page), 4096) };
        struct ae_region_spec grad = { .name = "autoep-grad", .shared = true, .data = true };
        struct ae_local_page *shared;
        int r;

        ring_len = ring_len ? ring_len : 32 * AE_MIB;
        if (ring_len < AE_LOCAL_RING_MIN || ring_len > AE_LOCAL_RING_MAX)
                return ae_fail(AE_EINVAL, "a gradient ring of %" PRIu64 " bytes: it may have %"
                               PRIu64 " to %" PRIu64, ring_len, (uint64_t)AE_LOCAL_RING_MIN,
                               (uint64_t)AE_LOCAL_RING_MAX);
        grad.len = ae_align_up(ring_len, 4096);
        r = options->ops->region_new(options->user, &page, &worker->page);
        if (r < 0)
                return r;
        r = options->ops->region_new(options->user, &grad, &worker->grad);
        if (r < 0)
                return r;
        shared = (struct ae_local_page *)worker->page->base;
        shared->magic = AE_LOCAL_MAGIC;
        shared->version = AE_WIRE_VERSION;
        shared->rank = worker->rank;
        shared->grad_len = grad.len;
        return 0;
}

int ae_core_worker_new(struct ae_core *core, const struct ae_worker_spec *spec,
                       struct ae_worker **ret_worker)
{
        struct ae_job *job = NULL;
        struct ae_worker *worker;
        int r;

        r = check_hello(core, spec, &job);
        if (r == 0 && !spec->hello->reader)
                r = check_rank_free(job, spec->hello->rank);
        if (r < 0)
                return r;
        worker = ae_table_new(core, 1, sizeof(*worker));
        worker->core = core;
        worker->job = job;
        worker->session = spec->session;
        worker->reader = spec->hello->reader;
        worker->rank = spec->hello->reader ? AE_WIRE_NONE : spec->hello->rank;
        worker->pid = spec->pid;
        worker->uid = spec->uid;
        worker->incarnation = spec->hello->incarnation;
        worker->hold_len = spec->hello->hold_len;
        worker->bell = -1;
        ae_list_push(&core->workers, &worker->link);
        r = make_pages(worker, spec->hello->ring_len);
        if (r < 0) {
                ae_core_worker_gone(worker, "its pages could not be made");
                return r;
        }
        *ret_worker = worker;
        return 0;
}

void ae_form_gone(struct ae_worker *worker)
{
        struct ae_job *job = worker->job;

        if (!worker->reader && !worker->joined && !worker->dead)
                send_join(worker, true);
        release_unclaimed(job);
}

void ae_core_worker_attach(struct ae_worker *worker, int bell)
{
        worker->bell = bell;
        if (worker->reader)
                send_hello_ok(worker);
        else
                send_join(worker, false);
        ae_core_settle(worker->core);
}

void ae_form_again(struct ae_worker *worker)
{
        struct ae_core *core = worker->core;
        struct ae_job *ended = worker->job;
        struct ae_job *job = ae_core_job_named(core, ended->name);

        if (!job && ae_core_jobs_full(core)) {
                worker->dead = true;
                ae_worker_error(worker, 0, AE_EOVERFLOW, "no room for another job");
                return;
        }
        if (!job)
                job = ae_job_new(core, ended->name, ended->world, ended->token, ended->uid);
        worker->job = job;
        send_join(worker, false);
}

void *ae_core_worker_session(const struct ae_worker *worker)
{
        return worker->session;
}

struct ae_region *ae_core_worker_page(const struct ae_worker *worker)
{
        return worker->page;
}

void ae_form_left(struct ae_job *job, uint32_t rank)
{
        if (rank >= job->world || job->members[rank].left)
                return;
        if (job->state < AE_JOB_LIVE) {
                unjoin(job, rank, "has left");
                return;
        }
        job->members[rank].left = true;
        job->n_left++;
        if (job->n_left == job->world)
                ae_job_fail(job, AE_ECLOSED, "all ranks have left job '%s'", job->name);
        else
                ae_wait_left(job);
}

/* The decider passes it on, for it may know members that the sender did not. */
static void on_fail(struct ae_job *job, const Autoep__Fail *fail)
{
        if (ae_core_is_decider(job->core))
                ae_job_fail(job, fail->status, "%s", fail->text);
        else
                ae_job_failed(job, fail->status, fail->text);
}

/* ---- control messages ------------------------------------------------------------------- */

void ae_form_control(struct ae_core *core, uint32_t job_id, uint32_t node, uint32_t type,
                     const ProtobufCMessage *message)
{
        struct ae_job *job = ae_core_job(core, job_id);

        if (type == AE_CONTROL_JOIN && ((const Autoep__Join *)message)->withdrawn)
                on_withdrawn(core, node, (const Autoep__Join *)message);
        else if (type == AE_CONTROL_JOIN)
                on_join(core, node, (const Autoep__Join *)message);
        if (type == AE_CONTROL_JOIN_REPLY)
                on_join_reply(core, (const Autoep__JoinReply *)message);
        if (type == AE_CONTROL_START)
                ae_start_on(core, job_id, (const Autoep__Start *)message);
        if (!job || job->state >= AE_JOB_FAILED)
                return;
        if (type == AE_CONTROL_OFFER && !job->offer && job->state == AE_JOB_FORMING) {
                struct ae_model offered = { .message = ((const Autoep__Offer *)message)->model };

                if (ae_model_copy(&offered, &job->offer) < 0)
                        ae_job_fail(job, AE_EPROTO, "rank 0's model: %s", ae_error_text());
                else
                        ae_start_maybe(job);
        }
        if (type == AE_CONTROL_GRANTS)
                ae_memory_granted(job, node, (const Autoep__Grants *)message);
        if (type == AE_CONTROL_READY)
                ae_start_ready(job, node, (const Autoep__Ready *)message);
        if (type == AE_CONTROL_FAIL)
                on_fail(job, (const Autoep__Fail *)message);
        if (type == AE_CONTROL_LEFT)
                ae_form_left(job, ((const Autoep__Left *)message)->rank);
        if (type == AE_CONTROL_PAUSE_NOTE)
                ae_round_pause(job, (const Autoep__PauseNote *)message);
        if (type == AE_CONTROL_DECIDE)
                ae_round_put(job, node, ((const Autoep__Decide *)message)->put_id,
                             ((const Autoep__Decide *)message)->version,
                             ((const Autoep__Decide *)message)->initial);
        if (type == AE_CONTROL_DECIDE_REPLY)
                ae_round_put_reply(job, node, (const Autoep__DecideReply *)message);
}

/* ---- waiting ---------------------------------------------------------------------------- */

/* Whether the decider waits for @rank: to join, later to register. It knows that rank by rank for
 * its own node and node by node for others. */
static bool is_missing(const struct ae_job *job, uint32_t rank)
{
        uint32_t node;

        if (!job->members[rank].joined || job->state == AE_JOB_FORMING)
                return !job->members[rank].joined;
        node = job->rank_node[rank];
        if (job->peers[node].ready || node != job->core->options.node)
                return !job->peers[node].ready;
        return !job->locals[job->rank_local[rank]] || !job->locals[job->rank_local[rank]]->model;
}

/* Appends "3, 5" and so on, cut after a dozen. */
static void list_ranks(const struct ae_job *job, char *text, size_t size)
{
        size_t len = 0;
        uint32_t n = 0;

        text[0] = '\0';
        for (uint32_t rank = 0; rank < job->world; rank++) {
                if (!is_missing(job, rank))
                        continue;
                if (n++ == 12) {
                        (void)snprintf(text + len, size - len, ", ...");
                        return;
                }
                len += (size_t)snprintf(text + len, size - len, "%s%u", len ? ", " : "", rank);
        }
}

static bool missing_node(const struct ae_job *job, char *text, size_t size)
{
        const struct ae_core *core = job->core;

        for (uint32_t node = 0; node < core->options.n_nodes; node++) {
                if (core->peers[node].up)
                        continue;
                (void)snprintf(text, size, "job '%.80s' waits for node %u%s%.128s", job->name, node,
                               core->peers[node].note[0] ? ": " : " to connect",
                               core->peers[node].note);
                return true;
        }
        return false;
}

static void waiting_text(const struct ae_job *job, char *text, size_t size)
{
        char ranks[96];

        if (missing_node(job, text, size))
                return;
        list_ranks(job, ranks, sizeof(ranks));
        if (job->n_joined < job->world)
                (void)snprintf(text, size,
                               "job '%.80s' waits for rank %s to join (%u of %u are there)",
                               job->name, ranks, job->n_joined, job->world);
        else if (job->state == AE_JOB_FORMING)
                (void)snprintf(text, size, "job '%.80s' waits for rank 0 to register the model",
                               job->name);
        else if (ranks[0])
                (void)snprintf(
                        text, size,
                        "job '%.80s' waits for rank %s to register (%u of %u nodes are ready)",
                        job->name, ranks, job->n_ready, job->core->options.n_nodes);
        else
                (void)snprintf(text, size, "job '%.80s' waits for the initial values of rank 0",
                               job->name);
}

void ae_form_show(struct ae_job *job, const char *text)
{
        struct ae_worker *worker;

        ae_list_for_each(worker, &job->core->workers, link) {
                if (worker->job != job || worker->registered)
                        continue;
                ae_local_text_set(&((struct ae_local_page *)worker->page->base)->why, text);
                worker->told = true;
        }
}

void ae_form_tick(struct ae_job *job)
{
        struct ae_core *core = job->core;
        struct ae_wire_waiting waiting = { .head = ae_job_head(job, AE_WIRE_WAITING),
                                           .n_present = ae_wait_n_present(job) };

        if (!ae_core_is_decider(core)) {
                if (!core->peers[0].up && missing_node(job, waiting.text, sizeof(waiting.text)))
                        ae_form_show(job, waiting.text);
                return;
        }
        if (job->state == AE_JOB_FORMING) {
                ae_start_maybe(job);
                if (job->state != AE_JOB_FORMING)
                        return; /* its Start is still on its way, to this node too */
        }
        if (core->now_ns - job->waiting_sent_ns < WAITING_EVERY_NS)
                return;
        job->waiting_sent_ns = core->now_ns;
        waiting_text(job, waiting.text, sizeof(waiting.text));
        ae_job_msg_all(job, &waiting, sizeof(waiting));
}
