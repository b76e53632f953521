/* SPDX-License-Identifier: Apache-2.0 */
/* Server and client are one shell line: the server serves once and ends with its client. */
#include "client/bench/iperf.h"

#include "client/bench/plain-tcp.h"

#include "proto/base/cleanup.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define OUTPUT_MAX ((size_t)1 << 20)
#define PLAIN_LEN (64 * AE_MIB)
#define PLAIN_REPEATS 8

static int free_port(uint16_t *ret_port)
{
        AE_CLEANUP(ae_cleanup_close) int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        struct sockaddr_in address = { .sin_family = AF_INET,
                                       .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
        socklen_t len = sizeof(address);

        if (fd < 0 || bind(fd, (struct sockaddr *)&address, len) < 0 ||
            getsockname(fd, (struct sockaddr *)&address, &len) < 0)
                return ae_fail_sys(errno, "cannot find a free port on 127.0.0.1");
        *ret_port = ntohs(address.sin_port);
        return 0;
}

double ae_bench_iperf_received(const char *json)
{
        const char *at = strstr(json, "\"sum_received\"");
        double bits;
        char *end;

        at = at ? strstr(at, "\"bits_per_second\"") : NULL;
        at = at ? strchr(at, ':') : NULL;
        if (!at)
                return 0;
        bits = strtod(at + 1, &end);
        return end != at + 1 && bits > 0 ? bits / 8 : 0;
}

/* 0 when iperf3 isn't there or fails: nobody promised it. */
static double run_iperf(uint16_t port, uint32_t streams, uint32_t seconds)
{
        AE_CLEANUP(ae_cleanup_free) char *text = calloc(1, OUTPUT_MAX);
        char line[320];
        FILE *out;

        (void)snprintf(line, sizeof(line),
                       "command -v iperf3 >/dev/null || exit 1; "
                       "timeout %u iperf3 -s -1 -B 127.0.0.1 -p %u >/dev/null 2>&1 & sleep 0.3; "
                       "timeout %u iperf3 -c 127.0.0.1 -p %u -P %u -t %u -J 2>/dev/null; wait",
                       seconds + 5, port, seconds + 4, port, streams, seconds);
        (void)fflush(NULL);
        out = text ? popen(line, "r") : NULL;
        if (!out)
                return 0;
        (void)!fread(text, 1, OUTPUT_MAX - 1, out);
        (void)pclose(out);
        return ae_bench_iperf_received(text);
}

int ae_bench_iperf(struct ae_bench *bench, uint32_t streams, uint32_t seconds)
{
        const struct ae_bench_tcp plain = { .len = PLAIN_LEN, .streams = streams, .n_from = 1,
                                            .n_to = 1, .repeats = PLAIN_REPEATS };
        struct ae_bench_row row = { .suite = "gather", .floor_name = "plain TCP",
                                    .len = PLAIN_LEN, .unit = AE_BENCH_GBPS };
        double received;
        uint64_t ns;
        uint16_t port = 0;
        int r = free_port(&port);

        if (r < 0)
                return r;
        received = run_iperf(port, streams, seconds);
        if (received <= 0)
                return 0;
        r = ae_bench_tcp_run(&plain, &ns);
        if (r < 0)
                return r;
        row.figure = received / (double)AE_NS_PER_S;
        row.floor = (double)PLAIN_LEN / (double)ns;
        (void)snprintf(row.name, sizeof(row.name), "iperf3, %u streams", streams);
        return ae_bench_add(bench, &row);
}
