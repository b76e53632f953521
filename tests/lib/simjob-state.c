/* SPDX-License-Identifier: Apache-2.0 */
/* What a simulated worker does to state from outside: gets, puts, and the messages for them. */
#include "tests/lib/simjob-private.h"

#include <inttypes.h>
#include <sys/mman.h>
#include <unistd.h>

void simworker_send(struct simworker *worker, uint32_t type, const ProtobufCMessage *message,
                         int fd)
{
        size_t len = ae_control_size(message);
        uint8_t *packed = malloc(len + 1);
        ProtobufCMessage *copy = NULL;

        assert_non_null(packed);
        ae_control_pack(message, packed);
        assert_int_equal(ae_control_unpack(type, packed, len, &copy), 0);
        free(packed);
        if (ae_core_worker_message(worker->worker, type, copy, fd) < 0)
                simjob_fail(worker->job, "rank %u: the core says: %s", worker->rank,
                            ae_error_text());
        simnode_kick(worker->node);
}

int simworker_memory(const void *data, uint64_t len)
{
        int fd = memfd_create("simjob", MFD_CLOEXEC);

        assert_true(fd >= 0);
        assert_int_equal(ftruncate(fd, (off_t)len), 0);
        if (data)
                assert_int_equal(pwrite(fd, data, len, 0), len);
        return fd;
}

/* A tensor with elements that is trainable, or isn't, by chance and yet by the seed alone; NONE:
 * there is none. */
static uint32_t pick_tensor(const struct simjob *job, uint64_t h, bool trainable)
{
        for (uint32_t i = 0; i < job->layout->n_tensors; i++) {
                uint32_t t = (uint32_t)((h + i) % job->layout->n_tensors);
                const struct ae_layout_tensor *tensor = &job->layout->tensors[t];

                if (tensor->home == t && tensor->n &&
                    job->layout->segments[tensor->segment].trainable == trainable)
                        return t;
        }
        return AE_WIRE_NONE;
}

static void fill_items(Autoep__StateItem *items, Autoep__StateItem **pointers, uint32_t n,
                       const uint32_t *kinds, uint32_t tensor, uint64_t first, uint64_t count)
{
        for (uint32_t i = 0; i < n; i++) {
                autoep__state_item__init(&items[i]);
                items[i].tensor = tensor;
                items[i].what = kinds[i];
                items[i].first = first;
                items[i].n = count;
                pointers[i] = &items[i];
        }
}

/* What is put as it is, in the type of the tensor. */
static void narrow_values(const struct simjob *job, struct simput *put)
{
        ae_bf16 *narrow = calloc(put->n, sizeof(*narrow));

        assert_non_null(narrow);
        if (job->layout->tensors[put->tensor].dtype == AE_DTYPE_BF16) {
                ae_ops()->f32_to_bf16(narrow, put->values, put->n);
                memcpy(put->values, narrow, put->n * sizeof(*narrow));
        }
        free(narrow);
}

static void begin_put(struct simworker *worker)
{
        static const uint32_t stepped_kinds[] = { 2, 3 }; /* master, first moment */
        static const uint32_t weight[] = { 1 };
        struct simjob *job = worker->job;
        uint64_t h = simplan_hash(job, 95, worker->attempt, 0, 0, 0);
        struct simput *put = &job->put;
        Autoep__Put message = AUTOEP__PUT__INIT;
        Autoep__StateItem items[2];
        Autoep__StateItem *pointers[2];
        bool stepped = !job->params.wild || h >> 60 < 8 ||
                       pick_tensor(job, h, false) == AE_WIRE_NONE;
        uint32_t tensor = pick_tensor(job, h, stepped);
        uint64_t n = job->layout->tensors[tensor].n;
        uint32_t dtype = job->layout->tensors[tensor].dtype;
        size_t size = stepped ? 2 * sizeof(float) : ae_dtype_size(dtype);

        put->tensor = tensor;
        put->first = (h >> 8) % n;
        put->n = 1 + (h >> 32) % (n - put->first);
        free(put->values);
        put->values = calloc(2 * put->n, sizeof(float));
        assert_non_null(put->values);
        for (uint64_t i = 0; i < 2 * put->n; i++)
                put->values[i] =
                        (float)(simplan_hash(job, 94, worker->attempt, i, 0, 0) % 1000) / 3e3f;
        if (!stepped)
                narrow_values(job, put);
        put->active = true;
        fill_items(items, pointers, 1 + stepped, stepped ? stepped_kinds : weight, tensor,
                   put->first, put->n);
        message.id = ++worker->token;
        message.version = atomic_load(&worker->params->job_version);
        message.items = pointers;
        message.n_items = 1 + stepped;
        simworker_send(worker, AE_CONTROL_PUT, &message.base,
                       simworker_memory(put->values, put->n * size));
}

