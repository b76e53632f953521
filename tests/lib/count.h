/* SPDX-License-Identifier: Apache-2.0 */
/* What this process has open and runs, to compare with later. The dots of a folder count too. */
#pragma once

#include <assert.h>
#include <dirent.h>
#include <stddef.h>

static inline size_t count_entries(const char *path)
{
        DIR *dir = opendir(path);
        size_t n = 0;

        assert(dir);
        while (readdir(dir))
                n++;
        closedir(dir);
        return n;
}

static inline size_t count_fds(void)
{
        return count_entries("/proc/self/fd");
}

static inline size_t count_threads(void)
{
        return count_entries("/proc/self/task");
}
