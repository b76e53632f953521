/* SPDX-License-Identifier: Apache-2.0 */
/* Scatter against a fake daemon: the bytes of every piece, room, micro-batches, wrong arguments. */
#include "tests/lib/client-job.h"
#include "tests/lib/test.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EMBED_N 1200
#define LAYER_GRAD_N (128 + 1152) /* fp32 norm, then bf16 w and w2 with their gap and padding */

static int setup(void **state)
{
        *state = fake_daemon_start(&(struct fake_config){ .world = 1 });
        return 0;
}

static int teardown(void **state)
{
        fake_daemon_stop(*state);
        return 0;
}

/* Element i of tensor t; exact in bf16. */
static float value_of(uint32_t t, uint64_t i)
{
        return (float)(t + 1) * (float)(1 + i % 16);
}

static uint16_t bf16_of(float value)
{
        uint32_t bits;

        memcpy(&bits, &value, sizeof(bits));
        assert_int_equal(bits & 0xffff, 0);
        return (uint16_t)(bits >> 16);
}

static struct autoep_gradient gradient_of(uint32_t t, uint64_t n, uint32_t dtype)
{
        size_t size = dtype == AUTOEP_F32 ? 4 : 2;
        uint8_t *data = malloc(n * size + 1);

        for (uint64_t i = 0; i < n; i++) {
                float value = value_of(t, i);
                uint16_t narrow = bf16_of(value);

                memcpy(data + i * size, size == 4 ? (void *)&value : (void *)&narrow, size);
        }
        return (struct autoep_gradient){ .size = sizeof(struct autoep_gradient), .tensor = t,
                                         .dtype = dtype, .data = data };
}

static void free_gradients(struct autoep_gradient *g, size_t n)
{
        for (size_t i = 0; i < n; i++)
                free((void *)(uintptr_t)g[i].data);
}

/* In another order than that of registration. */
static void layer_gradients(struct autoep_gradient *g, uint32_t dtype, uint32_t norm_dtype)
{
        g[0] = gradient_of(JOB_TIED, EMBED_N, dtype);
        g[1] = gradient_of(JOB_W2, 3, dtype);
        g[2] = gradient_of(JOB_NORM, 5, norm_dtype);
        g[3] = gradient_of(JOB_W, 1000, dtype);
}

static float element(const struct fake_piece *piece, uint64_t i)
{
        uint32_t bits = 0;
        float value;

        if (piece->sqe.dtype == AUTOEP_F32)
                memcpy(&bits, piece->data + 4 * i, 4);
        else
                memcpy((uint8_t *)&bits + 2, piece->data + 2 * i, 2);
        memcpy(&value, &bits, 4);
        return value;
}

/* What the image of unit layer has at element i, worked out by hand. */
static float layer_expected(uint64_t i)
{
        if (i < 5)
                return value_of(JOB_NORM, i);
        if (i >= 128 && i < 1128)
                return value_of(JOB_W, i - 128);
        if (i >= 128 + 1024 && i < 128 + 1027)
                return value_of(JOB_W2, i - 128 - 1024);
        return 0;
}

static void check_layer(const struct fake_worker *w, uint32_t dtype, uint32_t micro)
{
        const struct fake_piece *tied = &w->pieces[0];
        const struct fake_piece *own = &w->pieces[1];

        assert_int_equal(w->n_pieces, 2);
        assert_int_equal(tied->sqe.unit, JOB_UNIT_EMBED);
        assert_int_equal(tied->sqe.use, 1);
        assert_int_equal(tied->sqe.first, 0);
        assert_int_equal(tied->sqe.n, EMBED_N);
        assert_int_equal(tied->sqe.micro, micro);
        for (uint64_t i = 0; i < EMBED_N; i++)
                assert_true(element(tied, i) == value_of(JOB_TIED, i));
        assert_int_equal(own->sqe.unit, JOB_UNIT_LAYER);
        assert_int_equal(own->sqe.use, 0);
        assert_int_equal(own->sqe.dtype, dtype);
        assert_int_equal(own->sqe.first, 0);
        assert_int_equal(own->sqe.n, LAYER_GRAD_N);
        assert_int_equal(own->sqe.len, LAYER_GRAD_N * (dtype == AUTOEP_F32 ? 4 : 2));
        for (uint64_t i = 0; i < LAYER_GRAD_N; i++)
                assert_true(element(own, i) == layer_expected(i));
}

