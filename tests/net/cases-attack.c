/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Conformance: peers that say wrong things, from raw sockets and, for shm, from a raw region. Each
 * may cost its own connection and nothing else.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "proto/net/shm.h"
#include "proto/net/tcp-addr.h"
#include "proto/net/tcp.h"
#include "tests/lib/fault.h"
#include "tests/net/conformance.h"

#define N_AHEAD 150 /* more than twice the striped puts that may be open */

/* A victim, a good peer of its, and a grant to attack. */
struct scene {
        struct bed *bed;
        struct peer *victim, *good;
        struct ae_net_conn *conn; /* of good */
        struct area area;
        struct ae_net_mem *mem;
        uint32_t n_good_msgs;
};

static void scene_open(struct scene *s, struct bed *bed, uint64_t handshake_ns)
{
        struct ae_net_options options = { .handshake_ns = handshake_ns };

        if (bed->sim)
                skip(); /* sim has no sockets */
        *s = (struct scene){ .bed = bed, .victim = bed_open_with(bed, 1, &options) };
        s->good = bed_open(bed, 2);
        s->conn = bed_connect(s->good, s->victim, NULL);
        s->area = area_new(65536);
        s->mem = area_map(s->victim, &s->area);
}

static void check_unharmed(struct scene *s)
{
        assert_int_equal(ae_net_msg(s->conn, "fine", 4), 0);
        bed_wait(s->victim, AE_NET_EV_MSG, ++s->n_good_msgs);
        assert_int_equal(s->good->n[AE_NET_EV_DOWN], 0);
        assert_int_equal(s->victim->n[AE_NET_EV_NOTIFY], 0);
        for (size_t i = 0; i < s->area.len; i++)
                assert_int_equal(s->area.base[i], 0);
}

static void scene_close(struct scene *s)
{
        check_unharmed(s);
        bed_close(s->victim);
        bed_close(s->good);
        area_free(&s->area);
}

static int raw_connect(const struct scene *s)
{
        bool tcp = bed_is("tcp");
        struct sockaddr_storage in;
        struct sockaddr_un un;
        socklen_t len;
        int fd = socket(tcp ? AF_INET : AF_UNIX, tcp ? SOCK_STREAM : SOCK_SEQPACKET, 0);

        assert_true(fd >= 0);
        if (tcp)
                assert_int_equal(ae_tcp_addr_parse(s->victim->address, &in, &len), 0);
        else
                assert_int_equal(ae_shm_addr_parse(s->victim->address, &un, &len), 0);
        assert_int_equal(connect(fd, tcp ? (void *)&in : (void *)&un, len), 0);
        return fd;
}

