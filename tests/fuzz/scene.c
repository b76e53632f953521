/* SPDX-License-Identifier: Apache-2.0 */
/* Deeds of peers and workers against cores; see scene.h. */
#include "tests/fuzz/scene.h"

#include "tests/lib/invent.h"
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define DEEDS_MAX 100 /* of one input */
#define MS UINT64_C(1000000)

static uint32_t draw_byte(void *user)
{
        return input_u8(user);
}

/* Most numbers are small or at an edge. */
static uint64_t draw_number(struct input *input)
{
        static const uint64_t edges[] = { 128, 512, 4096, 8192, BED_BIG_N, 1u << 20, UINT32_MAX,
                                          UINT64_MAX };
        uint8_t byte = input_u8(input);

        if (byte < 200)
                return byte & 7;
        if (byte < 240)
                return edges[byte % AE_ARRAY_LEN(edges)];
        return input_u64(input);
}

/* ---- peers ------------------------------------------------------------------------------ */

/* Two different nodes. */
static void draw_nodes(const struct scene *scene, struct input *input, uint32_t *ret_from,
                       uint32_t *ret_to)
{
        uint32_t n = scene->bed->n_nodes, byte = input_u8(input);

        *ret_to = byte % n;
        *ret_from = (*ret_to + 1 + byte / n % (n - 1)) % n;
}

/* A message from a node that is connected; the core copies nothing beyond its end. */
static void say(struct scene *scene, uint32_t from, uint32_t to, const void *data, size_t len)
{
        struct bed *bed = scene->bed;

        if (bed->lines[from][to].up && bed_inject(bed, from, to, data, len) < 0)
                bed_cut(bed, from, to);
}

void scene_hot(struct scene *scene, struct input *input)
{
        uint32_t from, to;
        struct ae_wire_head head;
        const struct ae_job *job;
        uint8_t bytes[4096], how;
        size_t len;

        draw_nodes(scene, input, &from, &to);
        job = bed_job(scene->bed, to);
        head = job ? ae_job_head(job, 0) : (struct ae_wire_head){ .job = 0, .epoch = 1 };
        head.op = (uint16_t)(2 + input_below(input, AE_WIRE_WAITING));
        how = input_u8(input);
        head.round += how & 3;
        head.type = how >> 2 & 3;
        if (how >> 4 == 15)
                head.round -= 2;
        len = sizeof(head) + input_u16(input) % (sizeof(bytes) - sizeof(head));
        memcpy(bytes, &head, sizeof(head));
        input_get(input, bytes + sizeof(head), AE_MIN(len - sizeof(head), input->len));
        if (len > sizeof(head) && input->len == 0)
                memset(bytes + sizeof(head), 0, len - sizeof(head));
        say(scene, from, to, bytes, len);
}

void scene_raw(struct scene *scene, struct input *input)
{
        size_t len = input_u8(input);
        uint32_t from, to;
        const uint8_t *data;

        draw_nodes(scene, input, &from, &to);
        data = input_take(input, &len);
        say(scene, from, to, data, len);
}

void scene_control(struct scene *scene, struct input *input)
{
        struct bed *bed = scene->bed;
        struct ae_net_key keys[16];
        struct invent invent = { .draw = draw_byte, .user = input, .keys = keys };
        struct ae_wire_head head = { .op = AE_WIRE_CONTROL, .epoch = 1 };
        uint32_t from, to, type;
        const struct ae_job *job;
        ProtobufCMessage *message;
        uint8_t *bytes;
        size_t len;

        draw_nodes(scene, input, &from, &to);
        for (uint32_t i = 0; i < bed->n_grants && invent.n_keys < AE_ARRAY_LEN(keys); i++) {
                if (bed->grants[i].owner == from && bed->grants[i].peer == to)
                        keys[invent.n_keys++] = bed_key(i);
        }
        job = bed_job(bed, to);
        head.job = job && input_below(input, 8) ? job->id : input_u8(input);
        message = invent_control(&invent, &type);
        head.type = (uint16_t)type;
        len = sizeof(head) + ae_control_size(message);
        bytes = malloc(len);
        assert_non_null(bytes);
        memcpy(bytes, &head, sizeof(head));
        ae_control_pack(message, bytes + sizeof(head));
        ae_control_free(message);
        say(scene, from, to, bytes, len);
        free(bytes);
}

