/* SPDX-License-Identifier: Apache-2.0 */
/*
 * autoep-ctl's question to something that is no daemon: the first byte says whether a frame's head
 * of the right kind stands in front, the rest is what is answered, in two pieces, before it hangs
 * up.
 */
#include "tests/fuzz/input.h"
#include "tests/lib/test.h"

#include "client/ctl/ask.h"
#include "proto/base/clock.h"
#include "proto/base/status.h"
#include "proto/wire/control.h"

#include <pthread.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

struct liar {
        int fd; /* listens */
        struct input input;
};

static void *answer(void *user)
{
        struct liar *liar = user;
        struct ae_control_frame head = { 0 };
        uint8_t how = input_u8(&liar->input);
        size_t first = input_u8(&liar->input);
        char question[4096];
        int fd = accept4(liar->fd, NULL, NULL, SOCK_CLOEXEC);
        const uint8_t *data;

        assert_true(fd >= 0);
        if (how & 1) /* or it answers before it has heard */
                (void)!recv(fd, question, sizeof(question), 0);
        head.type = how & 2 ? AE_CONTROL_CTL_REPLY : AE_CONTROL_ERROR;
        head.len = (uint32_t)liar->input.len + (how >> 6);
        if (how & 4)
                (void)!send(fd, &head, sizeof(head), MSG_NOSIGNAL);
        data = input_take(&liar->input, &first);
        (void)!send(fd, data, first, MSG_NOSIGNAL);
        (void)!send(fd, liar->input.data, liar->input.len, MSG_NOSIGNAL);
        close(fd);
        return NULL;
}

/* An abstract name would do, but autoep-ctl takes paths. */
static int listen_at(char *path, size_t size)
{
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        static char dir[] = "/tmp/autoep-fuzz.XXXXXX";
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

        assert_true(fd >= 0);
        assert_non_null(mkdtemp(strcpy(dir, "/tmp/autoep-fuzz.XXXXXX")));
        (void)snprintf(path, size, "%s/sock", dir);
        memcpy(address.sun_path, path, strlen(path) + 1);
        assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
        assert_int_equal(listen(fd, 1), 0);
        return fd;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
        struct liar liar = { .input = { data, len } };
        char path[64];
        struct ae_ctl_question question = { .socket = path, .command = "status", .job = "",
                                            .tensor = "", .unit = "",
                                            .timeout_ns = 10 * AE_NS_PER_S };
        enum ae_ctl_exit code;
        pthread_t thread;
        char *text = NULL;
        int status = 1;

        liar.fd = listen_at(path, sizeof(path));
        assert_int_equal(pthread_create(&thread, NULL, answer, &liar), 0);
        code = ae_ctl_ask(&question, &text, &status);
        assert_int_equal(pthread_join(thread, NULL), 0);
        assert_true((code == AE_CTL_EXIT_OK) == (text != NULL));
        assert_true(code == AE_CTL_EXIT_OK ? status == 0 : status < 0 && ae_error_text()[0]);
        free(text);
        close(liar.fd);
        unlink(path);
        *strrchr(path, '/') = '\0';
        assert_int_equal(rmdir(path), 0);
        return 0;
}
