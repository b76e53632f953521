/* SPDX-License-Identifier: Apache-2.0 */
/* Cores joined by a queue. One thread, the test's. */
#include "tests/unit/test-core-bed.h"

#include "tests/lib/test.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"
#include "server/region.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum event_kind { EVENT_MSG, EVENT_PUT, EVENT_TASK };

struct event {
        struct ae_list link;
        enum event_kind kind;
        uint32_t from, to;
        uint32_t line; /* generation of the connection it goes over */
        /* put */
        struct ae_net_key key;
        struct ae_region *src;
        uint64_t off, src_off, put_len, note, cookie;
        struct ae_task *task;
        size_t len; /* msg */
        char data[];
};

static void *zeroed(size_t size)
{
        void *memory = calloc(1, size);

        if (!memory)
                abort();
        return memory;
}

static struct event *push(struct bed_node *node, enum event_kind kind, uint32_t to, size_t len)
{
        struct event *event = zeroed(sizeof(*event) + len);

        event->kind = kind;
        event->from = node->node;
        event->to = to;
        event->line = node->bed->lines[node->node][to].generation;
        event->len = len;
        ae_list_push(&node->bed->events, &event->link);
        return event;
}

/* ---- what the cores ask for -------------------------------------------------------------- */

static void on_msg(void *user, uint32_t node, const void *data, size_t len)
{
        assert_true(len <= AE_NET_MSG_MAX);
        memcpy(push(user, EVENT_MSG, node, len)->data, data, len);
}

static void on_put(void *user, uint32_t node, const struct ae_net_key *key, uint64_t off,
                   struct ae_region *src, uint64_t src_off, uint64_t len, uint64_t note,
                   uint64_t cookie)
{
        struct event *event = push(user, EVENT_PUT, node, 0);

        event->key = *key;
        event->off = off;
        event->src = src;
        event->src_off = src_off;
        event->put_len = len;
        event->note = note;
        event->cookie = cookie;
}

/* A key is the number of a grant and what no other key of the bed has. */
struct key {
        uint32_t grant, check;
};
#define KEY_CHECK 0x62656421u

struct ae_net_key bed_key(uint32_t grant)
{
        struct key key = { grant, KEY_CHECK + grant };
        struct ae_net_key sealed = { { 0 } };

        memcpy(sealed.bytes, &key, sizeof(key));
        return sealed;
}

static int on_grant(void *user, uint32_t node, struct ae_region *region, uint64_t off, uint64_t len,
                    struct ae_net_key *ret_key)
{
        struct bed_node *self = user;
        struct bed *bed = self->bed;
        struct bed_grant *grants;

        if (!bed->lines[self->node][node].up)
                return ae_fail(AE_ELOST, "node %u is not connected", node);
        grants = realloc(bed->grants, (bed->n_grants + 1) * sizeof(*grants));
        assert_non_null(grants);
        bed->grants = grants;
        grants[bed->n_grants] = (struct bed_grant){
                .region = region, .off = off, .len = len, .owner = self->node, .peer = node,
                .live = true,
        };
        *ret_key = bed_key(bed->n_grants++);
        return 0;
}

/* NULL when it was never granted to @peer by @owner. */
static struct bed_grant *find_grant(struct bed *bed, uint32_t owner, uint32_t peer,
                                    const struct ae_net_key *sealed)
{
        struct ae_net_key whole;
        struct key key;

        memcpy(&key, sealed->bytes, sizeof(key));
        if (key.grant >= bed->n_grants || bed->grants[key.grant].owner != owner ||
            bed->grants[key.grant].peer != peer)
                return NULL;
        whole = bed_key(key.grant);
        return memcmp(whole.bytes, sealed->bytes, sizeof(whole.bytes)) == 0
                       ? &bed->grants[key.grant] : NULL;
}

static void on_revoke(void *user, uint32_t node, const struct ae_net_key *key)
{
        struct bed_node *self = user;
        struct bed_grant *grant = find_grant(self->bed, self->node, node, key);

        assert_non_null(grant);
        grant->live = false;
}

