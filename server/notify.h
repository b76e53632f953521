/* SPDX-License-Identifier: Apache-2.0 */
/* Says READY=1, STATUS=… and the like to who started us; sd_notify(3), without its library. */
#pragma once

/* Does nothing without $NOTIFY_SOCKET. A failing datagram is logged once and is nobody's end. */
void ae_notify(const char *state);
