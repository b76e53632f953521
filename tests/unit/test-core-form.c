/* SPDX-License-Identifier: Apache-2.0 */
/* How a job forms in the core: hellos that are refused and why, budgets, groups; and the plain way.
 */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"
#include "tests/unit/test-core-bed.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define V AE_WIRE_VERSION

#define assert_says(text, words)                                                                  \
        do {                                                                                      \
                if (!strstr((text), (words)))                                                     \
                        fail_msg("'%s' does not say '%s'", (text), (words));                      \
        } while (0)

static void test_live(void **state)
{
        (void)state;
        for (uint32_t n_nodes = 1; n_nodes <= BED_NODES_MAX; n_nodes++)
                bed_free(bed_new_live(n_nodes));
}

static void test_bad_hello(void **state)
{
        static const struct bed_hello root = { V, 1, 2, 0, "job", "secret", 0, false };
        static const struct {
                struct bed_hello hello;
                int status;
                const char *words;
        } cases[] = {
                { { V + 1, 0, 2, 1000, "job", "secret", 0, false }, AE_EVERSION,
                 "protocol version" },
                { { 0, 0, 2, 1000, "job", "secret", 0, false }, AE_EVERSION, "protocol version 0" },
                { { V, 0, 2, 1000, "", "secret", 0, false }, AE_EINVAL, "no name" },
                { { V, 2, 2, 1000, "job", "secret", 0, false }, AE_EINVAL,
                 "rank 2 of a world of 2" },
                { { V, UINT32_MAX, 2, 1000, "job", "secret", 0, false }, AE_EINVAL,
                 "of a world of 2" },
                { { V, 0, 0, 1000, "job", "secret", 0, false }, AE_EINVAL,
                 "rank 0 of a world of 0" },
                { { V, 0, AE_WIRE_MAX_WORLD + 1, 1000, "job", "secret", 0, false }, AE_EINVAL,
                 "world of 65537" },
                { { V, 0, 2, 1000, "job", "guess", 0, false }, AE_EAUTH,
                 "wrong token for job 'job'" },
                { { V, 0, 2, 1001, "job", "secret", 0, false }, AE_EAUTH,
                 "belongs to uid 1000, not to uid 1001" },
                { { V, 1, 3, 1000, "job", "secret", 0, false }, AE_EMISMATCH,
                 "has 2 ranks, rank 1 says 3" },
                { { V, 0, 2, 1000, "job", "secret", 0, false }, AE_EEXIST,
                 "rank 0 of job 'job' is claimed by pid 4000 on node 0" },
                { { V, 0, 2, 1000, "other", "secret", 0, true }, AE_ENOENT, "unknown job 'other'" },
        };
        struct bed *bed = bed_new(1, AE_GIB);
        struct bed_worker *worker = NULL;
        struct bed_worker *refused = NULL;

        (void)state;
        assert_int_equal(bed_rank(bed, 0, 0, 2, &worker), 0);
        for (size_t i = 0; i < AE_ARRAY_LEN(cases); i++) {
                assert_int_equal(bed_hello(bed, 0, &cases[i].hello, &refused), cases[i].status);
                assert_says(ae_error_text(), cases[i].words);
                assert_null(refused);
        }
        /* none of it harmed the job; root may join anyone's */
        assert_int_equal(bed_hello(bed, 0, &root, &refused), 0);
        assert_int_equal(refused->type, AE_CONTROL_HELLO_OK);
        bed_free(bed);
}

/* A hello that comes to nothing leaves no job behind that others would have to agree with. */
static void test_refused_first(void **state)
{
        static const struct bed_hello old = { 9, 0, 2, 1000, "job", "secret", 0, false };
        struct bed *bed = bed_new(1, AE_GIB);
        struct bed_worker *worker = NULL;

        (void)state;
        assert_int_equal(bed_rank(bed, 0, 3, 2, &worker), AE_EINVAL);
        assert_int_equal(bed_hello(bed, 0, &old, &worker), AE_EVERSION);
        assert_null(bed_job(bed, 0));
        bed_free(bed);
}

