/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A simulated worker: a list of actions for each round, carried out one after another with delays
 * of chance between, over the library's pages. A missing wake shows as a hang.
 */
#include "tests/lib/simjob-private.h"

#include <inttypes.h>
#include <stdio.h>
#include <sys/mman.h>

uint64_t simworker_chance(struct simworker *worker, uint64_t n)
{
        return ae_sim_random(worker->job->sim) % n;
}

const char *simworker_text(const struct simworker *worker)
{
        static const char *const names[] = { "release all", "put",     "put wait", "get",
                                             "send",        "receive", "gather",   "range",
                                             "prefetch",    "release", "scatter",  "micro end",
                                             "step",        "idle",    "leave" };
        static char text[160];
        const struct simaction *action = &worker->actions[worker->at];

        if (!worker->params || worker->at >= worker->n_actions)
                return worker->worker ? "joins" : "is gone";
        (void)snprintf(text, sizeof(text), "action %u of %u: %s unit %u micro %u rank %u%s",
                       worker->at, worker->n_actions, names[action->kind], action->unit,
                       action->micro, action->rank, worker->begun ? " (waits)" : "");
        return text;
}

/* ---- rings ------------------------------------------------------------------------------ */

static void on_bell(void *user)
{
        struct simworker *worker = user;

        worker->rings = false;
        if (!worker->worker || !worker->node->node)
                return;
        if (ae_core_worker_ring(worker->worker) < 0)
                simjob_fail(worker->job, "rank %u: the core says: %s", worker->rank,
                            ae_error_text());
        simnode_kick(worker->node);
}

static void ring(struct simworker *worker)
{
        if (worker->rings)
                return;
        worker->rings = true;
        ae_sim_after(worker->job->sim, 1 + simworker_chance(worker, 30000), on_bell, worker, NULL);
}

void simworker_ring_left(struct ae_worker *worker)
{
        if (ae_core_worker_page(worker) && ae_core_worker_pending(worker))
                ring(ae_core_worker_session(worker));
}

void simworker_post(struct simworker *worker, const struct ae_local_sqe *sqe)
{
        uint32_t head = atomic_load_explicit(&worker->page->sq_head, memory_order_acquire);

        if (worker->sq_tail - head >= AE_LOCAL_SQ_LEN)
                simjob_fail(worker->job, "the queue of rank %u is full", worker->rank);
        worker->page->sq[worker->sq_tail % AE_LOCAL_SQ_LEN] = *sqe;
        atomic_store_explicit(&worker->page->sq_tail, ++worker->sq_tail, memory_order_release);
        ring(worker);
}

static bool take_answer(struct simworker *worker, struct ae_local_cqe *ret_cqe)
{
        uint32_t tail = atomic_load_explicit(&worker->page->cq_tail, memory_order_acquire);

        if (tail == worker->cq_head)
                return false;
        *ret_cqe = worker->page->cq[worker->cq_head % AE_LOCAL_CQ_LEN];
        atomic_store_explicit(&worker->page->cq_head, ++worker->cq_head, memory_order_release);
        if (ret_cqe->token != worker->token)
                simjob_fail(worker->job, "rank %u got the answer to %" PRIu64 ", it asked %" PRIu64,
                            worker->rank, ret_cqe->token, worker->token);
        return true;
}

/* ---- gathering -------------------------------------------------------------------------- */

/* Whether the segments in a view are as they should be; what lies between segments is undefined. */
static bool is_right(const struct simworker *worker, const struct simheld *view)
{
        const struct simjob *job = worker->job;
        const struct ae_layout_unit *unit = &job->layout->units[view->unit];
        const char *is = (const char *)worker->params + worker->params->cache_off + view->off;
        const char *should = simref_image(job, view->version, view->unit) + view->first;

        for (uint32_t s = unit->segment_first; s < unit->segment_first + unit->n_segments; s++) {
                const struct ae_layout_segment *segment = &job->layout->segments[s];
                uint64_t end = segment->unit_off + segment->n * ae_dtype_size(segment->dtype);
                uint64_t from = AE_MAX(segment->unit_off, view->first) - view->first;
                uint64_t to = AE_MIN(end, view->first + view->len);

                if (to > view->first + from &&
                    memcmp(is + from, should + from, to - view->first - from) != 0)
                        return false;
        }
        return true;
}

