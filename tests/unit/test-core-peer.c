/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a peer may send: hot messages cut at every length, verdicts from one who decides nothing or
 * at the wrong time, control messages that are well formed and make no sense, and random bytes. The
 * core refuses with AE_EPROTO or fails the job; it never ends the daemon.
 */
#include "tests/lib/invent.h"
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"
#include "tests/unit/test-core-bed.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MSG_MAX 4096u

union msg {
        struct ae_wire_head head;
        struct ae_wire_want want;
        struct ae_wire_credit credit;
        struct ae_wire_end end;
        struct ae_wire_vote vote;
        struct ae_wire_prepare prepare;
        struct ae_wire_xcredit xcredit;
        struct ae_wire_closed closed;
        struct ae_wire_waiting waiting;
        char bytes[MSG_MAX];
};

static struct ae_wire_head head_of(const struct bed *bed, uint32_t to, enum ae_wire_op op)
{
        return ae_job_head(bed_job(bed, to), op);
}

/* A message as long as its op wants it, with one item of what it has a list of. */
static size_t make(const struct bed *bed, uint32_t to, uint16_t op, union msg *msg)
{
        *msg = (union msg){ .head = head_of(bed, to, op) };
        switch (op) {
        case AE_WIRE_WANT:
                msg->want.n_items = 1;
                return sizeof(msg->want) + sizeof(struct ae_wire_want_item);
        case AE_WIRE_CREDIT:
                msg->credit.n_slots = 1;
                return sizeof(msg->credit) + 4;
        case AE_WIRE_END:
                msg->end.n_groups = 1;
                msg->end.n_units = BED_UNITS;
                return sizeof(msg->end) + 1;
        case AE_WIRE_VOTE:
                msg->vote.n_counts = BED_BIAS_N;
                return sizeof(msg->vote) + BED_BIAS_N * 8;
        case AE_WIRE_PREPARE:
                msg->prepare.n_counts = BED_BIAS_N;
                msg->prepare.verdict.kind = AE_VERDICT_SKIPPED;
                return sizeof(msg->prepare) + BED_BIAS_N * 8;
        case AE_WIRE_XCREDIT:
                return sizeof(msg->xcredit);
        case AE_WIRE_CLOSED:
                return sizeof(msg->closed);
        case AE_WIRE_WAITING:
                return sizeof(msg->waiting);
        }
        return sizeof(msg->head);
}

static const uint16_t hot_ops[] = { AE_WIRE_WANT, AE_WIRE_CREDIT, AE_WIRE_END, AE_WIRE_VOTE,
                                    AE_WIRE_PREPARE, AE_WIRE_PREPARED, AE_WIRE_COMMIT,
                                    AE_WIRE_XCREDIT, AE_WIRE_CLOSED, AE_WIRE_WAITING };

static void check_truncated(uint32_t from, uint32_t to)
{
        struct bed *bed = bed_new_live(2);
        union msg msg;

        for (size_t i = 0; i < AE_ARRAY_LEN(hot_ops); i++) {
                size_t len = make(bed, to, hot_ops[i], &msg);

                for (size_t cut = 0; cut < len; cut++) {
                        uint32_t before = bed->n_done;
                        int r = bed_inject(bed, from, to, &msg, cut);

                        if (r != AE_EPROTO)
                                fail_msg("op %u cut to %zu of %zu bytes gave %d", hot_ops[i], cut,
                                         len, r);
                        assert_int_equal(bed->n_done, before);
                }
        }
        assert_int_equal(bed_job(bed, to)->state, AE_JOB_LIVE);
        bed_free(bed);
}

static void test_truncated(void **state)
{
        (void)state;
        check_truncated(1, 0);
        check_truncated(0, 1);
}