/* Two nodes: the decider knows what the worker's own node cannot. */
static void test_refused_by_decider(void **state)
{
        static const struct {
                struct bed_hello hello;
                int status;
                const char *words;
        } cases[] = {
                { { V, 0, 2, 1000, "job", "secret", 0, false }, AE_EEXIST,
                 "rank 0 of job 'job' is claimed by pid 4000 on node 0" },
                { { V, 1, 2, 1000, "job", "guess", 0, false }, AE_EAUTH, "wrong token" },
                { { V, 1, 3, 1000, "job", "secret", 0, false }, AE_EMISMATCH,
                 "has 2 ranks, rank 1 says 3" },
                { { V, 5, 6, 1000, "job", "secret", 0, false }, AE_EMISMATCH,
                 "has 2 ranks, rank 5 says 6" },
                { { V, 1, 2, 1001, "job", "secret", 0, false }, AE_EAUTH,
                 "belongs to uid 1000, but rank 1 on node 1 has uid 1001" },
        };
        struct bed *bed = bed_new(2, AE_GIB);
        struct bed_worker *worker = NULL;

        (void)state;
        assert_int_equal(bed_rank(bed, 0, 0, 2, &worker), 0);
        for (size_t i = 0; i < AE_ARRAY_LEN(cases); i++) {
                struct bed_worker *refused = NULL;

                assert_int_equal(bed_hello(bed, 1, &cases[i].hello, &refused), 0);
                assert_int_equal(refused->type, AE_CONTROL_ERROR);
                assert_int_equal(refused->status, cases[i].status);
                assert_says(refused->text, cases[i].words);
                assert_null(bed_job(bed, 1)); /* or later ones would have to agree with it */
                bed_gone(refused, "refused");
        }
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_FORMING);
        assert_int_equal(bed_job(bed, 0)->n_joined, 1);
        bed_free(bed);
}

/* A rank gives up while node 0 stands still: its successor doesn't find the place taken. */
static void test_given_up(void **state)
{
        struct bed *bed = bed_new(2, AE_GIB);
        struct bed_worker *first = NULL;
        struct bed_worker *second = NULL;

        (void)state;
        assert_int_equal(bed_rank(bed, 0, 0, 2, &first), 0);
        bed->stopped = true;
        assert_int_equal(bed_rank(bed, 1, 1, 2, &first), 0);
        bed_gone(first, "it gave up");
        assert_int_equal(bed_rank(bed, 1, 1, 2, &second), 0);
        bed->stopped = false;
        bed_run(bed);
        assert_int_equal(second->type, AE_CONTROL_HELLO_OK);
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_FORMING);
        assert_int_equal(bed_job(bed, 0)->n_joined, 2);
        bed_free(bed);
}

/* The last one to come gives up when the job has begun to start with it. */
static void test_given_up_too_late(void **state)
{
        struct bed *bed = bed_new(2, AE_GIB);
        struct bed_worker *worker = NULL;

        (void)state;
        assert_int_equal(bed_rank(bed, 0, 0, 2, &worker), 0);
        bed_register(worker, NULL);
        bed->stopped = true;
        assert_int_equal(bed_rank(bed, 1, 1, 2, &worker), 0);
        bed_gone(worker, "it gave up");
        bed->stopped = false;
        bed_run(bed);
        assert_int_equal(bed->workers[0].status, AE_ELOST);
        assert_says(bed->workers[0].text, "rank 1 (pid 4001, node 1) was lost while job 'job'");
        assert_null(bed_job(bed, 1));
        assert_int_equal(bed->n_refused, 0);
        bed_free(bed);
}

static void leave(struct bed_worker *worker)
{
        Autoep__Leave *message = malloc(sizeof(*message));

        assert_non_null(message);
        autoep__leave__init(message);
        assert_int_equal(ae_core_worker_message(worker->worker, AE_CONTROL_LEAVE, &message->base,
                                                -1),
                         0);
        bed_run(worker->bed);
        bed_gone(worker, "it has left");
}

/* Who leaves before the job starts makes room, the last one for a job of another shape. */
static void test_leave_while_forming(void **state)
{
        struct bed *bed = bed_new(2, AE_GIB);
        struct bed_worker *worker = NULL;

        (void)state;
        assert_int_equal(bed_rank(bed, 0, 0, 2, &worker), 0);
        assert_int_equal(bed_rank(bed, 1, 1, 2, &worker), 0);
        leave(worker);
        assert_int_equal(bed_job(bed, 0)->n_joined, 1);
        assert_int_equal(bed_rank(bed, 0, 1, 2, &worker), 0); /* on another node, too */
        assert_int_equal(worker->type, AE_CONTROL_HELLO_OK);
        leave(worker);
        leave(&bed->workers[0]);
        for (uint32_t node = 0; node < 2; node++)
                assert_null(bed_job(bed, node));
        assert_int_equal(bed_rank(bed, 1, 2, 3, &worker), 0);
        assert_int_equal(worker->type, AE_CONTROL_HELLO_OK);
        bed_free(bed);
}

