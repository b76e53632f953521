/* SPDX-License-Identifier: Apache-2.0 */
/* The nodes of a simulated job: what a daemon does around struct ae_node, in virtual time; and the
 * life of the whole. */
#include "tests/lib/simjob-private.h"

#include <inttypes.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#define TICK_NS (20 * UINT64_C(1000000))
#define ALIAS_LEN (UINT64_C(2) << 20)
/* At most so long things take; without data polls and optimizers more, see simjob_params. */
#define POLL_NS 3000
#define POLL_MANY_NS 20000
#define TASK_NS 60000
#define APPLY_MANY_NS (8 * UINT64_C(1000000))

static uint64_t draw_ns(struct simjob *job, uint64_t max_ns)
{
        return 1 + ae_sim_random(job->sim) % max_ns;
}

struct ae_job *simnode_job(const struct simnode *node)
{
        struct ae_core *core = node->node ? ae_node_core(node->node) : NULL;

        return core && !ae_list_empty(&core->jobs)
                       ? ae_list_entry(core->jobs.next, struct ae_job, link) : NULL;
}

/* ---- polling ---------------------------------------------------------------------------- */

static void on_poll(void *user)
{
        struct simnode *node = user;
        struct ae_worker *worker;

        node->polls = false;
        if (!node->node)
                return;
        if (ae_node_poll(node->node))
                simnode_kick(node);
        ae_list_for_each(worker, &ae_node_core(node->node)->workers, link)
                simworker_ring_left(worker);
        simref_check_shard(node);
}

void simnode_kick(struct simnode *node)
{
        if (node->polls || !node->node)
                return;
        node->polls = true;
        ae_sim_after(node->job->sim,
                     draw_ns(node->job, node->job->params.no_data ? POLL_MANY_NS : POLL_NS),
                     on_poll, node, NULL);
}

static void on_wake(void *user)
{
        simnode_kick(user);
}

static void on_tick(void *user)
{
        struct simnode *node = user;

        if (!node->node)
                return;
        ae_node_tick(node->node, ae_sim_now(node->job->sim));
        simnode_kick(node);
        ae_sim_after(node->job->sim, TICK_NS, on_tick, node, NULL);
}

/* ---- tasks ------------------------------------------------------------------------------ */

static void finish_task(struct simtask *task)
{
        struct simnode *node = task->node;
        struct ae_task *work = task->task;

        ae_sim_cancel(node->job->sim, &task->timer);
        if (!task->ran && !node->job->params.no_data)
                ae_task_run(work, 0);
        ae_list_unlink(&task->link);
        free(task);
        ae_node_task_done(node->node, work);
}

/* A thread has done the work at some time and the core hears of it at a later one. */
static void on_task(void *user)
{
        struct simtask *task = user;
        struct simnode *node = task->node;

        if (!task->ran && !node->job->params.no_data) {
                ae_task_run(task->task, 0);
                task->ran = true;
                ae_sim_after(node->job->sim, draw_ns(node->job, 20000), on_task, task,
                             &task->timer);
                return;
        }
        finish_task(task);
        simref_check_shard(node);
        simnode_kick(node);
}

static void node_task(void *user, struct ae_task *work)
{
        struct simnode *node = user;
        struct simtask *task = calloc(1, sizeof(*task));
        bool slow = node->job->params.no_data && work->kind == AE_TASK_APPLY;

        assert_non_null(task);
        task->node = node;
        task->task = work;
        ae_list_push(&node->tasks, &task->link);
        ae_sim_after(node->job->sim, draw_ns(node->job, slow ? APPLY_MANY_NS : TASK_NS), on_task,
                     task, &task->timer);
}

/* ---- memory ----------------------------------------------------------------------------- */

static char *map(size_t len, int fd, int protection)
{
        int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED;
        void *base = mmap(NULL, len, protection, flags, fd, 0);

        assert_true(base != MAP_FAILED);
        return base;
}

/* Addresses behind which the same little memory comes again and again. */
static void alias(struct simjob *job, char *base, uint64_t len)
{
        for (uint64_t off = 0; off < len; off += ALIAS_LEN) {
                void *at = mmap(base + off, AE_MIN(ALIAS_LEN, len - off), PROT_READ | PROT_WRITE,
                                MAP_SHARED | MAP_FIXED, job->alias_fd, 0);

                assert_true(at == base + off);
        }
}

