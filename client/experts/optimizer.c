/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The expert optimizer: registration, the round (accumulate, reduce, step) and access to its state.
 * Gradients of all trainable tensors lie in one arena, so that a round is one all-reduce in pieces.
 * Owned by the rank's training thread.
 */
#include "client/experts/optimizer-impl.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ARENA_ALIGN 16 /* elements: a cache line of floats */
#define N_BAD_LEN 1    /* elements behind the gradients: how many replicas report a bad one */

struct rule {
        uint32_t n_moments;
        void (*step)(struct ae_expert_opt *opt, struct ae_expert_slot *slot,
                     const struct ae_hyper *hyper, double grad_scale);
};

static void step_adamw(struct ae_expert_opt *opt, struct ae_expert_slot *slot,
                       const struct ae_hyper *hyper, double grad_scale)
{
        const size_t at = slot->first;
        struct ae_adamw scalars;

        ae_adamw_scalars(hyper, slot->step, grad_scale, &scalars);
        ae_ops()->adamw(&scalars, opt->master + at, opt->moment[0] + at, opt->moment[1] + at,
                        opt->grad + at, slot->spec.weight, slot->spec.dtype, slot->spec.n);
}

static void step_sgd(struct ae_expert_opt *opt, struct ae_expert_slot *slot,
                     const struct ae_hyper *hyper, double grad_scale)
{
        const size_t at = slot->first;
        struct ae_sgd scalars;

        ae_sgd_scalars(hyper, grad_scale, &scalars);
        ae_ops()->sgd(&scalars, opt->master + at, opt->moment[0] + at, opt->grad + at,
                      slot->spec.weight, slot->spec.dtype, slot->spec.n);
}

static const struct rule rules[] = {
        [AE_EXPERT_ADAMW] = { .n_moments = 2, .step = step_adamw },
        [AE_EXPERT_SGD] = { .n_moments = 1, .step = step_sgd },
};

/* Bit p of moves[q]: phase q may become p. */
static const uint8_t moves[AE_EXPERT_N_PHASES] = {
        [AE_EXPERT_OPEN] = 1 << AE_EXPERT_ACCUMULATING,
        [AE_EXPERT_ACCUMULATING] = 1 << AE_EXPERT_ACCUMULATING | 1 << AE_EXPERT_REDUCED |
                                   1 << AE_EXPERT_TORN,
        [AE_EXPERT_REDUCED] = 1 << AE_EXPERT_ACCUMULATING,
        [AE_EXPERT_TORN] = 1 << AE_EXPERT_ACCUMULATING,
};

static void phase_move(struct ae_expert_opt *opt, enum ae_expert_opt_phase to)
{
        assert(moves[opt->phase] & 1 << to);
        opt->phase = to;
}

int ae_expert_opt_new(const struct ae_expert_opt_config *config, struct ae_expert_opt **ret_opt)
{
        struct ae_expert_opt *opt;

        if ((unsigned)config->rule >= AE_ARRAY_LEN(rules))
                return ae_fail(AE_EINVAL, "cannot make an expert optimizer: there is no rule %u",
                               (unsigned)config->rule);
        if (config->n_groups == 0)
                return ae_fail(AE_EINVAL, "cannot make an expert optimizer without groups");
        opt = calloc(1, sizeof(*opt));
        if (!opt)
                return ae_fail_sys(ENOMEM, "cannot make an expert optimizer");
        opt->config = *config;
        *ret_opt = opt;
        return 0;
}

struct ae_expert_opt *ae_expert_opt_free(struct ae_expert_opt *opt)
{
        if (!opt)
                return NULL;
        for (uint32_t i = 0; i < opt->n_slots; i++)
                free((char *)opt->slots[i].spec.name);
        for (size_t m = 0; m < AE_EXPERT_MOMENTS_MAX; m++)
                free(opt->moment[m]);
        free(opt->slots);
        free(opt->master);
        free(opt->grad);
        free(opt->reduced);
        free(opt);
        return NULL;
}

static int check_tensor(const struct ae_expert_opt *opt, const struct ae_expert_tensor *tensor)
{
        if (!tensor->name || !tensor->name[0])
                return ae_fail(AE_EINVAL, "cannot add tensor %u of expert %u: it has no name",
                               opt->n_slots, tensor->expert);
        if (opt->phase != AE_EXPERT_OPEN)
                return ae_fail(AE_ESTATE, "cannot add %s: the expert optimizer is sealed",
                               tensor->name);
        if (opt->n_slots == AE_EXPERT_TENSORS_MAX)
                return ae_fail(AE_EOVERFLOW, "cannot add %s: there are %u expert tensors already",
                               tensor->name, opt->n_slots);
        if (tensor->dtype != AE_DTYPE_F32 && tensor->dtype != AE_DTYPE_BF16)
                return ae_fail(AE_EINVAL, "cannot add %s: its type is %s, and must be fp32 or bf16",
                               tensor->name, ae_dtype_text(tensor->dtype));
        if (tensor->group >= opt->config.n_groups)
                return ae_fail(AE_EINVAL, "cannot add %s: optimizer group %u of %u", tensor->name,
                               tensor->group, opt->config.n_groups);
        if (tensor->n == 0 || !tensor->weight)
                return ae_fail(AE_EINVAL, "cannot add %s: it has no elements", tensor->name);
        if (tensor->n > SIZE_MAX / 2 / sizeof(float) - opt->n_arena)
                return ae_fail(AE_EOVERFLOW, "cannot add %s: %zu elements are too many",
                               tensor->name, tensor->n);
        return 0;
}

