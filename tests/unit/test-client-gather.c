/* SPDX-License-Identifier: Apache-2.0 */
/* Gather and release against a fake daemon: hits, misses, ranges, allowance, races, deadlines. */
#include "tests/lib/client-job.h"
#include "tests/lib/test.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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

static uint32_t posted(const struct fake_daemon *d)
{
        return atomic_load(&d->workers[0].page->sq_tail);
}

/* ---- hits ------------------------------------------------------------------------------- */

static void a_hit_sends_nothing(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view a = AUTOEP_VIEW_INIT;
        struct autoep_view b = AUTOEP_VIEW_INIT;
        struct autoep_stats stats = { .size = sizeof(stats) };
        autoep *h = job_join(d);

        fake_set_version(d, 3);
        fake_publish(d, JOB_UNIT_LAYER, 3);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 0, &a), 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 0, &b), 0);
        assert_ptr_equal(a.data, b.data); /* nested gathers share the address */
        assert_int_equal((uintptr_t)a.data % 256, 0);
        assert_int_equal(a.version, 3);
        assert_int_equal(a.len, d->layout->units[JOB_UNIT_LAYER].len);
        assert_true(job_view_is_right(&a, 0));
        assert_int_equal(fake_n_holds(d), 2);
        assert_int_equal(autoep_release(h, &a), 0);
        assert_false(fake_withdraw(d, JOB_UNIT_LAYER)); /* b still holds it */
        assert_true(job_view_is_right(&b, 0));
        assert_int_equal(autoep_release(h, &b), 0);
        assert_int_equal(fake_n_holds(d), 0);
        assert_int_equal(posted(d), 0);
        assert_int_equal(autoep_stats(h, &stats), 0);
        assert_int_equal(stats.gathers, 2);
        assert_int_equal(stats.gather_hits, 2);
        assert_int_equal(stats.gather_len, 2 * d->layout->units[JOB_UNIT_LAYER].len);
        autoep_close(h);
}

static void any_version_is_every_version(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        autoep *h = job_join(d);

        fake_publish(d, JOB_UNIT_EMBED, AE_LOCAL_VERSION_ANY);
        fake_set_version(d, 12);
        assert_int_equal(autoep_gather(h, JOB_UNIT_EMBED, 0, &view), 0);
        assert_int_equal(view.version, 12);
        assert_int_equal(posted(d), 0);
        assert_int_equal(autoep_release(h, &view), 0);
        autoep_close(h);
}

static void tensors_are_found_in_views(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view layer = AUTOEP_VIEW_INIT;
        struct autoep_view embed = AUTOEP_VIEW_INIT;
        const uint8_t *base;
        autoep *h = job_join(d);

        fake_publish(d, JOB_UNIT_LAYER, 0);
        fake_publish(d, JOB_UNIT_EMBED, 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 0, &layer), 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_EMBED, 0, &embed), 0);
        base = layer.data;
        /* fp32 before bf16 among the trainable, then the frozen one, then the buffer */
        assert_ptr_equal(autoep_view_tensor(h, &layer, JOB_NORM), base);
        assert_ptr_equal(autoep_view_tensor(h, &layer, JOB_W), base + 256);
        assert_ptr_equal(autoep_view_tensor(h, &layer, JOB_W2), base + 256 + 2048);
        assert_ptr_equal(autoep_view_tensor(h, &layer, JOB_FROZEN), base + 256 + 2048 + 256);
        assert_ptr_equal(autoep_view_tensor(h, &layer, JOB_BIAS), base + 256 + 2048 + 512);
        assert_null(autoep_view_tensor(h, &layer, JOB_EXPERT));
        assert_null(autoep_view_tensor(h, &layer, JOB_TIED)); /* its storage is in embed */
        assert_ptr_equal(autoep_view_tensor(h, &embed, JOB_TIED), embed.data);
        assert_null(autoep_view_tensor(h, &embed, JOB_W));
        assert_null(autoep_view_tensor(h, &embed, 1000));
        assert_int_equal(autoep_release(h, &layer), 0);
        assert_int_equal(autoep_release(h, &embed), 0);
        autoep_close(h);
}

static void a_unit_of_aliases_has_an_empty_view(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        autoep *h = job_join(d);

        assert_int_equal(autoep_gather(h, JOB_UNIT_HEAD, 0, &view), 0);
        assert_int_equal(view.len, 0);
        assert_null(autoep_view_tensor(h, &view, JOB_HEAD));
        assert_int_equal(autoep_release(h, &view), 0);
        assert_int_equal(autoep_release(h, &view), AUTOEP_EINVAL);
        autoep_close(h);
}