/* Sends what the socket takes; the victim may have hung up in the middle. */
static void raw_send(int fd, const void *data, size_t len)
{
        (void)!send(fd, data, len, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void random_fill(void *data, size_t len, uint64_t *seed)
{
        uint8_t *bytes = data;

        for (size_t i = 0; i < len; i++) {
                *seed = *seed * 6364136223846793005u + 1442695040888963407u;
                bytes[i] = (uint8_t)(*seed >> 56);
        }
}

/* Receives exactly @len bytes, turning the victim. */
static void raw_receive(struct scene *s, int fd, void *data, size_t len)
{
        size_t got = 0;

        while (got < len) {
                ssize_t n = recv(fd, (char *)data + got, len - got, MSG_DONTWAIT);

                assert_true(n > 0 || (n < 0 && errno == EAGAIN));
                if (n > 0)
                        got += (size_t)n;
                else
                        bed_turn(s->bed);
        }
}

void attack_random_bytes(void **state)
{
        uint64_t seed = 7;
        struct scene s;

        scene_open(&s, *state, 0);
        for (uint32_t i = 0; i < 40; i++) {
                uint8_t noise[4096];
                int fd = raw_connect(&s);

                random_fill(noise, sizeof(noise), &seed);
                raw_send(fd, noise, i < 20 ? 64 + i * 200 : i);
                bed_turn(*state);
                close(fd);
                bed_wait(s.victim, AE_NET_EV_REFUSED, i + 1);
                assert_int_not_equal(bed_record(s.victim, AE_NET_EV_REFUSED, i)->event.status, 0);
        }
        assert_int_equal(bed_stats(s.victim).refused, 40);
        assert_int_equal(s.victim->n[AE_NET_EV_DOWN], 0);
        scene_close(&s);
}

void attack_silence(void **state)
{
        struct ae_hello hello = { .kind = bed_is("tcp") ? AE_HELLO_TCP : AE_HELLO_SHM,
                                  .n_streams = 2,
                                  .who = { BED_VERSION, 9, 1, BED_CLUSTER } };
        uint8_t frame[AE_HELLO_SIZE];
        struct scene s;
        int fds[3];

        scene_open(&s, *state, 30 * UINT64_C(1000000));
        ae_hello_encode(&hello, frame);
        for (int i = 0; i < 3; i++)
                fds[i] = raw_connect(&s);
        raw_send(fds[1], frame, 20);
        raw_send(fds[2], frame, sizeof(frame)); /* a whole hello, but no more after it */
        bed_wait(s.victim, AE_NET_EV_REFUSED, 3);
        for (uint32_t i = 0; i < 3; i++) {
                struct record *record = bed_record(s.victim, AE_NET_EV_REFUSED, i);

                assert_int_equal(record->event.status, AE_ETIMEDOUT);
                assert_non_null(strstr(record->text, "deadline"));
                close(fds[i]);
        }
        assert_int_equal(s.victim->n[AE_NET_EV_UP], 1);
        scene_close(&s);
}

void attack_crowd(void **state)
{
        int fds[150];
        uint32_t before;
        struct scene s;

        scene_open(&s, *state, 0);
        before = count_fds();
        for (int i = 0; i < 150; i++)
                fds[i] = raw_connect(&s);
        bed_settle(*state);
        assert_int_equal(count_fds(), before + 150 + AE_NET_PENDING_MAX);
        check_unharmed(&s);
        for (int i = 0; i < 150; i++)
                close(fds[i]);
        bed_wait(s.victim, AE_NET_EV_REFUSED, 150);
        bed_connect(bed_open(*state, 3), s.victim, NULL);
        scene_close(&s);
}

/* --- guests that cannot be let in now --- */

/* No descriptor is free: guests wait, nothing spins, and they are let in once there is one, though
 * nothing else happens to the endpoint. */
void no_descriptor_for_a_guest(void **state)
{
        struct rlimit old, none;
        uint8_t noise[64] = { 0 };
        struct scene s;
        int fds[3];

        scene_open(&s, *state, 0);
        for (uint32_t i = 0; i < 3; i++)
                fds[i] = raw_connect(&s);
        assert_int_equal(getrlimit(RLIMIT_NOFILE, &old), 0);
        none = old;
        none.rlim_cur = (rlim_t)dup(fds[0]); /* the lowest that is free */
        close((int)none.rlim_cur);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
        fault_accept_arm(0, 0);
        for (uint32_t i = 0; i < 100; i++)
                bed_turn(*state);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &old), 0);
        assert_in_range(fault_accept_count(), 1, 210); /* each endpoint once a turn at most */
        for (uint32_t i = 0; i < 3; i++)
                raw_send(fds[i], noise, sizeof(noise));
        bed_wait(s.victim, AE_NET_EV_REFUSED, 3);
        for (uint32_t i = 0; i < 3; i++)
                close(fds[i]);
        scene_close(&s);
}

