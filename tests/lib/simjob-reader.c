/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Simulated readers: processes without a rank that attach to a running job, look at units, ranges
 * and state, keep views while versions pass, leave, and come again. Nobody waits for them.
 */
#include "tests/lib/simjob-private.h"

#include <unistd.h>

#include <xxhash.h>

#define MS UINT64_C(1000000)

bool simreader_is_over(const struct simworker *worker)
{
        return worker->reader && worker->job->n_ended == worker->job->params.n_ranks;
}

uint64_t simreader_digest(const struct simworker *worker, const struct simheld *view)
{
        const struct ae_layout *layout = worker->job->layout;
        const struct ae_layout_unit *unit = &layout->units[view->unit];
        const char *bytes = (const char *)worker->params + worker->params->cache_off + view->off;
        uint64_t h = 0;

        for (uint32_t s = unit->segment_first; s < unit->segment_first + unit->n_segments; s++) {
                const struct ae_layout_segment *segment = &layout->segments[s];
                uint64_t end = segment->unit_off + segment->n * ae_dtype_size(segment->dtype);
                uint64_t from = AE_MAX(segment->unit_off, view->first);
                uint64_t to = AE_MIN(end, view->first + view->len);

                if (from < to)
                        h = XXH3_64bits_withSeed(bytes + (from - view->first), to - from, h);
        }
        return h;
}

static void on_idle(void *user)
{
        simworker_wake(user);
}

bool simreader_idle(struct simworker *worker)
{
        uint64_t ns = 1 + simworker_chance(worker, 10 * MS);

        if (!worker->begun) {
                worker->idle_until_ns = ae_sim_now(worker->job->sim) + ns;
                ae_sim_after(worker->job->sim, ns, on_idle, worker, NULL);
        }
        return ae_sim_now(worker->job->sim) >= worker->idle_until_ns;
}

void simreader_plan(struct simworker *worker)
{
        const struct simjob *job = worker->job;
        uint32_t n = 4 + (uint32_t)simworker_chance(worker, 24);

        worker->n_actions = worker->at = 0;
        worker->begun = false;
        for (uint32_t i = 0; i < n; i++) {
                static const enum simaction_kind kinds[] = { SIM_GATHER, SIM_GATHER, SIM_GATHER,
                                                             SIM_RANGE, SIM_IDLE, SIM_IDLE,
                                                             SIM_RELEASE, SIM_GET };
                struct simaction action = {
                        .kind = kinds[simworker_chance(worker, AE_ARRAY_LEN(kinds))],
                        .unit = (uint32_t)simworker_chance(worker, job->layout->n_units),
                };

                simworker_add(worker, action);
        }
        simworker_add(worker, (struct simaction){ .kind = SIM_RELEASE_ALL });
        simworker_add(worker, (struct simaction){ .kind = SIM_LEAVE });
}

/* Waits for a job to attach to. */
static void attach(void *user)
{
        struct simworker *worker = user;
        struct simjob *job = worker->job;

        if (job->freeing || !worker->node->node || simreader_is_over(worker))
                return;
        if (!job->live_ns || !simnode_job(worker->node)) {
                simreader_start(worker);
                return;
        }
        if (simnode_job(worker->node)->state >= AE_JOB_FAILED)
                return;
        worker->params = NULL;
        worker->sq_tail = worker->cq_head = 0;
        worker->token = 0;
        worker->n_held = 0;
        worker->begun = worker->ended = false;
        worker->attempt++; /* what it gets is drawn from it */
        simworker_hello(worker);
}

void simreader_start(struct simworker *worker)
{
        worker->ended = true;
        if (worker->fd >= 0)
                close(worker->fd);
        worker->fd = -1;
        ae_sim_after(worker->job->sim, MS + simworker_chance(worker, 10 * MS), attach, worker,
                     NULL);
}
