/* SPDX-License-Identifier: Apache-2.0 */
/* Calls that go over the socket: get and put of state, pause. One thread at a time. */
#include "client/error.h"
#include "client/session.h"
#include "proto/base/cleanup.h"
#include "proto/base/num.h"

#include <stdio.h>
#include <stdlib.h>

/* ---- items ------------------------------------------------------------------------------ */

/* Bytes of an element of @what of the tensor. */
static uint64_t element_len(const struct ae_layout_tensor *t, uint32_t what)
{
        return what == AUTOEP_WEIGHT ? ae_dtype_size(t->dtype) : sizeof(float);
}

static int check_what(const struct ae_layout_tensor *t, bool trainable, uint32_t what)
{
        if (what < AUTOEP_WEIGHT || what > AUTOEP_GRADIENT)
                return ae_fail(AE_EINVAL, "tensor '%s': there is no state of kind %u", t->name,
                               what);
        if (what != AUTOEP_WEIGHT && !trainable)
                return ae_fail(AE_EINVAL, "tensor '%s' is frozen or a buffer: it has a weight only",
                               t->name);
        return 0;
}

/* @ret_home: the tensor with the storage; @ret_len: bytes of the elements. */
static int check_item(const struct autoep *h, const Autoep__StateItem *item, uint32_t *ret_home,
                      uint64_t *ret_len)
{
        const struct ae_layout_tensor *t;
        uint64_t len;
        int r;

        r = ae_handle_check_tensor(h, item->tensor);
        if (r < 0)
                return r;
        t = &h->layout->tensors[item->tensor];
        if (t->segment == AE_LAYOUT_NONE)
                return ae_fail(AE_EINVAL, "tensor '%s' is an expert's: its state is in the workers",
                               t->name);
        r = check_what(t, h->layout->segments[t->segment].trainable, item->what);
        if (r < 0)
                return r;
        if (!ae_range_ok(item->first, item->n, t->n))
                return ae_fail(AE_EINVAL, "%llu elements from %llu on are not a part of tensor "
                               "'%s' with %llu elements", (unsigned long long)item->n,
                               (unsigned long long)item->first, t->name, (unsigned long long)t->n);
        len = item->n * element_len(t, item->what);
        *ret_home = t->home;
        *ret_len = len;
        return 0;
}

/* ---- get -------------------------------------------------------------------------------- */

static int fetch(struct autoep *h, Autoep__StateItem *item, uint64_t len, void *data,
                 int timeout_ms)
{
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        Autoep__StateItem *items[] = { item };
        Autoep__Get get = AUTOEP__GET__INIT;
        struct ae_session_reply reply;
        struct ae_deadline deadline;
        int r;

        r = ae_map_memfd("a transfer of state", len, &fd);
        if (r < 0)
                return r;
        get.id = ae_session_next_id(h);
        get.n_items = 1;
        get.items = items;
        ae_deadline_init(h, timeout_ms, &deadline);
        r = ae_session_call(h, &(struct ae_session_call){ AE_CONTROL_GET, &get.base, fd, get.id,
                                                          AE_CONTROL_DONE }, &deadline, &reply);
        ae_session_reply_deinit(&reply);
        if (r < 0)
                return ae_pump_prefix(r, "cannot get the state of tensor '%s' in round %llu",
                                      ae_handle_tensor_name(h, item->tensor),
                                      (unsigned long long)ae_handle_round(h));
        return ae_map_read(fd, data, len, 0);
}

static int get_state(struct autoep *h, Autoep__StateItem *item, void *data, int timeout_ms)
{
        uint64_t len;
        int r;

        r = ae_handle_enter(h);
        if (r < 0)
                return r;
        r = ae_deadline_check(timeout_ms);
        if (r < 0)
                return r;
        r = check_item(h, item, &item->tensor, &len);
        if (r < 0)
                return r;
        if (len == 0)
                return 0;
        if (!data)
                return ae_fail(AE_EINVAL, "there is no memory to copy %llu bytes to",
                               (unsigned long long)len);
        return fetch(h, item, len, data, timeout_ms);
}

int autoep_get(autoep *h, uint32_t tensor, uint32_t what, uint64_t first, uint64_t n, void *data,
               int timeout_ms)
{
        Autoep__StateItem item = AUTOEP__STATE_ITEM__INIT;

        item.tensor = tensor;
        item.what = what;
        item.first = first;
        item.n = n;
        return ae_api("autoep_get", get_state(h, &item, data, timeout_ms));
}

/* ---- put -------------------------------------------------------------------------------- */

struct put {
        Autoep__StateItem *items;     /* owned */
        Autoep__StateItem **pointers; /* owned; to items */
        const struct autoep_put_item *from; /* borrowed: the caller's */
        size_t n;
        uint64_t len;                 /* bytes of all */
        int fd;                       /* owned */
};

static void put_deinit(struct put *put)
{
        free(put->items);
        free(put->pointers);
        ae_cleanup_close(&put->fd);
}

