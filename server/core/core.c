/* SPDX-License-Identifier: Apache-2.0 */
/* Entry of events into the core, messages to peers and to oneself, pools. One thread, the caller's.
 */
#include "server/core/core.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <assert.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct loop_msg {
        struct ae_list link;
        size_t len, cap;
        char data[];
};

void *ae_table_new(struct ae_core *core, size_t n, size_t size)
{
        void *table = ae_core_alloc(n, size);

        core->tables_len += malloc_usable_size(table);
        return table;
}

void *ae_table_grow(struct ae_core *core, void *table, size_t len)
{
        if (!table)
                return ae_table_new(core, 1, len);
        core->tables_len -= malloc_usable_size(table);
        table = realloc(table, len);
        if (!table)
                abort();
        core->tables_len += malloc_usable_size(table);
        return table;
}

void *ae_table_free(struct ae_core *core, void *table)
{
        size_t len = malloc_usable_size(table);

        assert(len <= core->tables_len);
        core->tables_len -= len;
        free(table);
        return NULL;
}

void *ae_core_alloc(size_t n, size_t size)
{
        void *memory = calloc(AE_MAX(n, (size_t)1), size);

        if (!memory)
                abort();
        return memory;
}

int ae_core_new(const struct ae_core_options *options, struct ae_core **ret_core)
{
        struct ae_core *core = calloc(1, sizeof(*core));

        if (!core)
                return ae_fail(AE_ENOMEM, "no memory for the core");
        core->options = *options;
        core->peers = ae_table_new(core, options->n_nodes, sizeof(*core->peers));
        core->peers[options->node].up = true;
        core->peers[options->node].incarnation = options->incarnation;
        ae_list_init(&core->jobs);
        ae_list_init(&core->workers);
        ae_list_init(&core->loop);
        ae_list_init(&core->loop_free);
        ae_ahead_init(&core->early, options->n_nodes);
        ae_pool_init(&core->tasks, sizeof(struct ae_task));
        ae_pool_init(&core->cookies, sizeof(struct ae_cookie));
        ae_pool_init(&core->pieces, sizeof(struct ae_piece));
        ae_pool_init(&core->sends, sizeof(struct ae_send));
        ae_pool_init(&core->serves, sizeof(struct ae_serve));
        ae_pool_init(&core->waiters, sizeof(struct ae_waiter));
        ae_pool_init(&core->flow_msgs, sizeof(struct ae_flow_msg));
        *ret_core = core;
        return 0;
}

static void free_list_of(struct ae_list *list, size_t link_off)
{
        struct ae_list *entry;

        while ((entry = ae_list_pop(list)))
                free((char *)entry - link_off);
}

struct ae_core *ae_core_free(struct ae_core *core)
{
        struct ae_job *job;

        if (!core)
                return NULL;
        assert(ae_list_empty(&core->workers)); /* sessions end first */
        ae_list_for_each_safe(job, &core->jobs, link) {
                assert(job->n_tasks_out == 0 && job->n_puts_out == 0);
                ae_job_release(job);
        }
        ae_ahead_deinit(&core->early);
        free_list_of(&core->loop, offsetof(struct loop_msg, link));
        free_list_of(&core->loop_free, offsetof(struct loop_msg, link));
        ae_pool_deinit(&core->tasks);
        ae_pool_deinit(&core->cookies);
        ae_pool_deinit(&core->pieces);
        ae_pool_deinit(&core->sends);
        ae_pool_deinit(&core->serves);
        ae_pool_deinit(&core->waiters);
        ae_pool_deinit(&core->flow_msgs);
        for (uint32_t node = 0; node < core->options.n_nodes; node++)
                free(core->peers[node].data);
        ae_table_free(core, core->peers);
        assert(core->tables_len == 0);
        free(core);
        return NULL;
}

bool ae_core_is_decider(const struct ae_core *core)
{
        return core->options.node == 0;
}

void ae_core_log(struct ae_core *core, int level, const char *format, ...)
{
        char text[1024];
        va_list args;

        va_start(args, format);
        (void)vsnprintf(text, sizeof(text), format, args);
        va_end(args);
        core->options.ops->log(core->options.user, level, text);
}

