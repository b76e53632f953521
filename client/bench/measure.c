/* SPDX-License-Identifier: Apache-2.0 */
/* Threads, memory and time for the measurements. */
#include "client/bench/measure.h"

#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CACHES_MAX 16
#define LLC_GUESS (32 * AE_MIB)

/* ---- memory ----------------------------------------------------------------------------- */

/* Bytes of cache @index of the first processor; 0 when it has no such cache. */
static uint64_t cache_len(int index)
{
        unsigned long long value = 0;
        char path[80], unit = '\0';
        FILE *file;

        (void)snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/size",
                       index);
        file = fopen(path, "re");
        if (!file)
                return 0;
        if (fscanf(file, "%llu%c", &value, &unit) < 1)
                value = 0;
        (void)fclose(file);
        return unit == 'K' ? value * AE_KIB : unit == 'M' ? value * AE_MIB : value;
}

uint64_t ae_bench_llc_len(void)
{
        uint64_t best = 0;
        long known;

        for (int i = 0; i < CACHES_MAX; i++)
                best = AE_MAX(best, cache_len(i));
        if (best)
                return best;
        known = sysconf(_SC_LEVEL3_CACHE_SIZE);
        return known > 0 ? (uint64_t)known : LLC_GUESS;
}

void *ae_bench_memory_new(uint64_t len)
{
        void *memory = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        if (memory == MAP_FAILED) {
                (void)ae_fail_sys(errno, "cannot map %llu bytes to measure with",
                                  (unsigned long long)len);
                return NULL;
        }
        memset(memory, 1, len);
        return memory;
}

void ae_bench_memory_free(void *memory, uint64_t len)
{
        if (memory)
                (void)munmap(memory, len);
}

/* ---- teams ------------------------------------------------------------------------------ */

struct member {
        struct ae_bench_team *team; /* borrowed */
        pthread_t thread;
        uint32_t index;
};

/* fn and arg are written before the first barrier and read after it. */
struct ae_bench_team {
        uint32_t n;
        pthread_barrier_t begin, end;
        ae_bench_fn *fn; /* NULL: stop */
        void *arg;
        struct member members[]; /* the first is the caller and has no thread */
};

static void *member_main(void *arg)
{
        struct member *member = arg;
        struct ae_bench_team *team = member->team;

        for (;;) {
                (void)pthread_barrier_wait(&team->begin);
                if (!team->fn)
                        return NULL;
                team->fn(team->arg, member->index, team->n);
                (void)pthread_barrier_wait(&team->end);
        }
}

int ae_bench_team_new(uint32_t n, struct ae_bench_team **ret_team)
{
        struct ae_bench_team *team = calloc(1, sizeof(*team) + n * sizeof(team->members[0]));

        assert(n > 0);
        if (!team)
                return ae_fail(AE_ENOMEM, "no memory for a team of %u threads", n);
        team->n = n;
        (void)pthread_barrier_init(&team->begin, NULL, n);
        (void)pthread_barrier_init(&team->end, NULL, n);
        for (uint32_t i = 1; i < n; i++) {
                int err;

                team->members[i].team = team;
                team->members[i].index = i;
                err = pthread_create(&team->members[i].thread, NULL, member_main,
                                     &team->members[i]);
                /* Those that run already wait for the missing one: the program is about to end. */
                if (err)
                        return ae_fail_sys(err, "cannot start thread %u of %u", i, n);
        }
        *ret_team = team;
        return 0;
}

void ae_bench_team_free(struct ae_bench_team *team)
{
        if (!team)
                return;
        team->fn = NULL;
        (void)pthread_barrier_wait(&team->begin);
        for (uint32_t i = 1; i < team->n; i++)
                (void)pthread_join(team->members[i].thread, NULL);
        (void)pthread_barrier_destroy(&team->begin);
        (void)pthread_barrier_destroy(&team->end);
        free(team);
}

uint64_t ae_bench_team_run(struct ae_bench_team *team, ae_bench_fn *fn, void *arg)
{
        uint64_t start_ns;

        assert(fn);
        team->fn = fn;
        team->arg = arg;
        (void)pthread_barrier_wait(&team->begin);
        start_ns = ae_now_ns();
        fn(arg, 0, team->n);
        (void)pthread_barrier_wait(&team->end);
        return ae_now_ns() - start_ns;
}

void ae_bench_team_pair(struct ae_bench_team *team, const struct ae_bench_pair *pair,
                        uint64_t *ret_figure_ns, uint64_t *ret_floor_ns)
{
        uint64_t figure_ns = UINT64_MAX, floor_ns = UINT64_MAX;

        for (uint32_t i = 0; i <= pair->repeats; i++) {
                uint64_t figure = ae_bench_team_run(team, pair->figure, pair->figure_arg);
                uint64_t floor = ae_bench_team_run(team, pair->floor, pair->floor_arg);

                if (i == 0 && pair->repeats > 0)
                        continue;
                figure_ns = AE_MIN(figure_ns, figure);
                floor_ns = AE_MIN(floor_ns, floor);
        }
        *ret_figure_ns = AE_MAX(figure_ns, UINT64_C(1));
        *ret_floor_ns = AE_MAX(floor_ns, UINT64_C(1));
}

/* ---- numbers ---------------------------------------------------------------------------- */

static int compare(const void *a, const void *b)
{
        uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

        return (x > y) - (x < y);
}

uint64_t ae_bench_percentile(uint64_t *values, size_t n, uint32_t per_mille)
{
        assert(n > 0 && per_mille <= 1000);
        qsort(values, n, sizeof(*values), compare);
        return values[AE_MIN(n * per_mille / 1000, n - 1)];
}

uint64_t ae_bench_share(uint64_t n, uint32_t index, uint32_t of, uint64_t *ret_first)
{
        uint64_t each = ae_align_up(ae_div_up(n, of), 64);
        uint64_t first = AE_MIN(each * index, n);

        assert(index < of);
        *ret_first = first;
        return AE_MIN(each, n - first);
}
