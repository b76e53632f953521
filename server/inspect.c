/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The daemon's side of autoep-ctl: one row per command, the job, tensor and unit that a request
 * names, and what the rows' functions share. What a reply holds is fixed in client/ctl/SCHEMA.md.
 * Loop thread, between two events; nothing is changed.
 */
#include "server/inspect.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/inspect-private.h"

#include <stdio.h>
#include <string.h>

#define LIST_MAX 12u                              /* names in a refusal */
#define REPLY_MAX (AE_CONTROL_FRAME_MAX - 65536u) /* leaves room for a row and the frame */

enum { FOR_ALL, FOR_JOBS, FOR_ONE_JOB };

/* Order as in the manual page. */
static const struct command {
        const char *name;
        int what;             /* FOR_JOBS: the job, when named, must be there */
        void (*write)(struct ae_inspect_query *query);
} commands[] = {
        { "status", FOR_JOBS, ae_inspect_status },
        { "nodes", FOR_ALL, ae_inspect_nodes },
        { "jobs", FOR_JOBS, ae_inspect_jobs },
        { "workers", FOR_ONE_JOB, ae_inspect_workers },
        { "units", FOR_ONE_JOB, ae_inspect_units },
        { "tensors", FOR_ONE_JOB, ae_inspect_tensors },
        { "shards", FOR_ONE_JOB, ae_inspect_shards },
        { "experts", FOR_ONE_JOB, ae_inspect_experts },
        { "groups", FOR_ONE_JOB, ae_inspect_groups },
        { "stats", FOR_ALL, ae_inspect_stats },
};

/* ---- shared ----------------------------------------------------------------------------- */

bool ae_inspect_full(const struct ae_inspect_query *query)
{
        return query->json.len > REPLY_MAX || query->json.status < 0;
}

void ae_inspect_put_u64(struct ae_json *json, const char *key, uint64_t value)
{
        ae_json_put_u64(json, key, AE_MIN(value, (uint64_t)INT64_MAX));
}

void ae_inspect_put_null(struct ae_json *json, const char *key)
{
        ae_json_key(json, key);
        ae_json_null(json);
}

void ae_inspect_put_u32s(struct ae_json *json, const char *key, const uint32_t *values, uint32_t n)
{
        ae_json_key(json, key);
        ae_json_array_begin(json);
        for (uint32_t i = 0; i < n; i++)
                ae_json_u64(json, values[i]);
        ae_json_array_end(json);
}

const struct ae_worker *ae_inspect_worker(const struct ae_job *job, uint32_t rank)
{
        const struct ae_worker *worker;

        ae_list_for_each(worker, &job->core->workers, link) {
                if (worker->job == job && !worker->reader && worker->rank == rank)
                        return worker;
        }
        return NULL;
}

/* ---- what a request names --------------------------------------------------------------- */

/* Names in a refusal: "'a', 'b', ...". */
struct names {
        char text[512];
        size_t len;
        uint32_t n;
};

static void add_name(struct names *names, const char *name)
{
        int len;

        if (names->n++ >= LIST_MAX || names->len + 80 > sizeof(names->text)) {
                if (names->n == LIST_MAX + 1 || names->len + 80 > sizeof(names->text))
                        (void)snprintf(names->text + names->len, sizeof(names->text) - names->len,
                                       ", ...");
                return;
        }
        len = snprintf(names->text + names->len, sizeof(names->text) - names->len, "%s'%.64s'",
                       names->len ? ", " : "", name);
        names->len += (size_t)len;
}

static int no_job(const struct ae_core *core, const char *name)
{
        struct names names = { .len = 0 };
        const struct ae_job *job;

        ae_list_for_each(job, &core->jobs, link) {
                if (!job->released)
                        add_name(&names, job->name);
        }
        if (!names.n)
                return ae_fail(AE_ENOENT, "%s%s%s: node %u has no jobs",
                               *name ? "unknown job '" : "no job", name, *name ? "'" : "",
                               core->options.node);
        if (*name)
                return ae_fail(AE_ENOENT, "unknown job '%s': node %u has %s", name,
                               core->options.node, names.text);
        return ae_fail(AE_ENOENT, "which job? node %u has %u: %s", core->options.node, names.n,
                       names.text);
}

/* The job of that name, a living one before one that has failed; "" names the only one. */
static int find_job(const struct ae_core *core, const char *name, struct ae_job **ret_job)
{
        struct ae_job *job;
        struct ae_job *found = NULL;
        uint32_t n = 0;

        ae_list_for_each(job, &core->jobs, link) {
                if (job->released || (*name && strcmp(job->name, name) != 0))
                        continue;
                n++;
                if (!found || job->state < AE_JOB_FAILED)
                        found = job;
        }
        if (!found || (!*name && n > 1))
                return no_job(core, name);
        *ret_job = found;
        return 0;
}