static void on_task(void *user, struct ae_task *task)
{
        struct bed_node *node = user;
        struct event *event = push(node, EVENT_TASK, 0, 0);

        event->task = task;
        if (!node->bed->holds || !node->bed->holds(task))
                return;
        ae_list_unlink(&event->link);
        ae_list_push(&node->bed->held, &event->link);
}

static int on_region_new(void *user, const struct ae_region_spec *spec, struct ae_region **ret)
{
        int r = ae_region_new(spec, ret);

        (void)user;
        if (r == 0 && spec->net) /* opaque to the core */
                (*ret)->mem = (struct ae_net_mem *)(void *)*ret;
        return r;
}

static void on_region_free(void *user, struct ae_region *region)
{
        (void)user;
        (void)ae_region_free(region);
}

static void on_worker_send(void *user, struct ae_worker *worker, uint32_t type,
                           const ProtobufCMessage *message, const int *fds, size_t n_fds)
{
        struct bed_worker *w = ae_core_worker_session(worker);

        (void)user;
        (void)fds;
        (void)n_fds;
        w->type = type;
        w->status = 0;
        w->text[0] = '\0';
        if (type != AE_CONTROL_ERROR)
                return;
        w->status = ((const Autoep__Error *)message)->status;
        (void)snprintf(w->text, sizeof(w->text), "%s", ((const Autoep__Error *)message)->text);
}

static void on_worker_wake(void *user, struct ae_worker *worker)
{
        struct bed_node *node = user;

        (void)worker;
        node->bed->n_wakes++;
}

static void on_log(void *user, int level, const char *text)
{
        struct bed_node *node = user;

        (void)level;
        (void)snprintf(node->bed->log, sizeof(node->bed->log), "%s", text);
}

static const struct ae_core_ops ops = {
        .msg = on_msg, .put = on_put, .grant = on_grant, .revoke = on_revoke, .task = on_task,
        .region_new = on_region_new, .region_free = on_region_free,
        .worker_send = on_worker_send, .worker_wake = on_worker_wake, .log = on_log,
};

/* ---- the queue -------------------------------------------------------------------------- */

static bool is_connected(const struct bed *bed, const struct event *event)
{
        const struct bed_line *line = &bed->lines[event->from][event->to];

        return line->up && line->generation == event->line;
}

void bed_cut(struct bed *bed, uint32_t a, uint32_t b)
{
        static const char text[] = "the connection broke";

        if (!bed->lines[a][b].up)
                return;
        bed->lines[a][b].up = bed->lines[b][a].up = false;
        for (uint32_t i = 0; i < bed->n_grants; i++) {
                struct bed_grant *grant = &bed->grants[i];

                if ((grant->owner == a && grant->peer == b) ||
                    (grant->owner == b && grant->peer == a))
                        grant->live = false;
        }
        ae_core_peer_down(bed->nodes[a].core, b, text);
        ae_core_peer_down(bed->nodes[b].core, a, text);
}

void bed_join(struct bed *bed, uint32_t a, uint32_t b)
{
        if (a == b || bed->lines[a][b].up)
                return;
        bed->lines[a][b].up = bed->lines[b][a].up = true;
        bed->lines[a][b].generation++;
        bed->lines[b][a].generation++;
        ae_core_peer_up(bed->nodes[a].core, b, 100 + b);
        ae_core_peer_up(bed->nodes[b].core, a, 100 + a);
}

/* A transport breaks the connection for a put that was never legal, and swallows a late one. */
static void deliver_put(struct bed *bed, struct event *event)
{
        struct bed_grant *grant = find_grant(bed, event->to, event->from, &event->key);

        if (!is_connected(bed, event)) {
                ae_core_put_done(bed->nodes[event->from].core, event->cookie, AE_ELOST);
                return;
        }
        if (!grant || !ae_range_ok(event->off, event->put_len, grant->len)) {
                bed_cut(bed, event->from, event->to);
        } else if (grant->live) {
                memcpy(grant->region->base + grant->off + event->off,
                       event->src->base + event->src_off, event->put_len);
                ae_core_notify(bed->nodes[event->to].core, event->from, grant->region->mem,
                               grant->off + event->off, event->put_len, event->note);
        }
        ae_core_put_done(bed->nodes[event->from].core, event->cookie, 0);
}