static uint64_t draw_note(struct input *input)
{
        uint8_t kind = input_u8(input), job = input_u8(input), stamp = input_u8(input);
        uint8_t what = input_u8(input);

        switch (kind % 5) {
        case AE_NOTE_GATHER:
                return ae_note_gather(job, stamp, what, input_u8(input));
        case AE_NOTE_PART:
                return ae_note_part(job, stamp, what & 3, what >> 2, input_u8(input));
        case AE_NOTE_FLOW:
                return ae_note_flow(job, stamp, what >> 4, what & 3, what >> 2 & 3);
        case AE_NOTE_STATE:
                return ae_note_state(job, stamp, what);
        }
        return input_u64(input);
}

/* What a transport lets through: a range of a live grant, and its note. */
void scene_note(struct scene *scene, struct input *input)
{
        struct bed *bed = scene->bed;
        uint8_t i = input_u8(input);
        uint64_t note = draw_note(input), off, len;
        const struct bed_grant *grant;

        if (bed->n_grants == 0)
                return;
        grant = &bed->grants[i % bed->n_grants];
        if (!grant->live)
                return;
        off = draw_number(input);
        len = draw_number(input);
        if (!ae_range_ok(off, len, grant->len))
                return;
        memset(grant->region->base + grant->off + off, input_u8(input), len);
        ae_core_notify(bed->nodes[grant->owner].core, grant->peer, grant->region->mem,
                       grant->off + off, len, note);
        bed_run(bed);
}

/* ---- rings ------------------------------------------------------------------------------ */

/* NULL when there is none that is still there. */
static struct bed_worker *draw_worker(struct scene *scene, struct input *input)
{
        struct bed *bed = scene->bed;
        uint32_t i = input_u8(input);

        if (bed->n_workers == 0 || !bed->workers[i % bed->n_workers].worker)
                return NULL;
        return &bed->workers[i % bed->n_workers];
}

static void drain(struct bed_worker *worker)
{
        int r = ae_core_worker_ring(worker->worker);

        if (r < 0)
                bed_gone(worker, "it broke the protocol");
        bed_run(worker->bed);
}

static void post(struct bed_worker *worker, const struct ae_local_sqe *sqe)
{
        struct ae_local_page *page = bed_page(worker);
        uint32_t tail = atomic_load(&page->sq_tail);

        page->sq[tail % AE_LOCAL_SQ_LEN] = *sqe;
        atomic_store(&page->sq_tail, tail + 1);
        drain(worker);
}

void scene_entry(struct scene *scene, struct input *input)
{
        struct bed_worker *worker = draw_worker(scene, input);
        struct ae_local_sqe sqe = { .op = (uint16_t)input_below(input, AE_SQ_XACK + 2) };

        sqe.flags = (uint16_t)draw_number(input);
        sqe.unit = (uint32_t)draw_number(input);
        sqe.micro = (uint32_t)draw_number(input);
        sqe.use = (uint16_t)draw_number(input);
        sqe.dtype = (uint16_t)draw_number(input);
        sqe.rank = (uint32_t)draw_number(input);
        sqe.slot = (uint32_t)draw_number(input);
        sqe.token = draw_number(input);
        sqe.first = draw_number(input);
        sqe.n = draw_number(input);
        sqe.pos = draw_number(input);
        sqe.len = (uint32_t)draw_number(input);
        if (worker)
                post(worker, &sqe);
}

void scene_any_entry(struct scene *scene, struct input *input)
{
        struct bed_worker *worker = draw_worker(scene, input);
        struct ae_local_sqe sqe;

        input_get(input, &sqe, sizeof(sqe));
        if (worker)
                post(worker, &sqe);
}

