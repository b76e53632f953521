/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A round from its first scatter to its verdict. A node sends END when all its ranks have closed
 * the round, votes when every END is here and its own sums are complete, notes the verdict that the
 * decider prepares, and acts on Commit alone. See ARCHITECTURE.md, "Life of a step".
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const bool legal_moves[AE_ROUND_N_STATES][AE_ROUND_N_STATES] = {
        [AE_ROUND_OPEN] = { [AE_ROUND_ENDED] = true, [AE_ROUND_OPEN] = true },
        [AE_ROUND_ENDED] = { [AE_ROUND_VOTED] = true, [AE_ROUND_OPEN] = true },
        [AE_ROUND_VOTED] = { [AE_ROUND_PREPARED] = true },
        [AE_ROUND_PREPARED] = { [AE_ROUND_OPEN] = true },
};

static void round_move(struct ae_job *job, enum ae_round_state to)
{
        assert(legal_moves[job->round_state][to]);
        job->round_state = to;
}

bool ae_round_next_may_come(const struct ae_job *job)
{
        return job->round_state >= AE_ROUND_VOTED || job->put_prepared;
}

int ae_round_scattered(const struct ae_job *job, uint32_t group, uint32_t unit)
{
        const struct ae_sum_group *g = &job->groups[group];
        const struct ae_job_peer *peer = &job->peers[g->node];
        uint32_t bit = g->local * job->layout->n_units + unit;

        if (g->node == job->core->options.node) {
                const struct ae_sum *sum = ae_job_sum(job, g->local, unit);

                return sum->final ? sum->queued : -1;
        }
        if (!peer->ended)
                return -1;
        return peer->scattered[bit / 8] >> (bit % 8) & 1;
}

/* ---- closing ---------------------------------------------------------------------------- */

static void send_end(struct ae_job *job)
{
        uint32_t n_units = job->layout->n_units;
        uint32_t n_bits = job->n_local_groups * n_units;
        size_t len = sizeof(struct ae_wire_end) + ae_div_up(n_bits, 8);
        struct ae_wire_end *end = job->end;

        memset(end, 0, len);
        end->head = ae_job_head(job, AE_WIRE_END);
        end->n_groups = job->n_local_groups;
        end->n_units = n_units;
        for (uint32_t i = 0; i < n_bits; i++) {
                const struct ae_sum *sum = &job->sums[i];

                if (sum->queued || (sum->any && !sum->final && !job->redo))
                        end->scattered[i / 8] |= (uint8_t)(1u << (i % 8));
        }
        round_move(job, AE_ROUND_ENDED);
        ae_job_msg_all(job, end, len);
}

static void close_rank(struct ae_worker *worker)
{
        struct ae_job *job = worker->job;
        struct ae_wire_closed closed = { .head = ae_job_head(job, AE_WIRE_CLOSED),
                                         .rank = worker->rank };

        worker->closed = true;
        job->members[worker->rank].pause_until_ns = 0;
        if (job->n_closed++ == 0 && !ae_core_is_decider(job->core))
                ae_wait_for_word(job);
        ae_fold_close(worker);
        ae_job_msg(job, 0, &closed, sizeof(closed));
        if (job->n_closed == job->n_local)
                send_end(job);
}

/* So that no sum of them wraps, at its node or at the decider. */
static int check_numbers(const struct ae_local_step *step)
{
        bool fits = step->tokens <= AE_WIRE_COUNT_MAX && step->micro_batches <= AE_WIRE_COUNT_MAX;

        for (uint32_t i = 0; fits && i < step->n_counts; i++)
                fits = step->counts[i] <= AE_WIRE_COUNT_MAX;
        if (!fits)
                return ae_fail(AE_EPROTO, "its step request counts more than %" PRIu64
                               " tokens or micro-batches", AE_WIRE_COUNT_MAX);
        if (!ae_longacc_below(&step->expert_norm2, AE_WIRE_RANK_NORM2))
                return ae_fail(AE_EPROTO, "its step request has an expert norm2 of 2^%d or more",
                               AE_WIRE_RANK_NORM2);
        return 0;
}