void ae_core_stats(const struct ae_core *core, struct ae_core_stats *ret_stats)
{
        const struct ae_job *job;

        *ret_stats = core->stats;
        ret_stats->memory_len = core->memory_len;
        ret_stats->tables_len = core->tables_len + core->tasks.len + core->cookies.len +
                                core->pieces.len + core->sends.len + core->serves.len +
                                core->waiters.len + core->flow_msgs.len;
        ae_list_for_each(job, &core->jobs, link) {
                ret_stats->tables_len += (job->cache_free.cap + job->overflow_free.cap) *
                                         sizeof(struct ae_extent);
                if (job->layout)
                        ret_stats->tables_len += ae_layout_memory(job->layout);
        }
}

/* ---- jobs ------------------------------------------------------------------------------- */

struct ae_job *ae_core_job(struct ae_core *core, uint32_t id)
{
        struct ae_job *job;

        ae_list_for_each(job, &core->jobs, link) {
                if (job->id == id && job->id != AE_WIRE_NONE && !job->released)
                        return job;
        }
        return NULL;
}

struct ae_job *ae_core_job_named(struct ae_core *core, const char *name)
{
        struct ae_job *job;

        ae_list_for_each(job, &core->jobs, link) {
                if (job->state < AE_JOB_FAILED && !job->released && strcmp(job->name, name) == 0)
                        return job;
        }
        return NULL;
}

/* ---- messages out ----------------------------------------------------------------------- */

static void loop_push(struct ae_core *core, const void *data, size_t len)
{
        struct ae_list *entry = ae_list_pop(&core->loop_free);
        struct loop_msg *msg = entry ? ae_list_entry(entry, struct loop_msg, link) : NULL;

        if (!msg || msg->cap < len) {
                free(msg);
                msg = malloc(sizeof(*msg) + AE_MAX(len, (size_t)4096));
                if (!msg)
                        abort();
                msg->cap = AE_MAX(len, (size_t)4096);
                ae_list_init(&msg->link);
        }
        msg->len = len;
        memcpy(msg->data, data, len);
        ae_list_push(&core->loop, &msg->link);
}

static void send_to(struct ae_core *core, uint32_t node, const void *data, size_t len)
{
        if (node == core->options.node) {
                loop_push(core, data, len);
                return;
        }
        core->stats.msgs_sent++;
        core->options.ops->msg(core->options.user, node, data, len);
}

void ae_job_msg(struct ae_job *job, uint32_t node, const void *data, size_t len)
{
        if (node != job->core->options.node && job->page)
                atomic_fetch_add_explicit(&job->page->messages_sent, 1, memory_order_relaxed);
        send_to(job->core, node, data, len);
}

void ae_job_unsent(struct ae_job *job, uint32_t node)
{
        struct ae_job_peer *peer = &job->peers[node];

        if (ae_list_empty(&peer->unsent))
                ae_list_push(&job->unsent, &peer->unsent);
}

static void send_unsent(struct ae_job *job)
{
        struct ae_list *entry;

        while ((entry = ae_list_pop(&job->unsent))) {
                uint32_t node = (uint32_t)(ae_list_entry(entry, struct ae_job_peer, unsent) -
                                           job->peers);

                ae_cache_flush(job, node);
                ae_owner_flush(job, node);
        }
}

void ae_job_msg_all(struct ae_job *job, const void *data, size_t len)
{
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++)
                ae_job_msg(job, node, data, len);
}

struct ae_wire_head ae_job_head(const struct ae_job *job, enum ae_wire_op op)
{
        return (struct ae_wire_head){ .op = (uint16_t)op, .job = job->id, .epoch = job->epoch,
                                      .round = job->round };
}

/* To a peer in as many msgs as it takes; each head says how many bytes follow in others. The heads
 * overwrite what has been sent already. */
