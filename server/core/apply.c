/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The optimizer after an applied verdict. The shard is cut into tasks of whole blocks; a task waits
 * for what is still being put from its slices at the old version, and a slice is read again when
 * its last task is done. The next forward pass gathers early slices while later ones are being
 * updated.
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define TASK_N ((uint64_t)1 << 18) /* 1 MiB of master */
static_assert(TASK_N % AE_SHARD_BLOCK_N == 0, "a task covers whole blocks");

/* ---- the table of runs ------------------------------------------------------------------ */

static void add_run(struct ae_job *job, uint32_t owned, uint32_t tensor)
{
        const struct ae_layout_slice *slice = &job->layout->slices[job->owned[owned].slice];
        const struct ae_layout_tensor *t = &job->layout->tensors[tensor];
        uint64_t from = AE_MAX(t->first, slice->first);
        uint64_t to = AE_MIN(t->first + t->n, slice->first + slice->n);
        struct ae_apply_run *run = &job->runs[job->n_runs];

        if (from >= to)
                return;
        run->first = slice->shard_first + (from - slice->first);
        run->n = to - from;
        run->weight_off = slice->weight_off + (from - slice->first) * ae_dtype_size(t->dtype);
        run->tensor = tensor;
        run->dtype = t->dtype;
        run->owned = owned;
        job->n_runs++;
}

static int compare_runs(const void *a, const void *b)
{
        const struct ae_apply_run *ra = a;
        const struct ae_apply_run *rb = b;

        return ra->first < rb->first ? -1 : ra->first > rb->first;
}

static void make_runs(struct ae_job *job)
{
        const struct ae_layout *layout = job->layout;
        size_t cap = 0;

        for (uint32_t i = 0; i < job->n_owned; i++) {
                if (job->owned[i].trainable)
                        cap += layout->segments[layout->slices[job->owned[i].slice].segment]
                                       .n_tensors;
        }
        job->runs = ae_table_new(job->core, cap, sizeof(*job->runs));
        for (uint32_t i = 0; i < job->n_owned; i++) {
                const struct ae_layout_segment *segment =
                        &layout->segments[layout->slices[job->owned[i].slice].segment];

                for (uint32_t t = 0; job->owned[i].trainable && t < segment->n_tensors; t++)
                        add_run(job, i, layout->segment_tensors[segment->tensor_first + t]);
        }
        qsort(job->runs, job->n_runs, sizeof(*job->runs), compare_runs);
        cap = job->n_runs + ae_div_up(layout->node_state_n[job->core->options.node], TASK_N) + 1;
        job->step_runs = ae_table_new(job->core, cap, sizeof(*job->step_runs));
}

static void make_buffers(struct ae_job *job)
{
        const struct ae_layout *layout = job->layout;
        size_t bits = 0;
        size_t counts_len;

        for (uint32_t t = 0; t < layout->n_tensors; t++) {
                if (layout->tensors[t].class == AE_CLASS_BUFFER && layout->tensors[t].home == t)
                        job->n_buffer_counts += ae_u32(AE_MIN(layout->tensors[t].n,
                                                              (uint64_t)AE_WIRE_MAX_COUNTS + 1));
        }
        if (job->n_buffer_counts > AE_WIRE_MAX_COUNTS)
                job->n_buffer_counts = 0; /* too many to be load counts: balancing is refused */
        bits = (size_t)job->n_local_groups * layout->n_units;
        counts_len = job->n_buffer_counts * sizeof(uint64_t);
        job->counts = ae_table_new(job->core, job->n_buffer_counts, sizeof(*job->counts));
        job->end = ae_table_new(job->core, 1, sizeof(*job->end) + bits / 8 + 1);
        job->vote = ae_table_new(job->core, 1, sizeof(*job->vote) + counts_len);
        if (ae_core_is_decider(job->core))
                job->prepare = ae_table_new(job->core, 1, sizeof(*job->prepare) + counts_len);
}

