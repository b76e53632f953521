/* SPDX-License-Identifier: Apache-2.0 */
/* The command line, and what is printed when something is wrong. */
#include "client/ctl/ctl.h"

#include "client/ctl/ask.h"
#include "client/ctl/render.h"

#include "proto/base/cleanup.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <getopt.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEFAULT_SOCKET "/run/autoep/autoepd.sock"
#define DEFAULT_TIMEOUT_NS (10 * AE_NS_PER_S)
#define TIMEOUT_MAX_S 86400.0

struct line {
        struct ae_ctl_question question;
        const struct ae_ctl_command *command;
        const char *argument;  /* of a local command */
        unsigned given;        /* bits 1 << enum ae_ctl_option_id */
        bool json;
};

static enum ae_ctl_exit complain(FILE *err, enum ae_ctl_exit code, const char *try)
{
        fprintf(err, "autoep-ctl: %s\ntry: %s\n", ae_error_text(), try);
        return code;
}

static int parse_output(const char *word, bool *ret_json)
{
        if (strcmp(word, "json") != 0 && strcmp(word, "table") != 0)
                return ae_fail(AE_EINVAL, "unknown output '%s': use table or json", word);
        *ret_json = word[0] == 'j';
        return 0;
}

static int parse_timeout(const char *word, uint64_t *ret_ns)
{
        char *end;
        double seconds = strtod(word, &end);

        if (end == word || *end || !(seconds > 0 && seconds <= TIMEOUT_MAX_S))
                return ae_fail(AE_EINVAL, "timeout '%s' isn't a number of seconds from 0 to %.0f",
                               word, TIMEOUT_MAX_S);
        *ret_ns = (uint64_t)(seconds * (double)AE_NS_PER_S);
        return 0;
}

static int take_option(enum ae_ctl_option_id id, const char *argument, struct line *line)
{
        line->given |= 1u << id;
        switch (id) {
        case AE_CTL_OPTION_SOCKET:
                line->question.socket = argument;
                return 0;
        case AE_CTL_OPTION_JOB:
                line->question.job = argument;
                return 0;
        case AE_CTL_OPTION_TENSOR:
                line->question.tensor = argument;
                return 0;
        case AE_CTL_OPTION_UNIT:
                line->question.unit = argument;
                return 0;
        case AE_CTL_OPTION_OUTPUT:
                return parse_output(argument, &line->json);
        case AE_CTL_OPTION_TIMEOUT:
                return parse_timeout(argument, &line->question.timeout_ns);
        case AE_CTL_OPTION_NO_HEADERS:
        case AE_CTL_OPTION_HELP:
        case AE_CTL_OPTION_VERSION:
        case AE_CTL_N_OPTIONS:
                break;
        }
        return 0;
}

static int refuse_option(char **argv, int letter)
{
        for (int i = 0; i < AE_CTL_N_OPTIONS; i++) {
                if (letter == ':' && optopt == ae_ctl_options[i].letter)
                        return ae_fail(AE_EINVAL, "--%s needs a value: %s", ae_ctl_options[i].word,
                                       ae_ctl_options[i].argument);
                if (optopt == ae_ctl_options[i].letter)
                        return ae_fail(AE_EINVAL, "--%s takes no value", ae_ctl_options[i].word);
        }
        if (optopt)
                return ae_fail(AE_EINVAL, "unknown option '-%c'", optopt);
        return ae_fail(AE_EINVAL, "unknown option '%s'", argv[optind - 1]);
}