static void image_is_right_for(struct fake_daemon *d, uint32_t dtype, uint32_t norm_dtype)
{
        static const uint16_t ops[] = { AE_SQ_PIECE, AE_SQ_SCATTERED, AE_SQ_PIECE,
                                        AE_SQ_SCATTERED };
        const struct fake_worker *w = &d->workers[0];
        struct autoep_gradient g[4];
        autoep *h = job_join(d);

        /* What was in the ring before must not show through the gaps. */
        memset(d->workers[0].grad, 0xff, d->workers[0].grad_len);
        fake_sync(d);
        layer_gradients(g, dtype, norm_dtype);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, AUTOEP_LAST, 0), 0);
        fake_sync(d);
        check_layer(w, dtype == AUTOEP_F32 || norm_dtype == AUTOEP_F32 ? AUTOEP_F32 : AUTOEP_BF16,
                    0);
        assert_int_equal(w->n_log, 4);
        for (int i = 0; i < 4; i++) {
                assert_int_equal(w->log[i].op, ops[i]);
                assert_int_equal(w->log[i].unit, i < 2 ? JOB_UNIT_EMBED : JOB_UNIT_LAYER);
                assert_int_equal(w->log[i].use, i < 2 ? 1 : 0);
                assert_int_equal(w->log[i].flags, i % 2 ? AE_SQ_LAST : 0);
        }
        free_gradients(g, 4);
        autoep_close(h);
}

static void an_image_in_bf16_is_right(void **state)
{
        image_is_right_for(*state, AUTOEP_BF16, AUTOEP_BF16);
}

static void an_image_in_fp32_is_right(void **state)
{
        image_is_right_for(*state, AUTOEP_F32, AUTOEP_F32);
}

static void mixed_types_are_widened(void **state)
{
        image_is_right_for(*state, AUTOEP_BF16, AUTOEP_F32);
}

static void odd_values_survive_widening(void **state)
{
        struct fake_daemon *d = *state;
        static const uint16_t w2[3] = { 0x7fc1, 0xff80, 0x0001 }; /* NaN, -Inf, a subnormal */
        struct autoep_gradient g[4];
        const struct fake_piece *own;
        uint32_t bits[3];
        autoep *h = job_join(d);

        layer_gradients(g, AUTOEP_BF16, AUTOEP_F32);
        free((void *)(uintptr_t)g[1].data);
        g[1].data = w2;
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, 0, 0), 0);
        fake_sync(d);
        own = &d->workers[0].pieces[1];
        memcpy(bits, own->data + 4 * (128 + 1024), sizeof(bits));
        assert_int_equal(bits[0], 0x7fc10000);
        assert_int_equal(bits[1], 0xff800000);
        assert_int_equal(bits[2], 0x00010000);
        g[1].data = NULL;
        free_gradients(g, 4);
        autoep_close(h);
}

static void units_of_aliases_go_to_their_homes(void **state)
{
        struct fake_daemon *d = *state;
        const struct fake_worker *w = &d->workers[0];
        struct autoep_gradient g = gradient_of(JOB_HEAD, EMBED_N, AUTOEP_F32);
        autoep *h = job_join(d);

        assert_int_equal(autoep_scatter(h, JOB_UNIT_HEAD, &g, 1, 0, 0), 0);
        fake_sync(d);
        assert_int_equal(w->n_log, 2); /* nothing for unit head itself */
        assert_int_equal(w->log[1].op, AE_SQ_SCATTERED);
        assert_int_equal(w->log[1].unit, JOB_UNIT_EMBED);
        assert_int_equal(w->log[1].use, 2);
        assert_int_equal(w->pieces[0].sqe.unit, JOB_UNIT_EMBED);
        assert_int_equal(w->pieces[0].sqe.use, 2);
        free_gradients(&g, 1);
        autoep_close(h);
}

