/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who is waited for, in words, before anyone's deadline passes: the decider tells all nodes what
 * the round lacks, each node tells a worker what its gather lacks. Also pauses, which make
 * deadlines grow.
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define SECOND_NS UINT64_C(1000000000)
#define AFTER_NS (100 * UINT64_C(1000000))
#define EVERY_NS (250 * UINT64_C(1000000))

int ae_wait_closed(struct ae_job *job, const struct ae_wire_closed *closed, size_t len)
{
        if (len < sizeof(*closed) || closed->rank >= job->world)
                return ae_fail(AE_EPROTO, "CLOSED of a rank that is not there");
        job->members[closed->rank].closed = true;
        job->members[closed->rank].pause_until_ns = 0;
        if (!job->closed_since_ns)
                job->closed_since_ns = AE_MAX(job->core->now_ns, UINT64_C(1));
        return 0;
}

/* Of waits that have begun by the growth, of those that begin now by what is left of it. */
static void grow_deadlines(struct ae_job *job, uint64_t pause_ns)
{
        struct ae_local_params *page = job->page;
        uint64_t seen = atomic_load_explicit(&page->pause_ns, memory_order_relaxed);
        uint64_t until;

        if (pause_ns <= seen)
                return;
        until = atomic_load_explicit(&page->pause_until_ns, memory_order_relaxed);
        until = AE_MAX(until, job->core->now_ns) + (pause_ns - seen);
        atomic_store_explicit(&page->pause_until_ns, until, memory_order_relaxed);
        /* Pairs with ae_deadline_init(): who sees the growth sees until when. */
        atomic_store_explicit(&page->pause_ns, pause_ns, memory_order_release);
}

int ae_wait_shown(struct ae_job *job, const struct ae_wire_waiting *waiting, size_t len)
{
        char text[AE_WIRE_TEXT];

        if (len < sizeof(*waiting))
                return ae_fail(AE_EPROTO, "WAITING is too short");
        if (waiting->n_present > job->world)
                return ae_fail(AE_EPROTO, "WAITING speaks of %u ranks, job '%s' has %u",
                               waiting->n_present, job->name, job->world);
        job->n_present = waiting->n_present;
        memcpy(text, waiting->text, sizeof(text));
        text[sizeof(text) - 1] = '\0';
        if (!job->committed)
                ae_form_show(job, text);
        if (!job->page)
                return 0;
        ae_local_text_set(&job->page->waiting, text);
        grow_deadlines(job, waiting->pause_ns);
        return 0;
}

void ae_wait_for_word(struct ae_job *job)
{
        char text[AE_WIRE_TEXT];

        (void)snprintf(text, sizeof(text),
                       "round %" PRIu64 " waits for word from node 0, which sees all ranks",
                       job->round);
        ae_local_text_set(&job->page->waiting, text);
}

static void send_waiting(struct ae_job *job, const char *text)
{
        struct ae_wire_waiting waiting = { .head = ae_job_head(job, AE_WIRE_WAITING),
                                           .pause_ns = job->pause_ns,
                                           .n_present = ae_wait_n_present(job) };

        (void)snprintf(waiting.text, sizeof(waiting.text), "%s", text);
        ae_job_msg_all(job, &waiting, sizeof(waiting));
}

/* "rank 3 (node 1), 5 (node 2)" of those that have not closed; false when all have. */
static bool open_ranks(const struct ae_job *job, char *text, size_t size)
{
        size_t len = 0;
        uint32_t n = 0;

        for (uint32_t rank = 0; rank < job->world; rank++) {
                if (job->members[rank].closed)
                        continue;
                if (n++ == 8) {
                        (void)snprintf(text + len, size - len, ", ...");
                        break;
                }
                len += (size_t)snprintf(text + len, size - len, "%s%u (node %u)", n > 1 ? ", " : "",
                                        rank, job->rank_node[rank]);
        }
        return n > 0;
}

static void round_text(const struct ae_job *job, char *text, size_t size)
{
        char who[160];

        text[0] = '\0';
        if (open_ranks(job, who, sizeof(who))) {
                size_t len = (size_t)snprintf(text, size, "round %" PRIu64 " waits for rank %s to "
                                              "ask for the step", job->round, who);

                if (len + 2 >= size)
                        return;
                ae_wait_pauses(job, text + len + 2, size - len - 2);
                if (text[len + 2])
                        memcpy(text + len, "; ", 2);
                return;
        }
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++) {
                if (job->peers[node].voted)
                        continue;
                (void)snprintf(text, size, "round %" PRIu64 " waits for the sums of node %u",
                               job->round, node);
                return;
        }
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++) {
                if (job->peers[node].prepared)
                        continue;
                (void)snprintf(text, size,
                               "round %" PRIu64 " waits for node %u to prepare the verdict",
                               job->round, node);
                return;
        }
}

/* What the round waits for; "" when nobody has asked for the step. */
static void send_round(struct ae_job *job)
{
        char text[AE_WIRE_TEXT] = "";

        if (job->closed_since_ns)
                round_text(job, text, sizeof(text));
        send_waiting(job, text);
}

/* ---- pauses and leaving ----------------------------------------------------------------- */

