/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Get and put between cores: what an owner or a requester may send beyond its share.
 */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"
#include "server/core/state.h"
#include "tests/unit/test-core-bed.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BIG 2u /* the tensor that is cut over two nodes */

#define assert_says(text, words)                                                                  \
        do {                                                                                      \
                if (!strstr((text), (words)))                                                     \
                        fail_msg("'%s' does not say '%s'", (text), (words));                      \
        } while (0)

static int memory(uint64_t len)
{
        int fd = memfd_create("bed-state", MFD_CLOEXEC);

        assert_true(fd >= 0);
        assert_int_equal(ftruncate(fd, (off_t)len), 0);
        return fd;
}

/* A worker's message as the session would pass it on: the core takes a copy over. */
static void say(struct bed_worker *worker, uint32_t type, const ProtobufCMessage *message, int fd)
{
        size_t len = ae_control_size(message);
        uint8_t *packed = malloc(len + 1);
        ProtobufCMessage *copy = NULL;

        assert_non_null(packed);
        ae_control_pack(message, packed);
        assert_int_equal(ae_control_unpack(type, packed, len, &copy), 0);
        free(packed);
        worker->type = 0;
        assert_int_equal(ae_core_worker_message(worker->worker, type, copy, fd), 0);
}

static Autoep__StateItem item_of(uint32_t tensor, uint32_t what, uint64_t n)
{
        Autoep__StateItem item = AUTOEP__STATE_ITEM__INIT;

        item.tensor = tensor;
        item.what = what;
        item.n = n;
        return item;
}

/* Asks for all masters of the cut tensor; what follows stays in the queue. */
static void get_big(struct bed_worker *worker)
{
        Autoep__StateItem item = item_of(BIG, MASTER, BED_BIG_N);
        Autoep__StateItem *items[] = { &item };
        Autoep__Get get = AUTOEP__GET__INIT;

        get.id = 7;
        get.items = items;
        get.n_items = 1;
        say(worker, AE_CONTROL_GET, &get.base, memory(BED_BIG_N * 4));
}

/* All its masters become 1. */
static void put_ones(struct bed_worker *worker, uint64_t version)
{
        static float ones[BED_BIG_N];
        Autoep__StateItem item = item_of(BIG, MASTER, BED_BIG_N);
        Autoep__StateItem *items[] = { &item };
        Autoep__Put put = AUTOEP__PUT__INIT;
        int fd = memory(sizeof(ones));

        for (uint32_t i = 0; i < BED_BIG_N; i++)
                ones[i] = 1;
        assert_int_equal(pwrite(fd, ones, sizeof(ones), 0), sizeof(ones));

        put.id = 8;
        put.version = version;
        put.items = items;
        put.n_items = 1;
        say(worker, AE_CONTROL_PUT, &put.base, fd);
}

static struct ae_request *request_of(const struct ae_job *job)
{
        assert_false(ae_list_empty(&job->requests));
        return ae_list_entry(job->requests.next, struct ae_request, link);
}

static void control(struct bed *bed, uint32_t from, uint32_t to, uint32_t type,
                    const ProtobufCMessage *message, int expected)
{
        struct ae_wire_head head = { .op = AE_WIRE_CONTROL, .type = (uint16_t)type,
                                     .job = bed_job(bed, to)->id };
        size_t len = sizeof(head) + ae_control_size(message);
        char *bytes = malloc(len);

        assert_non_null(bytes);
        memcpy(bytes, &head, sizeof(head));
        ae_control_pack(message, (uint8_t *)bytes + sizeof(head));
        assert_int_equal(ae_core_msg(bed->nodes[to].core, from, bytes, len), expected);
        free(bytes);
}

/* ---- more than its share ------------------------------------------------------------------ */

static void hold_own(struct ae_job *job, bool hold)
{
        for (uint32_t i = 0; i < job->n_owned; i++)
                job->owned[i].n_tasks = hold;
}