int ae_round_step(struct ae_worker *worker, uint64_t round)
{
        const struct ae_local_page *page = (const struct ae_local_page *)worker->page->base;
        struct ae_local_step *step = worker->step;
        int r;

        if (round < worker->job->round)
                return 0; /* a put has taken it: the page may hold the next request by now */
        if (worker->closed)
                return ae_fail(AE_EPROTO, "it asks for a step twice in round %" PRIu64,
                               worker->job->round);
        if (!step)
                step = worker->step = ae_table_new(worker->core, 1, sizeof(*step));
        memcpy(step, &page->step, offsetof(struct ae_local_step, counts));
        if ((step->n_counts && step->n_counts != worker->job->n_buffer_counts) ||
            step->ask.n_groups > AE_WIRE_MAX_GROUPS)
                return ae_fail(AE_EPROTO, "its step request has %u counts and %u groups",
                               step->n_counts, step->ask.n_groups);
        memcpy(step->counts, page->step.counts, step->n_counts * sizeof(step->counts[0]));
        r = check_numbers(step);
        if (r < 0)
                return r;
        step->bad_text[sizeof(step->bad_text) - 1] = '\0';
        if (round > worker->job->round || step->round != round)
                return ae_fail(AE_EPROTO,
                               "it asks for the step of round %" PRIu64 " in round %" PRIu64
                               ", its request is for round %" PRIu64,
                               round, worker->job->round, step->round);
        close_rank(worker);
        return 0;
}

void ae_round_bad(struct ae_job *job, const struct ae_piece *piece)
{
        const struct ae_layout *layout = job->layout;
        const struct ae_layout_unit *unit = &layout->units[piece->unit];
        const struct ae_sum *sum = piece->cell->sum;
        size_t at = 0;

        if (job->bad.found || job->redo)
                return;
        if (piece->dtype == AE_DTYPE_F32)
                (void)ae_ops()->finite_f32((const float *)(const void *)piece->data, piece->n, &at);
        else
                (void)ae_ops()->finite_bf16((const ae_bf16 *)(const void *)piece->data, piece->n,
                                            &at);
        job->bad.found = 1;
        job->bad.unit = piece->unit;
        job->bad.tensor = AE_WIRE_NONE;
        job->bad.rank = job->groups[job->local_groups[sum->group]].ranks[piece->lane / sum->n_uses];
        for (uint32_t s = unit->segment_first; s < unit->segment_first + unit->n_segments; s++) {
                const struct ae_layout_segment *segment = &layout->segments[s];
                uint64_t index = piece->first + at - segment->unit_grad_first;

                if (segment->trainable && piece->first + at >= segment->unit_grad_first &&
                    index < segment->n)
                        job->bad.tensor = ae_layout_tensor_at(layout, s, index);
        }
        (void)snprintf(job->bad.text, sizeof(job->bad.text),
                       "NaN or Inf in the gradient of '%.120s' from rank %u",
                       job->bad.tensor == AE_LAYOUT_NONE ? unit->name
                                                         : layout->tensors[job->bad.tensor].name,
                       job->bad.rank);
}

/* ---- votes ------------------------------------------------------------------------------ */

/* The first field in which two requests differ; NULL when they are alike. */
static const char *ask_difference(const struct ae_wire_ask *a, const struct ae_wire_ask *b)
{
        const struct {
                const char *name;
                size_t off, len;
        } fields[] = {
                { "scale", offsetof(struct ae_wire_ask, scale), sizeof(a->scale) },
                { "max_norm", offsetof(struct ae_wire_ask, max_norm), sizeof(a->max_norm) },
                { "balance_rate", offsetof(struct ae_wire_ask, balance_rate),
                  sizeof(a->balance_rate) },
                { "use_tokens", offsetof(struct ae_wire_ask, use_tokens), sizeof(a->use_tokens) },
                { "n_groups", offsetof(struct ae_wire_ask, n_groups), sizeof(a->n_groups) },
                { "absent_groups", offsetof(struct ae_wire_ask, absent_groups),
                  sizeof(a->absent_groups) },
        };
        static const char *const hyper_names[] = { "lr", "beta1", "beta2", "eps", "weight_decay" };
        static _Thread_local char text[48];

        for (size_t i = 0; i < AE_ARRAY_LEN(fields); i++) {
                if (memcmp((const char *)a + fields[i].off, (const char *)b + fields[i].off,
                           fields[i].len) != 0)
                        return fields[i].name;
        }
        for (size_t g = 0; g < AE_WIRE_MAX_GROUPS; g++) {
                for (size_t f = 0; f < AE_ARRAY_LEN(hyper_names); f++) {
                        size_t off = offsetof(struct ae_wire_ask, hyper) +
                                     g * sizeof(struct ae_wire_hyper) + f * sizeof(double);

                        if (memcmp((const char *)a + off, (const char *)b + off, sizeof(double)) ==
                            0)
                                continue;
                        (void)snprintf(text, sizeof(text), "%s of group %zu", hyper_names[f], g);
                        return text;
                }
        }
        return NULL;
}

