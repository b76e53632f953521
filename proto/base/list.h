/* SPDX-License-Identifier: Apache-2.0 */
/* Intrusive doubly linked list with a sentinel. Single owner; nothing is allocated. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

struct ae_list {
        struct ae_list *next; /* borrowed from its neighbours */
        struct ae_list *prev;
};

#define AE_LIST_INIT(name) { &(name), &(name) }

#define ae_container_of(pointer, type, member)                                                    \
        ((type *)((char *)(pointer) - offsetof(type, member)))

#define ae_list_entry(pointer, type, member) ae_container_of(pointer, type, member)

/* The loop body may unlink and free @entry. */
#define ae_list_for_each_safe(entry, list, member)                                                \
        for (typeof(entry) entry##_next_,                                                         \
             *entry##_once_ = (entry = ae_list_entry((list)->next, typeof(*entry), member), NULL); \
             (void)entry##_once_, entry##_next_ = ae_list_entry(entry->member.next,               \
                                                                typeof(*entry), member),          \
             &entry->member != (list);                                                            \
             entry = entry##_next_)

#define ae_list_for_each(entry, list, member)                                                     \
        for (entry = ae_list_entry((list)->next, typeof(*entry), member);                         \
             &entry->member != (list);                                                            \
             entry = ae_list_entry(entry->member.next, typeof(*entry), member))

static inline void ae_list_init(struct ae_list *list)
{
        list->next = list->prev = list;
}

static inline bool ae_list_empty(const struct ae_list *list)
{
        return list->next == list;
}

static inline void ae_list_push(struct ae_list *list, struct ae_list *entry)
{
        entry->prev = list->prev;
        entry->next = list;
        list->prev->next = entry;
        list->prev = entry;
}

static inline void ae_list_push_front(struct ae_list *list, struct ae_list *entry)
{
        ae_list_push(list->next, entry);
}

/* Leaves @entry linked to itself, so that unlinking twice is harmless. */
static inline void ae_list_unlink(struct ae_list *entry)
{
        entry->prev->next = entry->next;
        entry->next->prev = entry->prev;
        ae_list_init(entry);
}

static inline struct ae_list *ae_list_pop(struct ae_list *list)
{
        struct ae_list *entry = list->next;

        if (entry == list)
                return NULL;
        ae_list_unlink(entry);
        return entry;
}
