/* SPDX-License-Identifier: Apache-2.0 */
/* The loop: ranks in turn, micro-batch after micro-batch, and the step. */
#include "client/examples/moe-lm/train.h"

#include "client/examples/moe-lm/random.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TEMPERATURE 0.7

struct lm_shape lm_shape_of(const struct lm_options *o)
{
        return (struct lm_shape){
                .layers = o->layers, .dim = o->dim, .heads = o->heads, .experts = o->experts,
                .top_k = o->top_k, .expert_dim = o->expert_dim, .seq = o->seq,
                .sigmoid = o->router, .balance = o->balance > 0, .dtype = o->weights,
        };
}

double lm_learning_rate(const struct lm_options *o, uint64_t step)
{
        const double after = (double)step + 1 - o->warmup;
        const double left = (double)o->steps - o->warmup;

        if (step < o->warmup)
                return o->lr * ((double)step + 1) / o->warmup;
        return o->lr * (0.55 + 0.45 * cos(M_PI * fmin(after / fmax(left, 1), 1)));
}

static size_t max_tokens(const struct lm_trainer *trainer)
{
        return (size_t)trainer->deal.n_seqs * trainer->deal.seq;
}

static size_t n_counts(const struct lm_trainer *trainer)
{
        return (size_t)trainer->backend->spec->shape.layers * trainer->backend->spec->shape.experts;
}

int lm_trainer_init(struct lm_trainer *trainer, struct lm_backend *backend,
                    const struct lm_text *text, const struct lm_options *options)
{
        int r;

        *trainer = (struct lm_trainer){
                .backend = backend, .ops = lm_model_ops(backend->real), .options = options,
                .deal = { .text = text, .seed = options->seed, .world = backend->world,
                          .accumulate = options->accumulate, .n_seqs = options->batch,
                          .seq = options->seq, .uneven = options->uneven },
        };
        trainer->counts = calloc(n_counts(trainer), sizeof(*trainer->counts));
        trainer->all_counts = calloc(n_counts(trainer), sizeof(*trainer->all_counts));
        if (!trainer->counts || !trainer->all_counts) {
                lm_trainer_deinit(trainer);
                return ae_fail_sys(ENOMEM, "cannot count tokens");
        }
        r = lm_dealt_init(&trainer->dealt, &trainer->deal);
        if (r == 0)
                r = trainer->ops->new(backend, max_tokens(trainer), &trainer->model);
        if (r < 0)
                lm_trainer_deinit(trainer);
        return r;
}

void lm_trainer_deinit(struct lm_trainer *trainer)
{
        if (trainer->ops)
                trainer->ops->free(trainer->model);
        lm_dealt_deinit(&trainer->dealt);
        free(trainer->counts);
        free(trainer->all_counts);
        free(trainer->log.idx);
        free(trainer->log.gap);
        *trainer = (struct lm_trainer){ 0 };
}

static size_t tokens_of_call(const struct lm_trainer *trainer)
{
        return max_tokens(trainer) * trainer->backend->spec->shape.layers;
}

size_t lm_trainer_log_tokens(const struct lm_trainer *trainer)
{
        return tokens_of_call(trainer) * trainer->backend->n_ranks * trainer->deal.accumulate;
}

int lm_trainer_log_routes(struct lm_trainer *trainer)
{
        const size_t n = lm_trainer_log_tokens(trainer);
        const uint32_t top_k = trainer->backend->spec->shape.top_k;

        trainer->log.idx = calloc(n, top_k * sizeof(*trainer->log.idx));
        trainer->log.gap = calloc(n, sizeof(*trainer->log.gap));
        if (!trainer->log.idx || !trainer->log.gap)
                return ae_fail_sys(ENOMEM, "cannot note the choices of %zu tokens", n);
        return 0;
}

/* The part of the log that belongs to a turn: rank by rank, micro-batch by micro-batch. */
static struct lm_route_log log_of(const struct lm_trainer *trainer, const struct lm_turn *turn)
{
        const size_t call = (turn->rank - trainer->backend->first_rank) *
                            (size_t)trainer->deal.accumulate + turn->micro;
        const size_t first = call * tokens_of_call(trainer);

        return (struct lm_route_log){
                .idx = trainer->log.idx + first * trainer->backend->spec->shape.top_k,
                .gap = trainer->log.gap + first,
        };
}

static int run_turn(struct lm_trainer *trainer, const struct lm_turn *turn, double *loss,
                    uint64_t *tokens)
{
        struct lm_backend *backend = trainer->backend;
        const struct lm_batch *batch = &trainer->dealt.batch;
        struct lm_train train = { .batch = batch, .counts = trainer->counts };
        struct lm_route_log log;
        double turn_loss = 0;
        int r;

        lm_deal_train(&trainer->deal, turn, &trainer->dealt);
        train.loss_scale = trainer->options->tokens ? 1 : 1.0 / (double)batch->n_tokens;
        if (trainer->log.idx) {
                log = log_of(trainer, turn);
                train.log = &log;
        }
        r = backend->ops->turn(backend, turn->rank, turn->micro + 1 == trainer->deal.accumulate);
        if (r == 0)
                r = trainer->ops->train(trainer->model, &train, &turn_loss);
        if (r == 0)
                r = backend->ops->turn_end(backend);
        *loss += turn_loss;
        *tokens += batch->n_tokens;
        return r;
}

