/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Micro-batches, the step request and its verdict. One thread at a time. A request that ends at its
 * deadline stays posted: the next autoep_step() waits for the same verdict.
 */
#include "client/error.h"
#include "client/holds.h"
#include "client/plan.h"
#include "client/queue.h"
#include "proto/base/num.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define STEP_AGAIN 1 /* a put took the round's number just before the request: ask for the next */

/* ---- micro-batches ---------------------------------------------------------------------- */

static int check_cut(const struct autoep *h)
{
        uint32_t cut = ae_plan_find_cut(h);

        if (cut == AUTOEP_NONE)
                return 0;
        return ae_fail(AE_ESTATE, "unit '%s' (%u) is scattered in part only: scatter it again, or "
                       "step with AUTOEP_STEP_REDO", ae_handle_unit_name(h, cut), cut);
}

static int end_micro_batch(struct autoep *h, const struct ae_deadline *deadline)
{
        struct ae_local_sqe sqe = { .op = AE_SQ_MICRO_END, .micro = atomic_load(&h->micro) };
        int r;

        r = ae_queue_post_wait(h, &sqe, deadline);
        if (r < 0)
                return r;
        atomic_store(&h->micro, sqe.micro + 1);
        atomic_store(&h->micro_open, false);
        return 0;
}

static int micro_batch_end(struct autoep *h)
{
        struct ae_deadline deadline;
        int r = ae_handle_enter_rank(h, "end a micro-batch");

        if (r < 0)
                return r;
        if (atomic_load(&h->asked) || atomic_load(&h->refused))
                return ae_fail(AE_ESTATE, "the step of round %llu is asked for already: call "
                               "autoep_step() again for its verdict",
                               (unsigned long long)h->asked_round);
        r = check_cut(h);
        if (r < 0)
                return r;
        ae_deadline_init(h, AUTOEP_DEFAULT_TIMEOUT, &deadline);
        return end_micro_batch(h, &deadline);
}

int autoep_micro_batch_end(autoep *h)
{
        return ae_api("autoep_micro_batch_end", micro_batch_end(h));
}

/* ---- the norm of experts ----------------------------------------------------------------- */

static_assert(sizeof(struct autoep_norm2) == sizeof(struct ae_longacc), "one and the same");

static struct ae_longacc longacc_of(const struct autoep_norm2 *sum)
{
        struct ae_longacc acc;

        memcpy(&acc, sum, sizeof(acc));
        return acc;
}

static int check_norm2(const struct autoep_norm2 *sum)
{
        struct ae_longacc acc = longacc_of(sum);

        if (ae_longacc_below(&acc, AE_WIRE_RANK_NORM2))
                return 0;
        return ae_fail(AE_EINVAL, "the sum of squares of experts is about %g, more than gradients "
                       "give: zero it, and add with autoep_norm2_add()", ae_longacc_round(&acc));
}

static int norm2_add(struct autoep_norm2 *sum, double square)
{
        struct ae_longacc acc;
        int r;

        if (!sum)
                return ae_fail(AE_EINVAL, "there is no sum to add %g to", square);
        r = check_norm2(sum);
        if (r < 0)
                return r;
        acc = longacc_of(sum);
        if (!ae_longacc_takes(square))
                return ae_fail(AE_EINVAL, "%g is no sum of squares of fp32 values", square);
        ae_longacc_add(&acc, square);
        memcpy(sum, &acc, sizeof(acc));
        return 0;
}

int autoep_norm2_add(struct autoep_norm2 *sum, double square)
{
        return ae_api("autoep_norm2_add", norm2_add(sum, square));
}

/* ---- the request ------------------------------------------------------------------------ */

static int check_number(const char *name, double value)
{
        return isfinite(value) ? 0 : ae_fail(AE_EINVAL, "%s is %g: a finite number is needed", name,
                                             value);
}

static int check_hyper(const struct autoep_hyper *hyper, uint32_t group)
{
        const struct {
                const char *name;
                double value;
        } fields[] = {
                { "lr", hyper->lr }, { "beta1", hyper->beta1 }, { "beta2", hyper->beta2 },
                { "eps", hyper->eps }, { "weight_decay", hyper->weight_decay },
        };

        for (size_t i = 0; i < AE_ARRAY_LEN(fields); i++) {
                if (!isfinite(fields[i].value))
                        return ae_fail(AE_EINVAL, "%s of optimizer group %u is %g: a finite number "
                                       "is needed", fields[i].name, group, fields[i].value);
        }
        return 0;
}