static void disagree(char *text, size_t size, const char *field, uint32_t a, uint32_t b)
{
        (void)snprintf(text, size,
                       "ranks disagree on the step: %s differs between rank %u and rank %u", field,
                       a, b);
}

/* One rank's request into the node's vote, but for its part of the norm. */
static void add_step(struct ae_wire_vote *vote, const struct ae_worker *worker)
{
        const struct ae_local_step *step = worker->step;
        const char *field;

        vote->tokens += step->tokens;
        vote->micro_batches += step->micro_batches;
        if (vote->ask_rank == AE_WIRE_NONE) {
                vote->ask_rank = worker->rank;
                vote->ask = step->ask;
                vote->n_counts = step->n_counts;
        }
        field = ask_difference(&vote->ask, &step->ask);
        if (!field && step->n_counts != vote->n_counts)
                field = "n_counts";
        if (field && !vote->disagree) {
                vote->disagree = 1;
                disagree(vote->bad.text, sizeof(vote->bad.text), field, vote->ask_rank,
                         worker->rank);
        }
        for (uint32_t i = 0; !field && i < step->n_counts; i++)
                vote->counts[i] += step->counts[i];
        if (step->redo && !vote->redo && !vote->disagree) {
                vote->redo = 1;
                vote->bad = (struct ae_wire_bad){ .rank = worker->rank, .unit = AE_WIRE_NONE,
                                                  .tensor = AE_WIRE_NONE };
                (void)snprintf(vote->bad.text, sizeof(vote->bad.text),
                               "rank %u cannot finish the round", worker->rank);
        }
        if (step->bad_expert && !vote->bad.found && !vote->redo && !vote->disagree) {
                vote->bad.found = 2;
                vote->bad.rank = worker->rank;
                (void)snprintf(vote->bad.text, sizeof(vote->bad.text),
                               "NaN or Inf in the gradient of expert '%.120s' on rank %u",
                               step->bad_text, worker->rank);
        }
}

static void send_vote(struct ae_job *job)
{
        struct ae_wire_vote *vote = job->vote;
        struct ae_longacc expert_norm2 = { { 0 } };

        memset(vote, 0, sizeof(*vote));
        memset((char *)(vote + 1), 0, job->n_buffer_counts * sizeof(uint64_t));
        vote->head = ae_job_head(job, AE_WIRE_VOTE);
        vote->norm2 = job->norm2;
        vote->infinite = job->infinite;
        vote->ask_rank = AE_WIRE_NONE;
        vote->bad = job->bad;
        vote->redo = job->redo;
        for (uint32_t i = 0; i < job->n_local; i++) {
                ae_longacc_join(&expert_norm2, &job->locals[i]->step->expert_norm2);
                add_step(vote, job->locals[i]);
        }
        vote->expert_norm2 = expert_norm2;
        round_move(job, AE_ROUND_VOTED);
        ae_owner_voted(job);
        ae_job_msg(job, 0, vote, sizeof(*vote) + vote->n_counts * sizeof(vote->counts[0]));
}

void ae_round_progress(struct ae_job *job)
{
        if (job->state == AE_JOB_LIVE && job->round_state == AE_ROUND_ENDED &&
            job->n_ended == job->core->options.n_nodes && job->n_incomplete == 0 &&
            job->n_applying == 0 && ae_fold_ended(job))
                send_vote(job);
}