static void check_view(struct simworker *worker, const struct simheld *view)
{
        const struct simjob *job = worker->job;

        if (job->params.no_data)
                return;
        if (view->version > job->ref.version || view->version + SIM_VERSIONS <= job->ref.version)
                simjob_fail(worker->job,
                            "rank %u has unit %u at version %" PRIu64 ", the job is at %" PRIu64,
                            worker->rank, view->unit, view->version, job->ref.version);
        if (!is_right(worker, view))
                simjob_fail(worker->job,
                            "rank %u: %" PRIu64 " bytes of unit %u at version %" PRIu64
                            " in slot %u differ",
                            worker->rank, view->len, view->unit, view->version, view->slot);
}

/* It may be older than what the reference keeps. */
static void check_kept(struct simworker *worker, const struct simheld *view)
{
        if (simreader_digest(worker, view) != view->digest)
                simjob_fail(worker->job,
                            "reader %u: unit %u at version %" PRIu64
                            " changed in slot %u while it was held", worker->rank, view->unit,
                            view->version, view->slot);
        if (view->version + SIM_VERSIONS > worker->job->ref.version)
                check_view(worker, view);
        worker->job->n_reads++;
}

static void drop_view(struct simworker *worker, uint32_t i)
{
        struct simheld view = worker->held[i];

        if (worker->reader)
                check_kept(worker, &view);
        else
                check_view(worker, &view);
        worker->held[i] = worker->held[--worker->n_held];
        atomic_fetch_sub_explicit(&worker->page->holds[view.slot], 1, memory_order_release);
}

static void take_view(struct simworker *worker, const struct simheld *view)
{
        assert_true(worker->n_held < SIM_HELD);
        check_view(worker, view);
        worker->held[worker->n_held] = *view;
        if (worker->reader)
                worker->held[worker->n_held].digest = simreader_digest(worker, view);
        worker->n_held++;
}

/* A reader that holds an old version while it waits for room could wait for ranks that wait for
 * what it holds. */
static void before_wait(struct simworker *worker)
{
        while (worker->reader && worker->n_held)
                drop_view(worker, 0);
}

static _Atomic uint64_t *entry_of(const struct simworker *worker, uint32_t unit)
{
        return (_Atomic uint64_t *)((char *)worker->params + worker->params->units_off) + unit;
}

/* The lock-free look: hold, fence, look again. */
static bool cached(struct simworker *worker, uint32_t unit)
{
        uint64_t version = atomic_load(&worker->params->job_version);
        uint64_t entry = atomic_load(entry_of(worker, unit));
        uint32_t slot = ae_local_entry_slot(entry);
        struct ae_local_slot *slots =
                (struct ae_local_slot *)((char *)worker->params + worker->params->slots_off);

        if (slot == AE_LOCAL_SLOT_NONE || (ae_local_entry_version(entry) != version &&
                                           ae_local_entry_version(entry) != AE_LOCAL_VERSION_ANY))
                return false;
        atomic_fetch_add(&worker->page->holds[slot], 1);
        if (atomic_load(entry_of(worker, unit)) != entry)
                simjob_fail(worker->job, "an entry changed under one thread");
        take_view(worker, &(struct simheld){ .unit = unit, .slot = slot, .version = version,
                                             .off = slots[slot].off,
                                             .len = worker->job->layout->units[unit].len });
        return true;
}

static bool hold_answer(struct simworker *worker, const struct simaction *action, uint64_t first,
                        uint64_t len)
{
        struct ae_local_cqe cqe;

        if (!take_answer(worker, &cqe))
                return false;
        if (cqe.status < 0 && simreader_is_over(worker))
                return true;
        if (cqe.status < 0)
                simjob_fail(worker->job, "a gather of rank %u failed: %d", worker->rank,
                            cqe.status);
        atomic_fetch_add(&worker->page->holds[cqe.slot], 1);
        simworker_post(worker, &(struct ae_local_sqe){ .op = AE_SQ_UNPIN, .slot = cqe.slot });
        if (cqe.version == AE_LOCAL_VERSION_ANY)
                cqe.version = atomic_load(&worker->params->job_version);
        take_view(worker, &(struct simheld){ .unit = action->unit, .slot = cqe.slot,
                                             .version = cqe.version, .off = cqe.off,
                                             .first = first, .len = len });
        return true;
}