/* Notes for what this node itself still has to bring. */
static void test_surplus_notes(void **state)
{
        struct bed *bed = bed_new_live(2);
        struct ae_job *job = bed_job(bed, 0);
        struct ae_request *request;

        (void)state;
        hold_own(job, true); /* its own part waits for an apply */
        get_big(&bed->workers[0]);
        request = request_of(job);
        for (uint32_t i = 0; i < 3 && job->state == AE_JOB_LIVE; i++)
                ae_core_notify(bed->nodes[0].core, 1, request->region->mem, 0, 4,
                               ae_note_state(job->id, job->version, request->token));
        assert_int_equal(job->state, AE_JOB_FAILED);
        assert_says(job->why, "node 1");
        assert_int_equal(bed->workers[0].status, AE_EPROTO);
        hold_own(job, false);
        bed_free(bed);
}

/* An owner that cannot, while this node's own part still waits. */
static void test_fetch_refused(void **state)
{
        struct bed *bed = bed_new_live(2);
        struct ae_job *job = bed_job(bed, 0);
        Autoep__FetchReply reply = AUTOEP__FETCH_REPLY__INIT;
        char text[] = "it cannot";

        (void)state;
        hold_own(job, true);
        get_big(&bed->workers[0]);
        reply.token = request_of(job)->token;
        reply.status = AE_EBUDGET;
        reply.text = text;
        control(bed, 1, 0, AE_CONTROL_FETCH_REPLY, &reply.base, 0);
        assert_int_equal(bed->workers[0].status, AE_EBUDGET);
        hold_own(job, false);
        ae_state_pump(job);
        bed_run(bed);
        assert_int_equal(job->state, AE_JOB_LIVE);
        bed_free(bed);
}

/* One element of the cut tensor at a time, from its two ends and so from both owners. */
static void get_many(struct bed_worker *worker, uint32_t n)
{
        Autoep__StateItem *items = calloc(n, sizeof(*items));
        Autoep__StateItem **pointers = calloc(n, sizeof(*pointers));
        Autoep__Get get = AUTOEP__GET__INIT;

        assert_true(items && pointers);
        for (uint32_t i = 0; i < n; i++) {
                items[i] = item_of(BIG, MASTER, 1);
                items[i].first = i % 2 ? BED_BIG_N - 1 - i : i;
                pointers[i] = &items[i];
        }
        get.id = 7;
        get.items = pointers;
        get.n_items = n;
        worker->type = 0;
        say(worker, AE_CONTROL_GET, &get.base, memory(n * 4));
        free(items);
        free(pointers);
}

/* Gets that wait at an owner have a bound there; what is beyond is refused, the others go on. */
static void test_too_many_fetches(void **state)
{
        struct bed *bed = bed_new_live(2);
        struct ae_job *job = bed_job(bed, 0);
        struct bed_worker *worker = &bed->workers[1];
        uint32_t n = 0;

        (void)state;
        hold_own(job, true);
        do {
                get_many(worker, 10000);
                bed_run(bed);
                assert_true(++n < 1000);
        } while (worker->type != AE_CONTROL_ERROR);
        assert_int_equal(worker->status, AE_EBUDGET);
        assert_says(worker->text, "cannot get state from node 0: gets of node 1 that wait there");
        assert_in_range(job->peers[1].deferred_len, AE_DEFERRED_MAX / 2, AE_DEFERRED_MAX);
        assert_in_range(n, 20, 500);
        hold_own(job, false);
        ae_state_pump(job);
        bed_run(bed);
        assert_int_equal(worker->type, AE_CONTROL_DONE);
        assert_int_equal(job->peers[1].deferred_len, 0);
        assert_true(ae_list_empty(&bed_job(bed, 1)->requests));
        get_many(worker, 100);
        bed_run(bed);
        assert_int_equal(worker->type, AE_CONTROL_DONE);
        assert_int_equal(job->state, AE_JOB_LIVE);
        bed_free(bed);
}

