/* SPDX-License-Identifier: Apache-2.0 */
/* Shared memory of the library: mapping what the daemon passed, and memfds that it is passed. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ae_map {
        void *base; /* owned mapping; NULL: none */
        size_t len;
};

/*
 * Maps the first @len bytes of memfd @fd, which stays the caller's. @what names it in errors.
 * AE_EPROTO when it isn't a memfd sealed against shrinking (a later shrink would kill this process)
 * or is shorter than @len; AE_ESYS. @populate: fill in page tables now.
 */
int ae_map_open(const char *what, int fd, uint64_t len, bool writable, bool populate,
                struct ae_map *ret_map);
/* An empty map is fine; leaves it empty. */
void ae_map_close(struct ae_map *map);

/* A memfd of @len zero bytes, sealed in size; the caller closes it. */
int ae_map_memfd(const char *what, uint64_t len, int *ret_fd);
/* Writes all of @data at @off, reads all of it. */
int ae_map_write(int fd, const void *data, uint64_t len, uint64_t off);
int ae_map_read(int fd, void *data, uint64_t len, uint64_t off);