static int check_groups(const struct autoep *h, const struct autoep_step *step)
{
        int r = 0;

        if (step->n_groups > AUTOEP_MAX_GROUPS || (step->n_groups > 0 && !step->hyper))
                return ae_fail(AE_EINVAL, "%u optimizer groups at %p: at most %u, and not NULL",
                               step->n_groups, (const void *)step->hyper, AUTOEP_MAX_GROUPS);
        if (step->n_groups < h->n_groups && h->model->message->optimizer != AUTOEP_EXTERNAL)
                return ae_fail(AE_EINVAL, "hyper-parameters of %u optimizer groups, but the "
                               "model's tensors name %u", step->n_groups, h->n_groups);
        if ((uint64_t)step->absent_groups >> step->n_groups)
                return ae_fail(AE_EINVAL, "absent_groups %#x names groups beyond the %u given",
                               step->absent_groups, step->n_groups);
        for (uint32_t i = 0; i < step->n_groups && r == 0; i++)
                r = check_hyper(&step->hyper[i], i);
        return r;
}

static int check_counts(const struct autoep *h, const struct autoep_step *step)
{
        if (step->n_counts == 0 && step->balance_rate == 0)
                return 0;
        if (step->n_counts != h->n_counts || !step->counts)
                return ae_fail(AE_EINVAL, "%u counts of tokens: the model's buffers have %llu "
                               "elements, one count each", step->n_counts,
                               (unsigned long long)h->n_counts);
        if (step->n_counts > AE_WIRE_MAX_COUNTS)
                return ae_fail(AE_EOVERFLOW, "%u counts of tokens, the limit is %u", step->n_counts,
                               AE_WIRE_MAX_COUNTS);
        for (uint32_t i = 0; i < step->n_counts; i++) {
                if (step->counts[i] > AE_WIRE_COUNT_MAX)
                        return ae_fail(AE_EINVAL, "counts[%u] is %llu tokens, the limit is %llu", i,
                                       (unsigned long long)step->counts[i],
                                       (unsigned long long)AE_WIRE_COUNT_MAX);
        }
        return 0;
}

static int check_step(const struct autoep *h, const struct autoep_step *step)
{
        int r;

        if (!step)
                return ae_fail(AE_EINVAL, "there is no step request");
        r = ae_check_size("autoep_step", step->size, sizeof(*step));
        if (r < 0)
                return r;
        if (step->flags & ~(AUTOEP_STEP_REDO | AUTOEP_USE_TOKENS))
                return ae_fail(AE_EINVAL, "unknown flags %#x",
                               step->flags & ~(AUTOEP_STEP_REDO | AUTOEP_USE_TOKENS));
        if (step->tokens > AE_WIRE_COUNT_MAX)
                return ae_fail(AE_EINVAL, "tokens is %llu, the limit is %llu",
                               (unsigned long long)step->tokens,
                               (unsigned long long)AE_WIRE_COUNT_MAX);
        r = check_groups(h, step);
        if (r == 0)
                r = check_number("scale", step->scale);
        if (r == 0)
                r = check_number("max_norm", step->max_norm);
        if (r == 0)
                r = check_number("balance_rate", step->balance_rate);
        if (r == 0)
                r = check_norm2(&step->expert_norm2);
        if (r == 0)
                r = check_counts(h, step);
        if (r < 0)
                return r;
        if (step->max_norm < 0)
                return ae_fail(AE_EINVAL, "max_norm is %g: use 0 for no clipping", step->max_norm);
        return 0;
}

static void fill_ask(const struct autoep_step *step, struct ae_wire_ask *ret_ask)
{
        struct ae_wire_ask ask = { .scale = step->scale, .max_norm = step->max_norm,
                                   .balance_rate = step->balance_rate,
                                   .use_tokens = !!(step->flags & AUTOEP_USE_TOKENS),
                                   .n_groups = step->n_groups,
                                   .absent_groups = step->absent_groups };

        for (uint32_t i = 0; i < step->n_groups; i++) {
                const struct autoep_hyper *hyper = &step->hyper[i];

                ask.hyper[i] = (struct ae_wire_hyper){ .lr = hyper->lr, .beta1 = hyper->beta1,
                                                       .beta2 = hyper->beta2, .eps = hyper->eps,
                                                       .weight_decay = hyper->weight_decay };
        }
        *ret_ask = ask;
}

