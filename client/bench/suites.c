/* SPDX-License-Identifier: Apache-2.0 */
/* Where the rows of all suites come together. */
#include "client/bench/suites.h"

#include "client/bench/print.h"

int ae_bench_add(struct ae_bench *bench, const struct ae_bench_row *row)
{
        int r = ae_bench_rows_add(&bench->rows, row);

        if (r < 0 || bench->options->json)
                return r;
        ae_bench_print_rows(&bench->rows, bench->n_printed, stdout);
        bench->n_printed = bench->rows.n;
        return 0;
}