/* What accept4() says of one of them is not about those behind it. */
void guests_that_hang_up_in_the_queue(void **state)
{
        static const int errors[] = { ECONNABORTED, EPROTO, EPERM, ENETDOWN, EINTR, ENOBUFS };
        uint8_t noise[64] = { 0 };
        struct scene s;

        scene_open(&s, *state, 0);
        for (uint32_t i = 0; i < AE_ARRAY_LEN(errors); i++) {
                int fd = raw_connect(&s);

                raw_send(fd, noise, sizeof(noise));
                fault_accept_arm(errors[i], 3);
                bed_wait(s.victim, AE_NET_EV_REFUSED, i + 1);
                close(fd);
        }
        scene_close(&s);
}

/* --- after a good handshake --- */

struct attacker {
        int ctl, data, data_2;     /* sockets; data: tcp only, data_2: for a pair of streams */
        struct shm_region *region; /* shm: ours */
        int bell;
        struct ae_net_conn *conn; /* the victim's end */
};

static void attacker_close(struct attacker *at)
{
        close(at->ctl);
        if (at->data >= 0)
                close(at->data);
        if (at->data_2 >= 0)
                close(at->data_2);
        if (at->bell >= 0)
                close(at->bell);
        if (at->region)
                munmap(at->region, sizeof(*at->region));
}

static int tcp_join(struct scene *s, struct ae_hello *hello, uint8_t stream)
{
        uint8_t frame[AE_HELLO_SIZE];
        int fd = raw_connect(s);

        hello->stream = stream;
        ae_hello_encode(hello, frame);
        raw_send(fd, frame, sizeof(frame));
        return fd;
}

static void tcp_attach(struct scene *s, struct attacker *at, uint8_t n_streams)
{
        struct ae_hello hello = { .kind = AE_HELLO_TCP, .n_streams = n_streams,
                                  .who = { BED_VERSION, 9, 1, BED_CLUSTER } }, answer;
        uint8_t frame[AE_HELLO_SIZE], go[8];

        at->ctl = raw_connect(s);
        ae_hello_encode(&hello, frame);
        raw_send(at->ctl, frame, sizeof(frame));
        raw_receive(s, at->ctl, frame, sizeof(frame));
        assert_int_equal(ae_hello_decode(frame, AE_HELLO_TCP, AE_HELLO_TCP, &answer), 0);
        hello.kind = AE_HELLO_STREAM;
        hello.token = answer.token;
        at->data = tcp_join(s, &hello, 0);
        if (n_streams == 2)
                at->data_2 = tcp_join(s, &hello, 1);
        raw_receive(s, at->ctl, go, sizeof(go));
        assert_int_equal(go[4], TCP_FRAME_GO);
}

/* A memfd of @len bytes, sealed or not. */
static int region_fd(uint64_t len, bool sealed)
{
        int fd = memfd_create("attack", MFD_ALLOW_SEALING);

        assert_true(fd >= 0);
        assert_int_equal(ftruncate(fd, (off_t)len), 0);
        if (sealed)
                assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
        return fd;
}

/* Says hello on shm and offers @fd as region. */
static void shm_offer(struct scene *s, struct attacker *at, int fd, uint32_t n_fds)
{
        struct ae_hello hello = { .kind = AE_HELLO_SHM, .who = { BED_VERSION, 9, 1, BED_CLUSTER } };
        struct shm_ctl attach = { .type = SHM_CTL_ATTACH };
        uint8_t frame[AE_HELLO_SIZE];
        int fds[2] = { fd, -1 };

        at->data = -1;
        at->ctl = raw_connect(s);
        at->bell = fds[1] = eventfd(0, 0);
        ae_hello_encode(&hello, frame);
        raw_send(at->ctl, frame, sizeof(frame));
        raw_receive(s, at->ctl, frame, sizeof(frame));
        assert_int_equal(ae_shm_send(at->ctl, &attach, sizeof(attach), fds, n_fds), 0);
}

static void shm_attach(struct scene *s, struct attacker *at)
{
        int fd = region_fd(sizeof(struct shm_region), true);

        at->region = mmap(NULL, sizeof(struct shm_region), PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                          0);
        assert_true(at->region != MAP_FAILED);
        shm_offer(s, at, fd, 2);
        close(fd);
}

