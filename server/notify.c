/* SPDX-License-Identifier: Apache-2.0 */
/* The protocol of sd_notify(3): a datagram to $NOTIFY_SOCKET, a path or an abstract name. */
#include "server/notify.h"

#include "proto/base/cleanup.h"
#include "proto/base/log.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

void ae_notify(const char *state)
{
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        const char *path = getenv("NOTIFY_SOCKET");
        size_t len;
        ssize_t n;

        if (!path || (path[0] != '/' && path[0] != '@'))
                return;
        len = strlen(path);
        if (len >= sizeof(address.sun_path))
                return;
        memcpy(address.sun_path, path, len);
        if (path[0] == '@')
                address.sun_path[0] = '\0';
        fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        do {
                n = sendto(fd, state, strlen(state), MSG_NOSIGNAL, (struct sockaddr *)&address,
                           (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len));
        } while (n < 0 && errno == EINTR);
        if (n < 0)
                ae_log_warn("cannot notify %s: %s", path, strerror(errno));
}