static void assert_breach(struct bed *bed, uint32_t from, uint32_t to, const union msg *msg,
                          size_t len)
{
        int r = bed_inject(bed, from, to, msg, len);

        if (r != AE_EPROTO)
                fail_msg("op %u from node %u to node %u gave %d", msg->head.op, from, to, r);
        for (uint32_t node = 0; node < bed->n_nodes; node++)
                assert_int_equal(bed_job(bed, node)->state, AE_JOB_LIVE);
        assert_int_equal(bed->n_refused, 0);
}

/* Only node 0 decides. */
static void test_not_the_decider(void **state)
{
        struct bed *bed = bed_new_live(3);
        union msg msg;
        size_t len;

        (void)state;
        len = make(bed, 1, AE_WIRE_PREPARE, &msg);
        for (uint32_t kind = 0; kind <= AE_VERDICT_REFUSED + 1; kind++) {
                msg.prepare.verdict.kind = kind;
                assert_breach(bed, 2, 1, &msg, len);
                assert_breach(bed, 1, 0, &msg, len);
        }
        len = make(bed, 1, AE_WIRE_COMMIT, &msg);
        assert_breach(bed, 2, 1, &msg, len);
        assert_breach(bed, 1, 0, &msg, len);
        len = make(bed, 1, AE_WIRE_VOTE, &msg);
        assert_breach(bed, 0, 1, &msg, len);
        assert_breach(bed, 2, 1, &msg, len);
        len = make(bed, 1, AE_WIRE_PREPARED, &msg);
        assert_breach(bed, 2, 1, &msg, len);
        len = make(bed, 1, AE_WIRE_WAITING, &msg);
        assert_breach(bed, 2, 1, &msg, len);
        bed_free(bed);
}

/* Node 0, but at the wrong time. */
static void test_decider_out_of_turn(void **state)
{
        struct bed *bed = bed_new_live(2);
        union msg msg;
        size_t len;

        (void)state;
        len = make(bed, 1, AE_WIRE_COMMIT, &msg);
        assert_breach(bed, 0, 1, &msg, len);
        len = make(bed, 1, AE_WIRE_PREPARE, &msg); /* nobody has voted */
        for (uint32_t kind = 0; kind <= AE_VERDICT_REFUSED + 1; kind++) {
                if (kind == AE_VERDICT_PUT)
                        continue;
                msg.prepare.verdict.kind = kind;
                assert_breach(bed, 0, 1, &msg, len);
        }
        len = make(bed, 0, AE_WIRE_PREPARED, &msg); /* of a put that was called off: ignored */
        assert_int_equal(bed_inject(bed, 1, 0, &msg, len), 0);
        assert_int_equal(bed->n_refused, 0);
        bed_free(bed);
}

static void test_bad_fields(void **state)
{
        struct bed *bed = bed_new_live(3);
        struct ae_wire_want_item item = { .unit = BED_UNITS };
        union msg msg;
        size_t len;

        (void)state;
        len = make(bed, 0, AE_WIRE_WANT, &msg);
        memcpy(msg.want.items, &item, sizeof(item));
        assert_breach(bed, 1, 0, &msg, len);
        item = (struct ae_wire_want_item){ .first = UINT64_MAX, .len = 2 };
        memcpy(msg.want.items, &item, sizeof(item));
        assert_breach(bed, 1, 0, &msg, len);
        item = (struct ae_wire_want_item){ .token = 1u << 24 };
        memcpy(msg.want.items, &item, sizeof(item));
        assert_breach(bed, 1, 0, &msg, len);
        msg.want.n_items = UINT32_MAX;
        assert_breach(bed, 1, 0, &msg, len);
        len = make(bed, 0, AE_WIRE_CREDIT, &msg); /* no slot is away */
        assert_breach(bed, 1, 0, &msg, len);
        msg.credit.n_slots = UINT32_MAX;
        assert_breach(bed, 1, 0, &msg, len);
        len = make(bed, 0, AE_WIRE_END, &msg);
        msg.end.n_groups = 2;
        assert_breach(bed, 1, 0, &msg, len);
        msg.end.n_groups = 1;
        msg.end.n_units = BED_UNITS + 1;
        assert_breach(bed, 1, 0, &msg, len);
        len = make(bed, 0, AE_WIRE_CLOSED, &msg);
        msg.closed.rank = 3;
        assert_breach(bed, 1, 0, &msg, len);
        len = make(bed, 0, AE_WIRE_XCREDIT, &msg);
        msg.xcredit.src = 3;
        assert_breach(bed, 1, 0, &msg, len);
        msg.xcredit.src = 0;
        msg.xcredit.dst = 2; /* another node's rank */
        assert_breach(bed, 1, 0, &msg, len);
        msg.xcredit.dst = 1;
        msg.xcredit.consumed = 1; /* more than was sent */
        assert_breach(bed, 1, 0, &msg, len);
        msg.head = head_of(bed, 0, 12);
        assert_breach(bed, 1, 0, &msg, len);
        len = make(bed, 1, AE_WIRE_WAITING, &msg);
        msg.waiting.n_present = bed_job(bed, 1)->world + 1;
        assert_breach(bed, 0, 1, &msg, len);
        bed_free(bed);
}