static void attach_with(struct scene *s, struct attacker *at, uint8_t n_streams)
{
        uint32_t n_up = s->victim->n[AE_NET_EV_UP];

        *at = (struct attacker){ .ctl = -1, .data = -1, .data_2 = -1, .bell = -1 };
        if (bed_is("tcp"))
                tcp_attach(s, at, n_streams);
        else
                shm_attach(s, at);
        bed_wait(s->victim, AE_NET_EV_UP, n_up + 1);
        at->conn = bed_record(s->victim, AE_NET_EV_UP, n_up)->event.conn;
}

static void attach(struct scene *s, struct attacker *at)
{
        attach_with(s, at, 1);
}

/* The victim has broken off the attacker's connection as a breach of the protocol. */
static void check_repelled(struct scene *s, struct attacker *at, uint32_t n_down)
{
        struct record *down;

        bed_wait(s->victim, AE_NET_EV_DOWN, n_down);
        down = bed_record(s->victim, AE_NET_EV_DOWN, n_down - 1);
        assert_ptr_equal(down->event.conn, at->conn);
        assert_int_equal(down->event.status, AE_EPROTO);
        ae_net_conn_close(at->conn);
        attacker_close(at);
        check_unharmed(s);
}

static void tcp_bad_frames(struct scene *s)
{
        static const uint8_t ctl[][8] = {
                { 0xff, 0xff, 0xff, 0xff, 1 }, { 1, 0, 16, 0, 1 }, { 4, 0, 0, 0, 9, 0, 0, 0 },
                { 0, 0, 0, 0, 2 }, { 0, 0, 0, 0, 1, 1 }, { 0, 0, 0, 0, 0 },
        };
        struct tcp_put_frame put = { .type = TCP_PUT_TYPE, .n_parts = 1, .len = 100 };
        struct tcp_put_frame bad[10];
        struct ae_net_key key;
        struct attacker at;
        uint32_t n_down = 0;

        for (size_t i = 0; i < AE_ARRAY_LEN(ctl); i++) {
                attach(s, &at);
                raw_send(at.ctl, ctl[i], sizeof(ctl[i]));
                raw_send(at.ctl, "abcd", 4);
                check_repelled(s, &at, ++n_down);
        }
        for (size_t i = 0; i < AE_ARRAY_LEN(bad); i++)
                bad[i] = put;
        bad[0].type = 0;
        bad[1].n_parts = 0;
        bad[2].n_parts = 2;
        bad[3].part = 1;
        bad[4].zero[2] = 1;
        bad[5].seq = 1;
        bad[6].len = (uint64_t)1 << 41;
        bad[7].off = UINT64_MAX - 50;
        bad[8].len = 65536 + 1;
        bad[9].n_parts = 255;
        for (size_t i = 0; i < AE_ARRAY_LEN(bad); i++) {
                attach(s, &at);
                assert_int_equal(ae_net_grant(at.conn, s->mem, 0, 65536, &key), 0);
                memcpy(bad[i].key, &key, sizeof(key));
                raw_send(at.data, &bad[i], sizeof(bad[i]));
                check_repelled(s, &at, ++n_down);
        }
        attach(s, &at);
        raw_send(at.data, &put, sizeof(put)); /* a key of zeros */
        check_repelled(s, &at, ++n_down);
}

/* Puts a slot or a message into the attacker's region, and publishes it. */
typedef void shm_deed(struct scene *s, struct attacker *at, struct shm_desc *desc);

static void publish_desc(struct attacker *at, const struct shm_desc *desc)
{
        at->region->puts[0] = *desc;
        atomic_store(&at->region->head.put_tail, 1);
}

static void publish_msg(struct attacker *at, uint32_t len, uint32_t zero, uint64_t tail)
{
        struct shm_msg_head head = { len, zero };

        memcpy(at->region->msgs, &head, sizeof(head));
        atomic_store(&at->region->head.msg_tail, tail);
}

