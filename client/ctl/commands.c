/* SPDX-License-Identifier: Apache-2.0 */
/* The rows. What the daemon sends for each stands in SCHEMA.md. */
#include "client/ctl/commands.h"

#include "proto/base/num.h"

#include <string.h>

const struct ae_ctl_option ae_ctl_options[AE_CTL_N_OPTIONS] = {
#define OPTION_ROW(name, letter, word, argument, help) { letter, word, argument, help },
        AE_CTL_OPTION_TABLE(OPTION_ROW)
#undef OPTION_ROW
};

static const struct ae_ctl_column status_fields[] = {
        { "node", "node", AE_CTL_NUMBER, false },
        { "nodes", "n_nodes", AE_CTL_NUMBER, false },
        { "version", "version", AE_CTL_TEXT, false },
        { "transport", "transport", AE_CTL_TEXT, false },
        { "uptime", "uptime_s", AE_CTL_DURATION, false },
        { "health", "health", AE_CTL_STATE, false },
        { "why", "why", AE_CTL_TEXT, true },
        { "memory", "memory.used", AE_CTL_SIZE, false },
        { "tables", "memory.tables", AE_CTL_SIZE, false },
        { "limit", "memory.limit", AE_CTL_SIZE, true },
};

static const struct ae_ctl_column node_columns[] = {
        { "NODE", "id", AE_CTL_NUMBER, false },
        { "STATE", "state", AE_CTL_STATE, false },
        { "INCARNATION", "incarnation", AE_CTL_TEXT, false },
        { "ADDRESS", "address", AE_CTL_TEXT, false },
        { "TRANSPORT", "transport", AE_CTL_TEXT, false },
        { "SENT", "sent_len", AE_CTL_SIZE, false },
        { "RECEIVED", "received_len", AE_CTL_SIZE, false },
};

static const struct ae_ctl_column job_columns[] = {
        { "JOB", "name", AE_CTL_TEXT, false },
        { "STATE", "state", AE_CTL_STATE, false },
        { "EPOCH", "epoch", AE_CTL_NUMBER, false },
        { "ROUND", "round", AE_CTL_NUMBER, false },
        { "VERSION", "version", AE_CTL_NUMBER, false },
        { "WORLD", "world", AE_CTL_NUMBER, false },
        { "PRESENT", "ranks_present", AE_CTL_NUMBER, false },
        { "MEMORY", "memory_len", AE_CTL_SIZE, false },
        { "BUDGET", "budget_len", AE_CTL_SIZE, true },
        { "WAITING", "waiting", AE_CTL_TEXT, true },
        { "WHY", "why", AE_CTL_TEXT, true },
};

static const struct ae_ctl_column worker_columns[] = {
        { "RANK", "rank", AE_CTL_NUMBER, false },
        { "NODE", "node", AE_CTL_NUMBER, false },
        { "PID", "pid", AE_CTL_NUMBER, false },
        { "UID", "uid", AE_CTL_NUMBER, false },
        { "STATE", "state", AE_CTL_STATE, false },
        { "PAUSE", "pause_s", AE_CTL_DURATION, true },
        { "MICRO", "micro", AE_CTL_NUMBER, false },
        { "HELD", "held_len", AE_CTL_SIZE, false },
        { "ALLOWED", "hold_len", AE_CTL_SIZE, false },
        { "RING-USED", "ring_used", AE_CTL_SIZE, false },
        { "RING", "ring_len", AE_CTL_SIZE, false },
        { "WHY", "why", AE_CTL_TEXT, true },
};

static const struct ae_ctl_column unit_columns[] = {
        { "ID", "id", AE_CTL_NUMBER, false },
        { "UNIT", "name", AE_CTL_TEXT, false },
        { "VERSION", "version", AE_CTL_NUMBER, false },
        { "CACHED", "cached", AE_CTL_BOOL, false },
        { "SIZE", "len", AE_CTL_SIZE, false },
        { "SEGMENTS", "segments", AE_CTL_NUMBER, false },
        { "MISSES", "misses", AE_CTL_NUMBER, false },
};

static const struct ae_ctl_column tensor_columns[] = {
        { "ID", "id", AE_CTL_NUMBER, false },
        { "TENSOR", "name", AE_CTL_TEXT, false },
        { "UNIT", "unit", AE_CTL_TEXT, false },
        { "DTYPE", "dtype", AE_CTL_TEXT, false },
        { "CLASS", "class", AE_CTL_TEXT, false },
        { "SHAPE", "shape", AE_CTL_SHAPE, false },
        { "N", "n", AE_CTL_NUMBER, false },
        { "GROUP", "group", AE_CTL_NUMBER, false },
        { "FLAGS", "flags", AE_CTL_WORDS, true },
        { "ALIAS-OF", "alias_of", AE_CTL_TEXT, true },
};