/* A version that is not there yet: of as many slices as a cache can fetch. */
static void test_wants_without_end(void **state)
{
        struct bed *bed = bed_new_live(2);
        const struct ae_job *job = bed_job(bed, 0);
        struct ae_wire_want_item item = { .len = job->layout->units[0].len };
        uint64_t n = 0;
        union msg msg;
        size_t len = make(bed, 0, AE_WIRE_WANT, &msg);

        (void)state;
        memcpy(msg.want.items, &item, sizeof(item));
        msg.head.round = job->version + 2;
        assert_breach(bed, 1, 0, &msg, len);
        assert_int_equal(job->peers[1].n_serves, 0);
        msg.head.round = job->version + 1;
        while (bed_inject(bed, 1, 0, &msg, len) == 0)
                assert_in_range(++n, 1, job->serves_max);
        assert_in_range(n, job->n_fetches, job->serves_max);
        assert_breach(bed, 1, 0, &msg, len);
        assert_int_equal(job->peers[0].n_serves, 0); /* each its own */
        bed_free(bed);
}

/* A part of an own slice, put by node 1 into slot 0 of its inbox on node 0. */
static void put_part(struct bed *bed, const struct ae_owned *owned)
{
        const struct ae_job *job = owned->job;
        uint64_t n = AE_MIN(job->layout->slices[owned->slice].n, (uint64_t)job->part_n);

        ae_core_notify(bed->nodes[0].core, 1, job->inbox->mem, ae_memory_inbox_off(job, 1),
                       n * ae_dtype_size(job->model->message->grad_wire),
                       ae_note_part(job->id, job->round, 0, owned->slice, 0));
}

static void test_slot_twice(void **state)
{
        struct bed *bed = bed_new_live(2);
        const struct ae_job *job = bed_job(bed, 0);
        const struct ae_owned *owned[2] = { NULL, NULL };
        uint32_t n = 0;

        (void)state;
        for (uint32_t i = 0; i < job->n_owned && n < 2; i++) {
                if (job->owned[i].trainable)
                        owned[n++] = &job->owned[i];
        }
        assert_int_equal(n, 2);
        put_part(bed, owned[0]);
        assert_int_equal(job->state, AE_JOB_LIVE);
        put_part(bed, owned[1]);
        assert_int_equal(job->state, AE_JOB_FAILED);
        assert_non_null(strstr(job->why, "does not fit"));
        bed_free(bed);
}