void ae_core_control(struct ae_core *core, uint32_t node, uint32_t job_id, uint32_t type,
                     const ProtobufCMessage *message)
{
        AE_CLEANUP(ae_cleanup_free) char *data = NULL;
        struct ae_wire_head head = { .op = AE_WIRE_CONTROL, .type = (uint16_t)type, .job = job_id };
        size_t len = ae_control_size(message);
        size_t most = node == core->options.node ? len : AE_NET_MSG_MAX - sizeof(head);
        char *at;

        assert(len <= AE_CONTROL_FRAME_MAX); /* all that grows with a job is checked before */
        at = data = ae_core_alloc(1, sizeof(head) + len);
        ae_control_pack(message, (uint8_t *)data + sizeof(head));
        do {
                size_t n = AE_MIN(len, most);

                len -= n;
                head.round = len;
                memcpy(at, &head, sizeof(head));
                send_to(core, node, at, sizeof(head) + n);
                at += n;
        } while (len);
}

void ae_job_control(struct ae_job *job, uint32_t node, uint32_t type,
                    const ProtobufCMessage *message)
{
        ae_core_control(job->core, node, job->id, type, message);
}

void ae_worker_error(struct ae_worker *worker, uint64_t id, int status, const char *text)
{
        Autoep__Error message = AUTOEP__ERROR__INIT;
        struct ae_core_options *options = &worker->core->options;

        message.id = id;
        message.status = status;
        message.text = (char *)(uintptr_t)text; /* packed at once, not kept */
        options->ops->worker_send(options->user, worker, AE_CONTROL_ERROR, &message.base, NULL, 0);
}

void ae_worker_wake(struct ae_worker *worker)
{
        struct ae_core_options *options = &worker->core->options;

        options->ops->worker_wake(options->user, worker);
}

/* ---- tasks and puts --------------------------------------------------------------------- */

struct ae_task *ae_job_task(struct ae_job *job, enum ae_task_kind kind,
                            void (*done)(struct ae_task *task), void *owner)
{
        struct ae_task *task = ae_pool_take(&job->core->tasks);

        task->kind = kind;
        task->job = job;
        task->done = done;
        task->owner = owner;
        return task;
}

void ae_job_run(struct ae_task *task)
{
        struct ae_core_options *options = &task->job->core->options;

        task->job->n_tasks_out++;
        options->ops->task(options->user, task);
}

void ae_job_put(struct ae_job *job, uint32_t node, enum ae_cookie_kind kind, void *owner,
                const struct ae_net_key *key, uint64_t off, struct ae_region *src, uint64_t src_off,
                uint64_t len, uint64_t note)
{
        struct ae_core *core = job->core;
        struct ae_cookie *cookie = ae_pool_take(&core->cookies);

        assert(node != core->options.node);
        cookie->kind = kind;
        cookie->job = job;
        cookie->owner = owner;
        job->n_puts_out++;
        core->stats.puts_sent++;
        core->stats.put_bytes_sent += len;
        core->options.ops->put(core->options.user, node, key, off, src, src_off, len, note,
                               (uint64_t)(uintptr_t)cookie);
}

/* ---- messages in ------------------------------------------------------------------------ */

static int control_msg(struct ae_core *core, uint32_t node, const struct ae_wire_head *head,
                       size_t len)
{
        const char *body = (const char *)(head + 1);
        AE_CLEANUP(ae_control_free_p) ProtobufCMessage *message = NULL;
        struct ae_job *job = ae_core_job(core, head->job);
        int r;

        r = ae_control_unpack(head->type, body, len, &message);
        if (r < 0)
                return r;
        r = ae_check_control(core, job, node, head, message);
        if (r < 0)
                return r;
        if (head->type >= AE_CONTROL_STAGE && head->type <= AE_CONTROL_FETCH_REPLY)
                return job ? ae_state_control(job, node, head->type, message) : 0;
        if (head->type == AE_CONTROL_GRANTS && (!job || !job->peers)) {
                /* the sender has heard Start before us */
                return ae_early_msg(&core->early, head->job, node, head, sizeof(*head) + len);
        }
        ae_form_control(core, head->job, node, head->type, message);
        return 0;
}

