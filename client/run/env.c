/* SPDX-License-Identifier: Apache-2.0 */
/* A growing array of "NAME=VALUE". */
#include "client/run/env.h"

#include "proto/base/cleanup.h"
#include "proto/base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NOT_FOUND ((size_t)-1)

static size_t find(const struct ae_run_env *env, const char *name)
{
        size_t len = strlen(name);

        for (size_t i = 0; i < env->n; i++) {
                if (strncmp(env->vars[i], name, len) == 0 && env->vars[i][len] == '=')
                        return i;
        }
        return NOT_FOUND;
}

/* Takes @var, also when it fails. */
static int append(struct ae_run_env *env, char *var)
{
        AE_CLEANUP(ae_cleanup_free) char *owned = var;
        size_t size = env->size ? 2 * env->size : 64;
        char **vars;

        if (var && env->n + 1 >= env->size) {
                vars = reallocarray(env->vars, size, sizeof(*vars));
                if (!vars)
                        return ae_fail(AE_ENOMEM, "no memory for an environment of %zu", size);
                env->vars = vars;
                env->size = size;
        }
        if (!var)
                return ae_fail(AE_ENOMEM, "no memory for the environment");
        env->vars[env->n++] = ae_steal(owned);
        env->vars[env->n] = NULL;
        return 0;
}

int ae_run_env_init(struct ae_run_env *env)
{
        int r;

        *env = (struct ae_run_env){ 0 };
        for (char **var = environ; *var; var++) {
                r = append(env, strdup(*var));
                if (r < 0) {
                        ae_run_env_deinit(env);
                        return r;
                }
        }
        return 0;
}

void ae_run_env_deinit(struct ae_run_env *env)
{
        for (size_t i = 0; i < env->n; i++)
                free(env->vars[i]);
        free(env->vars);
        *env = (struct ae_run_env){ 0 };
}

int ae_run_env_set(struct ae_run_env *env, const char *name, const char *format, ...)
{
        AE_CLEANUP(ae_cleanup_free) char *value = NULL;
        char *var = NULL;
        va_list args;
        int len;

        va_start(args, format);
        len = vasprintf(&value, format, args);
        va_end(args);
        if (len < 0)
                value = NULL;
        if (!value || asprintf(&var, "%s=%s", name, value) < 0)
                return ae_fail(AE_ENOMEM, "no memory for the environment");
        ae_run_env_unset(env, name);
        return append(env, var);
}

int ae_run_env_default(struct ae_run_env *env, const char *name, const char *value)
{
        return find(env, name) == NOT_FOUND ? ae_run_env_set(env, name, "%s", value) : 0;
}

void ae_run_env_unset(struct ae_run_env *env, const char *name)
{
        size_t i;

        while ((i = find(env, name)) != NOT_FOUND) {
                free(env->vars[i]);
                env->vars[i] = env->vars[--env->n];
                env->vars[env->n] = NULL;
        }
}

const char *ae_run_env_get(const struct ae_run_env *env, const char *name)
{
        size_t i = find(env, name);

        return i == NOT_FOUND ? NULL : env->vars[i] + strlen(name) + 1;
}