/* ---- misses ----------------------------------------------------------------------------- */

static void a_miss_is_answered_and_unpinned(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        struct autoep_stats stats = { .size = sizeof(stats) };
        autoep *h = job_join(d);

        fake_set_version(d, 5);
        fake_publish(d, JOB_UNIT_LAYER, 4); /* too old */
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 5000, &view), 0);
        assert_int_equal(view.version, 5);
        assert_true(job_view_is_right(&view, 0));
        fake_sync(d);
        assert_int_equal(d->unpins, 1);
        assert_int_equal(fake_n_holds(d), 1);
        assert_int_equal(autoep_release(h, &view), 0);
        assert_int_equal(fake_n_holds(d), 0);
        assert_int_equal(autoep_stats(h, &stats), 0);
        assert_int_equal(stats.gathers, 1);
        assert_int_equal(stats.gather_hits, 0);
        autoep_close(h);
}

static void many_misses_pass_through_the_queues(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        autoep *h = job_join(d);

        for (int i = 0; i < 3000; i++) { /* the rings wrap */
                assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 5000, &view), 0);
                assert_int_equal(autoep_release(h, &view), 0);
        }
        fake_sync(d);
        assert_int_equal(d->unpins, 3000);
        autoep_close(h);
}

static void a_poll_hints_and_returns(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        autoep *h = job_join(d);

        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 0, &view), AUTOEP_ETIMEDOUT);
        job_assert_error_names("layer");
        fake_sync(d);
        assert_int_equal(d->workers[0].n_log, 1);
        assert_int_equal(d->workers[0].log[0].op, AE_SQ_PREFETCH);
        assert_int_equal(d->workers[0].log[0].unit, JOB_UNIT_LAYER);
        autoep_close(h);
}

static void a_late_answer_is_unpinned(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        autoep *h = job_join(d);
        uint64_t start = job_now_ms();

        fake_set_version(d, 2);
        fake_set_holds(d, FAKE_HOLD_GATHER);
        ae_local_text_set(&d->workers[0].page->why, "node 3 owns a slice and is silent");
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 60, &view), AUTOEP_ETIMEDOUT);
        job_assert_took(job_now_ms() - start, 60);
        job_assert_error_names("'layer' (1) at version 2 in round 1");
        job_assert_error_names("60 ms");
        job_assert_error_names("node 3 owns a slice and is silent");
        assert_null(view.data);
        fake_set_holds(d, 0);
        fake_sync(d);
        assert_int_equal(autoep_gather(h, JOB_UNIT_EMBED, 5000, &view), 0);
        assert_int_equal(autoep_release(h, &view), 0);
        fake_sync(d);
        assert_int_equal(d->n_gathers, 2);
        assert_int_equal(d->unpins, 2);
        autoep_close(h);
}

static void ranges_come_alone(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        autoep *h = job_join(d);

        /* rows 100 and 101 of [300, 4] bf16, through the alias */
        assert_int_equal(autoep_gather_range(h, JOB_TIED, 400, 8, 5000, &view), 0);
        assert_int_equal(view.len, 16);
        assert_int_equal(view.unit, JOB_UNIT_EMBED);
        assert_true(job_view_is_right(&view, 800));
        fake_sync(d);
        assert_int_equal(d->workers[0].log[0].op, AE_SQ_RANGE);
        assert_int_equal(d->workers[0].log[0].first, 800);
        assert_int_equal(d->workers[0].log[0].n, 16);
        assert_int_equal(autoep_release(h, &view), 0);
        fake_publish(d, JOB_UNIT_LAYER, 0);
        assert_int_equal(autoep_gather_range(h, JOB_W2, 1, 2, 0, &view), 0); /* part of a hit */
        assert_true(job_view_is_right(&view, 256 + 2048 + 2));
        assert_int_equal(view.len, 4);
        assert_int_equal(autoep_release(h, &view), 0);
        assert_int_equal(fake_n_holds(d), 0);
        assert_int_equal(autoep_gather_range(h, JOB_W2, 1, 3, 0, &view), AUTOEP_EINVAL);
        assert_int_equal(autoep_gather_range(h, JOB_W2, UINT64_MAX, 2, 0, &view), AUTOEP_EINVAL);
        assert_int_equal(autoep_gather_range(h, JOB_W2, 0, 0, 0, &view), AUTOEP_EINVAL);
        assert_int_equal(autoep_gather_range(h, JOB_EXPERT, 0, 1, 0, &view), AUTOEP_EINVAL);
        assert_int_equal(autoep_gather_range(h, 99, 0, 1, 0, &view), AUTOEP_ENOENT);
        autoep_close(h);
}