static int job_msg(struct ae_job *job, uint32_t node, const struct ae_wire_head *head, size_t len)
{
        int r;

        if (job->state == AE_JOB_FAILED || job->state == AE_JOB_ENDED || head->epoch != job->epoch)
                return 0; /* late */
        if (!job->peers && head->op != AE_WIRE_WAITING)
                return ae_fail(AE_EPROTO, "message %u for job '%s' that has not started", head->op,
                               job->name);
        r = ae_check_hot(job, node, head, len);
        if (r < 0)
                return r;
        switch (head->op) {
        case AE_WIRE_WANT:
                if (len < sizeof(struct ae_wire_want))
                        return ae_fail(AE_EPROTO, "WANT of %zu bytes is too short", len);
                return ae_serve_want(job, node, (const struct ae_wire_want *)head);
        case AE_WIRE_XCREDIT:
                return ae_flow_credit(job, (const struct ae_wire_xcredit *)head, len);
        default:
                return ae_round_msg(job, node, head, len);
        }
}

static int dispatch(struct ae_core *core, uint32_t node, const void *data, size_t len)
{
        struct ae_wire_head head;
        struct ae_job *job;

        if (len < sizeof(head))
                return ae_fail(AE_EPROTO, "a message of %zu bytes from node %u is too short", len,
                               node);
        memcpy(&head, data, sizeof(head));
        if (head.op == AE_WIRE_CONTROL)
                return control_msg(core, node, data, len - sizeof(head));
        if (head.op == AE_WIRE_WANT &&
            (len < sizeof(struct ae_wire_want) ||
             (len - sizeof(struct ae_wire_want)) / sizeof(struct ae_wire_want_item) <
                     ((const struct ae_wire_want *)data)->n_items))
                return ae_fail(AE_EPROTO, "WANT from node %u is shorter than it says", node);
        job = ae_core_job(core, head.job);
        return job ? job_msg(job, node, data, len) : 0;
}

/* ---- what came too early ---------------------------------------------------------------- */

static void play(struct ae_core *core, const struct ae_early *early)
{
        struct ae_job *job = ae_core_job(core, early->job);

        if (early->notify)
                ae_core_notify(core, early->node, NULL, early->off, early->put_len, early->note);
        else if (dispatch(core, early->node, early->data, early->len) < 0 && job)
                ae_job_fail(job, AE_EPROTO, "node %u: %s", early->node, ae_error_text());
}

void ae_early_play(struct ae_core *core, struct ae_ahead *ahead, uint32_t job)
{
        struct ae_list played = AE_LIST_INIT(played);
        struct ae_list *entry;

        ae_early_take(ahead, job, &played);
        while ((entry = ae_list_pop(&played))) {
                struct ae_early *early = ae_list_entry(entry, struct ae_early, link);

                play(core, early);
                free(early);
        }
}

/* Works off messages to oneself, then sends what has been collected. */
void ae_core_settle(struct ae_core *core)
{
        struct ae_list *entry;
        struct ae_job *job;

        if (core->settling)
                return;
        core->settling = true;
        do {
                while ((entry = ae_list_pop(&core->loop))) {
                        struct loop_msg *msg = ae_list_entry(entry, struct loop_msg, link);
                        int r = dispatch(core, core->options.node, msg->data, msg->len);

                        assert(r == 0); /* we keep our own protocol */
                        ae_list_push(&core->loop_free, &msg->link);
                }
                ae_list_for_each(job, &core->jobs, link)
                        send_unsent(job);
        } while (!ae_list_empty(&core->loop));
        core->settling = false;
        ae_list_for_each_safe(job, &core->jobs, link) {
                if (job->released && job->n_tasks_out == 0 && job->n_puts_out == 0)
                        ae_job_release(job);
        }
}

static void forget_pieces(struct ae_peer *peer)
{
        free(peer->data);
        peer->data = NULL;
        peer->len = peer->cap = 0;
        peer->n_left = 0;
}

static void data_reserve(struct ae_peer *peer, size_t len)
{
        if (len <= peer->cap)
                return;
        peer->cap = AE_MAX(2 * peer->cap, len);
        peer->data = realloc(peer->data, peer->cap);
        if (!peer->data)
                abort();
}

