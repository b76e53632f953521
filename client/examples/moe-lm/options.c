/* SPDX-License-Identifier: Apache-2.0 */
/* Parses the command line with getopt_long(), from the table of options. */
#include "client/examples/moe-lm/options.h"

#include "client/examples/moe-lm/text.h"
#include "proto/base/dtype.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/group.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum kind { KIND_COUNT, KIND_COUNT0, KIND_REAL, KIND_FLAG, KIND_TEXT, KIND_DTYPE, KIND_ORDER,
            KIND_ROUTER, KIND_RULE };

struct row {
        const char *name;
        enum kind kind;
        size_t offset;
        const char *value; /* default */
        const char *help;
};

static const struct row rows[] = {
#define ROW(name, field, kind, value, help)                                                       \
        { name, KIND_##kind, offsetof(struct lm_options, field), value, help },
        LM_OPTION_TABLE(ROW)
#undef ROW
};

static int parse_count(const struct row *row, const char *word, uint32_t least, void *field)
{
        char *end = NULL;
        unsigned long long value;

        errno = 0;
        value = strtoull(word, &end, 10);
        if (word[0] < '0' || word[0] > '9' || *end != '\0' || errno != 0 || value > INT32_MAX ||
            value < least)
                return ae_fail(AE_EINVAL, "--%s %s: it takes a whole number from %u to %d",
                               row->name, word, least, INT32_MAX);
        *(uint32_t *)field = (uint32_t)value;
        return 0;
}

static int parse_real(const struct row *row, const char *word, void *field)
{
        char *end = NULL;
        const double value = strtod(word, &end);

        if (end == word || *end != '\0' || !isfinite(value) || value < 0)
                return ae_fail(AE_EINVAL, "--%s %s: it takes a number that is not negative",
                               row->name, word);
        *(double *)field = value;
        return 0;
}

/* The place of @word among two legal ones. */
static int parse_choice(const struct row *row, const char *word, const char *const words[2],
                        bool *ret_second)
{
        for (int i = 0; i < 2; i++) {
                if (strcmp(word, words[i]) != 0)
                        continue;
                *ret_second = i == 1;
                return 0;
        }
        return ae_fail(AE_EINVAL, "--%s %s: it takes %s or %s", row->name, word, words[0],
                       words[1]);
}

static const char *const *choices_of(enum kind kind)
{
        static const char *const dtypes[] = { "fp32", "bf16" };
        static const char *const orders[] = { "ed", "de" };
        static const char *const routers[] = { "softmax", "sigmoid" };
        static const char *const rules[] = { "adamw", "sgd" };

        switch (kind) {
        case KIND_DTYPE:
                return dtypes;
        case KIND_ORDER:
                return orders;
        case KIND_ROUTER:
                return routers;
        default:
                return rules;
        }
}

static int parse_word(const struct row *row, const char *word, void *field)
{
        bool second = false;
        int r = parse_choice(row, word, choices_of(row->kind), &second);

        if (r < 0)
                return r;
        if (row->kind == KIND_DTYPE)
                *(uint32_t *)field = second ? AE_DTYPE_BF16 : AE_DTYPE_F32;
        else if (row->kind == KIND_ORDER)
                *(uint32_t *)field = second ? AE_ORDER_DE : AE_ORDER_ED;
        else
                *(bool *)field = second;
        return 0;
}

static int parse(const struct row *row, const char *word, struct lm_options *options)
{
        void *field = (char *)options + row->offset;

        switch (row->kind) {
        case KIND_COUNT:
        case KIND_COUNT0:
                return parse_count(row, word, row->kind == KIND_COUNT ? 1 : 0, field);
        case KIND_REAL:
                return parse_real(row, word, field);
        case KIND_FLAG:
                *(bool *)field = strcmp(word, "off") != 0;
                return 0;
        case KIND_TEXT:
                *(const char **)field = word;
                return 0;
        default:
                return parse_word(row, word, field);
        }
}

/* What one option says about another. */
static int settle(struct lm_options *options)
{
        options->tokens |= options->uneven;
        if (options->check && options->steps > 6)
                options->steps = 6;
        if (options->check && options->lr > 1e-3)
                options->lr = 1e-3;
        if (options->check && options->reference)
                return ae_fail(AE_EINVAL, "--check compares autoep with the reference: it can't "
                               "be used with --reference");
        if (options->check && options->trace[0])
                return ae_fail(AE_EINVAL, "--check trains on its own terms: it can't be used with "
                               "--trace");
        return 0;
}

int lm_options_parse(struct lm_options *options, int argc, char **argv)
{
        static const char *const default_paths[] = { LM_TEXT_DEFAULT };
        struct option longs[AE_ARRAY_LEN(rows) + 1] = { 0 };
        int r = 0, chosen, at = 0;

        *options = (struct lm_options){ .paths = default_paths, .n_paths = 1 };
        for (size_t i = 0; r == 0 && i < AE_ARRAY_LEN(rows); i++) {
                longs[i] = (struct option){ rows[i].name, rows[i].kind != KIND_FLAG, NULL, 0 };
                r = parse(&rows[i], rows[i].value, options);
        }
        optind = 0; /* GNU: begin anew, also when called again */
        opterr = 0;
        while (r == 0 && (chosen = getopt_long(argc, argv, ":", longs, &at)) != -1) {
                if (chosen != 0)
                        return ae_fail(AE_EINVAL, "%s: %s; --help lists all", argv[optind - 1],
                                       chosen == ':' ? "a value is missing" : "no such option");
                r = parse(&rows[at], optarg ? optarg : "on", options);
        }
        if (r < 0)
                return r;
        if (optind < argc) {
                options->paths = (const char *const *)&argv[optind];
                options->n_paths = (size_t)(argc - optind);
        }
        return settle(options);
}

void lm_options_help(const char *program)
{
        printf("usage: %s [OPTION...] [FILE|DIR ...]\n\n"
               "Trains a byte-level language model with mixture-of-experts layers on the text of\n"
               "the files (default: %s). Rank, world and daemon come from the\n"
               "environment that autoep-run sets.\n\n", program, LM_TEXT_DEFAULT);
        for (size_t i = 0; i < AE_ARRAY_LEN(rows); i++) {
                const bool takes = rows[i].kind != KIND_FLAG;
                char left[40];

                snprintf(left, sizeof(left), "--%s%s%s", rows[i].name, takes ? " " : "",
                         takes && rows[i].value[0] ? rows[i].value : takes ? "FILE" : "");
                printf("  %-22s %s\n", left, rows[i].help);
        }
        printf("\nValues shown are the defaults.\n");
}