static void write_request(struct autoep *h, const struct autoep_step *step)
{
        struct ae_local_step *to = &h->page->step;

        to->round = h->asked_round;
        to->tokens = step->tokens;
        to->micro_batches = atomic_load(&h->micro);
        memcpy(&to->expert_norm2, &step->expert_norm2, sizeof(to->expert_norm2));
        to->redo = !!(step->flags & AUTOEP_STEP_REDO);
        to->bad_expert = step->expert_nonfinite != NULL;
        to->n_counts = step->n_counts;
        to->zero = 0;
        memset(to->bad_text, 0, sizeof(to->bad_text));
        if (step->expert_nonfinite)
                (void)snprintf(to->bad_text, sizeof(to->bad_text), "%s", step->expert_nonfinite);
        fill_ask(step, &to->ask);
        if (step->n_counts > 0)
                memcpy(to->counts, step->counts, step->n_counts * sizeof(to->counts[0]));
}

static int post_request(struct autoep *h, const struct autoep_step *step,
                        const struct ae_deadline *deadline)
{
        struct ae_local_sqe sqe = { .op = AE_SQ_STEP };
        int r = 0;

        if (!(step->flags & AUTOEP_STEP_REDO)) /* nor after one with it that was refused */
                r = check_cut(h);
        if (r == 0 && atomic_load(&h->micro_open))
                r = end_micro_batch(h, deadline);
        if (r < 0)
                return r;
        h->asked_round = ae_handle_round(h);
        write_request(h, step);
        sqe.token = h->asked_round;
        r = ae_queue_post_wait(h, &sqe, deadline);
        if (r < 0)
                return r;
        atomic_store(&h->asked, true);
        return 0;
}

/* ---- the verdict ------------------------------------------------------------------------ */

static bool round_is_over(struct autoep *h, const struct ae_wait *wait)
{
        (void)wait;
        return atomic_load(&h->params->round) > h->asked_round; /* pairs with its release */
}

static void copy_verdict(const struct ae_wire_verdict *from, struct autoep_verdict *to)
{
        to->kind = from->kind;
        to->version = from->version;
        to->round = from->round + 1;
        to->epoch = from->epoch;
        to->scale = from->scale;
        to->norm = from->norm;
        to->clip = from->clip;
        to->grad_scale = from->grad_scale;
        to->tokens = from->tokens;
        to->micro_batches = from->micro_batches;
        to->n_groups = from->ask.n_groups;
        to->absent_groups = from->ask.absent_groups;
        to->balance_rate = from->ask.balance_rate;
        memset(to->hyper, 0, sizeof(to->hyper));
        for (uint32_t i = 0; i < to->n_groups; i++) {
                const struct ae_wire_hyper *hyper = &from->ask.hyper[i];

                to->hyper[i] = (struct autoep_hyper){ .lr = hyper->lr, .beta1 = hyper->beta1,
                                                      .beta2 = hyper->beta2, .eps = hyper->eps,
                                                      .weight_decay = hyper->weight_decay };
        }
        to->bad_unit = from->bad.found ? from->bad.unit : AUTOEP_NONE;
        to->bad_tensor = from->bad.found ? from->bad.tensor : AUTOEP_NONE;
        to->bad_rank = from->bad.found ? from->bad.rank : AUTOEP_NONE;
        (void)snprintf(to->why, sizeof(to->why), "%s", from->bad.text);
}

static int fail_nonfinite(const struct autoep *h, const struct ae_wire_verdict *v)
{
        if (v->bad.found != 1) /* an expert, or a norm that is not finite: the text has it all */
                return ae_fail(AE_ENONFINITE, "%s in round %llu; the round was skipped",
                               v->bad.text, (unsigned long long)v->round);
        return ae_fail(AE_ENONFINITE, "rank %u has NaN or Inf in the gradient of tensor '%s' (%u) "
                       "of unit '%s' (%u) in round %llu; the round was skipped", v->bad.rank,
                       ae_handle_tensor_name(h, v->bad.tensor), v->bad.tensor,
                       ae_handle_unit_name(h, v->bad.unit), v->bad.unit,
                       (unsigned long long)v->round);
}