/* One piece more of a control message. Memory grows with what has come, not with what is said. */
static int take_piece(struct ae_peer *peer, uint32_t node, const struct ae_wire_head *head,
                      size_t len)
{
        size_t n = len - sizeof(*head);
        struct ae_wire_head first = *head;

        if (peer->len)
                memcpy(&first, peer->data, sizeof(first));
        if (n == 0 || first.type != head->type || first.job != head->job ||
            head->round > AE_CONTROL_FRAME_MAX - n ||
            (peer->len ? head->round + n != peer->n_left : head->round + n > AE_CONTROL_FRAME_MAX))
                return ae_fail(AE_EPROTO, "a piece of %s from node %u does not fit",
                               ae_control_name(head->type), node);
        if (peer->len == 0) {
                n = len;
                data_reserve(peer, n);
                memcpy(peer->data, head, n);
        } else {
                data_reserve(peer, peer->len + n);
                memcpy(peer->data + peer->len, head + 1, n);
        }
        peer->len += n;
        peer->n_left = head->round;
        return 0;
}

static int control_piece(struct ae_core *core, uint32_t node, const struct ae_wire_head *head,
                         size_t len)
{
        struct ae_peer *peer = &core->peers[node];
        AE_CLEANUP(ae_cleanup_free) char *data = NULL;
        int r = take_piece(peer, node, head, len);

        if (r < 0)
                forget_pieces(peer);
        if (r < 0 || peer->n_left)
                return r;
        data = peer->data;
        len = peer->len;
        peer->data = NULL;
        forget_pieces(peer);
        return dispatch(core, node, data, len);
}

int ae_core_msg(struct ae_core *core, uint32_t node, const void *data, size_t len)
{
        struct ae_wire_head head = { 0 };
        int r;

        core->stats.msgs_received++;
        memcpy(&head, data, AE_MIN(len, sizeof(head)));
        if (len >= sizeof(head) && head.op == AE_WIRE_CONTROL &&
            (head.round || core->peers[node].n_left))
                r = control_piece(core, node, data, len);
        else
                r = dispatch(core, node, data, len);
        ae_core_settle(core);
        return r;
}

void ae_core_notify(struct ae_core *core, uint32_t node, struct ae_net_mem *mem, uint64_t off,
                    uint64_t len, uint64_t note)
{
        struct ae_job *job = ae_core_job(core, ae_note_job(note));

        if (!job || job->state == AE_JOB_FAILED || job->state == AE_JOB_ENDED || !job->absent)
                return; /* late: the memory is there still, nobody looks at it */
        switch (ae_note_kind(note)) {
        case AE_NOTE_GATHER:
                atomic_fetch_add_explicit(&job->page->gather_recv_len, len, memory_order_relaxed);
                ae_cache_arrived(job, note & 0xffffff, (note >> 24) & (AE_WIRE_MAX_SLICES - 1),
                                 ae_note_stamp(note));
                break;
        case AE_NOTE_PART:
                if (ae_owner_arrived(job, node, note, off, len) < 0)
                        ae_job_fail(job, AE_EPROTO, "node %u: %s", node, ae_error_text());
                break;
        case AE_NOTE_FLOW:
                if (ae_flow_arrived(job, note) < 0)
                        ae_job_fail(job, AE_EPROTO, "node %u: %s", node, ae_error_text());
                break;
        case AE_NOTE_STATE:
                ae_state_arrived(job, node, mem, note);
                break;
        }
        ae_core_settle(core);
}

void ae_core_put_done(struct ae_core *core, uint64_t value, int status)
{
        struct ae_cookie *cookie = (struct ae_cookie *)(uintptr_t)value;
        struct ae_job *job = cookie->job;

        assert(job->n_puts_out > 0);
        job->n_puts_out--;
        (void)status; /* a lost peer fails the job through ae_core_peer_down() */
        if (cookie->kind == AE_COOKIE_SERVE)
                ae_serve_put_done(cookie->owner);
        if (cookie->kind == AE_COOKIE_FLOW)
                ae_flow_put_done(cookie->owner);
        if (cookie->kind == AE_COOKIE_STATE)
                ae_state_put_done(cookie->owner);
        ae_pool_give(&core->cookies, cookie);
        ae_core_settle(core);
}