/* Sums of squares that no gradients give: added up they would leave their limbs. */
static void test_bad_norms(void **state)
{
        const uint64_t end = UINT64_C(1) << (AE_WIRE_NODE_NORM2 - AE_LONGACC_LOW) % 64;
        struct bed *bed = bed_new_live(3);
        union msg msg;
        size_t len = make(bed, 0, AE_WIRE_VOTE, &msg);

        (void)state;
        msg.vote.norm2.limb[9] = end;
        assert_breach(bed, 1, 0, &msg, len);
        msg.vote.norm2.limb[9] = UINT64_MAX;
        assert_breach(bed, 1, 0, &msg, len);
        msg.vote.norm2.limb[9] = 0;
        msg.vote.expert_norm2.limb[9] = end;
        assert_breach(bed, 1, 0, &msg, len);
        memset(&msg.vote.norm2, 0xff, sizeof(msg.vote.norm2));
        msg.vote.norm2.limb[9] = end - 1;
        msg.vote.expert_norm2 = msg.vote.norm2;
        assert_int_equal(bed_inject(bed, 1, 0, &msg, len), 0);
        bed_free(bed);
}

/* Sums of counts that no ranks give: those of all nodes would wrap. One rank a node here. */
static void test_bad_counts(void **state)
{
        struct bed *bed = bed_new_live(3);
        union msg msg;
        size_t len = make(bed, 0, AE_WIRE_VOTE, &msg);

        (void)state;
        msg.vote.tokens = UINT64_MAX;
        assert_breach(bed, 1, 0, &msg, len);
        msg.vote.tokens = AE_WIRE_COUNT_MAX + 1;
        assert_breach(bed, 1, 0, &msg, len);
        msg.vote.tokens = AE_WIRE_COUNT_MAX;
        msg.vote.micro_batches = UINT64_MAX;
        assert_breach(bed, 1, 0, &msg, len);
        msg.vote.micro_batches = 1;
        msg.vote.counts[BED_BIAS_N - 1] = UINT64_MAX;
        assert_breach(bed, 1, 0, &msg, len);
        msg.vote.counts[BED_BIAS_N - 1] = AE_WIRE_COUNT_MAX;
        assert_int_equal(bed_inject(bed, 1, 0, &msg, len), 0);
        bed_free(bed);
}

static void test_twice(void **state)
{
        struct bed *bed = bed_new_live(3);
        union msg msg;
        size_t len = make(bed, 0, AE_WIRE_END, &msg);

        (void)state;
        assert_int_equal(bed_inject(bed, 1, 0, &msg, len), 0);
        assert_breach(bed, 1, 0, &msg, len);
        len = make(bed, 0, AE_WIRE_VOTE, &msg);
        assert_int_equal(bed_inject(bed, 1, 0, &msg, len), 0);
        assert_breach(bed, 1, 0, &msg, len);
        bed_free(bed);
}

/* Of another life of the job: dropped without a word. */
static void test_stale(void **state)
{
        struct bed *bed = bed_new_live(2);
        uint32_t before = bed->n_done;
        union msg msg;

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(hot_ops); i++) {
                size_t len = make(bed, 0, hot_ops[i], &msg);

                msg.head.epoch++;
                assert_int_equal(bed_inject(bed, 1, 0, &msg, len), 0);
                msg.head.epoch--;
                msg.head.job = 200;
                assert_int_equal(bed_inject(bed, 1, 0, &msg, len), 0);
        }
        assert_int_equal(bed->n_done, before);
        bed_free(bed);
}

/* ---- random ----------------------------------------------------------------------------- */

/* A new bed where the old one's job has ended; the executor would have closed the connection. */
static struct bed *renew(struct bed *bed, uint32_t n_nodes)
{
        for (uint32_t node = 0; node < n_nodes; node++) {
                const struct ae_job *job = bed_job(bed, node);

                if (job && job->state == AE_JOB_LIVE && bed->n_refused == 0)
                        continue;
                bed_free(bed);
                return bed_new_live(n_nodes);
        }
        return bed;
}

static void scribble(void *data, size_t len)
{
        uint8_t *bytes = data;

        for (size_t i = 0; i < len; i++)
                bytes[i] = rand() % 3 ? 0 : (uint8_t)(rand() % (rand() % 2 ? 4 : 256));
}