static void send_record(struct attacker *at, uint32_t type, uint64_t len, int fd)
{
        struct shm_ctl record = { .type = type, .id = 5, .len = len };

        assert_int_equal(ae_shm_send(at->ctl, &record, sizeof(record), &fd, fd >= 0), 0);
}

#define DEED(name, ...)                                                                           \
        static void name(struct scene *s, struct attacker *at, struct shm_desc *desc)             \
        {                                                                                         \
                (void)s;                                                                          \
                (void)desc;                                                                       \
                __VA_ARGS__                                                                       \
        }

DEED(msgs_beyond_ring, publish_msg(at, 0, 0, SHM_MSGS + 8);)
DEED(msgs_far_beyond, publish_msg(at, 0, 0, UINT64_MAX);)
DEED(msg_huge, publish_msg(at, UINT32_MAX, 0, SHM_MSGS);)
DEED(msg_over_limit, publish_msg(at, AE_NET_MSG_MAX + 1, 0, SHM_MSGS);)
DEED(msg_longer_than_written, publish_msg(at, 100, 0, 64);)
DEED(msg_cut, publish_msg(at, 0, 0, 4);)
DEED(msg_not_zero, publish_msg(at, 8, 1, 16);)
DEED(puts_beyond_ring, atomic_store(&at->region->head.put_tail, SHM_DESCS + 1);)
DEED(read_unwritten_msgs, atomic_store(&at->region->head.msg_head, 8);)
DEED(read_unwritten_puts, atomic_store(&at->region->head.put_head, 1);)
DEED(desc_zero, publish_desc(at, &(struct shm_desc){ 0 });)
DEED(desc_kind, desc->kind = 3; publish_desc(at, desc);)
DEED(desc_unknown_range, desc->kind = SHM_DIRECT; desc->mem_id = 77; publish_desc(at, desc);)
DEED(desc_key, desc->key[0] ^= 1; publish_desc(at, desc);)
DEED(desc_slot, desc->key[9] ^= 1; publish_desc(at, desc);)
DEED(desc_outside_stage, desc->src_off = SHM_STAGE - 99; publish_desc(at, desc);)
DEED(desc_stage_wraps, desc->src_off = UINT64_MAX - 9; publish_desc(at, desc);)
DEED(desc_outside_grant, desc->off = 65536 - 99; publish_desc(at, desc);)
DEED(desc_off_wraps, desc->off = UINT64_MAX - 9; publish_desc(at, desc);)
DEED(desc_piece_too_long, desc->part_len = 101; publish_desc(at, desc);)
DEED(desc_piece_elsewhere, desc->part_off = 50; publish_desc(at, desc);)
DEED(desc_piece_empty, desc->part_len = 0; publish_desc(at, desc);)
DEED(desc_len_huge, desc->len = UINT64_MAX; publish_desc(at, desc);)
DEED(record_unknown, send_record(at, 9, 0, -1);)
DEED(record_short, raw_send(at->ctl, "x", 1);)
DEED(record_long, raw_send(at->ctl, at->region, 200);)
DEED(record_attach_again, send_record(at, SHM_CTL_ATTACH, 0, at->bell);)
DEED(show_nothing, send_record(at, SHM_CTL_SHOW, 4096, -1);)
DEED(show_not_a_memfd, send_record(at, SHM_CTL_SHOW, 4096, at->bell);)
DEED(hide_unknown, send_record(at, SHM_CTL_HIDE, 0, -1);)

static void show_with(struct attacker *at, uint64_t fd_len, bool sealed, uint64_t len)
{
        int fd = region_fd(fd_len, sealed);

        send_record(at, SHM_CTL_SHOW, len, fd);
        close(fd);
}

