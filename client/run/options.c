/* SPDX-License-Identifier: Apache-2.0 */
/* Parsing by one table. */
#include "client/run/options.h"

#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#define READY_DEFAULT_NS (10 * AE_NS_PER_S)
#define READY_MAX_S 3600.0
#define JOB_MAX 511 /* bytes of a name on the wire */

const struct ae_run_option_row ae_run_option_rows[AE_RUN_N_OPTIONS] = {
#define OPTION_ROW(name, word, argument, help) { word, argument, help },
        AE_RUN_OPTION_TABLE(OPTION_ROW)
#undef OPTION_ROW
};

/* A whole number that ends at one of @stops. */
static int parse_number(const char *word, const char *stops, uint64_t *ret_value,
                        const char **ret_end)
{
        unsigned long long value;
        char *end;

        errno = 0;
        value = strtoull(word, &end, 10);
        if (!isdigit((unsigned char)*word) || errno == ERANGE || (*end && !strchr(stops, *end)))
                return ae_fail(AE_EINVAL, "'%s' isn't a number", word);
        *ret_value = value;
        *ret_end = end;
        return 0;
}

static int parse_nodes(const char *word, struct ae_run_options *options)
{
        const char *end;
        uint64_t n;

        if (parse_number(word, "", &n, &end) < 0 || n < 1 || n > AE_RUN_NODES_MAX)
                return ae_fail(AE_EINVAL, "--nodes is '%s': give 1 to %d", word, AE_RUN_NODES_MAX);
        options->n_nodes = (uint32_t)n;
        return 0;
}

/* One count for all nodes or a list with one for each. Read when the number of nodes is known. */
static int parse_workers(const char *word, struct ae_run_options *options)
{
        const char *at = word;
        uint32_t n = 0;
        uint64_t count, world = 0;

        for (bool more = true; more; n++) {
                if (parse_number(at, ",", &count, &at) < 0 || count > AE_RUN_WORKERS_MAX)
                        return ae_fail(AE_EINVAL, "--workers is '%s': give counts up to %d, "
                                       "divided by commas", word, AE_RUN_WORKERS_MAX);
                if (n == options->n_nodes)
                        return ae_fail(AE_EINVAL, "--workers '%s' lists more than the %u nodes",
                                       word, options->n_nodes);
                options->workers[n] = (uint32_t)count;
                more = *at == ',';
                at += more;
        }
        if (n != 1 && n != options->n_nodes)
                return ae_fail(AE_EINVAL, "--workers '%s' lists %u counts for %u nodes", word, n,
                               options->n_nodes);
        for (uint32_t i = 0; i < options->n_nodes; i++) {
                if (n == 1)
                        options->workers[i] = options->workers[0];
                world += options->workers[i];
        }
        if (world < 1 || world > AE_RUN_WORKERS_MAX)
                return ae_fail(AE_EINVAL, "--workers '%s' on %u nodes makes %llu workers: 1 to %d "
                               "are possible", word, options->n_nodes, (unsigned long long)world,
                               AE_RUN_WORKERS_MAX);
        options->world = (uint32_t)world;
        return 0;
}

static int parse_memory(const char *word, struct ae_run_options *options)
{
        static const char units[] = "KMGT";
        const char *unit = NULL, *end;
        uint64_t value = 0;
        int r = parse_number(word, units, &value, &end);

        if (r == 0 && *end) {
                unit = strchr(units, *end);
                end++;
        }
        if (r < 0 || (*end && (!unit || strcmp(end, "iB") != 0)) || value == 0)
                return ae_fail(AE_EINVAL, "--memory is '%s': give bytes, or a number with K, M, G "
                               "or T", word);
        for (const char *at = units; unit && at <= unit; at++) {
                if (ae_mul_overflows(value, AE_KIB, &value))
                        return ae_fail(AE_EINVAL, "--memory '%s' is beyond 64 bits", word);
        }
        options->memory_len = value;
        return 0;
}

static int parse_keep_going(const char *word, struct ae_run_options *options)
{
        if (strcmp(word, "yes") != 0 && strcmp(word, "no") != 0)
                return ae_fail(AE_EINVAL, "--keep-going is '%s': give yes or no", word);
        options->keep_going = word[0] == 'y';
        return 0;
}

static int parse_ready(const char *word, struct ae_run_options *options)
{
        char *end;
        double seconds = strtod(word, &end);

        if (end == word || *end || !(seconds > 0 && seconds <= READY_MAX_S))
                return ae_fail(AE_EINVAL, "--ready-timeout is '%s': give seconds up to %.0f", word,
                               READY_MAX_S);
        options->ready_ns = (uint64_t)(seconds * (double)AE_NS_PER_S);
        return 0;
}

