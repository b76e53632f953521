/* SPDX-License-Identifier: Apache-2.0 */
/* Properties of layouts of random jobs, and of their digests. Each job has a seed of its own, its
 * number, so that a job that fails can be built alone. */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/layout.h"

#include "tests/lib/layout-check.h"
#include "tests/lib/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_JOBS 4000
#define TENSORS_MAX 40
#define UNITS_MAX 8
#define NODES_MAX 1000

struct job {
        struct ae_tensor_spec specs[TENSORS_MAX];
        char names[TENSORS_MAX][32];
        char units[UNITS_MAX][32];
        uint32_t n_specs;
        uint32_t n_nodes;
        uint64_t random;
};

/* SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014. */
static uint64_t next(struct job *job)
{
        uint64_t z = job->random += UINT64_C(0x9e3779b97f4a7c15);

        z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
        return z ^ z >> 31;
}

/* In [0, @end). */
static uint64_t below(struct job *job, uint64_t end)
{
        return next(job) % end;
}

/* Sizes of every order of magnitude, often at the edges. */
static uint64_t any_size(struct job *job)
{
        uint64_t size = next(job) >> (40 + below(job, 24));

        switch (below(job, 8)) {
        case 0:
                return 0;
        case 1:
                return (size + 127) / 128 * 128;
        case 2:
                return size / 128 * 128 + 1;
        default:
                return size;
        }
}

static void make_tensor(struct job *job, uint32_t id)
{
        struct ae_tensor_spec *spec = &job->specs[id];
        uint32_t class = 1 + (uint32_t)(below(job, 10) / 4); /* two of ten are buffers */

        (void)snprintf(job->names[id], sizeof(job->names[id]), "tensor-%u", id);
        *spec = (struct ae_tensor_spec){
                .name = job->names[id],
                .unit = job->units[below(job, UNITS_MAX)],
                .class = class,
                .dtype = 1 + (uint32_t)below(job, class == AE_CLASS_BUFFER ? 3 : 2),
                .group = (uint32_t)below(job, AE_LAYOUT_GROUPS_MAX),
                .frozen = below(job, 4) == 0,
                .n_dims = (uint32_t)below(job, 4),
        };
        for (uint32_t i = 0; i < spec->n_dims; i++)
                spec->dims[i] = i == 0 ? any_size(job) : 1 + below(job, 5);
        if (id > 0 && below(job, 8) == 0) {
                uint32_t home = (uint32_t)below(job, id);
                const char *unit = spec->unit;

                if (job->specs[home].alias_of)
                        return;
                *spec = job->specs[home];
                spec->name = job->names[id];
                spec->unit = unit;
                spec->alias_of = job->names[home];
        }
}

static void make_job(struct job *job, uint64_t number)
{
        memset(job, 0, sizeof(*job));
        job->random = number;
        job->n_nodes = 1 + (uint32_t)below(job, below(job, 2) ? 10 : NODES_MAX);
        job->n_specs = (uint32_t)below(job, TENSORS_MAX + 1);
        for (uint32_t i = 0; i < UNITS_MAX; i++)
                (void)snprintf(job->units[i], sizeof(job->units[i]), "unit-%u", i);
        for (uint32_t i = 0; i < job->n_specs; i++)
                make_tensor(job, i);
}

static struct ae_layout *build(const struct job *job)
{
        struct ae_layout *layout = NULL;

        if (ae_layout_new(job->specs, job->n_specs, job->n_nodes, &layout) != 0)
                fail_msg("%s", ae_error_text());
        return layout;
}

static void check_same(const struct ae_layout *a, const struct ae_layout *b)
{
        struct ae_digest digest_a = ae_layout_digest(a), digest_b = ae_layout_digest(b);

        assert_int_equal(digest_a.lo, digest_b.lo);
        assert_int_equal(digest_a.hi, digest_b.hi);
        assert_int_equal(a->n_slices, b->n_slices);
        assert_int_equal(a->n_segments, b->n_segments);
        assert_memory_equal(a->slices, b->slices, a->n_slices * sizeof(*a->slices));
        assert_memory_equal(a->segments, b->segments, a->n_segments * sizeof(*a->segments));
}

static uint32_t seed; /* of the job that is being checked */

/* Says which job failed; cmocka leaves a failing test by a jump. */
static int name_the_job(void **state)
{
        (void)state;
        if (seed < N_JOBS)
                print_error("the job that failed is number %u\n", seed);
        return 0;
}

static void random_jobs_hold_every_property(void **state)
{
        static struct job job;

        (void)state;
        for (seed = 0; seed < N_JOBS; seed++) {
                struct ae_layout *layout, *again;

                make_job(&job, seed);
                layout = build(&job);
                layout_check(layout, job.specs, job.n_specs);
                again = build(&job);
                check_same(layout, again);
                assert_null(ae_layout_free(layout));
                assert_null(ae_layout_free(again));
        }
}

static bool same_digest(struct ae_digest a, struct ae_digest b)
{
        return a.lo == b.lo && a.hi == b.hi;
}

