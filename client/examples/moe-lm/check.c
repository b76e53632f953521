/* SPDX-License-Identifier: Apache-2.0 */
/* Compares a backend with the reference, step by step. The training thread of every rank. */
#include "client/examples/moe-lm/check.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ROWS_SHOWN 12

/* One comparison. */
struct row {
        const char *what, *name; /* borrowed */
        uint64_t step;
        double difference, size; /* 2-norms; of the difference, of the reference's */
        double distance;         /* the first over the second, or over the floor */
};

struct state {
        const struct lm_check *check;
        struct row *rows;        /* owned */
        size_t n, cap;
        float *mine, *theirs;    /* owned; the largest tensor */
        int32_t *routes;         /* owned; the choices of all ranks */
        double route_gap;        /* largest of those that differ */
        uint64_t n_routes, n_routes_differ;
        bool verdicts_differ;
};

static int add_row(struct state *state, const struct row *row)
{
        if (state->n == state->cap) {
                const size_t cap = AE_MAX(2 * state->cap, (size_t)256);
                struct row *rows = realloc(state->rows, cap * sizeof(*rows));

                if (!rows)
                        return ae_fail_sys(ENOMEM, "cannot note %zu comparisons", cap);
                state->rows = rows;
                state->cap = cap;
        }
        state->rows[state->n++] = *row;
        return 0;
}

static int compare_arrays(struct state *state, const struct lm_tensor *tensor, struct row row)
{
        double difference = 0, size = 0;

        for (uint64_t i = 0; i < tensor->n; i++) {
                const double a = (double)state->mine[i], b = (double)state->theirs[i];

                difference += (a - b) * (a - b);
                size += b * b;
        }
        row.name = tensor->name;
        row.difference = sqrt(difference);
        row.size = sqrt(size);
        return add_row(state, &row);
}

/* Distances of the rows from @first on: these make up one image of the model. */
static void settle_rows(struct state *state, size_t first)
{
        double all = 0;

        for (size_t i = first; i < state->n; i++)
                all += state->rows[i].size * state->rows[i].size;
        for (size_t i = first; i < state->n; i++) {
                struct row *row = &state->rows[i];
                const double base = fmax(row->size, LM_CHECK_FLOOR * sqrt(all));

                row->distance = row->difference == 0 ? 0 : row->difference / base;
        }
}

static int compare_state(struct state *state, enum lm_what what, uint64_t step)
{
        struct lm_backend *backend = state->check->trainer->backend;
        const struct lm_spec *spec = backend->spec;
        const size_t first = state->n;
        const struct row row = { .what = what == LM_GRADIENT ? "gradient" : "weight",
                                 .step = step };

        for (uint32_t id = 0; id < spec->n_tensors; id++) {
                const struct lm_tensor *tensor = &spec->tensors[id];
                struct lm_trainer *reference = state->check->reference;
                int r;

                if (tensor->home != id || (what == LM_GRADIENT && tensor->class == LM_BUFFER))
                        continue;
                r = backend->ops->get(backend, id, what, state->mine);
                if (r == 0 && reference)
                        r = reference->backend->ops->get(reference->backend, id, what,
                                                         state->theirs);
                if (r == 0 && reference)
                        r = compare_arrays(state, tensor, row);
                if (r < 0)
                        return r;
        }
        settle_rows(state, first);
        return 0;
}

static int compare_verdicts(struct state *state, const struct lm_verdict *mine,
                            const struct lm_verdict *theirs, uint64_t step)
{
        const struct row row = {
                .what = "norm", .name = "(all)", .step = step, .size = theirs->norm,
                .difference = fabs(mine->norm - theirs->norm),
                .distance = fabs(mine->norm - theirs->norm) / fmax(theirs->norm, 1e-30),
        };

        state->verdicts_differ |= mine->applied != theirs->applied;
        return add_row(state, &row);
}

/* Choices of all ranks against those that the reference noted; order within a token counts. */
static int compare_routes(struct state *state)
{
        const struct lm_trainer *mine = state->check->trainer, *theirs = state->check->reference;
        const uint32_t top_k = mine->backend->spec->shape.top_k;
        const size_t n = lm_trainer_log_tokens(mine);
        const size_t len = n * top_k * sizeof(*state->routes);
        int r = ae_comm_allgather(mine->backend->all, mine->log.idx, len, state->routes,
                                  lm_deadline(mine->backend));

        if (r < 0 || !theirs)
                return r;
        assert(n * mine->backend->all->size == lm_trainer_log_tokens(theirs));
        for (size_t t = 0; t < n * mine->backend->all->size; t++) {
                const int32_t *choice = theirs->log.idx + t * top_k;

                if (choice[0] < 0)
                        continue;
                state->n_routes++;
                if (memcmp(choice, state->routes + t * top_k, top_k * sizeof(*choice)) == 0)
                        continue;
                state->n_routes_differ++;
                state->route_gap = fmax(state->route_gap, theirs->log.gap[t]);
        }
        return 0;
}

