/* SPDX-License-Identifier: Apache-2.0 */
/* Running a task: the one place where the daemon's tensors are touched. Compute threads. */
#include "server/core/task.h"

#include "proto/base/num.h"
#include "proto/wire/balance.h"
#include "proto/wire/layout.h"
#include "server/core/shard.h"

#include <string.h>

static void run_sum(struct ae_task_sum *task)
{
        if (task->zero)
                memset(task->zero, 0, task->n_zero * sizeof(float));
        task->sum.inputs = task->inputs;
        ae_ops()->sum(&task->sum);
}

/* In place; the bits then survive a narrowing for the wire unchanged. */
static void run_round(float *x, uint64_t n)
{
        ae_bf16 narrow[1024];

        for (uint64_t i = 0; i < n; i += AE_ARRAY_LEN(narrow)) {
                uint64_t take = AE_MIN(n - i, (uint64_t)AE_ARRAY_LEN(narrow));

                ae_ops()->f32_to_bf16(narrow, x + i, take);
                ae_ops()->bf16_to_f32(x + i, narrow, take);
        }
}

/* Where a buffer tensor's counts begin among those of all. */
static uint64_t counts_first(const struct ae_layout *layout, uint32_t tensor)
{
        uint64_t first = 0;

        for (uint32_t t = 0; t < tensor; t++) {
                if (layout->tensors[t].class == AE_CLASS_BUFFER && layout->tensors[t].home == t)
                        first += layout->tensors[t].n;
        }
        return first;
}

static void balance_element(const struct ae_task_balance *task,
                            const struct ae_layout_tensor *tensor, const uint64_t *counts,
                            unsigned __int128 total, uint64_t i)
{
        uint64_t at = tensor->first + i - task->slice->first;
        int direction = ae_balance_sign(counts[i], total, tensor->n);
        float *bias = (float *)task->weight + at;

        if (tensor->dtype == AE_DTYPE_F32)
                *bias += (float)task->rate * (float)direction;
}

static void run_balance(const struct ae_task_balance *task)
{
        const struct ae_layout_slice *slice = task->slice;

        for (uint32_t k = 0; k < task->segment->n_tensors; k++) {
                uint32_t id = task->layout->segment_tensors[task->segment->tensor_first + k];
                const struct ae_layout_tensor *tensor = &task->layout->tensors[id];
                const uint64_t *counts = task->counts + counts_first(task->layout, id);
                unsigned __int128 total = 0;

                for (uint64_t i = 0; i < tensor->n; i++)
                        total += counts[i];
                for (uint64_t i = 0; i < tensor->n; i++) {
                        if (tensor->first + i >= slice->first &&
                            tensor->first + i < slice->first + slice->n)
                                balance_element(task, tensor, counts, total, i);
                }
        }
}

static void run_state(const struct ae_task_state *task)
{
        if (!task->state) {
                memcpy(task->weight, task->from, task->n * ae_dtype_size(task->weight_dtype));
                return;
        }
        memcpy(task->state, task->from, task->n * sizeof(float));
        if (!task->weight)
                return;
        if (task->weight_dtype == AE_DTYPE_BF16)
                ae_ops()->f32_to_bf16(task->weight, task->from, task->n);
        else
                memcpy(task->weight, task->from, task->n * sizeof(float));
}

void ae_task_run(struct ae_task *task, uint32_t thread)
{
        switch (task->kind) {
        case AE_TASK_SUM:
                run_sum(&task->sum);
                break;
        case AE_TASK_COPY:
                memcpy(task->copy.to, task->copy.from, task->copy.len);
                break;
        case AE_TASK_NARROW:
                ae_ops()->f32_to_bf16(task->copy.to, task->copy.from,
                                      task->copy.len / sizeof(float));
                break;
        case AE_TASK_ROUND:
                run_round(task->copy.to, task->copy.len / sizeof(float));
                break;
        case AE_TASK_BALANCE:
                run_balance(&task->balance);
                break;
        case AE_TASK_APPLY:
                ae_shard_apply(&task->apply, thread);
                break;
        case AE_TASK_STATE:
                run_state(&task->state);
                break;
        }
}
