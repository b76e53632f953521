/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Get and put: state from outside. A worker hands over a memfd; its daemon cuts the items by owner.
 * Get: each owner puts its ranges into that memory. Put: each owner stages its ranges, then the
 * decider makes the put a verdict of its own, so that all nodes take it up or none. The initial
 * values are such a put. Also pauses, which are passed on.
 */
#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/state.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
uint64_t ae_state_item_size(const struct ae_layout_tensor *tensor, uint32_t what)
{
        return what == WEIGHT ? ae_dtype_size(tensor->dtype) : sizeof(float);
}

const struct ae_layout_tensor *ae_state_home(const struct ae_job *job, uint32_t tensor)
{
        return &job->layout->tensors[job->layout->tensors[tensor].home];
}

bool ae_state_trainable(const struct ae_job *job, const struct ae_layout_tensor *home)
{
        return job->layout->segments[home->segment].trainable;
}

/* ---- requests --------------------------------------------------------------------------- */

void ae_state_request_free(struct ae_request *request)
{
        const struct ae_core_options *options = &request->job->core->options;

        ae_get_forget(request);
        ae_list_unlink(&request->link);
        request->ended = true;
        if (request->n_puts)
                return; /* ae_state_put_done() comes here again */
        for (uint32_t node = 0; !request->put && node < options->n_nodes; node++) {
                if (request->keyed[node])
                        options->ops->revoke(options->user, node, &request->keys[node]);
        }
        if (request->region)
                ae_memory_transferred(request->job, request->region);
        ae_cleanup_close(&request->fd);
        free(request->stretches);
        free(request->keys);
        free(request->keyed);
        free(request->due);
        free(request);
}

void ae_state_put_done(struct ae_request *request)
{
        assert(request->n_puts > 0);
        request->n_puts--;
        if (request->ended && request->n_puts == 0)
                ae_state_request_free(request);
}

/* What was got goes into the worker's memory. */
static int hand_over(const struct ae_request *request)
{
        uint64_t done = 0;

        while (!request->put && done < request->len) {
                ssize_t put = pwrite(request->fd, request->region->base + done, request->len - done,
                                     (off_t)done);

                if (put <= 0)
                        return ae_fail(AE_ESYS, "cannot write into the request's memory");
                done += (uint64_t)put;
        }
        return 0;
}

void ae_state_finish(struct ae_request *request, int status, const char *text)
{
        struct ae_core_options *options = &request->job->core->options;
        Autoep__Done done = AUTOEP__DONE__INIT;

        if (status == 0) {
                status = hand_over(request);
                text = status < 0 ? ae_error_text() : text;
        }
        if (request->worker && status < 0) {
                ae_worker_error(request->worker, request->id, status, text);
        } else if (request->worker && !request->initial) {
                done.id = request->id;
                done.version = request->put ? request->job->version : ae_get_version(request);
                options->ops->worker_send(options->user, request->worker, AE_CONTROL_DONE,
                                          &done.base, NULL, 0);
        }
        ae_state_request_free(request);
}

static int check_item(const struct ae_job *job, const Autoep__StateItem *item, bool put)
{
        const struct ae_layout_tensor *tensor;
        const struct ae_layout_tensor *home;
        bool state = item->what != WEIGHT;

        if (item->tensor >= job->layout->n_tensors || item->what < WEIGHT || item->what > GRADIENT)
                return ae_fail(AE_EINVAL, "tensor %u, state %u: no such thing", item->tensor,
                               item->what);
        tensor = &job->layout->tensors[item->tensor];
        home = ae_state_home(job, item->tensor);
        if (home->segment == AE_LAYOUT_NONE)
                return ae_fail(AE_EINVAL, "'%s' is an expert: its state is with the workers",
                               tensor->name);
        if (!ae_range_ok(item->first, item->n, tensor->n))
                return ae_fail(AE_EINVAL,
                               "elements %" PRIu64 " to %" PRIu64
                               " are beyond '%s', which has %" PRIu64,
                               item->first, item->first + item->n, tensor->name, tensor->n);
        if (state && !ae_state_trainable(job, home))
                return ae_fail(AE_EINVAL, "'%s' is frozen or a buffer: it has weights alone",
                               tensor->name);
        if (put && item->what == GRADIENT)
                return ae_fail(AE_EINVAL, "the gradient of '%s' cannot be put", tensor->name);
        if (put && !state && ae_state_trainable(job, home))
                return ae_fail(AE_EINVAL, "put the master of '%s': its weight follows",
                               tensor->name);
        if (item->what == MOMENT2 && job->model->message->optimizer != AE_OPT_ADAMW)
                return ae_fail(AE_EINVAL, "'%s' has no second moment: the optimizer keeps none",
                               tensor->name);
        return 0;
}

