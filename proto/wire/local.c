/* SPDX-License-Identifier: Apache-2.0 */
/* Texts under a sequence lock in shared memory. The writer never waits; a reader gives up. */
#include "proto/wire/local.h"

#include "proto/base/num.h"

#include <stdio.h>
#include <string.h>

#define READ_TRIES 1000

void ae_local_text_set(struct ae_local_text *where, const char *text)
{
        uint32_t seq = atomic_load_explicit(&where->seq, memory_order_relaxed);
        size_t len = strnlen(text, sizeof(where->text) - 1);

        atomic_store_explicit(&where->seq, seq | 1, memory_order_relaxed);
        atomic_thread_fence(memory_order_release); /* pairs with the reader's acquire fence */
        memcpy(where->text, text, len);
        where->text[len] = '\0';
        atomic_store_explicit(&where->seq, (seq | 1) + 1, memory_order_release);
}

void ae_local_text_get(struct ae_local_text *where, char *to)
{
        for (int try = 0; try < READ_TRIES; try++) {
                uint32_t seq = atomic_load_explicit(&where->seq, memory_order_acquire);

                if (seq & 1)
                        continue;
                memcpy(to, where->text, sizeof(where->text));
                atomic_thread_fence(memory_order_acquire);
                if (atomic_load_explicit(&where->seq, memory_order_relaxed) != seq)
                        continue;
                to[sizeof(where->text) - 1] = '\0';
                return;
        }
        to[0] = '\0';
}

const char *ae_local_print_collective(const struct ae_local_xhead *head,
                                      char ret_text[AE_LOCAL_XTEXT])
{
        static const char *const groups[] = { "EP", "EDP", "world" };
        static const char *const kinds[] = {
#define KIND_TEXT(name, number, text) [number] = (text),
                AE_COLLECTIVE_TABLE(KIND_TEXT)
        };

        static_assert(AE_ARRAY_LEN(groups) == AE_LOCAL_XGROUPS, "one name each");
        snprintf(ret_text, AE_LOCAL_XTEXT, "%s %llu of the %s group (id %u, %llu bytes)",
                 head->kind < AE_ARRAY_LEN(kinds) ? kinds[head->kind] : "unknown call",
                 (unsigned long long)head->seq,
                 head->group < AE_ARRAY_LEN(groups) ? groups[head->group] : "unknown", head->id,
                 (unsigned long long)head->total);
        return ret_text;
}