static struct lm_step step_request(const struct lm_trainer *trainer, uint64_t step,
                                   uint64_t tokens)
{
        const struct lm_options *o = trainer->options;
        struct ae_hyper hyper = { .lr = lm_learning_rate(o, step), .beta1 = 0.9, .beta2 = 0.95,
                                  .eps = 1e-8, .weight_decay = o->weight_decay };
        struct lm_step request = { .max_norm = o->max_norm, .use_tokens = o->tokens,
                                   .tokens = tokens, .balance_rate = o->balance,
                                   .counts = trainer->counts };

        request.hyper[LM_GROUP_DECAY] = hyper;
        hyper.weight_decay = 0;
        request.hyper[LM_GROUP_PLAIN] = hyper;
        return request;
}

static void clear_notes(struct lm_trainer *trainer)
{
        const size_t n = lm_trainer_log_tokens(trainer) * trainer->backend->spec->shape.top_k;

        memset(trainer->counts, 0, n_counts(trainer) * sizeof(*trainer->counts));
        if (trainer->log.idx)
                memset(trainer->log.idx, 0xff, n * sizeof(*trainer->log.idx));
}

/* All turns of the ranks played here. */
static int run_turns(struct lm_trainer *trainer, uint64_t step, double *loss, uint64_t *tokens)
{
        const struct lm_backend *backend = trainer->backend;
        const uint32_t end = backend->first_rank + backend->n_ranks;
        int r = 0;

        for (uint32_t micro = 0; micro < trainer->deal.accumulate; micro++) {
                for (uint32_t rank = backend->first_rank; r == 0 && rank < end; rank++) {
                        const struct lm_turn turn = { .step = step, .micro = micro, .rank = rank };

                        r = run_turn(trainer, &turn, loss, tokens);
                }
        }
        return r;
}

static int attempt_step(struct lm_trainer *trainer, uint64_t step, struct lm_outcome *ret_outcome)
{
        struct lm_backend *backend = trainer->backend;
        struct lm_outcome outcome = { 0 };
        struct lm_step request;
        double sums[2] = { 0 };
        uint64_t tokens = 0, start;
        int r;

        clear_notes(trainer);
        r = run_turns(trainer, step, &sums[0], &tokens);
        if (r < 0)
                return r;
        start = ae_now_ns();
        request = step_request(trainer, step, tokens);
        r = backend->ops->step(backend, &request, &outcome.verdict);
        sums[1] = (double)tokens;
        if (r == 0)
                r = lm_total(backend, sums, 2);
        backend->times.step_ns += ae_now_ns() - start;
        outcome.tokens = sums[1];
        outcome.loss = sums[0] / sums[1];
        if (r == 0)
                *ret_outcome = outcome;
        return r;
}

/* A redo needs nothing to be rewound: data is a function of the step. */
int lm_train_step(struct lm_trainer *trainer, uint64_t step, struct lm_outcome *ret_outcome)
{
        int r;

        do
                r = attempt_step(trainer, step, ret_outcome);
        while (r == 0 && ret_outcome->verdict.redo);
        for (size_t i = 0; r == 0 && i < n_counts(trainer); i++)
                trainer->all_counts[i] += trainer->counts[i];
        return r;
}

int lm_evaluate(struct lm_trainer *trainer, double *ret_loss)
{
        struct lm_backend *backend = trainer->backend;
        const uint32_t end = backend->first_rank + backend->n_ranks;
        double sums[2] = { 0 };
        uint64_t n_rounds = 1;
        int r = 0;

        for (uint64_t round = 0; round < n_rounds; round++) {
                for (uint32_t rank = backend->first_rank; r == 0 && rank < end; rank++) {
                        double loss = 0;

                        n_rounds = lm_deal_held_out(&trainer->deal, round, rank, &trainer->dealt);
                        r = trainer->ops->evaluate(trainer->model, &trainer->dealt.batch, &loss,
                                                   NULL);
                        sums[0] += loss;
                        sums[1] += (double)trainer->dealt.batch.n_tokens;
                }
        }
        if (r == 0)
                r = lm_total(backend, sums, 2);
        if (r == 0)
                *ret_loss = sums[0] / sums[1];
        return r;
}

/* Draws a byte with the probabilities of the logits. */
static uint8_t draw(const double *logits, double random)
{
        double top = logits[0], sum = 0;

        for (size_t v = 1; v < LM_VOCAB; v++)
                top = fmax(top, logits[v]);
        for (size_t v = 0; v < LM_VOCAB; v++)
                sum += exp((logits[v] - top) / TEMPERATURE);
        random *= sum;
        for (size_t v = 0; v < LM_VOCAB; v++) {
                random -= exp((logits[v] - top) / TEMPERATURE);
                if (random < 0)
                        return (uint8_t)v;
        }
        return '\n'; /* rounding left a rest */
}

int lm_generate(struct lm_trainer *trainer, const char *prompt, size_t n, char *text)
{
        const bool mine = trainer->backend->first_rank == 0; /* the others serve their experts */
        const uint64_t key = lm_random_key(trainer->options->seed, "sample");
        const size_t before = strlen(prompt), seq = trainer->deal.seq;
        size_t seq_first[2] = { 0 };
        struct lm_batch batch = { .seq_first = seq_first };
        double logits[LM_VOCAB] = { 0 }, loss;
        uint8_t *all = malloc(before + n + 1);
        int r = 0;

        if (!all)
                return ae_fail_sys(ENOMEM, "cannot generate %zu bytes", n);
        memcpy(all, prompt, before);
        for (size_t i = before; r == 0 && i < before + n; i++) {
                const size_t window = AE_MIN(i, seq);

                batch.tokens = all + i - window;
                batch.n_seqs = mine ? 1 : 0;
                batch.n_tokens = seq_first[1] = mine ? window : 0;
                r = trainer->ops->evaluate(trainer->model, &batch, &loss, logits);
                all[i] = draw(logits, lm_random_unit(key, i));
        }
        memcpy(text, all + before, n);
        free(all);
        return r;
}