/* There may be hundreds of thousands of them. */
static void grow_stretches(struct ae_request *request)
{
        if (request->n_stretches < request->stretches_cap)
                return;
        request->stretches_cap = AE_MAX(2 * request->stretches_cap, 16u);
        request->stretches = realloc(request->stretches,
                                     request->stretches_cap * sizeof(*request->stretches));
        if (!request->stretches)
                abort();
}

/* Cuts one item at the borders of slices. */
static void cut(struct ae_request *request, const Autoep__StateItem *item, uint64_t off)
{
        const struct ae_layout *layout = request->job->layout;
        const struct ae_layout_tensor *home = ae_state_home(request->job, item->tensor);
        uint64_t first = home->first + item->first;
        uint64_t end = first + item->n;

        while (first < end) {
                uint32_t s = ae_layout_slice_of(layout, home->segment, first);
                const struct ae_layout_slice *slice = &layout->slices[s];
                uint64_t n = AE_MIN(end, slice->first + slice->n) - first;

                grow_stretches(request);
                request->stretches[request->n_stretches++] = (struct ae_stretch){
                        .slice = s, .tensor = home->id, .what = item->what,
                        .first = first - home->first, .n = n, .off = off,
                };
                off += n * ae_state_item_size(home, item->what);
                first += n;
        }
}

static uint64_t item_len(const struct ae_request *request, const Autoep__StateItem *item)
{
        return item->n *
               ae_state_item_size(ae_state_home(request->job, item->tensor), item->what);
}

static int check_all(const struct ae_request *request, Autoep__StateItem *const *items,
                     size_t n_items, uint64_t *ret_len)
{
        uint64_t len = 0;
        int r;

        for (size_t i = 0; i < n_items; i++) {
                r = check_item(request->job, items[i], request->put);
                if (r < 0)
                        return r;
                if (ae_add_overflows(len, item_len(request, items[i]), &len))
                        return ae_fail(AE_EOVERFLOW, "the items have more than 2^64 bytes");
        }
        *ret_len = len;
        return 0;
}

static void cut_all(struct ae_request *request, Autoep__StateItem *const *items, size_t n_items)
{
        uint64_t off = 0;

        for (size_t i = 0; i < n_items; i++) {
                cut(request, items[i], off);
                off += item_len(request, items[i]);
        }
}

static int make_region(struct ae_request *request, uint64_t len)
{
        return ae_memory_transfer(request->job, "autoep-transfer", len, &request->region);
}

static struct ae_request *new_request(struct ae_worker *worker, bool put, uint64_t id)
{
        struct ae_request *request = ae_core_alloc(1, sizeof(*request));
        struct ae_core *core = worker->core;

        request->job = worker->job;
        request->worker = worker;
        request->put = put;
        request->fd = -1;
        request->id = id;
        request->token = ++core->next_token;
        request->put_id = (uint64_t)core->options.node << 32 | request->token;
        request->keys = ae_core_alloc(core->options.n_nodes, sizeof(*request->keys));
        request->keyed = ae_core_alloc(core->options.n_nodes, sizeof(*request->keyed));
        request->due = ae_core_alloc(core->options.n_nodes, sizeof(*request->due));
        ae_list_push(&worker->job->requests, &request->link);
        return request;
}