/* The cells of a unit, through a ring that holds all but the last, so that it wraps; again and
 * again. */
static void check_big(const struct fake_worker *w, uint32_t unit, uint32_t use, uint32_t tensor,
                      size_t first)
{
        uint64_t tail_n = use ? 100 : 128; /* an alias is sent without the padding */

        for (uint64_t k = 0; k < JOB_BIG_PIECES; k++) {
                const struct fake_piece *p = &w->pieces[first + k];
                uint64_t n = k < JOB_BIG_PIECES - 1 ? AE_LOCAL_PIECE_N : tail_n;

                assert_int_equal(p->sqe.unit, unit);
                assert_int_equal(p->sqe.use, use);
                assert_int_equal(p->sqe.first, k * AE_LOCAL_PIECE_N);
                assert_int_equal(p->sqe.n, n);
                for (uint64_t i = 0; i < n; i += k < JOB_BIG_PIECES - 1 ? 997 : 1) {
                        uint64_t at = k * AE_LOCAL_PIECE_N + i;

                        assert_true(element(p, i) == (at < JOB_BIG_N ? value_of(tensor, at) : 0));
                }
        }
}

static void large_units_are_cut_and_wrap(void **state)
{
        struct fake_daemon *d = *state;
        const struct fake_worker *w = &d->workers[0];
        struct autoep_gradient g = gradient_of(JOB_BIG, JOB_BIG_N, AUTOEP_F32);
        struct autoep_gradient tied = g;
        struct autoep_stats stats = { .size = sizeof(stats) };
        autoep *h = job_join(d);

        tied.tensor = JOB_BIG_TIED;
        assert_int_equal(autoep_scatter(h, JOB_UNIT_BIG, &g, 1, 0, 0), AUTOEP_EBUDGET);
        job_assert_error_names("ring_len"); /* it never fits at once */
        for (uint32_t micro = 0; micro < 3; micro++) {
                assert_int_equal(autoep_scatter(h, JOB_UNIT_BIG, &g, 1, 0, 5000), 0);
                assert_int_equal(autoep_scatter(h, JOB_UNIT_BIG_TIED, &tied, 1, 0, 5000), 0);
                assert_int_equal(autoep_micro_batch_end(h), 0);
        }
        fake_sync(d);
        assert_int_equal(w->n_pieces, 6 * JOB_BIG_PIECES);
        for (size_t i = 0; i < 3; i++) {
                check_big(w, JOB_UNIT_BIG, 0, JOB_BIG, 2 * i * JOB_BIG_PIECES);
                check_big(w, JOB_UNIT_BIG, 1, JOB_BIG, (2 * i + 1) * JOB_BIG_PIECES);
                assert_int_equal(w->pieces[2 * i * JOB_BIG_PIECES].sqe.micro, i);
        }
        assert_int_equal(autoep_stats(h, &stats), 0);
        assert_int_equal(stats.scatters, 6);
        assert_int_equal(stats.scatter_len, 3 * 4 * (2 * (JOB_BIG_N - 100) + 128 + 100));
        free_gradients(&g, 1);
        autoep_close(h);
}

/* ---- room ------------------------------------------------------------------------------- */

static void a_full_ring_takes_nothing(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_gradient big = gradient_of(JOB_BIG, JOB_BIG_N,
                                                 AUTOEP_BF16); /* 8 MiB and a bit */
        struct autoep_gradient tied = big;
        uint32_t tail;
        autoep *h = job_join(d);

        tied.tensor = JOB_BIG_TIED;
        fake_set_holds(d, FAKE_HOLD_PIECE);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_BIG, &big, 1, 0, 0), 0);
        tail = atomic_load(&d->workers[0].page->sq_tail);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_BIG_TIED, &tied, 1, 0, 0), AUTOEP_EAGAIN);
        assert_int_equal(atomic_load(&d->workers[0].page->sq_tail), tail);
        fake_set_holds(d, 0);
        fake_sync(d);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_BIG_TIED, &tied, 1, 0, 0), 0);
        fake_sync(d);
        assert_int_equal(d->workers[0].n_pieces, 2 * JOB_BIG_PIECES);
        free_gradients(&big, 1);
        autoep_close(h);
}