int ae_apply_new(struct ae_job *job)
{
        uint32_t n = job->layout->n_tensors;

        make_runs(job);
        make_buffers(job);
        job->stepped = ae_table_new(job->core, job->layout->n_units, sizeof(*job->stepped));
        job->steps = ae_table_new(job->core, n, sizeof(*job->steps));
        job->adamw = ae_table_new(job->core, n, sizeof(*job->adamw));
        job->sgd = ae_table_new(job->core, n, sizeof(*job->sgd));
        job->absent = ae_table_new(job->core, n, sizeof(*job->absent));
        ae_owner_reset(job);
        return 0;
}

void ae_apply_free(struct ae_job *job)
{
        struct ae_list *entry;

        while ((entry = ae_list_pop(&job->applies)))
                ae_pool_give(&job->core->tasks, entry);
        ae_table_free(job->core, job->runs);
        ae_table_free(job->core, job->step_runs);
        ae_table_free(job->core, job->stepped);
        ae_table_free(job->core, job->steps);
        ae_table_free(job->core, job->adamw);
        ae_table_free(job->core, job->sgd);
        ae_table_free(job->core, job->absent);
        ae_table_free(job->core, job->end);
        ae_table_free(job->core, job->vote);
        ae_table_free(job->core, job->prepare);
}

/* ---- scalars ---------------------------------------------------------------------------- */

static void tensor_scalars(struct ae_job *job, uint32_t t)
{
        const struct ae_wire_verdict *verdict = &job->verdict;
        const struct ae_wire_hyper *wire = &verdict->ask.hyper[job->layout->tensors[t].group];
        struct ae_hyper hyper = { .lr = wire->lr, .beta1 = wire->beta1, .beta2 = wire->beta2,
                                  .eps = wire->eps, .weight_decay = wire->weight_decay };

        job->absent[t] = verdict->ask.absent_groups >> job->layout->tensors[t].group & 1;
        if (job->absent[t])
                return;
        job->steps[t]++;
        if (job->model->message->optimizer == AE_OPT_ADAMW)
                ae_adamw_scalars(&hyper, job->steps[t], verdict->grad_scale, &job->adamw[t]);
        else
                ae_sgd_scalars(&hyper, verdict->grad_scale, &job->sgd[t]);
}

static void all_scalars(struct ae_job *job)
{
        const struct ae_layout *layout = job->layout;

        for (uint32_t t = 0; t < layout->n_tensors; t++) {
                const struct ae_layout_tensor *tensor = &layout->tensors[t];

                if (tensor->home == t && tensor->segment != AE_LAYOUT_NONE &&
                    layout->segments[tensor->segment].trainable && job->stepped[tensor->unit])
                        tensor_scalars(job, t);
        }
}

/* ---- tasks ------------------------------------------------------------------------------ */

void ae_apply_finished(struct ae_owned *owned)
{
        assert(owned->n_tasks > 0);
        if (--owned->n_tasks || owned->job->state >= AE_JOB_FAILED)
                return;
        owned->ready = true;
        ae_serve_ready(owned);
        ae_owner_pump(owned);
        ae_state_pump(owned->job);
}

void ae_apply_one_done(struct ae_job *job)
{
        assert(job->n_applying > 0);
        if (--job->n_applying == 0 && job->state < AE_JOB_FAILED)
                ae_round_applied(job);
}

static void on_applied(struct ae_task *task)
{
        uint32_t last = AE_WIRE_NONE;

        for (uint32_t i = 0; i < task->apply.n_runs; i++) {
                uint32_t owned = task->apply.runs[i].owned;

                if (owned != last)
                        ae_apply_finished(&task->job->owned[owned]);
                last = owned;
        }
        ae_apply_one_done(task->job);
}

static void on_balanced(struct ae_task *task)
{
        ae_apply_finished(task->owner);
        ae_apply_one_done(task->job);
}

static bool may_run(const struct ae_task *task)
{
        if (task->kind == AE_TASK_STATE)
                return task->state.owned->n_puts == 0;
        if (task->kind == AE_TASK_BALANCE)
                return ((const struct ae_owned *)task->owner)->n_puts == 0;
        for (uint32_t i = 0; i < task->apply.n_runs; i++) {
                if (task->job->owned[task->apply.runs[i].owned].n_puts)
                        return false;
        }
        return true;
}

