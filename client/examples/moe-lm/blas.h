/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The core type of OpenBLAS, and a lock around it. Distributions' OpenBLAS may take a new processor
 * for an old one and run five times slower; OPENBLAS_CORETYPE corrects it, but is read when the
 * library is loaded, before main(). So main() sets it and executes the program once more.
 */
#pragma once

#include <pthread.h>

/* Whoever calls OpenBLAS holds it: the serial build shares its buffers between threads. */
extern pthread_mutex_t lm_blas_mutex;

/*
 * First thing in main(). Returns when OPENBLAS_CORETYPE was set already, when there is nothing to
 * correct, or when executing failed (it then works, only slower). One BLAS thread from then on.
 */
void lm_blas_choose(char **argv);
/* The core type in use, and how many threads compute. */
const char *lm_blas_core(void);
int lm_blas_threads(void);