static void test_leave_while_starting(void **state)
{
        struct bed *bed = bed_new(2, AE_GIB);
        struct bed_worker *worker = NULL;

        (void)state;
        for (uint32_t rank = 0; rank < 2; rank++)
                assert_int_equal(bed_rank(bed, rank, rank, 2, &worker), 0);
        bed_register(&bed->workers[0], NULL);
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_STARTING);
        leave(worker);
        assert_int_equal(bed->workers[0].status, AE_ELOST);
        assert_says(bed->workers[0].text, "rank 1 (pid 4001, node 1) has left while job 'job'");
        bed_free(bed);
}

/* All ranks have left, and one of the next job of that name is here before its node has heard. */
static void test_join_before_the_end_is_heard(void **state)
{
        struct bed *bed = bed_new_live(3);
        struct bed_worker *worker = NULL;

        (void)state;
        bed->stopped = true;
        for (uint32_t rank = 0; rank < 3; rank++)
                leave(&bed->workers[rank]);
        assert_int_equal(bed_rank(bed, 1, 1, 3, &worker), 0);
        bed->stopped = false;
        bed_run(bed);
        assert_int_equal(worker->type, AE_CONTROL_HELLO_OK);
        assert_int_equal(bed_job(bed, 1)->state, AE_JOB_FORMING);
        bed_free(bed);
}

/* The same while another rank has still to leave: the successor waits for that. */
static void test_join_while_others_leave(void **state)
{
        struct bed *bed = bed_new_live(3);
        struct bed_worker *worker = NULL;

        (void)state;
        leave(&bed->workers[1]);
        assert_int_equal(bed_rank(bed, 1, 1, 3, &worker), 0);
        bed_run(bed);
        assert_int_equal(worker->type, 0);
        leave(&bed->workers[2]);
        assert_int_equal(worker->type, 0);
        leave(&bed->workers[0]);
        assert_int_equal(worker->type, AE_CONTROL_HELLO_OK);
        assert_int_equal(bed_job(bed, 0)->n_joined, 1);
        bed_free(bed);
}

/* Memory that is too small: every rank hears how much of what was needed and what there is. */
static void test_budget(void **state)
{
        struct bed *bed = bed_new(1, 2 * AE_MIB);
        struct bed_worker *worker = NULL;

        (void)state;
        assert_int_equal(bed_rank(bed, 0, 0, 1, &worker), 0);
        bed_register(worker, NULL);
        assert_int_equal(worker->type, AE_CONTROL_ERROR);
        assert_int_equal(worker->status, AE_EBUDGET);
        assert_says(worker->text, "job 'job' needs ");
        assert_says(worker->text, "on node 0 (cache ");
        assert_says(worker->text, "its budget is 2097152");
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_FAILED);
        bed_gone(worker, "it failed");
        assert_null(bed_job(bed, 0));
        bed_free(bed);
}

/* Initial values are copied before the model's needs are known: not more than there may be. */
static void test_initial_values_too_large(void **state)
{
        struct bed *bed = bed_new(1, AE_MIB);
        struct bed_worker *worker = NULL;

        (void)state;
        assert_int_equal(bed_rank(bed, 0, 0, 1, &worker), 0);
        bed_register_init(worker, NULL, AE_MIB + 1);
        assert_int_equal(worker->type, AE_CONTROL_ERROR);
        assert_int_equal(worker->status, AE_EBUDGET);
        assert_says(worker->text, "the initial values have 1048577 bytes");
        assert_says(worker->text, "node 0 has 1048576 in all");
        bed_free(bed);
}

static void small_budget(Autoep__Model *model)
{
        model->budget_len = 1000;
}

static void small_cache(Autoep__Model *model)
{
        model->cache_len = 4096;
}

static void odd_groups(Autoep__Model *model)
{
        model->sum_group = 2;
}

static void odd_experts(Autoep__Model *model)
{
        model->ep_size = 2;
}

