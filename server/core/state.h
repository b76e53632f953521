/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What get.c, put.c and state.c share: requests for state from outside, cut at the borders of
 * slices, and where an owner finds a piece of state. The core's thread.
 */
#pragma once

#include "server/core/job.h"

/* enum autoep_what, as it travels in StateItem.what. */
enum ae_what { WEIGHT = 1, MASTER = 2, MOMENT1 = 3, MOMENT2 = 4, GRADIENT = 5 };

/* One stretch of an item that one owner has. */
struct ae_stretch {
        uint32_t slice, tensor, what;
        uint64_t first, n; /* elements of the tensor */
        uint64_t off;      /* bytes in the request's memory */
};

struct ae_request {
        struct ae_list link;
        struct ae_job *job;
        struct ae_worker *worker; /* NULL: it is gone */
        bool put, initial;
        bool ended;               /* freed with its last put */
        uint32_t n_puts;          /* posted from its region and not done */
        uint64_t id;              /* the worker's */
        uint64_t put_id;
        uint64_t version;         /* put: that it is for */
        bool stamped, mixed;      /* get: a piece has come; two were of different versions */
        uint32_t stamp;           /* get: low bits of the version of the pieces */
        uint32_t token;
        int fd;                   /* owned; get: where the worker wants it */
        struct ae_region *region; /* owned: the bytes */
        uint64_t len;
        struct ae_stretch *stretches; /* owned */
        uint32_t n_stretches, stretches_cap;
        uint64_t n_left;          /* stretches or stagings that have not come */
        uint32_t *due;            /* owned; per node: how many of these it still owes */
        struct ae_state_fetch *own; /* owned; get: what this node itself brings; NULL: it has */
        uint32_t n_seen;          /* nodes that show the put's version */
        struct ae_net_key *keys;  /* owned; get: what the owners were granted; per node */
        bool *keyed;              /* owned; per node. Get: granted. Put: it may say that it has
                                     staged, for its bytes are on their way or there are none */
};

/* ---- state.c ------------------------------------------------------------------------- */

uint64_t ae_state_item_size(const struct ae_layout_tensor *tensor, uint32_t what);
const struct ae_layout_tensor *ae_state_home(const struct ae_job *job, uint32_t tensor);
bool ae_state_trainable(const struct ae_job *job, const struct ae_layout_tensor *home);
/* At once, or when what was put from its memory is done. */
void ae_state_request_free(struct ae_request *request);
void ae_state_finish(struct ae_request *request, int status, const char *text);
uint32_t ae_state_items(const struct ae_request *request, uint32_t node,
                        Autoep__StateItem **ret_items, Autoep__StateItem ***ret_pointers,
                        uint64_t *offs);
struct ae_region *ae_state_locate(const struct ae_job *job, uint32_t tensor, uint32_t what,
                                uint64_t first, uint64_t *ret_off);
struct ae_owned *ae_state_owner(const struct ae_job *job, uint32_t tensor, uint64_t first);
int ae_state_check_peer(const struct ae_job *job, Autoep__StateItem *const *items, size_t n,
                            bool put);
struct ae_request *ae_state_find(const struct ae_job *job, uint32_t token);

/* ---- get.c --------------------------------------------------------------------------- */

/* A note of @node about a piece of @request; @stamp: the low bits of the version it is of. */
void ae_get_arrived(struct ae_request *request, uint32_t node, uint32_t stamp);
/* The version that all pieces are of. */
uint64_t ae_get_version(const struct ae_request *request);
void ae_get_start(struct ae_request *request);
/* @request ends: nobody serves it any more. */
void ae_get_forget(struct ae_request *request);
int ae_get_refused(struct ae_job *job, uint32_t node, const Autoep__FetchReply *reply);
int ae_get_on_fetch(struct ae_job *job, uint32_t node, const Autoep__Fetch *message);
void ae_get_free(struct ae_job *job);

/* ---- put.c --------------------------------------------------------------------------- */

void ae_put_start(struct ae_request *request);
int ae_put_on_stage_reply(struct ae_job *job, uint32_t node, const Autoep__StageReply *reply);
int ae_put_on_stage(struct ae_job *job, uint32_t node, const Autoep__Stage *message);
void ae_put_free(struct ae_job *job);
