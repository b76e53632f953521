/* SPDX-License-Identifier: Apache-2.0 */
/* Settings of the daemon. Main thread, before anything runs. */
#include "server/config.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef AE_VERSION
#define AE_VERSION "unknown"
#endif

enum kind { KIND_BOOL, KIND_U32, KIND_BYTES, KIND_TEXT, KIND_LEVEL };

struct key {
        const char *name;
        enum kind kind;
        size_t off;
        const char *standard; /* default, as it would be written */
        const char *help;
};

#define FIELD(name) offsetof(struct ae_config, name)

static const struct key keys[] = {
        { "node", KIND_U32, FIELD(node), "0", "id of this node: its place in peers, from 0" },
        { "peers", KIND_TEXT, FIELD(peers), "",
          "addresses of all nodes by id, comma-separated; empty: this node alone" },
        { "socket", KIND_TEXT, FIELD(socket), "/run/autoep/autoepd.sock",
          "unix socket for workers and autoep-ctl" },
        { "transport", KIND_TEXT, FIELD(transport), "tcp", "between daemons: tcp or shm" },
        { "memory", KIND_BYTES, FIELD(memory), "0",
          "most bytes for all jobs, with K, M, G, T; 0: 80 % of the host's" },
        { "threads", KIND_U32, FIELD(threads), "0", "compute threads; 0: half of the processors" },
        { "log_level", KIND_LEVEL, FIELD(log_level), "info", "error, warn, info or debug" },
        { "dev", KIND_BOOL, FIELD(dev), "no", "one machine: loopback and unix sockets, no key" },
};

static int parse_u64(const char *text, bool bytes, uint64_t max, uint64_t *ret_value)
{
        static const char units[] = "KMGT";
        unsigned long long value;
        const char *unit;
        char *end;
        uint64_t factor = 1;

        errno = 0;
        value = strtoull(text, &end, 10);
        if (!isdigit((unsigned char)text[0]) || errno)
                return ae_fail(AE_EINVAL, "'%s' is not a number", text);
        if (bytes && *end && (unit = strchr(units, toupper((unsigned char)*end)))) {
                factor = UINT64_C(1) << (10 * (unit - units + 1));
                end++;
                if (strcmp(end, "iB") == 0 || strcmp(end, "B") == 0)
                        end += strlen(end);
        }
        if (*end)
                return ae_fail(AE_EINVAL, "'%s' is not a number%s", text,
                               bytes ? " of bytes (K, M, G, T may follow)" : "");
        if (ae_mul_overflows((uint64_t)value, factor, ret_value) || *ret_value > max)
                return ae_fail(AE_EINVAL, "%s is more than %llu", text, (unsigned long long)max);
        return 0;
}

static int set_text(char **to, const char *value)
{
        char *copy = strdup(value);

        if (!copy)
                return ae_fail(AE_ENOMEM, "no memory for a setting");
        free(*to);
        *to = copy;
        return 0;
}

static int set(struct ae_config *config, const struct key *key, const char *value)
{
        char *at = (char *)config + key->off;
        uint64_t number;
        int r;

        switch (key->kind) {
        case KIND_TEXT:
                return set_text((char **)(void *)at, value);
        case KIND_LEVEL:
                return ae_log_level_parse(value, (enum ae_log_level *)(void *)at);
        case KIND_BOOL:
                if (strcmp(value, "yes") != 0 && strcmp(value, "no") != 0)
                        return ae_fail(AE_EINVAL, "'%s' is neither yes nor no", value);
                *(bool *)at = value[0] == 'y';
                return 0;
        case KIND_U32:
                r = parse_u64(value, false, UINT32_MAX, &number);
                if (r == 0)
                        *(uint32_t *)(void *)at = (uint32_t)number;
                return r;
        case KIND_BYTES:
                return parse_u64(value, true, UINT64_MAX, (uint64_t *)(void *)at);
        }
        return ae_fail(AE_EINVAL, "setting '%s' has no kind", key->name);
}

static const struct key *find_key(const char *name)
{
        for (size_t i = 0; i < AE_ARRAY_LEN(keys); i++) {
                if (strcmp(keys[i].name, name) == 0)
                        return &keys[i];
        }
        return NULL;
}

static int set_named(struct ae_config *config, const char *name, const char *value,
                     const char *where)
{
        const struct key *key = find_key(name);

        if (!key)
                return ae_fail(AE_EINVAL, "%s: unknown setting '%s'", where, name);
        if (set(config, key, value) < 0)
                return ae_fail(AE_EINVAL, "%s: %s: %s", where, name, ae_error_text());
        return 0;
}

