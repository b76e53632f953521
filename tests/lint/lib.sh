# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# What the lint checks share. A check is called as `check-NAME ROOT [BUILD]`, looks at the tree
# under ROOT, calls complain() for each finding and ends with finish().

root=${1:?usage: $0 ROOT [BUILD]}
# shellcheck disable=SC2034 # the checks use it
build=${2-}
findings=0
cd "$root" || exit 99

# The project's files, one a line: what git tracks or would track, or everything outside build/.
list_files()
{
        if [[ -e .git ]] && git ls-files >/dev/null 2>&1; then
                git ls-files --cached --others --exclude-standard
        else
                find . -path ./build -prune -o -path ./.git -prune -o -type f -printf '%P\n'
        fi | LC_ALL=C sort -u | while IFS= read -r file; do
                [[ -f $file ]] && printf '%s\n' "$file"
        done
}

# list_matching REGEX: those whose path matches.
list_matching()
{
        list_files | grep -E "$1" || true
}

# Whether a header is the body of code that others include under macros of theirs, and no interface:
# it is called *-body.h or has neither #pragma once nor a guard.
is_body()
{
        [[ $1 == *-body.h ]] || ! grep -qE '^#(pragma once|ifndef .*_H)$' "$1"
}

# complain TEXT: one finding, as file:line: what is wrong.
complain()
{
        echo "$*"
        findings=$((findings + 1))
}

# complain_each: every line of the input is a finding.
complain_each()
{
        local line

        while IFS= read -r line; do
                complain "$line"
        done
}

skip()
{
        echo "skipped: $*"
        exit 77
}

need_tool()
{
        command -v "$1" >/dev/null || skip "$1 is not installed"
}

finish()
{
        ((findings == 0)) || {
                echo "$findings findings"
                exit 1
        }
        exit 0
}
