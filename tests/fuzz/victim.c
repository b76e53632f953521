/* SPDX-License-Identifier: Apache-2.0 */
/* An endpoint under attack; see victim.h. */
#include "tests/fuzz/victim.h"

#include "tests/lib/test.h"

#include "proto/base/clock.h"
#include "proto/base/status.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define VERSION 1
#define CLUSTER 7
#define WAIT_NS (60 * AE_NS_PER_S)
#define EVENTS 16

static char *make_memory(int *ret_fd)
{
        void *memory;

        *ret_fd = memfd_create("victim", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        assert_true(*ret_fd >= 0);
        assert_int_equal(ftruncate(*ret_fd, 3 * VICTIM_PAGE), 0);
        assert_int_equal(fcntl(*ret_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), 0);
        memory = mmap(NULL, 3 * VICTIM_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, *ret_fd, 0);
        assert_ptr_not_equal(memory, MAP_FAILED);
        return memory;
}

struct victim *victim_get(const char *name)
{
        static struct victim victim;
        char address[AE_NET_ADDR_MAX] = "127.0.0.1:0";
        struct ae_net_options options = {
                .self = { .version = VERSION, .node = 1, .incarnation = 1, .cluster = CLUSTER },
                .listen = address, .handshake_ns = 3600 * AE_NS_PER_S,
        };
        int fd;

        if (victim.net)
                return &victim;
        if (strcmp(name, "shm") == 0)
                (void)snprintf(address, sizeof(address), "@autoep-fuzz-%d", (int)getpid());
        if (ae_net_open(name, &options, &victim.net) < 0)
                fail_msg("%s", ae_error_text());
        assert_int_equal(ae_net_address(victim.net, victim.address), 0);
        victim.memory = make_memory(&fd);
        assert_int_equal(ae_net_map(victim.net, victim.memory, 3 * VICTIM_PAGE, fd, 0, &victim.mem),
                         0);
        return &victim;
}

static void grant(struct victim *victim)
{
        for (int i = 0; i < 2; i++)
                assert_int_equal(ae_net_grant(victim->conn, victim->mem, VICTIM_PAGE, VICTIM_PAGE,
                                              &victim->keys[i]), 0);
        assert_int_equal(ae_net_revoke(victim->conn, &victim->keys[1]), 0);
}

static void on_event(struct victim *victim, const struct ae_net_event *event)
{
        switch (event->kind) {
        case AE_NET_EV_UP:
                assert_null(victim->conn);
                victim->conn = event->conn;
                grant(victim);
                break;
        case AE_NET_EV_DOWN:
                assert_ptr_equal(event->conn, victim->conn);
                victim->down = true;
                break;
        case AE_NET_EV_REFUSED:
                assert_true(strlen(event->text) > 0);
                victim->n_refused++;
                break;
        case AE_NET_EV_MSG:
                assert_true(event->len <= AE_NET_MSG_MAX);
                break;
        case AE_NET_EV_NOTIFY:
                assert_ptr_equal(event->mem, victim->mem);
                assert_in_range(event->off, VICTIM_PAGE, 2 * VICTIM_PAGE);
                assert_true(event->len <= 2 * VICTIM_PAGE - event->off);
                break;
        case AE_NET_EV_PUT_DONE:
        case AE_NET_EV_WRITABLE:
                fail_msg("the victim sends nothing, yet has event %d", event->kind);
        }
}

void victim_turn(struct victim *victim)
{
        struct ae_net_event events[EVENTS];
        int n;

        do {
                n = ae_net_poll(victim->net, events, EVENTS);
                for (int i = 0; i < n; i++)
                        on_event(victim, &events[i]);
        } while (n > 0);
}

void victim_until(struct victim *victim, bool (*flag)(const struct victim *victim))
{
        uint64_t end_ns = ae_now_ns() + WAIT_NS;

        for (;;) {
                victim_turn(victim);
                if (flag(victim))
                        return;
                if (ae_now_ns() > end_ns)
                        fail_msg("what the input waits for never came");
                (void)sched_yield();
        }
}

bool victim_is_up(const struct victim *victim)
{
        return victim->conn || victim->n_refused > 0;
}

bool victim_is_rid(const struct victim *victim)
{
        return victim->conn ? victim->down : victim->n_refused > 0;
}

void victim_hello(uint8_t kind, uint64_t token, uint8_t ret_frame[AE_HELLO_SIZE])
{
        struct ae_hello hello = {
                .kind = kind, .n_streams = 1, .token = token,
                .who = { .version = VERSION, .node = 2, .incarnation = 1, .cluster = CLUSTER },
        };

        ae_hello_encode(&hello, ret_frame);
}

bool victim_answer(struct victim *victim, int fd, void *data, size_t len)
{
        uint64_t end_ns = ae_now_ns() + WAIT_NS;
        size_t got = 0;

        while (got < len) {
                ssize_t n = recv(fd, (char *)data + got, len - got, MSG_DONTWAIT);

                if (n == 0 || (n < 0 && errno != EAGAIN))
                        return false;
                got += n > 0 ? (size_t)n : 0;
                victim_turn(victim);
                if (ae_now_ns() > end_ns)
                        fail_msg("the victim never answered");
        }
        return true;
}

void victim_end(struct victim *victim)
{
        static const char zeros[VICTIM_PAGE];

        victim_until(victim, victim_is_rid);
        if (victim->conn)
                ae_net_conn_close(victim->conn);
        victim_turn(victim);
        assert_memory_equal(victim->memory, zeros, VICTIM_PAGE);
        assert_memory_equal(victim->memory + (size_t)2 * VICTIM_PAGE, zeros, VICTIM_PAGE);
        victim->conn = NULL;
        victim->down = false;
        victim->n_refused = 0;
}
