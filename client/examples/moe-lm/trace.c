/* SPDX-License-Identifier: Apache-2.0 */
/* Writes the trace of a run. */
#include "client/examples/moe-lm/trace.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <errno.h>
#include <stdlib.h>
#include <xxhash.h>

int lm_trace_open(struct lm_trace *trace, const struct lm_trainer *trainer, const char *path)
{
        *trace = (struct lm_trace){ .trainer = trainer, .path = path[0] ? path : NULL };
        if (!trace->path || trainer->backend->first_rank != 0)
                return 0;
        trace->out = fopen(path, "w");
        return trace->out ? 0 : ae_fail_sys(errno, "cannot write %s", path);
}

void lm_trace_deinit(struct lm_trace *trace)
{
        if (trace->out)
                fclose(trace->out); /* of a run that failed */
        *trace = (struct lm_trace){ 0 };
}

void lm_trace_step(struct lm_trace *trace, const struct lm_outcome *outcome)
{
        trace->n_steps++;
        if (trace->out)
                fprintf(trace->out, "step %llu loss %a norm %a%s\n",
                        (unsigned long long)trace->n_steps, outcome->loss, outcome->verdict.norm,
                        outcome->verdict.applied ? "" : " not applied");
}

/* Every rank asks, for experts come from where they are. */
static int write_masters(struct lm_trace *trace)
{
        struct lm_backend *backend = trace->trainer->backend;
        const struct lm_spec *spec = backend->spec;
        AE_CLEANUP(ae_cleanup_free) float *values = NULL;
        uint64_t most = 0;

        for (uint32_t id = 0; id < spec->n_tensors; id++)
                most = AE_MAX(most, spec->tensors[id].n);
        values = calloc(most, sizeof(*values));
        if (!values)
                return ae_fail_sys(ENOMEM, "cannot read tensors of %llu elements",
                                   (unsigned long long)most);
        for (uint32_t id = 0; id < spec->n_tensors; id++) {
                const struct lm_tensor *tensor = &spec->tensors[id];
                int r;

                if (tensor->home != id)
                        continue;
                r = backend->ops->get(backend, id, LM_MASTER, values);
                if (r < 0)
                        return r;
                if (trace->out)
                        fprintf(trace->out, "master %s %016llx\n", tensor->name,
                                (unsigned long long)XXH3_64bits(values,
                                                                tensor->n * sizeof(*values)));
        }
        return 0;
}

int lm_trace_end(struct lm_trace *trace)
{
        FILE *out = trace->out;
        int r = trace->path ? write_masters(trace) : 0;

        if (r < 0 || !out)
                return r;
        trace->out = NULL;
        if (ferror(out) | (fclose(out) != 0))
                return ae_fail_sys(errno, "cannot write %s", trace->path);
        return 0;
}
