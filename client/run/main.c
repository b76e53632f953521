/* SPDX-License-Identifier: Apache-2.0 */
/* autoep-run: daemons and workers of one job on this machine. */
#include "client/run/options.h"
#include "client/run/run.h"

#include "proto/base/status.h"

#include <signal.h>
#include <stdio.h>

#define CODE_USAGE 2

int main(int argc, char **argv)
{
        struct ae_run_options options;
        struct ae_run_outcome outcome;

        if (ae_run_options_parse(argc, argv, &options) < 0) {
                fprintf(stderr, "autoep-run: %s\ntry: autoep-run --help\n", ae_error_text());
                return CODE_USAGE;
        }
        if (options.help) {
                ae_run_options_help(stdout);
                return 0;
        }
        if (options.version) {
                puts("autoep-run " AUTOEP_VERSION);
                return 0;
        }
        /* Output that nobody reads any more is no reason to leave children behind. */
        (void)signal(SIGPIPE, SIG_IGN);
        ae_run(&options, &outcome);
        if (outcome.reason[0])
                fprintf(stderr, "autoep-run: %s\n", outcome.reason);
        return outcome.code;
}
