/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The cases of gather inside a worker. All use frozen units, which have weights and nothing else.
 * Misses are made by a cache of two units: whoever gathers more than that evicts.
 */
#include "client/bench/measure.h"
#include "client/bench/plain-tcp.h"
#include "client/bench/wake.h"
#include "client/bench/worker.h"

#include "proto/base/cleanup.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/layout.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TENSOR_ALIGN 256
#define STREAMS 2 /* of the tcp transport, by default */

static int gather(struct ae_bench_job *job, uint32_t unit, struct autoep_view *view)
{
        *view = (struct autoep_view)AUTOEP_VIEW_INIT;
        return ae_bench_job_check(autoep_gather(job->handle, unit, AUTOEP_DEFAULT_TIMEOUT, view));
}

static int release(struct ae_bench_job *job, struct autoep_view *view)
{
        return ae_bench_job_check(autoep_release(job->handle, view));
}

static struct ae_bench_row row_of(const struct ae_bench_job *job, enum ae_bench_unit unit,
                                  const char *floor_name)
{
        struct ae_bench_row row = { .unit = unit, .len = job->unit_len };

        (void)snprintf(row.floor_name, sizeof(row.floor_name), "%s", floor_name);
        return row;
}

/* ---- a view of what is cached ----------------------------------------------------------- */

#define VIEW_TARGET_NS 1000
#define VIEW_UNITS 4

/* What a hold can't do without: a count up, a second look, and the count down again. */
static uint64_t hold_floor(uint64_t *times, size_t n)
{
        static _Atomic uint32_t count;
        static _Atomic uint64_t entry;

        for (size_t i = 0; i < n; i++) {
                uint64_t start_ns = ae_now_ns();

                atomic_fetch_add(&count, 1);
                (void)atomic_load(&entry);
                atomic_fetch_sub_explicit(&count, 1, memory_order_release);
                times[i] = ae_now_ns() - start_ns;
        }
        return AE_MAX(ae_bench_percentile(times, n, 500), UINT64_C(1));
}

static int time_views(struct ae_bench_job *job, uint64_t *times, size_t n)
{
        struct autoep_view view;
        int r = 0;

        for (size_t i = 0; r == 0 && i < n; i++) {
                uint64_t start_ns = ae_now_ns();

                r = gather(job, (uint32_t)(i % VIEW_UNITS), &view);
                if (r == 0)
                        r = release(job, &view);
                times[i] = ae_now_ns() - start_ns;
        }
        return r;
}

int ae_bench_case_view(struct ae_bench_job *job)
{
        const size_t n = job->options->quick ? 20000 : 1000000;
        const struct ae_bench_model model = { .n_units = VIEW_UNITS,
                                              .unit_n = job->options->sizes[0] / 2 };
        AE_CLEANUP(ae_cleanup_free) uint64_t *times = calloc(n, sizeof(*times));
        struct ae_bench_row row;
        double floor;
        int r;

        if (!times)
                return ae_fail(AE_ENOMEM, "no memory for %zu times", n);
        r = ae_bench_job_register(job, &model);
        if (r == 0)
                r = time_views(job, times, VIEW_UNITS); /* waits until all are there */
        if (r < 0)
                return r;
        row = row_of(job, AE_BENCH_NS, "a hold's atomics");
        floor = (double)hold_floor(times, n);
        r = time_views(job, times, n);
        if (r < 0)
                return r;
        row.floor = floor;
        row.figure = (double)ae_bench_percentile(times, n, 500);
        row.aim = AE_BENCH_AIM_FIGURE;
        row.target = VIEW_TARGET_NS;
        (void)snprintf(row.name, sizeof(row.name), "view of a cached unit, p50");
        r = ae_bench_job_row(job, &row);
        row.figure = (double)ae_bench_percentile(times, n, 990);
        row.aim = AE_BENCH_AIM_NONE;
        (void)snprintf(row.name, sizeof(row.name), "view of a cached unit, p99");
        return r < 0 ? r : ae_bench_job_row(job, &row);
}

/* ---- a miss with everyone asleep -------------------------------------------------------- */

#define MISS_TARGET_US 30
#define MISS_UNITS 8
#define MISS_ASKED_N 2048 /* elements of a range */

static int ask_range(struct ae_bench_job *job, uint32_t unit)
{
        struct autoep_view view = AUTOEP_VIEW_INIT;
        int r = ae_bench_job_check(autoep_gather_range(job->handle, unit, 0, MISS_ASKED_N,
                                                       AUTOEP_DEFAULT_TIMEOUT, &view));

        return r < 0 ? r : release(job, &view);
}

