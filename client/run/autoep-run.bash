# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Completion for autoep-run; its options are those that --help shows.
_autoep_run()
{
        local word=${COMP_WORDS[COMP_CWORD]} words='' i

        COMPREPLY=()
        # Behind the program everything is its own.
        for ((i = 1; i < COMP_CWORD; i++)); do
                case ${COMP_WORDS[i]} in
                --) return ;;
                --*=*) ;;
                --*) ((i++)) ;;
                *) return ;;
                esac
        done
        case ${COMP_WORDS[COMP_CWORD - 1]} in
        --transport) words='shm tcp' ;;
        --log-level) words='error warn info debug' ;;
        --keep-going) words='yes no' ;;
        --nodes | --workers | --job | --memory | --ready-timeout) return ;;
        *)
                [[ $word == -* ]] && words=$(autoep-run --help | grep -o -- '^  --[a-z-]*')
                ;;
        esac
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}
complete -o bashdefault -o default -F _autoep_run autoep-run
