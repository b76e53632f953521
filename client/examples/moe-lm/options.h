/* SPDX-License-Identifier: Apache-2.0 */
/* The command line. One table gives the fields, their defaults, parsing and --help. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*        option          field         kind    default   help                                    */
#define LM_OPTION_TABLE(X)                                                                        \
        X("steps",        steps,        COUNT,  "300",    "optimizer steps")                      \
        X("batch",        batch,        COUNT,  "4",      "sequences per rank and micro-batch")   \
        X("seq",          seq,          COUNT,  "128",    "tokens (bytes) of a sequence")         \
        X("accumulate",   accumulate,   COUNT,  "1",      "micro-batches of a step")              \
        X("layers",       layers,       COUNT,  "4",      "transformer layers")                   \
        X("dim",          dim,          COUNT,  "128",    "width of the model")                   \
        X("heads",        heads,        COUNT,  "4",      "attention heads")                      \
        X("experts",      experts,      COUNT,  "8",      "experts of a layer")                   \
        X("top-k",        top_k,        COUNT,  "2",      "experts that a token visits")          \
        X("expert-dim",   expert_dim,   COUNT,  "128",    "inner width of an expert")             \
        X("router",       router,       ROUTER, "softmax", "router scores: softmax or sigmoid")   \
        X("balance",      balance,      REAL,   "0.01",                                           \
          "rate of aux-loss-free balancing; 0: none")                                             \
        X("ep-size",      ep_size,      COUNT0, "0",                                              \
          "ranks that share the experts; 0: 2 where the world is even, else 1")                   \
        X("order",        order,        ORDER,  "ed",                                             \
          "ed: EP groups are consecutive ranks; de: EDP groups are")                              \
        X("optimizer",    optimizer,    RULE,   "adamw",  "adamw or sgd")                         \
        X("lr",           lr,           REAL,   "0.003",  "peak learning rate")                   \
        X("warmup",       warmup,       COUNT0, "20",                                             \
          "steps until it is reached; then a cosine to a tenth")                                  \
        X("weight-decay", weight_decay, REAL,   "0.1",    "of matrices")                          \
        X("max-norm",     max_norm,     REAL,   "1",      "gradients are clipped to; 0: never")   \
        X("weights",      weights,      DTYPE,  "bf16",   "matrices as gathered: bf16 or fp32")   \
        X("grads",        grads,        DTYPE,  "fp32",   "gradients as scattered: bf16 or fp32") \
        X("seed",         seed,         COUNT0, "1",      "of weights, data order and sample")    \
        X("tokens",       tokens,       FLAG,   "off",                                            \
          "divide gradients by the tokens of all ranks, not by micro-batches")                    \
        X("uneven",       uneven,       FLAG,   "off",                                            \
          "ranks' token counts differ, in turn one has none; implies --tokens")                   \
        X("reference",    reference,    FLAG,   "off",                                            \
          "train without autoep: one process plays all ranks")                                    \
        X("world",        world,        COUNT,  "4",      "with --reference: ranks to play")      \
        X("sum-group",    sum_group,    COUNT0, "0",                                              \
          "ranks whose gradients are added first; 0: those of a node")                            \
        X("check",        check,        FLAG,   "off",                                            \
          "compare with the reference in double for up to 6 steps, lr <= 0.001")                  \
        X("svg",          svg,          TEXT,   "",       "file to draw the loss curve in")       \
        X("trace",        trace,        TEXT,   "",                                               \
          "file for every loss in hexadecimal and hashes of the final weights")                   \
        X("sample",       sample,       COUNT0, "200",    "bytes of text to generate at the end") \
        X("quiet",        quiet,        FLAG,   "off",    "no progress, only the summary")        \
        X("help",         help,         FLAG,   "off",    "show this and exit")

#define LM_TYPE_COUNT uint32_t  /* at least 1 */
#define LM_TYPE_COUNT0 uint32_t
#define LM_TYPE_REAL double     /* not negative */
#define LM_TYPE_FLAG bool
#define LM_TYPE_TEXT const char *
#define LM_TYPE_DTYPE uint32_t  /* enum ae_dtype */
#define LM_TYPE_ORDER uint32_t  /* enum ae_group_order */
#define LM_TYPE_ROUTER bool     /* sigmoid */
#define LM_TYPE_RULE bool       /* sgd */

struct lm_options {
#define LM_OPTION_FIELD(name, field, kind, value, help) LM_TYPE_##kind field;
        LM_OPTION_TABLE(LM_OPTION_FIELD)
#undef LM_OPTION_FIELD
        const char *const *paths; /* borrowed from argv, or the default */
        size_t n_paths;
};

/*
 * Fills @options from defaults and @argv (whose order may change: paths come last). AE_EINVAL says
 * which argument is wrong and what is legal.
 */
int lm_options_parse(struct lm_options *options, int argc, char **argv);
/* Prints all options with their defaults to stdout. */
void lm_options_help(const char *program);