/* A unit that is not cached and that another node (@foreign) or this one owns; AUTOEP_NONE. */
static int find_missing(struct ae_bench_job *job, bool foreign, uint32_t *ret_unit)
{
        struct autoep_stats before, after;

        *ret_unit = AUTOEP_NONE;
        for (uint32_t unit = 0; unit < MISS_UNITS && *ret_unit == AUTOEP_NONE; unit++) {
                int r = ask_range(job, unit); /* what was on its way is here afterwards */

                if (r == 0)
                        r = ae_bench_job_stats(job, &before);
                if (r == 0)
                        r = ask_range(job, unit);
                if (r == 0)
                        r = ae_bench_job_stats(job, &after);
                if (r < 0)
                        return r;
                if (after.gather_hits == before.gather_hits &&
                    foreign == (after.node_gather_recv_len > before.node_gather_recv_len))
                        *ret_unit = unit;
        }
        return 0;
}

static int time_misses(struct ae_bench_job *job, uint32_t unit, uint32_t pause_us, uint64_t *times,
                       size_t n)
{
        int r = 0;

        for (size_t i = 0; r == 0 && i < n; i++) {
                uint64_t start_ns;

                (void)usleep(pause_us);
                start_ns = ae_now_ns();
                r = ask_range(job, unit);
                times[i] = ae_now_ns() - start_ns;
        }
        return r;
}

static int measure_misses(struct ae_bench_job *job, uint64_t *times, uint32_t n)
{
        const uint32_t pause_us = 1000;
        const bool foreign = job->info.n_nodes > 1;
        struct ae_bench_row row = row_of(job, AE_BENCH_US, "eventfd, there+back");
        uint32_t unit;
        int r = find_missing(job, foreign, &unit);

        if (r < 0)
                return r;
        if (unit == AUTOEP_NONE)
                return ae_fail(AE_ESTATE, "none of %d units is missing in the cache", MISS_UNITS);
        r = ae_bench_wake_run(AE_BENCH_WAKE_EVENTFD, n, pause_us, times);
        if (r < 0)
                return r;
        row.len = MISS_ASKED_N * 2;
        row.floor = (double)ae_bench_percentile(times, n, 500) / 1e3;
        r = time_misses(job, unit, pause_us, times, n);
        if (r < 0)
                return r;
        row.figure = (double)ae_bench_percentile(times, n, 500) / 1e3;
        row.aim = foreign ? AE_BENCH_AIM_NONE : AE_BENCH_AIM_FIGURE;
        row.target = foreign ? 0 : MISS_TARGET_US;
        (void)snprintf(row.name, sizeof(row.name), foreign ? "miss, %u nodes, %.8s, p50"
                                                           : "miss, all asleep, p50",
                       job->info.n_nodes, job->info.transport);
        r = ae_bench_job_row(job, &row);
        row.figure = (double)ae_bench_percentile(times, n, 990) / 1e3;
        row.aim = AE_BENCH_AIM_NONE;
        (void)snprintf(row.name, sizeof(row.name), foreign ? "miss, %u nodes, %.8s, p99"
                                                           : "miss, all asleep, p99",
                       job->info.n_nodes, job->info.transport);
        if (r == 0)
                r = ae_bench_job_row(job, &row);
        if (r < 0 || foreign)
                return r;
        r = ae_bench_wake_run(AE_BENCH_WAKE_FUTEX, n, pause_us, times);
        if (r < 0)
                return r;
        row.figure = (double)ae_bench_percentile(times, n, 500) / 1e3;
        (void)snprintf(row.name, sizeof(row.name), "futex, there and back, p50");
        return ae_bench_job_row(job, &row);
}

/* Units that the daemon fetches by itself at the start fill the cache, and a range finds no room
 * while they are on their way: waits for them. */
static int settle(struct ae_bench_job *job)
{
        struct autoep_view view;
        int r = 0;

        for (uint32_t unit = 0; r == 0 && unit < MISS_UNITS; unit++) {
                r = gather(job, unit, &view);
                if (r == 0)
                        r = release(job, &view);
        }
        return r;
}