static const struct ae_tensor_spec digest_specs[] = {
        { .name = "a", .unit = "u", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_DENSE, .group = 1,
          .n_dims = 2, .dims = { 2, 3 } },
        { .name = "b", .unit = "v", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_DENSE, .group = 1,
          .n_dims = 2, .dims = { 2, 3 } },
        { .name = "c", .unit = "v", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_DENSE, .group = 1,
          .n_dims = 2, .dims = { 2, 3 } },
        { .name = "d", .unit = "v", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_DENSE, .group = 1,
          .n_dims = 2, .dims = { 2, 3 }, .alias_of = "a" },
};
#define DIGEST_SPECS AE_ARRAY_LEN(digest_specs)

static struct ae_layout *build_specs(const struct ae_tensor_spec *specs, uint32_t n_nodes)
{
        struct ae_layout *layout = NULL;

        if (ae_layout_new(specs, DIGEST_SPECS, n_nodes, &layout) != 0)
                fail_msg("%s", ae_error_text());
        return layout;
}

/* Each change gives a digest that none before it gave; unit u's never changes. */
static void any_changed_field_changes_the_digest(void **state)
{
        struct ae_tensor_spec v[][DIGEST_SPECS] = {
#define SAME { digest_specs[0], digest_specs[1], digest_specs[2], digest_specs[3] }
                SAME, SAME, SAME, SAME, SAME, SAME, SAME, SAME, SAME, SAME, SAME, SAME, SAME,
#undef SAME
        };
        struct ae_digest jobs[AE_ARRAY_LEN(v)], units[AE_ARRAY_LEN(v)], first[AE_ARRAY_LEN(v)];

        (void)state;
        v[1][1].name = "B";
        v[2][1].dtype = AE_DTYPE_F32;
        v[3][1].class = AE_CLASS_EXPERT;
        v[4][1].class = AE_CLASS_BUFFER;
        v[5][1].group = 2;
        v[6][1].frozen = true;
        v[7][1].dims[0] = 3;
        v[7][1].dims[1] = 2;
        v[8][1].n_dims = 1;
        v[8][1].dims[0] = 6;
        v[9][1].n_dims = 3;
        v[9][1].dims[2] = 1;
        v[10][1].alias_of = "a";
        v[11][3].alias_of = "c";
        v[12][1] = digest_specs[2]; /* the order of registration */
        v[12][2] = digest_specs[1];
        for (size_t i = 0; i < AE_ARRAY_LEN(v); i++) {
                struct ae_layout *layout = build_specs(v[i], 4);

                jobs[i] = ae_layout_digest(layout);
                first[i] = ae_layout_unit_digest(layout, 0);
                units[i] = ae_layout_unit_digest(layout, 1);
                assert_true(same_digest(first[i], first[0]));
                for (size_t j = 0; j < i; j++) {
                        assert_false(same_digest(jobs[i], jobs[j]));
                        assert_false(same_digest(units[i], units[j]));
                }
                assert_null(ae_layout_free(layout));
        }
}

static void units_and_nodes_are_in_the_digest(void **state)
{
        struct ae_tensor_spec specs[DIGEST_SPECS];
        struct ae_layout *base = build_specs(digest_specs, 4);
        struct ae_layout *other = build_specs(digest_specs, 5);

        (void)state;
        assert_false(same_digest(ae_layout_digest(base), ae_layout_digest(other)));
        assert_true(same_digest(ae_layout_unit_digest(base, 1), ae_layout_unit_digest(other, 1)));
        assert_null(ae_layout_free(other));

        memcpy(specs, digest_specs, sizeof(specs));
        specs[0].unit = "w"; /* only the name of the first unit */
        other = build_specs(specs, 4);
        assert_false(same_digest(ae_layout_digest(base), ae_layout_digest(other)));
        assert_false(same_digest(ae_layout_unit_digest(base, 0), ae_layout_unit_digest(other, 0)));
        assert_true(same_digest(ae_layout_unit_digest(base, 1), ae_layout_unit_digest(other, 1)));
        assert_null(ae_layout_free(other));

        memcpy(specs, digest_specs, sizeof(specs));
        specs[3].unit = "u"; /* a tensor moves */
        other = build_specs(specs, 4);
        assert_false(same_digest(ae_layout_unit_digest(base, 0), ae_layout_unit_digest(other, 0)));
        assert_false(same_digest(ae_layout_unit_digest(base, 1), ae_layout_unit_digest(other, 1)));
        assert_null(ae_layout_free(other));
        assert_null(ae_layout_free(base));
}

/* The encoding is part of the protocol: these figures may change only with AE_LAYOUT_RULES. */
static void the_encoding_is_fixed(void **state)
{
        struct ae_layout *layout = build_specs(digest_specs, 4);
        struct ae_digest job = ae_layout_digest(layout);
        struct ae_digest unit = ae_layout_unit_digest(layout, 1);

        (void)state;
        assert_int_equal(job.hi, UINT64_C(0xf6d45dfba15b1cb5));
        assert_int_equal(job.lo, UINT64_C(0xd90d0b0aae2271c3));
        assert_int_equal(unit.hi, UINT64_C(0xf1ee010880c48bdc));
        assert_int_equal(unit.lo, UINT64_C(0x45b269e473faa337));
        assert_null(ae_layout_free(layout));
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test_teardown(random_jobs_hold_every_property, name_the_job),
                cmocka_unit_test(any_changed_field_changes_the_digest),
                cmocka_unit_test(units_and_nodes_are_in_the_digest),
                cmocka_unit_test(the_encoding_is_fixed),
        };

        return cmocka_run_group_tests_name("layout-random", tests, NULL, NULL);
}
