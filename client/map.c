/* SPDX-License-Identifier: Apache-2.0 */
/* Mappings and memfds, see map.h. No state of its own; any thread. */
#include "client/map.h"

#include "proto/base/cleanup.h"
#include "proto/base/status.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int check_memfd(const char *what, int fd, uint64_t len)
{
        struct stat st;
        int seals = fcntl(fd, F_GET_SEALS);

        if (seals < 0 || !(seals & F_SEAL_SHRINK))
                return ae_fail(AE_EPROTO, "the daemon passed %s that is not a memfd sealed against "
                               "shrinking", what);
        if (fstat(fd, &st) < 0)
                return ae_fail_sys(errno, "cannot look at %s", what);
        if (len == 0 || len > (uint64_t)st.st_size)
                return ae_fail(AE_EPROTO, "the daemon says that %s has %llu bytes, but it has %lld",
                               what, (unsigned long long)len, (long long)st.st_size);
        return 0;
}

int ae_map_open(const char *what, int fd, uint64_t len, bool writable, bool populate,
                struct ae_map *ret_map)
{
        int flags = MAP_SHARED | (populate ? MAP_POPULATE : 0);
        void *base;
        int r;

        r = check_memfd(what, fd, len);
        if (r < 0)
                return r;
        base = mmap(NULL, len, writable ? PROT_READ | PROT_WRITE : PROT_READ, flags, fd, 0);
        if (base == MAP_FAILED)
                return ae_fail_sys(errno, "cannot map %llu bytes of %s", (unsigned long long)len,
                                   what);
        (void)madvise(base, len, MADV_DONTDUMP); /* a core file with it is only larger */
        *ret_map = (struct ae_map){ .base = base, .len = len };
        return 0;
}

void ae_map_close(struct ae_map *map)
{
        if (map->base)
                (void)munmap(map->base, map->len); /* cannot fail for a mapping of ours */
        *map = (struct ae_map){ .base = NULL };
}

int ae_map_memfd(const char *what, uint64_t len, int *ret_fd)
{
        AE_CLEANUP(ae_cleanup_close) int fd = memfd_create("autoep-transfer",
                                                           MFD_CLOEXEC | MFD_ALLOW_SEALING);

        if (fd < 0)
                return ae_fail_sys(errno, "cannot make a memfd for %s", what);
        if (ftruncate(fd, (off_t)len) < 0)
                return ae_fail_sys(errno, "cannot give a memfd %llu bytes for %s",
                                   (unsigned long long)len, what);
        if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
                return ae_fail_sys(errno, "cannot seal a memfd for %s", what);
        *ret_fd = ae_steal_fd(&fd);
        return 0;
}

int ae_map_write(int fd, const void *data, uint64_t len, uint64_t off)
{
        const uint8_t *from = data;

        while (len > 0) {
                ssize_t n = pwrite(fd, from, len, (off_t)off);

                if (n < 0 && errno == EINTR)
                        continue;
                if (n <= 0)
                        return ae_fail_sys(n < 0 ? errno : ENOSPC, "cannot write %llu bytes to a "
                                           "memfd", (unsigned long long)len);
                from += n;
                off += (uint64_t)n;
                len -= (uint64_t)n;
        }
        return 0;
}

int ae_map_read(int fd, void *data, uint64_t len, uint64_t off)
{
        uint8_t *to = data;

        while (len > 0) {
                ssize_t n = pread(fd, to, len, (off_t)off);

                if (n < 0 && errno == EINTR)
                        continue;
                if (n <= 0)
                        return ae_fail_sys(n < 0 ? errno : EIO, "cannot read %llu bytes of a memfd",
                                           (unsigned long long)len);
                to += n;
                off += (uint64_t)n;
                len -= (uint64_t)n;
        }
        return 0;
}