void scene_page(struct scene *scene, struct input *input)
{
        struct bed_worker *worker = draw_worker(scene, input);
        size_t off = input_u32(input) % sizeof(struct ae_local_page), len = input_u8(input);
        const uint8_t *data = input_take(input, &len);

        if (!worker)
                return;
        memcpy((char *)bed_page(worker) + off, data,
               AE_MIN(len, sizeof(struct ae_local_page) - off));
        drain(worker);
}

/* Where @len bytes may be written next in a ring of @ring bytes; @pos moves on behind them. */
static uint64_t reserve(uint64_t *pos, uint64_t ring, uint32_t len)
{
        if (*pos % ring + len > ring)
                *pos = ae_align_up(*pos, ring);
        *pos += len;
        return *pos - len;
}

void scene_piece(struct scene *scene, struct input *input)
{
        static const uint32_t bits[] = { 0, 0x3f800000, 0xbf800000, 0x7fc00000, 0x7f800000, 1 };
        struct bed_worker *worker = draw_worker(scene, input);
        uint32_t value = bits[input_below(input, AE_ARRAY_LEN(bits))];
        uint32_t n = 128u << input_below(input, 9);
        struct ae_local_sqe sqe = { .op = AE_SQ_PIECE, .dtype = AE_DTYPE_F32, .n = n,
                                    .len = n * 4 };
        struct ae_region *ring;
        uint32_t *to;

        sqe.unit = input_below(input, BED_UNITS);
        sqe.micro = input_below(input, 3);
        sqe.use = (uint16_t)input_below(input, 2);
        sqe.first = (uint64_t)input_u8(input) * n;
        if (!worker)
                return;
        ring = worker->worker->grad;
        sqe.pos = reserve(&scene->ring_pos[worker - scene->bed->workers], ring->len, sqe.len);
        to = (uint32_t *)(void *)(ring->base + sqe.pos % ring->len);
        for (uint32_t i = 0; i < n; i++)
                to[i] = value;
        post(worker, &sqe);
}

void scene_ask(struct scene *scene, struct input *input)
{
        struct bed_worker *worker = draw_worker(scene, input);
        uint8_t how = input_u8(input);
        const struct ae_job *job;
        struct ae_local_step *step;

        if (!worker)
                return;
        job = worker->worker->job;
        step = &bed_page(worker)->step;
        *step = (struct ae_local_step){
                .round = (job ? job->round : 0) + (how == 255), .tokens = 1,
                .micro_batches = how & 3, .redo = (how & 0x1c) == 4,
                .bad_expert = (how & 0x1c) == 8, .n_counts = how & 0x20 ? BED_BIAS_N : 0,
                .ask = { .scale = how & 0x40 ? 0.5 : 1, .max_norm = how & 0x80 ? 1 : 0,
                         .n_groups = 1, .hyper = { { .lr = 0.1, .beta1 = 0.9, .beta2 = 0.9,
                                                     .eps = 1e-8 } } },
        };
        post(worker, &(struct ae_local_sqe){ .op = AE_SQ_STEP });
}

void scene_xsend(struct scene *scene, struct input *input)
{
        struct bed_worker *worker = draw_worker(scene, input);
        struct ae_local_sqe sqe = { .op = AE_SQ_XSEND, .rank = input_below(input, 4) };
        const struct ae_region *ring;

        sqe.len = (uint32_t)sizeof(struct ae_local_xhead) + 64u * input_u8(input);
        if (!worker || !worker->worker->xout)
                return;
        ring = worker->worker->xout;
        if (sqe.len > ring->len)
                return;
        sqe.pos = reserve(&scene->xout_pos[worker - scene->bed->workers], ring->len, sqe.len);
        post(worker, &sqe);
}

/* ---- workers ---------------------------------------------------------------------------- */

