/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whoever may write to a daemon's sockets or rings and writes nonsense there loses its own session,
 * the daemon's log says why, and the jobs beside it go on. What is random comes from a seed that
 * the test prints; $STORY_SEED gives another.
 */
#include "tests/integration/story.h"
#include "proto/wire/control.h"
#include "proto/wire/local.h"
#include "tests/lib/test.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define N_RING_ATTACKS 60
#define N_FRAME_ATTACKS 200
#define N_SILENT 200

static uint64_t seed;

static uint64_t draw(uint64_t *state)
{
        uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

        z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9); /* splitmix64, Steele et al. 2014 */
        z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
        return z ^ z >> 31;
}

/* ---- the healthy job --------------------------------------------------------------------- */

static int setup_beside(void **state, const char *transport)
{
        struct story *story;
        const char *given = getenv("STORY_SEED");

        seed = given ? strtoull(given, NULL, 0) : 1;
        if ((strcmp(transport, "tcp") == 0 ? story_setup_tcp : story_setup_shm)(state) < 0)
                return -1;
        story = *state;
        story_job_init(&story->other, &story->bed, "healthy", 2);
        for (uint32_t rank = 0; rank < 2; rank++)
                story->other.workers[rank].self.unit_n[0] = 70000;
        story_job_up(&story->other);
        for (uint32_t rank = 0; rank < 2; rank++)
                story_post(&story->other.workers[rank], story_until,
                           (struct story_args){ .timeout_ms = 10000 });
        return 0;
}

static int setup_tcp(void **state)
{
        return setup_beside(state, "tcp");
}

static int setup_shm(void **state)
{
        return setup_beside(state, "shm");
}

static void check_healthy(struct story *story)
{
        uint64_t n = story_until_count();
        uint64_t until = proc_now_ms() + 10000;

        while (story_until_count() < n + 2 && proc_now_ms() < until)
                proc_sleep_ms(2);
        for (uint32_t node = 0; node < 2; node++) {
                if (!proc_daemon_alive(&story->bed, node)) {
                        proc_bed_show(&story->bed);
                        fail_msg("node %u has died, seed %llu", node, (unsigned long long)seed);
                }
        }
        if (story_until_count() < n + 2) {
                proc_bed_show(&story->bed);
                fail_msg("the healthy job stands still, seed %llu", (unsigned long long)seed);
        }
}

static void finish(struct story *story)
{
        story_until_stop();
        for (uint32_t rank = 0; rank < 2; rank++) {
                const struct story_result result = story_take(&story->other.workers[rank], 20000);

                if (result.status != 0)
                        fail_msg("the healthy job: %s", result.text);
        }
        story_job_leave(&story->other);
}

/* ---- rings ------------------------------------------------------------------------------- */

/* This process's page: the mapping of the memfd of that name. */
static struct ae_local_page *find_page(void)
{
        FILE *maps = fopen("/proc/self/maps", "re");
        struct ae_local_page *page = NULL;
        char line[512];

        while (maps && fgets(line, sizeof(line), maps))
                if (strstr(line, "autoep-page"))
                        page = (struct ae_local_page *)strtoull(line, NULL, 16);
        if (maps)
                fclose(maps);
        return page;
}

static void post(struct ae_local_page *page, const struct ae_local_sqe *sqe)
{
        uint32_t tail = atomic_load(&page->sq_tail);

        page->sq[tail % AE_LOCAL_SQ_LEN] = *sqe;
        atomic_store(&page->sq_tail, tail + 1);
}

/* A number that is often near a border. */
static uint64_t odd(uint64_t *state)
{
        static const uint64_t borders[] = {
                0,          1,       3,       255,        1000,
                70000,      300000,  1 << 20, UINT32_MAX, UINT64_C(1) << 40,
                UINT64_MAX, 0xffffff
        };
        uint64_t n = draw(state);

        return n % 4 == 0 ? draw(state) : borders[n / 4 % (sizeof(borders) / 8)] - (n >> 60 == 1);
}