bool simworker_put(struct simworker *worker)
{
        struct simjob *job = worker->job;

        if (!worker->begun) {
                worker->answered = false;
                worker->answer_status = 0;
                if (pick_tensor(job, 0, true) == AE_WIRE_NONE)
                        worker->answered = true;
                else
                        begin_put(worker);
        }
        if (!worker->answered)
                return false;
        if (worker->answer_status < 0) {
                if (worker->answer_status != AE_ESTATE || !job->put.active)
                        simjob_fail(job, "a put of rank %u failed: %d", worker->rank,
                                    worker->answer_status);
                job->put.active = false;
        }
        job->put_done = worker->attempt + 1;
        for (uint32_t rank = 0; rank < job->params.n_ranks; rank++)
                simworker_wake(&job->workers[rank]);
        return true;
}

/* Weight, master and first moment of a range: all as they were at one version. */
static void begin_get(struct simworker *worker, uint32_t tensor, uint64_t first, uint64_t n)
{
        static const uint32_t kinds[] = { 1, 2, 3 };
        Autoep__Get message = AUTOEP__GET__INIT;
        Autoep__StateItem items[3];
        Autoep__StateItem *pointers[3];

        worker->fd = simworker_memory(NULL, n * 12);
        fill_items(items, pointers, 3, kinds, tensor, first, n);
        message.id = ++worker->token;
        message.items = pointers;
        message.n_items = 3;
        simworker_send(worker, AE_CONTROL_GET, &message.base, dup(worker->fd));
}

static void check_get(struct simworker *worker, uint32_t t, uint64_t first, uint64_t n)
{
        struct simjob *job = worker->job;
        const struct ae_layout_tensor *tensor = &job->layout->tensors[t];
        const struct ae_layout_segment *segment = &job->layout->segments[tensor->segment];
        uint64_t version = worker->answer_version;
        const float *state = simref_state(job, version, tensor->unit);
        size_t size = ae_dtype_size(tensor->dtype);
        uint64_t at = simref_grad_of(job, t) + first;
        char *got = calloc(n, 12);

        assert_non_null(got);
        assert_int_equal(pread(worker->fd, got, n * (size + 8), 0), n * (size + 8));
        simref_catch_up(job);
        if (version > job->ref.version || version + SIM_VERSIONS <= job->ref.version)
                simjob_fail(job, "rank %u got state of version %" PRIu64 ", the job is at %" PRIu64,
                            worker->rank, version, job->ref.version);
        if (memcmp(got,
                   simref_image(job, version, tensor->unit) + segment->unit_off +
                           (tensor->first + first) * size,
                   n * size) != 0 ||
            memcmp(got + n * size, state + at, n * 4) != 0 ||
            memcmp(got + n * (size + 4), state + job->layout->units[tensor->unit].n_grad + at,
                   n * 4) != 0)
                simjob_fail(job,
                            "rank %u: tensor %u as got at version %" PRIu64
                            " differs (reference: %" PRIu64 ")",
                            worker->rank, t, version, job->ref.version);
        free(got);
        close(worker->fd);
        worker->fd = -1;
}

bool simworker_get(struct simworker *worker)
{
        struct simjob *job = worker->job;
        uint64_t h = simplan_hash(job, 93, worker->attempt, worker->rank, 0, 0);
        uint32_t tensor = pick_tensor(job, h, true);
        uint64_t total = tensor == AE_WIRE_NONE ? 0 : job->layout->tensors[tensor].n;
        uint64_t first = total ? (h >> 8) % total : 0;

        if (!total)
                return true;
        if (!worker->begun) {
                worker->answered = false;
                begin_get(worker, tensor, first, total - first);
        }
        if (!worker->answered)
                return false;
        if (worker->answer_status < 0 && simreader_is_over(worker))
                return true;
        if (worker->answer_status < 0)
                simjob_fail(job, "a get of rank %u failed: %d", worker->rank,
                            worker->answer_status);
        check_get(worker, tensor, first, total - first);
        return true;
}