static void deliver(struct bed *bed, struct event *event)
{
        switch (event->kind) {
        case EVENT_MSG:
                if (!is_connected(bed, event) ||
                    ae_core_msg(bed->nodes[event->to].core, event->from, event->data,
                                event->len) == 0)
                        return;
                bed->n_refused++;
                bed_cut(bed, event->from, event->to);
                break;
        case EVENT_PUT:
                deliver_put(bed, event);
                break;
        case EVENT_TASK:
                ae_task_run(event->task, 0);
                ae_core_task_done(bed->nodes[event->from].core, event->task);
                break;
        }
}

bool bed_step(struct bed *bed)
{
        struct ae_list *entry = ae_list_pop(&bed->events);
        struct event *event;

        if (!entry)
                return false;
        event = ae_list_entry(entry, struct event, link);
        bed->n_done++;
        deliver(bed, event);
        free(event);
        return true;
}

void bed_let_go(struct bed *bed)
{
        struct ae_list *entry;

        bed->holds = NULL;
        while ((entry = ae_list_pop(&bed->held)))
                ae_list_push(&bed->events, entry);
}

void bed_run(struct bed *bed)
{
        while (!bed->stopped && bed_step(bed))
                ;
}

void bed_tick(struct bed *bed, uint64_t ns)
{
        bed->now_ns += ns;
        for (uint32_t node = 0; node < bed->n_nodes; node++)
                ae_core_tick(bed->nodes[node].core, bed->now_ns);
        bed_run(bed);
}

int bed_inject(struct bed *bed, uint32_t from, uint32_t to, const void *data, size_t len)
{
        char *exact = malloc(len ? len : 1); /* a byte read beyond the message shows */
        int r;

        if (!exact)
                abort();
        memcpy(exact, data, len);
        r = ae_core_msg(bed->nodes[to].core, from, exact, len);
        free(exact);
        bed_run(bed);
        return r;
}

/* ---- life ------------------------------------------------------------------------------- */

struct bed *bed_new(uint32_t n_nodes, uint64_t memory_len)
{
        struct bed *bed = zeroed(sizeof(*bed));

        bed->n_nodes = n_nodes;
        bed->big_n = BED_BIG_N;
        ae_list_init(&bed->events);
        ae_list_init(&bed->held);
        for (uint32_t i = 0; i < n_nodes; i++) {
                struct bed_node *node = &bed->nodes[i];
                struct ae_core_options options = {
                        .node = i, .n_nodes = n_nodes, .incarnation = 100 + i,
                        .memory_len = memory_len, .n_undo = 1, .transport = "sim", .ops = &ops,
                        .user = node,
                };

                node->bed = bed;
                node->node = i;
                assert_int_equal(ae_core_new(&options, &node->core), 0);
        }
        for (uint32_t i = 0; i < n_nodes; i++) {
                for (uint32_t k = 0; k < i; k++)
                        bed_join(bed, i, k);
        }
        return bed;
}

void bed_gone(struct bed_worker *worker, const char *text)
{
        struct ae_worker *gone = worker->worker;

        worker->worker = NULL;
        if (gone)
                ae_core_worker_gone(gone, text);
        bed_run(worker->bed);
}

struct bed *bed_free(struct bed *bed)
{
        bed->stopped = false;
        bed_let_go(bed);
        bed_run(bed);
        for (uint32_t i = 0; i < bed->n_workers; i++)
                bed_gone(&bed->workers[i], "the test is over");
        for (uint32_t i = 0; i < bed->n_nodes; i++)
                assert_null(ae_core_free(bed->nodes[i].core));
        free(bed->grants);
        free(bed);
        return NULL;
}

