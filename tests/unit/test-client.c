/* SPDX-License-Identifier: Apache-2.0 */
/* libautoep's handles: opening, registering, untruthful daemons, deaths, forks, lookups. */
#include "tests/lib/client-job.h"
#include "tests/lib/test.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static int try_open(const struct autoep_options *options)
{
        autoep *h = NULL;
        int r = autoep_open(options, &h);

        assert_true((r == 0) == (h != NULL));
        autoep_close(h);
        return r;
}

static void clear_launchers(void)
{
        static const char *const names[] = {
                "AUTOEP_RANK", "AUTOEP_WORLD", "AUTOEP_SOCKET", "AUTOEP_JOB", "AUTOEP_TOKEN",
                                            "RANK",
                "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "PMIX_RANK", "PMIX_SIZE",
        };

        for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
                unsetenv(names[i]);
}

/* ---- opening ---------------------------------------------------------------------------- */

static void rank_comes_from_the_launcher(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 3 });
        struct autoep_options options = job_options(d, -1);
        struct autoep_info info = { .size = sizeof(info) };
        autoep *h;

        (void)state;
        clear_launchers();
        options.reader = 0;
        options.world = -1;
        assert_int_equal(try_open(&options), AUTOEP_EINVAL);
        job_assert_error_names("AUTOEP_RANK");
        setenv("SLURM_PROCID", "2", 1);
        setenv("SLURM_NTASKS", "3", 1);
        assert_int_equal(autoep_open(&options, &h), 0);
        assert_int_equal(autoep_info(h, &info), 0);
        assert_int_equal(info.rank, 2);
        assert_int_equal(info.world, 3);
        autoep_close(h);
        setenv("RANK", "1", 1); /* alone it says nothing */
        assert_int_equal(autoep_open(&options, &h), 0);
        assert_int_equal(autoep_info(h, &info), 0);
        assert_int_equal(info.rank, 2);
        autoep_close(h);
        setenv("WORLD_SIZE", "three", 1);
        assert_int_equal(try_open(&options), AUTOEP_EINVAL);
        job_assert_error_names("WORLD_SIZE");
        clear_launchers();
        fake_daemon_stop(d);
}

static void wrong_options_are_refused(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
        struct autoep_options options = job_options(d, 1);
        char long_path[200];

        (void)state;
        assert_int_equal(try_open(&options), AUTOEP_EINVAL); /* rank 1 of 1 */
        options.rank = 0;
        options.size--;
        assert_int_equal(try_open(&options), AUTOEP_EINVAL);
        job_assert_error_names("autoep_options");
        options.size++;
        options.ring_len = 4096;
        assert_int_equal(try_open(&options), AUTOEP_EINVAL);
        options.ring_len = 0;
        options.timeout_ms = -5;
        assert_int_equal(try_open(&options), AUTOEP_EINVAL);
        options.timeout_ms = 1000;
        options.job = NULL;
        assert_int_equal(try_open(&options), AUTOEP_EINVAL);
        job_assert_error_names("AUTOEP_JOB");
        options.job = "test";
        memset(long_path, 'x', sizeof(long_path) - 1);
        long_path[sizeof(long_path) - 1] = '\0';
        options.socket = long_path;
        assert_int_equal(try_open(&options), AUTOEP_EINVAL);
        fake_daemon_stop(d);
}

/* A socket of @type at @path, as another program has one. */
static int listen_at(const char *path, int type)
{
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);

        assert_true(fd >= 0);
        assert_true(strlen(path) < sizeof(address.sun_path));
        strcpy(address.sun_path, path);
        assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
        assert_int_equal(listen(fd, 1), 0);
        return fd;
}

static void a_missing_daemon_is_named(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
        struct autoep_options options = job_options(d, 0);
        char path[160];
        int fd;

        (void)state;
        snprintf(path, sizeof(path), "%s/none", d->dir);
        options.socket = path;
        assert_int_equal(try_open(&options), AUTOEP_ENOENT);
        job_assert_error_names(path);
        fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
        assert_true(fd >= 0);
        close(fd);
        assert_int_equal(try_open(&options), AUTOEP_ENOENT);
        job_assert_error_names("not a socket");
        options.socket = d->dir;
        assert_int_equal(try_open(&options), AUTOEP_ENOENT);
        job_assert_error_names("not a socket");
        options.socket = path;
        unlink(path);
        fd = listen_at(path, SOCK_SEQPACKET);
        assert_int_equal(try_open(&options), AUTOEP_ENOENT);
        job_assert_error_names("not autoepd's socket for workers");
        close(fd);
        unlink(path);
        fake_daemon_stop(d);
}

