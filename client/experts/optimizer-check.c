/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whether the replicas of an EDP group are the same: a digest per tensor, one over those, and a
 * second exchange only when that differs, to name the tensor. All ranks see the same digests, so
 * all take the same way and give the same answer.
 */
#include "client/experts/optimizer-impl.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

/* What ranks exchange first. */
struct summary {
        uint64_t n_tensors;
        struct ae_expert_checksum checksum;
};

static struct ae_expert_checksum from_xxh(XXH128_hash_t hash)
{
        return (struct ae_expert_checksum){ .lo = hash.low64, .hi = hash.high64 };
}

static bool same(const struct ae_expert_checksum *a, const struct ae_expert_checksum *b)
{
        return a->lo == b->lo && a->hi == b->hi;
}

static void hash_record(XXH3_state_t *hash, const struct ae_expert_tensor *spec)
{
        const uint64_t fields[] = { spec->layer, spec->expert, spec->dtype, spec->group,
                                    spec->frozen, spec->n };

        (void)XXH3_128bits_update(hash, spec->name, strlen(spec->name) + 1);
        (void)XXH3_128bits_update(hash, fields, sizeof(fields));
}

static void hash_state(XXH3_state_t *hash, const struct ae_expert_opt *opt,
                       const struct ae_expert_slot *slot)
{
        const size_t len = slot->spec.n * sizeof(float);

        if (slot->spec.frozen)
                return;
        (void)XXH3_128bits_update(hash, &slot->step, sizeof(slot->step));
        (void)XXH3_128bits_update(hash, opt->master + slot->first, len);
        for (size_t m = 0; m < AE_EXPERT_MOMENTS_MAX; m++) {
                if (opt->moment[m])
                        (void)XXH3_128bits_update(hash, opt->moment[m] + slot->first, len);
        }
}

/* A digest per tensor; the caller frees them. Not NULL when there is no tensor. */
static int make_digests(const struct ae_expert_opt *opt, uint32_t what,
                        struct ae_expert_checksum **ret_digests)
{
        struct ae_expert_checksum *digests = calloc((size_t)opt->n_slots + 1, sizeof(*digests));
        XXH3_state_t *hash = XXH3_createState();

        if (!digests || !hash) {
                free(digests);
                XXH3_freeState(hash);
                return ae_fail_sys(ENOMEM, "cannot checksum %u expert tensors", opt->n_slots);
        }
        for (uint32_t i = 0; i < opt->n_slots; i++) {
                const struct ae_expert_slot *slot = &opt->slots[i];

                (void)XXH3_128bits_reset(hash);
                if (what & AE_EXPERT_CHECK_RECORD)
                        hash_record(hash, &slot->spec);
                if (what & AE_EXPERT_CHECK_WEIGHT)
                        (void)XXH3_128bits_update(hash, slot->spec.weight,
                                                  slot->spec.n * ae_dtype_size(slot->spec.dtype));
                if (what & AE_EXPERT_CHECK_STATE)
                        hash_state(hash, opt, slot);
                digests[i] = from_xxh(XXH3_128bits_digest(hash));
        }
        XXH3_freeState(hash);
        *ret_digests = digests;
        return 0;
}

static struct ae_expert_checksum sum_digests(const struct ae_expert_checksum *digests, size_t n)
{
        return from_xxh(XXH3_128bits(digests, n * sizeof(*digests)));
}

int ae_expert_opt_checksum(const struct ae_expert_opt *opt, bool with_state,
                           struct ae_expert_checksum *ret_checksum)
{
        AE_CLEANUP(ae_cleanup_free) struct ae_expert_checksum *digests = NULL;
        int r;

        if (opt->phase == AE_EXPERT_OPEN)
                return ae_fail(AE_ESTATE, "cannot checksum experts before they are sealed");
        r = make_digests(opt,
                         AE_EXPERT_CHECK_RECORD | AE_EXPERT_CHECK_WEIGHT |
                                 (with_state ? AE_EXPERT_CHECK_STATE : 0),
                         &digests);
        if (r < 0)
                return r;
        *ret_checksum = sum_digests(digests, opt->n_slots);
        return 0;
}