uint32_t ae_wait_n_present(const struct ae_job *job)
{
        uint32_t n = 0;

        if (!ae_core_is_decider(job->core))
                return job->n_present;
        for (uint32_t rank = 0; rank < job->world; rank++)
                n += job->members[rank].joined && !job->members[rank].left;
        return n;
}

uint64_t ae_wait_pause_ns(const struct ae_job *job, uint32_t rank)
{
        const struct ae_member *member = &job->members[rank];

        return member->pause_until_ns > job->core->now_ns
                       ? member->pause_until_ns - job->core->now_ns
                       : 0;
}

void ae_wait_pauses(const struct ae_job *job, char *text, size_t size)
{
        size_t len = 0;

        text[0] = '\0';
        for (uint32_t rank = 0; rank < job->world && len < size; rank++) {
                uint64_t left_ns = ae_wait_pause_ns(job, rank);

                if (left_ns)
                        len += (size_t)snprintf(text + len, size - len,
                                                "%srank %u pauses for %" PRIu64 " s more: %.120s",
                                                len ? ", " : "", rank,
                                                ae_div_up(left_ns, SECOND_NS),
                                                job->members[rank].pause_why);
        }
}

void ae_wait_pauses_over(struct ae_job *job)
{
        for (uint32_t rank = 0; rank < job->world; rank++)
                job->members[rank].pause_until_ns = 0;
}

/* On the decider, which tells the others, and on these. */
void ae_round_pause(struct ae_job *job, const Autoep__PauseNote *note)
{
        struct ae_member *member = &job->members[note->rank];
        uint64_t pause_ns = (uint64_t)note->seconds * SECOND_NS;

        free(member->pause_why);
        member->pause_why = strdup(note->reason);
        if (!member->pause_why)
                abort();
        member->pause_until_ns = job->core->now_ns + pause_ns;
        if (!ae_core_is_decider(job->core))
                return;
        if (ae_add_overflows(job->pause_ns, pause_ns, &job->pause_ns))
                job->pause_ns = UINT64_MAX;
        for (uint32_t node = 1; node < job->core->options.n_nodes; node++)
                ae_job_control(job, node, AE_CONTROL_PAUSE_NOTE, &note->base);
        send_round(job);
}

void ae_wait_left(struct ae_job *job)
{
        ae_round_tick(job); /* a rank that waits for this one must hear of it */
        if (job->state == AE_JOB_LIVE)
                send_round(job); /* before, the tick of a job that forms says it */
}

/* A rank that has left will never close; those who wait for it are told. */
static void check_left(struct ae_job *job)
{
        if (!job->n_left || !job->closed_since_ns)
                return;
        for (uint32_t rank = 0; rank < job->world; rank++) {
                if (!job->members[rank].left || job->members[rank].closed)
                        continue;
                ae_job_fail(job, AE_ELOST, "rank %u has left job '%s', round %" PRIu64
                            " cannot end without it", rank, job->name, job->round);
                return;
        }
}

static void gather_text(struct ae_job *job, struct ae_worker *worker)
{
        char text[AE_WIRE_TEXT];

        for (uint32_t i = 0; i < job->n_fetches; i++) {
                const struct ae_fetch *fetch = &job->fetches[i];
                struct ae_waiter *waiter;

                if (!fetch->used)
                        continue;
                ae_list_for_each(waiter, &fetch->waiters, link) {
                        if (waiter->worker != worker)
                                continue;
                        (void)snprintf(text, sizeof(text),
                                       "unit '%.80s' at version %" PRIu64 " (round %" PRIu64
                                       ") waits for %u slices, the first of node %u",
                                       job->layout->units[fetch->unit].name, job->version,
                                       job->round, fetch->n_left,
                                       ae_cache_missing_node(job, fetch));
                        ae_local_text_set(&((struct ae_local_page *)worker->page->base)->why, text);
                        return;
                }
        }
        ae_local_text_set(&((struct ae_local_page *)worker->page->base)->why,
                          "the node's cache has no room: other views must be released");
}

/* What it waits for, and nothing any more when it doesn't. */
static void tell_worker(struct ae_job *job, struct ae_worker *worker)
{
        struct ae_local_text *why = &((struct ae_local_page *)worker->page->base)->why;
        char text[AE_WIRE_TEXT] = "";
        bool waits = worker->n_waiting > 0 || ae_state_waits(worker, text, sizeof(text));

        if (worker->n_waiting)
                gather_text(job, worker);
        else if (waits || worker->told)
                ae_local_text_set(why, text);
        worker->told = waits;
}

void ae_round_tick(struct ae_job *job)
{
        struct ae_core *core = job->core;

        for (uint32_t i = 0; i < job->n_local; i++) {
                if (job->locals[i])
                        tell_worker(job, job->locals[i]);
        }
        if (!ae_core_is_decider(core) || !job->closed_since_ns)
                return;
        check_left(job);
        if (job->state != AE_JOB_LIVE || core->now_ns - job->closed_since_ns < AFTER_NS ||
            core->now_ns - job->waiting_sent_ns < EVERY_NS)
                return;
        job->waiting_sent_ns = core->now_ns;
        send_round(job);
}
