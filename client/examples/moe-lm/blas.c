/* SPDX-License-Identifier: Apache-2.0 */
/* Chooses the core type of OpenBLAS from what the processor can do; keeps its lock. */
#include "client/examples/moe-lm/blas.h"

#include <cblas.h>
#include <stdlib.h>
#include <unistd.h>

pthread_mutex_t lm_blas_mutex = PTHREAD_MUTEX_INITIALIZER;

#if defined(__x86_64__)
static const char *best_core(void)
{
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
                return "SKYLAKEX";
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
                return "HASWELL";
        return NULL;
}
#else
static const char *best_core(void)
{
        return NULL;
}
#endif

void lm_blas_choose(char **argv)
{
        const char *core = best_core();

        openblas_set_num_threads(1);
        if (!core || getenv("OPENBLAS_CORETYPE"))
                return;
        setenv("OPENBLAS_CORETYPE", core, 1);
        setenv("OPENBLAS_NUM_THREADS", "1", 1);
        /* On failure this process goes on with the core type that the library chose. */
        execv("/proc/self/exe", argv);
}

const char *lm_blas_core(void)
{
        return openblas_get_corename();
}

int lm_blas_threads(void)
{
        return openblas_get_num_threads();
}