/* Connects until the queue of a socket that nobody accepts from is full. */
static void a_deaf_socket_ends_at_the_deadline(void **state)
{
        struct sockaddr_un address = { .sun_family = AF_UNIX,
                                       .sun_path = "/tmp/autoep-deaf-XXXXXX" };
        struct autoep_options options = AUTOEP_OPTIONS_INIT;
        int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        int full = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        uint64_t start;

        (void)state;
        close(mkstemp(address.sun_path));
        unlink(address.sun_path);
        assert_int_equal(bind(listener, (struct sockaddr *)&address, sizeof(address)), 0);
        assert_int_equal(listen(listener, 0), 0);
        assert_int_equal(connect(full, (struct sockaddr *)&address, sizeof(address)), 0);
        options.socket = address.sun_path;
        options.job = "test";
        options.rank = 0;
        options.world = 1;
        options.timeout_ms = 60;
        start = job_now_ms();
        assert_int_equal(try_open(&options), AUTOEP_ETIMEDOUT);
        job_assert_took(job_now_ms() - start, 60);
        close(full);
        close(listener);
        unlink(address.sun_path);
}

static void a_mute_daemon_ends_at_the_deadline(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .lie = FAKE_HELLO_MUTE });
        struct autoep_options options = job_options(d, 0);
        uint64_t start = job_now_ms();

        (void)state;
        options.timeout_ms = 60;
        assert_int_equal(try_open(&options), AUTOEP_ETIMEDOUT);
        job_assert_took(job_now_ms() - start, 60);
        job_assert_error_names("autoep_open: ");
        job_assert_error_names("rank 0");
        fake_daemon_stop(d);
}

static void a_wrong_token_passes_through(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .token = "secret" });
        struct autoep_options options = job_options(d, 0);

        (void)state;
        options.token = "guess";
        assert_int_equal(try_open(&options), AUTOEP_EAUTH);
        job_assert_error_names("the token of job 'test' is another one");
        options.token = "secret";
        assert_int_equal(try_open(&options), 0);
        fake_daemon_stop(d);
}

/* ---- registering ------------------------------------------------------------------------ */

static void names_have_ids(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
        struct autoep_info info = { .size = sizeof(info) };
        struct autoep_stats stats = { .size = sizeof(stats) };
        autoep *h = job_join(d);

        (void)state;
        assert_int_equal(autoep_unit(h, "big"), JOB_UNIT_BIG);
        assert_int_equal(autoep_tensor(h, "layer.tied"), JOB_TIED);
        assert_int_equal(autoep_unit(h, "nope"), AUTOEP_NONE);
        assert_int_equal(autoep_tensor(h, "nope"), AUTOEP_NONE);
        assert_int_equal(autoep_info(h, &info), 0);
        assert_int_equal(info.n_units, JOB_N_UNITS);
        assert_int_equal(info.n_tensors, JOB_N_TENSORS);
        assert_int_equal(info.round, 1);
        assert_int_equal(info.ep_size, 1);
        assert_string_equal(info.transport, "none");
        assert_int_equal(autoep_stats(h, &stats), 0);
        assert_int_equal(stats.gathers, 0);
        stats.size = 8;
        assert_int_equal(autoep_stats(h, &stats), AUTOEP_EINVAL);
        autoep_close(h);
        fake_daemon_stop(d);
}

static void calls_before_registration_say_so(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
        struct autoep_view view = AUTOEP_VIEW_INIT;
        struct job_model m;
        autoep *h = job_open(d, 0);

        (void)state;
        job_model_fill(&m);
        assert_int_equal(autoep_gather(h, 0, 0, &view), AUTOEP_ESTATE);
        assert_int_equal(autoep_unit(h, "embed"), AUTOEP_NONE);
        assert_int_equal(autoep_register(h, NULL, 100), AUTOEP_EINVAL);
        m.model.tp_size = 2;
        assert_int_equal(autoep_register(h, &m.model, 100), AUTOEP_EUNSUPPORTED);
        m.model.tp_size = 0;
        m.model.ep_size = 5;
        assert_int_equal(autoep_register(h, &m.model, 100), AUTOEP_EINVAL);
        m.model.ep_size = 0;
        m.tensors[JOB_W].name = "embed.weight";
        assert_int_equal(autoep_register(h, &m.model, 100), AUTOEP_EINVAL);
        job_assert_error_names("embed.weight");
        m.tensors[JOB_W].name = "layer.w";
        m.tensors[JOB_W].init = "";
        assert_int_equal(autoep_register(h, &m.model, 100), AUTOEP_EINVAL); /* not all */
        m.tensors[JOB_W].init = NULL;
        assert_int_equal(autoep_register(h, &m.model, 1000), 0); /* nothing of that was sent */
        assert_int_equal(autoep_register(h, &m.model, 1000), AUTOEP_ESTATE);
        autoep_close(h);
        fake_daemon_stop(d);
}