/* A put is not what an owner may refuse as a get, and none says twice that it has staged. */
static void test_replies_to_a_put(void **state)
{
        struct bed *bed = bed_new_live(2);
        struct ae_job *job = bed_job(bed, 0);
        Autoep__FetchReply refusal = AUTOEP__FETCH_REPLY__INIT;
        Autoep__StageReply reply = AUTOEP__STAGE_REPLY__INIT;
        char text[] = "";

        (void)state;
        put_ones(&bed->workers[0], 0);
        refusal.token = reply.token = request_of(job)->token;
        refusal.status = AE_EINVAL;
        refusal.text = reply.text = text;
        control(bed, 1, 0, AE_CONTROL_FETCH_REPLY, &refusal.base, AE_EPROTO);
        control(bed, 1, 0, AE_CONTROL_STAGE_REPLY, &reply.base, AE_EPROTO); /* it has no bytes */
        bed_run(bed);
        assert_int_equal(bed->workers[0].type, AE_CONTROL_DONE);
        assert_int_equal(job->version, 1);
        bed_free(bed);
}

/* ---- memory -------------------------------------------------------------------------------- */

/* Many readers at once: as many as there is room for are served, the others hear the figures. */
static void test_transfers_count(void **state)
{
        static const struct bed_hello hello = { .version = AE_WIRE_VERSION, .uid = 1000,
                                                .job = "job", .token = "secret", .reader = true };
        struct bed *bed = bed_new_live(2);
        struct ae_job *job = bed_job(bed, 0);
        struct ae_core *core = bed->nodes[0].core;
        uint64_t before = core->memory_len;
        struct bed_worker *readers[6];

        (void)state;
        for (uint32_t i = 0; i < 6; i++) {
                assert_int_equal(bed_hello(bed, 0, &hello, &readers[i]), 0);
                bed_register_reader(readers[i]);
        }
        core->options.memory_len = before + 3 * ae_align_up(BED_BIG_N * 4, 4096) + 100;
        for (uint32_t i = 0; i < 6; i++)
                get_big(readers[i]);
        assert_int_equal(core->memory_len, before + 3 * ae_align_up(BED_BIG_N * 4, 4096));
        assert_int_equal(job->memory_len, core->memory_len);
        bed_run(bed);
        for (uint32_t i = 0; i < 6; i++) {
                if (i < 3) {
                        assert_int_equal(readers[i]->type, AE_CONTROL_DONE);
                        continue;
                }
                assert_int_equal(readers[i]->status, AE_EBUDGET);
                assert_says(readers[i]->text, "a transfer of 1200000 bytes of state does not fit "
                                              "on node 0: job 'job' has ");
        }
        assert_int_equal(core->memory_len, before);
        get_big(readers[5]);
        bed_run(bed);
        assert_int_equal(readers[5]->type, AE_CONTROL_DONE);
        bed_free(bed);
}

/* An owner without room calls the put off for all. */
static void test_no_room_to_stage(void **state)
{
        struct bed *bed = bed_new_live(2);
        uint64_t before[2];

        (void)state;
        for (uint32_t node = 0; node < 2; node++)
                before[node] = bed->nodes[node].core->memory_len;
        bed->nodes[1].core->options.memory_len = before[1] + 100;
        put_ones(&bed->workers[0], 0);
        bed_run(bed);
        assert_int_equal(bed->workers[0].status, AE_EBUDGET);
        assert_says(bed->workers[0].text, "does not fit on node 1");
        assert_int_equal(bed_job(bed, 0)->version, 0);
        for (uint32_t node = 0; node < 2; node++)
                bed->nodes[node].core->options.memory_len = AE_GIB;
        put_ones(&bed->workers[0], 0);
        bed_run(bed);
        assert_int_equal(bed->workers[0].type, AE_CONTROL_DONE);
        for (uint32_t node = 0; node < 2; node++)
                assert_int_equal(bed->nodes[node].core->memory_len, before[node]);
        bed_free(bed);
}

/* ---- all or none -------------------------------------------------------------------------- */

static float master_of(const struct bed *bed, uint32_t node)
{
        const struct ae_job *job = bed_job(bed, node);
        const struct ae_region *region;
        uint64_t off;
        float value;

        for (uint64_t first = 0; first < BED_BIG_N; first += 4096) {
                if (!ae_state_owner(job, BIG, first))
                        continue;
                region = ae_state_locate(job, BIG, MASTER, first, &off);
                memcpy(&value, region->base + off, sizeof(value));
                return value;
        }
        fail_msg("node %u owns nothing of the tensor", node);
        return 0;
}