static struct ae_local_sqe random_entry(uint64_t *state)
{
        uint64_t n = draw(state);
        struct ae_local_sqe sqe = {
                .op = n % 8 == 0 ? (uint16_t)odd(state) : (uint16_t)(1 + (n >> 8) % 10),
                .flags = (uint16_t)(n >> 16 & 1),
                .unit = (uint32_t)((n >> 20) % 4),
                .use = (uint16_t)(n >> 32 & 1),
                .dtype = (uint16_t)(1 + (n >> 40) % 3),
                .micro = (uint32_t)((n >> 44) % 2),
                .rank = (uint32_t)((n >> 48) % 3),
                .slot = (uint32_t)((n >> 52) % 8),
                .token = draw(state),
                .first = odd(state),
                .n = odd(state),
                .pos = odd(state),
                .len = (uint32_t)odd(state),
        };

        if (n >> 62 == 0) {
                sqe.unit = (uint32_t)odd(state);
                sqe.rank = (uint32_t)odd(state);
        }
        return sqe;
}

/* Nonsense of kind args->what from seed args->n; then rings the bell by a call of the library. */
static int attack_ring(struct story_self *self, const struct story_args *args,
                       struct story_result *result)
{
        struct ae_local_page *page = find_page();
        uint64_t state = seed * 1000 + args->n;
        struct autoep_view view = AUTOEP_VIEW_INIT;

        (void)result;
        if (!page)
                return -100;
        if (args->what == 0)
                for (int i = 0; i < 8; i++)
                        post(page, &(struct ae_local_sqe[]){ random_entry(&state) }[0]);
        if (args->what == 1) /* an index that jumps */
                atomic_fetch_add(&page->sq_tail,
                                 AE_LOCAL_SQ_LEN + 1 + (uint32_t)draw(&state) % 9999);
        if (args->what == 2) /* a piece beyond the ring and the unit */
                post(page, &(struct ae_local_sqe){ .op = AE_SQ_PIECE,
                                                   .dtype = AUTOEP_F32,
                                                   .n = 1000,
                                                   .len = 4000,
                                                   .pos = odd(&state) | 1 << 30 });
        if (args->what == 3) { /* everything that a worker may write */
                uint32_t *words = (uint32_t *)page;

                for (size_t i = 0; i < sizeof(*page) / 4; i += 1 + draw(&state) % 7)
                        words[i] = (uint32_t)draw(&state);
        }
        if (args->what == 4) { /* a step request out of all bounds */
                uint8_t *bytes = (uint8_t *)&page->step;

                for (size_t i = 0; i < sizeof(page->step); i++)
                        bytes[i] = (uint8_t)draw(&state);
                post(page, &(struct ae_local_sqe){ .op = AE_SQ_STEP, .token = page->step.round });
        }
        if (args->what == 5) { /* completions that are not taken */
                atomic_store(&page->cq_head, (uint32_t)draw(&state));
                for (uint32_t i = 0; i < 900; i++)
                        post(page, &(struct ae_local_sqe){ .op = AE_SQ_GATHER, .unit = i % 3 });
        }
        proc_sleep_ms(
                30); /* the daemon looks by itself; the library may write its own index again */
        (void)autoep_gather(self->handle, 0, 100, &view);
        return 0;
}

static void ring_attack(struct story *story, uint32_t n)
{
        struct story_args args = { .what = n % 6, .n = n };

        story_job_init(&story->job, &story->bed, "mad", 2);
        for (uint32_t rank = 0; rank < 2; rank++)
                story->job.workers[rank].self.unit_n[0] = 70000;
        story_job_up(&story->job);
        story_job_steps(&story->job, 1);
        story_must(&story->job.workers[n / 6 % 2], attack_ring, args);
        if (args.what == 1)
                proc_daemon_await_log(&story->bed, n / 6 % 2, "its ring index jumped", 2000);
        story_job_end(&story->job);
        for (uint32_t node = 0; node < 2; node++) {
                if (!proc_daemon_alive(&story->bed, node)) {
                        proc_bed_show(&story->bed);
                        fail_msg("node %u has died of attack %u (kind %u), seed %llu", node, n,
                                 n % 6, (unsigned long long)seed);
                }
        }
}