static void initial_values_travel_in_order(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
        static const float a[3] = { 1, 2, 3 };
        static const uint16_t b[2] = { 0x3f80, 0x4000 };
        struct autoep_tensor t[] = {
                { .size = sizeof(t[0]), .name = "a", .unit = "u", .dtype = AUTOEP_BF16, .n_dims = 1,
                  .tensor_class = AUTOEP_DENSE, .dims = { 3 }, .init = a },
                { .size = sizeof(t[0]), .name = "e", .unit = "u", .dtype = AUTOEP_BF16, .n_dims = 1,
                  .tensor_class = AUTOEP_EXPERT, .dims = { 3 } },
                { .size = sizeof(t[0]), .name = "b", .unit = "v", .dtype = AUTOEP_BF16, .n_dims = 1,
                  .tensor_class = AUTOEP_DENSE, .dims = { 2 }, .init = b, .flags = AUTOEP_FROZEN },
                { .size = sizeof(t[0]), .name = "c", .unit = "v", .dtype = AUTOEP_BF16, .n_dims = 1,
                  .tensor_class = AUTOEP_DENSE, .dims = { 3 }, .alias_of = "a" },
        };
        struct autoep_model model = { .size = sizeof(model), .tensors = t, .n_tensors = 4,
                                      .init = AUTOEP_INIT_ALL_EQUAL };
        autoep *h = job_open(d, 0);

        (void)state;
        assert_int_equal(autoep_register(h, &model, 5000), 0);
        assert_int_equal(d->init_len, sizeof(a) + sizeof(b));
        assert_memory_equal(d->init, a, sizeof(a));
        assert_memory_equal(d->init + sizeof(a), b, sizeof(b));
        assert_int_equal(d->model->message->n_init_digest, 4);
        assert_int_not_equal(d->model->message->init_digest[0], d->model->message->init_digest[2]);
        autoep_close(h);
        fake_daemon_stop(d);
}

/* To be equal they need digests; nobody reads as many copies as there are ranks. */
static void only_rank_0_sends_initial_values(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 2 });
        static const float a[3] = { 1, 2, 3 };
        const struct autoep_tensor t = { .size = sizeof(t), .name = "a", .unit = "u",
                                         .dtype = AUTOEP_BF16, .tensor_class = AUTOEP_DENSE,
                                         .n_dims = 1, .dims = { 3 }, .init = a };
        const struct autoep_model model = { .size = sizeof(model), .tensors = &t, .n_tensors = 1,
                                            .init = AUTOEP_INIT_ALL_EQUAL };
        struct autoep_options options = job_options(d, 1);
        autoep *h = NULL;

        (void)state;
        options.world = 2;
        assert_int_equal(autoep_open(&options, &h), 0);
        /* the fake daemon looks at what comes; rank 0 never does */
        assert_int_equal(autoep_register(h, &model, 100), AUTOEP_ETIMEDOUT);
        autoep_close(h);
        fake_daemon_stop(d);
}

static void a_refused_registration_passes_through(void **state)
{
        struct fake_daemon *d = fake_daemon_start(
                &(struct fake_config){ .register_status = AUTOEP_EMISMATCH });
        struct job_model m;
        autoep *h = job_open(d, 0);

        (void)state;
        job_model_fill(&m);
        assert_int_equal(autoep_register(h, &m.model, 5000), AUTOEP_EMISMATCH);
        assert_string_equal(autoep_last_error(), "autoep_register: ranks 1, 3 are missing");
        autoep_close(h);
        fake_daemon_stop(d);
}

