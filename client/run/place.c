/* SPDX-License-Identifier: Apache-2.0 */
/* Paths and ports. */
#include "client/run/place.h"

#include "client/run/options.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define DIR_PATTERN "/autoep-run.XXXXXX"
#define LONGEST_NAME "/notify-9999.sock"

int ae_run_place_new(char ret_dir[AE_RUN_PATH_MAX])
{
        const char *roots[] = { getenv("XDG_RUNTIME_DIR"), getenv("TMPDIR"), "/tmp" };
        int err = ENOENT;

        for (size_t i = 0; i < AE_ARRAY_LEN(roots); i++) {
                const char *root = roots[i];
                char dir[AE_RUN_PATH_MAX];

                if (!root || root[0] != '/' ||
                    strlen(root) + strlen(DIR_PATTERN LONGEST_NAME) >= AE_RUN_PATH_MAX)
                        continue;
                (void)snprintf(dir, sizeof(dir), "%s" DIR_PATTERN, root);
                if (mkdtemp(dir)) {
                        strcpy(ret_dir, dir);
                        return 0;
                }
                err = errno;
        }
        return ae_fail_sys(err, "cannot make a private directory in $XDG_RUNTIME_DIR, $TMPDIR or "
                           "/tmp");
}

void ae_run_place_socket(const char *dir, const char *kind, uint32_t node,
                         char ret_path[AE_RUN_PATH_MAX])
{
        int len = snprintf(ret_path, AE_RUN_PATH_MAX, "%s/%s-%u.sock", dir, kind, node);

        assert(len > 0 && len < AE_RUN_PATH_MAX);
}

/* A socket bound to a free port of the loopback, which it keeps from others while it is open. */
static int port_take(int *ret_fd, uint16_t *ret_port)
{
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        struct sockaddr_in address = { .sin_family = AF_INET,
                                       .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
        socklen_t len = sizeof(address);

        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0 || bind(fd, (struct sockaddr *)&address, len) < 0 ||
            getsockname(fd, (struct sockaddr *)&address, &len) < 0)
                return ae_fail_sys(errno, "cannot find a free port on 127.0.0.1");
        *ret_port = ntohs(address.sin_port);
        *ret_fd = ae_steal_fd(&fd);
        return 0;
}

/* All are held until the last is found, so that they differ. */
static int write_ports(FILE *out, uint32_t n)
{
        int fds[AE_RUN_NODES_MAX];
        uint32_t n_taken = 0;
        uint16_t port = 0;
        int r = 0;

        assert(n <= AE_RUN_NODES_MAX);
        for (; n_taken < n; n_taken++) {
                r = port_take(&fds[n_taken], &port);
                if (r < 0)
                        break;
                fprintf(out, "%s127.0.0.1:%u", n_taken ? "," : "", port);
        }
        for (uint32_t i = 0; i < n_taken; i++)
                close(fds[i]);
        return r;
}

static void write_sockets(FILE *out, const char *dir, uint32_t n)
{
        char path[AE_RUN_PATH_MAX];

        for (uint32_t i = 0; i < n; i++) {
                ae_run_place_socket(dir, "peer", i, path);
                fprintf(out, "%s%s", i ? "," : "", path);
        }
}

int ae_run_place_peers(const char *transport, const char *dir, uint32_t n, char **ret_peers)
{
        AE_CLEANUP(ae_cleanup_free) char *peers = NULL;
        size_t len;
        FILE *out = open_memstream(&peers, &len);
        int r = 0;

        if (!out)
                return ae_fail(AE_ENOMEM, "no memory for %u addresses", n);
        if (strcmp(transport, "tcp") == 0)
                r = write_ports(out, n);
        else
                write_sockets(out, dir, n);
        if (fclose(out) != 0)
                return ae_fail(AE_ENOMEM, "no memory for %u addresses", n);
        if (r < 0)
                return r;
        *ret_peers = ae_steal(peers);
        return 0;
}

/* DIR/NAME as it stands, when it can be run. */
static char *runnable(const char *dir, size_t dir_len, const char *name)
{
        AE_CLEANUP(ae_cleanup_free) char *path = NULL;

        if (asprintf(&path, "%.*s/%s", (int)dir_len, dir, name) < 0)
                path = NULL;
        return path && access(path, X_OK) == 0 ? ae_steal(path) : NULL;
}

static char *beside_this(void)
{
        static const char *const names[] = { "../../server/autoepd", "autoepd", "../sbin/autoepd" };
        char self[PATH_MAX];
        ssize_t len = readlink("/proc/self/exe", self, sizeof(self) - 1);
        char *path = NULL;

        if (len <= 0)
                return NULL;
        self[len] = '\0';
        for (size_t i = 0; i < AE_ARRAY_LEN(names) && !path; i++)
                path = runnable(self, (size_t)(strrchr(self, '/') - self), names[i]);
        return path;
}

static char *in_path(void)
{
        const char *at = getenv("PATH");
        char *path = NULL;

        while (at && !path) {
                size_t len = strcspn(at, ":");

                /* An empty entry means the current directory, which nobody means. */
                if (len > 0)
                        path = runnable(at, len, "autoepd");
                at = at[len] ? at + len + 1 : NULL;
        }
        return path;
}

int ae_run_place_daemon(char **ret_path)
{
        const char *named = getenv("AUTOEP_AUTOEPD");
        char *path;

        if (named && *named) {
                if (access(named, X_OK) < 0)
                        return ae_fail(AE_ENOENT, "cannot run the daemon %s of $AUTOEP_AUTOEPD: %s",
                                       named, strerror(errno));
                path = strdup(named);
        } else {
                path = beside_this();
                if (!path)
                        path = in_path();
        }
        if (!path)
                return ae_fail(AE_ENOENT, "cannot find autoepd beside autoep-run or in PATH: name "
                               "it in $AUTOEP_AUTOEPD");
        *ret_path = path;
        return 0;
}