/* ---- file, environment, flags ----------------------------------------------------------- */

/* Where a file is being read; lines are as long as they are. */
struct file_state {
        struct ae_config *config; /* borrowed */
        const char *path;         /* borrowed */
        int line;
};

/* Without the white space around it, in place. */
static char *trim(char *text)
{
        size_t len;

        while (isspace((unsigned char)*text))
                text++;
        len = strlen(text);
        while (len > 0 && isspace((unsigned char)text[len - 1]))
                text[--len] = '\0';
        return text;
}

/* Cuts a remark off that follows white space: "8 ; of 16". */
static void cut_remark(char *text)
{
        for (char *c = text; *c; c++) {
                if (*c == ';' && (c == text || isspace((unsigned char)c[-1]))) {
                        *c = '\0';
                        return;
                }
        }
}

static int read_line(const struct file_state *state, char *line)
{
        char *equals;
        size_t len;

        line = trim(line);
        if (line[0] == '#')
                return 0;
        cut_remark(line);
        line = trim(line);
        len = strlen(line);
        if (len == 0)
                return 0;
        if (line[0] == '[' && line[len - 1] == ']') {
                line[len - 1] = '\0';
                if (strcmp(line + 1, "autoepd") == 0)
                        return 0;
                return ae_fail(AE_EINVAL, "%s: unknown section [%s]", state->path, line + 1);
        }
        equals = strchr(line, '=');
        if (!equals)
                return ae_fail(AE_EINVAL, "%s: line %d is neither a section nor a setting",
                               state->path, state->line);
        *equals = '\0';
        return set_named(state->config, trim(line), trim(equals + 1), state->path);
}

static int read_file(struct ae_config *config, const char *path)
{
        struct file_state state = { .config = config, .path = path };
        AE_CLEANUP(ae_cleanup_free) char *line = NULL;
        FILE *file = fopen(path, "re");
        size_t size = 0;
        int r = 0;

        if (!file)
                return ae_fail_sys(errno, "cannot read %s", path);
        errno = 0;
        while (r == 0 && getline(&line, &size, file) >= 0) {
                state.line++;
                r = read_line(&state, line);
        }
        if (r == 0 && !feof(file))
                r = ae_fail_sys(errno, "cannot read %s", path);
        (void)fclose(file); /* only read */
        return r;
}

static int read_environment(struct ae_config *config)
{
        char name[64];
        int r;

        for (size_t i = 0; i < AE_ARRAY_LEN(keys); i++) {
                const char *value;
                size_t len = (size_t)snprintf(name, sizeof(name), "AUTOEPD_%s", keys[i].name);

                for (size_t c = 0; c < len; c++)
                        name[c] = (char)toupper((unsigned char)name[c]);
                value = getenv(name);
                r = value ? set_named(config, keys[i].name, value, name) : 0;
                if (r < 0)
                        return r;
        }
        return 0;
}

static void print_help(void)
{
        printf("autoepd: owns shards of dense parameters and serves workers\n\n"
               "usage: autoepd [--config FILE] [--check-config] [--SETTING VALUE ...]\n\n");
        for (size_t i = 0; i < AE_ARRAY_LEN(keys); i++) {
                char flag[40];

                (void)snprintf(flag, sizeof(flag), "--%s%s", keys[i].name,
                               keys[i].kind == KIND_BOOL ? "" : " VALUE");
                for (char *c = flag + 2; *c; c++)
                        *c = *c == '_' ? '-' : *c;
                printf("  %-20s %s%s%s%s\n", flag, keys[i].help, keys[i].standard[0] ? " (" : "",
                       keys[i].standard, keys[i].standard[0] ? ")" : "");
        }
        printf("\nSettings come from the file, then AUTOEPD_<SETTING>, then flags. See "
               "autoepd(8).\n");
}

enum { OPT_CONFIG = 1000, OPT_CHECK, OPT_HELP, OPT_VERSION };

static int next_flag(int argc, char **argv)
{
        static struct option options[AE_ARRAY_LEN(keys) + 5];
        static char names[AE_ARRAY_LEN(keys)][32];
        size_t n = AE_ARRAY_LEN(keys);

        for (size_t i = 0; i < n; i++) {
                (void)snprintf(names[i], sizeof(names[i]), "%s", keys[i].name);
                for (char *c = names[i]; *c; c++)
                        *c = *c == '_' ? '-' : *c;
                options[i] = (struct option){ names[i], keys[i].kind != KIND_BOOL, NULL, (int)i };
        }
        options[n] = (struct option){ "config", 1, NULL, OPT_CONFIG };
        options[n + 1] = (struct option){ "check-config", 0, NULL, OPT_CHECK };
        options[n + 2] = (struct option){ "help", 0, NULL, OPT_HELP };
        options[n + 3] = (struct option){ "version", 0, NULL, OPT_VERSION };
        return getopt_long(argc, argv, "", options, NULL);
}

