/* SPDX-License-Identifier: Apache-2.0 */
/* Worker processes and jobs for stories, see story.h. */
#include "tests/integration/story.h"

#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "tests/lib/test.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define ANSWER_MS 20000

struct call {
        story_fn *fn;
        struct story_args args;
};

/* Between the test and its workers. */
struct shared {
        _Atomic bool stop;
        _Atomic uint64_t n_steps;
};

static struct shared *shared;

static void make_shared(void)
{
        if (shared)
                return;
        shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
                      0);
        assert_ptr_not_equal(shared, MAP_FAILED);
}

void story_until_stop(void)
{
        atomic_store(&shared->stop, true);
}

void story_until_reset(void)
{
        atomic_store(&shared->stop, false);
}

uint64_t story_until_count(void)
{
        return atomic_load(&shared->n_steps);
}

uint32_t story_thin(void)
{
        const char *given = getenv("STORY_THIN");
        unsigned long thin = given ? strtoul(given, NULL, 10) : 1;

        assert_in_range(thin, 1, 100);
        return (uint32_t)thin;
}

/* ---- in the worker ---------------------------------------------------------------------- */

int story_open(struct story_self *self, const struct story_args *args, struct story_result *result)
{
        struct autoep_options options = AUTOEP_OPTIONS_INIT;

        (void)args;
        (void)result;
        options.socket = self->bed->daemons[self->node].socket;
        options.job = self->job;
        options.token = self->token;
        options.rank = (int)self->rank;
        options.world = (int)self->world;
        options.reader = self->rank == AUTOEP_NONE;
        options.timeout_ms = self->timeout_ms;
        options.hold_len = self->hold_len;
        options.ring_len = self->ring_len;
        return autoep_open(&options, &self->handle);
}

int story_register(struct story_self *self, const struct story_args *args,
                   struct story_result *result)
{
        static const char *const names[STORY_UNITS] = { "u0", "u1", "u2" };
        static const char *const tensor_names[STORY_UNITS] = { "u0.w", "u1.w", "u2.w" };
        struct autoep_tensor tensors[8] = { { 0 } };
        struct autoep_model model = { .size = sizeof(model), .tensors = tensors };

        (void)result;
        for (uint32_t i = 0; i < STORY_UNITS && self->unit_n[i]; i++) {
                tensors[i] = (struct autoep_tensor){ .size = sizeof(tensors[i]),
                                                     .name = tensor_names[i],
                                                     .unit = names[i],
                                                     .dtype = AUTOEP_BF16,
                                                     .n_dims = 1,
                                                     .tensor_class = AUTOEP_DENSE,
                                                     .dims = { self->unit_n[i] },
                                                     .init = self->data };
                model.n_tensors++;
        }
        if (self->tweak)
                self->tweak(self, &model, tensors);
        return autoep_register(self->handle, self->rank == AUTOEP_NONE ? NULL : &model,
                               args->timeout_ms ? args->timeout_ms : AUTOEP_DEFAULT_TIMEOUT);
}

int story_gather(struct story_self *self, const struct story_args *args,
                 struct story_result *result)
{
        int r;

        self->view = (struct autoep_view)AUTOEP_VIEW_INIT;
        r = autoep_gather(self->handle, args->unit, args->timeout_ms, &self->view);
        if (r == 0)
                result->value = self->view.version;
        return r;
}

int story_gather_range(struct story_self *self, const struct story_args *args,
                       struct story_result *result)
{
        self->view = (struct autoep_view)AUTOEP_VIEW_INIT;
        (void)result;
        return autoep_gather_range(self->handle, args->unit, 0, args->n, args->timeout_ms,
                                   &self->view);
}

int story_release(struct story_self *self, const struct story_args *args,
                  struct story_result *result)
{
        (void)args;
        (void)result;
        return autoep_release(self->handle, &self->view);
}

int story_scatter(struct story_self *self, const struct story_args *args,
                  struct story_result *result)
{
        struct autoep_gradient gradient = { .size = sizeof(gradient),
                                            .tensor = args->unit,
                                            .dtype = AUTOEP_F32,
                                            .data = self->data };

        (void)result;
        return autoep_scatter(self->handle, args->unit, &gradient, 1, args->flags,
                              args->timeout_ms);
}

static int step(struct story_self *self, const struct story_args *args, uint32_t flags,
                struct story_result *result)
{
        const struct autoep_hyper hyper = { .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8 };
        const struct autoep_step ask = {
                .size = sizeof(ask), .hyper = &hyper, .n_groups = 1, .max_norm = 1, .flags = flags
        };
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        int r = autoep_step(self->handle, &ask, args->timeout_ms, &verdict);