static const struct ae_ctl_column shard_columns[] = {
        { "NODE", "node", AE_CTL_NUMBER, false },
        { "UNIT", "unit", AE_CTL_TEXT, false },
        { "SEGMENT", "segment", AE_CTL_NUMBER, false },
        { "DTYPE", "dtype", AE_CTL_TEXT, false },
        { "KIND", "kind", AE_CTL_TEXT, false },
        { "FIRST", "first", AE_CTL_NUMBER, false },
        { "N", "n", AE_CTL_NUMBER, false },
        { "FROM", "from", AE_CTL_SHAPE, true },
        { "TO", "to", AE_CTL_SHAPE, true },
        { "VERSION", "version", AE_CTL_NUMBER, false },
        { "WEIGHT", "weight_len", AE_CTL_SIZE, false },
        { "MASTER", "master_len", AE_CTL_SIZE, false },
        { "MOMENT1", "moment1_len", AE_CTL_SIZE, false },
        { "MOMENT2", "moment2_len", AE_CTL_SIZE, false },
        { "SUM", "sum_len", AE_CTL_SIZE, false },
};

static const struct ae_ctl_column expert_columns[] = {
        { "UNIT", "unit", AE_CTL_TEXT, false },
        { "TENSOR", "tensor", AE_CTL_TEXT, false },
        { "EXPERT", "expert", AE_CTL_NUMBER, false },
        { "RANKS", "ranks", AE_CTL_RANKS, false },
        { "TOKENS", "tokens", AE_CTL_NUMBER, false },
};

static const struct ae_ctl_column group_columns[] = {
        { "KIND", "kind", AE_CTL_TEXT, false },
        { "INDEX", "index", AE_CTL_NUMBER, false },
        { "RANKS", "ranks", AE_CTL_RANKS, false },
};

static const struct ae_ctl_column stat_columns[] = {
        { "NAME", "name", AE_CTL_TEXT, false },
        { "VALUE", "value", AE_CTL_VALUE, false },
        { "HELP", "help", AE_CTL_TEXT, false },
};

#define JOB (1u << AE_CTL_OPTION_JOB)
#define TENSOR (1u << AE_CTL_OPTION_TENSOR)
#define UNIT (1u << AE_CTL_OPTION_UNIT)

/* A command whose reply is one table. */
#define TABLE_ROW(word, words, takes, table)                                                      \
        { .name = word, .help = words, .options = takes, .schema = "autoep." word "/1",           \
          .rows = word, .columns = table, .n_columns = AE_ARRAY_LEN(table) }

const struct ae_ctl_command ae_ctl_commands[] = {
        { .name = "status", .help = "this daemon's health and its jobs", .options = JOB,
          .schema = "autoep.status/1",
          .fields = status_fields, .n_fields = AE_ARRAY_LEN(status_fields),
          .rows = "jobs", .columns = job_columns, .n_columns = AE_ARRAY_LEN(job_columns) },
        TABLE_ROW("nodes", "the daemons and what went between them and this one", 0, node_columns),
        TABLE_ROW("jobs", "the jobs, how far they are and what they wait for", JOB, job_columns),
        TABLE_ROW("workers", "the ranks of a job and what they hold", JOB, worker_columns),
        TABLE_ROW("units", "the units of a job and their copies in the cache", JOB | UNIT,
                  unit_columns),
        TABLE_ROW("tensors", "the registered tensors", JOB | UNIT | TENSOR, tensor_columns),
        TABLE_ROW("shards", "which node owns what; with --tensor, where each element is",
                  JOB | UNIT | TENSOR, shard_columns),
        TABLE_ROW("experts", "which ranks hold which expert, and its load", JOB | TENSOR,
                  expert_columns),
        TABLE_ROW("groups", "expert-parallel, expert-data-parallel and sum groups", JOB,
                  group_columns),
        TABLE_ROW("stats", "the daemon's counters", 0, stat_columns),
        { .name = "completion", .help = "print the completion script of a shell",
          .argument = "bash", .local = true },
        { .name = "help", .help = "print the help", .local = true },
        { .name = "version", .help = "print the version", .local = true },
};

const size_t ae_ctl_n_commands = AE_ARRAY_LEN(ae_ctl_commands);

const struct ae_ctl_command *ae_ctl_command_find(const char *name)
{
        for (size_t i = 0; i < ae_ctl_n_commands; i++) {
                if (strcmp(ae_ctl_commands[i].name, name) == 0)
                        return &ae_ctl_commands[i];
        }
        return NULL;
}