/* The library refuses what is past the allowance: views are let go before that. */
static void make_allowance(struct simworker *worker, uint64_t len)
{
        uint64_t allowance = ae_memory_allowance(worker->worker->job);

        for (uint32_t i = 0; i < worker->n_held; i++)
                len += ae_align_up(worker->held[i].len, 256);
        while (worker->n_held && len > allowance) {
                len -= ae_align_up(worker->held[0].len, 256);
                drop_view(worker, 0);
        }
}

static bool do_gather(struct simworker *worker, const struct simaction *action)
{
        uint64_t len = worker->job->layout->units[action->unit].len;

        if (worker->begun)
                return hold_answer(worker, action, 0, len);
        if (worker->n_held == SIM_HELD)
                drop_view(worker, (uint32_t)simworker_chance(worker, SIM_HELD));
        make_allowance(worker, len);
        if (cached(worker, action->unit))
                return true;
        before_wait(worker);
        simworker_post(worker, &(struct ae_local_sqe){ .op = AE_SQ_GATHER, .unit = action->unit,
                                             .token = ++worker->token });
        return false;
}

static bool do_range(struct simworker *worker, const struct simaction *action)
{
        uint64_t len = worker->job->layout->units[action->unit].len;
        uint64_t h = simplan_hash(worker->job, 96, worker->rank, worker->attempt, worker->at, 0);
        uint64_t first = len ? h % len : 0;
        uint64_t n = len ? 1 + (h >> 20) % (len - first) : 0;

        if (len == 0)
                return true;
        if (worker->begun)
                return hold_answer(worker, action, first, n);
        if (worker->n_held == SIM_HELD)
                drop_view(worker, 0);
        make_allowance(worker, n);
        before_wait(worker);
        simworker_post(worker, &(struct ae_local_sqe){ .op = AE_SQ_RANGE,
                                             .unit = action->unit,
                                             .first = first,
                                             .n = n,
                                             .token = ++worker->token });
        return false;
}

/* ---- the step --------------------------------------------------------------------------- */

void simworker_add(struct simworker *worker, struct simaction action)
{
        if (worker->n_actions == worker->cap_actions) {
                worker->cap_actions = AE_MAX(2 * worker->cap_actions, 64u);
                worker->actions = realloc(worker->actions, worker->cap_actions * sizeof(action));
                assert_non_null(worker->actions);
        }
        worker->actions[worker->n_actions++] = action;
}

static void shuffle(struct simworker *worker, uint32_t first)
{
        for (uint32_t i = worker->n_actions; i > first + 1; i--) {
                uint32_t j = first + (uint32_t)simworker_chance(worker, i - first);
                struct simaction swap = worker->actions[i - 1];

                worker->actions[i - 1] = worker->actions[j];
                worker->actions[j] = swap;
        }
}

static void add(struct simworker *worker, struct simaction action)
{
        simworker_add(worker, action);
}

static void add_reads(struct simworker *worker)
{
        uint32_t n_units = worker->job->layout->n_units;

        for (uint32_t i = 0; worker->job->params.wild && i < simworker_chance(worker, 40); i++)
                add(worker, (struct simaction){ .kind = SIM_PREFETCH,
                                                .unit = (uint32_t)simworker_chance(worker,
                                                                                   n_units) });
        for (uint32_t i = 0; i < n_units; i++) {
                struct simaction action = { .kind = SIM_GATHER, .unit = i };

                if (!worker->job->params.no_data)
                        action.unit = (uint32_t)simworker_chance(worker, n_units);
                add(worker, action);
                if (worker->job->params.ranges && simworker_chance(worker, 4) == 0)
                        add(worker, (struct simaction){ .kind = SIM_RANGE, .unit = action.unit });
                if (simworker_chance(worker, 4) == 0)
                        add(worker,
                            (struct simaction){ .kind = SIM_PREFETCH, .unit = action.unit });
                if (simworker_chance(worker, 2))
                        add(worker, (struct simaction){ .kind = SIM_RELEASE });
        }
}

