/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Mapped ranges and the table of grants of one connection: slots in an array that grows, a free
 * list, and a generation per slot that never repeats. Owned by a transport's connection; the
 * endpoint's owner thread.
 */
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/net/priv.h"

#define NO_SLOT UINT32_MAX

/* What stands in the opaque bytes, little-endian. */
struct key_fields {
        uint64_t conn_id;
        uint32_t slot;
        uint32_t generation;
        uint64_t zero[2];
};
static_assert(sizeof(struct key_fields) == sizeof(struct ae_net_key), "a key is 32 bytes");

int ae_net_mem_new(struct ae_net *net, struct ae_list *mems, void *address, uint64_t len, int fd,
                   uint64_t fd_off, struct ae_net_mem **ret_mem)
{
        struct ae_net_mem *mem = calloc(1, sizeof(*mem));

        if (!mem)
                return ae_fail(AE_ENOMEM, "cannot map a range of %llu bytes: out of memory",
                               (unsigned long long)len);
        mem->net = net;
        mem->base = address;
        mem->len = len;
        mem->fd = fd;
        mem->fd_off = fd_off;
        mem->share_fd = -1;
        ae_list_push(mems, &mem->link);
        *ret_mem = mem;
        return 0;
}

void ae_net_mem_free(struct ae_net_mem *mem)
{
        ae_list_unlink(&mem->link);
        ae_cleanup_close(&mem->share_fd);
        free(mem);
}

void ae_net_mem_free_all(struct ae_list *mems)
{
        while (!ae_list_empty(mems))
                ae_net_mem_free(ae_list_entry(mems->next, struct ae_net_mem, link));
}

void ae_net_grants_init(struct ae_net_grants *grants, uint64_t conn_id)
{
        *grants = (struct ae_net_grants){ .conn_id = conn_id, .free_head = NO_SLOT };
}

void ae_net_grants_drop_all(struct ae_net_grants *grants)
{
        for (uint32_t i = 0; i < grants->n_slots; i++)
                if (grants->slots[i].mem)
                        ae_net_grants_drop(grants, &grants->slots[i]);
        assert(grants->n_live == 0);
}

void ae_net_grants_deinit(struct ae_net_grants *grants)
{
        ae_net_grants_drop_all(grants);
        free(grants->slots);
        grants->slots = NULL;
        grants->n_slots = 0;
}

static int grow(struct ae_net_grants *grants)
{
        uint32_t n_new = grants->n_slots ? grants->n_slots * 2 : 8;
        struct ae_net_grant *slots;

        if (n_new > AE_NET_GRANTS_MAX)
                return ae_fail(AE_EOVERFLOW, "cannot grant: %u grants are alive on the connection",
                               grants->n_live);
        slots = realloc(grants->slots, n_new * sizeof(*slots));
        if (!slots)
                return ae_fail(AE_ENOMEM, "cannot grant: no memory for %u grants", n_new);
        grants->slots = slots;
        for (uint32_t i = n_new; i-- > grants->n_slots;) {
                slots[i] = (struct ae_net_grant){ .next_free = grants->free_head };
                grants->free_head = i;
        }
        grants->n_slots = n_new;
        return 0;
}

int ae_net_grants_add(struct ae_net_grants *grants, struct ae_net_mem *mem, uint64_t off,
                      uint64_t len, struct ae_net_key *ret_key)
{
        struct ae_net_grant *grant;
        struct key_fields fields;
        int r;

        assert(ae_range_ok(off, len, mem->len));
        if (grants->free_head == NO_SLOT) {
                r = grow(grants);
                if (r < 0)
                        return r;
        }
        grant = &grants->slots[grants->free_head];
        fields = (struct key_fields){
                .conn_id = htole64(grants->conn_id),
                .slot = htole32(grants->free_head),
                .generation = htole32(++grant->generation),
        };
        grants->free_head = grant->next_free;
        grant->mem = mem;
        grant->off = off;
        grant->len = len;
        mem->n_grants++;
        grants->n_live++;
        memcpy(ret_key, &fields, sizeof(fields));
        return 0;
}

enum ae_net_lookup ae_net_grants_find(const struct ae_net_grants *grants,
                                      const struct ae_net_key *key,
                                      struct ae_net_grant **ret_grant, uint64_t *ret_tag)
{
        struct key_fields fields;
        struct ae_net_grant *grant;
        uint32_t slot, generation;

        memcpy(&fields, key, sizeof(fields));
        slot = le32toh(fields.slot);
        generation = le32toh(fields.generation);
        if (le64toh(fields.conn_id) != grants->conn_id || fields.zero[0] || fields.zero[1] ||
            slot >= grants->n_slots)
                return AE_NET_KEY_NEVER;
        grant = &grants->slots[slot];
        if (generation == 0 || generation > grant->generation)
                return AE_NET_KEY_NEVER;
        *ret_tag = (uint64_t)slot << 32 | generation;
        if (!grant->mem || generation != grant->generation)
                return AE_NET_KEY_REVOKED;
        *ret_grant = grant;
        return AE_NET_KEY_LIVE;
}

void ae_net_grants_drop(struct ae_net_grants *grants, struct ae_net_grant *grant)
{
        assert(grant->mem && grant->mem->n_grants > 0 && grants->n_live > 0);
        grant->mem->n_grants--;
        grants->n_live--;
        grant->mem = NULL;
        if (grant->generation == UINT32_MAX)
                return; /* the slot is retired: a generation never repeats */
        grant->next_free = grants->free_head;
        grants->free_head = ae_u32((uint64_t)(grant - grants->slots));
}

int ae_net_random(uint64_t *ret_value)
{
        uint64_t value = 0;

        while (value == 0)
                if (getrandom(&value, sizeof(value), 0) != (ssize_t)sizeof(value))
                        return ae_fail_sys(errno, "cannot draw a random connection number");
        *ret_value = value;
        return 0;
}
