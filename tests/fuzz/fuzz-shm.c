/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The shm transport from a raw socket and a raw region. The first byte says whether the input is
 * the beginning of a connection, or what comes after a good hello: a region, records on the socket
 * with descriptors, and bytes and counters in the region's rings.
 */
#include "tests/fuzz/victim.h"
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/net/shm.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

struct attacker {
        struct victim *victim;
        int fd;
        struct shm_region *region; /* NULL: none that was good */
};

static int dial(const struct victim *victim)
{
        struct sockaddr_un address;
        uint32_t len;
        int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

        assert_true(fd >= 0);
        assert_int_equal(ae_shm_addr_parse(victim->address, &address, &len), 0);
        assert_int_equal(connect(fd, (void *)&address, len), 0);
        return fd;
}

static int memory(uint64_t len, bool sealed)
{
        int fd = memfd_create("attack", MFD_CLOEXEC | MFD_ALLOW_SEALING);

        assert_true(fd >= 0);
        assert_int_equal(ftruncate(fd, (off_t)len), 0);
        if (sealed)
                assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
        return fd;
}

/* A record with up to two descriptors; the victim may have hung up. */
static void send_record(struct attacker *at, struct input *input)
{
        uint8_t how = input_u8(input);
        struct shm_ctl record = { .type = input_below(input, 5) };
        int fds[2] = { -1, -1 };

        record.id = input_below(input, 4);
        record.off = how & 4 ? input_u64(input) : 0;
        record.len = how & 8 ? input_u64(input) : VICTIM_PAGE;
        fds[0] = how & 16 ? eventfd(0, EFD_CLOEXEC) : memory(VICTIM_PAGE, how & 32);
        fds[1] = eventfd(0, EFD_CLOEXEC);
        (void)ae_shm_send(at->fd, &record, how & 64 ? input_u8(input) % sizeof(record)
                                                    : sizeof(record), fds, AE_MIN(how & 3u, 2u));
        close(fds[0]);
        close(fds[1]);
        victim_turn(at->victim);
}

/* Says hello and offers a region: the right one unless @how says otherwise. */
static void attach(struct attacker *at, uint8_t how)
{
        bool good = how < 240;
        uint64_t len = sizeof(struct shm_region) + (good || how & 1 ? 0 : VICTIM_PAGE);
        struct shm_ctl record = { .type = SHM_CTL_ATTACH };
        int fds[2] = { memory(len, good || how & 2), eventfd(0, EFD_CLOEXEC) };
        uint8_t frame[AE_HELLO_SIZE];

        victim_hello(AE_HELLO_SHM, 0, frame);
        assert_int_equal(send(at->fd, frame, sizeof(frame), MSG_NOSIGNAL), sizeof(frame));
        assert_true(victim_answer(at->victim, at->fd, frame, sizeof(frame)));
        (void)ae_shm_send(at->fd, &record, sizeof(record), fds, good || how & 4 ? 2 : 1);
        victim_until(at->victim, victim_is_up);
        if (at->victim->conn) {
                at->region = mmap(NULL, sizeof(*at->region), PROT_READ | PROT_WRITE, MAP_SHARED,
                                  fds[0], 0);
                assert_ptr_not_equal(at->region, MAP_FAILED);
        }
        close(fds[0]);
        close(fds[1]);
}

static void send_msg(struct attacker *at, struct input *input)
{
        uint64_t tail = atomic_load(&at->region->head.msg_tail);
        struct shm_msg_head head = { .len = input_u8(input) };
        uint64_t step = ae_align_up(sizeof(head) + head.len, 8);

        head.zero = input_u8(input) == 255;
        if (input_u8(input) > 200)
                head.len = input_u32(input);
        memcpy(at->region->msgs + tail % SHM_MSGS / 8 * 8, &head, sizeof(head));
        atomic_store(&at->region->head.msg_tail, tail + step);
}

static void send_put(struct attacker *at, struct input *input)
{
        uint64_t tail = atomic_load(&at->region->head.put_tail);
        uint8_t how = input_u8(input);
        struct shm_desc desc = { .kind = how & 2 ? SHM_DIRECT : SHM_STAGED };

        memcpy(desc.key, &at->victim->keys[how & 1], sizeof(desc.key));
        desc.mem_id = input_below(input, 4);
        desc.off = input_u16(input);
        desc.len = desc.part_len = input_u16(input);
        if (how & 4)
                desc.part_len = input_u64(input);
        if (how & 8)
                desc.part_off = input_u64(input);
        if (how & 16)
                desc.src_off = input_u64(input);
        if (how & 32)
                desc.len = input_u64(input);
        at->region->puts[tail % SHM_DESCS] = desc;
        atomic_store(&at->region->head.put_tail, tail + 1);
}

/* Any bytes anywhere in the counters, the slots, or the first messages. */
static void scribble(struct attacker *at, struct input *input)
{
        size_t off = input_u16(input), len = input_u8(input);
        const uint8_t *data = input_take(input, &len);
        char *to = (char *)at->region;

        if (input_below(input, 2))
                to = (char *)at->region->msgs;
        memcpy(to + off, data, len);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
        struct attacker at = { .victim = victim_get("shm") };
        struct input input = { data, len };
        uint8_t how = input_u8(&input);

        at.fd = dial(at.victim);
        if (how & 1) {
                (void)!send(at.fd, input.data, input.len, MSG_NOSIGNAL);
        } else {
                attach(&at, input_u8(&input));
                while (at.region && input.len > 0) {
                        uint8_t deed = input_u8(&input) & 3;

                        if (deed == 0)
                                send_record(&at, &input);
                        else if (deed == 1)
                                send_msg(&at, &input);
                        else if (deed == 2)
                                send_put(&at, &input);
                        else
                                scribble(&at, &input);
                        victim_turn(at.victim);
                }
        }
        close(at.fd);
        victim_end(at.victim);
        if (at.region)
                munmap(at.region, sizeof(*at.region));
        return 0;
}