static void a_cut_scatter_goes_on(void **state)
{
        struct fake_daemon *d = *state;
        const struct fake_worker *w = &d->workers[0];
        struct autoep_gradient g = gradient_of(JOB_BIG, JOB_BIG_N, AUTOEP_F32);
        struct autoep_step step = job_step();
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        autoep *h = job_join(d);
        uint64_t start = job_now_ms();

        fake_set_holds(d, FAKE_HOLD_PIECE);
        ae_local_text_set(&d->workers[0].page->why, "the sums of unit 9 wait for memory");
        assert_int_equal(autoep_scatter(h, JOB_UNIT_BIG, &g, 1, 0, 50), AUTOEP_ETIMEDOUT);
        job_assert_took(job_now_ms() - start, 50);
        job_assert_error_names("the sums of unit 9 wait for memory");
        job_assert_error_names("'big' (2) in round 1");
        assert_int_equal(autoep_micro_batch_end(h), AUTOEP_ESTATE);
        assert_int_equal(autoep_step(h, &step, 100, &verdict), AUTOEP_ESTATE);
        fake_set_holds(d, 0);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_BIG, &g, 1, 0, 5000), 0);
        fake_sync(d);
        assert_int_equal(w->n_pieces, JOB_BIG_PIECES);
        check_big(w, JOB_UNIT_BIG, 0, JOB_BIG, 0);
        assert_int_equal(w->log[w->n_log - 1].op, AE_SQ_SCATTERED);
        fake_sync(d);
        assert_int_equal(autoep_step(h, &step, 5000, &verdict), 0);
        free_gradients(&g, 1);
        autoep_close(h);
}

/* A rank that gave its round up is asked again with all others; what it cut short still counts. */
static void a_cut_scatter_is_not_forgotten(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_gradient g = gradient_of(JOB_BIG, JOB_BIG_N, AUTOEP_F32);
        struct autoep_step step = job_step();
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        autoep *h = job_join(d);

        fake_set_holds(d, FAKE_HOLD_PIECE);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_BIG, &g, 1, 0, 50), AUTOEP_ETIMEDOUT);
        fake_set_verdict(d, AE_VERDICT_REFUSED, &(struct ae_wire_bad){ .text = "they differ" });
        fake_set_holds(d, 0);
        step.flags = AUTOEP_STEP_REDO;
        assert_int_equal(autoep_step(h, &step, 5000, &verdict), AUTOEP_EMISMATCH);
        step.flags = 0;
        assert_int_equal(autoep_step(h, &step, 5000, &verdict), AUTOEP_ESTATE);
        job_assert_error_names("'big' (2) is scattered in part only");
        fake_set_verdict(d, AE_VERDICT_REDO, NULL);
        step.flags = AUTOEP_STEP_REDO;
        assert_int_equal(autoep_step(h, &step, 5000, &verdict), 0);
        step.flags = 0;
        assert_int_equal(autoep_step(h, &step, 5000, &verdict), 0); /* the new round has none */
        free_gradients(&g, 1);
        autoep_close(h);
}

/* Of two lanes one was said to be the last of its round: so must the other. */
static void a_cut_scatter_keeps_its_flags(void **state)
{
        struct fake_daemon *d = *state;
        const uint32_t unit = JOB_UNIT_EMBED;
        struct autoep_gradient g[4];
        autoep *h = job_join(d);

        layer_gradients(g, AUTOEP_F32, AUTOEP_F32);
        fake_set_holds(d, FAKE_HOLD_ALL);
        for (uint32_t i = 0; i < AE_LOCAL_SQ_LEN - 2; i++)
                assert_int_equal(autoep_prefetch(h, &unit, 1), 0);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, AUTOEP_LAST, 50),
                         AUTOEP_ETIMEDOUT);
        fake_set_holds(d, 0);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, 0, 5000), AUTOEP_EINVAL);
        job_assert_error_names("AUTOEP_LAST");
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, AUTOEP_LAST, 5000), 0);
        free_gradients(g, 4);
        autoep_close(h);
}

