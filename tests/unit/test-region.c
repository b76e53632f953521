/* SPDX-License-Identifier: Apache-2.0 */
/* Memory for the core: zeroed, sealed against resizing, and read-only to who may only read. */
#include "tests/lib/test.h"

#include "proto/base/status.h"
#include "server/region.h"
#include "tests/lib/count.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define LEN (3 * 4096u)
#define NOBODY 65534

static const struct ae_region_spec shared_spec = { .name = "autoep-test", .len = LEN,
                                                  .shared = true };

static const struct ae_region_spec read_only_spec = { .name = "autoep-test", .len = LEN,
                                                      .shared = true, .read_only = true };

static void test_private(void **state)
{
        static const struct ae_region_spec spec = { .name = "autoep-test", .len = LEN };
        static const char zero[LEN];
        struct ae_region *region = NULL;

        (void)state;
        assert_int_equal(ae_region_new(&spec, &region), 0);
        assert_int_equal(region->fd, -1);
        assert_int_equal(region->fd_ro, -1);
        assert_int_equal(region->len, LEN);
        assert_null(region->mem);
        assert_memory_equal(region->base, zero, LEN);
        memset(region->base, 1, LEN);
        assert_null(ae_region_free(region));
        assert_null(ae_region_free(NULL));
}

/* What one writes through the daemon's mapping, another reads through the read-only descriptor. */
static void test_shared(void **state)
{
        struct ae_region *region = NULL;
        const char *view;

        (void)state;
        assert_int_equal(ae_region_new(&read_only_spec, &region), 0);
        view = mmap(NULL, LEN, PROT_READ, MAP_SHARED, region->fd_ro, 0);
        assert_ptr_not_equal(view, MAP_FAILED);
        for (size_t i = 0; i < LEN; i++)
                assert_int_equal(view[i], 0);
        strcpy(region->base + LEN - 16, "seen");
        assert_string_equal(view + LEN - 16, "seen");
        assert_int_equal(munmap((void *)(uintptr_t)view, LEN), 0);
        ae_region_free(region);
}

/* What both sides write, through the one descriptor. */
static void test_shared_by_writers(void **state)
{
        struct ae_region *region = NULL;
        char *view;

        (void)state;
        assert_int_equal(ae_region_new(&shared_spec, &region), 0);
        assert_int_equal(region->fd_ro, -1);
        view = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, region->fd, 0);
        assert_ptr_not_equal(view, MAP_FAILED);
        strcpy(view, "theirs");
        assert_string_equal(region->base, "theirs");
        strcpy(region->base, "ours");
        assert_string_equal(view, "ours");
        assert_int_equal(munmap(view, LEN), 0);
        ae_region_free(region);
}

