/* SPDX-License-Identifier: Apache-2.0 */
/*
 * See cluster.h. All daemons listen before the first one runs, so that no connection is tried in
 * vain and a cluster forms in milliseconds.
 */
#include "tests/lib/cluster.h"

#include "proto/base/cleanup.h"
#include "proto/base/clock.h"
#include "proto/base/log.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/local.h"
#include "server/daemon.h"
#include "tests/lib/count.h"
#include "tests/lib/test.h"

#include <arpa/inet.h>
#include <assert.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <uv.h>

#define PATH_MAX_LEN 100 /* a socket's address holds 107 */
#define MEMORY_LEN (2 * AE_GIB)
#define REST_NS (5 * AE_NS_PER_S)
#define FAILURE_LEN 1024

struct node {
        struct ae_config config;
        char socket[PATH_MAX_LEN];
        char peer[PATH_MAX_LEN];
        char *peer_list[CLUSTER_NODES_MAX]; /* borrowed from all nodes' peer */
        struct ae_daemon *daemon;           /* owned */
        pthread_t thread;
        bool runs;
};

struct member {
        struct cluster_worker worker; /* its thread's */
        pthread_t thread;
        bool runs;
};

struct cluster_crew {
        const struct cluster_job *job; /* borrowed */
        const char *name;              /* of the job; static */
        struct member *members;        /* owned; [world] */
        uint32_t world;
        uint32_t n_waiting;            /* this and all below under the cluster's lock */
        uint64_t n_meetings;
        bool broken;                   /* a worker is gone: nobody will meet again */
};

struct cluster {
        const struct cluster_spec *spec; /* borrowed */
        char dir[PATH_MAX_LEN];
        struct node nodes[CLUSTER_NODES_MAX];
        struct cluster_crew crews[CLUSTER_JOBS_MAX];
        uint32_t n_crews;
        pthread_mutex_t lock;   /* over all below */
        pthread_cond_t met;
        int n_failures;
};

/* What a process has that a cluster must give back. */
struct trace {
        size_t n_fds, n_threads, n_maps;
};

static uint32_t count_workers(const struct cluster_spec *spec, const uint32_t *workers)
{
        uint32_t world = 0;

        for (uint32_t node = 0; node < spec->n_nodes; node++)
                world += workers[node];
        return world;
}

uint32_t cluster_world(const struct cluster_spec *spec)
{
        return count_workers(spec, spec->workers);
}

/* ---- failures --------------------------------------------------------------------------- */

static void report(struct cluster *cluster, const char *text)
{
        pthread_mutex_lock(&cluster->lock);
        cluster->n_failures++;
        print_error("%s\n", text);
        pthread_mutex_unlock(&cluster->lock);
}

int cluster_failed(struct cluster_worker *worker, const char *file, int line, const char *format,
                   ...)
{
        char text[FAILURE_LEN];
        int n = snprintf(text, sizeof(text), "%s:%d: rank %u: ", file, line, worker->rank);
        va_list args;

        va_start(args, format);
        (void)vsnprintf(text + n, sizeof(text) - (size_t)n, format, args);
        va_end(args);
        report(worker->cluster, text);
        return -1;
}

bool cluster_is_refused(int result, int code, const char *what)
{
        return result == code && strstr(autoep_last_error(), what);
}

/* ---- meeting ---------------------------------------------------------------------------- */

int cluster_barrier(struct cluster_worker *worker)
{
        struct cluster *cluster = worker->cluster;
        struct cluster_crew *crew = worker->crew;
        uint64_t meeting;
        int r;

        pthread_mutex_lock(&cluster->lock);
        meeting = crew->n_meetings;
        if (++crew->n_waiting == crew->world && !crew->broken) {
                crew->n_waiting = 0;
                crew->n_meetings++;
                pthread_cond_broadcast(&cluster->met);
        }
        while (!crew->broken && crew->n_meetings == meeting)
                pthread_cond_wait(&cluster->met, &cluster->lock);
        r = crew->n_meetings == meeting ? -1 : 0;
        pthread_mutex_unlock(&cluster->lock);
        return r;
}