static void add_micro(struct simworker *worker, uint32_t micro)
{
        const struct simjob *job = worker->job;
        uint32_t first = worker->n_actions;

        add_reads(worker);
        for (uint32_t u = 0; u < job->layout->n_units; u++) {
                for (uint32_t use = 0; use < job->n_uses[u]; use++) {
                        if (simplan_scatters(job, worker->step, worker->rank, micro, u, use))
                                add(worker, (struct simaction){ .kind = SIM_SCATTER, .unit = u,
                                                                .micro = micro, .use = use });
                }
        }
        shuffle(worker, first);
        if (simplan_redo(job, worker->attempt) == worker->rank)
                worker->n_actions =
                        first + (uint32_t)simworker_chance(worker, worker->n_actions - first + 1);
        else if (micro + 1 < simplan_n_micro(job, worker->step, worker->rank) ||
                 simworker_chance(worker, 4))
                add(worker, (struct simaction){ .kind = SIM_MICRO_END, .micro = micro });
}

static void add_exchange(struct simworker *worker, bool receive)
{
        for (uint32_t other = 0; other < worker->job->params.n_ranks; other++) {
                uint32_t n = receive ? simplan_n_messages(worker->job, worker->attempt, other,
                                                          worker->rank) :
                                       simplan_n_messages(worker->job, worker->attempt,
                                                          worker->rank, other);

                for (uint32_t i = 0; i < n; i++)
                        add(worker, (struct simaction){ .kind = receive ? SIM_XRECV : SIM_XSEND,
                                                        .rank = other, .nth = i });
        }
}

/* Receives stand anywhere among what the round has from action @first on. */
static void spread_receives(struct simworker *worker, uint32_t first)
{
        uint32_t begin = worker->n_actions;
        uint32_t end;

        add_exchange(worker, true);
        end = worker->n_actions;
        for (uint32_t i = begin; i < end; i++) {
                uint32_t to = first + (uint32_t)simworker_chance(worker, i - first + 1);
                struct simaction moved = worker->actions[i];

                memmove(&worker->actions[to + 1], &worker->actions[to],
                        (i - to) * sizeof(moved));
                worker->actions[to] = moved;
        }
}

/* What a rank does in one round. Who puts does so before the others begin, or (odd rounds) while
 * they may have begun. */
static void plan_round(struct simworker *worker)
{
        const struct simjob *job = worker->job;
        uint32_t putter = simplan_put(job, worker->attempt);
        uint32_t first;

        worker->n_actions = worker->at = 0;
        worker->begun = worker->again = false;
        memcpy(worker->xsent_before, worker->xsent, job->params.n_ranks * sizeof(*worker->xsent));
        memcpy(worker->xgot_before, worker->xgot, job->params.n_ranks * sizeof(*worker->xgot));
        if (worker->step >= job->params.n_steps) {
                add(worker, (struct simaction){ .kind = SIM_RELEASE_ALL });
                add(worker, (struct simaction){ .kind = SIM_LEAVE });
                return;
        }
        add(worker, (struct simaction){ .kind = SIM_RELEASE_ALL });
        if (job->params.gets && simworker_chance(worker, 4) == 0)
                add(worker, (struct simaction){ .kind = SIM_GET });
        if (putter == worker->rank)
                add(worker, (struct simaction){ .kind = SIM_PUT });
        else if (putter != AE_WIRE_NONE && worker->attempt % 2 == 0) {
                if (simworker_chance(worker, 4) == 0)
                        add_reads(worker); /* beside the put */
                add(worker, (struct simaction){ .kind = SIM_PUT_WAIT });
        }
        first = worker->n_actions;
        add_exchange(worker, false);
        shuffle(worker, first);
        first = worker->n_actions;
        if (simplan_redo(job, worker->attempt) == worker->rank)
                add_micro(worker, 0);
        else
                for (uint32_t m = 0; m < simplan_n_micro(job, worker->step, worker->rank); m++)
                        add_micro(worker, m);
        spread_receives(worker, first);
        if (simworker_chance(worker, 8) == 0)
                add_reads(worker); /* evaluation */
        if (!job->params.keep_views || simworker_chance(worker, 2))
                add(worker, (struct simaction){ .kind = SIM_RELEASE_ALL });
        add(worker, (struct simaction){ .kind = SIM_STEP });
}