/* What the nodes refuse when the job starts, each with its reason at every rank. */
static void test_bad_models(void **state)
{
        static const struct {
                void (*change)(Autoep__Model *model);
                int status;
                const char *words;
        } cases[] = {
                { small_budget, AE_EBUDGET, "its budget is 1000: raise budget_len" },
                { small_cache, AE_EBUDGET, "cache_len 4096 on node" },
                { odd_groups, AE_EINVAL, "sum_group 2 does not cut the 3 ranks of node 0" },
                { odd_experts, AE_EINVAL, "ep_size 2" },
        };

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(cases); i++) {
                struct bed *bed = bed_new(2, AE_GIB);
                struct bed_worker *worker = NULL;

                for (uint32_t rank = 0; rank < 3; rank++)
                        assert_int_equal(bed_rank(bed, 0, rank, 3, &worker),
                                         0);
                for (uint32_t rank = 0; rank < 3; rank++)
                        bed_register(&bed->workers[rank], cases[i].change);
                for (uint32_t rank = 0; rank < 3; rank++) {
                        assert_int_equal(bed->workers[rank].type, AE_CONTROL_ERROR);
                        assert_int_equal(bed->workers[rank].status, cases[i].status);
                        assert_says(bed->workers[rank].text, cases[i].words);
                }
                bed_free(bed);
        }
}

static void vast_overflow(Autoep__Model *model)
{
        model->overflow_len = UINT64_MAX - 8191;
        model->cache_len = 8 * AE_MIB;
}

static void vast_cache(Autoep__Model *model)
{
        model->cache_len = UINT64_MAX;
}

static void vast_exchange(Autoep__Model *model)
{
        model->exchange_len = UINT64_C(1) << 63;
}

static void vast_budget(Autoep__Model *model)
{
        model->budget_len = UINT64_MAX;
}

/* Lengths with which sizes would wrap: refused by name, not taken for small ones. */
static void test_vast_models(void **state)
{
        static const struct {
                void (*change)(Autoep__Model *model);
                const char *words;
        } cases[] = {
                { vast_overflow, "overflow_len of 18446744073709543424 bytes" },
                { vast_cache, "cache_len of 18446744073709551615 bytes" },
                { vast_exchange, "exchange_len of 9223372036854775808 bytes" },
                { vast_budget, NULL },
        };

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(cases); i++) {
                struct bed *bed = bed_new(1, AE_GIB);
                struct bed_worker *worker = NULL;

                assert_int_equal(bed_rank(bed, 0, 0, 1, &worker), 0);
                bed_register(worker, cases[i].change);
                if (cases[i].words) {
                        assert_int_equal(worker->type, AE_CONTROL_ERROR);
                        assert_int_equal(worker->status, AE_EINVAL);
                        assert_says(worker->text, cases[i].words);
                } else {
                        assert_int_equal(worker->type, AE_CONTROL_REGISTERED);
                }
                bed_free(bed);
        }
}

static void half_cache(Autoep__Model *model)
{
        model->cache_len = 147 * 4096; /* the largest unit, not both */
}

/* Ranks that may hold everything need room for everything, whatever number says so. */
static void test_vast_allowance(void **state)
{
        struct bed *bed = bed_new(1, AE_GIB);
        struct bed_worker *worker = NULL;

        (void)state;
        for (uint32_t rank = 0; rank < 2; rank++) {
                assert_int_equal(bed_rank(bed, 0, rank, 2, &worker), 0);
                worker->worker->hold_len = UINT64_C(1) << 63;
        }
        for (uint32_t rank = 0; rank < 2; rank++)
                bed_register(&bed->workers[rank], half_cache);
        for (uint32_t rank = 0; rank < 2; rank++) {
                assert_int_equal(bed->workers[rank].type, AE_CONTROL_ERROR);
                assert_int_equal(bed->workers[rank].status, AE_EBUDGET);
                assert_says(bed->workers[rank].text, "cache_len 602112 on node 0");
        }
        bed_free(bed);
}

/* The largest model there may be, with as many ranks of it on one node. */
static void test_vast_overflow_by_default(void **state)
{
        struct ae_layout_unit unit = { .name = (char *)(uintptr_t)"u" };
        struct ae_layout layout = { .n_units = 1, .units = &unit,
                                    .n_grad = AE_LAYOUT_MAX_LEN / 2,
                                    .node_state_n = (uint64_t[]){ 0 },
                                    .node_weight_len = (uint64_t[]){ 0 } };
        Autoep__Model message = AUTOEP__MODEL__INIT;
        struct ae_model model = { .message = &message };
        struct bed *bed = bed_new(1, AE_GIB);
        struct ae_job job = { .core = bed->nodes[0].core, .layout = &layout, .model = &model,
                              .n_local = AE_WIRE_MAX_WORLD };

        (void)state;
        message.grad_wire = AE_DTYPE_F32;
        job.locals = calloc(job.n_local, sizeof(*job.locals));
        assert_non_null(job.locals);
        assert_int_equal(ae_memory_new(&job), AE_EINVAL);
        assert_says(ae_error_text(), "set overflow_len");
        free(job.locals);
        bed_free(bed);
}