/* What is being sent from a slice is that of one version to its last byte. */
static void test_put_waits_for_readers(void **state)
{
        struct bed *bed = bed_new_live(2);
        struct ae_job *job = bed_job(bed, 1);

        (void)state;
        for (uint32_t i = 0; i < job->n_owned; i++)
                job->owned[i].n_puts = 1;
        put_ones(&bed->workers[0], 0);
        bed_run(bed);
        assert_int_equal(bed->workers[0].type, AE_CONTROL_DONE);
        assert_int_equal(job->version, 1);
        assert_true(master_of(bed, 0) == 1);
        assert_true(master_of(bed, 1) == 0);
        get_big(&bed->workers[0]);
        bed_run(bed);
        assert_int_equal(bed->workers[0].type, 0); /* nobody sees the half of it */
        for (uint32_t i = 0; i < job->n_owned; i++)
                ae_serve_put_done(&job->owned[i]);
        bed_run(bed);
        assert_true(master_of(bed, 1) == 1);
        assert_int_equal(bed->workers[0].type, AE_CONTROL_DONE);
        bed_free(bed);
}

/* Nor does a put write where the last step's apply is still at work. */
static void test_put_waits_for_apply(void **state)
{
        struct bed *bed = bed_new_live(2);
        struct ae_job *job = bed_job(bed, 1);
        struct ae_wire_head commit;

        (void)state;
        job->n_applying = 1;
        put_ones(&bed->workers[0], 0);
        bed_run(bed);
        assert_true(job->put_prepared);
        assert_int_equal(bed->workers[0].type, 0);
        commit = ae_job_head(job, AE_WIRE_COMMIT); /* one that it has not prepared */
        commit.type = job->noted;
        assert_int_equal(bed_inject(bed, 0, 1, &commit, sizeof(commit)), AE_EPROTO);
        assert_int_equal(job->version, 0);
        ae_apply_one_done(job);
        bed_run(bed);
        assert_int_equal(bed->workers[0].type, AE_CONTROL_DONE);
        assert_true(master_of(bed, 0) == 1 && master_of(bed, 1) == 1);
        bed_free(bed);
}

/* An owner that has heard of the put answers beside one that has not. */
static void test_get_beside_a_put(void **state)
{
        struct bed *bed = bed_new_live(2);
        struct ae_job *job = bed_job(bed, 0);
        struct ae_request *request;

        (void)state;
        hold_own(job, true);
        get_big(&bed->workers[0]);
        bed_run(bed); /* node 1 has answered */
        request = request_of(job);
        assert_int_equal(request->due[1], 0);
        request->stamp = 1; /* at the next version */
        hold_own(job, false);
        ae_state_pump(job);
        assert_int_equal(bed->workers[0].type, 0);
        assert_int_equal(request->due[1], 1); /* asked again */
        bed_run(bed);
        assert_int_equal(bed->workers[0].type, AE_CONTROL_DONE);
        bed_free(bed);
}

/* ---- a step and a put ---------------------------------------------------------------------- */

/* Writes the request for the open round and posts it; the daemon does not look yet. */
static void ask(struct bed_worker *worker)
{
        struct ae_local_page *page = bed_page(worker);
        uint32_t tail = atomic_load(&page->sq_tail);
        uint64_t round = atomic_load(&bed_job(worker->bed, worker->node)->page->round);

        page->step.round = round;
        page->step.ask.n_groups = 1;
        page->sq[tail % AE_LOCAL_SQ_LEN] = (struct ae_local_sqe){ .op = AE_SQ_STEP,
                                                                   .token = round };
        atomic_store(&page->sq_tail, tail + 1);
}

static void look(struct bed *bed)
{
        for (uint32_t i = 0; i < bed->n_workers; i++)
                assert_int_equal(ae_core_worker_ring(bed->workers[i].worker), 0);
        bed_run(bed);
}