        if (r < 0)
                return r;
        result->value = verdict.version;
        if (verdict.kind == AUTOEP_APPLIED)
                return 0;
        (void)snprintf(result->text, sizeof(result->text), "%s", verdict.why);
        return (int)verdict.kind;
}

int story_step(struct story_self *self, const struct story_args *args, struct story_result *result)
{
        return step(self, args, 0, result);
}

int story_redo(struct story_self *self, const struct story_args *args, struct story_result *result)
{
        if (self->view.data)
                (void)autoep_release(self->handle, &self->view);
        return step(self, args, AUTOEP_STEP_REDO, result);
}

static int one_step(struct story_self *self, int timeout_ms, struct story_result *result)
{
        int r = 0;

        for (uint32_t unit = 0; unit < STORY_UNITS && self->unit_n[unit] && r == 0; unit++) {
                const struct story_args args = { .unit = unit, .timeout_ms = timeout_ms };

                r = story_gather(self, &args, result);
                if (r == 0)
                        r = story_release(self, &args, result);
                if (r == 0)
                        r = story_scatter(self, &args, result);
        }
        return r ? r : story_step(self, &(struct story_args){ .timeout_ms = timeout_ms }, result);
}

int story_steps(struct story_self *self, const struct story_args *args, struct story_result *result)
{
        int r = 0;

        for (uint32_t i = 0; i < args->n && r == 0; i++)
                r = one_step(self, args->timeout_ms, result);
        return r;
}

/* Rank 0 decides when all stop: its group sees it in the same exchange. */
int story_until(struct story_self *self, const struct story_args *args, struct story_result *result)
{
        for (;;) {
                uint8_t send[STORY_WORLD_MAX], recv[STORY_WORLD_MAX] = { 0 };
                uint64_t len[STORY_WORLD_MAX];
                int r;

                memset(send, self->rank == 0 && atomic_load(&shared->stop), sizeof(send));
                for (uint32_t i = 0; i < STORY_WORLD_MAX; i++)
                        len[i] = 1;
                r = autoep_exchange(self->handle, AUTOEP_GROUP_WORLD, send, len, recv, len,
                                    args->timeout_ms);
                if (r < 0 || recv[0])
                        return r;
                r = one_step(self, args->timeout_ms, result);
                if (r)
                        return r;
                if (self->rank == 0)
                        atomic_fetch_add(&shared->n_steps, 1);
        }
}

int story_exchange(struct story_self *self, const struct story_args *args,
                   struct story_result *result)
{
        uint8_t send[64 * STORY_WORLD_MAX] = { 0 }, recv[64 * STORY_WORLD_MAX];
        uint64_t len[STORY_WORLD_MAX];

        (void)result;
        for (uint32_t i = 0; i < STORY_WORLD_MAX; i++)
                len[i] = 64;
        return autoep_exchange(self->handle, AUTOEP_GROUP_WORLD, send, len, recv, len,
                               args->timeout_ms);
}

int story_get(struct story_self *self, const struct story_args *args, struct story_result *result)
{
        (void)result;
        return autoep_get(self->handle, args->unit, args->what ? args->what : AUTOEP_MASTER, 0,
                          args->n, self->data, args->timeout_ms);
}

int story_put(struct story_self *self, const struct story_args *args, struct story_result *result)
{
        struct autoep_info info = { .size = sizeof(info) };
        struct autoep_put_item item = { .size = sizeof(item),
                                        .tensor = args->unit,
                                        .what = args->what ? args->what : AUTOEP_MASTER,
                                        .n = args->n,
                                        .data = self->data };
        int r = autoep_info(self->handle, &info);

        (void)result;
        return r < 0 ? r : autoep_put(self->handle, info.version, &item, 1, args->timeout_ms);
}

int story_pause(struct story_self *self, const struct story_args *args, struct story_result *result)
{
        (void)result;
        return autoep_pause(self->handle, "writes a checkpoint", args->n);
}

int story_leave(struct story_self *self, const struct story_args *args, struct story_result *result)
{
        (void)result;
        return autoep_leave(self->handle,
                            args->timeout_ms ? args->timeout_ms : AUTOEP_DEFAULT_TIMEOUT);
}

int story_close(struct story_self *self, const struct story_args *args, struct story_result *result)
{
        (void)args;
        (void)result;
        autoep_close(self->handle);
        self->handle = NULL;
        return 0;
}

static void serve(struct story_self *self, int fd)
{
        struct call call;
        size_t n = 1;

        for (uint32_t unit = 0; unit < STORY_UNITS; unit++)
                n = AE_MAX(n, (size_t)self->unit_n[unit]);
        self->data = calloc(n, sizeof(float));
        if (!self->data)
                _exit(2);
        while (recv(fd, &call, sizeof(call), 0) == (ssize_t)sizeof(call)) {
                struct story_result result = { 0 };
                const uint64_t starved = proc_starved_ns();
                const uint64_t start = proc_now_ms();

                result.status = call.fn(self, &call.args, &result);
                result.ms = (int)(proc_now_ms() - start -
                                  (proc_starved_ns() - starved) / AE_NS_PER_MS);
                if (result.status < 0)
                        (void)snprintf(result.text, sizeof(result.text), "%s", autoep_last_error());
                if (send(fd, &result, sizeof(result), MSG_NOSIGNAL) != (ssize_t)sizeof(result))
                        break;
        }
        _exit(0);
}