DEED(show_unsealed, show_with(at, 4096, false, 4096);)
DEED(show_too_long, show_with(at, 4096, true, 4097);)
DEED(show_empty, show_with(at, 4096, true, 0);)
DEED(show_twice, show_with(at, 4096, true, 4096); show_with(at, 4096, true, 4096);)
DEED(desc_outside_range, show_with(at, 4096, true, 4096); desc->kind = SHM_DIRECT;
     desc->mem_id = 5; desc->src_off = 4000; publish_desc(at, desc);)

static void noise_everywhere(struct scene *s, struct attacker *at, struct shm_desc *desc)
{
        uint64_t seed = 99;

        (void)s;
        (void)desc;
        random_fill(at->region->msgs, 65536, &seed);
        random_fill(at->region->puts, sizeof(at->region->puts), &seed);
        random_fill(&at->region->head, sizeof(at->region->head), &seed);
}

static shm_deed *const deeds[] = {
        msgs_beyond_ring, msgs_far_beyond, msg_huge, msg_over_limit, msg_longer_than_written,
        msg_cut, msg_not_zero, puts_beyond_ring, read_unwritten_msgs, read_unwritten_puts,
        desc_zero, desc_kind, desc_unknown_range, desc_key, desc_slot, desc_outside_stage,
        desc_stage_wraps, desc_outside_grant, desc_off_wraps, desc_piece_too_long,
        desc_piece_elsewhere, desc_piece_empty, desc_len_huge, record_unknown, record_short,
        record_long, record_attach_again, show_nothing, show_not_a_memfd, hide_unknown,
        show_unsealed, show_too_long, show_empty, show_twice, desc_outside_range,
        noise_everywhere,
};

static void shm_bad_regions(struct scene *s)
{
        static const struct {
                uint64_t len;
                bool sealed;
                uint32_t n_fds;
        } bad[] = {
                { sizeof(struct shm_region), false, 2 }, { 4096, true, 2 },
                { sizeof(struct shm_region) + 4096, true, 2 },
                { sizeof(struct shm_region), true, 1 }, { sizeof(struct shm_region), true, 0 },
        };

        for (uint32_t i = 0; i < AE_ARRAY_LEN(bad); i++) {
                int fd = region_fd(bad[i].len, bad[i].sealed);
                struct attacker at = { .ctl = -1, .data = -1, .data_2 = -1, .bell = -1 };

                shm_offer(s, &at, fd, bad[i].n_fds);
                bed_wait(s->victim, AE_NET_EV_REFUSED, i + 1);
                attacker_close(&at);
                close(fd);
                check_unharmed(s);
        }
}

void attack_bad_frames(void **state)
{
        uint32_t n_fds;
        struct scene s;

        scene_open(&s, *state, 0);
        n_fds = count_fds();
        if (bed_is("tcp"))
                tcp_bad_frames(&s);
        else
                shm_bad_regions(&s);
        for (uint32_t i = 0; bed_is("shm") && i < AE_ARRAY_LEN(deeds); i++) {
                struct shm_desc desc = { .kind = SHM_STAGED, .len = 100, .part_len = 100 };
                struct ae_net_key key;
                struct attacker at;

                attach(&s, &at);
                assert_int_equal(ae_net_grant(at.conn, s.mem, 0, 65536, &key), 0);
                memcpy(desc.key, &key, sizeof(key));
                deeds[i](&s, &at, &desc);
                check_repelled(&s, &at, i + 1);
        }
        bed_turn(*state);
        assert_int_equal(count_fds(), n_fds); /* nothing it passed is still open */
        scene_close(&s);
}