static int parse_transport(const char *word, struct ae_run_options *options)
{
        if (strcmp(word, "shm") != 0 && strcmp(word, "tcp") != 0)
                return ae_fail(AE_EINVAL, "--transport is '%s': give shm or tcp", word);
        options->transport = word;
        return 0;
}

static int parse_job(const char *word, struct ae_run_options *options)
{
        if (!*word || strlen(word) > JOB_MAX)
                return ae_fail(AE_EINVAL, "--job needs a name of 1 to %d bytes", JOB_MAX);
        options->job = word;
        return 0;
}

static int take(enum ae_run_option id, const char *word, struct ae_run_options *options)
{
        switch (id) {
        case AE_RUN_OPTION_NODES:
                return parse_nodes(word, options);
        case AE_RUN_OPTION_JOB:
                return parse_job(word, options);
        case AE_RUN_OPTION_TRANSPORT:
                return parse_transport(word, options);
        case AE_RUN_OPTION_MEMORY:
                return parse_memory(word, options);
        case AE_RUN_OPTION_LOG_LEVEL:
                return ae_log_level_parse(word, &options->level);
        case AE_RUN_OPTION_KEEP_GOING:
                return parse_keep_going(word, options);
        case AE_RUN_OPTION_READY_TIMEOUT:
                return parse_ready(word, options);
        case AE_RUN_OPTION_HELP:
                options->help = true;
                return 0;
        case AE_RUN_OPTION_VERSION:
                options->version = true;
                return 0;
        case AE_RUN_OPTION_WORKERS: /* needs the nodes: parsed at the end */
        case AE_RUN_N_OPTIONS:
                break;
        }
        return 0;
}

/* What getopt_long() returned instead of an option, at the word @at. */
static int refuse(int got, const char *at)
{
        if (got == ':')
                return ae_fail(AE_EINVAL, "%s needs a value", at);
        if (optopt == 1) /* a long option's own value */
                return ae_fail(AE_EINVAL, "'%s': the option takes no value", at);
        if (optopt)
                return ae_fail(AE_EINVAL, "unknown option '-%c'", optopt);
        return ae_fail(AE_EINVAL, "unknown option '%s'", at);
}

static int parse_options(int argc, char **argv, const char **workers,
                         struct ae_run_options *options)
{
        struct option longs[AE_RUN_N_OPTIONS + 1] = { 0 };
        int got, index, r;

        for (int i = 0; i < AE_RUN_N_OPTIONS; i++)
                longs[i] = (struct option){ ae_run_option_rows[i].word,
                                            ae_run_option_rows[i].argument != NULL, NULL, 1 };
        optind = 0; /* glibc: start anew */
        opterr = 0;
        while ((got = getopt_long(argc, argv, "+:", longs, &index)) != -1) {
                if (got != 1)
                        return refuse(got, argv[optind - 1]);
                assert(index >= 0 && index < AE_RUN_N_OPTIONS);
                if (index == AE_RUN_OPTION_WORKERS)
                        *workers = optarg;
                r = take((enum ae_run_option)index, optarg, options);
                if (r < 0)
                        return r;
        }
        return 0;
}

static const char *base_name(const char *path)
{
        const char *slash = strrchr(path, '/');

        return slash && slash[1] ? slash + 1 : path;
}

int ae_run_options_parse(int argc, char **argv, struct ae_run_options *ret_options)
{
        struct ae_run_options options = { .n_nodes = 1, .transport = "shm", .level = AE_LOG_WARN,
                                          .ready_ns = READY_DEFAULT_NS };
        const char *workers = "1";
        int r;

        r = parse_options(argc, argv, &workers, &options);
        if (r < 0)
                return r;
        if (!options.help && !options.version) {
                r = parse_workers(workers, &options);
                if (r < 0)
                        return r;
                if (optind >= argc || !*argv[optind])
                        return ae_fail(AE_EINVAL, "no program given");
                options.program = argv + optind;
                if (!options.job) {
                        r = parse_job(base_name(argv[optind]), &options);
                        if (r < 0)
                                return r;
                }
        }
        *ret_options = options;
        return 0;
}

void ae_run_options_help(FILE *out)
{
        fputs("usage: autoep-run [OPTIONS] [--] PROGRAM [ARGS...]\n\n"
              "Starts daemons and workers on this machine and ends with the workers.\n\n"
              "options:\n", out);
        for (size_t i = 0; i < AE_RUN_N_OPTIONS; i++) {
                const struct ae_run_option_row *row = &ae_run_option_rows[i];
                char name[48];

                (void)snprintf(name, sizeof(name), "--%s%s%s", row->word, row->argument ? " " : "",
                               row->argument ? row->argument : "");
                fprintf(out, "  %-24s %s\n", name, row->help);
        }
}