static int check_put_item(const struct autoep *h, struct put *put, size_t i)
{
        const struct autoep_put_item *from = &put->from[i];
        Autoep__StateItem *item = &put->items[i];
        uint64_t len;
        int r;

        r = ae_check_size("autoep_put_item", from->size, sizeof(*from));
        if (r < 0)
                return r;
        autoep__state_item__init(item);
        item->tensor = from->tensor;
        item->what = from->what;
        item->first = from->first;
        item->n = from->n;
        put->pointers[i] = item;
        r = check_item(h, item, &item->tensor, &len);
        if (r < 0)
                return r;
        if (item->what == AUTOEP_GRADIENT ||
            (item->what == AUTOEP_WEIGHT &&
             h->layout->segments[h->layout->tensors[item->tensor].segment].trainable))
                return ae_fail(AE_EINVAL, "tensor '%s': put its AUTOEP_MASTER, which sets the "
                               "weight with it, or its moments",
                               ae_handle_tensor_name(h, item->tensor));
        if (len > 0 && !from->data)
                return ae_fail(AE_EINVAL, "item %zu of the put has no data", i);
        if (ae_add_overflows(put->len, len, &put->len) || put->len > INT64_MAX)
                return ae_fail(AE_EOVERFLOW, "the items of the put have more than 2^63 bytes");
        return 0;
}

static int fill_put(const struct autoep *h, struct put *put)
{
        uint64_t off = 0;
        int r;

        put->items = calloc(put->n, sizeof(*put->items));
        put->pointers = calloc(put->n, sizeof(*put->pointers));
        if (!put->items || !put->pointers)
                return ae_fail(AE_ENOMEM, "no memory for a put of %zu items", put->n);
        for (size_t i = 0; i < put->n; i++) {
                r = check_put_item(h, put, i);
                if (r < 0)
                        return r;
        }
        r = ae_map_memfd("a transfer of state", put->len, &put->fd);
        for (size_t i = 0; i < put->n && r == 0; i++) {
                const struct ae_layout_tensor *t = &h->layout->tensors[put->items[i].tensor];
                uint64_t len = put->items[i].n * element_len(t, put->items[i].what);

                r = ae_map_write(put->fd, put->from[i].data, len, off);
                off += len;
        }
        return r;
}

static int put_state(struct autoep *h, uint64_t version, struct put *put, int timeout_ms)
{
        Autoep__Put message = AUTOEP__PUT__INIT;
        struct ae_session_reply reply;
        struct ae_deadline deadline;
        int r;

        r = ae_handle_enter(h);
        if (r < 0)
                return r;
        r = ae_deadline_check(timeout_ms);
        if (r < 0)
                return r;
        if (put->n == 0 || !put->from)
                return ae_fail(AE_EINVAL, "there is nothing to put");
        if (put->n > AE_CONTROL_LIST_MAX)
                return ae_fail(AE_EOVERFLOW, "a put of %zu items, the limit is %u", put->n,
                               AE_CONTROL_LIST_MAX);
        r = fill_put(h, put);
        if (r < 0)
                return r;
        message.id = ae_session_next_id(h);
        message.version = version;
        message.n_items = put->n;
        message.items = put->pointers;
        ae_deadline_init(h, timeout_ms, &deadline);
        r = ae_session_call(h, &(struct ae_session_call){ AE_CONTROL_PUT, &message.base, put->fd,
                                                          message.id, AE_CONTROL_DONE },
                            &deadline, &reply);
        ae_session_reply_deinit(&reply);
        if (r < 0)
                return ae_pump_prefix(r, "cannot put %zu items at version %llu in round %llu",
                                      put->n, (unsigned long long)version,
                                      (unsigned long long)ae_handle_round(h));
        return 0;
}

int autoep_put(autoep *h, uint64_t version, const struct autoep_put_item *items, size_t n,
               int timeout_ms)
{
        AE_CLEANUP(put_deinit) struct put put = { .from = items, .n = n, .fd = -1 };

        return ae_api("autoep_put", put_state(h, version, &put, timeout_ms));
}

/* ---- pause ------------------------------------------------------------------------------ */

static int pause_job(struct autoep *h, const char *reason, uint32_t seconds)
{
        Autoep__Pause pause = AUTOEP__PAUSE__INIT;
        char text[AE_WIRE_TEXT];
        struct ae_session_reply reply;
        struct ae_deadline deadline;
        int r;

        r = ae_handle_enter_rank(h, "pause the job");
        if (r < 0)
                return r;
        if (!reason || !reason[0])
                return ae_fail(AE_EINVAL, "a pause needs a reason, which the others can read");
        if (seconds == 0 || seconds > AE_WIRE_PAUSE_MAX_S)
                return ae_fail(AE_EINVAL, "a pause of %u s: use 1 to %u", seconds,
                               AE_WIRE_PAUSE_MAX_S);
        (void)snprintf(text, sizeof(text), "%s", reason);
        pause.id = ae_session_next_id(h);
        pause.reason = text;
        pause.seconds = seconds;
        ae_deadline_init(h, AUTOEP_DEFAULT_TIMEOUT, &deadline);
        r = ae_session_call(h, &(struct ae_session_call){ AE_CONTROL_PAUSE, &pause.base, -1,
                                                          pause.id,
                                                          AE_CONTROL_DONE }, &deadline, &reply);
        ae_session_reply_deinit(&reply);
        if (r < 0)
                return ae_pump_prefix(r, "cannot pause the job in round %llu",
                                      (unsigned long long)ae_handle_round(h));
        return 0;
}

int autoep_pause(autoep *h, const char *reason, uint32_t seconds)
{
        return ae_api("autoep_pause", pause_job(h, reason, seconds));
}