static void break_barrier(struct cluster *cluster, struct cluster_crew *crew)
{
        pthread_mutex_lock(&cluster->lock);
        crew->broken = true;
        pthread_cond_broadcast(&cluster->met);
        pthread_mutex_unlock(&cluster->lock);
}

/* ---- workers ---------------------------------------------------------------------------- */

static struct autoep_options options_of(const struct cluster_worker *worker)
{
        struct autoep_options options = AUTOEP_OPTIONS_INIT;

        options.socket = worker->cluster->nodes[worker->node].socket;
        options.job = worker->crew->name;
        options.rank = (int)worker->rank;
        options.world = (int)worker->world;
        options.timeout_ms = CLUSTER_TIMEOUT_MS;
        options.hold_len = worker->cluster->spec->hold_len;
        options.ring_len = worker->cluster->spec->ring_len ? worker->cluster->spec->ring_len
                                                           : AE_LOCAL_RING_MIN;
        return options;
}

struct autoep_options cluster_reader_options(const struct cluster_worker *worker)
{
        struct autoep_options options = options_of(worker);

        options.reader = 1;
        options.rank = options.world = -1;
        return options;
}

static int work(struct cluster_worker *worker)
{
        struct autoep_options options = options_of(worker);
        int r;

        CLUSTER_TRY(worker, autoep_open(&options, &worker->handle));
        r = worker->crew->job->fn(worker);
        if (r != 0)
                return r;
        CLUSTER_TRY(worker, autoep_leave(worker->handle, AUTOEP_DEFAULT_TIMEOUT));
        return 0;
}

static void *worker_main(void *arg)
{
        struct cluster_worker *worker = arg;

        (void)work(worker);
        break_barrier(worker->cluster, worker->crew);
        autoep_close(worker->handle);
        return NULL;
}

static void start_crew(struct cluster *cluster, struct cluster_crew *crew)
{
        for (uint32_t rank = 0; rank < crew->world; rank++) {
                struct member *member = &crew->members[rank];

                member->runs = pthread_create(&member->thread, NULL, worker_main,
                                              &member->worker) == 0;
                if (!member->runs) {
                        report(cluster, "cannot start a worker's thread");
                        break_barrier(cluster, crew);
                }
        }
}

static void join_crew(struct cluster_crew *crew)
{
        for (uint32_t rank = 0; rank < crew->world; rank++) {
                if (crew->members[rank].runs)
                        pthread_join(crew->members[rank].thread, NULL);
        }
}

static void run_workers(struct cluster *cluster)
{
        for (uint32_t i = 0; i < cluster->n_crews; i++)
                start_crew(cluster, &cluster->crews[i]);
        for (uint32_t i = 0; i < cluster->n_crews; i++)
                join_crew(&cluster->crews[i]);
}

static int place_crew(struct cluster *cluster, struct cluster_crew *crew)
{
        uint32_t rank = 0;

        crew->members = calloc(crew->world, sizeof(*crew->members));
        if (!crew->members)
                return ae_fail(AE_ENOMEM, "no memory for %u workers", crew->world);
        for (uint32_t node = 0; node < cluster->spec->n_nodes; node++) {
                for (uint32_t i = 0; i < crew->job->workers[node]; i++, rank++)
                        crew->members[rank].worker = (struct cluster_worker){
                                .cluster = cluster, .crew = crew, .user = crew->job->user,
                                .rank = rank, .world = crew->world, .node = node,
                                .n_nodes = cluster->spec->n_nodes,
                        };
        }
        return 0;
}

static int place_workers(struct cluster *cluster)
{
        int r = 0;

        for (uint32_t i = 0; i < cluster->n_crews && r == 0; i++)
                r = place_crew(cluster, &cluster->crews[i]);
        return r;
}

/* ---- daemons ---------------------------------------------------------------------------- */