static char *region_base(struct simjob *job, const struct ae_region_spec *spec)
{
        char *base;

        if (!job->params.no_data)
                return map(spec->len, -1, PROT_READ | PROT_WRITE);
        if (spec->data) {
                assert_true(spec->len <= job->reserved_len);
                return job->reserved;
        }
        base = map(spec->len, -1, PROT_READ | PROT_WRITE);
        (void)madvise(base, spec->len, MADV_NOHUGEPAGE); /* its first bytes alone are used */
        if (strcmp(spec->name, "autoep-shard") == 0 && spec->len > ALIAS_LEN)
                alias(job, base + ALIAS_LEN, spec->len - ALIAS_LEN);
        if (strcmp(spec->name, "autoep-transfer") == 0 || strcmp(spec->name, "autoep-stage") == 0)
                alias(job, base, spec->len);
        return base;
}

static int node_region_new(void *user, const struct ae_region_spec *spec, struct ae_region **ret)
{
        struct simnode *node = user;
        struct ae_region *region = calloc(1, sizeof(*region));

        assert_non_null(region);
        region->base = region_base(node->job, spec);
        region->len = spec->len;
        region->fd = region->fd_ro = -1;
        node->n_regions++;
        *ret = region;
        return 0;
}

static void node_region_free(void *user, struct ae_region *region)
{
        struct simnode *node = user;

        assert_true(node->n_regions > 0);
        node->n_regions--;
        if (region->base != node->job->reserved)
                munmap(region->base, region->len);
        free(region);
}

/* ---- the rest of what a node asks of its owner -------------------------------------------- */

static void node_worker_send(void *user, struct ae_worker *worker, uint32_t type,
                             const ProtobufCMessage *message, const int *fds, size_t n_fds)
{
        (void)user;
        (void)fds;
        (void)n_fds;
        simworker_message(ae_core_worker_session(worker), type, message);
}

static void node_worker_wake(void *user, struct ae_worker *worker)
{
        (void)user;
        simworker_wake(ae_core_worker_session(worker));
}

static void node_log(void *user, int level, const char *text)
{
        const struct simnode *node = user;

        if (getenv("SIMJOB_LOG"))
                fprintf(stderr, "%10llu us node %u [%d] %s\n",
                        (unsigned long long)(ae_sim_now(node->job->sim) / 1000), node->id, level,
                        text);
        if (level == 0 && strstr(text, "protocol"))
                simjob_fail(node->job, "node %u: %s", node->id, text);
}

static void open_node(struct simjob *job, uint32_t id, const char *const *peers)
{
        struct simnode *node = &job->nodes[id];
        struct ae_node_options options = {
                .node = id, .n_nodes = job->params.n_nodes, .peers = peers, .transport = "sim",
                .loop = job->sim, .incarnation = 1000 + id, .memory_len = UINT64_C(1) << 50,
                .n_threads = 1, .wake = on_wake, .task = node_task, .region_new = node_region_new,
                .region_free = node_region_free, .worker_send = node_worker_send,
                .worker_wake = node_worker_wake, .log = node_log, .user = node,
        };

        node->job = job;
        node->id = id;
        ae_list_init(&node->tasks);
        if (ae_node_new(&options, &node->node) < 0)
                fail_msg("cannot make node %u: %s", id, ae_error_text());
        ae_sim_after(job->sim, draw_ns(job, TICK_NS), on_tick, node, NULL);
        simnode_kick(node);
}

static void open_nodes(struct simjob *job)
{
        uint32_t n = job->params.n_nodes;
        char **peers = calloc(n, sizeof(char *));
        char text[16];

        assert_non_null(peers);
        for (uint32_t i = 0; i < n; i++) {
                (void)snprintf(text, sizeof(text), "%u", i);
                peers[i] = strdup(text);
        }
        job->nodes = calloc(n, sizeof(*job->nodes));
        assert_non_null(job->nodes);
        for (uint32_t i = 0; i < n; i++)
                open_node(job, i, (const char *const *)peers);
        for (uint32_t i = 0; i < n; i++)
                free(peers[i]);
        free(peers);
}

/* ---- life ------------------------------------------------------------------------------- */

