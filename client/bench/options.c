/* SPDX-License-Identifier: Apache-2.0 */
/* Parsing by the tables of options and suites. */
#include "client/bench/options.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#define SIZE_MIN ((uint64_t)4096)
#define SIZE_MAX_LEN (16 * AE_GIB)

static const struct {
        char letter;
        const char *word, *argument, *help;
} rows[AE_BENCH_N_OPTIONS] = {
#define OPTION_ROW(name, letter, word, argument, help) { letter, word, argument, help },
        AE_BENCH_OPTION_TABLE(OPTION_ROW)
#undef OPTION_ROW
};

static const struct {
        const char *word, *help;
} suites[AE_BENCH_N_SUITES] = {
#define SUITE_ROW(name, word, help) { word, help },
        AE_BENCH_SUITE_TABLE(SUITE_ROW)
#undef SUITE_ROW
};

static int parse_count(const char *what, const char *word, uint32_t max, uint32_t *ret_n)
{
        char *end;
        unsigned long n;

        errno = 0;
        n = strtoul(word, &end, 10);
        if (!isdigit((unsigned char)*word) || *end || errno || n < 1 || n > max)
                return ae_fail(AE_EINVAL, "--%s is '%s': give 1 to %u", what, word, max);
        *ret_n = (uint32_t)n;
        return 0;
}

/* One size of a list; @ret_at stands on the comma or the end behind it. */
static int parse_size(const char *list, const char **ret_at, uint64_t *ret_len)
{
        static const char units[] = "KMG";
        uint64_t len;
        const char *unit;
        char *end;

        errno = 0;
        len = strtoull(*ret_at, &end, 10);
        if (!isdigit((unsigned char)**ret_at) || errno)
                return ae_fail(AE_EINVAL, "--size is '%s': give bytes, divided by commas", list);
        unit = *end ? strchr(units, *end) : NULL;
        for (const char *at = units; unit && at <= unit; at++) {
                if (ae_mul_overflows(len, AE_KIB, &len))
                        len = UINT64_MAX;
        }
        end += unit != NULL;
        if ((*end && *end != ',') || len < SIZE_MIN || len > SIZE_MAX_LEN)
                return ae_fail(AE_EINVAL, "--size is '%s': give 4K to 16G each, divided by commas",
                               list);
        *ret_len = ae_align_up(len, SIZE_MIN);
        *ret_at = end;
        return 0;
}

static int parse_nodes(const char *list, struct ae_bench_options *options)
{
        const char *at = list;
        char *end;

        for (options->n_nodes = 0;; at = end + 1) {
                unsigned long n = strtoul(at, &end, 10);

                if (!isdigit((unsigned char)*at) || (*end && *end != ',') || n < 1 ||
                    n > AE_BENCH_NODES_MAX)
                        return ae_fail(AE_EINVAL, "--nodes is '%s': give 1 to %d each, divided by "
                                       "commas", list, AE_BENCH_NODES_MAX);
                if (options->n_nodes == AE_BENCH_NODES_MAX)
                        return ae_fail(AE_EINVAL, "--nodes lists more than %d numbers",
                                       AE_BENCH_NODES_MAX);
                options->nodes[options->n_nodes++] = (uint32_t)n;
                if (!*end)
                        return 0;
        }
}

static int parse_sizes(const char *list, struct ae_bench_options *options)
{
        const char *at = list;

        for (options->n_sizes = 0;; at++) {
                int r;

                if (options->n_sizes == AE_BENCH_SIZES_MAX)
                        return ae_fail(AE_EINVAL, "--size lists more than %d sizes",
                                       AE_BENCH_SIZES_MAX);
                r = parse_size(list, &at, &options->sizes[options->n_sizes]);
                if (r < 0)
                        return r;
                options->n_sizes++;
                if (!*at)
                        return 0;
        }
}

static int parse_output(const char *word, struct ae_bench_options *options)
{
        if (strcmp(word, "table") != 0 && strcmp(word, "json") != 0)
                return ae_fail(AE_EINVAL, "--output is '%s': give table or json", word);
        options->json = word[0] == 'j';
        return 0;
}