int bed_hello(struct bed *bed, uint32_t node, const struct bed_hello *hello,
              struct bed_worker **ret_worker)
{
        struct bed_worker *worker = &bed->workers[bed->n_workers];
        Autoep__Hello message = AUTOEP__HELLO__INIT;
        struct ae_worker_spec spec = { .hello = &message, .pid = 4000 + (int32_t)bed->n_workers,
                                       .uid = hello->uid, .session = worker };
        int r;

        assert_true(bed->n_workers < BED_WORKERS_MAX);
        message.version = hello->version;
        message.job = (char *)(uintptr_t)hello->job;
        message.token = (char *)(uintptr_t)hello->token;
        message.rank = hello->rank;
        message.world = hello->world;
        message.reader = hello->reader;
        message.hold_len = bed->hold_len;
        message.incarnation = hello->incarnation ? hello->incarnation : 7000 + bed->n_workers;
        *worker = (struct bed_worker){ .bed = bed, .node = node, .rank = hello->rank };
        r = ae_core_worker_new(bed->nodes[node].core, &spec, &worker->worker);
        if (r < 0)
                return r;
        bed->n_workers++;
        ae_core_worker_attach(worker->worker, -1);
        bed_run(bed);
        *ret_worker = worker;
        return 0;
}

int bed_rank(struct bed *bed, uint32_t node, uint32_t rank, uint32_t world,
             struct bed_worker **ret_worker)
{
        const struct bed_hello hello = { .version = AE_WIRE_VERSION, .rank = rank, .world = world,
                                         .uid = 1000, .job = "job", .token = "secret" };

        return bed_hello(bed, node, &hello, ret_worker);
}

/* ---- the model -------------------------------------------------------------------------- */

static Autoep__Model *make_model(uint64_t big_n, void (*change)(Autoep__Model *model))
{
        const struct {
                const char *name, *unit, *alias_of;
                uint32_t dtype, class, flags;
                uint64_t n;
        } rows[] = {
                { "w", "u", "", AE_DTYPE_BF16, AE_CLASS_DENSE, 0, BED_W_N },
                { "bias", "u", "", AE_DTYPE_F32, AE_CLASS_BUFFER, 0, BED_BIAS_N },
                { "big", "v", "", AE_DTYPE_BF16, AE_CLASS_DENSE, 0, big_n },
                { "fixed", "v", "", AE_DTYPE_BF16, AE_CLASS_DENSE, 1, BED_FIXED_N },
                { "tied", "v", "w", AE_DTYPE_BF16, AE_CLASS_DENSE, 0, BED_W_N },
        };
        Autoep__Tensor tensors[AE_ARRAY_LEN(rows)];
        Autoep__Tensor *pointers[AE_ARRAY_LEN(rows)];
        uint64_t dims[AE_ARRAY_LEN(rows)];
        Autoep__Model model = AUTOEP__MODEL__INIT;
        Autoep__Model *message;
        AE_CLEANUP(ae_cleanup_free) uint8_t *packed = NULL;
        size_t len;

        for (size_t i = 0; i < AE_ARRAY_LEN(rows); i++) {
                autoep__tensor__init(&tensors[i]);
                tensors[i].name = (char *)(uintptr_t)rows[i].name;
                tensors[i].unit = (char *)(uintptr_t)rows[i].unit;
                tensors[i].alias_of = (char *)(uintptr_t)rows[i].alias_of;
                tensors[i].dtype = rows[i].dtype;
                tensors[i].tensor_class = rows[i].class;
                tensors[i].flags = rows[i].flags;
                dims[i] = rows[i].n;
                tensors[i].dims = &dims[i];
                tensors[i].n_dims = 1;
                pointers[i] = &tensors[i];
        }
        model.tensors = pointers;
        model.n_tensors = AE_ARRAY_LEN(rows);
        if (change)
                change(&model);
        len = ae_control_size(&model.base);
        packed = zeroed(len);
        ae_control_pack(&model.base, packed);
        message = autoep__model__unpack(NULL, len, packed);
        assert_non_null(message);
        return message;
}