void simjob_draw(uint64_t seed, struct simjob_params *ret_params)
{
        uint64_t h = (seed + 1) * UINT64_C(0x9e3779b97f4a7c15);

        h ^= h >> 29;
        h *= UINT64_C(0xbf58476d1ce4e5b9);
        h ^= h >> 32;
        *ret_params = (struct simjob_params){
                .seed = seed,
                .n_nodes = 8 + (uint32_t)(h % 25),
                .n_steps = 3 + (uint32_t)(h >> 8) % 3,
                .large_one_in = (h >> 12) % 4 == 0 ? 4 : 0,
                .pads = (h >> 16) & 1,
                .tight_cache = (h >> 17) & 1,
                .tight_overflow = (h >> 18) % 4 == 0,
                .narrow_wire = (h >> 20) % 4 == 0,
                .sgd = (h >> 22) % 4 == 0,
                .exchange = (h >> 24) & 1,
                .ranges = (h >> 25) & 1,
                .gets = (h >> 26) & 1,
                .puts = (h >> 27) & 1,
                .nan = (h >> 28) & 1,
                .redo = (h >> 29) & 1,
                .refuse = (h >> 30) & 1,
                .keep_views = (h >> 31) & 1,
                .net = { .early_done_ppm = (h >> 33) & 1 ? 200000 : 0,
                         .latency_min_ns = (h >> 34) & 1 ? 1000 : 0,
                         .latency_max_ns = (h >> 34) & 1 ? 2000000 : 0 },
        };
        ret_params->n_ranks =
                1 + (uint32_t)(h >> 40) % (ret_params->n_nodes + ret_params->n_nodes / 2);
        ret_params->n_readers = (h >> 52) % 3 == 0 ? 1 + (uint32_t)(h >> 56) % 2 : 0;
        ret_params->slots = 2 + (uint32_t)(h >> 48) % 3;
        ret_params->wild = (h >> 60) & 1;
        if (seed % 32 == 19) { /* few, for it takes long */
                ret_params->huge = true;
                ret_params->n_nodes = 2 + (uint32_t)(h % 3);
                ret_params->n_ranks = AE_MIN(ret_params->n_ranks, 3u);
                ret_params->n_steps = 2;
        }
}

static void place_ranks(struct simjob *job)
{
        uint32_t *load = calloc(job->params.n_nodes, sizeof(*load));

        job->rank_node = calloc(job->params.n_ranks, sizeof(*job->rank_node));
        assert_true(load && job->rank_node);
        for (uint32_t rank = 0; rank < job->params.n_ranks; rank++) {
                uint32_t node = job->params.no_data ?
                                        rank % job->params.n_nodes :
                                        (uint32_t)(simplan_hash(job, 97, rank, 0, 0, 0) %
                                                   job->params.n_nodes);

                while (load[node] == 4)
                        node = (node + 1) % job->params.n_nodes;
                load[node]++;
                job->rank_node[rank] = node;
        }
        free(load);
}

static void make_workers(struct simjob *job)
{
        job->n_workers = job->params.n_ranks + job->params.n_readers;
        job->workers = calloc(job->n_workers, sizeof(*job->workers));
        assert_non_null(job->workers);
        for (uint32_t rank = 0; rank < job->n_workers; rank++) {
                struct simworker *worker = &job->workers[rank];

                worker->job = job;
                worker->rank = rank;
                worker->reader = rank >= job->params.n_ranks;
                worker->node = &job->nodes[worker->reader ? simplan_hash(job, 98, rank, 0, 0, 0) %
                                                                    job->params.n_nodes
                                                          : job->rank_node[rank]];
                worker->fd = -1;
                worker->xsent = calloc(job->params.n_ranks, sizeof(*worker->xsent));
                worker->xgot = calloc(job->params.n_ranks, sizeof(*worker->xgot));
                worker->xacked = calloc(job->params.n_ranks, sizeof(*worker->xacked));
                worker->xsent_before = calloc(job->params.n_ranks, sizeof(*worker->xsent));
                worker->xgot_before = calloc(job->params.n_ranks, sizeof(*worker->xgot));
                assert_true(worker->xsent && worker->xgot && worker->xsent_before &&
                            worker->xgot_before && worker->xacked);
                if (worker->reader)
                        simreader_start(worker);
                else
                        simworker_start(worker);
        }
}

