/* SPDX-License-Identifier: Apache-2.0 */
/* autoepd: settings, signals, exit code. */
#include "kernels/ops.h"
#include "proto/base/log.h"
#include "proto/base/status.h"
#include "server/config.h"
#include "server/daemon.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

static struct ae_daemon *running;

static void on_signal(int signal)
{
        (void)signal;
        ae_daemon_stop(running); /* uv_async_send(): safe in a signal handler */
}

static void catch_signals(void)
{
        struct sigaction action = { .sa_handler = on_signal };

        sigaction(SIGTERM, &action, NULL);
        sigaction(SIGINT, &action, NULL);
        signal(SIGPIPE, SIG_IGN);
}

/* The soft limit keeps programs that use select() safe, which this one doesn't: a connection to a
 * peer, a worker and a job take several descriptors each. */
static void raise_limits(void)
{
        struct rlimit limit;
        rlim_t old;

        if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur == limit.rlim_max)
                return;
        old = limit.rlim_cur;
        limit.rlim_cur = limit.rlim_max;
        if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
                ae_log_warn("cannot raise its limit of open files from=%llu to=%llu: %s",
                            (unsigned long long)old, (unsigned long long)limit.rlim_max,
                            strerror(errno));
        else
                ae_log_info("raised its limit of open files from=%llu to=%llu",
                            (unsigned long long)old, (unsigned long long)limit.rlim_max);
}

int main(int argc, char **argv)
{
        struct ae_config config;
        int r = ae_config_read(&config, argc, argv);

        if (r == 0) {
                ae_ops(); /* ends the process if AUTOEP_CPU names none that there is */
                ae_log_init("autoepd", config.log_level);
                raise_limits();
                r = ae_daemon_new(&config, &running);
        }
        if (r < 0)
                fprintf(stderr, "autoepd: %s\n", ae_error_text());
        if (r == 0) {
                catch_signals();
                ae_daemon_run(running, 1);
                ae_daemon_free(running);
        }
        ae_config_free(&config);
        if (r == AE_EINVAL)
                return 2;
        return r < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