static int parse_transport(const char *word, struct ae_bench_options *options)
{
        if (strcmp(word, "tcp") != 0 && strcmp(word, "shm") != 0)
                return ae_fail(AE_EINVAL, "--transport is '%s': give tcp or shm", word);
        options->transport = word;
        return 0;
}

static int take(enum ae_bench_option id, const char *word, struct ae_bench_options *options)
{
        switch (id) {
        case AE_BENCH_OPTION_OUTPUT:
                return parse_output(word, options);
        case AE_BENCH_OPTION_QUICK:
                options->quick = true;
                return 0;
        case AE_BENCH_OPTION_NODES:
                return parse_nodes(word, options);
        case AE_BENCH_OPTION_WORKERS:
                return parse_count("workers", word, AE_BENCH_WORKERS_MAX, &options->workers);
        case AE_BENCH_OPTION_TRANSPORT:
                return parse_transport(word, options);
        case AE_BENCH_OPTION_SIZE:
                return parse_sizes(word, options);
        case AE_BENCH_OPTION_STRICT:
                options->strict = true;
                return 0;
        case AE_BENCH_OPTION_WORKER:
                options->worker = word;
                return 0;
        case AE_BENCH_OPTION_HELP:
                options->help = true;
                return 0;
        case AE_BENCH_OPTION_VERSION:
                options->version = true;
                return 0;
        case AE_BENCH_N_OPTIONS:
                break;
        }
        return 0;
}

static int take_suite(const char *word, struct ae_bench_options *options)
{
        for (size_t i = 0; i < AE_BENCH_N_SUITES; i++) {
                if (strcmp(suites[i].word, word) == 0) {
                        options->suites[i] = true;
                        return 0;
                }
        }
        return ae_fail(AE_EINVAL, "unknown suite '%s': give kernels, gather or scatter", word);
}

static int take_option(int got, char **argv, struct ae_bench_options *options)
{
        if (got == ':')
                return ae_fail(AE_EINVAL, "%s needs a value", argv[optind - 1]);
        for (int i = 0; i < AE_BENCH_N_OPTIONS; i++) {
                if (rows[i].letter == got)
                        return take((enum ae_bench_option)i, optarg, options);
        }
        return ae_fail(AE_EINVAL, "unknown option '%s'", argv[optind - 1]);
}

int ae_bench_options_parse(int argc, char **argv, struct ae_bench_options *ret_options)
{
        struct ae_bench_options options = { .json = false };
        struct option longs[AE_BENCH_N_OPTIONS + 1] = { 0 };
        bool named = false;
        int got, r = 0;

        for (int i = 0; i < AE_BENCH_N_OPTIONS; i++)
                longs[i] = (struct option){ rows[i].word, rows[i].argument != NULL, NULL,
                                            rows[i].letter };
        optind = 0; /* glibc: start anew */
        opterr = 0;
        while (r == 0 && (got = getopt_long(argc, argv, ":o:", longs, NULL)) != -1)
                r = take_option(got, argv, &options);
        for (int i = optind; r == 0 && i < argc; i++) {
                r = take_suite(argv[i], &options);
                named = true;
        }
        if (r < 0)
                return r;
        for (size_t i = 0; i < AE_BENCH_N_SUITES; i++)
                options.suites[i] |= !named;
        *ret_options = options;
        return 0;
}

void ae_bench_options_help(FILE *out)
{
        fputs("usage: autoep-bench [SUITE...] [OPTIONS]\n\n"
              "Measures autoep on this machine, each row beside its floor in the same run.\n\n"
              "suites, all by default:\n", out);
        for (size_t i = 0; i < AE_BENCH_N_SUITES; i++)
                fprintf(out, "  %-24s %s\n", suites[i].word, suites[i].help);
        fputs("\noptions:\n", out);
        for (size_t i = 0; i < AE_BENCH_N_OPTIONS; i++) {
                char name[48];

                if (i == AE_BENCH_OPTION_WORKER)
                        continue; /* the bench's own */
                (void)snprintf(name, sizeof(name), "%s--%s%s%s",
                               i == AE_BENCH_OPTION_OUTPUT ? "-o, " : "", rows[i].word,
                               rows[i].argument ? " " : "",
                               rows[i].argument ? rows[i].argument : "");
                fprintf(out, "  %-24s %s\n", name, rows[i].help);
        }
}