static void test_seals(void **state)
{
        struct ae_region *region = NULL;

        (void)state;
        assert_int_equal(ae_region_new(&shared_spec, &region), 0);
        assert_int_equal(fcntl(region->fd, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
        assert_int_equal(ftruncate(region->fd, 4096), -1);
        assert_int_equal(errno, EPERM);
        assert_int_equal(ftruncate(region->fd, 2 * LEN), -1);
        assert_int_equal(errno, EPERM);
        assert_int_equal(fcntl(region->fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
        assert_int_equal(errno, EPERM);
        assert_int_equal(lseek(region->fd, 0, SEEK_END), LEN);
        ae_region_free(region);
}

static void test_read_only(void **state)
{
        struct ae_region *region = NULL;

        (void)state;
        assert_int_equal(ae_region_new(&read_only_spec, &region), 0);
        assert_int_equal(fcntl(region->fd_ro, F_GETFL) & O_ACCMODE, O_RDONLY);
        assert_ptr_equal(mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, region->fd_ro, 0),
                         MAP_FAILED);
        assert_int_equal(errno, EACCES);
        assert_int_equal(write(region->fd_ro, "x", 1), -1);
        assert_int_equal(errno, EBADF);
        assert_int_equal(ftruncate(region->fd_ro, 0), -1);
        assert_int_equal(errno, EINVAL);
        assert_int_equal(fcntl(region->fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
        assert_int_equal(fcntl(region->fd_ro, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
        ae_region_free(region);
}

/* The owner of a memfd may give itself any mode, also one who runs as the daemon's user and got
 * only the read-only descriptor: what it then opens for writing cannot write. */
static void test_mode_given_back(void **state)
{
        struct ae_region *region = NULL;
        char path[64];
        int fd;

        (void)state;
        assert_int_equal(ae_region_new(&read_only_spec, &region), 0);
        assert_int_equal(fcntl(region->fd, F_GET_SEALS),
                         F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL | F_SEAL_FUTURE_WRITE);
        assert_int_equal(fchmod(region->fd_ro, 0600), 0);
        (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", region->fd_ro);
        fd = open(path, O_RDWR | O_CLOEXEC);
        assert_true(fd >= 0);
        assert_ptr_equal(mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
        assert_int_equal(errno, EPERM);
        assert_int_equal(pwrite(fd, "x", 1, 0), -1);
        assert_int_equal(errno, EPERM);
        assert_int_equal(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, LEN), -1);
        assert_int_equal(errno, EPERM);
        assert_int_equal(ftruncate(fd, 0), -1);
        assert_int_equal(errno, EPERM);
        close(fd);
        strcpy(region->base, "still writes"); /* the mapping that was there before */
        ae_region_free(region);
}

/* In a child that is not root: 0 when opening the read-only descriptor anew for writing is refused
 * and for reading isn't; else a number that says what went otherwise. */
static int reopen_as_nobody(void)
{
        struct ae_region *region = NULL;
        char path[64];
        int fd;

        if (geteuid() == 0 && setresuid(NOBODY, NOBODY, NOBODY) < 0)
                return 77;
        if (prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) < 0) /* or /proc/self/fd would be root's */
                return 77;
        if (ae_region_new(&read_only_spec, &region) < 0)
                return 1;
        (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", region->fd_ro);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
                return 2;
        close(fd);
        fd = open(path, O_RDWR | O_CLOEXEC);
        if (fd >= 0 || errno != EACCES)
                return 3;
        ae_region_free(region);
        return 0;
}

static void test_reopen(void **state)
{
        pid_t child = fork();
        int status;

        (void)state;
        assert_true(child >= 0);
        if (child == 0)
                _exit(reopen_as_nobody());
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFEXITED(status));
        if (WEXITSTATUS(status) == 77)
                skip(); /* root that may not become another */
        assert_int_equal(WEXITSTATUS(status), 0);
}

/* Sizes that cannot be: an error that names the memory, and no descriptor left behind. */
static void test_refused(void **state)
{
        static const struct ae_region_spec specs[] = {
                { .name = "autoep-huge", .len = UINT64_C(1) << 62 },
                { .name = "autoep-huge", .len = UINT64_C(1) << 62, .shared = true },
                { .name = "autoep-huge", .len = UINT64_MAX, .shared = true },
                { .name = "autoep-huge", .len = 0 },
                { .name = "autoep-huge", .len = 0, .shared = true },
        };
        size_t before = count_fds();

        (void)state;
        for (size_t i = 0; i < sizeof(specs) / sizeof(specs[0]); i++) {
                struct ae_region *region = (struct ae_region *)0x10;
                int r = ae_region_new(&specs[i], &region);

                assert_true(r == AE_ENOMEM || r == AE_ESYS);
                assert_ptr_equal(region, (void *)0x10);
                assert_non_null(strstr(ae_error_text(), "autoep-huge"));
        }
        assert_int_equal(count_fds(), before);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_private), cmocka_unit_test(test_shared),
                cmocka_unit_test(test_seals),   cmocka_unit_test(test_read_only),
                cmocka_unit_test(test_reopen),  cmocka_unit_test(test_refused),
                cmocka_unit_test(test_shared_by_writers), cmocka_unit_test(test_mode_given_back),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