static int grow_slots(struct ae_expert_opt *opt)
{
        const uint32_t room = AE_MAX(2 * opt->room, 64u);
        struct ae_expert_slot *slots;

        if (opt->n_slots < opt->room)
                return 0;
        slots = reallocarray(opt->slots, room, sizeof(*slots));
        if (!slots)
                return ae_fail_sys(ENOMEM, "cannot make room for %u expert tensors", room);
        opt->slots = slots;
        opt->room = room;
        return 0;
}

int ae_expert_opt_add(struct ae_expert_opt *opt, const struct ae_expert_tensor *tensor,
                      uint32_t *ret_index)
{
        struct ae_expert_slot slot = { .spec = *tensor };
        int r = check_tensor(opt, tensor);

        if (r < 0)
                return r;
        r = grow_slots(opt);
        if (r < 0)
                return r;
        slot.spec.name = strdup(tensor->name);
        if (!slot.spec.name)
                return ae_fail_sys(ENOMEM, "cannot add %s", tensor->name);
        if (!tensor->frozen) {
                slot.first = opt->n_arena;
                opt->n_arena += ae_align_up(tensor->n, ARENA_ALIGN);
        }
        opt->slots[opt->n_slots] = slot;
        *ret_index = opt->n_slots++;
        return 0;
}

static int compare_names(const void *a, const void *b)
{
        return strcmp(*(char *const *)a, *(char *const *)b);
}

static int check_names(const struct ae_expert_opt *opt)
{
        AE_CLEANUP(ae_cleanup_free) const char **names = NULL;

        names = calloc((size_t)opt->n_slots + 1, sizeof(*names));
        if (!names)
                return ae_fail_sys(ENOMEM, "cannot seal %u expert tensors", opt->n_slots);
        for (uint32_t i = 0; i < opt->n_slots; i++)
                names[i] = opt->slots[i].spec.name;
        qsort(names, opt->n_slots, sizeof(*names), compare_names);
        for (uint32_t i = 1; i < opt->n_slots; i++) {
                if (strcmp(names[i - 1], names[i]) == 0)
                        return ae_fail(AE_EEXIST, "cannot seal: expert tensor %s was added twice",
                                       names[i]);
        }
        return 0;
}

/* A zeroed arena, its pages touched; there is always one line, so that none is NULL. */
static int make_arena(const struct ae_expert_opt *opt, float **ret_arena)
{
        const size_t len = ae_align_up(opt->n_arena + N_BAD_LEN, ARENA_ALIGN) * sizeof(float);
        void *arena = NULL;

        if (posix_memalign(&arena, ARENA_ALIGN * sizeof(float), len) != 0)
                return ae_fail_sys(ENOMEM, "cannot allocate %zu bytes of expert optimizer state",
                                   len);
        memset(arena, 0, len);
        *ret_arena = arena;
        return 0;
}

static int make_arenas(struct ae_expert_opt *opt)
{
        int r = make_arena(opt, &opt->master);

        if (r < 0)
                return r;
        r = make_arena(opt, &opt->grad);
        if (r < 0)
                return r;
        for (uint32_t m = 0; m < rules[opt->config.rule].n_moments; m++) {
                r = make_arena(opt, &opt->moment[m]);
                if (r < 0)
                        return r;
        }
        return opt->config.keep_reduced ? make_arena(opt, &opt->reduced) : 0;
}

static void take_masters(struct ae_expert_opt *opt)
{
        for (uint32_t i = 0; i < opt->n_slots; i++) {
                const struct ae_expert_tensor *spec = &opt->slots[i].spec;
                float *master = opt->master + opt->slots[i].first;

                if (spec->frozen)
                        continue;
                if (spec->dtype == AE_DTYPE_BF16)
                        ae_ops()->bf16_to_f32(master, spec->weight, spec->n);
                else
                        memcpy(master, spec->weight, spec->n * sizeof(float));
        }
}