static void test_random_hot(void **state)
{
        struct bed *bed = bed_new_live(2);
        union msg msg;

        (void)state;
        srand(51);
        for (uint32_t i = 0; i < 20000; i++) {
                uint32_t to = (uint32_t)rand() % 2;
                uint16_t op = (uint16_t)(2 + rand() % 11);
                size_t len = make(bed, to, op, &msg);
                size_t take = sizeof(msg.head) + (size_t)rand() % (len - sizeof(msg.head) + 32);

                if (rand() % 4)
                        scribble(msg.bytes + sizeof(msg.head), sizeof(msg) - sizeof(msg.head));
                msg.head.round += (uint64_t)(rand() % 8 == 0);
                (void)bed_inject(bed, 1 - to, to, &msg, rand() % 2 ? len : take);
                bed = renew(bed, 2);
        }
        bed_free(bed);
}

static void test_random_bytes(void **state)
{
        struct bed *bed = bed_new_live(2);
        char bytes[200];

        (void)state;
        srand(52);
        for (uint32_t i = 0; i < 20000; i++) {
                scribble(bytes, sizeof(bytes));
                (void)bed_inject(bed, 1, 0, bytes, (size_t)rand() % sizeof(bytes));
                bed = renew(bed, 2);
        }
        bed_free(bed);
}

/* ---- joins ------------------------------------------------------------------------------ */

/* Its answer stays in the queue: node 1 knows no such rank and would say so. */
static int send_join(struct bed *bed, const char *job, uint32_t rank, uint32_t world, uint32_t node)
{
        Autoep__Join join = AUTOEP__JOIN__INIT;
        struct ae_wire_head head = { .op = AE_WIRE_CONTROL, .type = AE_CONTROL_JOIN,
                                     .job = AE_WIRE_NONE };
        char bytes[sizeof(head) + 200];

        join.job = (char *)(uintptr_t)job;
        join.rank = rank;
        join.world = world;
        join.node = node;
        assert_true(ae_control_size(&join.base) <= 200);
        memcpy(bytes, &head, sizeof(head));
        ae_control_pack(&join.base, (uint8_t *)bytes + sizeof(head));
        return ae_core_msg(bed->nodes[0].core, 1, bytes,
                           sizeof(head) + ae_control_size(&join.base));
}

static void test_bad_joins(void **state)
{
        struct bed *bed = bed_new(2, AE_GIB);

        (void)state;
        assert_int_equal(send_join(bed, "", 0, 1, 1), AE_EPROTO);
        assert_int_equal(send_join(bed, "j", 0, 0, 1), AE_EPROTO);
        assert_int_equal(send_join(bed, "j", 2, 2, 1), AE_EPROTO);
        assert_int_equal(send_join(bed, "j", UINT32_MAX, 2, 1), AE_EPROTO);
        assert_int_equal(send_join(bed, "j", 0, AE_WIRE_MAX_WORLD + 1, 1), AE_EPROTO);
        assert_int_equal(send_join(bed, "j", 0, UINT32_MAX, 1), AE_EPROTO);
        assert_int_equal(send_join(bed, "j", 0, 2, 0), AE_EPROTO); /* in another node's name */
        assert_null(bed_job(bed, 0));
        assert_int_equal(send_join(bed, "j", 1, 2, 1), 0);
        assert_int_equal(bed_job(bed, 0)->n_joined, 1);
        bed_free(bed);
}

/* As many jobs as there are ids, then one more: refused, here and over there. */
static void test_too_many_jobs(void **state)
{
        struct bed *bed = bed_new(2, AE_GIB);
        struct bed_worker *worker = NULL;
        char name[16];

        (void)state;
        for (uint32_t i = 0; i <= AE_WIRE_MAX_JOBS; i++) {
                (void)snprintf(name, sizeof(name), "job-%u", i);
                assert_int_equal(send_join(bed, name, 0, 1, 1), 0);
        }
        assert_true(ae_core_jobs_full(bed->nodes[0].core));
        assert_int_equal(bed_rank(bed, 0, 0, 1, &worker), AE_EOVERFLOW);
        assert_int_equal(bed_rank(bed, 1, 0, 1, &worker), 0);
        assert_int_equal(worker->type, AE_CONTROL_ERROR);
        assert_int_equal(worker->status, AE_EOVERFLOW);
        bed_free(bed);
}