static void ask(struct simworker *worker)
{
        const struct simjob *job = worker->job;
        struct ae_local_step *step = &worker->page->step;

        worker->asked_round = atomic_load_explicit(&worker->params->round, memory_order_acquire);
        step->round = worker->asked_round;
        step->tokens = simplan_tokens(job, worker->step, worker->rank);
        step->micro_batches = simplan_n_micro(job, worker->step, worker->rank);
        step->expert_norm2 = (struct ae_longacc){ { 0 } };
        ae_longacc_add(&step->expert_norm2, simplan_expert_norm2(job, worker->step, worker->rank));
        step->redo = simplan_redo(job, worker->attempt) == worker->rank;
        step->n_counts = simplan_n_counts(job, worker->step);
        for (uint32_t i = 0; i < step->n_counts; i++)
                step->counts[i] = simplan_count(job, worker->step, worker->rank, i);
        simplan_ask(job, worker->step, &step->ask);
        if (!worker->again && simplan_refuse(job, worker->attempt) == worker->rank)
                step->ask.hyper[1].lr *= 2;
        simworker_post(worker, &(struct ae_local_sqe){ .op = AE_SQ_STEP,
                                                       .token = worker->asked_round });
}

static bool do_step(struct simworker *worker)
{
        struct ae_wire_verdict verdict;

        if (!worker->begun)
                ask(worker);
        if (atomic_load_explicit(&worker->params->round, memory_order_acquire) <=
            worker->asked_round)
                return false;
        verdict = worker->params->verdict;
        if (verdict.round < worker->asked_round) { /* a put took the round */
                ask(worker);
                return false;
        }
        if (verdict.round != worker->asked_round)
                simjob_fail(worker->job,
                            "rank %u asked in round %" PRIu64
                            " and is shown a verdict of round %" PRIu64,
                            worker->rank, worker->asked_round, verdict.round);
        if (verdict.kind == AE_VERDICT_REFUSED) {
                worker->again = true;
                ask(worker);
                return false;
        }
        worker->attempt++;
        worker->step += verdict.kind != AE_VERDICT_REDO;
        plan_round(worker);
        return true;
}

static bool do_leave(struct simworker *worker)
{
        Autoep__Leave message = AUTOEP__LEAVE__INIT;

        if (!worker->begun) {
                worker->answered = false;
                message.id = ++worker->token;
                simworker_send(worker, AE_CONTROL_LEAVE, &message.base, -1);
        }
        if (worker->answered)
                simworker_end(worker, false, 0, "");
        return worker->answered;
}

/* ---- the script ------------------------------------------------------------------------- */

static bool do_simple(struct simworker *worker, const struct simaction *action)
{
        switch (action->kind) {
        case SIM_RELEASE_ALL:
                while (worker->n_held)
                        drop_view(worker, 0);
                return true;
        case SIM_RELEASE:
                if (worker->n_held)
                        drop_view(worker, (uint32_t)simworker_chance(worker, worker->n_held));
                return true;
        case SIM_PUT_WAIT:
                return worker->job->put_done > worker->attempt;
        case SIM_PREFETCH:
                simworker_post(worker, &(struct ae_local_sqe){ .op = AE_SQ_PREFETCH,
                                                               .unit = action->unit });
                return true;
        default:
                assert_int_equal(action->kind, SIM_MICRO_END);
                simworker_post(worker,
                     &(struct ae_local_sqe){ .op = AE_SQ_MICRO_END, .micro = action->micro });
                return true;
        }
}