static int on_end(struct ae_job *job, uint32_t node, const struct ae_wire_end *end, size_t len)
{
        struct ae_job_peer *peer = &job->peers[node];
        uint64_t n_bytes;

        if (len < sizeof(*end) || end->n_units != job->layout->n_units ||
            end->n_groups != peer->n_groups)
                return ae_fail(AE_EPROTO, "END from node %u does not fit job '%s'", node,
                               job->name);
        n_bytes = ae_div_up((uint64_t)end->n_groups * end->n_units, 8);
        if (len - sizeof(*end) < n_bytes || peer->ended)
                return ae_fail(AE_EPROTO, "END from node %u is short or came twice", node);
        if (!peer->scattered)
                peer->scattered = ae_table_new(job->core, n_bytes, 1);
        memcpy(peer->scattered, end->scattered, n_bytes);
        peer->ended = true;
        job->n_ended++;
        ae_owner_settle(job);
        ae_round_progress(job);
        return 0;
}

static int on_credit(struct ae_job *job, uint32_t node, const struct ae_wire_credit *credit,
                     size_t len)
{
        uint32_t slots = job->model->message->slots;

        if (len < sizeof(*credit) || credit->n_slots > slots ||
            len - sizeof(*credit) < credit->n_slots * sizeof(uint32_t) ||
            credit->n_slots + job->peers[node].n_free > slots)
                return ae_fail(AE_EPROTO, "CREDIT from node %u does not fit", node);
        for (uint32_t i = 0; i < credit->n_slots; i++) {
                uint32_t slot;

                memcpy(&slot, (const char *)(credit + 1) + i * sizeof(slot), sizeof(slot));
                if (slot >= slots)
                        return ae_fail(AE_EPROTO, "CREDIT from node %u for slot %u of %u", node,
                                       slot, slots);
                ae_fold_put_slot(job, node, slot);
        }
        ae_fold_send(job, node);
        return 0;
}

/* ---- the decider ------------------------------------------------------------------------ */

static void merge_bad(struct ae_wire_verdict *verdict, const struct ae_wire_vote *vote)
{
        if (vote->disagree) {
                if (verdict->kind != AE_VERDICT_REFUSED)
                        verdict->bad = vote->bad;
                verdict->kind = AE_VERDICT_REFUSED;
        } else if (vote->redo && verdict->kind != AE_VERDICT_REFUSED) {
                if (verdict->kind != AE_VERDICT_REDO)
                        verdict->bad = vote->bad;
                verdict->kind = AE_VERDICT_REDO;
        } else if (vote->bad.found && verdict->kind == AE_VERDICT_APPLIED) {
                verdict->kind = AE_VERDICT_SKIPPED;
                verdict->bad = vote->bad;
        }
}

static void refuse(struct ae_wire_verdict *verdict, const char *text)
{
        verdict->kind = AE_VERDICT_REFUSED;
        verdict->bad = (struct ae_wire_bad){ .rank = AE_WIRE_NONE, .unit = AE_WIRE_NONE,
                                             .tensor = AE_WIRE_NONE };
        (void)snprintf(verdict->bad.text, sizeof(verdict->bad.text), "%s", text);
}

/* Every vote's request against rank 0's. */
static void compare_asks(struct ae_job *job, struct ae_wire_verdict *verdict, uint32_t n_counts)
{
        char text[AE_WIRE_TEXT];

        for (uint32_t node = 0; node < job->core->options.n_nodes; node++) {
                const struct ae_wire_vote *vote = job->peers[node].vote;
                const char *field;

                if (vote->ask_rank == AE_WIRE_NONE)
                        continue;
                field = ask_difference(&verdict->ask, &vote->ask);
                if (!field && vote->n_counts != n_counts)
                        field = "n_counts";
                if (!field)
                        continue;
                disagree(text, sizeof(text), field, 0, vote->ask_rank);
                refuse(verdict, text);
                return;
        }
}

static uint32_t groups_needed(const struct ae_job *job)
{
        uint32_t n = 0;

        for (uint32_t t = 0; t < job->layout->n_tensors; t++) {
                const struct ae_layout_tensor *tensor = &job->layout->tensors[t];

                if (!tensor->frozen && tensor->class != AE_CLASS_BUFFER)
                        n = AE_MAX(n, tensor->group + 1);
        }
        return n;
}