static int parse_options(int argc, char **argv, struct line *line)
{
        struct option longs[AE_CTL_N_OPTIONS + 1] = { 0 };
        char shorts[2 * AE_CTL_N_OPTIONS + 2] = ":";
        size_t n = 1;
        int letter, r;

        for (int i = 0; i < AE_CTL_N_OPTIONS; i++) {
                const struct ae_ctl_option *option = &ae_ctl_options[i];

                longs[i] = (struct option){ option->word, option->argument != NULL, NULL,
                                            option->letter };
                shorts[n++] = option->letter;
                if (option->argument)
                        shorts[n++] = ':';
        }
        optind = 0; /* glibc: start anew */
        opterr = 0;
        while ((letter = getopt_long(argc, argv, shorts, longs, NULL)) != -1) {
                enum ae_ctl_option_id id = 0;

                if (letter == '?' || letter == ':')
                        return refuse_option(argv, letter);
                while (ae_ctl_options[id].letter != letter)
                        id++;
                assert(id < AE_CTL_N_OPTIONS);
                r = take_option(id, optarg, line);
                if (r < 0)
                        return r;
        }
        return 0;
}

/* Options that say which rows are meant must be known to the command, or they'd be ignored. */
static int check_given(const struct line *line)
{
        static const enum ae_ctl_option_id filters[] = { AE_CTL_OPTION_JOB, AE_CTL_OPTION_TENSOR,
                                                      AE_CTL_OPTION_UNIT };

        for (size_t i = 0; i < AE_ARRAY_LEN(filters); i++) {
                unsigned bit = 1u << filters[i];

                if ((line->given & bit) && !(line->command->options & bit))
                        return ae_fail(AE_EINVAL, "'%s' takes no --%s", line->command->name,
                                       ae_ctl_options[filters[i]].word);
        }
        return 0;
}

static int parse_words(int argc, char **argv, struct line *line)
{
        int n = argc - optind;
        int n_max;

        if (line->given & (1u << AE_CTL_OPTION_HELP | 1u << AE_CTL_OPTION_VERSION)) {
                line->command = ae_ctl_command_find(
                        line->given & 1u << AE_CTL_OPTION_HELP ? "help" : "version");
                return 0;
        }
        if (n == 0)
                return ae_fail(AE_EINVAL, "no command given");
        line->command = ae_ctl_command_find(argv[optind]);
        if (!line->command)
                return ae_fail(AE_EINVAL, "unknown command '%s'", argv[optind]);
        n_max = line->command->argument ? 2 : 1;
        if (n > n_max)
                return ae_fail(AE_EINVAL, "'%s' takes no argument '%s'", line->command->name,
                               argv[optind + n_max]);
        line->argument = n == 2 ? argv[optind + 1] : NULL;
        return check_given(line);
}

static const char *socket_default(void)
{
        const char *path = getenv("AUTOEP_SOCKET");

        return path && *path ? path : DEFAULT_SOCKET;
}

static int parse(int argc, char **argv, struct line *ret_line)
{
        int r;

        *ret_line = (struct line){
                .question = { .socket = socket_default(), .job = "", .tensor = "", .unit = "",
                              .timeout_ns = DEFAULT_TIMEOUT_NS },
        };
        r = parse_options(argc, argv, ret_line);
        if (r < 0)
                return r;
        r = parse_words(argc, argv, ret_line);
        if (r < 0)
                return r;
        ret_line->question.command = ret_line->command->name;
        return 0;
}

void ae_ctl_help(FILE *out)
{
        fputs("usage: autoep-ctl [OPTIONS] COMMAND\n\nAsks the daemon of this node.\n\n"
              "commands:\n", out);
        for (size_t i = 0; i < ae_ctl_n_commands; i++) {
                const struct ae_ctl_command *command = &ae_ctl_commands[i];
                char name[32];

                (void)snprintf(name, sizeof(name), "%s %s", command->name,
                               command->argument ? command->argument : "");
                fprintf(out, "  %-16s %s\n", name, command->help);
        }
        fputs("\noptions:\n", out);
        for (size_t i = 0; i < AE_CTL_N_OPTIONS; i++) {
                const struct ae_ctl_option *option = &ae_ctl_options[i];
                char name[40];

                (void)snprintf(name, sizeof(name), "--%s%s%s", option->word,
                               option->argument ? " " : "",
                               option->argument ? option->argument : "");
                fprintf(out, "  -%c, %-20s %s\n", option->letter, name, option->help);
        }
        fputs("\nexit codes:\n", out);
#define EXIT_LINE(name, value, words) fprintf(out, "  %d  %s\n", value, words);
        AE_CTL_EXIT_TABLE(EXIT_LINE)
#undef EXIT_LINE
}

