/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scope-bound cleanup. AE_CLEANUP(fn) runs fn(&variable) when the variable leaves its scope;
 * ae_steal() hands the value over and clears the variable, so that a constructor ends with
 * `*ret_x = ae_steal(x);`.
 */
#pragma once

#include <stdlib.h>
#include <unistd.h>

#define AE_CLEANUP(fn) __attribute__((cleanup(fn)))

#define ae_steal(pointer)                                                                         \
        ({                                                                                        \
                typeof(pointer) steal_ = (pointer);                                               \
                (pointer) = NULL;                                                                 \
                steal_;                                                                           \
        })

static inline int ae_steal_fd(int *fd)
{
        int value = *fd;

        *fd = -1;
        return value;
}

static inline void ae_cleanup_free(void *pointer)
{
        free(*(void **)pointer);
}

static inline void ae_cleanup_close(int *fd)
{
        if (*fd >= 0)
                (void)close(*fd); /* nothing is left to do about a failing close here */
}

/* Defines fn##_p(), a cleanup function for a pointer type whose destructor accepts NULL. */
#define AE_DEFINE_CLEANUP(type, fn)                                                               \
        static inline void fn##_p(type *pointer)                                                  \
        {                                                                                         \
                fn(*pointer);                                                                     \
        }