static void test_rings(void **state)
{
        struct story *story = *state;

        for (uint32_t n = 0; n < N_RING_ATTACKS / story_thin(); n++)
                ring_attack(story, n);
        assert_true(proc_daemon_log_has(&story->bed, 0, "broke the protocol") ||
                    proc_daemon_log_has(&story->bed, 0, "its ring"));
        check_healthy(story);
        finish(story);
}

/* ---- bells ------------------------------------------------------------------------------- */

/* Whether this process wakes the daemon by @fd, or is woken by it. */
static bool is_bell(int fd)
{
        struct sockaddr_un peer;
        socklen_t len = sizeof(peer);
        socklen_t type_len = sizeof(int);
        int type = 0;

        return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &type_len) == 0 && type == SOCK_STREAM &&
               getpeername(fd, (struct sockaddr *)&peer, &len) == 0 &&
               len == sizeof(sa_family_t); /* a pair: it has no name */
}

/* Makes a wait of the daemon on what it shares with this process as long as it may: descriptors
 * that block are full, and one wakes this process again and again, which doesn't listen. */
static int attack_bells(struct story_self *self, const struct story_args *args,
                        struct story_result *result)
{
        static const char rings[4096];
        struct ae_local_page *page = find_page();
        const uint64_t until = proc_now_ms() + 10000;
        int bell = 3;

        (void)self;
        (void)args;
        (void)result;
        while (!is_bell(bell) && bell < 256)
                bell++;
        if (!page || fcntl(bell, F_SETFL, 0) < 0)
                return -100;
        for (uint32_t i = 0; i < 1000; i++) {
                uint32_t tail = atomic_load(&page->cq_tail);

                atomic_store(&page->worker_waits, 1);
                post(page, &(struct ae_local_sqe){ .op = AE_SQ_GATHER, .unit = 2 });
                (void)send(bell, rings, sizeof(rings), MSG_DONTWAIT | MSG_NOSIGNAL);
                while (atomic_load(&page->cq_tail) == tail && proc_now_ms() < until)
                        sched_yield();
                post(page, &(struct ae_local_sqe){
                                   .op = AE_SQ_UNPIN,
                                   .slot = page->cq[tail % AE_LOCAL_CQ_LEN].slot });
                atomic_store(&page->cq_head, tail + 1);
        }
        return proc_now_ms() < until ? 0 : -101;
}

static void test_bells(void **state)
{
        struct story *story = *state;
        struct story_result result;

        story_job_init(&story->job, &story->bed, "mad", 2);
        story_job_up(&story->job);
        story_job_steps(&story->job, 1);
        result = story_call(&story->job.workers[0], attack_bells, (struct story_args){ 0 });
        check_healthy(story);
        assert_int_equal(result.status, 0);
        story_job_end(&story->job);
        check_healthy(story);
        finish(story);
}

/* ---- sockets ----------------------------------------------------------------------------- */