static void impossible_tails_are_found(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_gradient g[4];
        autoep *h = job_join(d);

        layer_gradients(g, AUTOEP_BF16, AUTOEP_BF16);
        atomic_store(&d->workers[0].page->grad_tail, 1 << 20);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, 0, 1000), AUTOEP_EPROTO);
        free_gradients(g, 4);
        autoep_close(h);
}

/* ---- rules ------------------------------------------------------------------------------ */

static void wrong_gradients_are_named(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_gradient g[5];
        autoep *h = job_join(d);

        layer_gradients(g, AUTOEP_BF16, AUTOEP_F32);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 3, 0, 0), AUTOEP_EINVAL);
        job_assert_error_names("layer.w");
        g[4] = g[0];
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 5, 0, 0), AUTOEP_EINVAL);
        job_assert_error_names("'layer.tied' is given twice");
        g[4].tensor = JOB_FROZEN;
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 5, 0, 0), AUTOEP_EINVAL);
        job_assert_error_names("layer.frozen");
        g[3].tensor = JOB_EMBED; /* of another unit, in the place of layer.w */
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, 0, 0), AUTOEP_EINVAL);
        job_assert_error_names("embed.weight");
        g[3].tensor = 99;
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, 0, 0), AUTOEP_ENOENT);
        g[3].tensor = JOB_W;
        g[3].dtype = AUTOEP_I64;
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, 0, 0), AUTOEP_EINVAL);
        g[3].dtype = AUTOEP_BF16;
        g[3].size = 8;
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, 0, 0), AUTOEP_EINVAL);
        g[3].size = sizeof(g[3]);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, 8, 0), AUTOEP_EINVAL);
        assert_int_equal(autoep_scatter(h, 99, g, 4, 0, 0), AUTOEP_ENOENT);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, NULL, 4, 0, 0), AUTOEP_EINVAL);
        assert_int_equal(atomic_load(&d->workers[0].page->sq_tail), 0);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, 0, 0), 0);
        free_gradients(g, 4);
        autoep_close(h);
}

static void a_unit_is_scattered_once_a_micro_batch(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_gradient g[4];
        struct autoep_step step = job_step();
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        autoep *h = job_join(d);

        layer_gradients(g, AUTOEP_BF16, AUTOEP_BF16);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, 0, 0), 0);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, 0, 0), AUTOEP_EEXIST);
        job_assert_error_names("micro-batch 0 of round 1");
        assert_int_equal(autoep_micro_batch_end(h), 0);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, AUTOEP_LAST, 0), 0);
        assert_int_equal(autoep_micro_batch_end(h), 0);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, 0, 0), AUTOEP_ESTATE);
        assert_int_equal(autoep_step(h, &step, 5000, &verdict), 0);
        assert_int_equal(verdict.micro_batches, 2);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_LAYER, g, 4, 0, 0), 0); /* a new round */
        free_gradients(g, 4);
        autoep_close(h);
}

struct scatterer {
        pthread_t thread;
        autoep *h;
        struct autoep_gradient *g;
        size_t n;
        uint32_t unit;
        int timeout_ms;
        int r;
};

static void *run_scatterer(void *arg)
{
        struct scatterer *s = arg;

        s->r = autoep_scatter(s->h, s->unit, s->g, s->n, 0, s->timeout_ms ? s->timeout_ms : 10000);
        return NULL;
}

static void *run_gather(void *arg)
{
        struct autoep_view view = AUTOEP_VIEW_INIT;

        (void)autoep_gather(arg, JOB_UNIT_EMBED, 400, &view);
        return NULL;
}

/* A thread leads in a gather that isn't answered; another waits for a piece that doesn't fit, and
 * gives up after 60 ms; the third waits for its turn, and its piece does fit. The daemon wakes
 * nobody. */