/* Free ports of the loopback: all are held until the last is found, so that they differ. */
static int find_ports(struct cluster *cluster)
{
        int fds[CLUSTER_NODES_MAX];
        uint32_t n = 0;
        int r = 0;

        for (; n < cluster->spec->n_nodes && r == 0; n++) {
                struct sockaddr_in address = { .sin_family = AF_INET,
                                               .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
                socklen_t len = sizeof(address);

                fds[n] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
                if (fds[n] < 0 || bind(fds[n], (struct sockaddr *)&address, len) < 0 ||
                    getsockname(fds[n], (struct sockaddr *)&address, &len) < 0)
                        r = ae_fail(AE_ESYS, "cannot find a free port");
                (void)snprintf(cluster->nodes[n].peer, PATH_MAX_LEN, "127.0.0.1:%u",
                               ntohs(address.sin_port));
        }
        for (uint32_t i = 0; i < n; i++)
                ae_cleanup_close(&fds[i]);
        return r;
}

static int configure(struct cluster *cluster)
{
        const struct cluster_spec *spec = cluster->spec;
        const char *transport = spec->transport ? spec->transport : "shm";

        if (strcmp(transport, "tcp") == 0 && find_ports(cluster) < 0)
                return -1;
        for (uint32_t id = 0; id < spec->n_nodes; id++) {
                struct node *node = &cluster->nodes[id];

                (void)snprintf(node->socket, PATH_MAX_LEN, "%.80s/d%u", cluster->dir, id);
                if (node->peer[0] == '\0' && spec->n_nodes > 1)
                        (void)snprintf(node->peer, PATH_MAX_LEN, "%.80s/p%u", cluster->dir, id);
                for (uint32_t peer = 0; peer < spec->n_nodes; peer++)
                        node->peer_list[peer] = cluster->nodes[peer].peer;
                node->config = (struct ae_config){
                        .dev = true, .node = id, .socket = node->socket, .peers = node->peer,
                        .transport = (char *)(uintptr_t)transport, .memory = MEMORY_LEN,
                        .threads = spec->threads ? spec->threads : 1, .log_level = AE_LOG_ERROR,
                        .peer_list = node->peer_list, .n_peers = spec->n_nodes,
                };
        }
        return 0;
}

static void *node_main(void *arg)
{
        struct node *node = arg;

        ae_daemon_run(node->daemon, 0);
        return NULL;
}

static int start_daemons(struct cluster *cluster)
{
        for (uint32_t id = 0; id < cluster->spec->n_nodes; id++) {
                struct node *node = &cluster->nodes[id];
                int r = ae_daemon_new(&node->config, &node->daemon);

                if (r < 0)
                        return r;
        }
        for (uint32_t id = 0; id < cluster->spec->n_nodes; id++) {
                struct node *node = &cluster->nodes[id];

                if (pthread_create(&node->thread, NULL, node_main, node) != 0)
                        return ae_fail(AE_ESYS, "cannot start a daemon's thread");
                node->runs = true;
        }
        return 0;
}

static void stop_daemons(struct cluster *cluster)
{
        for (uint32_t id = 0; id < cluster->spec->n_nodes; id++) {
                if (cluster->nodes[id].runs)
                        ae_daemon_stop(cluster->nodes[id].daemon);
        }
        for (uint32_t id = 0; id < cluster->spec->n_nodes; id++) {
                if (cluster->nodes[id].runs)
                        pthread_join(cluster->nodes[id].thread, NULL);
        }
        for (uint32_t id = 0; id < cluster->spec->n_nodes; id++)
                ae_daemon_free(cluster->nodes[id].daemon);
}

/* ---- what is left behind ---------------------------------------------------------------- */

static struct trace take_trace(void)
{
        struct trace trace = { .n_fds = count_fds(),
                               .n_threads = count_threads() };
        FILE *maps = fopen("/proc/self/maps", "re");
        char line[512];

        assert(maps);
        while (fgets(line, sizeof(line), maps))
                trace.n_maps += strstr(line, "memfd:") != NULL;
        fclose(maps);
        return trace;
}

/* A joined thread stands in /proc a moment longer. */
static void check_trace(struct cluster *cluster, const struct trace *before)
{
        const uint64_t deadline_ns = ae_now_ns() + REST_NS;
        struct trace now = take_trace();
        char text[FAILURE_LEN];

        while (now.n_threads != before->n_threads && ae_now_ns() < deadline_ns) {
                sched_yield();
                now = take_trace();
        }
        if (memcmp(&now, before, sizeof(now)) == 0)
                return;
        (void)snprintf(text, sizeof(text),
                       "the cluster leaves %zd descriptors, %zd threads and %zd "
                       "maps of shared memory behind",
                       (ssize_t)(now.n_fds - before->n_fds),
                       (ssize_t)(now.n_threads - before->n_threads),
                       (ssize_t)(now.n_maps - before->n_maps));
        report(cluster, text);
}

/* ---- all -------------------------------------------------------------------------------- */

static int make_dir(struct cluster *cluster)
{
        const char *root = getenv("TMPDIR");

        if (!root || strlen(root) > 60)
                root = "/tmp";
        (void)snprintf(cluster->dir, sizeof(cluster->dir), "%s/ae-cluster.XXXXXX", root);
        if (!mkdtemp(cluster->dir)) {
                cluster->dir[0] = '\0';
                return ae_fail(AE_ESYS, "cannot make a directory in %s", root);
        }
        return 0;
}

static int prepare(struct cluster *cluster)
{
        int r;

        r = make_dir(cluster);
        if (r < 0)
                return r;
        r = place_workers(cluster);
        if (r < 0)
                return r;
        r = configure(cluster);
        return r < 0 ? r : start_daemons(cluster);
}

static void *tell_id(void *arg)
{
        *(pid_t *)arg = gettid();
        return NULL;
}

/*
 * What a process keeps from its first loop and thread on: libuv's pipe, a sanitizer's thread. The
 * thread itself stands in /proc a moment longer than its join: without the wait it would be counted
 * among those that were there before.
 */
static void make_first(void)
{
        const uint64_t deadline_ns = ae_now_ns() + REST_NS;
        char path[64];
        uv_loop_t loop;
        pthread_t thread;
        pid_t id = 0;
        int r = pthread_create(&thread, NULL, tell_id, &id);

        assert(r == 0);
        pthread_join(thread, NULL);
        (void)snprintf(path, sizeof(path), "/proc/self/task/%d", (int)id);
        while (access(path, F_OK) == 0 && ae_now_ns() < deadline_ns)
                sched_yield();
        r = uv_loop_init(&loop);

        assert(r == 0);
        r = uv_loop_close(&loop);
        assert(r == 0);
}

int cluster_run_jobs(const struct cluster_spec *spec, const struct cluster_job *jobs,
                     uint32_t n_jobs)
{
        static const char *const names[CLUSTER_JOBS_MAX] = { "cluster", "other" };
        struct trace before;
        struct cluster cluster = { .spec = spec, .n_crews = n_jobs,
                                   .lock = PTHREAD_MUTEX_INITIALIZER,
                                   .met = PTHREAD_COND_INITIALIZER };

        assert(spec->n_nodes >= 1 && spec->n_nodes <= CLUSTER_NODES_MAX);
        assert(n_jobs >= 1 && n_jobs <= CLUSTER_JOBS_MAX);
        for (uint32_t i = 0; i < n_jobs; i++) {
                cluster.crews[i] = (struct cluster_crew){
                        .job = &jobs[i], .name = names[i],
                        .world = count_workers(spec, jobs[i].workers),
                };
                assert(cluster.crews[i].world >= 1);
        }
        make_first();
        before = take_trace();
        signal(SIGPIPE, SIG_IGN);
        ae_log_init("cluster", AE_LOG_ERROR);
        if (prepare(&cluster) < 0)
                report(&cluster, ae_error_text());
        else
                run_workers(&cluster);
        stop_daemons(&cluster);
        if (cluster.dir[0] && rmdir(cluster.dir) < 0)
                report(&cluster, "files are left in the cluster's directory");
        for (uint32_t i = 0; i < n_jobs; i++)
                free(cluster.crews[i].members);
        check_trace(&cluster, &before);
        return cluster.n_failures;
}

int cluster_run(const struct cluster_spec *spec, cluster_fn fn, void *user)
{
        struct cluster_job job = { .fn = fn, .user = user };

        memcpy(job.workers, spec->workers, sizeof(job.workers));
        return cluster_run_jobs(spec, &job, 1);
}
