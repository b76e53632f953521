/* SPDX-License-Identifier: Apache-2.0 */
/* The listener of the daemon's unix socket when accept4() fails: it neither spins nor is lost. */
#include "tests/lib/fault.h"
#include "tests/lib/test.h"

#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/control.h"
#include "server/session.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define TURNS 100

struct scene {
        char dir[64], path[96];
        uv_loop_t loop;
        struct ae_sessions *sessions;
        uint32_t n_inspected;
};

static int inspect(void *user, const Autoep__CtlRequest *request, char **ret_text)
{
        struct scene *scene = user;

        (void)request;
        scene->n_inspected++;
        *ret_text = strdup("{}");
        return 0;
}

static int setup(void **state)
{
        static struct scene scene;
        struct ae_sessions_options options = { .loop = &scene.loop, .path = scene.path,
                                               .inspect = inspect, .user = &scene };

        scene = (struct scene){ .dir = "/tmp/autoep-session.XXXXXX" };
        assert_non_null(mkdtemp(scene.dir));
        (void)snprintf(scene.path, sizeof(scene.path), "%s/sock", scene.dir);
        assert_int_equal(uv_loop_init(&scene.loop), 0);
        fault_accept_arm(0, 0);
        assert_int_equal(ae_sessions_new(&options, &scene.sessions), 0);
        *state = &scene;
        return 0;
}

static int teardown(void **state)
{
        struct scene *scene = *state;

        ae_sessions_free(scene->sessions);
        uv_run(&scene->loop, UV_RUN_DEFAULT);
        assert_int_equal(uv_loop_close(&scene->loop), 0);
        assert_int_equal(rmdir(scene->dir), 0);
        return 0;
}

/* A process that asks for control; its request lies in the socket. */
static int ask(const struct scene *scene)
{
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        Autoep__CtlRequest request = AUTOEP__CTL_REQUEST__INIT;
        struct ae_control_frame head = { .type = AE_CONTROL_CTL_REQUEST };
        uint8_t body[256];
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

        assert_true(fd >= 0);
        (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", scene->path);
        assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
        request.version = AE_WIRE_VERSION;
        head.len = (uint32_t)ae_control_size(&request.base);
        ae_control_pack(&request.base, body);
        assert_int_equal(send(fd, &head, sizeof(head), 0), sizeof(head));
        assert_int_equal(send(fd, body, head.len, 0), head.len);
        return fd;
}

static void turn(struct scene *scene, uint32_t n)
{
        while (n-- > 0)
                uv_run(&scene->loop, UV_RUN_NOWAIT);
}

/* Nothing to take it with: one attempt with the descriptor in reserve, and then the listener sleeps
 * until there is room again. */
static void test_no_room(void **state)
{
        static const int errors[] = { EMFILE, ENFILE, ENOBUFS, ENOMEM };
        struct scene *scene = *state;

        for (uint32_t i = 0; i < AE_ARRAY_LEN(errors); i++) {
                int fd = ask(scene);

                fault_accept_arm(errors[i], UINT64_MAX);
                turn(scene, TURNS);
                assert_in_range(fault_accept_count(), 1, 3);
                assert_int_equal(scene->n_inspected, i);
                fault_accept_arm(0, 0);
                ae_sessions_tick(scene->sessions, ae_now_ns());
                turn(scene, TURNS);
                assert_int_equal(scene->n_inspected, i + 1);
                close(fd);
                turn(scene, TURNS); /* its end, too, makes the listener look again */
        }
}

/* One that is gone again, or that the system doesn't let through, is not about those behind it. */
static void test_gone_again(void **state)
{
        static const int errors[] = { ECONNABORTED, EINTR, EPROTO, EPERM };
        struct scene *scene = *state;

        for (uint32_t i = 0; i < AE_ARRAY_LEN(errors); i++) {
                int fd = ask(scene);

                fault_accept_arm(errors[i], 3);
                turn(scene, TURNS);
                assert_int_equal(scene->n_inspected, i + 1);
                close(fd);
        }
}

#define SCENE(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
        const struct CMUnitTest tests[] = { SCENE(test_no_room), SCENE(test_gone_again) };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