int ae_expert_opt_seal(struct ae_expert_opt *opt, struct ae_comm *edp, uint64_t deadline_ns)
{
        int r;

        if (opt->phase != AE_EXPERT_OPEN || opt->master)
                return ae_fail(AE_ESTATE, "cannot seal an expert optimizer twice");
        r = check_names(opt);
        if (r < 0)
                return r;
        r = make_arenas(opt);
        if (r < 0)
                return r;
        take_masters(opt);
        r = ae_expert_check_group(opt, AE_EXPERT_CHECK_RECORD, edp, deadline_ns);
        if (r < 0)
                return r;
        r = ae_expert_check_group(opt, AE_EXPERT_CHECK_WEIGHT, edp, deadline_ns);
        if (r < 0)
                return r;
        phase_move(opt, AE_EXPERT_ACCUMULATING);
        return 0;
}

uint32_t ae_expert_opt_count(const struct ae_expert_opt *opt)
{
        return opt->n_slots;
}

float *ae_expert_opt_grad(struct ae_expert_opt *opt, uint32_t index)
{
        assert(index < opt->n_slots);
        if (opt->phase == AE_EXPERT_OPEN || opt->slots[index].spec.frozen)
                return NULL;
        return opt->grad + opt->slots[index].first;
}

static void report_bad(const struct ae_expert_opt *opt, uint32_t index, size_t element,
                       const char *where, struct ae_expert_report *report)
{
        const struct ae_expert_slot *slot = &opt->slots[index];

        report->nonfinite = true;
        report->tensor = index;
        report->element = element;
        (void)snprintf(report->text, sizeof(report->text), /* a cut text is still a text */
                       "the gradient of %s (layer %u, expert %u) is %g at element %zu %s",
                       slot->spec.name, slot->spec.layer, slot->spec.expert,
                       (double)opt->grad[slot->first + element], element, where);
}

/* Reports the first value in the gradients that is not finite, unless there is a report. */
static void find_bad(const struct ae_expert_opt *opt, const char *where,
                     struct ae_expert_report *report)
{
        for (uint32_t i = 0; i < opt->n_slots && !report->nonfinite; i++) {
                const struct ae_expert_slot *slot = &opt->slots[i];
                size_t element;

                if (slot->spec.frozen ||
                    ae_ops()->finite_f32(opt->grad + slot->first, slot->spec.n, &element))
                        continue;
                report_bad(opt, i, element, where, report);
        }
}

/* Tensor by tensor; the gap to the next one takes no part. False: one of them is not finite. */
static bool sum_norm2(const struct ae_expert_opt *opt, struct ae_longacc *sum)
{
        bool finite = true;

        for (uint32_t i = 0; i < opt->n_slots; i++) {
                const struct ae_expert_slot *slot = &opt->slots[i];

                if (!slot->spec.frozen)
                        finite &= ae_ops()->norm2(opt->grad + slot->first, slot->spec.n, sum);
        }
        return finite;
}

int ae_expert_opt_reduce(struct ae_expert_opt *opt, struct ae_comm *edp, uint64_t deadline_ns,
                         struct ae_expert_report *ret_report)
{
        struct ae_expert_report report = { 0 };
        float *n_bad = opt->grad + opt->n_arena; /* added up too: replicas that report */
        int r;

        if (opt->phase != AE_EXPERT_ACCUMULATING)
                return ae_fail(AE_ESTATE, "cannot reduce expert gradients: the optimizer is not "
                                          "sealed, or this round was reduced already");
        find_bad(opt, "on this rank", &report);
        *n_bad = report.nonfinite;
        r = ae_comm_allreduce_sum_f32(edp, opt->grad, opt->n_arena + N_BAD_LEN, deadline_ns);
        if (r < 0) {
                phase_move(opt, AE_EXPERT_TORN);
                return r;
        }
        phase_move(opt, AE_EXPERT_REDUCED);
        /* Finite parts may have an infinite sum; otherwise the replica that has the value tells. */
        if (edp->position == 0 && !sum_norm2(opt, &report.norm2) && *n_bad == 0)
                find_bad(opt, "in the sum over replicas", &report);
        opt->bad = report.nonfinite || *n_bad > 0;
        if (opt->reduced) {
                memcpy(opt->reduced, opt->grad, opt->n_arena * sizeof(float));
                opt->has_reduced = true;
        }
        *ret_report = report;
        return 0;
}

static int check_verdict(const struct ae_expert_opt *opt, const struct ae_expert_verdict *verdict)
{
        if (opt->phase == AE_EXPERT_OPEN)
                return ae_fail(AE_ESTATE, "cannot step: the expert optimizer is not sealed");
        if (!verdict->applied)
                return 0;
        if (opt->phase != AE_EXPERT_REDUCED)
                return ae_fail(AE_ESTATE, "cannot apply a step: expert gradients are not reduced");
        if (opt->bad)
                return ae_fail(AE_ESTATE, "cannot apply a step: this rank or a replica reported an "
                                          "expert gradient that is not finite");
        if (verdict->n_groups != opt->config.n_groups)
                return ae_fail(AE_EINVAL, "cannot apply a step with %u optimizer groups: the "
                                          "experts have %u",
                               verdict->n_groups, opt->config.n_groups);
        return 0;
}

