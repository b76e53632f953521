/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The daemon's unix socket: processes that connect, send bytes and frames of any kind with any
 * descriptors, before their hello and after it, and hang up, between honest ones that bring a job
 * up and ask for control. Whatever they do, the daemon serves and keeps no descriptor of theirs.
 */
#include "tests/fuzz/input.h"
#include "tests/lib/count.h"
#include "tests/lib/invent.h"
#include "tests/lib/test.h"

#include "proto/base/clock.h"
#include "proto/base/log.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/task.h"
#include "server/inspect.h"
#include "server/node.h"
#include "server/region.h"
#include "server/session.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define PROCESSES 3u
#define FDS_MAX 5u /* more than the daemon has room for */
#define W_N 8u

struct scene {
        uv_loop_t loop;
        struct ae_node *node;
        struct ae_sessions *sessions;
        struct ae_config config;
        char dir[64], path[96];
        struct ae_list done;  /* struct ae_task */
        int fds[PROCESSES];   /* of the processes; -1: not connected */
};

/* ---- the daemon ------------------------------------------------------------------------- */

static void on_task(void *user, struct ae_task *task)
{
        struct scene *scene = user;

        ae_task_run(task, 0);
        ae_list_push(&scene->done, &task->link);
}

static int on_region_new(void *user, const struct ae_region_spec *spec, struct ae_region **ret)
{
        (void)user;
        return ae_region_new(spec, ret);
}

static void on_region_free(void *user, struct ae_region *region)
{
        (void)user;
        ae_region_free(region);
}

static void on_send(void *user, struct ae_worker *worker, uint32_t type,
                    const ProtobufCMessage *message, const int *fds, size_t n_fds)
{
        (void)user;
        ae_sessions_send(worker, type, message, fds, n_fds);
}

static void on_worker_wake(void *user, struct ae_worker *worker)
{
        (void)user;
        ae_sessions_wake(worker);
}

static void on_wake(void *user)
{
        (void)user;
}

static void on_log(void *user, int level, const char *text)
{
        (void)user;
        (void)level;
        (void)text;
}

static int on_inspect(void *user, const Autoep__CtlRequest *request, char **ret_text)
{
        const struct scene *scene = user;
        struct ae_inspect inspect = { .node = scene->node, .config = &scene->config };

        return ae_inspect(&inspect, request, ret_text);
}

static void turn(struct scene *scene)
{
        struct ae_list *entry;

        for (uint32_t i = 0; i < 4; i++) {
                uv_run(&scene->loop, UV_RUN_NOWAIT);
                ae_sessions_drain(scene->sessions);
                do {
                        while ((entry = ae_list_pop(&scene->done)))
                                ae_node_task_done(scene->node,
                                                  ae_list_entry(entry, struct ae_task, link));
                } while (ae_node_poll(scene->node) || !ae_list_empty(&scene->done));
        }
}

static void scene_open(struct scene *scene)
{
        static const char *const peers[] = { "" };
        static char shm[] = "shm";
        struct ae_node_options node = { .n_nodes = 1, .peers = peers, .loop = &scene->loop,
                                        .incarnation = 1, .memory_len = 64 * AE_MIB,
                                        .n_threads = 1,
                                        .wake = on_wake, .task = on_task,
                                        .region_new = on_region_new,
                                        .region_free = on_region_free, .worker_send = on_send,
                                        .worker_wake = on_worker_wake, .log = on_log,
                                        .user = scene };
        struct ae_sessions_options sessions = { .loop = &scene->loop, .path = scene->path,
                                                .inspect = on_inspect, .user = scene };

        *scene = (struct scene){ .dir = "/tmp/autoep-fuzz.XXXXXX" };
        ae_list_init(&scene->done);
        for (uint32_t i = 0; i < PROCESSES; i++)
                scene->fds[i] = -1;
        assert_non_null(mkdtemp(scene->dir));
        (void)snprintf(scene->path, sizeof(scene->path), "%s/sock", scene->dir);
        scene->config = (struct ae_config){ .n_peers = 1, .socket = scene->path, .transport = shm,
                                            .threads = 1, .memory = 64 * AE_MIB };
        assert_int_equal(uv_loop_init(&scene->loop), 0);
        assert_int_equal(ae_node_new(&node, &scene->node), 0);
        sessions.core = ae_node_core(scene->node);
        assert_int_equal(ae_sessions_new(&sessions, &scene->sessions), 0);
}