/* The largest thing that is data alone: all sums, an inbox. */
static void reserve(struct simjob *job)
{
        uint64_t inbox = (uint64_t)job->params.n_nodes * 4 * (UINT64_C(4) << 20);

        job->reserved_len =
                AE_MAX(job->layout->n_grad * sizeof(float) + 4096, inbox) + (UINT64_C(64) << 20);
        job->reserved = map(job->reserved_len, -1, PROT_NONE);
        job->alias_fd = memfd_create("simjob", MFD_CLOEXEC);
        assert_true(job->alias_fd >= 0);
        assert_int_equal(ftruncate(job->alias_fd, (off_t)ALIAS_LEN), 0);
}

struct simjob *simjob_new(const struct simjob_params *params)
{
        struct simjob *job = calloc(1, sizeof(*job));

        assert_non_null(job);
        job->params = *params;
        job->alias_fd = -1;
        assert_int_equal(ae_sim_new(params->seed, &params->net, &job->sim), 0);
        place_ranks(job);
        simplan_model(job);
        simref_init(job);
        if (params->no_data)
                reserve(job);
        open_nodes(job);
        make_workers(job);
        return job;
}

static void finish_tasks(struct simnode *node)
{
        while (!ae_list_empty(&node->tasks))
                finish_task(ae_list_entry(node->tasks.next, struct simtask, link));
}

/* Whether anything of the job is left on a node whose sessions have all ended. */
static void check_empty(struct simjob *job, struct simnode *node)
{
        const struct ae_core *core = ae_node_core(node->node);

        if (!ae_list_empty(&core->jobs) || core->memory_len || node->n_regions)
                simjob_fail(job,
                            "node %u keeps %" PRIu64 " bytes, %u regions, after its last worker",
                            node->id, core->memory_len, node->n_regions);
}

static void close_workers(struct simjob *job)
{
        for (uint32_t rank = 0; rank < job->n_workers; rank++) {
                struct simworker *worker = &job->workers[rank];

                if (worker->worker)
                        ae_core_worker_gone(worker->worker, "the test is over");
                worker->worker = NULL;
                job->n_ended += !worker->ended && !worker->reader;
                worker->ended = true;
        }
}

static void free_all(struct simjob *job)
{
        for (uint32_t rank = 0; rank < job->n_workers; rank++) {
                struct simworker *worker = &job->workers[rank];

                if (worker->fd >= 0)
                        close(worker->fd);
                free(worker->actions);
                free(worker->xsent);
                free(worker->xgot);
                free(worker->xacked);
                free(worker->xsent_before);
                free(worker->xgot_before);
        }
        simref_deinit(job);
        ae_layout_free(job->layout);
        ae_model_free(job->model);
        if (job->reserved)
                munmap(job->reserved, job->reserved_len);
        if (job->alias_fd >= 0)
                close(job->alias_fd);
        free(job->put.values);
        free(job->packed);
        free(job->n_uses);
        free(job->rank_node);
        free(job->workers);
        free(job->nodes);
        free(job);
}

struct simjob *simjob_free(struct simjob *job)
{
        if (!job)
                return NULL;
        job->freeing = true;
        close_workers(job);
        ae_sim_run(job->sim, ae_sim_now(job->sim) + UINT64_C(3000000000));
        for (uint32_t i = 0; i < job->params.n_nodes; i++) {
                struct simnode *node = &job->nodes[i];

                if (!node->node)
                        continue;
                finish_tasks(node);
                check_empty(job, node);
        }
        for (uint32_t i = 0; i < job->params.n_nodes; i++)
                job->nodes[i].node = ae_node_free(job->nodes[i].node);
        job->sim = ae_sim_free(job->sim);
        free_all(job);
        return NULL;
}

static bool all_ended(const struct simjob *job)
{
        return job->n_ended == job->params.n_ranks;
}

bool simjob_run(struct simjob *job, uint64_t limit_ns)
{
        uint64_t end = ae_sim_now(job->sim) + limit_ns;

        for (uint64_t n = 1; ae_sim_now(job->sim) < end; n++) {
                if (!ae_sim_step(job->sim))
                        return all_ended(job);
                if (n % 256 == 0 && all_ended(job))
                        return true;
        }
        return all_ended(job);
}

void simjob_run_to_end(struct simjob *job, uint64_t limit_ns)
{
        if (!simjob_run(job, limit_ns))
                simjob_fail(job, "the job hangs");
}