static void a_late_registration_ends_at_the_deadline(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
        struct job_model m;
        autoep *h = job_open(d, 0);
        uint64_t start = job_now_ms();

        (void)state;
        job_model_fill(&m);
        ae_local_text_set(&d->workers[0].page->why, "rank 3 has not come yet");
        fake_set_holds(d, FAKE_HOLD_REGISTER);
        assert_int_equal(autoep_register(h, &m.model, 60), AUTOEP_ETIMEDOUT);
        job_assert_took(job_now_ms() - start, 60);
        job_assert_error_names("rank 3 has not come yet");
        assert_int_equal(autoep_register(h, &m.model, 60), AUTOEP_ESTATE);
        autoep_close(h);
        fake_daemon_stop(d);
}

static void a_reader_only_reads(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
        struct autoep_view view = AUTOEP_VIEW_INIT;
        struct autoep_step step = job_step();
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        autoep *h = job_join(d);
        autoep *reader = job_open(d, -1);
        struct job_model m;

        (void)state;
        job_model_fill(&m);
        assert_int_equal(autoep_register(reader, &m.model, 5000), AUTOEP_EINVAL);
        assert_int_equal(autoep_register(reader, NULL, 5000), 0);
        fake_publish(d, JOB_UNIT_LAYER, 0);
        assert_int_equal(autoep_gather(reader, JOB_UNIT_LAYER, 0, &view), 0);
        assert_int_equal(autoep_release(reader, &view), 0);
        assert_int_equal(autoep_step(reader, &step, 100, &verdict), AUTOEP_ESTATE);
        assert_int_equal(autoep_scatter(reader, 0, NULL, 0, 0, 0), AUTOEP_ESTATE);
        assert_int_equal(autoep_leave(reader, 1000), 0);
        autoep_close(reader);
        autoep_close(h);
        fake_daemon_stop(d);
}

/* ---- untruths --------------------------------------------------------------------------- */

static void lies_at_hello_are_found(void **state)
{
        static const enum fake_lie lies[] = {
                FAKE_HELLO_NO_FDS, FAKE_HELLO_FRAME_HUGE, FAKE_HELLO_JUNK, FAKE_HELLO_NODE,
                FAKE_PAGE_MAGIC, FAKE_PAGE_SHORT, FAKE_PAGE_UNSEALED, FAKE_GRAD_SHORT,
        };

        (void)state;
        for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
                struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .lie = lies[i] });
                struct autoep_options options = job_options(d, 0);
                int r = try_open(&options);

                if (r != AUTOEP_EPROTO)
                        fail_msg("lie %d gives %d: %s", (int)lies[i], r, autoep_last_error());
                fake_daemon_stop(d);
        }
}

static void another_version_is_refused(void **state)
{
        struct fake_daemon *d = fake_daemon_start(
                &(struct fake_config){ .lie = FAKE_HELLO_VERSION });
        struct autoep_options options = job_options(d, 0);

        (void)state;
        assert_int_equal(try_open(&options), AUTOEP_EVERSION);
        fake_daemon_stop(d);
}

static void lies_at_registration_are_found(void **state)
{
        static const enum fake_lie lies[] = {
                FAKE_REGISTERED_NO_MODEL, FAKE_REGISTERED_RANK, FAKE_PARAMS_MAGIC,
                                             FAKE_PARAMS_UNITS,
                FAKE_PARAMS_OFF, FAKE_PARAMS_SLOTS, FAKE_XIN_SLOTS,
        };
        struct job_model m;

        (void)state;
        job_model_fill(&m);
        m.model.n_tensors = JOB_BIG; /* a small cache, so that wrong offsets lie outside */
        for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
                struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .lie = lies[i] });
                struct autoep_view view = AUTOEP_VIEW_INIT;
                autoep *h = job_open(d, 0);
                int r = autoep_register(h, &m.model, 5000);

                if (r != AUTOEP_EPROTO)
                        fail_msg("lie %d gives %d: %s", (int)lies[i], r, autoep_last_error());
                assert_int_equal(autoep_gather(h, 0, 1000, &view), AUTOEP_EPROTO);
                autoep_close(h);
                fake_daemon_stop(d);
        }
}

