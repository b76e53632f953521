/* SPDX-License-Identifier: Apache-2.0 */
/* Trainers over the reference. The test's thread. */
#include "tests/lib/lm-bench.h"

#include "client/examples/moe-lm/reference.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include "tests/lib/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint8_t text_bytes[20000];
struct lm_text bench_text;

/* Words in a fixed but uneven order: something that can be learnt. */
int bench_make_text(void **state)
{
        static const char *const words[] = { "the ", "expert ", "layer ", "token ", "of ", "a ",
                                             "router. " };
        size_t n = 0, at = 1;

        (void)state;
        while (n + 16 < sizeof(text_bytes)) {
                const char *word = words[at % AE_ARRAY_LEN(words)];

                memcpy(text_bytes + n, word, strlen(word));
                n += strlen(word);
                at = at * 5 + n % 11;
        }
        bench_text = (struct lm_text){ .bytes = text_bytes, .n = n, .n_train = n - n / 20 };
        return 0;
}

int bench_parse(struct lm_options *options, const char *line)
{
        static char words[1024];
        static char *argv[64]; /* the options borrow from it */
        char *rest = NULL;
        int argc = 0;

        memset(argv, 0, sizeof(argv));
        snprintf(words, sizeof(words), "moe-lm %s", line);
        for (char *word = strtok_r(words, " ", &rest); word; word = strtok_r(NULL, " ", &rest))
                argv[argc++] = word;
        return lm_options_parse(options, argc, argv);
}

void bench_open(struct bench *bench, const char *line, enum ae_real real)
{
        struct lm_reference_config config = { .real = real };
        struct lm_shape shape;
        int r;

        *bench = (struct bench){ 0 };
        if (bench_parse(&bench->options, line) < 0)
                fail_msg("%s", ae_error_text());
        shape = lm_shape_of(&bench->options);
        config.grad_dtype = bench->options.grads;
        config.sgd = bench->options.optimizer;
        config.seed = bench->options.seed;
        config.sum_group = bench->options.sum_group ? bench->options.sum_group : 1;
        r = ae_group_init(bench->options.world,
                          bench->options.ep_size ? bench->options.ep_size : 1,
                          bench->options.order, &config.topology);
        if (r == 0)
                r = lm_spec_init(&bench->spec, &shape);
        if (r == 0)
                r = lm_reference_new(&bench->spec, &config, &bench->backend);
        if (r == 0)
                r = lm_trainer_init(&bench->trainer, bench->backend, &bench_text, &bench->options);
        if (r < 0)
                fail_msg("%s", ae_error_text());
}

void bench_close(struct bench *bench)
{
        lm_trainer_deinit(&bench->trainer);
        lm_backend_free(bench->backend);
        lm_spec_deinit(&bench->spec);
}

struct lm_outcome bench_step(struct bench *bench, uint64_t step)
{
        struct lm_outcome outcome;

        if (lm_train_step(&bench->trainer, step, &outcome) < 0)
                fail_msg("%s", ae_error_text());
        return outcome;
}

float *bench_state(struct bench *bench, enum lm_what what)
{
        float *all = calloc(bench->spec.n_elements, sizeof(*all));

        assert_non_null(all);
        for (uint32_t id = 0; id < bench->spec.n_tensors; id++) {
                const struct lm_tensor *tensor = &bench->spec.tensors[id];

                if (tensor->home == id && tensor->class != LM_BUFFER)
                        assert_int_equal(bench->backend->ops->get(bench->backend, id, what,
                                                                  all + tensor->first), 0);
        }
        return all;
}