/* The stretches of @node as items of a message; the caller frees both arrays. */
uint32_t ae_state_items(const struct ae_request *request, uint32_t node,
                        Autoep__StateItem **ret_items, Autoep__StateItem ***ret_pointers,
                        uint64_t *offs)
{
        const struct ae_layout *layout = request->job->layout;
        Autoep__StateItem *items = ae_core_alloc(request->n_stretches, sizeof(*items));
        Autoep__StateItem **pointers = ae_core_alloc(request->n_stretches, sizeof(*pointers));
        uint32_t n = 0;

        for (uint32_t i = 0; i < request->n_stretches; i++) {
                const struct ae_stretch *stretch = &request->stretches[i];

                if (layout->slices[stretch->slice].node != node)
                        continue;
                autoep__state_item__init(&items[n]);
                items[n].tensor = stretch->tensor;
                items[n].what = stretch->what;
                items[n].first = stretch->first;
                items[n].n = stretch->n;
                pointers[n] = &items[n];
                if (offs)
                        offs[n] = stretch->off;
                n++;
        }
        *ret_items = items;
        *ret_pointers = pointers;
        return n;
}

/* ---- where state lies ------------------------------------------------------------------- */

/* The bytes of a stretch at its owner, and the region they are in. */
struct ae_region *ae_state_locate(const struct ae_job *job, uint32_t tensor, uint32_t what,
                                uint64_t first, uint64_t *ret_off)
{
        const struct ae_layout_tensor *home = &job->layout->tensors[tensor];
        uint64_t index = home->first + first;
        const struct ae_layout_slice *slice =
                &job->layout->slices[ae_layout_slice_of(job->layout, home->segment, index)];
        uint64_t state = slice->shard_first + (index - slice->first);
        const char *at = NULL;

        if (what == GRADIENT) {
                *ret_off = state * sizeof(float);
                return job->total;
        }
        if (what == WEIGHT)
                at = job->shard.weight + slice->weight_off +
                     (index - slice->first) * ae_dtype_size(home->dtype);
        if (what == MASTER)
                at = (const char *)(job->shard.master + state);
        if (what == MOMENT1)
                at = (const char *)(job->shard.moment1 + state);
        if (what == MOMENT2)
                at = (const char *)(job->shard.moment2 + state);
        *ret_off = (uint64_t)(at - job->shard_region->base);
        return job->shard_region;
}

struct ae_owned *ae_state_owner(const struct ae_job *job, uint32_t tensor, uint64_t first)
{
        const struct ae_layout_tensor *home = &job->layout->tensors[tensor];
        uint32_t slice = ae_layout_slice_of(job->layout, home->segment, home->first + first);
        uint32_t index = job->owned_of_slice[slice];

        return index == AE_WIRE_NONE ? NULL : &job->owned[index];
}

/* Items from a peer: ours, and cut at slices as we would. */
int ae_state_check_peer(const struct ae_job *job, Autoep__StateItem *const *items, size_t n,
                            bool put)
{
        int r;

        for (size_t i = 0; i < n; i++) {
                struct ae_owned *owned;
                const struct ae_layout_tensor *home;

                r = check_item(job, items[i], put);
                if (r < 0)
                        return r;
                home = ae_state_home(job, items[i]->tensor);
                owned = items[i]->n ? ae_state_owner(job, home->id, items[i]->first) : NULL;
                if (!owned || home->id != items[i]->tensor ||
                    ae_state_owner(job, home->id, items[i]->first + items[i]->n - 1) != owned)
                        return ae_fail(AE_EPROTO, "an item of '%s' is not this node's", home->name);
        }
        return 0;
}

struct ae_request *ae_state_find(const struct ae_job *job, uint32_t token)
{
        struct ae_request *request;

        ae_list_for_each(request, &job->requests, link) {
                if (request->token == token)
                        return request;
        }
        return NULL;
}

/* ---- entry ------------------------------------------------------------------------------ */

/* The memory of a request: a copy of what the worker sent, so that it cannot change under us, or
 * room for what it will get, which is written to its descriptor at the end. */
