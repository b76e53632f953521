/* SPDX-License-Identifier: Apache-2.0 */
/* The shard's format, its undo records, and the optimizer over it. Apply runs on compute threads;
 * each has an undo record and blocks of its own, so nothing here is shared between them. */
#include "server/core/shard.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/model.h"
#include "server/core/task.h"

#include <assert.h>
#include <string.h>

static void place(struct ae_shard_header *header)
{
        uint64_t state_len = ae_align_up(header->state_n * sizeof(float), 4096);
        uint64_t n_blocks = ae_div_up(header->state_n, AE_SHARD_BLOCK_N);

        header->undo_off = ae_align_up(sizeof(*header), 4096);
        header->blocks_off =
                ae_align_up(header->undo_off + header->n_undo * sizeof(struct ae_shard_undo), 4096);
        header->master_off = ae_align_up(header->blocks_off + n_blocks * sizeof(uint32_t), 4096);
        header->moment1_off = header->master_off + state_len;
        header->moment2_off = header->moment1_off + state_len;
        header->weight_off = header->moment2_off + state_len;
}

static void point(char *base, const struct ae_shard_header *header, struct ae_shard *ret_shard)
{
        ret_shard->header = (struct ae_shard_header *)base;
        ret_shard->undo = (struct ae_shard_undo *)(base + header->undo_off);
        ret_shard->blocks = (uint32_t *)(base + header->blocks_off);
        ret_shard->master = (float *)(base + header->master_off);
        ret_shard->moment1 = (float *)(base + header->moment1_off);
        ret_shard->moment2 = (float *)(base + header->moment2_off);
        ret_shard->weight = base + header->weight_off;
        ret_shard->state_n = header->state_n;
        ret_shard->weight_len = header->weight_len;
}

static struct ae_shard_header header_of(uint64_t state_n, uint64_t weight_len, uint32_t n_undo)
{
        struct ae_shard_header header = { .magic = AE_SHARD_MAGIC, .version = AE_WIRE_VERSION,
                                          .n_undo = n_undo, .state_n = state_n,
                                          .weight_len = weight_len };

        place(&header);
        return header;
}

uint64_t ae_shard_len(uint64_t state_n, uint64_t weight_len, uint32_t n_undo)
{
        struct ae_shard_header header = header_of(state_n, weight_len, n_undo);

        return ae_align_up(header.weight_off + weight_len, 4096);
}

void ae_shard_format(void *base, uint64_t state_n, uint64_t weight_len, uint32_t n_undo,
                     struct ae_shard *ret_shard)
{
        struct ae_shard_header header = header_of(state_n, weight_len, n_undo);

        point(base, &header, ret_shard);
        memcpy(base, &header, sizeof(header));
        for (uint32_t i = 0; i < n_undo; i++)
                atomic_init(&ret_shard->undo[i].block, AE_SHARD_NO_BLOCK);
}

/* Whether a record, if it is in use, is of a block that the shard has. */
static bool undo_fits(const struct ae_shard_header *header, const struct ae_shard_undo *undo)
{
        uint64_t block = atomic_load_explicit(&undo->block, memory_order_acquire);

        if (block == AE_SHARD_NO_BLOCK)
                return true;
        return block < ae_div_up(header->state_n, AE_SHARD_BLOCK_N) &&
               undo->n == AE_MIN((uint64_t)AE_SHARD_BLOCK_N,
                                 header->state_n - block * AE_SHARD_BLOCK_N);
}

int ae_shard_open(void *base, uint64_t len, struct ae_shard *ret_shard)
{
        struct ae_shard_header header;
        struct ae_shard_header want;

        if (len < sizeof(header))
                return ae_fail(AE_EPROTO, "a shard of %llu bytes is too short",
                               (unsigned long long)len);
        memcpy(&header, base, sizeof(header));
        if (header.magic != AE_SHARD_MAGIC || header.version != AE_WIRE_VERSION)
                return ae_fail(AE_EPROTO, "not a shard of this version");
        if (header.state_n > len / (3 * sizeof(float)))
                return ae_fail(AE_EPROTO, "a shard's state does not fit its size");
        want = header;
        place(&want);
        if (memcmp(&want, &header, sizeof(want)) != 0 || header.weight_len > len ||
            header.weight_off > len - header.weight_len)
                return ae_fail(AE_EPROTO, "a shard's offsets do not fit its size");
        for (uint32_t i = 0; i < header.n_undo; i++) {
                const char *undo = (const char *)base + header.undo_off +
                                   i * sizeof(struct ae_shard_undo);

                if (!undo_fits(&header, (const struct ae_shard_undo *)(const void *)undo))
                        return ae_fail(AE_EPROTO, "undo record %u does not fit its shard", i);
        }
        point(base, &header, ret_shard);
        return 0;
}

/* ---- apply ------------------------------------------------------------------------------ */

/* The part of a run that lies in [first, end). */
static bool clip_run(const struct ae_apply_run *run, uint64_t first, uint64_t end,
                     struct ae_apply_run *ret_run)
{
        uint64_t from = AE_MAX(run->first, first);
        uint64_t to = AE_MIN(run->first + run->n, end);

        if (from >= to)
                return false;
        *ret_run = *run;
        ret_run->first = from;
        ret_run->n = to - from;
        ret_run->weight_off += (from - run->first) * ae_dtype_size(run->dtype);
        return true;
}