static int check_step(struct state *state, uint64_t step)
{
        struct lm_outcome mine, theirs;
        int r = lm_train_step(state->check->trainer, step, &mine);

        if (r == 0 && state->check->reference)
                r = lm_train_step(state->check->reference, step, &theirs);
        if (r == 0 && state->check->reference)
                r = compare_verdicts(state, &mine.verdict, &theirs.verdict, step);
        if (r == 0)
                r = compare_state(state, LM_GRADIENT, step);
        if (r == 0)
                r = compare_routes(state);
        return r;
}

static int by_distance(const void *a, const void *b)
{
        const double x = ((const struct row *)a)->distance, y = ((const struct row *)b)->distance;

        /* NaN first. */
        return isnan(x) || x > y ? -1 : isnan(y) || x < y ? 1 : 0;
}

/* Sorts and prints; whether all is within the bound. */
static bool judge(struct state *state)
{
        FILE *out = state->check->out;
        bool passed;

        if (state->n == 0)
                return true;
        qsort(state->rows, state->n, sizeof(*state->rows), by_distance);
        passed = state->rows[0].distance <= LM_CHECK_BOUND && !state->verdicts_differ;
        if (!out)
                return passed;
        fprintf(out, "check: %zu comparisons, the worst are\n"
                "  %-9s %-28s %4s %12s %12s %12s\n", state->n, "what", "tensor", "step",
                "difference", "size", "distance");
        for (size_t i = 0; i < AE_MIN(state->n, (size_t)ROWS_SHOWN); i++) {
                const struct row *row = &state->rows[i];

                fprintf(out, "  %-9s %-28s %4llu %12.3e %12.3e %12.3e%s\n", row->what, row->name,
                        (unsigned long long)row->step, row->difference, row->size, row->distance,
                        row->distance <= LM_CHECK_BOUND ? "" : "  *");
        }
        fprintf(out, "check: %llu of %llu routings differ",
                (unsigned long long)state->n_routes_differ, (unsigned long long)state->n_routes);
        if (state->n_routes_differ)
                fprintf(out, ", where scores were up to %.3e apart", state->route_gap);
        fprintf(out, "%s\ncheck: %s, bound %.0e\n",
                state->verdicts_differ ? "\ncheck: the verdict of a step differs" : "",
                passed ? "passed" : "FAILED", LM_CHECK_BOUND);
        fflush(out);
        return passed;
}

static int prepare(struct state *state)
{
        const struct lm_trainer *trainer = state->check->trainer;
        const struct lm_spec *spec = trainer->backend->spec;
        uint64_t most = 0;
        int r;

        for (uint32_t id = 0; id < spec->n_tensors; id++)
                most = AE_MAX(most, spec->tensors[id].n);
        state->mine = calloc(most, sizeof(*state->mine));
        state->theirs = calloc(most, sizeof(*state->theirs));
        state->routes = calloc(lm_trainer_log_tokens(trainer) * trainer->backend->all->size,
                               spec->shape.top_k * sizeof(*state->routes));
        if (!state->mine || !state->theirs || !state->routes)
                return ae_fail_sys(ENOMEM, "cannot compare tensors of %llu elements",
                                   (unsigned long long)most);
        r = lm_trainer_log_routes(state->check->trainer);
        if (r == 0 && state->check->reference)
                r = lm_trainer_log_routes(state->check->reference);
        return r;
}

static int run(struct state *state, bool *ret_passed)
{
        const uint32_t steps = state->check->trainer->options->steps;
        double failures;
        int r = prepare(state);

        for (uint64_t step = 0; r == 0 && step < steps; step++)
                r = check_step(state, step);
        if (r == 0)
                r = compare_state(state, LM_MASTER, steps - 1);
        if (r < 0)
                return r;
        failures = judge(state) ? 0 : 1;
        r = lm_total(state->check->trainer->backend, &failures, 1);
        *ret_passed = failures == 0;
        return r;
}

int lm_check_run(const struct lm_check *check, bool *ret_passed)
{
        struct state state = { .check = check };
        int r = run(&state, ret_passed);

        free(state.rows);
        free(state.mine);
        free(state.theirs);
        free(state.routes);
        return r;
}