void ae_apply_pump(struct ae_job *job)
{
        struct ae_task *task;

        ae_list_for_each_safe(task, &job->applies, link) {
                if (!may_run(task))
                        continue;
                ae_list_unlink(&task->link);
                ae_job_run(task);
        }
}

void ae_apply_add(struct ae_task *task)
{
        ae_list_push(&task->job->applies, &task->link);
        ae_apply_pump(task->job);
}

static void add_task(struct ae_job *job, const struct ae_apply_run *runs, uint32_t n_runs)
{
        struct ae_task *task;
        uint32_t last = AE_WIRE_NONE;

        if (n_runs == 0)
                return;
        task = ae_job_task(job, AE_TASK_APPLY, on_applied, NULL);
        task->apply = (struct ae_task_apply){
                .shard = &job->shard, .runs = runs, .n_runs = n_runs,
                .gradient = (const float *)job->total->base, .adamw = job->adamw, .sgd = job->sgd,
                .optimizer = job->model->message->optimizer, .absent = job->absent,
                .version = job->version,
        };
        for (uint32_t i = 0; i < n_runs; i++) {
                if (runs[i].owned != last)
                        job->owned[runs[i].owned].n_tasks++;
                last = runs[i].owned;
        }
        job->n_applying++;
        ae_list_push(&job->applies, &task->link);
}

/* Cuts the stepped runs at task boundaries; no two tasks share a block. */
static void cut_tasks(struct ae_job *job)
{
        struct ae_apply_run *out = job->step_runs;
        uint32_t first = 0;
        uint32_t n = 0;

        for (uint32_t i = 0; i < job->n_runs; i++) {
                struct ae_apply_run run = job->runs[i];

                if (!job->stepped[job->owned[run.owned].unit])
                        continue;
                while (run.n) {
                        uint64_t end = (run.first / TASK_N + 1) * TASK_N;
                        uint64_t take = AE_MIN(run.n, end - run.first);

                        if (n > first && out[n - 1].first / TASK_N != run.first / TASK_N) {
                                add_task(job, out + first, n - first);
                                first = n;
                        }
                        out[n] = run;
                        out[n++].n = take;
                        run.first += take;
                        run.n -= take;
                        run.weight_off += take * ae_dtype_size(run.dtype);
                }
        }
        add_task(job, out + first, n - first);
}

static void balance(struct ae_job *job, struct ae_owned *owned)
{
        const struct ae_layout *layout = job->layout;
        const struct ae_layout_slice *slice = &layout->slices[owned->slice];
        const struct ae_layout_segment *segment = &layout->segments[slice->segment];
        struct ae_task *task = ae_job_task(job, AE_TASK_BALANCE, on_balanced, owned);

        task->balance = (struct ae_task_balance){
                .layout = layout,
                .segment = segment,
                .slice = slice,
                .counts = job->counts,
                .rate = job->verdict.ask.balance_rate,
                .weight = job->shard.weight + slice->weight_off,
        };
        owned->n_tasks++;
        job->n_applying++;
        ae_list_push(&job->applies, &task->link);
}

void ae_apply_step(struct ae_job *job)
{
        bool balances = job->n_counts && job->verdict.ask.balance_rate != 0;

        assert(job->n_applying == 0); /* a round cannot end before the last one's apply */
        all_scalars(job);
        cut_tasks(job);
        for (uint32_t i = 0; i < job->n_owned; i++) {
                struct ae_owned *owned = &job->owned[i];
                const struct ae_layout_segment *segment =
                        &job->layout->segments[job->layout->slices[owned->slice].segment];

                if (segment->buffer && balances)
                        balance(job, owned);
                if (job->updated[owned->unit] && (segment->trainable || segment->buffer))
                        owned->content = job->version;
                owned->ready &= owned->n_tasks == 0;
        }
        ae_apply_pump(job);
}
