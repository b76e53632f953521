/* SPDX-License-Identifier: Apache-2.0 */
/* The test bed of the conformance suite; see bed.h. */
#include "tests/net/bed.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "proto/base/clock.h"

#define WAIT_NS (10 * AE_NS_PER_S)
#define TEST_NS (25 * AE_NS_PER_S)

const char *bed_transport = "tcp";

uint64_t bed_spent_ns(void)
{
        struct timespec now;

        assert_int_equal(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now), 0);
        return (uint64_t)now.tv_sec * AE_NS_PER_S + (uint64_t)now.tv_nsec;
}

static void no_wake(void *user)
{
        (void)user;
}

int bed_setup(void **state)
{
        struct bed *bed = calloc(1, sizeof(*bed));

        assert_non_null(bed);
        bed->transport = bed_transport;
        bed->n_steps = 64;
        bed->end_ns = bed_spent_ns() + TEST_NS;
        snprintf(bed->dir, sizeof(bed->dir), "/tmp/autoep-net-XXXXXX");
        assert_non_null(mkdtemp(bed->dir));
        if (bed_is("sim"))
                assert_int_equal(ae_sim_new(2, NULL, &bed->sim), 0);
        *state = bed;
        return 0;
}

int bed_teardown(void **state)
{
        struct bed *bed = *state;

        for (uint32_t i = 0; i < bed->n_peers; i++)
                bed_close(&bed->peers[i]);
        for (uint32_t i = 0; i < bed->n_peers; i++) {
                struct peer *peer = &bed->peers[i];

                for (size_t j = 0; j < peer->n_records; j++)
                        free(peer->records[j].data);
                free(peer->records);
        }
        ae_sim_free(bed->sim);
        assert_int_equal(rmdir(bed->dir), 0); /* sockets are removed by who made them */
        free(bed);
        return 0;
}

void bed_address(struct bed *bed, char *address)
{
        if (bed_is("tcp"))
                snprintf(address, AE_NET_ADDR_MAX, "127.0.0.1:0");
        else if (bed_is("shm"))
                snprintf(address, AE_NET_ADDR_MAX, "%s/%u", bed->dir, bed->n_peers);
        else
                snprintf(address, AE_NET_ADDR_MAX, "%u", 1000 + bed->n_peers);
}

struct peer *bed_open_with(struct bed *bed, uint32_t node, struct ae_net_options *options)
{
        struct peer *peer = &bed->peers[bed->n_peers];
        char address[AE_NET_ADDR_MAX];

        assert_true(bed->n_peers < BED_PEERS);
        bed_address(bed, address);
        bed->n_peers++;
        if (!options->self.version)
                options->self.version = BED_VERSION;
        if (!options->self.cluster)
                options->self.cluster = BED_CLUSTER;
        options->self.node = node;
        options->self.incarnation = node + 100;
        options->listen = address;
        if (bed->sim) {
                options->loop = bed->sim;
                options->wake = no_wake;
        }
        *peer = (struct peer){ .bed = bed, .node = node };
        if (ae_net_open(bed->transport, options, &peer->net) < 0)
                fail_msg("%s", ae_error_text());
        assert_int_equal(ae_net_address(peer->net, peer->address), 0);
        return peer;
}

struct peer *bed_open(struct bed *bed, uint32_t node)
{
        return bed_open_with(bed, node, &(struct ae_net_options){ .wake = NULL });
}

void bed_close(struct peer *peer)
{
        peer->net = ae_net_close(peer->net);
}

static void keep(struct peer *peer, const struct ae_net_event *event)
{
        struct record *record;

        peer->n[event->kind]++;
        if (peer->on_event)
                peer->on_event(peer, event);
        if (peer->muted)
                return;
        peer->records = realloc(peer->records, (peer->n_records + 1) * sizeof(*peer->records));
        assert_non_null(peer->records);
        record = &peer->records[peer->n_records++];
        *record = (struct record){ .event = *event };
        if (event->text)
                snprintf(record->text, sizeof(record->text), "%s", event->text);
        if (event->kind == AE_NET_EV_MSG && event->len) {
                record->data = malloc(event->len);
                assert_non_null(record->data);
                memcpy(record->data, event->data, event->len);
        }
}

void bed_turn(struct bed *bed)
{
        struct ae_net_event events[16];

        if (bed_spent_ns() > bed->end_ns)
                fail_msg("what the test waits for never came");
        for (int i = 0; bed->sim && i < bed->n_steps; i++)
                if (!ae_sim_step(bed->sim))
                        break;
        for (uint32_t i = 0; i < bed->n_peers; i++) {
                struct peer *peer = &bed->peers[i];
                int n = peer->net && !peer->still ? ae_net_poll(peer->net, events, 16) : 0;

                for (int j = 0; j < n; j++)
                        keep(peer, &events[j]);
        }
}