static void scene_close(struct scene *scene)
{
        turn(scene);
        ae_sessions_free(scene->sessions);
        while (!ae_list_empty(&scene->done))
                ae_node_task_done(scene->node, ae_list_entry(ae_list_pop(&scene->done),
                                                             struct ae_task, link));
        ae_node_free(scene->node);
        uv_run(&scene->loop, UV_RUN_DEFAULT);
        assert_int_equal(uv_loop_close(&scene->loop), 0);
        assert_int_equal(rmdir(scene->dir), 0);
}

/* ---- a process -------------------------------------------------------------------------- */

static uint32_t draw_byte(void *user)
{
        return input_u8(user);
}

static int connect_to(const struct scene *scene)
{
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

        assert_true(fd >= 0);
        memcpy(address.sun_path, scene->path, sizeof(scene->path));
        assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
        return fd;
}

/* A descriptor as a worker passes it, or of another kind. */
static int descriptor(struct input *input)
{
        uint8_t kind = input_u8(input);
        int ends[2];
        int fd;

        if (kind % 4 == 3)
                return open("/dev/zero", O_RDONLY | O_CLOEXEC);
        if (kind % 4 == 2) {
                assert_int_equal(pipe2(ends, O_CLOEXEC), 0); /* a read of it would wait */
                close(ends[1]);
                return ends[0];
        }
        fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        assert_true(fd >= 0);
        assert_int_equal(ftruncate(fd, kind & 4 ? W_N * 4 : kind), 0);
        if (kind & 8)
                (void)fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK);
        return fd;
}