int ae_bench_case_miss(struct ae_bench_job *job)
{
        const uint32_t n = job->options->quick ? 100 : 1000;
        const uint64_t unit_len = job->options->sizes[0];
        const struct ae_bench_model model = { .n_units = MISS_UNITS, .unit_n = unit_len / 2,
                                              .cache_len = 2 * unit_len, .hold_len = unit_len };
        AE_CLEANUP(ae_cleanup_free) uint64_t *times = calloc(n, sizeof(*times));
        int r;

        if (!times)
                return ae_fail(AE_ENOMEM, "no memory for %u times", n);
        r = ae_bench_job_register(job, &model);
        if (r == 0)
                r = settle(job);
        if (r == 0)
                r = ae_bench_job_barrier(job);
        if (r == 0 && job->info.rank == 0)
                r = measure_misses(job, times, n);
        return r < 0 ? r : ae_bench_job_barrier(job);
}

/* ---- into the worker's own memory ------------------------------------------------------- */

#define COPY_TARGET 0.90
#define COPY_UNITS 8

struct copy {
        struct ae_bench_job *job;
        uint8_t *to, *from;
        int r;
};

static void copy_views(void *arg, uint32_t index, uint32_t n)
{
        struct copy *copy = arg;
        const uint64_t len = copy->job->unit_len;
        struct autoep_view view;

        assert(index == 0 && n == 1);
        for (uint32_t unit = 0; copy->r == 0 && unit < COPY_UNITS; unit++) {
                copy->r = gather(copy->job, unit, &view);
                if (copy->r < 0)
                        return;
                memcpy(copy->to + unit * len, view.data, len);
                copy->r = release(copy->job, &view);
        }
}

static void copy_own(void *arg, uint32_t index, uint32_t n)
{
        struct copy *copy = arg;
        const uint64_t len = copy->job->unit_len;

        assert(index == 0 && n == 1);
        for (uint32_t unit = 0; unit < COPY_UNITS; unit++)
                memcpy(copy->to + unit * len, copy->from + unit * len, len);
}

static int measure_copy(struct ae_bench_job *job, struct copy *copy)
{
        const struct ae_bench_pair pair = { copy_views, copy_own, copy, copy,
                                            job->options->quick ? 3 : 10 };
        struct ae_bench_row row = row_of(job, AE_BENCH_GBPS, "memcpy");
        struct ae_bench_team *team;
        uint64_t figure_ns, floor_ns;
        int r = ae_bench_team_new(1, &team);

        if (r < 0)
                return r;
        ae_bench_team_pair(team, &pair, &figure_ns, &floor_ns);
        ae_bench_team_free(team);
        row.len = COPY_UNITS * job->unit_len;
        row.figure = ae_bench_gbps(2 * row.len, figure_ns);
        row.floor = ae_bench_gbps(2 * row.len, floor_ns);
        row.aim = AE_BENCH_AIM_RATIO;
        row.target = COPY_TARGET;
        (void)snprintf(row.name, sizeof(row.name), "gather into own memory");
        return copy->r < 0 ? copy->r : ae_bench_job_row(job, &row);
}

int ae_bench_case_copy(struct ae_bench_job *job)
{
        const uint64_t unit_len = ae_align_up(job->options->sizes[0] / COPY_UNITS, TENSOR_ALIGN);
        const struct ae_bench_model model = { .n_units = COPY_UNITS, .unit_n = unit_len / 2 };
        struct copy copy = { .job = job, .to = ae_bench_memory_new(COPY_UNITS * unit_len),
                             .from = ae_bench_memory_new(COPY_UNITS * unit_len) };
        int r = copy.to && copy.from ? 0 : AE_ENOMEM;

        if (r == 0)
                r = ae_bench_job_register(job, &model);
        if (r == 0)
                r = measure_copy(job, &copy);
        ae_bench_memory_free(copy.to, COPY_UNITS * unit_len);
        ae_bench_memory_free(copy.from, COPY_UNITS * unit_len);
        return r;
}

/* ---- a unit fetched whole over the wire ------------------------------------------------- */

#define FETCH_TARGET 0.90
#define FETCH_ROUNDS 8
#define FETCH_QUICK_ROUNDS 3

/*        name   who asks     words */
#define MODE_TABLE(X)                                                                             \
        X(ONE,  false, "one asks") /* for whole units: its own part is copied meanwhile */        \
        X(ALL,  true,  "all ask")                                                                 \
        X(PART, false, "far part") /* of a unit, by a range: nothing is copied locally */

enum mode {
#define MODE_ENUM(name, all, words) MODE_##name,
        MODE_TABLE(MODE_ENUM)
#undef MODE_ENUM
        N_MODES
};