static int take_memory(struct ae_request *request, uint64_t len, int fd)
{
        struct stat stat;
        uint64_t done = 0;
        int r;

        if (fd < 0 || fstat(fd, &stat) < 0 || (uint64_t)stat.st_size < len)
                return ae_fail(AE_EPROTO, "the request's memory is smaller than its items");
        r = make_region(request, len);
        if (r < 0)
                return r;
        request->len = len;
        while (request->put && done < len) {
                ssize_t got = pread(fd, request->region->base + done, len - done, (off_t)done);

                if (got <= 0)
                        return ae_fail(AE_ESYS, "cannot read the request's memory");
                done += (uint64_t)got;
        }
        return 0;
}

static int take_get(struct ae_request *request, const Autoep__Get *get, int fd)
{
        uint64_t len = 0;
        int r;

        r = check_all(request, get->items, get->n_items, &len);
        if (r == 0)
                r = take_memory(request, len, fd);
        if (r == 0)
                cut_all(request, get->items, get->n_items);
        return r;
}

static int take_put(struct ae_request *request, const Autoep__Put *put, int fd)
{
        uint64_t len = 0;
        int r;

        request->version = put->version;
        r = check_all(request, put->items, put->n_items, &len);
        if (r == 0)
                r = take_memory(request, len, fd);
        if (r == 0)
                cut_all(request, put->items, put->n_items);
        return r;
}

static int pause_note(struct ae_worker *worker, const Autoep__Pause *pause)
{
        Autoep__PauseNote note = AUTOEP__PAUSE_NOTE__INIT;
        Autoep__Done done = AUTOEP__DONE__INIT;
        struct ae_core_options *options = &worker->core->options;

        if (pause->seconds > AE_WIRE_PAUSE_MAX_S)
                return ae_fail(AE_EINVAL, "a pause of %u s: the limit is %u", pause->seconds,
                               AE_WIRE_PAUSE_MAX_S);
        note.rank = worker->rank;
        note.seconds = pause->seconds;
        note.reason = pause->reason;
        ae_job_control(worker->job, 0, AE_CONTROL_PAUSE_NOTE, &note.base);
        done.id = pause->id;
        options->ops->worker_send(options->user, worker, AE_CONTROL_DONE, &done.base, NULL, 0);
        return 0;
}

static uint64_t id_of(uint32_t type, const ProtobufCMessage *message)
{
        if (type == AE_CONTROL_GET)
                return ((const Autoep__Get *)message)->id;
        if (type == AE_CONTROL_PUT)
                return ((const Autoep__Put *)message)->id;
        return ((const Autoep__Pause *)message)->id;
}

static int check_ready(const struct ae_worker *worker)
{
        if (!worker->job || worker->job->state >= AE_JOB_FAILED)
                return ae_fail(AE_ELOST, "the job has failed: %s",
                               worker->job ? worker->job->why : "");
        if (!worker->registered)
                return ae_fail(AE_ESTATE, "the model is not committed yet");
        return 0;
}

static int take_request(struct ae_worker *worker, uint32_t type, const ProtobufCMessage *message,
                        int *fd)
{
        bool put = type == AE_CONTROL_PUT;
        struct ae_request *request;
        int r;

        r = check_ready(worker);
        if (r < 0)
                return r;
        if (type == AE_CONTROL_PAUSE)
                return pause_note(worker, (const Autoep__Pause *)message);
        request = new_request(worker, put, id_of(type, message));
        r = put ? take_put(request, (const Autoep__Put *)message, *fd)
                : take_get(request, (const Autoep__Get *)message, *fd);
        if (r < 0) {
                ae_state_request_free(request);
                return r;
        }
        if (put) {
                ae_put_start(request);
        } else {
                request->fd = ae_steal_fd(fd);
                ae_get_start(request);
        }
        return 0;
}

void ae_state_request(struct ae_worker *worker, uint32_t type, ProtobufCMessage *message, int fd)
{
        int r = take_request(worker, type, message, &fd);

        if (r < 0)
                ae_worker_error(worker, id_of(type, message), r, ae_error_text());
        ae_control_free(message);
        ae_cleanup_close(&fd);
}