/* Bytes of all initial values: masters in fp32, what never changes and buffers in their own. */
static uint64_t init_len(const Autoep__Model *model)
{
        uint64_t len = 0;

        for (size_t i = 0; i < model->n_tensors; i++) {
                const Autoep__Tensor *tensor = model->tensors[i];
                bool narrow = tensor->flags && tensor->dtype == AE_DTYPE_BF16;

                if (!tensor->alias_of[0] && tensor->tensor_class != AE_CLASS_EXPERT)
                        len += tensor->dims[0] * (narrow ? 2 : 4);
        }
        return len;
}

void bed_register(struct bed_worker *worker, void (*change)(Autoep__Model *model))
{
        bed_register_init(worker, change, BED_INIT_RIGHT);
}

void bed_register_init(struct bed_worker *worker, void (*change)(Autoep__Model *model),
                       uint64_t len)
{
        Autoep__Register *message = malloc(sizeof(*message));
        int fd = -1;

        assert_non_null(message);
        autoep__register__init(message);
        message->model = make_model(worker->bed->big_n, change);
        if (len == BED_INIT_RIGHT)
                len = init_len(message->model);
        if (worker->rank == 0) {
                fd = memfd_create("bed-init", MFD_CLOEXEC);
                assert_true(fd >= 0);
                assert_int_equal(ftruncate(fd, (off_t)len), 0);
                message->init_len = len;
        }
        assert_int_equal(ae_core_worker_message(worker->worker, AE_CONTROL_REGISTER,
                                                &message->base, fd),
                         0);
        bed_run(worker->bed);
}

void bed_register_reader(struct bed_worker *worker)
{
        Autoep__Register *message = malloc(sizeof(*message));

        assert_non_null(message);
        autoep__register__init(message);
        assert_int_equal(ae_core_worker_message(worker->worker, AE_CONTROL_REGISTER,
                                                &message->base, -1),
                         0);
        bed_run(worker->bed);
}

struct ae_local_page *bed_page(const struct bed_worker *worker)
{
        return (struct ae_local_page *)(void *)ae_core_worker_page(worker->worker)->base;
}

void bed_post(struct bed_worker *worker, const struct ae_local_sqe *sqe)
{
        struct ae_local_page *page = bed_page(worker);
        uint32_t tail = atomic_load(&page->sq_tail);

        page->sq[tail % AE_LOCAL_SQ_LEN] = *sqe;
        atomic_store(&page->sq_tail, tail + 1);
}

void bed_submit(struct bed_worker *worker, const struct ae_local_sqe *sqe)
{
        bed_post(worker, sqe);
        assert_int_equal(ae_core_worker_ring(worker->worker), 0);
}

void bed_gather(struct bed_worker *worker, uint32_t unit)
{
        bed_submit(worker, &(struct ae_local_sqe){ .op = AE_SQ_GATHER, .unit = unit,
                                                   .token = unit });
}

struct ae_job *bed_job(const struct bed *bed, uint32_t node)
{
        struct ae_list *first = bed->nodes[node].core->jobs.next;

        return first == &bed->nodes[node].core->jobs ? NULL : ae_list_entry(first, struct ae_job,
                                                                            link);
}

void bed_go_live(struct bed *bed)
{
        struct bed_worker *worker = NULL;
        uint32_t n_nodes = bed->n_nodes;

        for (uint32_t i = 0; i < n_nodes; i++) {
                assert_int_equal(bed_rank(bed, i, i, n_nodes, &worker), 0);
                assert_int_equal(worker->type, AE_CONTROL_HELLO_OK);
        }
        for (uint32_t i = 0; i < n_nodes; i++)
                bed_register(&bed->workers[i], NULL);
        for (uint32_t i = 0; i < n_nodes; i++) {
                assert_int_equal(bed->workers[i].type, AE_CONTROL_REGISTERED);
                assert_int_equal(bed_job(bed, i)->state, AE_JOB_LIVE);
        }
        assert_int_equal(bed->n_refused, 0);
}

struct bed *bed_new_live(uint32_t n_nodes)
{
        struct bed *bed = bed_new(n_nodes, AE_GIB);

        bed_go_live(bed);
        return bed;
}
