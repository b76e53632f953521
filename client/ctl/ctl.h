/* SPDX-License-Identifier: Apache-2.0 */
/* The program without its main(), so that tests run it in their own process. */
#pragma once

#include "client/ctl/commands.h"

#include <stdio.h>

/*
 * Runs the command line; answers go to @out, complaints to @err: a line that says what and why, and
 * a line "try: …". One thread; permutes @argv. Colours when @out is a terminal and NO_COLOR isn't
 * set.
 */
enum ae_ctl_exit ae_ctl_main(int argc, char **argv, FILE *out, FILE *err);

void ae_ctl_help(FILE *out);
/* The completion script for bash, made from the tables. */
void ae_ctl_completion_bash(FILE *out);