static bool do_action(struct simworker *worker, const struct simaction *action)
{
        switch (action->kind) {
        case SIM_PUT:
                return simworker_put(worker);
        case SIM_GET:
                return simworker_get(worker);
        case SIM_XSEND:
                return simworker_xsend(worker, action);
        case SIM_XRECV:
                return simworker_xreceive(worker, action);
        case SIM_GATHER:
                return do_gather(worker, action);
        case SIM_RANGE:
                return do_range(worker, action);
        case SIM_SCATTER:
                return worker->job->params.no_data ? simworker_declare_scattered(worker, action)
                                                   : simworker_scatter(worker, action);
        case SIM_STEP:
                return do_step(worker);
        case SIM_IDLE:
                return simreader_idle(worker);
        case SIM_LEAVE:
                return do_leave(worker);
        default:
                return do_simple(worker, action);
        }
}

/* Whether the job has failed for this worker, which then ends. */
static bool has_failed(struct simworker *worker)
{
        char why[sizeof(worker->params->why.text)];

        if (!worker->params ||
            atomic_load_explicit(&worker->params->state, memory_order_acquire) != AE_LOCAL_FAILED)
                return false;
        ae_local_text_get(&worker->params->why, why);
        simworker_end(worker, worker->params->fail_status != AE_ECLOSED,
                      worker->params->fail_status, why);
        return true;
}

/* What ended the round is shown to workers, but for a put. */
static void see_verdict(struct simworker *worker)
{
        const struct ae_wire_verdict *shown = &worker->params->verdict;
        const struct ae_wire_verdict *noted = &simnode_job(worker->node)->verdict;
        bool step = shown->kind && shown->round == worker->job->ref.next_round;

        simref_verdict(worker->job, step ? shown : noted);
}

static void look(void *user)
{
        struct simworker *worker = user;
        struct simjob *job = worker->job;

        worker->scheduled = false;
        if (worker->ended || !worker->params || has_failed(worker))
                return;
        if (atomic_load(&worker->params->round) > job->ref.next_round)
                see_verdict(worker);
        for (uint32_t i = 0; i < 8 && !worker->ended; i++) {
                struct simaction action = worker->actions[worker->at];
                uint32_t step = worker->step;
                uint32_t attempt = worker->attempt;

                if (!do_action(worker, &action)) {
                        worker->begun = true;
                        return;
                }
                worker->begun = false;
                worker->piece = 0;
                if (step == worker->step && attempt == worker->attempt)
                        worker->at++; /* otherwise a new round has been planned */
                if (simworker_chance(worker, 2))
                        break;
        }
        if (!worker->ended)
                simworker_wake(worker);
}

void simworker_wake(struct simworker *worker)
{
        uint64_t most = worker->job->params.no_data ? 2000000 : 60000; /* see simjob_params */

        if (worker->scheduled || worker->ended || !worker->params)
                return;
        worker->scheduled = true;
        ae_sim_after(worker->job->sim, 1 + simworker_chance(worker, most), look, worker, NULL);
}

/* ---- joining and ending ----------------------------------------------------------------- */

static void go(void *user)
{
        struct simworker *worker = user;

        if (!worker->worker || !worker->node->node || worker->job->freeing)
                return;
        ae_core_worker_gone(worker->worker, "its process ended");
        worker->worker = NULL;
        simnode_kick(worker->node);
        if (worker->reader)
                simreader_start(worker);
}

void simworker_end(struct simworker *worker, bool failed, int status, const char *why)
{
        if (worker->ended)
                return;
        worker->ended = true;
        worker->job->n_ended += !worker->reader;
        worker->ended_ns = ae_sim_now(worker->job->sim);
        worker->failed = failed;
        worker->status = status;
        (void)snprintf(worker->why, sizeof(worker->why), "%s", why);
        if (failed && !worker->job->params.may_fail && !simreader_is_over(worker))
                simjob_fail(worker->job, "rank %u failed: %d: %s", worker->rank, status, why);
        ae_sim_after(worker->job->sim, 1 + simworker_chance(worker, 5000000), go, worker, NULL);
}