/* ---- control messages -------------------------------------------------------------------- */

static uint32_t draw(void *user)
{
        (void)user;
        return (uint32_t)rand();
}

static int send_invented(struct bed *bed, uint32_t from, uint32_t to)
{
        struct invent invent = { .draw = draw };
        uint32_t type;
        ProtobufCMessage *message = invent_control(&invent, &type);
        size_t len = ae_control_size(message);
        char *bytes = calloc(1, sizeof(struct ae_wire_head) + len);
        const struct ae_job *job = bed_job(bed, to);
        struct ae_wire_head head = { .op = AE_WIRE_CONTROL, .type = (uint16_t)type,
                                     .job = job && rand() % 8 ? job->id : (uint32_t)rand() % 300,
                                     .epoch = 1 };
        int r;

        assert_non_null(bytes);
        memcpy(bytes, &head, sizeof(head));
        ae_control_pack(message, (uint8_t *)bytes + sizeof(head));
        ae_control_free(message);
        r = bed_inject(bed, from, to, bytes, sizeof(head) + len);
        free(bytes);
        return r;
}

static int send_pause(struct bed *bed, uint32_t from, uint32_t to, uint32_t rank,
                      uint32_t seconds)
{
        Autoep__PauseNote note = AUTOEP__PAUSE_NOTE__INIT;
        struct ae_wire_head head = { .op = AE_WIRE_CONTROL, .type = AE_CONTROL_PAUSE_NOTE,
                                     .job = bed_job(bed, to)->id, .epoch = 1 };
        char bytes[sizeof(head) + 100];

        note.rank = rank;
        note.seconds = seconds;
        note.reason = (char *)(uintptr_t)"checkpoint";
        memcpy(bytes, &head, sizeof(head));
        ae_control_pack(&note.base, (uint8_t *)bytes + sizeof(head));
        return bed_inject(bed, from, to, bytes, sizeof(head) + ae_control_size(&note.base));
}

/* In another node's name, of a rank that isn't there, and from a node that decides nothing. */
static void test_bad_pauses(void **state)
{
        struct bed *bed = bed_new_live(3);

        (void)state;
        assert_int_equal(send_pause(bed, 1, 0, 2, 60), AE_EPROTO);
        assert_int_equal(send_pause(bed, 1, 0, bed_job(bed, 0)->world, 60), AE_EPROTO);
        assert_int_equal(send_pause(bed, 0, 1, bed_job(bed, 0)->world, 60), AE_EPROTO);
        assert_int_equal(send_pause(bed, 2, 1, 2, 60), AE_EPROTO);
        assert_int_equal(send_pause(bed, 1, 0, 1, AE_WIRE_PAUSE_MAX_S + 1), AE_EPROTO);
        assert_int_equal(ae_wait_pause_ns(bed_job(bed, 0), 1), 0);
        assert_int_equal(send_pause(bed, 1, 0, 1, 60), 0);
        for (uint32_t node = 0; node < 3; node++)
                assert_true(ae_wait_pause_ns(bed_job(bed, node), 1) > 0);
        bed_free(bed);
}

static void test_random_control(void **state)
{
        struct bed *bed = bed_new_live(3);

        (void)state;
        srand(53);
        for (uint32_t i = 0; i < 6000; i++) {
                uint32_t to = (uint32_t)rand() % 3;
                uint32_t from = (to + 1 + (uint32_t)rand() % 2) % 3;

                (void)send_invented(bed, from, to);
                bed = renew(bed, 3);
        }
        bed_free(bed);
}

