/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The shard: its format, the optimizer over its blocks, and that a kill at any moment leaves every
 * block wholly old or wholly new once it is repaired. The kills are real: a child applies a step
 * over shared memory and dies, at a random moment or at its first write to a chosen page.
 */
#include "tests/lib/test.h"

#include "kernels/ops.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/model.h"
#include "server/core/shard.h"
#include "server/core/task.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define BLOCK AE_SHARD_BLOCK_N
#define SPAN 16384u /* many blocks, and many pages of everything */
#define STATE_N (5 * (uint64_t)SPAN + 1000)
#define N_BLOCKS ((STATE_N + BLOCK - 1) / BLOCK)
#define N_UNDO 2u
#define N_KILLS 200
#define OLD_VERSION 6u
#define NEW_VERSION 7u

/* Tensors that begin and end inside blocks, with gaps, of both dtypes; one is not in the step. */
static const struct ae_apply_run runs[] = {
        { .first = 0, .n = 20000, .weight_off = 0, .tensor = 0, .dtype = AE_DTYPE_BF16 },
        { .first = 20096, .n = 1, .weight_off = 40192, .tensor = 1, .dtype = AE_DTYPE_BF16 },
        { .first = 20224, .n = 3 * SPAN, .weight_off = 40448, .tensor = 2, .dtype = AE_DTYPE_F32 },
        { .first = 20224 + 3 * SPAN, .n = 12000, .weight_off = 40448 + 12 * SPAN, .tensor = 3,
          .dtype = AE_DTYPE_F32 },
        { .first = 5 * SPAN - 500, .n = 1400, .weight_off = 40448 + 12 * SPAN + 48128,
         .tensor = 4,
          .dtype = AE_DTYPE_BF16 },
};
#define N_RUNS (sizeof(runs) / sizeof(runs[0]))
#define WEIGHT_LEN (40448 + 12 * (uint64_t)SPAN + 48128 + 2800)

static const bool absent[N_RUNS] = { [3] = true };

struct bed {
        uint32_t optimizer;
        char *base;     /* shared with children */
        uint64_t len;
        char *before, *after; /* images of an untouched and of a finished step */
        float *gradient;
        struct ae_shard shard;
        struct ae_adamw adamw[N_RUNS];
        struct ae_sgd sgd[N_RUNS];
};

static float noise(uint32_t *seed)
{
        *seed = *seed * 1664525u + 1013904223u;
        return (float)(int32_t)*seed * 0x1p-32f;
}

static void round_weights(struct ae_shard *shard)
{
        for (size_t i = 0; i < N_RUNS; i++) {
                char *weight = shard->weight + runs[i].weight_off;

                if (runs[i].dtype == AE_DTYPE_BF16)
                        ae_ops()->f32_to_bf16((ae_bf16 *)(void *)weight,
                                              shard->master + runs[i].first,
                                              runs[i].n);
                else
                        memcpy(weight, shard->master + runs[i].first, runs[i].n * sizeof(float));
        }
}

static struct ae_task_apply whole_step(struct bed *bed)
{
        return (struct ae_task_apply){
                .shard = &bed->shard, .runs = runs, .n_runs = N_RUNS, .gradient = bed->gradient,
                .adamw = bed->adamw, .sgd = bed->sgd, .optimizer = bed->optimizer,
                .absent = absent, .version = NEW_VERSION,
        };
}

static void fill(struct bed *bed)
{
        struct ae_shard *shard = &bed->shard;
        uint32_t seed = 17;

        for (size_t i = 0; i < N_RUNS; i++) {
                for (uint64_t k = runs[i].first; k < runs[i].first + runs[i].n; k++) {
                        shard->master[k] = noise(&seed);
                        shard->moment1[k] = noise(&seed);
                        if (bed->optimizer == AE_OPT_ADAMW)
                                shard->moment2[k] = noise(&seed) + 1;
                        bed->gradient[k] = noise(&seed);
                }
        }
        round_weights(shard);
        for (uint32_t b = 0; b < N_BLOCKS; b++)
                shard->blocks[b] = OLD_VERSION;
}