static const struct {
        bool all_ask; /* the workers of all nodes, otherwise those of node 0 */
        const char *words;
} modes[N_MODES] = {
#define MODE_ROW(name, all, words) { all, words },
        MODE_TABLE(MODE_ROW)
#undef MODE_ROW
};

struct fetches {
        uint64_t ns;  /* of the fastest that was not in the cache; 0: there was none */
        uint64_t len; /* its bytes on the wire */
};

static uint32_t workers_of(const struct ae_bench_job *job)
{
        return job->options->workers;
}

/* Each worker of a node may hold a unit, and the largest has to fit beside these. */
static uint32_t fetch_cached(const struct ae_bench_job *job)
{
        return workers_of(job) + 1;
}

/* Two more than are cached, so that going round them evicts. */
static uint32_t fetch_units(const struct ae_bench_job *job)
{
        return fetch_cached(job) + 2;
}

static int ask(struct ae_bench_job *job, enum mode mode, uint32_t i, struct autoep_view *view)
{
        const uint32_t nodes = job->info.n_nodes, units = fetch_units(job);
        const uint64_t part_n = job->model.unit_n / nodes / AE_LAYOUT_CUT *
                                AE_LAYOUT_CUT;

        if (mode != MODE_PART)
                return gather(job, i % units, view);
        *view = (struct autoep_view)AUTOEP_VIEW_INIT;
        return ae_bench_job_check(autoep_gather_range(job->handle, i / nodes % units,
                                                      i % nodes * part_n, part_n,
                                                      AUTOEP_DEFAULT_TIMEOUT, view));
}

/* From when the first worker of node 0 asked until the last had its view; clocks of one machine. */
static int time_of_node(struct ae_bench_job *job, uint64_t start_ns, uint64_t end_ns,
                        uint64_t *ret_ns)
{
        const uint64_t mine[2] = { start_ns, end_ns };
        uint64_t all[AE_BENCH_NODES_MAX * AE_BENCH_WORKERS_MAX][2];
        int r = ae_bench_job_share(job, mine, sizeof(mine), all);

        for (uint32_t rank = 0; r == 0 && rank < workers_of(job); rank++) {
                start_ns = AE_MIN(start_ns, all[rank][0]);
                end_ns = AE_MAX(end_ns, all[rank][1]);
        }
        *ret_ns = end_ns - start_ns;
        return r;
}

/* A fetch by the workers of node 0 or of all nodes; what this rank saw of it. */
static int fetch_once(struct ae_bench_job *job, enum mode mode, uint32_t i,
                      struct fetches *ret_fetch)
{
        const bool several = workers_of(job) > 1;
        const bool asks = modes[mode].all_ask || job->info.node == 0;
        struct autoep_stats before, after;
        struct autoep_view view;
        uint64_t start_ns, end_ns, ns;
        int r = ae_bench_job_stats(job, &before); /* before any worker of this node asks */

        if (r == 0 && (modes[mode].all_ask || several))
                r = ae_bench_job_barrier(job);
        start_ns = ae_now_ns();
        if (r == 0 && asks)
                r = ask(job, mode, i, &view);
        end_ns = ae_now_ns();
        ns = end_ns - start_ns;
        if (r == 0 && several)
                r = time_of_node(job, start_ns, end_ns, &ns);
        if (r == 0 && asks)
                r = release(job, &view);
        if (r == 0)
                r = ae_bench_job_stats(job, &after);
        if (r < 0)
                return r;
        ret_fetch->ns = ns;
        ret_fetch->len = after.gather_hits != before.gather_hits
                         ? 0 : after.node_gather_recv_len - before.node_gather_recv_len;
        return 0;
}

/* A fetch counts when all that it brought from elsewhere came over the wire. */
static int fetch_all(struct ae_bench_job *job, enum mode mode, struct fetches *ret_best)
{
        const uint32_t n = (job->options->quick ? FETCH_QUICK_ROUNDS : FETCH_ROUNDS) *
                           fetch_units(job);
        const bool takes_part = modes[mode].all_ask || workers_of(job) > 1 || job->info.rank == 0;
        struct fetches fetch;
        int r = 0;

        *ret_best = (struct fetches){ 0 };
        for (uint32_t i = 0; takes_part && r == 0 && i < n; i++) {
                r = fetch_once(job, mode, i, &fetch);
                if (r < 0 || i < fetch_units(job) || fetch.len == 0)
                        continue;
                if (ret_best->ns == 0 || ae_bench_gbps(fetch.len, fetch.ns) >
                                         ae_bench_gbps(ret_best->len, ret_best->ns))
                        *ret_best = fetch;
        }
        return r;
}

