/* SPDX-License-Identifier: Apache-2.0 */
/* The environment of a child: the launcher's own with changes. One owner. */
#pragma once

#include <stddef.h>

struct ae_run_env {
        char **vars;  /* owned, NULL-terminated, as execve() wants it */
        size_t n;
        size_t size;
};

/* Copies environ. AE_ENOMEM. */
int ae_run_env_init(struct ae_run_env *env);
void ae_run_env_deinit(struct ae_run_env *env);
/* Sets or replaces @name. AE_ENOMEM. */
int ae_run_env_set(struct ae_run_env *env, const char *name, const char *format, ...)
        __attribute__((format(printf, 3, 4)));
/* Sets @name unless it is there. AE_ENOMEM. */
int ae_run_env_default(struct ae_run_env *env, const char *name, const char *value);
void ae_run_env_unset(struct ae_run_env *env, const char *name);
/* NULL when it isn't there. */
const char *ae_run_env_get(const struct ae_run_env *env, const char *name);