static void the_next_thread_is_woken(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_gradient first = gradient_of(JOB_BIG, JOB_BIG_N, AUTOEP_BF16);
        struct autoep_gradient large = gradient_of(JOB_BIG_TIED, JOB_BIG_N, AUTOEP_F32);
        struct autoep_gradient head = gradient_of(JOB_HEAD, EMBED_N, AUTOEP_F32);
        autoep *h = job_join(d);
        struct scatterer stuck = { .h = h, .g = &large, .n = 1, .unit = JOB_UNIT_BIG_TIED,
                                   .timeout_ms = 60 };
        uint64_t start = job_now_ms();
        pthread_t leader;

        fake_set_holds(d, FAKE_HOLD_ALL);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_BIG, &first, 1, 0, 0), 0);
        assert_int_equal(pthread_create(&leader, NULL, run_gather, h), 0);
        usleep(10000); /* in whatever order they come, all must end well; this is the telling one */
        assert_int_equal(pthread_create(&stuck.thread, NULL, run_scatterer, &stuck), 0);
        usleep(10000);
        assert_int_equal(autoep_scatter(h, JOB_UNIT_HEAD, &head, 1, 0, 300), 0);
        job_assert_took(job_now_ms() - start, 70);
        pthread_join(stuck.thread, NULL);
        assert_int_equal(stuck.r, AUTOEP_ETIMEDOUT);
        pthread_join(leader, NULL);
        free_gradients(&first, 1);
        free_gradients(&large, 1);
        free_gradients(&head, 1);
        autoep_close(h);
}

/* Several units at once: pieces stand in the ring in the order in which they are announced. */
static void threads_scatter_side_by_side(void **state)
{
        struct fake_daemon *d = *state;
        const struct fake_worker *w = &d->workers[0];
        struct autoep_gradient layer[4];
        struct autoep_gradient big = gradient_of(JOB_BIG, JOB_BIG_N, AUTOEP_F32);
        struct autoep_gradient tied = big;
        autoep *h = job_join(d);
        struct scatterer all[3] = { { .h = h, .g = layer, .n = 4, .unit = JOB_UNIT_LAYER },
                                    { .h = h, .g = &big, .n = 1, .unit = JOB_UNIT_BIG },
                                    { .h = h, .g = &tied, .n = 1, .unit = JOB_UNIT_BIG_TIED } };

        tied.tensor = JOB_BIG_TIED;
        layer_gradients(layer, AUTOEP_BF16, AUTOEP_BF16);
        for (int round = 0; round < 3; round++) {
                for (int i = 0; i < 3; i++)
                        assert_int_equal(pthread_create(&all[i].thread, NULL, run_scatterer,
                                                        &all[i]), 0);
                for (int i = 0; i < 3; i++) {
                        pthread_join(all[i].thread, NULL);
                        assert_int_equal(all[i].r, 0);
                }
                assert_int_equal(autoep_micro_batch_end(h), 0);
        }
        fake_sync(d);
        assert_int_equal(w->n_pieces, 3 * (2 + 2 * JOB_BIG_PIECES));
        for (size_t i = 1; i < w->n_pieces; i++) {
                const struct ae_local_sqe *before = &w->pieces[i - 1].sqe;

                assert_true(w->pieces[i].sqe.pos >= before->pos + before->len);
        }
        free_gradients(layer, 4);
        free_gradients(&big, 1);
        autoep_close(h);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
        const struct CMUnitTest tests[] = {
                TEST(an_image_in_bf16_is_right),
                TEST(an_image_in_fp32_is_right),
                TEST(mixed_types_are_widened),
                TEST(odd_values_survive_widening),
                TEST(units_of_aliases_go_to_their_homes),
                TEST(large_units_are_cut_and_wrap),
                TEST(a_full_ring_takes_nothing),
                TEST(a_cut_scatter_goes_on),
                TEST(a_cut_scatter_is_not_forgotten),
                TEST(a_cut_scatter_keeps_its_flags),
                TEST(impossible_tails_are_found),
                TEST(wrong_gradients_are_named),
                TEST(a_unit_is_scattered_once_a_micro_batch),
                TEST(threads_scatter_side_by_side),
                TEST(the_next_thread_is_woken),
        };

        return cmocka_run_group_tests_name("client-scatter", tests, NULL, NULL);
}