static int no_unit(const struct ae_job *job, const char *name)
{
        struct names names = { .len = 0 };

        for (uint32_t u = 0; job->layout && u < job->layout->n_units; u++)
                add_name(&names, job->layout->units[u].name);
        return ae_fail(AE_ENOENT, "unknown unit '%s': job '%s' has %s", name, job->name,
                       names.n ? names.text : "no units yet");
}

static int no_tensor(const struct ae_inspect_query *query, const char *name)
{
        const struct ae_layout *layout = query->job->layout;
        struct names names = { .len = 0 };

        for (uint32_t t = 0; layout && t < layout->n_tensors; t++) {
                if (query->unit == AE_LAYOUT_NONE || layout->tensors[t].unit == query->unit)
                        add_name(&names, layout->tensors[t].name);
        }
        return ae_fail(AE_ENOENT, "unknown tensor '%s': %s '%s' has %s", name,
                       query->unit == AE_LAYOUT_NONE ? "job" : "unit",
                       query->unit == AE_LAYOUT_NONE ? query->job->name
                                                     : layout->units[query->unit].name,
                       names.n ? names.text : "no tensors yet");
}

static int find_unit_and_tensor(struct ae_inspect_query *query)
{
        const struct ae_layout *layout = query->job->layout;
        const char *unit = query->request->unit;
        const char *tensor = query->request->tensor;

        if (*unit) {
                query->unit = layout ? ae_layout_find_unit(layout, unit) : AE_LAYOUT_NONE;
                if (query->unit == AE_LAYOUT_NONE)
                        return no_unit(query->job, unit);
        }
        if (*tensor) {
                query->tensor = layout ? ae_layout_find_tensor(layout, tensor) : AE_LAYOUT_NONE;
                if (query->tensor == AE_LAYOUT_NONE ||
                    (*unit && layout->tensors[query->tensor].unit != query->unit))
                        return no_tensor(query, tensor);
        }
        return 0;
}

/* ---- a request -------------------------------------------------------------------------- */

static const struct command *find_command(const char *name)
{
        for (size_t i = 0; i < AE_ARRAY_LEN(commands); i++) {
                if (strcmp(commands[i].name, name) == 0)
                        return &commands[i];
        }
        return NULL;
}

static int unknown_command(const char *name)
{
        struct names names = { .len = 0 };

        for (size_t i = 0; i < AE_ARRAY_LEN(commands); i++)
                add_name(&names, commands[i].name);
        return ae_fail(AE_EUNSUPPORTED, "unknown command '%s': this daemon answers %s", name,
                       names.text);
}

static int finish(struct ae_inspect_query *query, const struct command *command, char **ret_text)
{
        int r = query->json.status;

        if (r == 0 && query->json.len > REPLY_MAX)
                r = ae_fail(AE_EOVERFLOW, "the answer to '%s' is longer than %u bytes: name a %s",
                            command->name, REPLY_MAX,
                            command->what == FOR_ONE_JOB ? "unit or tensor" : "job");
        if (r == 0) {
                ae_json_object_end(&query->json);
                r = ae_json_finish(&query->json, ret_text, NULL);
        }
        ae_json_deinit(&query->json);
        return r;
}

int ae_inspect(const struct ae_inspect *inspect, const Autoep__CtlRequest *request,
               char **ret_text)
{
        struct ae_inspect_query query = {
                .inspect = inspect, .request = request, .core = ae_node_core(inspect->node),
                .tensor = AE_LAYOUT_NONE, .unit = AE_LAYOUT_NONE, .json = AE_JSON_INIT,
        };
        const struct command *command = find_command(request->command);
        struct ae_job *job = NULL;
        char schema[64];
        int r = 0;

        if (!command)
                return unknown_command(request->command);
        if (command->what == FOR_ONE_JOB || (command->what == FOR_JOBS && *request->job))
                r = find_job(query.core, request->job, &job);
        if (r == 0 && command->what == FOR_ONE_JOB) {
                query.job = job;
                r = find_unit_and_tensor(&query);
        }
        if (r < 0)
                return r;
        (void)snprintf(schema, sizeof(schema), "autoep.%s/1", command->name);
        ae_json_object_begin(&query.json);
        ae_json_put_string(&query.json, "schema", schema);
        if (query.job)
                ae_json_put_string(&query.json, "job", query.job->name);
        command->write(&query);
        return finish(&query, command, ret_text);
}