/* Every tensor with storage, in registration order; as StateItems over rank 0's memfd. */
static int initial_items(struct ae_request *request, uint64_t *ret_len)
{
        const struct ae_layout *layout = request->job->layout;
        uint64_t off = 0;

        for (uint32_t t = 0; t < layout->n_tensors; t++) {
                const struct ae_layout_tensor *tensor = &layout->tensors[t];
                Autoep__StateItem item = AUTOEP__STATE_ITEM__INIT;

                if (tensor->home != t || tensor->segment == AE_LAYOUT_NONE)
                        continue;
                item.tensor = t;
                item.what = ae_state_trainable(request->job, tensor) ? MASTER : WEIGHT;
                item.n = tensor->n;
                cut(request, &item, off);
                off += tensor->n * ae_state_item_size(tensor, item.what);
        }
        *ret_len = off;
        return 0;
}

void ae_state_initial(struct ae_worker *worker)
{
        struct ae_job *job = worker ? worker->job : NULL;
        struct ae_request *request;
        uint64_t len = 0;
        int r;

        if (!job)
                return; /* rank 0 is gone and the job is failing */
        request = new_request(worker, true, 0);
        request->initial = true;
        r = initial_items(request, &len);
        if (r == 0 && len != (worker->init ? worker->init->len : 0))
                r = ae_fail(AE_EINVAL,
                            "rank 0 gave %" PRIu64
                            " bytes of initial values, the model has %" PRIu64,
                            worker->init ? worker->init->len : 0, len);
        if (r == 0)
                r = make_region(request, len);
        if (r < 0) {
                ae_state_request_free(request);
                ae_job_fail(job, r, "%s", ae_error_text());
                return;
        }
        if (len)
                memcpy(request->region->base, worker->init->base, len);
        ae_worker_drop_init(worker);
        request->len = len;
        ae_put_start(request);
}

int ae_state_control(struct ae_job *job, uint32_t node, uint32_t type,
                     const ProtobufCMessage *message)
{
        if (job->state >= AE_JOB_FAILED || !job->peers)
                return 0;
        switch (type) {
        case AE_CONTROL_STAGE:
                return ae_put_on_stage(job, node, (const Autoep__Stage *)message);
        case AE_CONTROL_STAGE_REPLY:
                return ae_put_on_stage_reply(job, node, (const Autoep__StageReply *)message);
        case AE_CONTROL_FETCH:
                return ae_get_on_fetch(job, node, (const Autoep__Fetch *)message);
        case AE_CONTROL_FETCH_REPLY:
                return ae_get_refused(job, node, (const Autoep__FetchReply *)message);
        case AE_CONTROL_DECIDE:
        case AE_CONTROL_DECIDE_REPLY:
                ae_form_control(job->core, job->id, node, type, message);
                return 0;
        }
        return ae_fail(AE_EPROTO, "unknown state message %u", type);
}

/* The first node that owes @request something; when none does, the decider of a put. */
static uint32_t missing_node(const struct ae_request *request)
{
        for (uint32_t node = 0; node < request->job->core->options.n_nodes; node++) {
                if (request->due[node])
                        return node;
        }
        return 0;
}

bool ae_state_waits(const struct ae_worker *worker, char *text, size_t size)
{
        const struct ae_request *request;

        ae_list_for_each(request, &worker->job->requests, link) {
                if (request->worker != worker || request->initial)
                        continue;
                (void)snprintf(text, size, "the %s waits for node %u (round %" PRIu64 ")",
                               request->put ? "put" : "get", missing_node(request),
                               worker->job->round);
                return true;
        }
        return false;
}

void ae_state_worker_gone(struct ae_worker *worker)
{
        struct ae_request *request;

        ae_list_for_each(request, &worker->job->requests, link) {
                if (request->worker == worker)
                        request->worker = NULL;
        }
}

void ae_state_fail(struct ae_job *job)
{
        struct ae_request *request;

        ae_list_for_each_safe(request, &job->requests, link) {
                if (request->worker && !request->initial)
                        ae_worker_error(request->worker, request->id, job->fail_status, job->why);
                request->worker =
                        NULL; /* peers may still put into its memory: freed with the job */
        }
}

void ae_state_free(struct ae_job *job)
{
        struct ae_request *request;

        ae_get_free(job);
        ae_list_for_each_safe(request, &job->requests, link)
                ae_state_request_free(request);
        ae_put_free(job);
}
