/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The smallest job: one layer of 1,024 weights. Every rank pulls them towards its own number, and
 * what comes out is the mean of these numbers. Run it with
 *
 *      autoep-run --nodes 2 --workers 2 -- hello
 */
#include <autoep.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define N 1024
#define STEPS 10

static void check(int r)
{
        if (r < 0) {
                fprintf(stderr, "hello: %s\n", autoep_last_error());
                exit(1);
        }
}

/* One step; returns the first weight as it was before. */
static float step(autoep *handle, uint32_t unit, uint32_t tensor, float goal)
{
        const struct autoep_hyper hyper = { .lr = 0.5 };
        const struct autoep_step ask = { .size = sizeof(ask), .hyper = &hyper, .n_groups = 1 };
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        float gradient[N];
        const struct autoep_gradient scattered = {
                .size = sizeof(scattered), .tensor = tensor, .dtype = AUTOEP_F32, .data = gradient,
        };
        const float *w;

        check(autoep_gather(handle, unit, AUTOEP_DEFAULT_TIMEOUT, &view));
        w = autoep_view_tensor(handle, &view, tensor);
        const float before = w[0];
        for (int i = 0; i < N; i++)
                gradient[i] = w[i] - goal; /* of (w - goal)^2 / 2 */
        check(autoep_release(handle, &view));
        check(autoep_scatter(handle, unit, &scattered, 1, AUTOEP_LAST, AUTOEP_DEFAULT_TIMEOUT));
        /* The daemons add the ranks' gradients up; s is 1 / (micro-batches of all ranks). */
        check(autoep_step(handle, &ask, AUTOEP_DEFAULT_TIMEOUT, &verdict));
        return before;
}

int main(void)
{
        static const float zeros[N];
        const struct autoep_options options = AUTOEP_OPTIONS_INIT; /* all from the environment */
        const struct autoep_tensor weights = {
                .size = sizeof(weights), .name = "layer.weight", .unit = "layer",
                .dtype = AUTOEP_F32, .tensor_class = AUTOEP_DENSE, .n_dims = 1, .dims = { N },
                .init = zeros, /* rank 0's counts */
        };
        const struct autoep_model model = {
                .size = sizeof(model), .tensors = &weights, .n_tensors = 1, .optimizer = AUTOEP_SGD,
        };
        struct autoep_info info = { .size = sizeof(info) };
        autoep *handle = NULL;
        float w = 0;

        check(autoep_open(&options, &handle));
        check(autoep_register(handle, &model, AUTOEP_DEFAULT_TIMEOUT));
        check(autoep_info(handle, &info));
        const uint32_t unit = autoep_unit(handle, "layer");
        const uint32_t tensor = autoep_tensor(handle, "layer.weight");
        const float mean = (float)(info.world - 1) / 2;

        for (int i = 0; i < STEPS; i++) {
                w = step(handle, unit, tensor, (float)info.rank);
                if (info.rank == 0)
                        printf("version %d: the weights are %g\n", i, w);
        }
        check(autoep_leave(handle, AUTOEP_DEFAULT_TIMEOUT));
        autoep_close(handle);
        return fabsf(w - mean) <= mean / 256 ? 0 : 1;
}