static const char *words_of(uint32_t what)
{
        if (what & AE_EXPERT_CHECK_STATE)
                return "weight or optimizer state";
        return what & AE_EXPERT_CHECK_WEIGHT ? "weight"
                                             : "name, layer, expert, type, group, flags or size";
}

/* Names the first tensor that differs; @all holds every rank's digests. */
static int name_difference(const struct ae_expert_opt *opt, uint32_t what,
                           const struct ae_comm *edp, const struct ae_expert_checksum *all)
{
        for (uint32_t p = 1; p < edp->size; p++) {
                for (uint32_t i = 0; i < opt->n_slots; i++) {
                        const struct ae_expert_tensor *spec = &opt->slots[i].spec;

                        if (!same(&all[i], &all[(size_t)p * opt->n_slots + i]))
                                return ae_fail(AE_EMISMATCH,
                                               "replicas differ: rank %u has another %s for expert "
                                               "tensor %u than rank %u; here that is %s (layer %u, "
                                               "expert %u)",
                                               edp->ranks[p], words_of(what), i, edp->ranks[0],
                                               spec->name, spec->layer, spec->expert);
                }
        }
        return ae_fail(AE_EPROTO, "replicas differ in their checksums but in no expert tensor");
}

static int find_difference(const struct ae_expert_opt *opt, uint32_t what, struct ae_comm *edp,
                           const struct ae_expert_checksum *digests, uint64_t deadline_ns)
{
        const size_t n = opt->n_slots;
        AE_CLEANUP(ae_cleanup_free) struct ae_expert_checksum *all = NULL;
        int r;

        all = calloc(n * edp->size, sizeof(*all));
        if (!all)
                return ae_fail_sys(ENOMEM, "cannot compare %zu expert tensors of %u ranks", n,
                                   edp->size);
        r = ae_comm_allgather(edp, digests, n * sizeof(*digests), all, deadline_ns);
        if (r < 0)
                return r;
        return name_difference(opt, what, edp, all);
}

/* Whether the summaries agree (0) or only the digests differ (1); a different count is an error. */
static int compare_summaries(const struct ae_comm *edp, const struct summary *all)
{
        int differ = 0;

        for (uint32_t p = 1; p < edp->size; p++) {
                if (all[p].n_tensors != all[0].n_tensors)
                        return ae_fail(AE_EMISMATCH,
                                       "replicas differ: rank %u registered %" PRIu64
                                       " expert tensors and rank %u %" PRIu64,
                                       edp->ranks[p], all[p].n_tensors, edp->ranks[0],
                                       all[0].n_tensors);
                if (!same(&all[p].checksum, &all[0].checksum))
                        differ = 1;
        }
        return differ;
}

int ae_expert_check_group(const struct ae_expert_opt *opt, uint32_t what, struct ae_comm *edp,
                          uint64_t deadline_ns)
{
        AE_CLEANUP(ae_cleanup_free) struct ae_expert_checksum *digests = NULL;
        AE_CLEANUP(ae_cleanup_free) struct summary *all = calloc(edp->size, sizeof(*all));
        struct summary mine = { .n_tensors = opt->n_slots };
        int r;

        if (!all)
                return ae_fail_sys(ENOMEM, "cannot compare the experts of %u ranks", edp->size);
        r = make_digests(opt, what, &digests);
        if (r < 0)
                return r;
        mine.checksum = sum_digests(digests, opt->n_slots);
        r = ae_comm_allgather(edp, &mine, sizeof(mine), all, deadline_ns);
        if (r < 0)
                return r;
        r = compare_summaries(edp, all);
        if (r <= 0)
                return r;
        return find_difference(opt, what, edp, digests, deadline_ns);
}

int ae_expert_opt_compare(const struct ae_expert_opt *opt, struct ae_comm *edp,
                          uint64_t deadline_ns)
{
        if (opt->phase == AE_EXPERT_OPEN)
                return ae_fail(AE_ESTATE, "cannot compare experts before they are sealed");
        return ae_expert_check_group(opt,
                                     AE_EXPERT_CHECK_RECORD | AE_EXPERT_CHECK_WEIGHT |
                                             AE_EXPERT_CHECK_STATE,
                                     edp, deadline_ns);
}