static int read_flags(struct ae_config *config, int argc, char **argv, bool *ret_check)
{
        int option;
        int r = 0;

        optind = 0; /* glibc: start anew */
        while (r == 0 && (option = next_flag(argc, argv)) != -1) {
                if (option == '?')
                        return ae_fail(AE_EINVAL, "see autoepd --help");
                if (option == OPT_CHECK)
                        *ret_check = true;
                else if (option < OPT_CONFIG)
                        r = set_named(config, keys[option].name, optarg ? optarg : "yes", "flag");
        }
        if (r == 0 && optind < argc)
                return ae_fail(AE_EINVAL, "what is '%s'? see autoepd --help", argv[optind]);
        return r;
}

/* Looks for what must be known before the other sources: the file, help, version. */
static int read_first(struct ae_config *config, int argc, char **argv)
{
        int option;
        int r;

        opterr = 0;
        optind = 0; /* glibc: start anew */
        while ((option = next_flag(argc, argv)) != -1) {
                if (option == OPT_HELP || option == OPT_VERSION) {
                        if (option == OPT_HELP)
                                print_help();
                        else
                                printf("autoepd %s\n", AE_VERSION);
                        return 1;
                }
                r = option == OPT_CONFIG ? read_file(config, optarg) : 0;
                if (r < 0)
                        return r;
        }
        opterr = 1;
        return 0;
}

/* ---- derived ---------------------------------------------------------------------------- */

static int split_peers(struct ae_config *config)
{
        char *save = NULL;

        config->peer_list = calloc(AE_CONFIG_PEERS_MAX, sizeof(char *));
        if (!config->peer_list)
                return ae_fail(AE_ENOMEM, "no memory for the peer list");
        for (char *p = strtok_r(config->peers, ", \t", &save); p;
             p = strtok_r(NULL, ", \t", &save)) {
                if (config->n_peers == AE_CONFIG_PEERS_MAX)
                        return ae_fail(AE_EINVAL, "peers: more than %d nodes", AE_CONFIG_PEERS_MAX);
                config->peer_list[config->n_peers++] = p;
        }
        if (config->n_peers == 0)
                config->peer_list[config->n_peers++] = (char *)(uintptr_t)"";
        if (config->node >= config->n_peers)
                return ae_fail(AE_EINVAL, "node %u is not among the %u peers", config->node,
                               config->n_peers);
        return 0;
}

static int derive(struct ae_config *config)
{
        uint64_t pages = (uint64_t)sysconf(_SC_PHYS_PAGES);
        uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
        long n_cpus = sysconf(_SC_NPROCESSORS_ONLN);

        if (config->memory == 0)
                config->memory = pages * page / 10 * 8;
        if (config->threads == 0)
                config->threads = n_cpus > 2 ? (uint32_t)n_cpus / 2 : 1;
        if (config->threads > 256)
                return ae_fail(AE_EINVAL, "threads: %u are more than 256", config->threads);
        if (strcmp(config->transport, "tcp") != 0 && strcmp(config->transport, "shm") != 0)
                return ae_fail(AE_EINVAL, "transport: '%s' is neither tcp nor shm",
                               config->transport);
        if (!config->dev)
                return ae_fail(
                        AE_EUNSUPPORTED,
                        "daemons do not authenticate each other yet: start with --dev, on one "
                        "machine");
        return split_peers(config);
}

int ae_config_read(struct ae_config *config, int argc, char **argv)
{
        bool check = false;
        int r = 0;

        *config = (struct ae_config){ 0 };
        for (size_t i = 0; i < AE_ARRAY_LEN(keys) && r == 0; i++)
                r = set_named(config, keys[i].name, keys[i].standard, "default");
        if (r == 0)
                r = read_first(config, argc, argv);
        if (r == 0)
                r = read_environment(config);
        if (r == 0)
                r = read_flags(config, argc, argv, &check);
        if (r == 0)
                r = derive(config);
        if (r == 0 && check) {
                printf("the settings are fine\n");
                return 1;
        }
        return r;
}

void ae_config_free(struct ae_config *config)
{
        free(config->peers);
        free(config->socket);
        free(config->transport);
        free(config->peer_list);
}