/* ---- control messages in pieces ----------------------------------------------------------- */

/* A refusal of a get that nobody began, with a text that makes it @len bytes in all. */
static void send_long(struct bed *bed, size_t len, uint32_t n_msgs)
{
        Autoep__FetchReply reply = AUTOEP__FETCH_REPLY__INIT;
        struct ae_core_stats before;
        struct ae_core_stats after;
        char *text = malloc(len + 1);
        size_t n;

        assert_non_null(text);
        memset(text, 'x', len);
        reply.status = AE_EBUDGET;
        reply.token = 77;
        reply.text = text;
        text[len] = '\0';
        n = ae_control_size(&reply.base) - len; /* what is around the text */
        text[len - n] = '\0';
        assert_int_equal(ae_control_size(&reply.base), len);
        ae_core_stats(bed->nodes[1].core, &before);
        ae_core_control(bed->nodes[1].core, 0, bed_job(bed, 1)->id, AE_CONTROL_FETCH_REPLY,
                        &reply.base);
        ae_core_stats(bed->nodes[1].core, &after);
        assert_int_equal(after.msgs_sent - before.msgs_sent, n_msgs);
        bed_run(bed);
        assert_int_equal(bed->n_refused, 0);
        free(text);
}

static void test_long_messages(void **state)
{
        const size_t most = AE_NET_MSG_MAX - sizeof(struct ae_wire_head);
        struct bed *bed = bed_new_live(2);

        (void)state;
        send_long(bed, most, 1);
        send_long(bed, most + 1, 2);
        send_long(bed, 2 * most, 2);
        send_long(bed, 2 * most + 1, 3);
        bed_free(bed);
}

static int send_piece(struct bed *bed, uint32_t type, uint64_t n_left, size_t n)
{
        static char bytes[4096];
        struct ae_wire_head head = { .op = AE_WIRE_CONTROL, .type = (uint16_t)type,
                                     .job = bed_job(bed, 0)->id, .round = n_left };

        memcpy(bytes, &head, sizeof(head));
        return bed_inject(bed, 1, 0, bytes, sizeof(head) + n);
}

static void test_bad_pieces(void **state)
{
        const uint32_t type = AE_CONTROL_FETCH_REPLY;
        struct bed *bed = bed_new_live(2);

        (void)state;
        assert_int_equal(send_piece(bed, type, 10, 0), AE_EPROTO); /* without a byte */
        assert_int_equal(send_piece(bed, type, AE_CONTROL_FRAME_MAX, 1), AE_EPROTO);
        assert_int_equal(send_piece(bed, type, UINT64_MAX, 1), AE_EPROTO);
        assert_int_equal(send_piece(bed, type, AE_CONTROL_FRAME_MAX - 1, 1), 0);
        assert_int_equal(send_piece(bed, type, AE_CONTROL_FRAME_MAX - 2, 2), AE_EPROTO);
        assert_int_equal(send_piece(bed, type, 100, 50), 0);
        assert_int_equal(send_piece(bed, AE_CONTROL_STAGE_REPLY, 50, 50), AE_EPROTO);
        assert_int_equal(send_piece(bed, type, 100, 50), 0);
        assert_int_equal(send_piece(bed, type, 0, 99), AE_EPROTO); /* the end, too early */
        assert_int_equal(send_piece(bed, type, 100, 50), 0);
        assert_int_equal(send_piece(bed, type, 101, 50), AE_EPROTO); /* it grows */
        assert_int_equal(send_piece(bed, type, 60, 40), 0); /* left behind: freed with the core */
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_LIVE);
        bed_free(bed);
}