/* ---- large records ------------------------------------------------------------------------ */

#define MANY_N 53000u

/* As many units of one tensor as take several msgs to register, to stage and to want. */
static void many_tensors(Autoep__Model *model)
{
        static Autoep__Tensor tensors[MANY_N];
        static Autoep__Tensor *pointers[MANY_N];
        static char names[MANY_N][24];
        static uint64_t dim = 4;
        static char none[] = "";

        for (uint32_t i = 0; i < MANY_N; i++) {
                autoep__tensor__init(&tensors[i]);
                (void)snprintf(names[i], sizeof(names[i]), "layer.%u.weight", i);
                tensors[i].name = tensors[i].unit = names[i];
                tensors[i].alias_of = none;
                tensors[i].dtype = AE_DTYPE_BF16;
                tensors[i].tensor_class = AE_CLASS_DENSE;
                tensors[i].dims = &dim;
                tensors[i].n_dims = 1;
                pointers[i] = &tensors[i];
        }
        model->tensors = pointers;
        model->n_tensors = MANY_N;
}

static void test_many_tensors(void **state)
{
        struct bed *bed = bed_new(2, AE_GIB);
        struct bed_worker *worker = NULL;

        (void)state;
        for (uint32_t rank = 0; rank < 2; rank++)
                assert_int_equal(bed_rank(bed, rank, rank, 2, &worker), 0);
        for (uint32_t rank = 0; rank < 2; rank++)
                bed_register(&bed->workers[rank], many_tensors);
        for (uint32_t rank = 0; rank < 2; rank++) {
                const struct ae_job *job = bed_job(bed, rank);

                assert_int_equal(bed->workers[rank].type, AE_CONTROL_REGISTERED);
                assert_int_equal(job->state, AE_JOB_LIVE);
                assert_int_equal(job->layout->n_units, MANY_N);
                for (uint32_t u = 0; u < MANY_N; u++) /* all are in the cache */
                        assert_int_equal(ae_local_entry_version(job->entries[u]), 0);
        }
        assert_int_equal(bed->n_refused, 0);
        bed_free(bed);
}

/* A record that Registered could not carry. */
static void long_names(Autoep__Model *model)
{
        static char name[MANY_N][508];
        static char none[] = "";

        many_tensors(model);
        for (uint32_t i = 0; i < MANY_N; i++) {
                memset(name[i], 'n', sizeof(name[i]) - 1);
                (void)snprintf(name[i], 8, "%07u", i);
                name[i][7] = '-';
                model->tensors[i]->name = model->tensors[i]->unit = name[i];
                model->tensors[i]->alias_of = i ? name[0] : none;
        }
}

static void test_record_too_long(void **state)
{
        struct bed *bed = bed_new(1, AE_GIB);
        struct bed_worker *worker = NULL;

        (void)state;
        assert_int_equal(bed_rank(bed, 0, 0, 1, &worker), 0);
        bed_register(worker, long_names);
        assert_int_equal(worker->type, AE_CONTROL_ERROR);
        assert_int_equal(worker->status, AE_EOVERFLOW);
        assert_says(worker->text, "the record of a model of 53000 tensors has");
        bed_free(bed);
}

static void other_flags(Autoep__Model *model)
{
        model->tensors[2]->group = 1;
}

static void test_ranks_differ(void **state)
{
        struct bed *bed = bed_new(2, AE_GIB);
        struct bed_worker *worker = NULL;

        (void)state;
        for (uint32_t rank = 0; rank < 2; rank++)
                assert_int_equal(bed_rank(bed, rank, rank, 2, &worker), 0);
        bed_register(&bed->workers[0], NULL);
        bed_register(&bed->workers[1], other_flags);
        for (uint32_t rank = 0; rank < 2; rank++) {
                assert_int_equal(bed->workers[rank].status, AE_EMISMATCH);
                assert_says(bed->workers[rank].text, "group of big is 0 on rank 0 and 1 on rank 1");
        }
        bed_free(bed);
}

