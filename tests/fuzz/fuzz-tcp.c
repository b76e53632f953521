/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tcp transport from a raw socket. The first byte says whether the input is the beginning of a
 * connection, or what comes after a good one: chunks for the control or the data stream, of any
 * bytes or as a frame that is nearly right.
 */
#include "tests/fuzz/victim.h"
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/net/tcp-addr.h"
#include "proto/net/tcp.h"

#include <unistd.h>

/* With a reset at its end, so that no closed connection lingers in the kernel. */
static int dial(const struct victim *victim)
{
        const struct linger reset = { .l_onoff = 1, .l_linger = 0 };
        struct sockaddr_storage address;
        socklen_t len;
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

        assert_true(fd >= 0);
        assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)), 0);
        assert_int_equal(ae_tcp_addr_parse(victim->address, &address, &len), 0);
        assert_int_equal(connect(fd, (void *)&address, len), 0);
        return fd;
}

/* The victim may have hung up. */
static void say(struct victim *victim, int fd, const void *data, size_t len)
{
        (void)!send(fd, data, len, MSG_NOSIGNAL | MSG_DONTWAIT);
        victim_turn(victim);
}

/* Control and data stream of a connection that is up. */
static void attach(struct victim *victim, int ret_fds[2])
{
        uint8_t frame[AE_HELLO_SIZE], go[8];
        struct ae_hello answer;

        ret_fds[0] = dial(victim);
        victim_hello(AE_HELLO_TCP, 0, frame);
        say(victim, ret_fds[0], frame, sizeof(frame));
        assert_true(victim_answer(victim, ret_fds[0], frame, sizeof(frame)));
        assert_int_equal(ae_hello_decode(frame, AE_HELLO_TCP, AE_HELLO_TCP, &answer), 0);
        victim_hello(AE_HELLO_STREAM, answer.token, frame);
        ret_fds[1] = dial(victim);
        say(victim, ret_fds[1], frame, sizeof(frame));
        assert_true(victim_answer(victim, ret_fds[0], go, sizeof(go)));
        victim_until(victim, victim_is_up);
        assert_non_null(victim->conn);
}

static void send_msg(struct victim *victim, int fd, struct input *input)
{
        struct tcp_ctl_frame frame = { .type = TCP_FRAME_MSG };
        size_t len = input_u8(input);
        const uint8_t *data;

        frame.len = (uint32_t)len + input_below(input, 3);
        data = input_take(input, &len);
        say(victim, fd, &frame, sizeof(frame));
        say(victim, fd, data, len);
}

/* A put of any figures into memory that was granted or not, then some of its bytes. */
static void send_put(struct victim *victim, int fd, struct input *input)
{
        static const char payload[VICTIM_PAGE] = { 1 };
        uint8_t how = input_u8(input);
        struct tcp_put_frame put = { .type = TCP_PUT_TYPE, .n_parts = how >> 6 ? 1 : how >> 4 };

        memcpy(put.key, &victim->keys[how & 1], sizeof(put.key));
        put.part = how & 2 ? input_u8(input) : 0;
        put.seq = how & 4 ? input_u64(input) : 0;
        put.off = input_u16(input);
        put.len = how & 8 ? input_u64(input) : input_u16(input);
        put.note = input_u8(input);
        say(victim, fd, &put, sizeof(put));
        say(victim, fd, payload, AE_MIN(put.len, sizeof(payload)));
}

static void send_raw(struct victim *victim, int fd, struct input *input)
{
        size_t len = input_u8(input);
        const uint8_t *data = input_take(input, &len);

        say(victim, fd, data, len);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
        struct victim *victim = victim_get("tcp");
        struct input input = { data, len };
        int fds[2] = { -1, -1 };

        if (input_u8(&input) & 1) {
                fds[0] = dial(victim);
                say(victim, fds[0], input.data, input.len);
        } else {
                attach(victim, fds);
                while (input.len > 0) {
                        uint8_t how = input_u8(&input);

                        if (how % 3 == 0)
                                send_raw(victim, fds[how >> 7], &input);
                        else if (how % 3 == 1)
                                send_msg(victim, fds[0], &input);
                        else
                                send_put(victim, fds[1], &input);
                }
        }
        for (int i = 0; i < 2; i++)
                if (fds[i] >= 0)
                        close(fds[i]);
        victim_end(victim);
        return 0;
}
