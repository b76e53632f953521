/* SPDX-License-Identifier: Apache-2.0 */
/* "HOST:PORT" with a numeric loopback host ("[::1]:PORT" for IPv6) to and from a sockaddr. Pure. */
#pragma once

#include <sys/socket.h>

#include "proto/net/net.h"

/* AE_EINVAL when it doesn't parse, AE_EUNSUPPORTED when the host is not a loopback address. */
int ae_tcp_addr_parse(const char *text, struct sockaddr_storage *ret_addr, socklen_t *ret_len);
void ae_tcp_addr_print(const struct sockaddr_storage *addr, char ret_text[AE_NET_ADDR_MAX]);