static void save_block(const struct ae_shard *shard, struct ae_shard_undo *undo, uint64_t block,
                       const struct ae_task_apply *apply)
{
        uint64_t first = block * AE_SHARD_BLOCK_N;
        uint64_t n = AE_MIN((uint64_t)AE_SHARD_BLOCK_N, shard->state_n - first);

        undo->n = n;
        undo->version = apply->version;
        memcpy(undo->master, shard->master + first, n * sizeof(float));
        memcpy(undo->moment1, shard->moment1 + first, n * sizeof(float));
        if (apply->optimizer == AE_OPT_ADAMW)
                memcpy(undo->moment2, shard->moment2 + first, n * sizeof(float));
        /* pairs with the acquire in ae_shard_repair(), in another life of the daemon */
        atomic_store_explicit(&undo->block, block, memory_order_release);
}

static void apply_run(const struct ae_task_apply *apply, const struct ae_apply_run *run)
{
        const struct ae_shard *shard = apply->shard;
        float *p = shard->master + run->first;
        float *m = shard->moment1 + run->first;
        const float *g = apply->gradient + run->first;
        void *w = shard->weight + run->weight_off;

        if (apply->absent[run->tensor])
                return;
        if (apply->optimizer == AE_OPT_ADAMW)
                ae_ops()->adamw(&apply->adamw[run->tensor], p, m, shard->moment2 + run->first, g, w,
                                run->dtype, run->n);
        else
                ae_ops()->sgd(&apply->sgd[run->tensor], p, m, g, w, run->dtype, run->n);
}

/* One block; its runs begin at @run_first. Returns the first run that reaches beyond it. */
static uint32_t apply_block(const struct ae_task_apply *apply, struct ae_shard_undo *undo,
                            uint64_t block, uint32_t run_first)
{
        uint64_t first = block * AE_SHARD_BLOCK_N;
        uint64_t end = first + AE_SHARD_BLOCK_N;
        struct ae_apply_run run;
        uint32_t run_end = run_first;

        while (run_end < apply->n_runs && apply->runs[run_end].first < end)
                run_end++;
        save_block(apply->shard, undo, block, apply);
        for (uint32_t i = run_first; i < run_end; i++) {
                if (clip_run(&apply->runs[i], first, end, &run))
                        apply_run(apply, &run);
        }
        apply->shard->blocks[block] = (uint32_t)apply->version;
        atomic_store_explicit(&undo->block, AE_SHARD_NO_BLOCK, memory_order_release);
        while (run_first < run_end &&
               apply->runs[run_first].first + apply->runs[run_first].n <= end)
                run_first++;
        return run_first;
}

void ae_shard_apply(const struct ae_task_apply *apply, uint32_t thread)
{
        const struct ae_apply_run *last = &apply->runs[apply->n_runs - 1];
        uint64_t end = ae_div_up(last->first + last->n, AE_SHARD_BLOCK_N);
        uint32_t run = 0;

        assert(apply->n_runs > 0 && thread < apply->shard->header->n_undo);
        for (uint64_t block = apply->runs[0].first / AE_SHARD_BLOCK_N; block < end; block++)
                run = apply_block(apply, &apply->shard->undo[thread], block, run);
}

static void restore_block(struct ae_shard *shard, const struct ae_shard_undo *undo, uint64_t block)
{
        uint64_t first = block * AE_SHARD_BLOCK_N;

        memcpy(shard->master + first, undo->master, undo->n * sizeof(float));
        memcpy(shard->moment1 + first, undo->moment1, undo->n * sizeof(float));
        memcpy(shard->moment2 + first, undo->moment2, undo->n * sizeof(float));
}

static void round_block(struct ae_shard *shard, uint64_t block, const struct ae_apply_run *runs,
                        uint32_t n_runs)
{
        uint64_t first = block * AE_SHARD_BLOCK_N;
        struct ae_apply_run run;

        for (uint32_t i = 0; i < n_runs; i++) {
                if (!clip_run(&runs[i], first, first + AE_SHARD_BLOCK_N, &run))
                        continue;
                if (run.dtype == AE_DTYPE_BF16)
                        ae_ops()->f32_to_bf16((ae_bf16 *)(shard->weight + run.weight_off),
                                              shard->master + run.first, run.n);
                else
                        memcpy(shard->weight + run.weight_off, shard->master + run.first,
                               run.n * sizeof(float));
        }
}

uint32_t ae_shard_repair(struct ae_shard *shard, const struct ae_apply_run *runs, uint32_t n_runs)
{
        uint32_t n = 0;

        for (uint32_t i = 0; i < shard->header->n_undo; i++) {
                struct ae_shard_undo *undo = &shard->undo[i];
                uint64_t block = atomic_load_explicit(&undo->block, memory_order_acquire);

                if (block == AE_SHARD_NO_BLOCK)
                        continue;
                if (shard->blocks[block] != (uint32_t)undo->version) {
                        restore_block(shard, undo, block);
                        round_block(shard, block, runs, n_runs);
                        n++;
                }
                atomic_store_explicit(&undo->block, AE_SHARD_NO_BLOCK, memory_order_release);
        }
        return n;
}
