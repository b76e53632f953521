/* SPDX-License-Identifier: Apache-2.0 */
/*
 * autoep_register(): sends the model, and takes in what the daemon answers: rank 0's model, who is
 * where, and the shared memory of the job. Nothing in that memory is used before it was checked.
 * One thread.
 */
#include "client/error.h"
#include "client/exchange.h"
#include "client/holds.h"
#include "client/plan.h"
#include "client/record.h"
#include "client/session.h"
#include "proto/base/cleanup.h"
#include "proto/base/num.h"

#include <stdlib.h>
#include <string.h>

/* ---- what the daemon answered ----------------------------------------------------------- */

static int check_answer(const struct autoep *h, const Autoep__Registered *answer, uint32_t n_fds)
{
        uint32_t n_wanted = h->reader ? 1 : 3;

        if (!answer->model || n_fds != n_wanted)
                return ae_fail(AE_EPROTO, "the daemon's answer has %u descriptors where %u are "
                               "needed, and %s model", n_fds, n_wanted, answer->model ? "a" : "no");
        if (answer->world < 1 || answer->world > AE_WIRE_MAX_WORLD ||
            answer->n_rank_node != answer->world)
                return ae_fail(AE_EPROTO, "the daemon's answer places %zu ranks in a world of %u",
                               answer->n_rank_node, answer->world);
        if (!h->reader && (answer->rank != h->rank || answer->world != h->world))
                return ae_fail(AE_EPROTO, "the daemon answered rank %u of %u as rank %u of %u",
                               h->rank, h->world, answer->rank, answer->world);
        for (size_t i = 0; i < answer->n_rank_node; i++) {
                if (answer->rank_node[i] >= h->n_nodes)
                        return ae_fail(AE_EPROTO, "the daemon placed rank %zu on node %u of %u", i,
                                       answer->rank_node[i], h->n_nodes);
        }
        return 0;
}

/* Whatever is wrong with a model that the daemon accepted is its fault. */
static int blame_daemon(int r)
{
        return r == AE_ENOMEM ? r : ae_fail(AE_EPROTO, "the daemon answered with an unusable "
                                            "model: %s", ae_error_text());
}

static int take_model(struct autoep *h, Autoep__Registered *answer, const struct ae_model *own)
{
        Autoep__Model *message = ae_steal(answer->model);
        int r;

        r = ae_model_new(message, &h->model);
        if (r == 0)
                r = ae_model_layout(h->model, h->n_nodes, &h->layout);
        if (r == 0)
                r = ae_group_init(h->world, h->model->message->ep_size, h->model->message->order,
                                  &h->topology);
        if (r == 0 && own && own->n_specs != h->model->n_specs)
                r = ae_fail(AE_EINVAL, "%u tensors where this rank has %u", h->model->n_specs,
                            own->n_specs);
        if (r < 0)
                return blame_daemon(r);
        for (uint32_t i = 0; i < h->layout->n_tensors; i++) {
                const struct ae_layout_tensor *t = &h->layout->tensors[i];

                if (t->class == AE_CLASS_BUFFER && t->home == t->id)
                        h->n_counts += t->n;
                else if (t->class != AE_CLASS_BUFFER && !t->frozen)
                        h->n_groups = AE_MAX(h->n_groups, t->group + 1);
        }
        return 0;
}

static int take_nodes(struct autoep *h, const Autoep__Registered *answer)
{
        h->rank_node = calloc(answer->world, sizeof(*h->rank_node));
        if (!h->rank_node)
                return ae_fail(AE_ENOMEM, "no memory for the places of %u ranks", answer->world);
        memcpy(h->rank_node, answer->rank_node, answer->world * sizeof(*h->rank_node));
        h->hold_len = answer->hold_len;
        return 0;
}

static int check_params_head(const struct autoep *h, const struct ae_local_params *params)
{
        if (h->params_map.len < sizeof(*params) || params->magic != AE_LOCAL_MAGIC)
                return ae_fail(AE_EPROTO, "the job's shared memory of %zu bytes is not one",
                               h->params_map.len);
        if (params->version != AE_WIRE_VERSION)
                return ae_fail(AE_EVERSION, "the job's shared memory has version %u, this library "
                               "knows %d", params->version, AE_WIRE_VERSION);
        if (params->n_units != h->layout->n_units || params->world != h->world)
                return ae_fail(AE_EPROTO, "the job's shared memory has %u units and %u ranks, the "
                               "model has %u and %u", params->n_units, params->world,
                               h->layout->n_units, h->world);
        return 0;
}

static int take_params(struct autoep *h)
{
        struct ae_local_params *params = h->params_map.base;
        uint64_t len = h->params_map.len;
        uint64_t units_off, slots_off, cache_off;
        int r;

        r = check_params_head(h, params);
        if (r < 0)
                return r;
        units_off = params->units_off;
        slots_off = params->slots_off;
        cache_off = params->cache_off;
        h->n_slots = params->n_slots;
        h->cache_len = params->cache_len;
        if (units_off % sizeof(uint64_t) || slots_off % sizeof(uint64_t) ||
            cache_off % AE_LAYOUT_TENSOR_ALIGN || h->n_slots > AE_LOCAL_SLOTS_MAX ||
            units_off < sizeof(*params) || slots_off < sizeof(*params) ||
            cache_off < sizeof(*params) ||
            !ae_range_ok(units_off, h->layout->n_units * sizeof(uint64_t), len) ||
            !ae_range_ok(slots_off, h->n_slots * sizeof(struct ae_local_slot), len) ||
            !ae_range_ok(cache_off, h->cache_len, len))
                return ae_fail(AE_EPROTO, "the job's shared memory of %llu bytes cannot hold its "
                               "parts (units at %llu, %u slots at %llu, a cache of %llu bytes at "
                               "%llu)",
                               (unsigned long long)len, (unsigned long long)units_off, h->n_slots,
                               (unsigned long long)slots_off, (unsigned long long)h->cache_len,
                               (unsigned long long)cache_off);
        h->params = params;
        h->units = (_Atomic uint64_t *)((uint8_t *)params + units_off);
        h->slots = (const struct ae_local_slot *)((const uint8_t *)params + slots_off);
        h->cache = (const uint8_t *)params + cache_off;
        return 0;
}