static void stray_frames_break_the_handle(void **state)
{
        static const struct ae_control_frame stray = { .len = 0, .type = AE_CONTROL_REGISTERED };
        static const struct ae_control_frame alien = { .len = 0, .type = 999 };
        const struct ae_control_frame *const frames[] = { &stray, &alien };

        (void)state;
        for (size_t i = 0; i < 2; i++) {
                struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
                autoep *h = job_join(d);
                float value;

                fake_send_raw(d, frames[i], sizeof(*frames[i]));
                fake_set_holds(d, FAKE_HOLD_STATE);
                assert_int_equal(autoep_get(h, JOB_W, AUTOEP_MASTER, 0, 1, &value, 5000),
                                 AUTOEP_EPROTO);
                assert_int_equal(autoep_get(h, JOB_W, AUTOEP_MASTER, 0, 1, &value, 5000),
                                 AUTOEP_EPROTO);
                autoep_close(h);
                fake_daemon_stop(d);
        }
}

/* ---- deaths and forks ------------------------------------------------------------------- */

struct waiter {
        pthread_t thread;
        autoep *h;
        int (*call)(autoep *h);
        int r;
        char text[512];
};

static int call_gather(autoep *h)
{
        struct autoep_view view = AUTOEP_VIEW_INIT;

        return autoep_gather(h, JOB_UNIT_EMBED, 20000, &view);
}

static int call_range(autoep *h)
{
        struct autoep_view view = AUTOEP_VIEW_INIT;

        return autoep_gather_range(h, JOB_BIG, 5, 10, 20000, &view);
}

static int call_step(autoep *h)
{
        struct autoep_step step = job_step();
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;

        return autoep_step(h, &step, 20000, &verdict);
}

static int call_get(autoep *h)
{
        float value;

        return autoep_get(h, JOB_W, AUTOEP_MASTER, 0, 1, &value, 20000);
}

static void *run_waiter(void *arg)
{
        struct waiter *w = arg;

        w->r = w->call(w->h);
        snprintf(w->text, sizeof(w->text), "%s", autoep_last_error());
        return NULL;
}

/* Starts a thread in each kind of waiting call and gives them a moment to wait. */
static void start_waiters(struct waiter *waiters, size_t n, autoep *h)
{
        static int (*const calls[])(autoep *) = { call_gather, call_range, call_step, call_get };

        for (size_t i = 0; i < n; i++) {
                waiters[i] = (struct waiter){ .h = h, .call = calls[i % 4] };
                assert_int_equal(pthread_create(&waiters[i].thread, NULL, run_waiter, &waiters[i]),
                                 0);
        }
        usleep(30000); /* most should wait by now; those that don't find out when they begin */
}

static void a_death_ends_every_wait(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
        autoep *h = job_join(d);
        struct waiter waiters[4];
        uint64_t start;

        (void)state;
        fake_set_holds(d, FAKE_HOLD_ALL | FAKE_HOLD_STATE);
        start_waiters(waiters, 4, h);
        start = job_now_ms();
        fake_hang_up(d);
        for (size_t i = 0; i < 4; i++) {
                pthread_join(waiters[i].thread, NULL);
                assert_int_equal(waiters[i].r, AUTOEP_ELOST);
                assert_non_null(strstr(waiters[i].text, "node 0"));
                assert_non_null(strstr(waiters[i].text, "round 1"));
        }
        assert_in_range(job_now_ms() - start, 0, 500);
        assert_int_equal(call_gather(h), AUTOEP_ELOST);
        assert_int_equal(autoep_leave(h, 100), AUTOEP_ELOST);
        autoep_close(h);
        fake_daemon_stop(d);
}

static void a_failed_job_ends_every_wait(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
        autoep *h = job_join(d);
        struct waiter waiters[4];

        (void)state;
        fake_set_holds(d, FAKE_HOLD_ALL | FAKE_HOLD_STATE);
        start_waiters(waiters, 4, h);
        fake_fail_job(d, AUTOEP_EOVERFLOW, "rank 7 used up the overflow of node 2");
        for (size_t i = 0; i < 4; i++) {
                pthread_join(waiters[i].thread, NULL);
                assert_int_equal(waiters[i].r, AUTOEP_EOVERFLOW);
                assert_non_null(strstr(waiters[i].text, "rank 7 used up"));
        }
        autoep_close(h);
        fake_daemon_stop(d);
}

