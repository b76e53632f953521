/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of inspect share: one query, answered from the core's tables as they are between
 * two events. Loop thread, on the stack of ae_inspect(); nothing outlives the call.
 */
#pragma once

#include "proto/base/json.h"
#include "server/core/job.h"
#include "server/inspect.h"

struct ae_inspect_query {
        const struct ae_inspect *inspect; /* borrowed */
        const Autoep__CtlRequest *request; /* borrowed */
        struct ae_core *core;             /* borrowed; read only */
        /* of commands that concern one job, else NULL and NONE; a job that has no layout yet has no
         * tensors and units, so that a wish for one of them was refused */
        struct ae_job *job;               /* borrowed; read only */
        uint32_t tensor, unit;            /* layout ids; AE_LAYOUT_NONE: all */
        struct ae_json json;              /* owned; the reply's object is open */
};

/*
 * Whether the reply is as long as a frame may be: the rows end there and the query fails. Looked at
 * before every row, so that the loop is not held up by a reply that nobody can be sent.
 */
bool ae_inspect_full(const struct ae_inspect_query *query);
/* As ae_json_put_u64(), but cut to 2^63 - 1, the most that a reply's integers hold: for figures
 * that a worker or a file gave. */
void ae_inspect_put_u64(struct ae_json *json, const char *key, uint64_t value);
void ae_inspect_put_null(struct ae_json *json, const char *key);
void ae_inspect_put_u32s(struct ae_json *json, const char *key, const uint32_t *values, uint32_t n);
/* This node's worker with that rank; NULL when there is none. */
const struct ae_worker *ae_inspect_worker(const struct ae_job *job, uint32_t rank);

/* One function per command; each adds its keys to query->json. inspect-jobs.c: */
void ae_inspect_status(struct ae_inspect_query *query);
void ae_inspect_nodes(struct ae_inspect_query *query);
void ae_inspect_jobs(struct ae_inspect_query *query);
void ae_inspect_workers(struct ae_inspect_query *query);
/* inspect-layout.c: */
void ae_inspect_units(struct ae_inspect_query *query);
void ae_inspect_tensors(struct ae_inspect_query *query);
void ae_inspect_shards(struct ae_inspect_query *query);
/* inspect-experts.c: */
void ae_inspect_experts(struct ae_inspect_query *query);
void ae_inspect_groups(struct ae_inspect_query *query);
void ae_inspect_stats(struct ae_inspect_query *query);