/* Memory that comes with a message, sometimes too small. */
static int draw_fd(struct input *input)
{
        uint32_t pages = input_below(input, 8);
        int fd;

        if (pages == 0)
                return -1;
        fd = memfd_create("fuzz", MFD_CLOEXEC);
        assert_true(fd >= 0);
        assert_int_equal(ftruncate(fd, pages == 7 ? (off_t)4 * AE_MIB : 4096 * (off_t)pages), 0);
        return fd;
}

void scene_message(struct scene *scene, struct input *input)
{
        struct bed_worker *worker = draw_worker(scene, input);
        struct invent invent = { .draw = draw_byte, .user = input };
        int fd = draw_fd(input);
        uint32_t type;
        ProtobufCMessage *message = invent_control(&invent, &type);

        if (!worker) {
                ae_control_free(message);
                if (fd >= 0)
                        close(fd);
                return;
        }
        if (ae_core_worker_message(worker->worker, type, message, fd) < 0)
                bed_gone(worker, "it broke the protocol");
        bed_run(scene->bed);
}

void scene_hello(struct scene *scene, struct input *input)
{
        static const char *const words[] = { "job", "other", "", "secret" };
        struct bed *bed = scene->bed;
        uint8_t how = input_u8(input);
        struct bed_hello hello = {
                .version = AE_WIRE_VERSION + (how == 255), .uid = how & 1 ? 1001 : 1000,
                .job = words[(how & 6) == 6 ? how >> 3 & 3 : 0],
                .token = words[(how & 0xc0) == 0xc0 ? 2 : 3], .reader = (how & 0x30) == 0x30,
        };
        uint32_t node = input_below(input, bed->n_nodes);
        struct bed_worker *worker;

        hello.rank = input_below(input, 4);
        hello.world = 1 + input_below(input, 4);
        if (bed->n_workers == BED_WORKERS_MAX)
                return;
        scene->ring_pos[bed->n_workers] = scene->xout_pos[bed->n_workers] = 0;
        (void)bed_hello(bed, node, &hello, &worker);
}

void scene_register(struct scene *scene, struct input *input)
{
        struct bed_worker *worker = draw_worker(scene, input);

        if (worker)
                bed_register(worker, NULL);
}

void scene_gone(struct scene *scene, struct input *input)
{
        struct bed_worker *worker = draw_worker(scene, input);

        if (worker)
                bed_gone(worker, "it went away");
}

/* ---- the world -------------------------------------------------------------------------- */

void scene_cut(struct scene *scene, struct input *input)
{
        uint32_t a, b;

        draw_nodes(scene, input, &a, &b);
        bed_cut(scene->bed, a, b);
        bed_run(scene->bed);
}

void scene_join(struct scene *scene, struct input *input)
{
        uint32_t a, b;

        draw_nodes(scene, input, &a, &b);
        bed_join(scene->bed, a, b);
        bed_run(scene->bed);
}

void scene_tick(struct scene *scene, struct input *input)
{
        bed_tick(scene->bed, MS << input_below(input, 16));
}

void scene_step(struct scene *scene, struct input *input)
{
        for (uint32_t n = input_u8(input); n > 0 && bed_step(scene->bed); n--)
                ;
}

void scene_run(struct scene *scene, struct input *input)
{
        (void)input;
        while (bed_step(scene->bed))
                ;
}

struct scene scene_new(uint8_t how, uint32_t n_nodes, bool live)
{
        struct scene scene = { .bed = bed_new(n_nodes, AE_GIB) };

        if (how < 224)
                scene.bed->big_n = 1000;
        if (live)
                bed_go_live(scene.bed);
        return scene;
}

void scene_play(struct scene *scene, struct input *input, scene_deed *const *deeds, size_t n_deeds)
{
        for (uint32_t i = 0; i < DEEDS_MAX && input->len > 0; i++)
                deeds[input_u8(input) % n_deeds](scene, input);
        scene->bed = bed_free(scene->bed);
}
