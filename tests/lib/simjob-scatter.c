/* SPDX-License-Identifier: Apache-2.0 */
/* What a simulated worker scatters: the pieces that the plan draws, with the values it draws. */
#include "tests/lib/simjob-private.h"

#include <math.h>

/* A number of the table is 0 or normal, also with the power in its exponent. */
static void scale_piece(const struct simpiece *piece, bool narrow, char *data)
{
        const size_t size = narrow ? sizeof(ae_bf16) : sizeof(float);

        for (uint64_t i = 0; i < piece->n; i++) {
                uint32_t power = simplan_power(piece->first + i);
                uint32_t bits = 0;

                memcpy(&bits, data + i * size, size);
                if (bits & 0x7fffffff)
                        bits += power << (narrow ? 7 : 23);
                memcpy(data + i * size, &bits, size);
        }
}

static void write_piece(struct simworker *worker, const struct simaction *a,
                        const struct simpiece *piece, bool narrow, char *to)
{
        const struct simjob *job = worker->job;
        uint32_t table = simplan_table(job, worker->step, worker->rank, a->micro, a->unit, a->use);
        size_t size = narrow ? sizeof(ae_bf16) : sizeof(float);
        const char *from = narrow ? (const char *)(job->ref.narrow + table + piece->first)
                                  : (const char *)(job->ref.table + table + piece->first);
        static const float nan_wide = NAN;
        static const ae_bf16 nan_narrow = 0x7fc0;
        struct simnan nan;

        memcpy(to, from, piece->n * size);
        scale_piece(piece, narrow, to);
        for (uint32_t i = 0; i < job->ref.n_gaps; i++) {
                const struct simgap *gap = &job->ref.gaps[i];
                uint64_t first = AE_MAX(gap->first, piece->first);
                uint64_t end = AE_MIN(gap->first + gap->n, piece->first + piece->n);

                if (gap->unit == a->unit && first < end)
                        memset(to + (first - piece->first) * size, 0, (end - first) * size);
        }
        if (!simplan_nan(job, worker->step, &nan) || nan.rank != worker->rank ||
            nan.micro != a->micro || nan.unit != a->unit || nan.use != a->use ||
            nan.element < piece->first || nan.element - piece->first >= piece->n)
                return;
        memcpy(to + (nan.element - piece->first) * size,
               narrow ? (const void *)&nan_narrow : (const void *)&nan_wide, size);
}

/* The first place from @pos on where @len bytes don't wrap. */
static uint64_t place(uint64_t pos, uint64_t len, uint64_t ring)
{
        pos = ae_align_up(pos, 4);
        return pos % ring + len > ring ? pos / ring * ring + ring : pos;
}

/* Where the piece goes; false: the ring has no room yet. Small data makes a full ring by lying as
 * far apart in it as it may. */
static bool place_piece(struct simworker *worker, uint64_t len)
{
        uint64_t ring = worker->page->grad_len;
        uint64_t tail = atomic_load_explicit(&worker->page->grad_tail, memory_order_acquire);
        bool fits;

        if (!worker->piece_pos) {
                uint64_t pad = worker->job->params.pads && !worker->job->ref.calm
                                       ? simworker_chance(worker, AE_LOCAL_PIECE_LEN) : 0;

                worker->piece_pos = place(worker->grad_pos + pad, len, ring);
                if (worker->piece_pos - worker->grad_pos > AE_LOCAL_PIECE_LEN)
                        worker->piece_pos = place(worker->grad_pos, len, ring);
        }
        fits = worker->piece_pos + len - tail <= ring;
        atomic_store(&worker->page->grad_wanted, fits ? 0 : worker->piece_pos + len - ring);
        return fits;
}

static bool is_last(const struct simworker *worker, const struct simaction *a)
{
        uint32_t n = simplan_n_micro(worker->job, worker->step, worker->rank);

        for (uint32_t micro = a->micro + 1; micro < n; micro++) {
                if (simplan_scatters(worker->job, worker->step, worker->rank, micro, a->unit,
                                     a->use))
                        return false;
        }
        return true;
}

bool simworker_scatter(struct simworker *worker, const struct simaction *a)
{
        struct simjob *job = worker->job;
        bool narrow = simplan_is_narrow(job, worker->step, worker->rank, a->unit);
        size_t size = narrow ? sizeof(ae_bf16) : sizeof(float);
        struct ae_local_sqe sqe = { .op = AE_SQ_PIECE, .unit = a->unit, .micro = a->micro,
                                    .use = (uint16_t)a->use,
                                    .dtype = narrow ? AE_DTYPE_BF16 : AE_DTYPE_F32 };
        struct simpiece piece;

        while (simplan_piece(job, worker->step, worker->rank, a->micro, a->unit, a->use,
                             worker->piece, &piece)) {
                if (!piece.skipped && !place_piece(worker, piece.n * size))
                        return false;
                worker->piece++;
                if (piece.skipped)
                        continue;
                sqe.first = piece.first;
                sqe.n = piece.n;
                sqe.pos = worker->piece_pos;
                sqe.len = (uint32_t)(piece.n * size);
                write_piece(worker, a, &piece, narrow, worker->worker->grad->base +
                                                               sqe.pos % worker->page->grad_len);
                worker->grad_pos = sqe.pos + sqe.len;
                worker->piece_pos = 0;
                simworker_post(worker, &sqe);
        }
        sqe = (struct ae_local_sqe){ .op = AE_SQ_SCATTERED, .unit = a->unit, .micro = a->micro,
                                     .use = (uint16_t)a->use };
        if (is_last(worker, a) && simworker_chance(worker, 2))
                sqe.flags = AE_SQ_LAST;
        simworker_post(worker, &sqe);
        return true;
}

/* Without data: as if every piece had come and been folded. */
bool simworker_declare_scattered(struct simworker *worker, const struct simaction *a)
{
        struct ae_sum *sum = ae_job_sum(worker->worker->job, worker->worker->group, a->unit);

        for (uint32_t c = 0; c < sum->n_cells; c++)
                sum->cells[c].started = true;
        simworker_post(worker,
                       &(struct ae_local_sqe){ .op = AE_SQ_SCATTERED, .flags = AE_SQ_LAST,
                                               .unit = a->unit, .micro = a->micro });
        return true;
}