/* A step asked for while a put is prepared: the put takes the round, and the rank asks again before
 * its daemon has looked at the first request. */
static void test_step_during_put(void **state)
{
        struct bed *bed = bed_new_live(2);
        struct ae_job *job = bed_job(bed, 0);

        (void)state;
        bed_job(bed, 1)->n_applying = 1; /* so that the put is not committed at once */
        put_ones(&bed->workers[1], 0);
        bed_run(bed);
        assert_true(job->put_prepared);
        ask(&bed->workers[0]);
        look(bed);
        assert_int_equal(job->n_closed, 0);
        ae_apply_one_done(bed_job(bed, 1));
        bed_run(bed);
        assert_int_equal(bed->workers[1].type, AE_CONTROL_DONE);
        assert_int_equal(job->round, 2);
        assert_int_not_equal(job->page->verdict.kind, AE_VERDICT_PUT);
        ask(&bed->workers[0]);
        ask(&bed->workers[1]);
        look(bed);
        assert_int_equal(job->round, 3);
        assert_int_equal(job->page->verdict.kind, AE_VERDICT_APPLIED);
        assert_int_equal(job->page->verdict.round, 2);
        assert_int_equal(job->version, 2);
        bed_free(bed);
}

/* The other way round: who has asked for the step keeps its round, and the put is refused. */
static void test_put_during_step(void **state)
{
        struct bed *bed = bed_new_live(2);
        struct ae_job *job = bed_job(bed, 0);

        (void)state;
        ask(&bed->workers[1]); /* known to node 1 alone, as far as the put's node can tell */
        assert_int_equal(ae_core_worker_ring(bed->workers[1].worker), 0);
        put_ones(&bed->workers[0], 0);
        bed_run(bed);
        assert_int_equal(bed->workers[0].type, AE_CONTROL_ERROR);
        assert_int_equal(bed->workers[0].status, AE_ESTATE);
        ask(&bed->workers[0]);
        look(bed);
        assert_int_equal(job->page->verdict.kind, AE_VERDICT_APPLIED);
        assert_int_equal(job->page->verdict.round, 1);
        assert_true(master_of(bed, 0) == 0 && master_of(bed, 1) == 0);
        bed_free(bed);
}

/* A pause beyond the limit is refused by name, one at it is passed on, and they never wrap. */
static void test_long_pause(void **state)
{
        struct bed *bed = bed_new_live(2);
        Autoep__Pause pause = AUTOEP__PAUSE__INIT;

        (void)state;
        pause.id = 9;
        pause.reason = (char *)(uintptr_t)"a long walk";
        pause.seconds = AE_WIRE_PAUSE_MAX_S + 1;
        say(&bed->workers[1], AE_CONTROL_PAUSE, &pause.base, -1);
        assert_int_equal(bed->workers[1].status, AE_EINVAL);
        assert_says(bed->workers[1].text, "a pause of 604801 s: the limit is 604800");
        pause.seconds = AE_WIRE_PAUSE_MAX_S;
        bed_job(bed, 0)->pause_ns = UINT64_MAX - 1;
        say(&bed->workers[1], AE_CONTROL_PAUSE, &pause.base, -1);
        assert_int_equal(bed->workers[1].type, AE_CONTROL_DONE);
        bed_run(bed);
        assert_true(bed_job(bed, 0)->pause_ns == UINT64_MAX);
        bed_free(bed);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_surplus_notes), cmocka_unit_test(test_long_pause),
                cmocka_unit_test(test_fetch_refused), cmocka_unit_test(test_too_many_fetches),
                cmocka_unit_test(test_replies_to_a_put),
                cmocka_unit_test(test_transfers_count),
                cmocka_unit_test(test_no_room_to_stage),
                cmocka_unit_test(test_put_waits_for_readers),
                cmocka_unit_test(test_put_waits_for_apply),
                cmocka_unit_test(test_get_beside_a_put),
                cmocka_unit_test(test_step_during_put),
                cmocka_unit_test(test_put_during_step),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