void ae_core_task_done(struct ae_core *core, struct ae_task *task)
{
        assert(task->job->n_tasks_out > 0);
        task->job->n_tasks_out--;
        task->done(task);
        ae_pool_give(&core->tasks, task);
        ae_core_settle(core);
}

void ae_core_tick(struct ae_core *core, uint64_t now_ns)
{
        struct ae_job *job;

        core->now_ns = now_ns;
        ae_list_for_each_safe(job, &core->jobs, link) {
                if (job->released || job->state >= AE_JOB_FAILED)
                        continue;
                if (job->state == AE_JOB_LIVE) {
                        if (job->starved)
                                ae_cache_retry(job);
                        ae_round_tick(job);
                } else {
                        ae_form_tick(job);
                }
        }
        ae_core_settle(core);
}

/* ---- peers ------------------------------------------------------------------------------ */

void ae_core_peer_note(struct ae_core *core, uint32_t node, const char *text)
{
        (void)snprintf(core->peers[node].note, sizeof(core->peers[node].note), "%s",
                       text ? text : "");
}

static bool has_member(const struct ae_job *job, uint32_t node)
{
        for (uint32_t rank = 0; rank < job->world; rank++) {
                if (job->members[rank].joined && job->members[rank].node == node)
                        return true;
        }
        return false;
}

void ae_core_peer_down(struct ae_core *core, uint32_t node, const char *text)
{
        struct ae_job *job;
        bool was_up = core->peers[node].up;

        core->peers[node].up = false;
        forget_pieces(&core->peers[node]);
        ae_core_peer_note(core, node, text);
        /* without the decider no Start will come: what others granted for it is void */
        for (uint32_t i = 0; i < core->options.n_nodes; i++) {
                if (i == node || node == 0)
                        ae_early_drop(&core->early, i);
        }
        if (!was_up)
                return;
        ae_list_for_each_safe(job, &core->jobs, link) {
                if (job->state >= AE_JOB_FAILED || job->released)
                        continue;
                /* before Start: the decider, and to it the nodes of ranks that have joined */
                if (job->peers || node == 0 || has_member(job, node))
                        ae_job_fail(job, AE_ELOST, "node %u was lost in round %llu of job '%s': %s",
                                    node, (unsigned long long)job->round, job->name, text);
        }
        ae_core_settle(core);
}

/* A leave counts when all that was posted before it is taken, which may wait for a put. */
static int drain(struct ae_worker *worker)
{
        int r = worker->page ? ae_ring_drain(worker) : 0;

        if (r < 0 || !worker->leaving || (worker->page && !ae_ring_empty(worker)))
                return r;
        worker->leaving = false;
        ae_form_leave(worker, worker->leave_id);
        return 0;
}

int ae_core_worker_message(struct ae_worker *worker, uint32_t type, ProtobufCMessage *message,
                           int fd)
{
        struct ae_core *core = worker->core;
        int r = 0;

        switch (type) {
        case AE_CONTROL_REGISTER:
                ae_form_register(worker, (Autoep__Register *)message, fd);
                break;
        case AE_CONTROL_LEAVE:
                /* what it posted before still counts: another rank may wait for its last exchange
                 */
                worker->leaving = true;
                worker->leave_id = ((Autoep__Leave *)message)->id;
                r = drain(worker);
                ae_control_free(message);
                ae_cleanup_close(&fd);
                break;
        case AE_CONTROL_GET:
        case AE_CONTROL_PUT:
        case AE_CONTROL_PAUSE:
                ae_state_request(worker, type, message, fd);
                break;
        default:
                ae_control_free(message);
                ae_cleanup_close(&fd);
                r = ae_fail(AE_EPROTO, "a worker may not send %s", ae_control_name(type));
        }
        ae_core_settle(core);
        return r;
}

int ae_core_worker_ring(struct ae_worker *worker)
{
        int r = drain(worker);

        ae_core_settle(worker->core);
        return r;
}