/* In the child: every call says that the handle is dead, and closing it is fine. */
static int look_at_dead_handle(autoep *h, struct autoep_view *held)
{
        struct autoep_view view = AUTOEP_VIEW_INIT;
        struct autoep_info info = { .size = sizeof(info) };
        struct autoep_options options = AUTOEP_OPTIONS_INIT;
        uint64_t len = 0;

        (void)options;
        if (autoep_gather(h, 0, 0, &view) != AUTOEP_EFORKED || call_step(h) != AUTOEP_EFORKED ||
            autoep_release(h, held) != AUTOEP_EFORKED || call_get(h) != AUTOEP_EFORKED ||
            autoep_scatter(h, 0, NULL, 0, 0, 0) != AUTOEP_EFORKED ||
            autoep_micro_batch_end(h) != AUTOEP_EFORKED || autoep_leave(h, 0) != AUTOEP_EFORKED ||
            autoep_pause(h, "x", 1) != AUTOEP_EFORKED || autoep_info(h, &info) != AUTOEP_EFORKED ||
            autoep_exchange(h, AUTOEP_GROUP_EP, NULL, &len, NULL, &len, 0) != AUTOEP_EFORKED ||
            autoep_register(h, NULL, 0) != AUTOEP_EFORKED || autoep_unit(h, "embed") != AUTOEP_NONE)
                return 1;
        autoep_close(h);
        return 0;
}

static void a_fork_kills_the_handle_in_the_child(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
        struct autoep_view view = AUTOEP_VIEW_INIT;
        autoep *h = job_join(d);
        int status;
        pid_t child;

        (void)state;
        fake_publish(d, JOB_UNIT_LAYER, 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 0, &view), 0);
        child = fork();
        if (child == 0)
                _exit(look_at_dead_handle(h, &view));
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        assert_true(job_view_is_right(&view, 0));
        assert_int_equal(autoep_release(h, &view), 0);
        assert_int_equal(fake_n_holds(d), 0);
        assert_int_equal(call_step(h), 0);
        autoep_close(h);
        fake_daemon_stop(d);
}

static void leaving_is_not_dying(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
        struct autoep_view view = AUTOEP_VIEW_INIT;
        autoep *h = job_join(d);

        (void)state;
        fake_publish(d, JOB_UNIT_LAYER, 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 0, &view), 0);
        assert_int_equal(autoep_leave(h, 1000), AUTOEP_EHELD);
        assert_int_equal(autoep_release(h, &view), 0);
        assert_int_equal(autoep_leave(h, 1000), 0);
        assert_int_equal(autoep_gather(h, JOB_UNIT_LAYER, 0, &view), AUTOEP_ECLOSED);
        assert_int_equal(autoep_leave(h, 1000), AUTOEP_ECLOSED);
        autoep_close(h);
        autoep_close(NULL);
        fake_daemon_stop(d);
}

static void errors_are_the_threads_own(void **state)
{
        (void)state;
        assert_string_equal(autoep_strerror(AUTOEP_EHELD), "views are still held");
        assert_non_null(autoep_strerror(4711));
        assert_int_equal(autoep_leave(NULL, 0), AUTOEP_EINVAL);
        assert_string_equal(autoep_last_error(), "autoep_leave: the handle is NULL");
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(rank_comes_from_the_launcher),
                cmocka_unit_test(wrong_options_are_refused),
                cmocka_unit_test(a_missing_daemon_is_named),
                cmocka_unit_test(a_deaf_socket_ends_at_the_deadline),
                cmocka_unit_test(a_mute_daemon_ends_at_the_deadline),
                cmocka_unit_test(a_wrong_token_passes_through),
                cmocka_unit_test(names_have_ids),
                cmocka_unit_test(calls_before_registration_say_so),
                cmocka_unit_test(initial_values_travel_in_order),
                cmocka_unit_test(only_rank_0_sends_initial_values),
                cmocka_unit_test(a_refused_registration_passes_through),
                cmocka_unit_test(a_late_registration_ends_at_the_deadline),
                cmocka_unit_test(a_reader_only_reads),
                cmocka_unit_test(lies_at_hello_are_found),
                cmocka_unit_test(another_version_is_refused),
                cmocka_unit_test(lies_at_registration_are_found),
                cmocka_unit_test(stray_frames_break_the_handle),
                cmocka_unit_test(a_death_ends_every_wait),
                cmocka_unit_test(a_failed_job_ends_every_wait),
                cmocka_unit_test(a_fork_kills_the_handle_in_the_child),
                cmocka_unit_test(leaving_is_not_dying),
                cmocka_unit_test(errors_are_the_threads_own),
        };

        return cmocka_run_group_tests_name("client", tests, NULL, NULL);
}