static int map_exchange(struct autoep *h, const Autoep__Registered *answer, const int *fds)
{
        int r = 0;

        if (answer->xout_len == 0 && answer->xin_len == 0)
                return 0;
        r = ae_map_open("the exchange ring", fds[1], answer->xout_len, true, true, &h->xout_map);
        if (r == 0)
                r = ae_map_open("the exchange inbox", fds[2], answer->xin_len, false, false,
                                &h->xin_map);
        if (r == 0 && h->page->xout_len != answer->xout_len)
                r = ae_fail(AE_EPROTO, "the exchange ring has %llu bytes in one place and %llu in "
                            "another", (unsigned long long)answer->xout_len,
                            (unsigned long long)h->page->xout_len);
        return r;
}

static int take_answer(struct autoep *h, struct ae_session_reply *reply, const struct ae_model *own)
{
        Autoep__Registered *answer = (Autoep__Registered *)reply->message;
        int r;

        r = check_answer(h, answer, reply->n_fds);
        if (r < 0)
                return r;
        h->world = answer->world;
        r = take_model(h, answer, own);
        if (r == 0)
                r = take_nodes(h, answer);
        if (r == 0)
                r = ae_map_open("the job's shared memory", reply->fds[0], answer->params_len, false,
                                false, &h->params_map);
        if (r == 0)
                r = take_params(h);
        if (r == 0 && !h->reader)
                r = map_exchange(h, answer, reply->fds);
        if (r == 0)
                r = ae_holds_new(h);
        if (r == 0)
                r = ae_plan_new(h);
        if (r == 0)
                r = ae_exchange_new(h);
        return r;
}

/* ---- the call --------------------------------------------------------------------------- */

static int send_model(struct autoep *h, const struct autoep_model *model, struct ae_model *record,
                      const struct ae_deadline *deadline, struct ae_session_reply *ret_reply)
{
        Autoep__Register message = AUTOEP__REGISTER__INIT;
        struct ae_record_init init = { .fd = -1 };
        int r = 0;

        if (record)
                r = ae_record_init(h, model, record, &init);
        if (r < 0)
                return r;
        message.model = record ? record->message : NULL;
        message.init_len = init.len;
        r = ae_session_call(h, &(struct ae_session_call){ AE_CONTROL_REGISTER, &message.base,
                                                          init.fd, 0,
                                                          AE_CONTROL_REGISTERED }, deadline,
                            ret_reply);
        ae_cleanup_close(&init.fd);
        return r;
}

static int check_call(const struct autoep *h, const struct autoep_model *model, int timeout_ms)
{
        int r = ae_handle_enter(h);
        bool is_new = h && atomic_load(&h->gate) == AE_GATE_NEW;

        if (r == 0)
                return ae_fail(AE_ESTATE, "the model is registered already");
        if (r != AE_ESTATE || !is_new)
                return r;
        if (h->register_cut)
                return ae_fail(AE_ESTATE, "an earlier autoep_register() ended without an answer: "
                               "close the handle and open another");
        if (!model && !h->reader)
                return ae_fail(AE_EINVAL, "there is no model to register");
        if (model && h->reader)
                return ae_fail(AE_EINVAL, "a reader registers no model: pass NULL");
        return ae_deadline_check(timeout_ms);
}

static int open_gate(struct autoep *h)
{
        pthread_mutex_lock(&h->lock);
        if (atomic_load(&h->gate) == AE_GATE_NEW)
                atomic_store_explicit(&h->gate, AE_GATE_LIVE, memory_order_release);
        pthread_mutex_unlock(&h->lock);
        return 0;
}

static int register_model(struct autoep *h, const struct autoep_model *model, int timeout_ms)
{
        AE_CLEANUP(ae_model_free_p) struct ae_model *record = NULL;
        AE_CLEANUP(ae_session_reply_deinit) struct ae_session_reply reply = { .message = NULL };
        struct ae_deadline deadline;
        int r;

        r = check_call(h, model, timeout_ms);
        if (r < 0)
                return r;
        if (model) {
                r = ae_record_model(h, model, &record);
                if (r < 0)
                        return r;
        }
        ae_deadline_init(h, timeout_ms, &deadline);
        r = send_model(h, model, record, &deadline, &reply);
        if (r == AE_ETIMEDOUT && !reply.done)
                h->register_cut = true;
        if (r < 0)
                return r;
        r = take_answer(h, &reply, record);
        return r < 0 ? ae_pump_break(h, r) : open_gate(h);
}

int autoep_register(autoep *h, const struct autoep_model *model, int timeout_ms)
{
        return ae_api("autoep_register", register_model(h, model, timeout_ms));
}