/* Sparse initial values, which nobody reads. */
static void empty_init(struct simworker *worker, uint64_t len)
{
        worker->worker->init = calloc(1, sizeof(*worker->worker->init));
        assert_non_null(worker->worker->init);
        *worker->worker->init = (struct ae_region){ .len = len, .fd = -1, .fd_ro = -1 };
        worker->worker->init->base =
                mmap(NULL, len, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        assert_true(worker->worker->init->base != MAP_FAILED);
        (void)madvise(worker->worker->init->base, len, MADV_HUGEPAGE);
}

static void enroll(void *user)
{
        struct simworker *worker = user;
        struct simjob *job = worker->job;
        Autoep__Register message = AUTOEP__REGISTER__INIT;
        bool values = worker->rank == 0 && job->init_len && !job->params.no_data;

        if (worker->ended || !worker->worker)
                return;
        if (worker->reader) {
                simworker_send(worker, AE_CONTROL_REGISTER, &message.base, -1);
                return;
        }
        if (worker->rank == 0 && job->params.no_data)
                empty_init(worker, job->init_len);
        message.model = autoep__model__unpack(NULL, job->packed_len, job->packed);
        message.init_len = values ? job->init_len : 0;
        simworker_send(worker, AE_CONTROL_REGISTER, &message.base,
                     values ? simworker_memory(job->init, job->init_len) : -1);
        autoep__model__free_unpacked(message.model, NULL);
}

static void begin(void *user)
{
        struct simworker *worker = user;

        if (worker->ended || !worker->worker)
                return;
        worker->params = (struct ae_local_params *)worker->worker->job->params->base;
        if (worker->reader)
                simreader_plan(worker);
        else
                plan_round(worker);
        simworker_wake(worker);
}

void simworker_hello(struct simworker *worker)
{
        struct simjob *job = worker->job;
        Autoep__Hello message = AUTOEP__HELLO__INIT;
        struct ae_worker_spec spec = { .hello = &message, .pid = (int32_t)(5000 + worker->rank),
                                       .uid = 1, .session = worker };
        char name[] = "sim";
        char token[] = "token";

        if (worker->ended || !worker->node->node)
                return;
        message.version = AE_WIRE_VERSION;
        message.job = name;
        message.token = token;
        message.reader = worker->reader;
        message.rank = worker->reader ? 0 : worker->rank;
        message.world = job->params.n_ranks;
        message.incarnation = 70000 + worker->rank;
        message.ring_len = AE_LOCAL_RING_MIN;
        if (job->params.wild)
                message.ring_len += simplan_hash(job, 92, worker->rank, 0, 0, 0) %
                                    AE_LOCAL_RING_MIN;
        if (ae_core_worker_new(ae_node_core(worker->node->node), &spec, &worker->worker) < 0)
                simjob_fail(job, "rank %u cannot say hello: %s", worker->rank, ae_error_text());
        worker->page = (struct ae_local_page *)ae_core_worker_page(worker->worker)->base;
        ae_core_worker_attach(worker->worker, -1);
        simnode_kick(worker->node);
}

static void hello(void *user)
{
        simworker_hello(user);
}

void simworker_start(struct simworker *worker)
{
        ae_sim_after(worker->job->sim, 1 + simworker_chance(worker, 100000000), hello, worker,
                     NULL);
}

static void on_error(struct simworker *worker, const Autoep__Error *error)
{
        worker->answer_status = error->status;
        if (error->id == worker->token && worker->begun) {
                worker->answered = true;
                simworker_wake(worker);
        } else if (error->id == 0) {
                simworker_end(worker, true, error->status, error->text);
        }
}

/* From inside the core: nothing may be done to it here. */
void simworker_message(struct simworker *worker, uint32_t type, const ProtobufCMessage *message)
{
        struct ae_sim *sim = worker->job->sim;

        switch (type) {
        case AE_CONTROL_HELLO_OK:
                ae_sim_after(sim, 1 + simworker_chance(worker, 500000), enroll, worker, NULL);
                break;
        case AE_CONTROL_REGISTERED:
                ae_sim_after(sim, 1 + simworker_chance(worker, 500000), begin, worker, NULL);
                break;
        case AE_CONTROL_DONE:
                worker->answered = true;
                worker->answer_status = 0;
                worker->answer_version = ((const Autoep__Done *)message)->version;
                simworker_wake(worker);
                break;
        default:
                assert_int_equal(type, AE_CONTROL_ERROR);
                on_error(worker, (const Autoep__Error *)message);
        }
}