static void check_ask(struct ae_job *job, struct ae_wire_verdict *verdict)
{
        char text[AE_WIRE_TEXT];

        if (job->model->message->optimizer != AE_OPT_EXTERNAL &&
            verdict->ask.n_groups < groups_needed(job)) {
                (void)snprintf(text, sizeof(text),
                               "the step gives hyper-parameters for %u groups, the model has %u",
                               verdict->ask.n_groups, groups_needed(job));
                refuse(verdict, text);
        } else if (verdict->ask.use_tokens && verdict->ask.scale == 0 && verdict->tokens == 0) {
                refuse(verdict, "the step is scaled by tokens and no rank reported any");
        }
}

/* The norm and the factors; a sum that is not finite, though all its inputs were, shows here. */
static void weigh(struct ae_wire_verdict *verdict, double norm2)
{
        double s = verdict->ask.scale;

        if (s == 0 && verdict->ask.use_tokens)
                s = 1.0 / (double)verdict->tokens;
        else if (s == 0)
                s = verdict->micro_batches ? 1.0 / (double)verdict->micro_batches : 1.0;
        verdict->scale = s;
        verdict->norm = fabs(s) * sqrt(norm2);
        verdict->clip = ae_clip_factor(verdict->norm, verdict->ask.max_norm);
        verdict->grad_scale = s * verdict->clip;
        if (verdict->kind != AE_VERDICT_APPLIED || isfinite(verdict->norm))
                return;
        verdict->kind = AE_VERDICT_SKIPPED;
        verdict->bad = (struct ae_wire_bad){ .rank = AE_WIRE_NONE, .unit = AE_WIRE_NONE,
                                             .tensor = AE_WIRE_NONE };
        (void)snprintf(verdict->bad.text, sizeof(verdict->bad.text),
                       "the norm of the summed gradients is not finite");
}

static void prepare(struct ae_job *job, const struct ae_wire_verdict *verdict, uint32_t n_counts)
{
        struct ae_wire_prepare *prepare = job->prepare;

        prepare->head = ae_job_head(job, AE_WIRE_PREPARE);
        prepare->head.type = ++job->decision;
        prepare->verdict = *verdict;
        prepare->n_counts = n_counts;
        job->deciding = true;
        job->n_prepared = 0;
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++)
                job->peers[node].prepared = false;
        ae_job_msg_all(job, prepare, sizeof(*prepare) + n_counts * sizeof(prepare->counts[0]));
}

static void add_norm2(struct ae_longacc *sum, const struct ae_wire_vote *vote)
{
        const struct ae_longacc parts[] = { vote->norm2, vote->expert_norm2 };

        for (size_t i = 0; i < AE_ARRAY_LEN(parts); i++)
                ae_longacc_join(sum, &parts[i]);
}

static bool fits(const struct ae_wire_vote *vote, uint32_t n_ranks)
{
        const struct ae_longacc parts[] = { vote->norm2, vote->expert_norm2 };
        uint64_t most = n_ranks * AE_WIRE_COUNT_MAX;

        if (vote->tokens > most || vote->micro_batches > most)
                return false;
        for (uint32_t i = 0; i < vote->n_counts; i++) {
                if (vote->counts[i] > most)
                        return false;
        }
        return ae_longacc_below(&parts[0], AE_WIRE_NODE_NORM2) &&
               ae_longacc_below(&parts[1], AE_WIRE_NODE_NORM2);
}

static void decide(struct ae_job *job)
{
        struct ae_wire_verdict verdict = { .kind = AE_VERDICT_APPLIED, .epoch = job->epoch,
                                           .round = job->round, .version = job->version };
        const struct ae_wire_vote *first = job->peers[job->rank_node[0]].vote;
        uint32_t n_counts = first->n_counts;
        struct ae_longacc norm2 = { { 0 } };
        bool infinite = false;

        verdict.ask = first->ask;
        verdict.bad = (struct ae_wire_bad){ .rank = AE_WIRE_NONE, .unit = AE_WIRE_NONE,
                                            .tensor = AE_WIRE_NONE };
        memset((char *)(job->prepare + 1), 0, job->n_buffer_counts * sizeof(uint64_t));
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++) {
                const struct ae_wire_vote *vote = job->peers[node].vote;

                add_norm2(&norm2, vote);
                infinite |= vote->infinite;
                verdict.tokens += vote->tokens;
                verdict.micro_batches += vote->micro_batches;
                merge_bad(&verdict, vote);
                for (uint32_t i = 0; i < AE_MIN(n_counts, vote->n_counts); i++)
                        job->prepare->counts[i] += vote->counts[i];
        }
        if (verdict.kind != AE_VERDICT_REFUSED)
                compare_asks(job, &verdict, n_counts);
        if (verdict.kind != AE_VERDICT_REFUSED)
                check_ask(job, &verdict);
        if (verdict.kind != AE_VERDICT_REFUSED)
                weigh(&verdict, infinite || verdict.kind == AE_VERDICT_SKIPPED ?
                                        NAN : ae_longacc_round(&norm2));
        verdict.version += verdict.kind == AE_VERDICT_APPLIED;
        prepare(job, &verdict, verdict.kind == AE_VERDICT_APPLIED ? n_counts : 0);
}