static void test_lost_rank(void **state)
{
        struct bed *bed = bed_new_live(2);

        (void)state;
        bed_gone(&bed->workers[1], "its process ended");
        for (uint32_t node = 0; node < 1; node++) {
                assert_int_equal(bed_job(bed, node)->state, AE_JOB_FAILED);
                assert_says(bed_job(bed, node)->why,
                            "rank 1 (pid 4001, node 1) was lost in round 1");
                assert_says(bed_job(bed, node)->why, "its process ended");
        }
        assert_null(bed_job(bed, 1)); /* nobody looks at it there any more */
        bed_free(bed);
}

/* The job waits for nothing but a node; with it the wait's text is due and the job starts. */
static void test_node_comes_last(void **state)
{
        static const uint64_t late_ns = 300 * UINT64_C(1000000);
        struct bed *bed = bed_new(2, AE_GIB);
        struct bed_worker *worker = NULL;

        (void)state;
        bed_cut(bed, 0, 1);
        assert_int_equal(bed_rank(bed, 0, 0, 1, &worker), 0);
        bed_register(worker, NULL);
        bed_tick(bed, late_ns);
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_FORMING);
        bed_join(bed, 0, 1);
        bed_tick(bed, late_ns);
        assert_int_equal(worker->type, AE_CONTROL_REGISTERED);
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_LIVE);
        bed_free(bed);
}

static void test_wrong_messages(void **state)
{
        static const uint32_t types[] = { AE_CONTROL_HELLO, AE_CONTROL_HELLO_OK, AE_CONTROL_DONE,
                                          AE_CONTROL_ERROR, AE_CONTROL_JOIN, AE_CONTROL_START,
                                          AE_CONTROL_FAIL, AE_CONTROL_CTL_REQUEST };
        struct bed *bed = bed_new_live(1);

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(types); i++) {
                ProtobufCMessage *message = NULL;

                assert_int_equal(ae_control_unpack(types[i], "", 0, &message), 0);
                assert_int_equal(ae_core_worker_message(bed->workers[0].worker, types[i], message,
                                                        -1),
                                 AE_EPROTO);
                assert_says(ae_error_text(), "a worker may not send");
        }
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_LIVE);
        bed_free(bed);
}

/* A reader that is there before the job is live hears of it when it registers, and once. */
static void test_early_reader(void **state)
{
        static const struct bed_hello hello = { .version = AE_WIRE_VERSION, .uid = 1000,
                                                .job = "job", .token = "secret", .reader = true };
        struct bed *bed = bed_new(2, AE_GIB);
        struct bed_worker *rank, *early, *waiting;

        (void)state;
        assert_int_equal(bed_rank(bed, 0, 0, 1, &rank), 0);
        assert_int_equal(bed_hello(bed, 0, &hello, &early), 0);
        assert_int_equal(bed_hello(bed, 0, &hello, &waiting), 0);
        bed_run(bed);
        bed_register_reader(waiting);
        assert_int_equal(waiting->type, AE_CONTROL_HELLO_OK);
        bed_register(rank, NULL);
        bed_run(bed);
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_LIVE);
        assert_int_equal(waiting->type, AE_CONTROL_REGISTERED);
        assert_int_equal(early->type, AE_CONTROL_HELLO_OK);
        bed_register_reader(early);
        assert_int_equal(early->type, AE_CONTROL_REGISTERED);
        bed_register_reader(early);
        assert_int_equal(early->type, AE_CONTROL_ERROR);
        assert_int_equal(early->status, AE_ESTATE);
        bed_free(bed);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_early_reader),
                cmocka_unit_test(test_live),
                cmocka_unit_test(test_bad_hello),
                cmocka_unit_test(test_refused_first),
                cmocka_unit_test(test_refused_by_decider),
                cmocka_unit_test(test_given_up),
                cmocka_unit_test(test_given_up_too_late),
                cmocka_unit_test(test_leave_while_forming),
                cmocka_unit_test(test_leave_while_starting),
                cmocka_unit_test(test_join_before_the_end_is_heard),
                cmocka_unit_test(test_join_while_others_leave),
                cmocka_unit_test(test_budget),
                cmocka_unit_test(test_initial_values_too_large),
                cmocka_unit_test(test_bad_models),
                cmocka_unit_test(test_vast_models), cmocka_unit_test(test_vast_allowance),
                cmocka_unit_test(test_vast_overflow_by_default),
                cmocka_unit_test(test_many_tensors),
                cmocka_unit_test(test_record_too_long),
                cmocka_unit_test(test_ranks_differ),
                cmocka_unit_test(test_lost_rank),
                cmocka_unit_test(test_node_comes_last),
                cmocka_unit_test(test_wrong_messages),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