static void wrong_arguments_take_nothing(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        uint32_t units[2] = { JOB_UNIT_EMBED, 77 };
        autoep *h = job_join(d);

        assert_int_equal(autoep_gather(h, 77, 0, &view), AUTOEP_ENOENT);
        assert_int_equal(autoep_gather(h, 0, -2, &view), AUTOEP_EINVAL);
        assert_int_equal(autoep_gather(h, 0, 0, NULL), AUTOEP_EINVAL);
        view.size = 3;
        assert_int_equal(autoep_gather(h, 0, 0, &view), AUTOEP_EINVAL);
        assert_int_equal(autoep_prefetch(h, units, 2), AUTOEP_ENOENT);
        assert_int_equal(posted(d), 0);
        assert_int_equal(autoep_prefetch(h, units, 1), 0);
        assert_int_equal(posted(d), 1);
        autoep_close(h);
}

/* ---- holds ------------------------------------------------------------------------------ */

static void releasing_twice_is_caught(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        struct autoep_view copy;
        autoep *h = job_join(d);

        assert_int_equal(autoep_release(h, &view), AUTOEP_EINVAL); /* never gathered */
        fake_publish(d, JOB_UNIT_LAYER, 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 0, &view), 0);
        copy = view;
        assert_int_equal(autoep_release(h, &view), 0);
        assert_null(view.data);
        assert_int_equal(autoep_release(h, &view), AUTOEP_EINVAL);
        assert_int_equal(autoep_release(h, &copy), AUTOEP_EINVAL);
        copy.slot = 5000;
        assert_int_equal(autoep_release(h, &copy), AUTOEP_EINVAL);
        assert_int_equal(fake_n_holds(d), 0);
        autoep_close(h);
}

static void the_allowance_counts_slots_once(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view views[3] = { AUTOEP_VIEW_INIT, AUTOEP_VIEW_INIT, AUTOEP_VIEW_INIT };
        uint64_t layer_len;
        autoep *h;

        d->config.hold_len = 3400; /* layer has 3072 bytes, embed 2560 */
        h = job_join(d);
        layer_len = d->layout->units[JOB_UNIT_LAYER].len;
        assert_int_equal(layer_len, 3072);
        fake_publish(d, JOB_UNIT_LAYER, 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 0, &views[0]), 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 0, &views[1]), 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_EMBED, 5000, &views[2]), AUTOEP_EBUDGET);
        job_assert_error_names("3400");
        job_assert_error_names("'embed'");
        fake_publish(d, JOB_UNIT_EMBED, 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_EMBED, 0, &views[2]), AUTOEP_EBUDGET);
        assert_int_equal(posted(d), 0);
        assert_int_equal(fake_n_holds(d), 2);
        /* rows fit where the unit does not */
        assert_int_equal(autoep_gather_range(h, JOB_EMBED, 0, 8, 5000, &views[2]), 0);
        assert_int_equal(autoep_release(h, &views[2]), 0);
        assert_int_equal(autoep_release(h, &views[0]), 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_EMBED, 0, &views[2]), AUTOEP_EBUDGET);
        assert_int_equal(autoep_release(h, &views[1]), 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_EMBED, 0, &views[2]), 0);
        assert_int_equal(autoep_release(h, &views[2]), 0);
        assert_int_equal(fake_n_holds(d), 0);
        autoep_close(h);
}

/* The daemon looks for holds behind a withdrawn entry, and publishes it again when there are. */
static void what_is_held_may_be_asked_for(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view views[2] = { AUTOEP_VIEW_INIT, AUTOEP_VIEW_INIT };
        autoep *h;

        d->config.hold_len = 3400;
        h = job_join(d);
        fake_publish(d, JOB_UNIT_LAYER, 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 0, &views[0]), 0);
        assert_false(fake_withdraw(d, JOB_UNIT_LAYER)); /* it is held */
        assert_int_equal(autoep_gather(h, JOB_UNIT_EMBED, 5000, &views[1]), AUTOEP_EBUDGET);
        assert_int_equal(posted(d), 0);
        /* asked, and only then refused: this answer comes from another slot */
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 5000, &views[1]), AUTOEP_EBUDGET);
        fake_sync(d);
        assert_int_equal(d->n_gathers, 1);
        assert_int_equal(autoep_release(h, &views[0]), 0);
        autoep_close(h);
}

