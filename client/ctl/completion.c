/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The completion script for bash. After --tensor, --unit and --job it asks the daemon that the
 * command line names; a daemon that doesn't answer gives no words and no noise. compgen -W expands
 * its words, so only names without characters that mean something to a shell are offered.
 */
#include "client/ctl/ctl.h"

#include <string.h>

static void put_words(FILE *out)
{
        fputs("        local commands='", out);
        for (size_t i = 0; i < ae_ctl_n_commands; i++)
                fprintf(out, "%s%s", i ? " " : "", ae_ctl_commands[i].name);
        fputs("'\n        local options='", out);
        for (size_t i = 0; i < AE_CTL_N_OPTIONS; i++)
                fprintf(out, "%s--%s", i ? " " : "", ae_ctl_options[i].word);
        fputs("'\n", out);
}

/* The words after an option: its alternatives, the daemon's names, files, or nothing. */
static void put_option_case(FILE *out, const struct ae_ctl_option *option, const char *command,
                            unsigned column)
{
        fprintf(out, "        -%c | --%s)\n", option->letter, option->word);
        if (command)
                fprintf(out, "                words=$(_autoep_ctl_ask %s %u)\n", command, column);
        else if (strchr(option->argument, '|'))
                fprintf(out, "                words='table json'\n");
        else if (strcmp(option->argument, "PATH") == 0)
                fputs("                mapfile -t COMPREPLY < <(compgen -f -- \"$word\")\n"
                      "                return\n", out);
        fputs("                ;;\n", out);
}

static void put_cases(FILE *out)
{
        static const struct {
                const char *command; /* whose table has the names */
                unsigned column;     /* from 1, as awk counts */
        } sources[AE_CTL_N_OPTIONS] = {
                [AE_CTL_OPTION_JOB] = { "jobs", 1 },
                [AE_CTL_OPTION_TENSOR] = { "tensors", 2 },
                [AE_CTL_OPTION_UNIT] = { "units", 2 },
        };

        for (size_t i = 0; i < AE_CTL_N_OPTIONS; i++) {
                if (ae_ctl_options[i].argument)
                        put_option_case(out, &ae_ctl_options[i], sources[i].command,
                                        sources[i].column);
        }
        for (size_t i = 0; i < ae_ctl_n_commands; i++) {
                if (ae_ctl_commands[i].argument)
                        fprintf(out,
                                "        %s)\n                words='%s'\n                ;;\n",
                                ae_ctl_commands[i].name, ae_ctl_commands[i].argument);
        }
}

void ae_ctl_completion_bash(FILE *out)
{
        fputs("# bash completion for autoep-ctl; made by 'autoep-ctl completion bash'\n"
              "_autoep_ctl_ask()\n"
              "{\n"
              "        local socket=() i\n"
              "\n"
              "        for ((i = 1; i + 1 < COMP_CWORD; i++)); do\n"
              "                case ${COMP_WORDS[i]} in\n"
              "                -s | --socket) socket=(--socket \"${COMP_WORDS[i + 1]}\") ;;\n"
              "                esac\n"
              "        done\n"
              "        autoep-ctl \"${socket[@]}\" --timeout 1 --no-headers \"$1\" 2>/dev/null |\n"
              "                awk -v n=\"$2\" '$n ~ /^[A-Za-z0-9._:\\/+-]+$/ { print $n }'\n"
              "}\n"
              "\n"
              "_autoep_ctl()\n"
              "{\n", out);
        put_words(out);
        fputs("        local word=${COMP_WORDS[COMP_CWORD]} words=''\n"
              "\n"
              "        COMPREPLY=()\n"
              "        case ${COMP_WORDS[COMP_CWORD - 1]} in\n", out);
        put_cases(out);
        fputs("        *)\n"
              "                words=$commands\n"
              "                [[ $word == -* ]] && words=$options\n"
              "                ;;\n"
              "        esac\n"
              "        mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$word\")\n"
              "}\n"
              "complete -F _autoep_ctl autoep-ctl\n", out);
}