void bed_wait(struct peer *peer, enum ae_net_event_kind kind, uint32_t n)
{
        uint64_t end_ns = bed_spent_ns() + WAIT_NS;

        while (peer->n[kind] < n) {
                bed_turn(peer->bed);
                if (bed_spent_ns() > end_ns)
                        fail_msg("node %u has %u events of kind %d, not %u", peer->node,
                                 peer->n[kind], kind, n);
        }
}

void bed_settle(struct bed *bed)
{
        uint64_t end_ns = ae_now_ns() + 5 * AE_NS_PER_MS;

        for (int i = 0; i < 200 || (!bed->sim && ae_now_ns() < end_ns); i++)
                bed_turn(bed);
}

struct record *bed_record(struct peer *peer, enum ae_net_event_kind kind, uint32_t i)
{
        uint32_t n = 0;

        for (size_t j = 0; j < peer->n_records; j++)
                if (peer->records[j].event.kind == kind && n++ == i)
                        return &peer->records[j];
        fail_msg("node %u has no event %u of kind %d", peer->node, i, kind);
        return NULL;
}

struct ae_net_conn *bed_connect(struct peer *from, struct peer *to, struct ae_net_conn **ret_far)
{
        uint32_t n_from = from->n[AE_NET_EV_UP], n_to = to->n[AE_NET_EV_UP];
        struct ae_net_conn *conn;

        assert_int_equal(ae_net_connect(from->net, to->address, to->node, &conn), 0);
        bed_wait(from, AE_NET_EV_UP, n_from + 1);
        bed_wait(to, AE_NET_EV_UP, n_to + 1);
        if (ret_far)
                *ret_far = bed_record(to, AE_NET_EV_UP, n_to)->event.conn;
        return conn;
}

struct area area_new(uint64_t len)
{
        struct area area = { .len = len };

        area.fd = memfd_create("area", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        assert_true(area.fd >= 0);
        assert_int_equal(ftruncate(area.fd, (off_t)len), 0);
        assert_int_equal(fcntl(area.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), 0);
        area.base = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, area.fd, 0);
        assert_true(area.base != MAP_FAILED);
        return area;
}

struct area area_private(uint64_t len)
{
        struct area area = { .len = len, .fd = -1 };

        area.base = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        assert_true(area.base != MAP_FAILED);
        return area;
}

void area_free(struct area *area)
{
        munmap(area->base, area->len);
        if (area->fd >= 0)
                close(area->fd);
}

struct ae_net_mem *area_map(struct peer *peer, const struct area *area)
{
        struct ae_net_mem *mem;

        if (ae_net_map(peer->net, area->base, area->len, area->fd, 0, &mem) < 0)
                fail_msg("%s", ae_error_text());
        return mem;
}

static uint8_t byte_of(uint64_t seed, uint64_t i)
{
        return (uint8_t)((seed * 0x9e3779b97f4a7c15u + i * 0xbf58476d1ce4e5b9u) >> 56);
}

void area_fill(const struct area *area, uint64_t off, uint64_t len, uint64_t seed)
{
        assert_true(ae_range_ok(off, len, area->len));
        for (uint64_t i = 0; i < len; i++)
                area->base[off + i] = (char)byte_of(seed, i);
}

bool area_has(const struct area *area, uint64_t off, uint64_t len, uint64_t seed, uint64_t skip)
{
        for (uint64_t i = 0; i < len; i++)
                if ((uint8_t)area->base[off + i] != byte_of(seed, skip + i))
                        return false;
        return true;
}

struct ae_net_stats bed_stats(const struct peer *peer)
{
        struct ae_net_stats stats;

        ae_net_stats(peer->net, &stats);
        return stats;
}

void bed_put(struct peer *peer, struct ae_net_conn *conn, const struct ae_net_key *key,
             uint64_t off, struct ae_net_mem *src, uint64_t src_off, uint64_t len, uint64_t note,
             uint64_t cookie)
{
        for (;;) {
                uint32_t n = peer->n[AE_NET_EV_WRITABLE];
                int r = ae_net_put(conn, key, off, src, src_off, len, note, cookie);

                if (r == 0)
                        return;
                assert_int_equal(r, AE_EAGAIN);
                bed_wait(peer, AE_NET_EV_WRITABLE, n + 1);
        }
}