static int connect_unix(const char *path)
{
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

        assert_true(fd >= 0);
        (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
        assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
        return fd;
}

static int connect_peer(const char *peer)
{
        struct sockaddr_in address = { .sin_family = AF_INET,
                                       .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
        const char *colon = strrchr(peer, ':');
        int fd;

        if (peer[0] == '/') {
                struct sockaddr_un path = { .sun_family = AF_UNIX };

                fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
                assert_true(fd >= 0);
                (void)snprintf(path.sun_path, sizeof(path.sun_path), "%s", peer);
                if (connect(fd, (struct sockaddr *)&path, sizeof(path)) == 0)
                        return fd;
                close(fd);
                return connect_unix(peer);
        }
        address.sin_port = htons((uint16_t)strtoul(colon + 1, NULL, 10));
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_true(fd >= 0);
        assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
        return fd;
}

static bool hung_up(int fd, int ms)
{
        uint64_t until = proc_now_ms() + (uint64_t)ms;
        char buffer[4096];

        for (;;) {
                struct pollfd poll_fd = { .fd = fd, .events = POLLIN };
                uint64_t now = proc_now_ms();

                if (now >= until || poll(&poll_fd, 1, (int)(until - now)) <= 0)
                        return false;
                if (recv(fd, buffer, sizeof(buffer), 0) <= 0)
                        return true;
        }
}

/* The frames of kind @n % 4: random, a random body of a real type, one that is too long, a message
 * that is not for here. */
static void send_nonsense(int fd, uint32_t n)
{
        uint64_t state = seed * 77777 + n;
        uint8_t bytes[2048];
        struct ae_control_frame head = { .len = (uint32_t)(draw(&state) % 512),
                                         .type = (uint16_t)(draw(&state) % 36) };
        size_t len = sizeof(head) + head.len;

        for (size_t i = 0; i < sizeof(bytes); i++)
                bytes[i] = (uint8_t)draw(&state);
        if (n % 4 == 2)
                head.len = 100 << 20;
        if (n % 4 == 3) {
                head.type = AE_CONTROL_FAIL;
                head.len = 0;
                len = sizeof(head);
        }
        if (n % 4 != 0)
                memcpy(bytes, &head, sizeof(head));
        (void)send(fd, bytes, len, MSG_NOSIGNAL); /* it may have hung up in the middle */
        (void)shutdown(fd, SHUT_WR);
}

static void frames(struct story *story, uint32_t n)
{
        for (uint32_t i = 0; i < n; i++) {
                int fd = connect_unix(story->bed.daemons[i % 2].socket);

                send_nonsense(fd, i);
                if (!hung_up(fd, 3000))
                        fail_msg("node %u does not hang up on frame %u, seed %llu", i % 2, i,
                                 (unsigned long long)seed);
                close(fd);
                fd = connect_peer(story->bed.daemons[i % 2].peer);
                send_nonsense(fd, i);
                if (!hung_up(fd, 12000))
                        fail_msg("node %u does not hang up on peer bytes %u, seed %llu", i % 2, i,
                                 (unsigned long long)seed);
                close(fd);
        }
}

static void test_frames(void **state)
{
        struct story *story = *state;

        frames(story, N_FRAME_ATTACKS / story_thin());
        assert_true(proc_daemon_log_has(&story->bed, 0, "broke the protocol"));
        check_healthy(story);
        finish(story);
}

/* ---- hello ------------------------------------------------------------------------------- */

/* Says hello by hand and takes the answer: its type, and the text of an error. */
static uint32_t say_hello(int fd, uint32_t version, char *text, size_t size)
{
        Autoep__Hello hello = AUTOEP__HELLO__INIT;
        struct ae_control_frame head = { .type = AE_CONTROL_HELLO };
        uint8_t out[512], in[4096];
        ProtobufCMessage *message = NULL;
        ssize_t n;

        hello.version = version;
        hello.job = (char *)(uintptr_t) "by-hand";
        hello.token = (char *)(uintptr_t) "";
        hello.world = 1;
        head.len = (uint32_t)ae_control_size(&hello.base);
        memcpy(out, &head, sizeof(head));
        ae_control_pack(&hello.base, out + sizeof(head));
        assert_int_equal(send(fd, out, sizeof(head) + head.len, MSG_NOSIGNAL),
                         sizeof(head) + head.len);
        n = recv(fd, in, sizeof(in), 0);
        assert_true(n > (ssize_t)sizeof(head));
        memcpy(&head, in, sizeof(head));
        assert_int_equal(n, sizeof(head) + head.len);
        assert_int_equal(ae_control_unpack(head.type, in + sizeof(head), head.len, &message), 0);
        if (head.type == AE_CONTROL_ERROR)
                (void)snprintf(text, size, "%s", ((Autoep__Error *)message)->text);
        ae_control_free(message);
        return head.type;
}

static void test_wrong_version(void **state)
{
        struct story *story = *state;
        char text[512] = "";
        int fd = connect_unix(story->bed.daemons[0].socket);

        assert_int_equal(say_hello(fd, 77, text, sizeof(text)), AE_CONTROL_ERROR);
        assert_non_null(strstr(text, "version 77"));
        /* one that was refused and stays is not kept for ever */
        assert_true(hung_up(fd, 8000));
        close(fd);
        check_healthy(story);
        finish(story);
}

static void test_silent_connections(void **state)
{
        struct story *story = *state;
        struct proc_stat before = proc_stat_of(story->bed.daemons[0].pid), after;
        int fds[N_SILENT];

        for (int i = 0; i < N_SILENT; i++)
                fds[i] = connect_unix(story->bed.daemons[0].socket);
        /* one who has something to say is heard */
        story_job_init(&story->job, &story->bed, "polite", 2);
        story_job_up(&story->job);
        story_job_steps(&story->job, 1);
        story_job_leave(&story->job);
        story_job_end(&story->job);
        assert_true(proc_stat_of(story->bed.daemons[0].pid).n_fds < before.n_fds + 100);
        for (int i = 0; i < N_SILENT; i++) {
                if (!hung_up(fds[i], 8000))
                        fail_msg("silent connection %d is still there", i);
                close(fds[i]);
        }
        after = proc_stat_of(story->bed.daemons[0].pid);
        assert_in_range(after.n_fds, 0, before.n_fds + 1);
        check_healthy(story);
        finish(story);
}

/* ---- descriptors ------------------------------------------------------------------------- */

/* The session's socket: a stream whose other end has a name. */
static int find_session(void)
{
        for (int fd = 3; fd < 256; fd++) {
                struct sockaddr_un peer;
                socklen_t len = sizeof(peer);

                if (getpeername(fd, (struct sockaddr *)&peer, &len) == 0 &&
                    len > sizeof(sa_family_t) && strstr(peer.sun_path, "node-"))
                        return fd;
        }
        return -1;
}

/* Passes a pipe that has nothing to read where the daemon would read. */
static int attack_descriptor(struct story_self *self, const struct story_args *args,
                             struct story_result *result)
{
        struct ae_control_frame head = { .type = AE_CONTROL_PUT };
        union {
                struct cmsghdr head;
                char space[CMSG_SPACE(sizeof(int))];
        } control = { .head = { .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET,
                                .cmsg_type = SCM_RIGHTS } };
        struct iovec iov = { .iov_base = &head, .iov_len = sizeof(head) };
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
                              .msg_controllen = sizeof(control.space) };
        int ends[2];

        (void)args;
        if (pipe(ends) < 0)
                return -100;
        memcpy(CMSG_DATA(&control.head), ends, sizeof(int));
        if (sendmsg(find_session(), &msg, MSG_NOSIGNAL) != (ssize_t)sizeof(head))
                return -100;
        return story_step(self, &(struct story_args){ .timeout_ms = 5000 }, result);
}

static void test_descriptors(void **state)
{
        struct story *story = *state;
        struct story_result result;

        story_job_init(&story->job, &story->bed, "mad", 2);
        story_job_up(&story->job);
        result = story_call(&story->job.workers[0], attack_descriptor, (struct story_args){ 0 });
        assert_int_equal(result.status, AUTOEP_ELOST);
        proc_daemon_await_log(&story->bed, 0, "passes a descriptor that is not a memfd", 2000);
        story_job_end(&story->job);
        check_healthy(story);
        finish(story);
}

/* A connection that says something, and so may stay. */
static int connect_known(const char *path)
{
        Autoep__CtlRequest request = AUTOEP__CTL_REQUEST__INIT;
        struct ae_control_frame head = { .type = AE_CONTROL_CTL_REQUEST };
        uint8_t out[64];
        int fd = connect_unix(path);

        request.version = 77;
        head.len = (uint32_t)ae_control_size(&request.base);
        assert_true(sizeof(head) + head.len <= sizeof(out));
        memcpy(out, &head, sizeof(head));
        ae_control_pack(&request.base, out + sizeof(head));
        assert_int_equal(send(fd, out, sizeof(head) + head.len, MSG_NOSIGNAL),
                         sizeof(head) + head.len);
        return fd;
}

/* Whether @fd is answered; false when the daemon's log has @text first. */
static bool answered(struct story *story, int fd, const char *text)
{
        struct pollfd poll_fd = { .fd = fd, .events = POLLIN };
        uint64_t until = proc_now_ms() + 10000;

        while (poll(&poll_fd, 1, 5) == 0) {
                if (proc_daemon_log_has(&story->bed, 0, text))
                        return false;
                assert_true(proc_now_ms() < until);
        }
        return true;
}

static uint32_t count_log(const struct proc_daemon *daemon, const char *text)
{
        FILE *log = fopen(daemon->log, "re");
        char line[1024];
        uint32_t n = 0;

        assert_non_null(log);
        while (fgets(line, sizeof(line), log))
                n += strstr(line, text) != NULL;
        fclose(log);
        return n;
}

/* No descriptor is left: said once, who comes then waits or hears why, and later all is as before.
 */
static void test_no_descriptors_left(void **state)
{
        static const char full[] = "accepts no session until";
        struct story *story = *state;
        const struct proc_daemon *daemon = &story->bed.daemons[0];
        struct rlimit old, limit;
        struct story_result result;
        int fds[64];
        int n = 0;

        assert_int_equal(prlimit(daemon->pid, RLIMIT_NOFILE, NULL, &old), 0);
        limit = old;
        limit.rlim_cur = (rlim_t)proc_stat_of(daemon->pid).n_fds + 20;
        assert_int_equal(prlimit(daemon->pid, RLIMIT_NOFILE, &limit, NULL), 0);
        do {
                assert_in_range(n, 0, 63);
                fds[n++] = connect_known(daemon->socket);
        } while (answered(story, fds[n - 1], full));
        check_healthy(story); /* two steps, and nothing more in the log */
        assert_int_equal(count_log(daemon, full), 1);

        /* two end and so does the one that waits: there is room for one, but not for a worker */
        for (int i = 0; i < 3; i++)
                close(fds[--n]);
        proc_daemon_await_log(&story->bed, 0, "accepts sessions again", 10000);
        story_job_init(&story->job, &story->bed, "late", 1);
        story_worker_start(&story->job.workers[0]);
        result = story_call(&story->job.workers[0], story_open, (struct story_args){ 0 });
        story_expect(&result, AUTOEP_ESYS, "node 0 has no descriptors left", "LimitNOFILE", NULL);

        while (n > 0)
                close(fds[--n]);
        assert_int_equal(prlimit(daemon->pid, RLIMIT_NOFILE, &old, NULL), 0);
        story_job_end(&story->job);
        story_job_init(&story->job, &story->bed, "late", 2);
        story_job_up(&story->job);
        story_job_steps(&story->job, 1);
        story_job_leave(&story->job);
        check_healthy(story);
        finish(story);
}

#define STORY(test, setup) cmocka_unit_test_setup_teardown(test, setup, story_teardown)

int main(void)
{
        const struct CMUnitTest tests[] = {
                STORY(test_rings, setup_tcp),
                STORY(test_bells, setup_tcp),
                STORY(test_frames, setup_tcp),
                STORY(test_frames, setup_shm),
                STORY(test_wrong_version, setup_shm),
                STORY(test_silent_connections, setup_tcp),
                STORY(test_descriptors, setup_shm),
                STORY(test_no_descriptors_left, setup_tcp),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