/* The daemon may have hung up; then nothing is sent. */
static void say(struct scene *scene, int fd, const void *data, size_t len, struct input *input)
{
        union {
                struct cmsghdr head;
                char space[CMSG_SPACE(sizeof(int) * FDS_MAX)];
        } control = { .space = { 0 } };
        struct iovec iov = { .iov_base = (void *)(uintptr_t)data, .iov_len = len };
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
        uint32_t n_fds = input ? input_u8(input) % (FDS_MAX + 1) : 0;
        int fds[FDS_MAX];

        for (uint32_t i = 0; i < n_fds; i++)
                fds[i] = descriptor(input);
        if (n_fds) {
                msg.msg_control = control.space;
                msg.msg_controllen = CMSG_SPACE(sizeof(int) * n_fds);
                control.head.cmsg_level = SOL_SOCKET;
                control.head.cmsg_type = SCM_RIGHTS;
                control.head.cmsg_len = CMSG_LEN(sizeof(int) * n_fds);
                memcpy(CMSG_DATA(&control.head), fds, sizeof(int) * n_fds);
        }
        (void)!sendmsg(fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
        for (uint32_t i = 0; i < n_fds; i++)
                close(fds[i]);
        turn(scene);
}

/* @input: descriptors come with it; NULL: none. */
static void say_message(struct scene *scene, int fd, uint32_t type, const ProtobufCMessage *message,
                        struct input *input)
{
        size_t len = ae_control_size(message);
        struct ae_control_frame head = { .len = ae_u32(len), .type = (uint16_t)type };
        char *frame = malloc(sizeof(head) + len);

        assert_non_null(frame);
        memcpy(frame, &head, sizeof(head));
        ae_control_pack(message, (uint8_t *)frame + sizeof(head));
        say(scene, fd, frame, sizeof(head) + len, input);
        free(frame);
}

static void say_hello(struct scene *scene, int fd, struct input *input)
{
        Autoep__Hello hello = AUTOEP__HELLO__INIT;
        uint8_t how = input_u8(input);
        char job[] = "job", token[] = "secret";

        hello.version = AE_WIRE_VERSION;
        hello.job = job;
        hello.token = token;
        hello.world = 1 + (how & 1);
        hello.rank = how >> 1 & 1;
        hello.reader = how >> 2 & 1;
        hello.incarnation = how;
        hello.ring_len = AE_LOCAL_RING_MIN;
        say_message(scene, fd, AE_CONTROL_HELLO, &hello.base, how & 8 ? input : NULL);
}

static void say_register(struct scene *scene, int fd, struct input *input)
{
        Autoep__Register message = AUTOEP__REGISTER__INIT;
        Autoep__Model model = AUTOEP__MODEL__INIT;
        Autoep__Tensor tensor = AUTOEP__TENSOR__INIT;
        Autoep__Tensor *tensors[] = { &tensor };
        char name[] = "w", unit[] = "u", none[] = "";
        uint64_t dim = W_N;

        tensor.name = name;
        tensor.unit = unit;
        tensor.alias_of = none;
        tensor.dtype = AE_DTYPE_F32;
        tensor.tensor_class = AE_CLASS_DENSE;
        tensor.dims = &dim;
        tensor.n_dims = 1;
        model.tensors = tensors;
        model.n_tensors = 1;
        message.model = &model;
        message.init_len = W_N * 4;
        say_message(scene, fd, AE_CONTROL_REGISTER, &message.base, input);
}

static void say_invented(struct scene *scene, int fd, struct input *input)
{
        struct invent invent = { .draw = draw_byte, .user = input };
        uint32_t type;
        ProtobufCMessage *message = invent_control(&invent, &type);

        say_message(scene, fd, type, message, input);
        ae_control_free(message);
}

static void say_ctl(struct scene *scene, int fd, struct input *input)
{
        static const char *const commands[] = { "status", "jobs", "workers", "units", "tensors",
                                                "shards", "experts", "groups", "stats", "other" };
        Autoep__CtlRequest request = AUTOEP__CTL_REQUEST__INIT;
        char none[] = "";

        request.version = AE_WIRE_VERSION;
        request.command = (char *)(uintptr_t)commands[input_below(input, AE_ARRAY_LEN(commands))];
        request.job = request.tensor = request.unit = none;
        say_message(scene, fd, AE_CONTROL_CTL_REQUEST, &request.base, NULL);
}

/* A frame's head that is nearly right, and some of its bytes; or any bytes. */
static void say_raw(struct scene *scene, int fd, struct input *input)
{
        uint8_t how = input_u8(input);
        struct ae_control_frame head = { .len = how & 1 ? input_u32(input) : input_u8(input),
                                         .type = input_u8(input) % 48 };
        size_t len = input_u8(input);
        const uint8_t *data = input_take(input, &len);

        if (how & 2)
                say(scene, fd, &head, sizeof(head), how & 4 ? input : NULL);
        say(scene, fd, data, len, how & 8 ? input : NULL);
}

static void hear(int fd)
{
        static char heard[65536];

        while (recv(fd, heard, sizeof(heard), MSG_DONTWAIT) > 0)
                continue; /* descriptors that came with it are dropped with it */
}

static void act(struct scene *scene, struct input *input)
{
        uint8_t how = input_u8(input);
        int *fd = &scene->fds[(how >> 4) % PROCESSES];

        if (*fd < 0)
                *fd = connect_to(scene);
        switch (how & 15) {
        case 0:
                close(*fd);
                *fd = -1;
                turn(scene);
                return;
        case 1:
                ae_node_tick(scene->node, ae_now_ns());
                ae_sessions_tick(scene->sessions, ae_now_ns() + (how & 0x40 ? AE_NS_PER_S * 9 : 0));
                turn(scene);
                return;
        case 2:
                hear(*fd);
                return;
        case 3:
        case 4:
                say_hello(scene, *fd, input);
                return;
        case 5:
        case 6:
                say_register(scene, *fd, input);
                return;
        case 7:
                say_ctl(scene, *fd, input);
                return;
        case 8:
        case 9:
                say_raw(scene, *fd, input);
                return;
        default:
                say_invented(scene, *fd, input);
        }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
        static struct scene scene;
        static bool warm;
        struct input input = { data, len };
        uint32_t before;
        int fd;

        ae_log_init("fuzz", AE_LOG_ERROR);
        if (!warm) { /* what libuv opens once for all loops */
                scene_open(&scene);
                scene_close(&scene);
                warm = true;
        }
        before = count_fds();
        scene_open(&scene);
        while (input.len > 0)
                act(&scene, &input);
        for (uint32_t i = 0; i < PROCESSES; i++) {
                if (scene.fds[i] >= 0)
                        close(scene.fds[i]);
        }
        turn(&scene);
        fd = connect_to(&scene); /* it serves as before */
        say_ctl(&scene, fd, &input);
        assert_true(recv(fd, &scene.fds[0], sizeof(scene.fds[0]), MSG_DONTWAIT) > 0);
        close(fd);
        scene_close(&scene);
        assert_int_equal(count_fds(), before);
        return 0;
}