/* STEP_AGAIN when there is no verdict on the round asked for: a put took it. */
static int read_verdict(struct autoep *h, struct ae_wire_verdict *ret_verdict)
{
        /* It stays as it is until all ranks have asked again, which is why a plain copy will do. */
        struct ae_wire_verdict v = h->params->verdict;

        if (v.round < h->asked_round)
                return STEP_AGAIN;
        if (v.round != h->asked_round || v.kind < AE_VERDICT_APPLIED ||
            v.kind > AE_VERDICT_REFUSED || v.kind == AE_VERDICT_PUT ||
            v.ask.n_groups > AE_WIRE_MAX_GROUPS)
                return ae_pump_break(h, ae_fail(AE_EPROTO, "the daemon shows a verdict of kind %u "
                                                "on round %llu where round %llu was asked for",
                                                v.kind, (unsigned long long)v.round,
                                                (unsigned long long)h->asked_round));
        v.bad.text[sizeof(v.bad.text) - 1] = '\0';
        *ret_verdict = v;
        return 0;
}

/* The round is over for this rank; what it scattered is applied or gone. */
static void begin_round(struct autoep *h)
{
        ae_plan_clear(h);
        atomic_store(&h->micro, 0);
        atomic_store(&h->micro_open, false);
        atomic_store(&h->refused, false);
}

static int take_verdict(struct autoep *h, const struct ae_wire_verdict *v,
                        struct autoep_verdict *ret_verdict)
{
        atomic_store(&h->refused, v->kind == AE_VERDICT_REFUSED);
        if (v->kind == AE_VERDICT_REFUSED)
                return ae_fail(AE_EMISMATCH, "the ranks disagree on the step of round %llu: %s; "
                               "nothing was applied, ask again", (unsigned long long)v->round,
                               v->bad.text);
        begin_round(h);
        ae_count(&h->counters.steps, 1);
        if (v->kind == AE_VERDICT_SKIPPED && h->model->message->nonfinite == AUTOEP_NONFINITE_STOP)
                return fail_nonfinite(h, v);
        copy_verdict(v, ret_verdict);
        return 0;
}

static int wait_for_verdict(struct autoep *h, const struct ae_deadline *deadline,
                            struct ae_wire_verdict *ret_verdict)
{
        struct ae_wait wait = { .done = round_is_over, .deadline = deadline,
                                .reason = AE_REASON_ROUND,
                                .waited_ns = &h->counters.step_wait_ns };
        int r = ae_pump_wait(h, &wait);

        if (r < 0)
                return ae_pump_prefix(r, "there is no verdict on round %llu",
                                      (unsigned long long)h->asked_round);
        r = read_verdict(h, ret_verdict);
        if (r >= 0)
                atomic_store(&h->asked, false);
        return r;
}

static int check_call(struct autoep *h, const struct autoep_step *step, int timeout_ms,
                      const struct autoep_verdict *verdict)
{
        int r = ae_handle_enter_rank(h, "step");

        if (r < 0)
                return r;
        r = ae_deadline_check(timeout_ms);
        if (r < 0)
                return r;
        r = check_step(h, step);
        if (r < 0)
                return r;
        if (!verdict)
                return ae_fail(AE_EINVAL, "there is no verdict to fill");
        r = ae_check_size("autoep_verdict", verdict->size, sizeof(*verdict));
        return r < 0 ? r : ae_holds_check_none(h);
}

static int step_round(struct autoep *h, const struct autoep_step *step, int timeout_ms,
                      struct autoep_verdict *ret_verdict)
{
        struct ae_wire_verdict v;
        struct ae_deadline deadline;
        int r;

        r = check_call(h, step, timeout_ms, ret_verdict);
        if (r < 0)
                return r;
        ae_deadline_init(h, timeout_ms, &deadline);
        do {
                r = atomic_load(&h->asked) ? 0 : post_request(h, step, &deadline);
                if (r < 0)
                        return r;
                r = wait_for_verdict(h, &deadline, &v);
        } while (r == STEP_AGAIN);
        return r < 0 ? r : take_verdict(h, &v, ret_verdict);
}

int autoep_step(autoep *h, const struct autoep_step *step, int timeout_ms,
                struct autoep_verdict *ret_verdict)
{
        return ae_api("autoep_step", step_round(h, step, timeout_ms, ret_verdict));
}
