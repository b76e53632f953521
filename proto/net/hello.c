/* SPDX-License-Identifier: Apache-2.0 */
/* Encoding and comparing the first frame of a connection; see hello.h. Pure. */
#include "proto/net/hello.h"

#include <assert.h>
#include <endian.h>
#include <string.h>

#include "proto/base/status.h"

#define MAGIC UINT32_C(0x4e504541) /* "AEPN" */

struct hello_frame {
        uint32_t magic;
        uint8_t kind;
        uint8_t stream;
        uint8_t n_streams;
        uint8_t zero;
        uint32_t version;
        uint32_t node;
        uint64_t incarnation;
        uint64_t cluster;
        uint64_t token;
        uint8_t reserved[24];
};
static_assert(sizeof(struct hello_frame) == AE_HELLO_SIZE, "a hello is 64 bytes");
static_assert(offsetof(struct hello_frame, version) == 8, "the version never moves");
static_assert(offsetof(struct hello_frame, token) == 32, "no padding");

void ae_hello_encode(const struct ae_hello *hello, uint8_t ret_frame[AE_HELLO_SIZE])
{
        struct hello_frame frame = {
                .magic = htole32(MAGIC),
                .kind = hello->kind,
                .stream = hello->stream,
                .n_streams = hello->n_streams,
                .version = htole32(hello->who.version),
                .node = htole32(hello->who.node),
                .incarnation = htole64(hello->who.incarnation),
                .cluster = htole64(hello->who.cluster),
                .token = htole64(hello->token),
        };

        memcpy(ret_frame, &frame, sizeof(frame));
}

int ae_hello_decode(const uint8_t bytes[AE_HELLO_SIZE], uint8_t kind_a, uint8_t kind_b,
                    struct ae_hello *ret_hello)
{
        struct hello_frame frame;

        memcpy(&frame, bytes, sizeof(frame));
        if (frame.magic != htole32(MAGIC))
                return ae_fail(AE_EPROTO, "it does not speak the autoep protocol (0x%08x)",
                               le32toh(frame.magic));
        if (frame.kind != kind_a && frame.kind != kind_b)
                return ae_fail(AE_EPROTO, "its hello is of kind %u, not %u", frame.kind, kind_a);
        *ret_hello = (struct ae_hello){
                .kind = frame.kind,
                .stream = frame.stream,
                .n_streams = frame.n_streams,
                .who = {
                        .version = le32toh(frame.version),
                        .node = le32toh(frame.node),
                        .incarnation = le64toh(frame.incarnation),
                        .cluster = le64toh(frame.cluster),
                },
                .token = le64toh(frame.token),
        };
        return 0;
}

int ae_hello_compare(const struct ae_net_hello *self, const struct ae_net_hello *peer)
{
        if (peer->version != self->version)
                return ae_fail(AE_EVERSION,
                               "node %u speaks protocol version %u, this node %u speaks %u",
                               peer->node, peer->version, self->node, self->version);
        if (peer->cluster != self->cluster)
                return ae_fail(AE_EMISMATCH,
                               "the peer lists differ: node %u has digest %016llx, this node %u "
                               "has %016llx",
                               peer->node, (unsigned long long)peer->cluster, self->node,
                               (unsigned long long)self->cluster);
        return 0;
}

int ae_hello_expect(uint32_t expected, const struct ae_net_hello *peer)
{
        if (peer->node != expected)
                return ae_fail(AE_EMISMATCH, "node %u answers there, node %u was expected",
                               peer->node, expected);
        return 0;
}
