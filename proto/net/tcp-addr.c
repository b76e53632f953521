/* SPDX-License-Identifier: Apache-2.0 */
/* Addresses of the tcp transport; see tcp-addr.h. */
#include "proto/net/tcp-addr.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/status.h"

static int parse_port(const char *text, uint16_t *ret_port)
{
        char *end;
        unsigned long port = strtoul(text, &end, 10);

        if (text[0] < '0' || text[0] > '9' || *end || port > UINT16_MAX)
                return AE_EINVAL;
        *ret_port = (uint16_t)port;
        return 0;
}

/* Cuts "HOST:PORT" or "[HOST]:PORT" in place. */
static int split(char *text, char **ret_host, const char **ret_port)
{
        char *colon = strrchr(text, ':');

        if (!colon)
                return AE_EINVAL;
        *colon = '\0';
        *ret_port = colon + 1;
        *ret_host = text;
        if (text[0] != '[')
                return 0;
        if (colon == text || colon[-1] != ']')
                return AE_EINVAL;
        colon[-1] = '\0';
        *ret_host = text + 1;
        return 0;
}

int ae_tcp_addr_parse(const char *text, struct sockaddr_storage *ret_addr, socklen_t *ret_len)
{
        struct sockaddr_in v4 = { .sin_family = AF_INET };
        struct sockaddr_in6 v6 = { .sin6_family = AF_INET6 };
        char copy[AE_NET_ADDR_MAX], *host;
        const char *port_text;
        uint16_t port;
        bool loopback;

        snprintf(copy, sizeof(copy), "%s", text);
        if (split(copy, &host, &port_text) < 0 || parse_port(port_text, &port) < 0)
                return ae_fail(AE_EINVAL, "%s is not an address of the form HOST:PORT", text);
        memset(ret_addr, 0, sizeof(*ret_addr));
        if (inet_pton(AF_INET, host, &v4.sin_addr) == 1) {
                v4.sin_port = htons(port);
                loopback = ntohl(v4.sin_addr.s_addr) >> 24 == 127;
                memcpy(ret_addr, &v4, sizeof(v4));
                *ret_len = sizeof(v4);
        } else if (inet_pton(AF_INET6, host, &v6.sin6_addr) == 1) {
                v6.sin6_port = htons(port);
                loopback = IN6_IS_ADDR_LOOPBACK(&v6.sin6_addr);
                memcpy(ret_addr, &v6, sizeof(v6));
                *ret_len = sizeof(v6);
        } else {
                return ae_fail(AE_EINVAL, "%s: the host is not a numeric address", text);
        }
        if (!loopback)
                return ae_fail(AE_EUNSUPPORTED,
                               "%s is not a loopback address: tcp between hosts needs daemons that "
                               "authenticate, which this build doesn't have", text);
        return 0;
}

void ae_tcp_addr_print(const struct sockaddr_storage *addr, char ret_text[AE_NET_ADDR_MAX])
{
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        char host[INET6_ADDRSTRLEN];

        memset(ret_text, 0, AE_NET_ADDR_MAX);
        if (addr->ss_family == AF_INET) {
                memcpy(&v4, addr, sizeof(v4));
                inet_ntop(AF_INET, &v4.sin_addr, host, sizeof(host));
                snprintf(ret_text, AE_NET_ADDR_MAX, "%s:%u", host, ntohs(v4.sin_port));
                return;
        }
        memcpy(&v6, addr, sizeof(v6));
        inet_ntop(AF_INET6, &v6.sin6_addr, host, sizeof(host));
        snprintf(ret_text, AE_NET_ADDR_MAX, "[%s]:%u", host, ntohs(v6.sin6_port));
}
