/* SPDX-License-Identifier: Apache-2.0 */
/* See client-job.h. */
#include "tests/lib/client-job.h"

#include "proto/base/clock.h"
#include "tests/lib/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LATE_MS 2000 /* a machine may stand still; the default deadline is 10 minutes */

static void add(struct job_model *m, uint32_t id, const char *name, const char *unit)
{
        assert_int_equal(m->model.n_tensors, id);
        m->tensors[id] = (struct autoep_tensor){ .size = sizeof(m->tensors[id]), .name = name,
                                                 .unit = unit, .dtype = AUTOEP_BF16, .n_dims = 1,
                                                 .tensor_class = AUTOEP_DENSE };
        m->model.n_tensors++;
}

static void add_alias(struct job_model *m, uint32_t id, const char *name, const char *unit,
                      uint32_t home)
{
        add(m, id, name, unit);
        m->tensors[id].n_dims = m->tensors[home].n_dims;
        memcpy(m->tensors[id].dims, m->tensors[home].dims, sizeof(m->tensors[id].dims));
        m->tensors[id].alias_of = m->tensors[home].name;
}

void job_model_fill(struct job_model *m)
{
        *m = (struct job_model){ .model = { .size = sizeof(m->model), .tensors = m->tensors } };
        add(m, JOB_EMBED, "embed.weight", "embed");
        m->tensors[JOB_EMBED].n_dims = 2;
        m->tensors[JOB_EMBED].dims[0] = 300;
        m->tensors[JOB_EMBED].dims[1] = 4;
        add(m, JOB_W, "layer.w", "layer");
        m->tensors[JOB_W].dims[0] = 1000;
        add(m, JOB_NORM, "layer.norm", "layer");
        m->tensors[JOB_NORM].dims[0] = 5;
        m->tensors[JOB_NORM].dtype = AUTOEP_F32;
        add(m, JOB_FROZEN, "layer.frozen", "layer");
        m->tensors[JOB_FROZEN].dims[0] = 7;
        m->tensors[JOB_FROZEN].flags = AUTOEP_FROZEN;
        add(m, JOB_BIAS, "layer.bias", "layer");
        m->tensors[JOB_BIAS].dims[0] = 4;
        m->tensors[JOB_BIAS].dtype = AUTOEP_F32;
        m->tensors[JOB_BIAS].tensor_class = AUTOEP_BUFFER;
        add(m, JOB_EXPERT, "layer.expert", "layer");
        m->tensors[JOB_EXPERT].dims[0] = 16;
        m->tensors[JOB_EXPERT].tensor_class = AUTOEP_EXPERT;
        add_alias(m, JOB_TIED, "layer.tied", "layer", JOB_EMBED);
        add(m, JOB_W2, "layer.w2", "layer");
        m->tensors[JOB_W2].dims[0] = 3;
        add(m, JOB_BIG, "big.w", "big");
        m->tensors[JOB_BIG].dims[0] = JOB_BIG_N;
        add_alias(m, JOB_HEAD, "head.w", "head", JOB_EMBED);
        add_alias(m, JOB_BIG_TIED, "tied.w", "big-tied", JOB_BIG);
}

struct autoep_options job_options(const struct fake_daemon *d, int rank)
{
        struct autoep_options options = AUTOEP_OPTIONS_INIT;

        options.socket = d->path;
        options.job = "test";
        options.rank = rank;
        options.world = (int)d->config.world;
        options.reader = rank < 0;
        options.timeout_ms = 10000;
        options.ring_len = AE_LOCAL_RING_MIN;
        return options;
}

autoep *job_open(const struct fake_daemon *d, int rank)
{
        struct autoep_options options = job_options(d, rank);
        autoep *h = NULL;
        int r = autoep_open(&options, &h);

        if (r < 0)
                print_error("%s\n", autoep_last_error());
        assert_int_equal(r, 0);
        return h;
}

autoep *job_join(const struct fake_daemon *d)
{
        struct job_model m;
        autoep *h = job_open(d, 0);
        int r;

        job_model_fill(&m);
        r = autoep_register(h, &m.model, 10000);
        if (r < 0)
                print_error("%s\n", autoep_last_error());
        assert_int_equal(r, 0);
        return h;
}

struct autoep_step job_step(void)
{
        static const struct autoep_hyper hyper = { .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999,
                                                   .eps = 1e-8, .weight_decay = 0.1 };

        return (struct autoep_step){ .size = sizeof(struct autoep_step), .hyper = &hyper,
                                     .n_groups = 1, .max_norm = 1.5 };
}

bool job_view_is_right(const struct autoep_view *view, uint64_t first)
{
        const uint8_t *bytes = view->data;

        for (uint64_t i = 0; i < view->len; i++) {
                if (bytes[i] != fake_byte(view->unit, view->version, first + i))
                        return false;
        }
        return true;
}

uint64_t job_now_ms(void)
{
        return ae_now_ns() / AE_NS_PER_MS;
}

void job_assert_took(uint64_t took_ms, uint64_t timeout_ms)
{
        assert_in_range(took_ms, timeout_ms - 1, timeout_ms + LATE_MS);
}

void job_assert_error_names(const char *what)
{
        if (!strstr(autoep_last_error(), what))
                fail_msg("'%s' does not name '%s'", autoep_last_error(), what);
}