static void open_bed(struct bed *bed, uint32_t optimizer)
{
        static const struct ae_hyper hyper = { .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                                               .weight_decay = 0.1 };
        struct ae_task_apply apply;

        *bed = (struct bed){ .optimizer = optimizer };
        bed->len = ae_shard_len(STATE_N, WEIGHT_LEN, N_UNDO);
        bed->base = mmap(NULL, bed->len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        assert_ptr_not_equal(bed->base, MAP_FAILED);
        bed->before = malloc(bed->len);
        bed->after = malloc(bed->len);
        bed->gradient = calloc(STATE_N, sizeof(float));
        assert_true(bed->before && bed->after && bed->gradient);
        for (uint64_t i = 0; i < N_RUNS; i++) {
                ae_adamw_scalars(&hyper, 3 + i, 0.5, &bed->adamw[i]);
                ae_sgd_scalars(&hyper, 0.5, &bed->sgd[i]);
        }
        ae_shard_format(bed->base, STATE_N, WEIGHT_LEN, N_UNDO, &bed->shard);
        fill(bed);
        memcpy(bed->before, bed->base, bed->len);
        apply = whole_step(bed);
        ae_shard_apply(&apply, 1);
        memcpy(bed->after, bed->base, bed->len);
}

static void close_bed(struct bed *bed)
{
        munmap(bed->base, bed->len);
        free(bed->before);
        free(bed->after);
        free(bed->gradient);
}

/* Compares all but the undo records, whose contents are left over. */
static void assert_image(const struct bed *bed, const char *want)
{
        uint64_t off = bed->shard.header->blocks_off;

        assert_memory_equal(bed->base + off, want + off, bed->len - off);
        for (uint32_t i = 0; i < N_UNDO; i++)
                assert_int_equal(bed->shard.undo[i].block, AE_SHARD_NO_BLOCK);
}

/* ---- format ----------------------------------------------------------------------------- */

static void test_format(void **state)
{
        struct ae_shard opened;
        struct bed bed;

        (void)state;
        open_bed(&bed, AE_OPT_ADAMW);
        assert_int_equal(ae_shard_open(bed.base, bed.len, &opened), 0);
        assert_memory_equal(&opened, &bed.shard, sizeof(opened));
        assert_int_equal(((uintptr_t)opened.weight - (uintptr_t)bed.base) % 4096, 0);
        assert_true(opened.weight + WEIGHT_LEN <= bed.base + bed.len);
        assert_true((char *)opened.master >= (char *)(opened.blocks + N_BLOCKS));
        assert_true((char *)opened.blocks >= (char *)(opened.undo + N_UNDO));
        close_bed(&bed);
}

static void test_empty_shard(void **state)
{
        uint64_t len = ae_shard_len(0, 0, 1);
        char *base = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        struct ae_shard shard;

        (void)state;
        assert_ptr_not_equal(base, MAP_FAILED);
        ae_shard_format(base, 0, 0, 1, &shard);
        assert_int_equal(ae_shard_open(base, len, &shard), 0);
        assert_int_equal(ae_shard_repair(&shard, NULL, 0), 0);
        munmap(base, len);
}

static void assert_not_opened(struct bed *bed, uint64_t len)
{
        struct ae_shard shard = { .state_n = 77 };

        assert_int_equal(ae_shard_open(bed->base, len, &shard), AE_EPROTO);
        assert_int_equal(shard.state_n, 77);
}

static void test_not_a_shard(void **state)
{
        struct ae_shard_header *header;
        struct ae_shard shard;
        struct bed bed;

        (void)state;
        open_bed(&bed, AE_OPT_ADAMW);
        header = bed.shard.header;
        assert_not_opened(&bed, sizeof(*header) - 1);
        assert_not_opened(&bed, bed.len - 4096 - 1);
        header->magic++;
        assert_not_opened(&bed, bed.len);
        header->magic--;
        header->version++;
        assert_not_opened(&bed, bed.len);
        header->version--;
        header->master_off += 4096;
        assert_not_opened(&bed, bed.len);
        header->master_off -= 4096;
        header->n_undo++;
        assert_not_opened(&bed, bed.len);
        header->n_undo--;
        header->weight_len = UINT64_MAX;
        assert_not_opened(&bed, bed.len);
        header->weight_len = WEIGHT_LEN;
        bed.shard.undo[1].block = N_BLOCKS;
        assert_not_opened(&bed, bed.len);
        bed.shard.undo[1].block = AE_SHARD_NO_BLOCK;
        assert_int_equal(ae_shard_open(bed.base, bed.len, &shard), 0);
        close_bed(&bed);
}

/* Sizes whose products wrap around to offsets that would fit. */
static void test_wrapping_sizes(void **state)
{
        struct bed bed;
        struct ae_shard_header *header;

        (void)state;
        open_bed(&bed, AE_OPT_ADAMW);
        header = bed.shard.header;
        header->state_n = UINT64_C(1) << 62;
        header->master_off = ae_align_up(header->blocks_off + (UINT64_C(1) << 62) / BLOCK * 4,
                                         4096);
        header->moment1_off = header->moment2_off = header->weight_off = header->master_off;
        assert_not_opened(&bed, UINT64_MAX);
        header->state_n = (UINT64_C(1) << 62) + 1;
        assert_not_opened(&bed, bed.len);
        close_bed(&bed);
}

/* ---- apply ------------------------------------------------------------------------------ */

/* Plain kernel calls over whole tensors, without blocks. */
static void apply_plainly(struct bed *bed, struct ae_shard *shard)
{
        for (size_t i = 0; i < N_RUNS; i++) {
                uint64_t first = runs[i].first;
                void *weight = shard->weight + runs[i].weight_off;

                if (absent[i])
                        continue;
                if (bed->optimizer == AE_OPT_ADAMW)
                        ae_ops()->adamw(&bed->adamw[i], shard->master + first,
                                        shard->moment1 + first,
                                        shard->moment2 + first, bed->gradient + first, weight,
                                        runs[i].dtype, runs[i].n);
                else
                        ae_ops()->sgd(&bed->sgd[i], shard->master + first, shard->moment1 + first,
                                      bed->gradient + first, weight, runs[i].dtype, runs[i].n);
        }
        for (uint32_t b = 0; b < N_BLOCKS; b++)
                shard->blocks[b] = NEW_VERSION;
}

static void check_apply(uint32_t optimizer)
{
        struct bed bed;
        uint64_t first = runs[3].first;

        open_bed(&bed, optimizer);
        assert_image(&bed, bed.after);
        assert_memory_not_equal(bed.before + bed.shard.header->blocks_off,
                                bed.after + bed.shard.header->blocks_off, 64);
        assert_memory_equal(bed.shard.master + first,
                            bed.before + bed.shard.header->master_off + first * sizeof(float),
                            runs[3].n * sizeof(float)); /* not in the step: untouched */
        memcpy(bed.base, bed.before, bed.len);
        apply_plainly(&bed, &bed.shard);
        assert_image(&bed, bed.after);
        close_bed(&bed);
}

static void test_apply_adamw(void **state)
{
        (void)state;
        check_apply(AE_OPT_ADAMW);
}

static void test_apply_sgd(void **state)
{
        (void)state;
        check_apply(AE_OPT_SGD);
}

/* ---- kills ------------------------------------------------------------------------------ */

/* The parts of the runs that lie in one block. */
static uint32_t runs_of_block(uint64_t block, struct ae_apply_run *ret_runs)
{
        uint64_t first = block * BLOCK;
        uint32_t n = 0;

        for (size_t i = 0; i < N_RUNS; i++) {
                uint64_t from = AE_MAX(runs[i].first, first);
                uint64_t to = AE_MIN(runs[i].first + runs[i].n, first + BLOCK);

                if (from >= to)
                        continue;
                ret_runs[n] = runs[i];
                ret_runs[n].first = from;
                ret_runs[n].n = to - from;
                ret_runs[n++].weight_off += (from - runs[i].first) * ae_dtype_size(runs[i].dtype);
        }
        return n;
}

/* The block's state and weights are those of @image. */
static bool block_is(const struct bed *bed, uint64_t block, const char *image)
{
        const struct ae_shard_header *header = bed->shard.header;
        uint64_t first = block * BLOCK * sizeof(float);
        uint64_t len = AE_MIN((uint64_t)BLOCK, STATE_N - block * BLOCK) * sizeof(float);
        struct ae_apply_run part[N_RUNS];
        uint32_t n = runs_of_block(block, part);
        bool same = memcmp(bed->base + header->master_off + first,
                           image + header->master_off + first, len) == 0 &&
                    memcmp(bed->base + header->moment1_off + first,
                           image + header->moment1_off + first, len) == 0 &&
                    memcmp(bed->base + header->moment2_off + first,
                           image + header->moment2_off + first, len) == 0;

        for (uint32_t i = 0; i < n; i++) {
                uint64_t off = header->weight_off + part[i].weight_off;

                same &= memcmp(bed->base + off, image + off,
                               part[i].n * ae_dtype_size(part[i].dtype)) == 0;
        }
        return same;
}

/* Repairs what a dead child left, checks every block, finishes the step. Returns blocks put back.
 */
static uint32_t repair_and_finish(struct bed *bed)
{
        struct ae_shard shard;
        uint32_t n_back;

        assert_int_equal(ae_shard_open(bed->base, bed->len, &shard), 0);
        n_back = ae_shard_repair(&shard, runs, N_RUNS);
        assert_true(n_back <= 1); /* one thread, one record */
        assert_int_equal(ae_shard_repair(&shard, runs, N_RUNS), 0);
        for (uint32_t b = 0; b < N_BLOCKS; b++) {
                struct ae_apply_run part[N_RUNS];
                struct ae_task_apply apply = whole_step(bed);

                assert_true(shard.blocks[b] == OLD_VERSION || shard.blocks[b] == NEW_VERSION);
                assert_true(block_is(bed, b,
                                     shard.blocks[b] == NEW_VERSION ? bed->after : bed->before));
                if (shard.blocks[b] == NEW_VERSION)
                        continue;
                apply.runs = part;
                apply.n_runs = runs_of_block(b, part);
                ae_shard_apply(&apply, b % N_UNDO);
        }
        assert_image(bed, bed->after);
        return n_back;
}

static void kill_after(struct bed *bed, uint64_t delay_ns)
{
        struct ae_task_apply apply = whole_step(bed);
        volatile uint64_t *touched = (volatile uint64_t *)&bed->shard.header->prepared;
        uint64_t end;
        pid_t child;

        memcpy(bed->base, bed->before, bed->len);
        child = fork();
        assert_true(child >= 0);
        if (child == 0) {
                *touched = 1; /* the clock starts where the work does */
                ae_shard_apply(&apply, 0);
                for (;;)
                        pause();
        }
        while (!*touched)
                ;
        for (end = ae_now_ns() + delay_ns; ae_now_ns() < end;)
                ;
        assert_int_equal(kill(child, SIGKILL), 0);
        assert_int_equal(waitpid(child, NULL, 0), child);
        *touched = 0;
}

/* What the step takes here, so that the kills fall into it; the fork's page faults included. */
static uint64_t step_ns(struct bed *bed)
{
        struct ae_task_apply apply = whole_step(bed);
        uint64_t begin;

        memcpy(bed->base, bed->before, bed->len);
        begin = ae_now_ns();
        ae_shard_apply(&apply, 0);
        return ae_now_ns() - begin;
}

static void check_kills(uint32_t optimizer, uint32_t seed)
{
        uint32_t n_back = 0;
        uint64_t longest;
        struct bed bed;

        srand(seed);
        open_bed(&bed, optimizer);
        longest = 2 * step_ns(&bed);
        for (int i = 0; i < N_KILLS / 2; i++) {
                kill_after(&bed, (uint64_t)rand() % longest);
                n_back += repair_and_finish(&bed);
        }
        print_message("%u of %d kills fell into a block\n", n_back, N_KILLS / 2);
        close_bed(&bed);
}

static void test_kills_adamw(void **state)
{
        (void)state;
        check_kills(AE_OPT_ADAMW, 23);
}

static void test_kills_sgd(void **state)
{
        (void)state;
        check_kills(AE_OPT_SGD, 29);
}

static void die(int signal)
{
        (void)signal;
        _exit(0);
}

/* A child that dies at its first write to the page at @off; false when it never writes there. */
static bool die_at(struct bed *bed, uint64_t off)
{
        struct ae_task_apply apply = whole_step(bed);
        pid_t child;
        int status;

        memcpy(bed->base, bed->before, bed->len);
        child = fork();
        assert_true(child >= 0);
        if (child == 0) {
                struct sigaction action = { .sa_handler = die };

                if (sigaction(SIGSEGV, &action, NULL) < 0 ||
                    mprotect(bed->base + off, 4096, PROT_READ) < 0)
                        _exit(2);
                ae_shard_apply(&apply, 0);
                _exit(1);
        }
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) < 2);
        return WEXITSTATUS(status) == 0;
}

