/* SPDX-License-Identifier: Apache-2.0 */
/* Allocation faults by the linker's --wrap: calls of x() arrive at __wrap_x(), and the allocator's
 * own function is __real_x(). State is per thread, so that threads don't fail each other. */
#include "tests/lib/fault.h"

#include "tests/lib/test.h"

#include <errno.h>
#include <sys/socket.h>

static _Thread_local struct {
        uint64_t nth; /* 0: disarmed */
        uint64_t count;
        bool fired;
} fault;

static _Thread_local struct {
        int error;
        uint64_t n_left, count;
} accepts;

void *__real_malloc(size_t len);
void *__real_calloc(size_t n, size_t len);
void *__real_realloc(void *old, size_t len);
void *__real_reallocarray(void *old, size_t n, size_t len);
char *__real_strdup(const char *string);
char *__real_strndup(const char *string, size_t len);
int __real_posix_memalign(void **ret, size_t align, size_t len);
void *__real_aligned_alloc(size_t align, size_t len);

int __real_accept4(int fd, struct sockaddr *address, socklen_t *len, int flags);

void *__wrap_malloc(size_t len);
void *__wrap_calloc(size_t n, size_t len);
void *__wrap_realloc(void *old, size_t len);
void *__wrap_reallocarray(void *old, size_t n, size_t len);
char *__wrap_strdup(const char *string);
char *__wrap_strndup(const char *string, size_t len);
int __wrap_posix_memalign(void **ret, size_t align, size_t len);
void *__wrap_aligned_alloc(size_t align, size_t len);
int __wrap_accept4(int fd, struct sockaddr *address, socklen_t *len, int flags);

/* Counts one allocation and says whether it is the one to fail. */
static bool fails(void)
{
        if (fault.nth == 0 || ++fault.count != fault.nth)
                return false;
        fault.fired = true;
        errno = ENOMEM;
        return true;
}

void *__wrap_malloc(size_t len)
{
        return fails() ? NULL : __real_malloc(len);
}

void *__wrap_calloc(size_t n, size_t len)
{
        return fails() ? NULL : __real_calloc(n, len);
}

void *__wrap_realloc(void *old, size_t len)
{
        return fails() ? NULL : __real_realloc(old, len);
}

void *__wrap_reallocarray(void *old, size_t n, size_t len)
{
        return fails() ? NULL : __real_reallocarray(old, n, len);
}

char *__wrap_strdup(const char *string)
{
        return fails() ? NULL : __real_strdup(string);
}

char *__wrap_strndup(const char *string, size_t len)
{
        return fails() ? NULL : __real_strndup(string, len);
}

int __wrap_posix_memalign(void **ret, size_t align, size_t len)
{
        return fails() ? ENOMEM : __real_posix_memalign(ret, align, len);
}

void *__wrap_aligned_alloc(size_t align, size_t len)
{
        return fails() ? NULL : __real_aligned_alloc(align, len);
}

int __wrap_accept4(int fd, struct sockaddr *address, socklen_t *len, int flags)
{
        accepts.count++;
        if (!accepts.n_left)
                return __real_accept4(fd, address, len, flags);
        accepts.n_left--;
        errno = accepts.error;
        return -1;
}

void fault_alloc_arm(uint64_t nth)
{
        fault.nth = nth;
        fault.count = 0;
        fault.fired = false;
}

bool fault_alloc_disarm(void)
{
        fault.nth = 0;
        return fault.fired;
}

uint64_t fault_alloc_count(void)
{
        return fault.count;
}

uint64_t fault_alloc_sweep(int (*attempt)(void *arg), void *arg, int expected)
{
        for (uint64_t nth = 1;; nth++) {
                int r;

                fault_alloc_arm(nth);
                r = attempt(arg);
                if (!fault_alloc_disarm()) {
                        assert_int_equal(r, 0);
                        return nth - 1;
                }
                if (r != expected)
                        fail_msg("with allocation %llu failing: got %d, expected %d",
                                 (unsigned long long)nth, r, expected);
        }
}

void fault_accept_arm(int error, uint64_t n)
{
        accepts.error = error;
        accepts.n_left = n;
        accepts.count = 0;
}

uint64_t fault_accept_count(void)
{
        return accepts.count;
}
