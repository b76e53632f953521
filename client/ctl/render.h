/* SPDX-License-Identifier: Apache-2.0 */
/* A reply as text for people, and what it says about the cluster's health. */
#pragma once

#include "client/ctl/commands.h"

#include <jansson.h>
#include <stdio.h>

struct ae_ctl_style {
        bool headers;
        bool color;
};

/* Parses @text and checks that it answers @command. AE_EPROTO. The caller drops the reference. */
int ae_ctl_reply_parse(const struct ae_ctl_command *command, const char *text, json_t **ret_reply);

/* A row failed or lost, or a health that isn't ok. */
bool ae_ctl_reply_degraded(const struct ae_ctl_command *command, const json_t *reply);

/* AE_ENOMEM; errors of @out are left in it. */
int ae_ctl_render(const struct ae_ctl_command *command, const json_t *reply,
                  const struct ae_ctl_style *style, FILE *out);