static int on_vote(struct ae_job *job, uint32_t node, const struct ae_wire_vote *vote, size_t len)
{
        struct ae_job_peer *peer = &job->peers[node];

        if (!ae_core_is_decider(job->core) || len < sizeof(*vote) ||
            (vote->n_counts && vote->n_counts != job->n_buffer_counts) ||
            len - sizeof(*vote) < vote->n_counts * sizeof(uint64_t) ||
            !fits(vote, peer->n_ranks) || peer->voted)
                return ae_fail(AE_EPROTO, "VOTE from node %u does not fit", node);
        if (peer->vote_len < len) {
                ae_table_free(job->core, peer->vote);
                peer->vote = ae_table_new(job->core, 1, len);
                peer->vote_len = len;
        }
        memcpy(peer->vote, vote, len);
        peer->vote->bad.text[AE_WIRE_TEXT - 1] = '\0';
        peer->voted = true;
        if (++job->n_votes == job->core->options.n_nodes && !job->deciding)
                decide(job);
        return 0;
}

/* ---- two phases ------------------------------------------------------------------------- */

static void call_off(struct ae_job *job, uint64_t put_id, const char *text)
{
        Autoep__DecideReply reply = AUTOEP__DECIDE_REPLY__INIT;

        reply.put_id = put_id;
        reply.status = AE_ESTATE;
        reply.text = (char *)(uintptr_t)text;
        ae_job_control(job, 0, AE_CONTROL_DECIDE_REPLY, &reply.base);
}

static void note(struct ae_job *job, const struct ae_wire_prepare *prepare)
{
        job->verdict = prepare->verdict;
        job->verdict.bad.text[AE_WIRE_TEXT - 1] = '\0';
        job->n_counts = prepare->n_counts;
        memcpy(job->counts, (const char *)(prepare + 1), prepare->n_counts * sizeof(*job->counts));
        job->shard.header->verdict = job->verdict;
        atomic_store_explicit(&job->shard.header->prepared, job->round + 1, memory_order_release);
}

static void send_prepared(struct ae_job *job)
{
        struct ae_wire_head prepared = ae_job_head(job, AE_WIRE_PREPARED);

        prepared.type = job->noted;
        job->owes_prepared = false;
        ae_job_msg(job, 0, &prepared, sizeof(prepared));
}

static int on_prepare(struct ae_job *job, uint32_t node, const struct ae_wire_prepare *prepare,
                      size_t len)
{
        bool put;

        if (node != 0 || len < sizeof(*prepare) || prepare->n_counts > job->n_buffer_counts ||
            len - sizeof(*prepare) < prepare->n_counts * sizeof(uint64_t))
                return ae_fail(AE_EPROTO, "PREPARE from node %u does not fit", node);
        put = prepare->verdict.kind == AE_VERDICT_PUT;
        if (put && job->committed && (job->n_closed || ae_fold_started(job))) {
                call_off(job, prepare->verdict.put_id, "a rank has begun to scatter");
                return 0;
        }
        note(job, prepare);
        job->noted = prepare->head.type;
        if (put)
                job->put_prepared = true;
        else
                round_move(job, AE_ROUND_PREPARED);
        if (job->n_applying)
                job->owes_prepared = true; /* a put: it may not write what is still being changed */
        else
                send_prepared(job);
        return 0;
}

void ae_round_applied(struct ae_job *job)
{
        if (job->owes_prepared)
                send_prepared(job);
        ae_round_progress(job);
}