/* ---- in the test ------------------------------------------------------------------------ */

void story_worker_start(struct story_worker *worker)
{
        pid_t self = getpid();
        int fds[2];

        make_shared();
        assert_int_equal(worker->pid, 0);
        assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds), 0);
        worker->pid = fork();
        assert_true(worker->pid >= 0);
        if (worker->pid == 0) {
                proc_die_with_parent(self);
                close(fds[0]);
                if (worker->self.uid && setuid(worker->self.uid) < 0)
                        _exit(3);
                serve(&worker->self, fds[1]);
        }
        close(fds[1]);
        worker->fd = fds[0];
        worker->stopped = false;
}

void story_worker_end(struct story_worker *worker)
{
        if (worker->pid == 0)
                return;
        kill(worker->pid, SIGKILL);
        waitpid(worker->pid, NULL, 0);
        close(worker->fd);
        worker->pid = 0;
}

void story_post(struct story_worker *worker, story_fn *fn, struct story_args args)
{
        const struct call call = { .fn = fn, .args = args };

        assert_int_not_equal(worker->pid, 0);
        assert_int_equal(send(worker->fd, &call, sizeof(call), MSG_NOSIGNAL), sizeof(call));
}

struct story_result story_take(struct story_worker *worker, int ms)
{
        struct pollfd fd = { .fd = worker->fd, .events = POLLIN };
        struct story_result result;

        if (poll(&fd, 1, ms) != 1) {
                proc_bed_show(worker->self.bed);
                fail_msg("rank %u of job '%s' has not answered within %d ms", worker->self.rank,
                         worker->self.job, ms);
        }
        if (recv(worker->fd, &result, sizeof(result), 0) != (ssize_t)sizeof(result)) {
                proc_bed_show(worker->self.bed);
                fail_msg("the process of rank %u of job '%s' has died", worker->self.rank,
                         worker->self.job);
        }
        return result;
}

struct story_result story_call(struct story_worker *worker, story_fn *fn, struct story_args args)
{
        story_post(worker, fn, args);
        return story_take(worker, ANSWER_MS);
}

static void must(struct story_worker *worker, const struct story_result *result)
{
        if (result->status == 0)
                return;
        proc_bed_show(worker->self.bed);
        fail_msg("rank %u of job '%s': %d: %s", worker->self.rank, worker->self.job, result->status,
                 result->text);
}

void story_must(struct story_worker *worker, story_fn *fn, struct story_args args)
{
        const struct story_result result = story_call(worker, fn, args);

        must(worker, &result);
}

void story_expect(const struct story_result *result, int status, ...)
{
        const char *words;
        va_list args;

        if (result->status != status)
                fail_msg("%s (%d) was expected, not %d after %d ms: %s", autoep_strerror(status),
                         status, result->status, result->ms, result->text);
        va_start(args, status);
        while ((words = va_arg(args, const char *)))
                if (!strstr(result->text, words))
                        fail_msg("'%s' does not say '%s'", result->text, words);
        va_end(args);
}

/* ---- jobs ------------------------------------------------------------------------------- */

void story_job_init(struct story_job *job, struct proc_bed *bed, const char *name, uint32_t world)
{
        assert_in_range(world, 1, STORY_WORLD_MAX);
        *job = (struct story_job){ .bed = bed, .name = name, .world = world };
        for (uint32_t rank = 0; rank < world; rank++)
                job->workers[rank].self = (struct story_self){
                        .bed = bed,
                        .job = name,
                        .rank = rank,
                        .world = world,
                        .node = rank * bed->n_nodes / world,
                        .timeout_ms = 8000,
                        .unit_n = { 300000, 200000, 1000 },
                };
}

void story_job_must(struct story_job *job, story_fn *fn, struct story_args args)
{
        struct story_result results[STORY_WORLD_MAX];

        for (uint32_t rank = 0; rank < job->world; rank++)
                story_post(&job->workers[rank], fn, args);
        for (uint32_t rank = 0; rank < job->world; rank++)
                results[rank] = story_take(&job->workers[rank], 60000);
        for (uint32_t rank = 0; rank < job->world; rank++)
                must(&job->workers[rank], &results[rank]);
}