/* Every third page and each page of the records and of the versions' table: the same on every run.
 */
static void check_pages(uint32_t optimizer)
{
        uint32_t n_back = 0;
        uint32_t n_died = 0;
        struct bed bed;

        open_bed(&bed, optimizer);
        for (uint64_t off = 0; off < bed.len; off += 4096) {
                bool table =
                        off >= bed.shard.header->blocks_off && off < bed.shard.header->master_off;

                if (!table && off / 4096 % 3 != 0)
                        continue;
                n_died += die_at(&bed, off);
                n_back += repair_and_finish(&bed);
        }
        assert_true(n_died > 40);
        assert_true(n_back > 20);
        close_bed(&bed);
}

static void test_pages_adamw(void **state)
{
        (void)state;
        check_pages(AE_OPT_ADAMW);
}

static void test_pages_sgd(void **state)
{
        (void)state;
        check_pages(AE_OPT_SGD);
}

/* The moment between the stamp and the end of the record: the block is new and stays so. */
static void test_stamped_record(void **state)
{
        struct bed bed;

        (void)state;
        open_bed(&bed, AE_OPT_ADAMW);
        bed.shard.undo[0].version = NEW_VERSION;
        bed.shard.undo[0].n = BLOCK;
        memset(bed.shard.undo[0].master, 0, sizeof(bed.shard.undo[0].master));
        atomic_store(&bed.shard.undo[0].block, 2);
        assert_int_equal(repair_and_finish(&bed), 0);
        close_bed(&bed);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_format),         cmocka_unit_test(test_empty_shard),
                cmocka_unit_test(test_not_a_shard),    cmocka_unit_test(test_wrapping_sizes),
                cmocka_unit_test(test_apply_adamw),    cmocka_unit_test(test_apply_sgd),
                cmocka_unit_test(test_kills_adamw),    cmocka_unit_test(test_kills_sgd),
                cmocka_unit_test(test_pages_adamw),    cmocka_unit_test(test_pages_sgd),
                cmocka_unit_test(test_stamped_record),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