static enum ae_ctl_exit run_local(const struct line *line, FILE *out, FILE *err)
{
        if (strcmp(line->command->name, "help") == 0) {
                ae_ctl_help(out);
                return AE_CTL_EXIT_OK;
        }
        if (strcmp(line->command->name, "version") == 0) {
                fputs("autoep-ctl " AUTOEP_VERSION "\n", out);
                return AE_CTL_EXIT_OK;
        }
        assert(strcmp(line->command->name, "completion") == 0);
        if (!line->argument || strcmp(line->argument, "bash") != 0) {
                ae_fail(AE_EINVAL, "no completion for shell '%s'",
                        line->argument ? line->argument : "");
                return complain(err, AE_CTL_EXIT_USAGE, "autoep-ctl completion bash");
        }
        ae_ctl_completion_bash(out);
        return AE_CTL_EXIT_OK;
}

static const char *remedy(enum ae_ctl_exit code, int status)
{
        if (code == AE_CTL_EXIT_UNREACHABLE && status == AE_ETIMEDOUT)
                return "a longer --timeout, and look at the daemon's log";
        if (code == AE_CTL_EXIT_UNREACHABLE)
                return "start a daemon (autoepd --dev), or name its socket with --socket PATH or "
                       "AUTOEP_SOCKET";
        if (code == AE_CTL_EXIT_DENIED)
                return "run as the user of the job or of the daemon, or join the group autoep";
        if (status == AE_ENOENT)
                return "autoep-ctl jobs, tensors or units list what there is";
        if (status == AE_EVERSION || status == AE_EUNSUPPORTED || status == AE_EPROTO)
                return "use autoep-ctl and autoepd of the same version";
        return "autoep-ctl status shows the daemon's health, its log the cause";
}

static int print_reply(const struct line *line, const char *text, FILE *out, bool *ret_degraded)
{
        struct ae_ctl_style style = { .headers = !(line->given & 1u << AE_CTL_OPTION_NO_HEADERS) };
        const char *no_color = getenv("NO_COLOR");
        json_t *reply;
        size_t len = strlen(text);
        int r;

        r = ae_ctl_reply_parse(line->command, text, &reply);
        if (r < 0)
                return r;
        style.color = isatty(fileno(out)) && !(no_color && *no_color);
        *ret_degraded = ae_ctl_reply_degraded(line->command, reply);
        if (line->json)
                fprintf(out, "%s%s", text, len && text[len - 1] == '\n' ? "" : "\n");
        else
                r = ae_ctl_render(line->command, reply, &style, out);
        json_decref(reply);
        return r;
}

static enum ae_ctl_exit run_remote(const struct line *line, FILE *out, FILE *err)
{
        AE_CLEANUP(ae_cleanup_free) char *text = NULL;
        enum ae_ctl_exit code;
        bool degraded;
        int status;

        code = ae_ctl_ask(&line->question, &text, &status);
        if (code != AE_CTL_EXIT_OK)
                return complain(err, code, remedy(code, status));
        status = print_reply(line, text, out, &degraded);
        if (status < 0)
                return complain(err, AE_CTL_EXIT_FAILED, remedy(AE_CTL_EXIT_FAILED, status));
        return degraded ? AE_CTL_EXIT_DEGRADED : AE_CTL_EXIT_OK;
}

enum ae_ctl_exit ae_ctl_main(int argc, char **argv, FILE *out, FILE *err)
{
        struct line line;
        enum ae_ctl_exit code;

        if (parse(argc, argv, &line) < 0)
                return complain(err, AE_CTL_EXIT_USAGE, "autoep-ctl help");
        code = line.command->local ? run_local(&line, out, err) : run_remote(&line, out, err);
        if (fflush(out) != 0) {
                ae_fail_sys(errno, "cannot write the answer");
                return complain(err, AE_CTL_EXIT_FAILED, "look at what standard output goes to");
        }
        return code;
}