void story_job_up(struct story_job *job)
{
        for (uint32_t rank = 0; rank < job->world; rank++)
                story_worker_start(&job->workers[rank]);
        story_job_must(job, story_open, (struct story_args){ 0 });
        story_job_must(job, story_register, (struct story_args){ 0 });
}

void story_job_steps(struct story_job *job, uint32_t n)
{
        story_job_must(job, story_steps, (struct story_args){ .n = n, .timeout_ms = 10000 });
}

void story_job_leave(struct story_job *job)
{
        story_job_must(job, story_leave, (struct story_args){ 0 });
        story_job_must(job, story_close, (struct story_args){ 0 });
}

void story_job_end(struct story_job *job)
{
        for (uint32_t rank = 0; rank < job->world; rank++)
                story_worker_end(&job->workers[rank]);
}

/* ---- set up and tear down --------------------------------------------------------------- */

static int setup(void **state, uint32_t n_nodes, const char *transport)
{
        struct story *story = calloc(1, sizeof(*story));

        assert_non_null(story);
        make_shared();
        atomic_store(&shared->stop, false);
        *state = story;
        proc_bed_init(&story->bed, n_nodes, transport);
        proc_daemon_start_all(&story->bed);
        return 0;
}

int story_setup_tcp(void **state)
{
        return setup(state, 2, "tcp");
}

int story_setup_shm(void **state)
{
        return setup(state, 2, "shm");
}

int story_setup_one(void **state)
{
        return setup(state, 1, "shm");
}

/* ---- counting --------------------------------------------------------------------------- */

void story_preload(const char *name)
{
        const char *preload = getenv("INTERPOSE"), *others = getenv("LD_PRELOAD");
        char all[1024];

        if (!preload || (others && strstr(others, preload)))
                return;
        (void)snprintf(all, sizeof(all), "%s %s", preload, others ? others : "");
        setenv("LD_PRELOAD", all, 1); /* the workers are children of this process */
        execl("/proc/self/exe", name, (char *)NULL);
}

int story_setup_counted(void **state, const char *transport)
{
        struct story *story = calloc(1, sizeof(*story));
        char out[96];

        assert_non_null(story);
        *state = story;
        proc_bed_init(&story->bed, 2, transport);
        story->bed.preload = getenv("INTERPOSE");
        assert_non_null(story->bed.preload);
        (void)snprintf(out, sizeof(out), "%s/calls", story->bed.dir);
        setenv("INTERPOSE_OUT", out, 1);
        proc_daemon_start_all(&story->bed);
        return 0;
}

static void report_path(const struct proc_bed *bed, uint32_t node, char *path, size_t size)
{
        (void)snprintf(path, size, "%s/calls.%d", bed->dir, (int)bed->daemons[node].pid);
}

void story_mark(const struct proc_bed *bed, int signal)
{
        char path[160];

        for (uint32_t node = 0; node < bed->n_nodes; node++) {
                report_path(bed, node, path, sizeof(path));
                (void)unlink(path);
                assert_int_equal(kill(bed->daemons[node].pid, signal), 0);
        }
}

unsigned long story_report_of(const struct proc_bed *bed, uint32_t node, const char *word,
                              char *text, size_t size)
{
        uint64_t until = proc_now_ms() + 3000;
        const char *at = NULL;
        char path[160], line[64];

        report_path(bed, node, path, sizeof(path));
        (void)snprintf(line, sizeof(line), "\n%s ", word);
        text[0] = '\n';
        while (!at && proc_now_ms() < until) {
                int fd = open(path, O_RDONLY | O_CLOEXEC);
                ssize_t n = fd >= 0 ? read(fd, text + 1, size - 2) : 0;

                if (fd >= 0)
                        close(fd);
                text[n > 0 ? n + 1 : 1] = '\0';
                at = strstr(text, "\ntotal "); /* the last line */
                if (!at)
                        proc_sleep_ms(2);
        }
        at = at ? strstr(text, line) : NULL;
        if (!at)
                fail_msg("no report of node %u says '%s'", node, word);
        return strtoul(at + strlen(line), NULL, 10);
}

struct story_counter story_counter(void)
{
        struct story_counter counter;

        *(void **)(void *)&counter.begin = dlsym(RTLD_DEFAULT, "interpose_begin");
        *(void **)(void *)&counter.end = dlsym(RTLD_DEFAULT, "interpose_end");
        *(void **)(void *)&counter.live = dlsym(RTLD_DEFAULT, "interpose_live");
        *(void **)(void *)&counter.memory = dlsym(RTLD_DEFAULT, "interpose_memory");
        if (!counter.begin || !counter.end || !counter.live || !counter.memory)
                _exit(4);
        return counter;
}

int story_teardown(void **state)
{
        struct story *story = *state;

        story_job_end(&story->job);
        story_job_end(&story->other);
        proc_bed_deinit(&story->bed);
        free(story);
        return 0;
}