/* ---- looking ---------------------------------------------------------------------------- */

static void report_node(const struct simnode *node, FILE *to)
{
        const struct ae_job *job = simnode_job(node);
        char waiting[sizeof(((struct ae_local_text *)0)->text)] = "";

        if (!node->node || !job) {
                fprintf(to, "  node %u: %s\n", node->id, node->node ? "no job" : "killed");
                return;
        }
        if (job->page)
                ae_local_text_get(&job->page->waiting, waiting);
        fprintf(to,
                "  node %u: job state %d round %" PRIu64 " (state %d) version %" PRIu64
                " closed %u/%u ended %u incomplete %u applying %u tasks %u puts %u"
                                " put_prepared %d%s%s%s%s\n",
                node->id, (int)job->state, job->round, (int)job->round_state, job->version,
                job->n_closed, job->n_local, job->n_ended, job->n_incomplete, job->n_applying,
                job->n_tasks_out, job->n_puts_out, job->put_prepared, waiting[0] ? ": " : "",
                waiting, job->why[0] ? ": " : "", job->why);
}

void simjob_report(struct simjob *job, FILE *to)
{
        uint32_t n = 0;

        for (uint32_t i = 0; i < AE_MIN(job->params.n_nodes, 40u); i++)
                report_node(&job->nodes[i], to);
        for (uint32_t rank = 0; rank < job->n_workers && n < 40; rank++) {
                const struct simworker *worker = &job->workers[rank];
                char why[sizeof(((struct ae_local_text *)0)->text)] = "";

                if (worker->ended)
                        continue;
                n++;
                if (worker->worker)
                        ae_local_text_get(&worker->page->why, why);
                fprintf(to, "  rank %u on node %u: step %u attempt %u %s; %s\n", rank,
                        worker->node->id, worker->step, worker->attempt, simworker_text(worker),
                        why);
        }
}

struct ae_sim *simjob_sim(struct simjob *job)
{
        return job->sim;
}

struct ae_net *simjob_net(struct simjob *job, uint32_t node)
{
        return ae_node_net(job->nodes[node].node);
}

struct ae_core *simjob_core(struct simjob *job, uint32_t node)
{
        return ae_node_core(job->nodes[node].node);
}

uint32_t simjob_rank_node(const struct simjob *job, uint32_t rank)
{
        return job->rank_node[rank];
}

uint32_t simjob_step(const struct simjob *job)
{
        return job->ref.step;
}

uint64_t simjob_live_ns(const struct simjob *job)
{
        return job->live_ns;
}

uint32_t simjob_n_reads(const struct simjob *job)
{
        return job->n_reads;
}

uint32_t simjob_n_verdicts(const struct simjob *job, uint32_t kind)
{
        return job->ref.n_kinds[kind % 8];
}

void simjob_end(const struct simjob *job, uint32_t rank, struct simjob_end *ret_end)
{
        const struct simworker *worker = &job->workers[rank];

        *ret_end = (struct simjob_end){ .ended = worker->ended, .failed = worker->failed,
                                        .killed = worker->killed, .status = worker->status,
                                        .why = worker->why, .at_ns = worker->ended_ns };
}

/* ---- faults ----------------------------------------------------------------------------- */

static void end_killed(struct simworker *worker)
{
        if (!worker->ended) {
                worker->killed = true;
                simworker_end(worker, false, 0, "");
        }
}

void simjob_kill_node(struct simjob *job, uint32_t id)
{
        struct simnode *node = &job->nodes[id];

        if (!node->node)
                return;
        finish_tasks(node);
        for (uint32_t rank = 0; rank < job->n_workers; rank++) {
                struct simworker *worker = &job->workers[rank];

                if (worker->node != node)
                        continue;
                end_killed(worker);
                if (!worker->worker)
                        continue;
                worker->worker->dead = true; /* nobody is left who could tell the peers */
                ae_core_worker_gone(worker->worker, "killed");
                worker->worker = NULL;
        }
        finish_tasks(node);
        node->node = ae_node_free(node->node);
}

void simjob_kill_worker(struct simjob *job, uint32_t rank)
{
        struct simworker *worker = &job->workers[rank];

        end_killed(worker);
        if (!worker->worker)
                return;
        ae_core_worker_gone(worker->worker, "its connection closed");
        worker->worker = NULL;
        simnode_kick(worker->node);
}
