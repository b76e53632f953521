/* SPDX-License-Identifier: Apache-2.0 */
/* The receiving side of sd_notify(3). */
#include "client/run/child.h"

#include "proto/base/cleanup.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int ae_run_notify_open(const char *path, int *ret_fd)
{
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        struct sockaddr_un address = { .sun_family = AF_UNIX };

        assert(strlen(path) < sizeof(address.sun_path));
        strcpy(address.sun_path, path);
        (void)unlink(path); /* of a start that failed */
        fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
                return ae_fail_sys(errno, "cannot open the readiness socket %s", path);
        *ret_fd = ae_steal_fd(&fd);
        return 0;
}

static bool read_message(char *message, char *said, size_t said_size)
{
        bool ready = false;
        char *rest;

        for (char *line = strtok_r(message, "\n", &rest); line;
             line = strtok_r(NULL, "\n", &rest)) {
                if (strcmp(line, "READY=1") == 0)
                        ready = true;
                else if (strncmp(line, "STATUS=", 7) == 0)
                        (void)snprintf(said, said_size, "%s", line + 7);
        }
        return ready;
}

bool ae_run_notify_read(int fd, char *said, size_t said_size)
{
        char message[4096];
        bool ready = false;
        ssize_t n;

        while ((n = recv(fd, message, sizeof(message) - 1, 0)) >= 0) {
                message[n] = '\0';
                ready |= read_message(message, said, said_size);
        }
        return ready;
}