int ae_expert_opt_step(struct ae_expert_opt *opt, const struct ae_expert_verdict *verdict)
{
        int r = check_verdict(opt, verdict);

        if (r < 0)
                return r;
        for (uint32_t i = 0; verdict->applied && i < opt->n_slots; i++) {
                struct ae_expert_slot *slot = &opt->slots[i];
                const struct ae_expert_group_step *group = &verdict->groups[slot->spec.group];

                if (slot->spec.frozen || group->idle)
                        continue;
                slot->step++;
                rules[opt->config.rule].step(opt, slot, &group->hyper, verdict->grad_scale);
        }
        memset(opt->grad, 0, opt->n_arena * sizeof(float));
        opt->bad = false;
        phase_move(opt, AE_EXPERT_ACCUMULATING);
        return 0;
}

static int check_access(const struct ae_expert_opt *opt, uint32_t index)
{
        if (index >= opt->n_slots)
                return ae_fail(AE_EINVAL, "there is no expert tensor %u of %u", index,
                               opt->n_slots);
        if (opt->phase == AE_EXPERT_OPEN)
                return ae_fail(AE_ESTATE, "%s has no state before the expert optimizer is sealed",
                               opt->slots[index].spec.name);
        if (opt->slots[index].spec.frozen)
                return ae_fail(AE_EINVAL, "%s is frozen and has no optimizer state",
                               opt->slots[index].spec.name);
        return 0;
}

int ae_expert_opt_state(const struct ae_expert_opt *opt, uint32_t index,
                        struct ae_expert_state *ret_state)
{
        const struct ae_expert_slot *slot;
        int r = check_access(opt, index);

        if (r < 0)
                return r;
        slot = &opt->slots[index];
        *ret_state = (struct ae_expert_state){
                .name = slot->spec.name,
                .layer = slot->spec.layer,
                .expert = slot->spec.expert,
                .rule = opt->config.rule,
                .master = opt->master + slot->first,
                .reduced = opt->has_reduced ? opt->reduced + slot->first : NULL,
                .step = slot->step,
                .n = slot->spec.n,
        };
        for (size_t m = 0; m < AE_EXPERT_MOMENTS_MAX; m++)
                ret_state->moment[m] = opt->moment[m] ? opt->moment[m] + slot->first : NULL;
        return 0;
}

static int check_state(const struct ae_expert_opt *opt, const struct ae_expert_tensor *spec,
                       const struct ae_expert_state *state)
{
        if (!state->name || strcmp(state->name, spec->name) != 0 || state->layer != spec->layer ||
            state->expert != spec->expert)
                return ae_fail(AE_EINVAL,
                               "cannot set %s (layer %u, expert %u) from the state of %s (layer "
                               "%u, expert %u)",
                               spec->name, spec->layer, spec->expert,
                               state->name ? state->name : "a tensor without a name", state->layer,
                               state->expert);
        if (state->rule != opt->config.rule)
                return ae_fail(AE_EINVAL, "cannot set %s: its state is of another rule",
                               spec->name);
        if (state->n != spec->n)
                return ae_fail(AE_EINVAL, "cannot set %s: it has %zu elements, not %zu",
                               spec->name, spec->n, state->n);
        return 0;
}

/* Masters are memmoved: a state may be put back where it was taken from. */
int ae_expert_opt_put(struct ae_expert_opt *opt, uint32_t index,
                      const struct ae_expert_state *state)
{
        struct ae_expert_slot *slot;
        float *master;
        size_t len;
        int r = check_access(opt, index);

        if (r < 0)
                return r;
        slot = &opt->slots[index];
        if (opt->phase != AE_EXPERT_ACCUMULATING)
                return ae_fail(AE_ESTATE, "cannot set %s in the middle of a round",
                               slot->spec.name);
        r = check_state(opt, &slot->spec, state);
        if (r < 0)
                return r;
        len = state->n * sizeof(float);
        master = opt->master + slot->first;
        memmove(master, state->master, len);
        for (size_t m = 0; m < AE_EXPERT_MOMENTS_MAX; m++) {
                if (opt->moment[m] && state->moment[m])
                        memmove(opt->moment[m] + slot->first, state->moment[m], len);
        }
        slot->step = state->step;
        if (slot->spec.dtype == AE_DTYPE_BF16)
                ae_ops()->f32_to_bf16(slot->spec.weight, master, state->n);
        else
                memcpy(slot->spec.weight, master, len);
        return 0;
}