static int on_prepared(struct ae_job *job, uint32_t node, uint16_t decision)
{
        struct ae_wire_head commit = ae_job_head(job, AE_WIRE_COMMIT);

        if (!ae_core_is_decider(job->core))
                return ae_fail(AE_EPROTO, "PREPARED from node %u to one that decides nothing",
                               node);
        if (decision != job->decision)
                return 0; /* of a put that was called off */
        if (!job->deciding || job->peers[node].prepared)
                return 0; /* called off, or said twice: each node counts once */
        job->peers[node].prepared = true;
        if (++job->n_prepared == job->core->options.n_nodes) {
                job->deciding = false;
                commit.type = decision;
                ae_job_msg_all(job, &commit, sizeof(commit));
        }
        return 0;
}

static void mark_updated(struct ae_job *job)
{
        bool balance = job->n_counts && job->verdict.ask.balance_rate != 0;

        memset(job->updated, 0, job->layout->n_units * sizeof(*job->updated));
        memset(job->stepped, 0, job->layout->n_units * sizeof(*job->stepped));
        if (job->verdict.kind != AE_VERDICT_APPLIED ||
            job->model->message->optimizer == AE_OPT_EXTERNAL)
                return;
        for (uint32_t u = 0; u < job->layout->n_units; u++) {
                const struct ae_layout_unit *unit = &job->layout->units[u];

                for (uint32_t g = 0; g < job->n_groups && !job->stepped[u]; g++)
                        job->stepped[u] = ae_round_scattered(job, g, u) == 1;
                job->updated[u] = job->stepped[u];
                for (uint32_t s = 0; balance && s < unit->n_segments; s++)
                        job->updated[u] |= job->layout->segments[unit->segment_first + s].buffer;
        }
}

static void show(struct ae_job *job)
{
        struct ae_worker *worker;

        if (job->verdict.kind != AE_VERDICT_PUT) { /* a rank may not have read its own yet */
                job->page->verdict = job->verdict;
                /* All have asked: no pause makes the next round's waits longer. */
                atomic_store_explicit(&job->page->pause_until_ns, 0, memory_order_relaxed);
        }
        ae_local_text_set(&job->page->waiting, "");
        atomic_store_explicit(&job->shard.header->job_version, job->version, memory_order_release);
        atomic_store_explicit(&job->shard.header->committed, job->round, memory_order_release);
        atomic_store_explicit(&job->page->job_version, job->version, memory_order_release);
        atomic_store_explicit(&job->page->round, job->round, memory_order_release);
        ae_list_for_each(worker, &job->core->workers, link) {
                if (worker->job == job)
                        ae_worker_wake(worker);
        }
}

static int on_commit(struct ae_job *job, uint32_t node, uint16_t decision)
{
        bool put = job->verdict.kind == AE_VERDICT_PUT;
        bool first = !job->committed;

        if (node != 0 || decision != job->noted ||
            (put ? !job->put_prepared || job->owes_prepared
                 : job->round_state != AE_ROUND_PREPARED))
                return ae_fail(AE_EPROTO, "COMMIT from node %u of what was not prepared", node);
        mark_updated(job);
        job->version = job->verdict.version;
        if (put)
                ae_state_commit(job);
        else if (job->verdict.kind == AE_VERDICT_APPLIED)
                ae_apply_step(job);
        job->put_prepared = false;
        job->round++;
        job->kept = put || job->verdict.kind == AE_VERDICT_REFUSED;
        show(job);
        ae_cache_commit(job);
        if (put && first)
                ae_form_committed(job);
        else if (put)
                ae_put_shown(job);
        for (uint32_t i = 0; i < job->n_owned; i++) {
                if (job->owned[i].ready)
                        ae_serve_ready(&job->owned[i]); /* to peers that heard Commit before us */
        }
        ae_state_pump(job); /* fetches of such peers too */
        ae_round_begin(job);
        return 0;
}