static void a_step_names_the_views_held(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        struct autoep_step step = job_step();
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        autoep *h = job_join(d);

        fake_publish(d, JOB_UNIT_LAYER, 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 0, &view), 0);
        assert_int_equal(autoep_step(h, &step, 5000, &verdict), AUTOEP_EHELD);
        job_assert_error_names("'layer' (1)");
        assert_int_equal(autoep_release(h, &view), 0);
        assert_int_equal(autoep_step(h, &step, 5000, &verdict), 0);
        autoep_close(h);
}

/* ---- untruths --------------------------------------------------------------------------- */

static void lies_in_answers_are_found(void **state)
{
        static const struct {
                enum fake_lie lie;
                int status;
        } lies[] = {
                { FAKE_CQE_TOKEN, AUTOEP_EPROTO }, { FAKE_CQE_SLOT, AUTOEP_EPROTO },
                { FAKE_CQE_OFF, AUTOEP_EPROTO }, { FAKE_CQE_STATUS, AUTOEP_EBUDGET },
        };

        (void)state;
        for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
                struct fake_daemon *d = fake_daemon_start(
                        &(struct fake_config){ .lie = lies[i].lie });
                struct autoep_view view = AUTOEP_VIEW_INIT;
                autoep *h = job_join(d);

                assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 5000, &view), lies[i].status);
                if (lies[i].status == AUTOEP_EBUDGET)
                        job_assert_error_names("the cache of node 0 is full");
                assert_int_equal(fake_n_holds(d), 0);
                autoep_close(h);
                fake_daemon_stop(d);
        }
}

static void impossible_words_are_found(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        autoep *h = job_join(d);

        fake_set_holds(d, FAKE_HOLD_ALL);
        atomic_store(&d->workers[0].page->sq_head, 77);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 1000, &view), AUTOEP_EPROTO);
        atomic_store(&d->workers[0].page->sq_head, 0);
        atomic_store(&d->units[JOB_UNIT_LAYER], ae_local_entry(0, 64));
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 1000, &view), AUTOEP_EPROTO);
        job_assert_error_names("slot 64");
        autoep_close(h);
}

static void a_completion_queue_too_long_is_found(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        autoep *h = job_join(d);

        fake_set_holds(d, FAKE_HOLD_ALL);
        atomic_store(&d->workers[0].page->cq_tail, AE_LOCAL_CQ_LEN + 1);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 1000, &view), AUTOEP_EPROTO);
        autoep_close(h);
}

/* ---- time and threads ------------------------------------------------------------------- */

/* How long it took; 0 when it didn't end for want of time. */
static uint64_t *gather_in_vain(autoep *h, int timeout_ms)
{
        struct autoep_view view = AUTOEP_VIEW_INIT;
        uint64_t *took = malloc(sizeof(*took));
        uint64_t start = job_now_ms();
        int r = autoep_gather(h, JOB_UNIT_EMBED, timeout_ms, &view);

        *took = r == AUTOEP_ETIMEDOUT ? job_now_ms() - start : 0;
        return took;
}

static void *gather_40_ms(void *arg)
{
        return gather_in_vain(arg, 40);
}

static void *gather_500_ms(void *arg)
{
        return gather_in_vain(arg, 500);
}

/* Whoever leads has another deadline than those who follow. */
static void followers_keep_their_own_deadlines(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        autoep *h = job_join(d);
        pthread_t threads[3];
        uint64_t start = job_now_ms();

        fake_set_holds(d, FAKE_HOLD_GATHER);
        for (int i = 0; i < 3; i++)
                assert_int_equal(pthread_create(&threads[i], NULL, gather_40_ms, h), 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 100, &view), AUTOEP_ETIMEDOUT);
        job_assert_took(job_now_ms() - start, 100);
        for (int i = 0; i < 3; i++) {
                void *took;

                pthread_join(threads[i], &took);
                job_assert_took(*(uint64_t *)took, 40);
                free(took);
        }
        autoep_close(h);
}

static void a_pause_extends_deadlines(void **state)
{
        struct fake_daemon *d = *state;
        pthread_t thread;
        void *took;
        autoep *h = job_join(d);
        uint32_t tail = atomic_load(&d->workers[0].page->sq_tail);

        fake_grow_pause(d, 5000000000); /* over before the wait: no matter */
        fake_set_holds(d, FAKE_HOLD_GATHER);
        assert_int_equal(pthread_create(&thread, NULL, gather_500_ms, h), 0);
        while (atomic_load(&d->workers[0].page->sq_tail) == tail)
                sched_yield(); /* it has asked, so its deadline is set */
        fake_grow_pause(d, 50000000);
        pthread_join(thread, &took);
        job_assert_took(*(uint64_t *)took, 550);
        free(took);
        autoep_close(h);
}

