/* SPDX-License-Identifier: Apache-2.0 */
/* autoep-ctl: shows what the daemon of this node knows. */
#include "client/ctl/ctl.h"

#include <signal.h>
#include <stdio.h>

int main(int argc, char **argv)
{
        /* A reader that leaves early, as head does, is an error of writing and not a death. */
        (void)signal(SIGPIPE, SIG_IGN);
        return ae_ctl_main(argc, argv, stdout, stderr);
}
