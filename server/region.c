/* SPDX-License-Identifier: Apache-2.0 */
/* memfds and anonymous memory. See memfd_create(2), fcntl(2) "File sealing". */
#include "server/region.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct ae_region *ae_region_free(struct ae_region *region)
{
        if (!region)
                return NULL;
        if (region->base)
                munmap(region->base, region->len);
        ae_cleanup_close(&region->fd);
        ae_cleanup_close(&region->fd_ro);
        free(region);
        return NULL;
}
AE_DEFINE_CLEANUP(struct ae_region *, ae_region_free)

static int make_memfd(struct ae_region *region, const char *name)
{
        region->fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (region->fd < 0)
                return ae_fail_sys(errno, "cannot make memory '%s'", name);
        if (ftruncate(region->fd, (off_t)region->len) < 0)
                return ae_fail_sys(errno, "cannot size memory '%s' to %llu bytes", name,
                                   (unsigned long long)region->len);
        /* memfds are born 0777: whoever gets the read-only descriptor could open it for writing */
        if (fchmod(region->fd, 0400) < 0)
                return ae_fail_sys(errno, "cannot protect memory '%s'", name);
        return 0;
}

/*
 * The mode alone doesn't keep a process of the daemon's own user from writing: it may change it. So
 * what others may only read is sealed against every mapping for writing but the one that is there.
 */
static int seal(struct ae_region *region, const struct ae_region_spec *spec)
{
        int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
        char path[64];

        if (fcntl(region->fd, F_ADD_SEALS, spec->read_only ? seals | F_SEAL_FUTURE_WRITE : seals) <
            0)
                return ae_fail_sys(errno, "cannot seal memory '%s'", spec->name);
        if (!spec->read_only)
                return 0;
        (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", region->fd);
        region->fd_ro = open(path, O_RDONLY | O_CLOEXEC);
        if (region->fd_ro < 0)
                return ae_fail_sys(errno, "cannot open memory '%s' read-only", spec->name);
        return 0;
}

int ae_region_new(const struct ae_region_spec *spec, struct ae_region **ret_region)
{
        AE_CLEANUP(ae_region_free_p) struct ae_region *region = calloc(1, sizeof(*region));
        int flags = spec->shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
        int r;

        if (!region)
                return ae_fail(AE_ENOMEM, "no memory for the record of memory '%s'", spec->name);
        region->fd = region->fd_ro = -1;
        region->len = spec->len;
        r = spec->shared ? make_memfd(region, spec->name) : 0;
        if (r < 0)
                return r;
        region->base = mmap(NULL, spec->len, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE,
                            region->fd, 0);
        if (region->base == MAP_FAILED) {
                region->base = NULL;
                return ae_fail_sys(errno, "cannot map %llu bytes of memory '%s'",
                                   (unsigned long long)spec->len, spec->name);
        }
        r = spec->shared ? seal(region, spec) : 0;
        if (r < 0)
                return r;
        /* neither hint changes what the memory holds; a kernel without them works as well */
        (void)madvise(region->base, spec->len, MADV_DONTDUMP);
        if (spec->len >= 4 * AE_MIB)
                (void)madvise(region->base, spec->len, MADV_HUGEPAGE);
        *ret_region = ae_steal(region);
        return 0;
}