void attack_hang_up_midway(void **state)
{
        struct tcp_put_frame put = { .type = TCP_PUT_TYPE, .n_parts = 1, .len = 60000 };
        static const uint8_t half_msg[] = { 100, 0, 0, 0, 1, 0, 0, 0, 'a', 'b' };
        static const char zeros[30000];
        struct ae_net_key key;
        struct attacker at;
        struct scene s;

        scene_open(&s, *state, 0);
        attach(&s, &at);
        assert_int_equal(ae_net_grant(at.conn, s.mem, 0, 65536, &key), 0);
        memcpy(put.key, &key, sizeof(key));
        if (bed_is("tcp")) {
                raw_send(at.ctl, half_msg, sizeof(half_msg));
                raw_send(at.data, &put, sizeof(put));
                raw_send(at.data, zeros, sizeof(zeros));
        } else {
                struct shm_desc desc = { .kind = SHM_STAGED, .len = 60000, .part_len = 30000 };

                memcpy(desc.key, &key, sizeof(key));
                publish_desc(&at, &desc);
        }
        while (bed_stats(s.victim).put_bytes_received < 30000)
                bed_turn(*state);
        attacker_close(&at);
        bed_wait(s.victim, AE_NET_EV_DOWN, 1);
        assert_int_equal(bed_record(s.victim, AE_NET_EV_DOWN, 0)->event.status, AE_ELOST);
        assert_int_equal(s.victim->n[AE_NET_EV_MSG], 0);
        scene_close(&s);
}

/* Last words on the control stream, behind a data stream that is found closed before it. */
void attack_data_stream_hangs_up_first(void **state)
{
        static const uint8_t msg[] = { 2, 0, 0, 0, 1, 0, 0, 0, 'h', 'i' };
        uint8_t msgs[2000 * sizeof(msg)]; /* more than an endpoint queues at once */
        struct attacker at;
        struct scene s;

        if (!bed_is("tcp"))
                skip(); /* only there a connection has several sockets */
        scene_open(&s, *state, 0);
        attach(&s, &at);
        assert_int_equal(shutdown(at.data, SHUT_WR), 0);
        for (size_t i = 0; i < sizeof(msgs); i++)
                msgs[i] = msg[i % sizeof(msg)];
        raw_send(at.ctl, msgs, sizeof(msgs));
        bed_wait(s.victim, AE_NET_EV_DOWN, 1);
        assert_int_equal(s.victim->n[AE_NET_EV_MSG], 2000);
        s.n_good_msgs = 2000;
        attacker_close(&at);
        scene_close(&s);
}

/* One stream carries its part of many striped puts before the other has carried any. */
void attack_stream_runs_ahead(void **state)
{
        struct tcp_put_frame put = { .type = TCP_PUT_TYPE, .n_parts = 2, .len = 0 };
        struct tcp_put_frame parts[2][N_AHEAD];
        struct ae_net_key key;
        struct attacker at;
        struct scene s;

        if (!bed_is("tcp"))
                skip(); /* only there a put has parts */
        scene_open(&s, *state, 0);
        attach_with(&s, &at, 2);
        assert_int_equal(ae_net_grant(at.conn, s.mem, 0, 65536, &key), 0);
        memcpy(put.key, &key, sizeof(key));
        for (uint32_t i = 0; i < N_AHEAD; i++) {
                parts[0][i] = parts[1][i] = put;
                parts[0][i].seq = parts[1][i].seq = htole64(i);
                parts[0][i].note = parts[1][i].note = htole64(i);
                parts[1][i].part = 1;
        }
        raw_send(at.data, parts[0], sizeof(parts[0]));
        bed_settle(*state);
        assert_int_equal(s.victim->n[AE_NET_EV_NOTIFY], 0);
        raw_send(at.data_2, parts[1], sizeof(parts[1]));
        bed_wait(s.victim, AE_NET_EV_NOTIFY, N_AHEAD);
        for (uint32_t i = 0; i < N_AHEAD; i++)
                assert_int_equal(bed_record(s.victim, AE_NET_EV_NOTIFY, i)->event.note, i);
        ae_net_conn_close(at.conn);
        attacker_close(&at);
        s.victim->n[AE_NET_EV_NOTIFY] = 0; /* these were legal */
        scene_close(&s);
}