void ae_round_begin(struct ae_job *job)
{
        round_move(job, AE_ROUND_OPEN);
        job->n_closed = job->n_ended = job->n_votes = 0;
        if (!job->kept) {
                job->bad = (struct ae_wire_bad){ .rank = AE_WIRE_NONE, .unit = AE_WIRE_NONE,
                                                 .tensor = AE_WIRE_NONE };
                job->redo = false;
        }
        job->closed_since_ns = 0;
        if (job->verdict.kind != AE_VERDICT_PUT)
                ae_wait_pauses_over(job); /* all have asked for the step since */
        for (uint32_t rank = 0; rank < job->world; rank++)
                job->members[rank].closed = false;
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++)
                job->peers[node].ended = job->peers[node].voted = false;
        for (uint32_t i = 0; i < job->n_local; i++) {
                if (job->locals[i]) {
                        job->locals[i]->closed = false;
                        if (!job->kept)
                                job->locals[i]->micro = 0;
                }
        }
        if (!job->kept) {
                ae_fold_reset(job);
                ae_owner_reset(job);
        }
        if (job->n_local == 0)
                send_end(job);
        ae_early_play(job->core, &job->early, job->id);
}

int ae_round_msg(struct ae_job *job, uint32_t node, const struct ae_wire_head *head, size_t len)
{
        if (head->op == AE_WIRE_CREDIT)
                return on_credit(job, node, (const struct ae_wire_credit *)head, len);
        if (head->op == AE_WIRE_WAITING)
                return ae_wait_shown(job, (const struct ae_wire_waiting *)head, len);
        if (head->round == job->round + 1 && ae_round_next_may_come(job))
                return ae_early_msg(&job->early, job->id, node, head, len);
        if (head->round != job->round)
                return 0; /* late: of a round that a put has ended */
        switch (head->op) {
        case AE_WIRE_END:
                return on_end(job, node, (const struct ae_wire_end *)head, len);
        case AE_WIRE_VOTE:
                return on_vote(job, node, (const struct ae_wire_vote *)head, len);
        case AE_WIRE_PREPARE:
                return on_prepare(job, node, (const struct ae_wire_prepare *)head, len);
        case AE_WIRE_PREPARED:
                return on_prepared(job, node, head->type);
        case AE_WIRE_COMMIT:
                return on_commit(job, node, head->type);
        case AE_WIRE_CLOSED:
                return ae_wait_closed(job, (const struct ae_wire_closed *)head, len);
        }
        return ae_fail(AE_EPROTO, "unknown message %u from node %u", head->op, node);
}

/* ---- puts, decided like verdicts --------------------------------------------------------- */

void ae_round_put(struct ae_job *job, uint32_t node, uint64_t put_id, uint64_t version,
                  bool initial)
{
        struct ae_wire_verdict verdict = { .kind = AE_VERDICT_PUT, .put_node = node,
                                           .put_id = put_id, .epoch = job->epoch,
                                           .round = job->round,
                                           .version = initial ? 0 : job->version + 1 };
        Autoep__DecideReply reply = AUTOEP__DECIDE_REPLY__INIT;
        char text[AE_WIRE_TEXT];

        text[0] = '\0';
        if (!initial && version != job->version)
                (void)snprintf(text, sizeof(text),
                               "the weights are at version %" PRIu64 ", not %" PRIu64, job->version,
                               version);
        else if (job->deciding || job->closed_since_ns)
                (void)snprintf(text, sizeof(text),
                               "a rank has asked for step %" PRIu64
                               " or another put is being decided",
                               job->round);
        if (text[0]) {
                reply.put_id = put_id;
                reply.status = AE_ESTATE;
                reply.text = text;
                ae_job_control(job, node, AE_CONTROL_DECIDE_REPLY, &reply.base);
                return;
        }
        job->put_node = node;
        job->put_id = put_id;
        prepare(job, &verdict, 0);
}

/* At the requester: a node shows the put. At the decider: a node cannot prepare it. At the
 * requester and all: it is called off. */
void ae_round_put_reply(struct ae_job *job, uint32_t node, const Autoep__DecideReply *reply)
{
        if (reply->status == 0) {
                ae_put_seen(job, reply->put_id);
                return;
        }
        if (ae_core_is_decider(job->core) && job->deciding && job->put_id == reply->put_id &&
            job->prepare->verdict.kind == AE_VERDICT_PUT) {
                job->deciding = false;
                for (uint32_t i = 0; i < job->core->options.n_nodes; i++)
                        ae_job_control(job, i, AE_CONTROL_DECIDE_REPLY, &reply->base);
                return;
        }
        if (node != 0)
                return;
        if (job->put_prepared && job->verdict.put_id == reply->put_id)
                job->put_prepared = job->owes_prepared = false;
        ae_state_put_off(job, reply->put_id, reply->status, reply->text);
}
