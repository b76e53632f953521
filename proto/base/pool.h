/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Objects of one size that are used again, so that a steady state allocates nothing. Each begins
 * with its struct ae_list link. Single owner. Without memory the program ends: pools hold the small
 * records of a daemon, not data.
 */
#pragma once

#include "proto/base/list.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define AE_POOL_GROW 32

struct ae_pool {
        struct ae_list free;
        size_t size;
        size_t len; /* bytes of all its objects, taken or not */
};

static inline void ae_pool_init(struct ae_pool *pool, size_t size)
{
        ae_list_init(&pool->free);
        pool->size = size;
        pool->len = 0;
}

/* Several at a time, so that a pool that has seen some of its load seldom comes here again. */
static inline void ae_pool_grow(struct ae_pool *pool)
{
        pool->len += AE_POOL_GROW * pool->size;
        for (int i = 0; i < AE_POOL_GROW; i++) {
                struct ae_list *object = malloc(pool->size);

                if (!object)
                        abort();
                ae_list_init(object);
                ae_list_push(&pool->free, object);
        }
}

/* Zeroed, its link linked to itself. */
static inline void *ae_pool_take(struct ae_pool *pool)
{
        struct ae_list *object;

        if (ae_list_empty(&pool->free))
                ae_pool_grow(pool);
        object = ae_list_pop(&pool->free);
        assert(object);
        memset(object, 0, pool->size);
        ae_list_init(object);
        return object;
}

/* @object is in no list. */
static inline void ae_pool_give(struct ae_pool *pool, void *object)
{
        ae_list_push_front(&pool->free, object);
}

static inline void ae_pool_deinit(struct ae_pool *pool)
{
        struct ae_list *object;

        while ((object = ae_list_pop(&pool->free)))
                free(object);
}