/* While a job forms there is less to stand on. */
static void test_random_control_early(void **state)
{
        (void)state;
        srand(54);
        for (uint32_t i = 0; i < 300; i++) {
                struct bed *bed = bed_new(2, AE_GIB);
                struct bed_worker *worker;

                if (rand() % 2 && bed_rank(bed, 1, 1, 2, &worker) == 0 && rand() % 2)
                        bed_register(worker, NULL);
                for (uint32_t k = 0; k < 8; k++) {
                        uint32_t to = (uint32_t)rand() % 2;

                        (void)send_invented(bed, 1 - to, to);
                }
                bed_free(bed);
        }
}

/* What a peer sends for a job that has not started here is kept, but not without end, and no
 * longer than its connection. */
static void test_too_early(void **state)
{
        static const char key[32];
        Autoep__Key cache = AUTOEP__KEY__INIT;
        Autoep__Grants grants = AUTOEP__GRANTS__INIT;
        struct ae_wire_head head = { .op = AE_WIRE_CONTROL, .type = AE_CONTROL_GRANTS, .job = 3 };
        struct bed *bed = bed_new(3, AE_GIB);
        struct ae_core *core = bed->nodes[1].core;
        uint8_t data[sizeof(head) + 100];
        size_t len;

        (void)state;
        cache.key.data = (uint8_t *)(uintptr_t)key;
        cache.key.len = sizeof(key);
        grants.cache = grants.inbox = &cache;
        len = sizeof(head) + ae_control_size(&grants.base);
        assert_true(len <= sizeof(data));
        memcpy(data, &head, sizeof(head));
        ae_control_pack(&grants.base, data + sizeof(head));
        for (uint32_t life = 0; life < 3; life++) {
                uint32_t lost = life == 0 ? 2 : 0; /* itself, then the decider */
                uint64_t n = 0;

                while (bed_inject(bed, 2, 1, data, len) == 0)
                        assert_in_range(++n, 1, AE_EARLY_MAX / len);
                assert_in_range(n, 1000, AE_EARLY_MAX / len);
                assert_int_equal(bed_inject(bed, 2, 1, data, len), AE_EPROTO);
                assert_int_equal(bed_inject(bed, 0, 1, data, len), 0); /* another one's */
                ae_core_peer_down(core, lost, "it is gone");
                assert_int_equal(core->early.lens[2], 0);
                ae_core_peer_up(core, lost, 7);
        }
        bed_free(bed);
}

/* The same for a round that is not open yet. */
static void test_too_early_for_the_round(void **state)
{
        struct bed *bed = bed_new_live(2);
        struct ae_job *job = bed_job(bed, 0);
        union msg msg;
        size_t len = make(bed, 0, AE_WIRE_CLOSED, &msg);
        uint64_t n = 0;

        (void)state;
        job->put_prepared = true; /* the next round may have begun elsewhere */
        msg.head.round++;
        while (bed_inject(bed, 1, 0, &msg, len) == 0)
                assert_in_range(++n, 1, AE_EARLY_MAX / len);
        assert_in_range(n, 1000, AE_EARLY_MAX / len);
        job->put_prepared = false;
        bed_free(bed);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_truncated),      cmocka_unit_test(test_not_the_decider),
                cmocka_unit_test(test_decider_out_of_turn), cmocka_unit_test(test_bad_fields),
                cmocka_unit_test(test_bad_norms), cmocka_unit_test(test_bad_counts),
                cmocka_unit_test(test_bad_joins), cmocka_unit_test(test_too_many_jobs),
                cmocka_unit_test(test_bad_pauses),
                cmocka_unit_test(test_wants_without_end),
                cmocka_unit_test(test_twice),          cmocka_unit_test(test_slot_twice),
                cmocka_unit_test(test_stale),
                cmocka_unit_test(test_random_hot),     cmocka_unit_test(test_random_bytes),
                cmocka_unit_test(test_random_control), cmocka_unit_test(test_random_control_early),
                cmocka_unit_test(test_long_messages), cmocka_unit_test(test_bad_pieces),
                cmocka_unit_test(test_too_early),
                cmocka_unit_test(test_too_early_for_the_round),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