/* Who begins to wait while a rank pauses has what is left of the pause, and a poll hasn't. */
static void a_pause_under_way_extends_deadlines(void **state)
{
        struct fake_daemon *d = *state;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        autoep *h = job_join(d);
        uint64_t start;

        fake_set_holds(d, FAKE_HOLD_GATHER);
        fake_begin_pause(d, 150000000);
        start = job_now_ms();
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 0, &view), AUTOEP_ETIMEDOUT);
        assert_in_range(job_now_ms() - start, 0, 100);
        start = job_now_ms();
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 50, &view), AUTOEP_ETIMEDOUT);
        job_assert_took(job_now_ms() - start, 200);
        autoep_close(h);
}

struct hammer {
        autoep *h;
        _Atomic bool stop;
        _Atomic uint64_t n, n_hits_wrong, n_failed;
};

/* A few bytes, a few times: long enough for a daemon that overwrites them, short enough that many
 * gathers begin while one does. */
static bool looks_right(const struct autoep_view *view)
{
        const volatile uint8_t *bytes = view->data;
        bool right = true;

        for (int pass = 0; pass < 8; pass++) {
                for (uint64_t i = 0; i < view->len; i += 97)
                        right &= bytes[i] == fake_byte(view->unit, view->version, i);
        }
        return right;
}

static void *hammer(void *arg)
{
        struct hammer *hammer = arg;

        while (!atomic_load_explicit(&hammer->stop, memory_order_relaxed)) {
                struct autoep_view view = AUTOEP_VIEW_INIT;

                if (autoep_gather(hammer->h, JOB_UNIT_LAYER, 5000, &view) < 0) {
                        atomic_fetch_add(&hammer->n_failed, 1);
                        break;
                }
                if (!looks_right(&view))
                        atomic_fetch_add(&hammer->n_hits_wrong, 1);
                if (autoep_release(hammer->h, &view) < 0)
                        atomic_fetch_add(&hammer->n_failed, 1);
                atomic_fetch_add_explicit(&hammer->n, 1, memory_order_relaxed);
        }
        return NULL;
}

/* The daemon overwrites a slot as soon as it has published another one, or withdrawn it, and sees
 * no hold. The version changes seldom, so that most gathers hit. */
static void no_view_is_ever_torn(void **state)
{
        struct fake_daemon *d = *state;
        struct hammer job = { .h = job_join(d) };
        pthread_t threads[3];
        uint64_t end = job_now_ms() + 300;

        for (int i = 0; i < 3; i++)
                assert_int_equal(pthread_create(&threads[i], NULL, hammer, &job), 0);
        for (uint64_t i = 0; job_now_ms() < end; i++) {
                if (i % 1000 == 0)
                        fake_set_version(d, i / 1000);
                if (i % 1000 == 500)
                        (void)fake_withdraw(d, JOB_UNIT_LAYER);
                fake_publish(d, JOB_UNIT_LAYER, i / 1000);
        }
        atomic_store(&job.stop, true);
        for (int i = 0; i < 3; i++)
                pthread_join(threads[i], NULL);
        assert_int_equal(job.n_failed, 0);
        assert_int_equal(job.n_hits_wrong, 0);
        assert_in_range(job.n, 20, UINT64_MAX);
        assert_int_equal(fake_n_holds(d), 0);
        fake_sync(d);
        assert_int_equal(d->unpins, d->n_gathers);
        autoep_close(job.h);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
        const struct CMUnitTest tests[] = {
                TEST(a_hit_sends_nothing),
                TEST(any_version_is_every_version),
                TEST(tensors_are_found_in_views),
                TEST(a_unit_of_aliases_has_an_empty_view),
                TEST(a_miss_is_answered_and_unpinned),
                TEST(many_misses_pass_through_the_queues),
                TEST(a_poll_hints_and_returns),
                TEST(a_late_answer_is_unpinned),
                TEST(ranges_come_alone),
                TEST(wrong_arguments_take_nothing),
                TEST(releasing_twice_is_caught),
                TEST(the_allowance_counts_slots_once),
                TEST(what_is_held_may_be_asked_for),
                TEST(a_step_names_the_views_held),
                cmocka_unit_test(lies_in_answers_are_found),
                TEST(impossible_words_are_found),
                TEST(a_completion_queue_too_long_is_found),
                TEST(followers_keep_their_own_deadlines),
                TEST(a_pause_extends_deadlines),
                TEST(a_pause_under_way_extends_deadlines),
                TEST(no_view_is_ever_torn),
        };

        return cmocka_run_group_tests_name("client-gather", tests, NULL, NULL);
}