static void copy_all(void *arg, uint32_t index, uint32_t n)
{
        const struct copy *copy = arg;

        assert(index == 0 && n == 1);
        memcpy(copy->to, copy->from, copy->job->unit_len);
}

/* One copy of as many bytes by one thread, through as many ranges: what the shm transport can't do
 * without. */
static int copy_floor(struct ae_bench_job *job, uint64_t len, uint64_t *ret_ns)
{
        const uint32_t cached = fetch_cached(job), units = fetch_units(job);
        struct ae_bench_job part = { .unit_len = len };
        uint8_t *to = ae_bench_memory_new(cached * len);
        uint8_t *from = ae_bench_memory_new(units * len);
        struct ae_bench_team *team = NULL;
        int r = to && from ? ae_bench_team_new(1, &team) : AE_ENOMEM;

        *ret_ns = UINT64_MAX;
        for (uint32_t i = 0; r == 0 && i < (job->options->quick ? 4u : 12u); i++) {
                struct copy copy = { .job = &part, .to = to + i % cached * len,
                                     .from = from + i % units * len };

                *ret_ns = AE_MIN(*ret_ns, ae_bench_team_run(team, copy_all, &copy));
        }
        ae_bench_team_free(team);
        ae_bench_memory_free(to, cached * len);
        ae_bench_memory_free(from, units * len);
        return r;
}

static int fetch_row(struct ae_bench_job *job, enum mode mode, const struct fetches *best)
{
        const bool tcp = strcmp(job->info.transport, "tcp") == 0;
        const bool aims = tcp && job->info.n_nodes == 2; /* the floor's processes are two */
        const uint64_t own_len =
                mode == MODE_PART ? 0 : job->unit_len - AE_MIN(best->len, job->unit_len);
        struct ae_bench_row row = row_of(job, AE_BENCH_GBPS,
                                         !tcp ? "memcpy"
                                         : own_len ? "TCP + own copy"
                                                   : "plain TCP");
        const struct ae_bench_tcp plain = { .len = best->len, .own_len = own_len,
                                            .streams = STREAMS, .n_from = fetch_units(job),
                                            .n_to = fetch_cached(job),
                                            .both_ways = modes[mode].all_ask,
                                            .repeats = job->options->quick ? 3 : 8 };
        uint64_t floor_ns;
        int r;

        if (job->info.rank != 0)
                return 0;
        if (best->ns == 0)
                return ae_fail(AE_ESTATE, "no unit of %llu bytes was fetched from another node",
                               (unsigned long long)job->unit_len);
        r = tcp ? ae_bench_tcp_run(&plain, &floor_ns) : copy_floor(job, plain.len, &floor_ns);
        if (r < 0)
                return r;
        row.len = best->len;
        row.figure = ae_bench_gbps(best->len, best->ns);
        row.floor = ae_bench_gbps(best->len, floor_ns);
        row.aim = aims ? AE_BENCH_AIM_RATIO : AE_BENCH_AIM_NONE;
        row.target = aims ? FETCH_TARGET : 0;
        (void)snprintf(row.name, sizeof(row.name), "fetch, %u x %u, %.8s, %s", job->info.n_nodes,
                       workers_of(job), job->info.transport, modes[mode].words);
        return ae_bench_job_row(job, &row);
}

static int measure_fetch(struct ae_bench_job *job, enum mode mode)
{
        struct fetches best;
        int r = ae_bench_job_barrier(job);

        if (r == 0)
                r = fetch_all(job, mode, &best);
        if (r == 0)
                r = ae_bench_job_barrier(job);
        if (r == 0)
                r = fetch_row(job, mode, &best);
        return r < 0 ? r : ae_bench_job_barrier(job);
}

int ae_bench_case_fetch(struct ae_bench_job *job)
{
        const uint64_t unit_len = job->options->sizes[0];
        const struct ae_bench_model model = { .n_units = fetch_units(job),
                                              .unit_n = unit_len / 2,
                                              .cache_len = fetch_cached(job) * unit_len,
                                              .hold_len = unit_len };
        int r = ae_bench_job_register(job, &model);

        for (int mode = 0; r == 0 && mode < N_MODES; mode++) {
                if (mode == MODE_PART && workers_of(job) > 1)
                        continue; /* who asks once a range has come fetches it again */
                r = measure_fetch(job, (enum mode)mode);
        }
        return r;
}
