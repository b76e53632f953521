/* SPDX-License-Identifier: Apache-2.0 */
/* The reference of a simulated job: every tensor as plain arrays, stepped when a verdict is first
 * seen, and the comparisons of verdicts, shards and images with it. */
#include "tests/lib/simjob-private.h"

#include "proto/wire/balance.h"
#include "tests/lib/normref.h"

#include <inttypes.h>
#include <math.h>

#define TABLE 65536u

static const struct ae_layout_segment *segment_of(const struct simjob *job, uint32_t tensor)
{
        return &job->layout->segments[job->layout->tensors[tensor].segment];
}

uint64_t simref_grad_of(const struct simjob *job, uint32_t tensor)
{
        return segment_of(job, tensor)->unit_grad_first + job->layout->tensors[tensor].first;
}

static uint64_t image_of(const struct simjob *job, uint32_t tensor)
{
        const struct ae_layout_tensor *t = &job->layout->tensors[tensor];

        return segment_of(job, tensor)->unit_off + t->first * ae_dtype_size(t->dtype);
}

bool simref_is_stepped(const struct simjob *job, uint32_t tensor)
{
        return job->layout->tensors[tensor].home == tensor && segment_of(job, tensor)->trainable;
}

const char *simref_image(const struct simjob *job, uint64_t version, uint32_t unit)
{
        return job->ref.image[version % SIM_VERSIONS][unit];
}

const float *simref_state(const struct simjob *job, uint64_t version, uint32_t unit)
{
        return job->ref.state[version % SIM_VERSIONS][unit];
}

/* ---- making ----------------------------------------------------------------------------- */

static void *zeroed(uint64_t n, size_t size)
{
        void *memory = calloc(AE_MAX(n, (uint64_t)1), size);

        assert_non_null(memory);
        return memory;
}

static void add_gap(struct simjob *job, uint32_t unit, uint64_t first, uint64_t end)
{
        struct simref *ref = &job->ref;

        if (first >= end)
                return;
        ref->gaps = realloc(ref->gaps, (ref->n_gaps + 1) * sizeof(*ref->gaps));
        assert_non_null(ref->gaps);
        ref->gaps[ref->n_gaps++] = (struct simgap){ unit, first, end - first };
}

static void find_gaps(struct simjob *job, uint32_t u)
{
        const struct ae_layout_unit *unit = &job->layout->units[u];
        uint64_t at = 0;

        for (uint32_t s = unit->segment_first; s < unit->segment_first + unit->n_segments; s++) {
                const struct ae_layout_segment *segment = &job->layout->segments[s];

                for (uint32_t k = 0; segment->trainable && k < segment->n_tensors; k++) {
                        uint32_t t = job->layout->segment_tensors[segment->tensor_first + k];

                        add_gap(job, u, at, simref_grad_of(job, t));
                        at = AE_MAX(at, simref_grad_of(job, t) + job->layout->tensors[t].n);
                }
        }
        add_gap(job, u, at, unit->n_grad);
}

static void put_weight(struct simjob *job, uint32_t t, char *const *image)
{
        const struct ae_layout_tensor *tensor = &job->layout->tensors[t];
        uint32_t unit = tensor->unit;
        char *to = image[unit] + image_of(job, t);
        const float *from = job->ref.p[unit] + simref_grad_of(job, t);

        if (tensor->dtype == AE_DTYPE_BF16)
                ae_ops()->f32_to_bf16((ae_bf16 *)(void *)to, from, tensor->n);
        else
                memcpy(to, from, tensor->n * sizeof(float));
}

/* Draws the initial values, as rank 0 hands them over and as they must come to lie. */
static void draw_init(struct simjob *job)
{
        char *at = job->init = zeroed(job->init_len, 1);

        for (uint32_t t = 0; t < job->layout->n_tensors; t++) {
                const struct ae_layout_tensor *tensor = &job->layout->tensors[t];
                char *image = job->ref.image[0][tensor->unit];
                size_t size = ae_dtype_size(tensor->dtype);

                if (tensor->home != t || tensor->n == 0)
                        continue;
                for (uint64_t i = 0; i < tensor->n; i++) {
                        float x = (float)(int64_t)(simplan_hash(job, 99, t, i, 0, 0) % 20001 -
                                                   10000) /
                                  7e4f;

                        if (simref_is_stepped(job, t)) {
                                memcpy(at + i * sizeof(x), &x, sizeof(x));
                                job->ref.p[tensor->unit][simref_grad_of(job, t) + i] = x;
                        } else if (tensor->dtype == AE_DTYPE_BF16) {
                                ae_ops()->f32_to_bf16((ae_bf16 *)(void *)at + i, &x, 1);
                        } else {
                                memcpy(at + i * sizeof(x), &x, sizeof(x));
                        }
                }
                if (simref_is_stepped(job, t)) {
                        put_weight(job, t, job->ref.image[0]);
                        at += tensor->n * sizeof(float);
                } else {
                        memcpy(image + image_of(job, t), at, tensor->n * size);
                        at += tensor->n * size;
                }
        }
}

static void keep_state(struct simjob *job)
{
        struct simref *ref = &job->ref;
        float **to = ref->state[ref->version % SIM_VERSIONS];

        for (uint32_t u = 0; u < job->layout->n_units; u++) {
                uint64_t n = job->layout->units[u].n_grad;

                memcpy(to[u], ref->p[u], n * sizeof(float));
                memcpy(to[u] + n, ref->m[u], n * sizeof(float));
        }
}

static void make_table(struct simjob *job)
{
        uint64_t n = TABLE;

        for (uint32_t u = 0; u < job->layout->n_units; u++)
                n = AE_MAX(n, TABLE + job->layout->units[u].n_grad);
        job->ref.table = zeroed(n, sizeof(float));
        job->ref.narrow = zeroed(n, sizeof(ae_bf16));
        for (uint64_t i = 0; i < n; i++)
                job->ref.table[i] = (float)((int)(simplan_hash(job, 98, i, 0, 0, 0) % 9) - 4) / 64;
        ae_ops()->f32_to_bf16(job->ref.narrow, job->ref.table, n);
}

void simref_init(struct simjob *job)
{
        struct simref *ref = &job->ref;
        uint32_t n_units = job->layout->n_units;
        float ***const arrays[] = { &ref->p, &ref->m, &ref->v, &ref->g };

        if (job->params.no_data)
                return;
        for (size_t i = 0; i < AE_ARRAY_LEN(arrays); i++) {
                *arrays[i] = zeroed(n_units, sizeof(float *));
                for (uint32_t u = 0; u < n_units; u++)
                        (*arrays[i])[u] = zeroed(job->layout->units[u].n_grad, sizeof(float));
        }
        for (uint32_t v = 0; v < SIM_VERSIONS; v++) {
                ref->image[v] = zeroed(n_units, sizeof(char *));
                ref->state[v] = zeroed(n_units, sizeof(float *));
                for (uint32_t u = 0; u < n_units; u++) {
                        ref->image[v][u] = zeroed(job->layout->units[u].len, 1);
                        ref->state[v][u] = zeroed(2 * job->layout->units[u].n_grad, sizeof(float));
                }
        }
        ref->steps = zeroed(job->layout->n_tensors, sizeof(*ref->steps));
        for (uint32_t u = 0; u < n_units; u++)
                find_gaps(job, u);
        make_table(job);
        draw_init(job);
        keep_state(job);
}

void simref_deinit(struct simjob *job)
{
        struct simref *ref = &job->ref;
        float **const arrays[] = { ref->p, ref->m, ref->v, ref->g };

        for (size_t i = 0; i < AE_ARRAY_LEN(arrays); i++) {
                for (uint32_t u = 0; arrays[i] && u < job->layout->n_units; u++)
                        free(arrays[i][u]);
                free(arrays[i]);
        }
        for (uint32_t v = 0; v < SIM_VERSIONS; v++) {
                for (uint32_t u = 0; ref->image[v] && u < job->layout->n_units; u++) {
                        free(ref->image[v][u]);
                        free(ref->state[v][u]);
                }
                free(ref->image[v]);
                free(ref->state[v]);
        }
        free(ref->steps);
        free(ref->gaps);
        free(ref->table);
        free(ref->narrow);
        free(job->init);
}

/* ---- a step ----------------------------------------------------------------------------- */

static void add_lane(struct simjob *job, uint32_t rank, uint32_t micro, uint32_t unit, uint32_t use)
{
        struct simref *ref = &job->ref;
        const float *from = ref->table + simplan_table(job, ref->step, rank, micro, unit, use);
        struct simpiece piece;

        for (uint32_t k = 0; simplan_piece(job, ref->step, rank, micro, unit, use, k, &piece);
             k++) {
                for (uint64_t i = piece.first; !piece.skipped && i < piece.first + piece.n; i++)
                        ref->g[unit][i] += from[i] * (float)(1u << simplan_power(i));
        }
}

static void sum_unit(struct simjob *job, uint32_t unit, bool *ret_any)
{
        struct simref *ref = &job->ref;

        *ret_any = false;
        memset(ref->g[unit], 0, job->layout->units[unit].n_grad * sizeof(float));
        for (uint32_t rank = 0; rank < job->params.n_ranks; rank++) {
                uint32_t n_micro = simplan_n_micro(job, ref->step, rank);

                for (uint32_t k = 0; k < n_micro * job->n_uses[unit]; k++) {
                        uint32_t micro = k / job->n_uses[unit];
                        uint32_t use = k % job->n_uses[unit];

                        if (!simplan_scatters(job, ref->step, rank, micro, unit, use))
                                continue;
                        *ret_any = true;
                        add_lane(job, rank, micro, unit, use);
                }
        }
        for (uint32_t i = 0; i < ref->n_gaps; i++) {
                if (ref->gaps[i].unit == unit)
                        memset(ref->g[unit] + ref->gaps[i].first, 0,
                               ref->gaps[i].n * sizeof(float));
        }
}

static void add_norm(const struct simjob *job, struct normref *norm)
{
        for (uint32_t s = 0; s < job->layout->n_segments; s++) {
                const struct ae_layout_segment *segment = &job->layout->segments[s];
                const float *g = job->ref.g[segment->unit] + segment->unit_grad_first;

                for (uint64_t i = 0; segment->trainable && i < segment->n; i++)
                        normref_element(norm, i, g[i]);
                normref_end(norm);
        }
}

static void step_tensor(struct simjob *job, uint32_t t, const struct ae_wire_verdict *verdict)
{
        const struct ae_layout_tensor *tensor = &job->layout->tensors[t];
        const struct ae_wire_hyper *wire = &verdict->ask.hyper[tensor->group];
        struct ae_hyper hyper = { wire->lr, wire->beta1, wire->beta2, wire->eps,
                                  wire->weight_decay };
        struct simref *ref = &job->ref;
        uint64_t at = simref_grad_of(job, t);
        struct ae_adamw adamw;
        struct ae_sgd sgd;

        if (verdict->ask.absent_groups >> tensor->group & 1)
                return;
        ref->steps[t]++;
        if (job->params.sgd) {
                ae_sgd_scalars(&hyper, verdict->grad_scale, &sgd);
                ae_ops()->sgd(&sgd, ref->p[tensor->unit] + at, ref->m[tensor->unit] + at,
                              ref->g[tensor->unit] + at, NULL, AE_DTYPE_F32, tensor->n);
        } else {
                ae_adamw_scalars(&hyper, ref->steps[t], verdict->grad_scale, &adamw);
                ae_ops()->adamw(&adamw, ref->p[tensor->unit] + at, ref->m[tensor->unit] + at,
                                ref->v[tensor->unit] + at, ref->g[tensor->unit] + at, NULL,
                                AE_DTYPE_F32, tensor->n);
        }
}

static void copy_images(struct simjob *job)
{
        struct simref *ref = &job->ref;
        char **from = ref->image[ref->version % SIM_VERSIONS];
        char **to = ref->image[(ref->version + 1) % SIM_VERSIONS];

        for (uint32_t u = 0; u < job->layout->n_units; u++)
                memcpy(to[u], from[u], job->layout->units[u].len);
        ref->version++;
}

static void balance_buffers(struct simjob *job, const struct ae_wire_verdict *verdict)
{
        struct simref *ref = &job->ref;
        uint32_t first = 0;

        if (!simplan_n_counts(job, ref->step) || verdict->ask.balance_rate == 0)
                return;
        for (uint32_t t = 0; t < job->layout->n_tensors; t++) {
                const struct ae_layout_tensor *tensor = &job->layout->tensors[t];
                uint64_t counts[8] = { 0 };

                if (tensor->class != AE_CLASS_BUFFER)
                        continue;
                assert_int_equal(tensor->n, 8);
                for (uint32_t rank = 0; rank < job->params.n_ranks; rank++) {
                        for (uint32_t i = 0; i < 8; i++)
                                counts[i] += simplan_count(job, ref->step, rank, first + i);
                }
                ae_balance_step(
                        (float *)(void *)(ref->image[ref->version % SIM_VERSIONS][tensor->unit] +
                                          image_of(job, t)),
                        counts, 8, verdict->ask.balance_rate);
                first += 8;
        }
}

static void check_factors(struct simjob *job, const struct ae_wire_verdict *verdict,
                          struct normref *norm2)
{
        struct ae_wire_ask ask;
        uint64_t tokens = 0;
        uint64_t micro_batches = 0;
        double s;
        double norm;
        double clip;

        simplan_ask(job, job->ref.step, &ask);
        for (uint32_t rank = 0; rank < job->params.n_ranks; rank++) {
                tokens += simplan_tokens(job, job->ref.step, rank);
                micro_batches += simplan_n_micro(job, job->ref.step, rank);
                normref_add(norm2, simplan_expert_norm2(job, job->ref.step, rank));
        }
        s = ask.scale != 0 ? ask.scale : 1.0 / (double)(ask.use_tokens ? tokens : micro_batches);
        norm = fabs(s) * sqrt(normref_sum(norm2));
        clip = ae_clip_factor(norm, ask.max_norm);
        if (verdict->tokens != tokens || verdict->micro_batches != micro_batches ||
            memcmp(&verdict->ask, &ask, sizeof(ask)) != 0)
                simjob_fail(job,
                            "round %" PRIu64 ": %" PRIu64 " tokens, %" PRIu64
                            " micro-batches, expected %" PRIu64 ", %" PRIu64,
                            verdict->round, verdict->tokens, verdict->micro_batches, tokens,
                            micro_batches);
        if (verdict->norm != norm || verdict->clip != clip || verdict->grad_scale != s * clip)
                simjob_fail(job, "round %" PRIu64 ": norm %a clip %a scale %a, expected %a %a %a",
                            verdict->round, verdict->norm, verdict->clip, verdict->grad_scale, norm,
                            clip, s * clip);
}

static void apply(struct simjob *job, const struct ae_wire_verdict *verdict)
{
        struct simref *ref = &job->ref;
        bool stepped[64] = { false };
        struct normref norm2 = { .n_parts = 0 };

        assert_true(job->layout->n_units <= AE_ARRAY_LEN(stepped));
        for (uint32_t u = 0; u < job->layout->n_units; u++)
                sum_unit(job, u, &stepped[u]);
        add_norm(job, &norm2);
        check_factors(job, verdict, &norm2);
        copy_images(job);
        for (uint32_t t = 0; t < job->layout->n_tensors; t++) {
                if (!simref_is_stepped(job, t) || !stepped[job->layout->tensors[t].unit])
                        continue;
                step_tensor(job, t, verdict);
                put_weight(job, t, ref->image[ref->version % SIM_VERSIONS]);
        }
        balance_buffers(job, verdict);
        keep_state(job);
}

static void apply_put(struct simjob *job, const struct ae_wire_verdict *verdict)
{
        struct simref *ref = &job->ref;
        struct simput *put = &job->put;
        uint32_t unit;
        uint64_t at;

        if (!put->active)
                simjob_fail(job, "round %" PRIu64 " ended with a put that nobody began",
                            verdict->round);
        put->active = false;
        unit = job->layout->tensors[put->tensor].unit;
        copy_images(job);
        if (!simref_is_stepped(job, put->tensor)) {
                size_t size = ae_dtype_size(job->layout->tensors[put->tensor].dtype);

                memcpy(ref->image[ref->version % SIM_VERSIONS][unit] + image_of(job, put->tensor) +
                               put->first * size, put->values, put->n * size);
                keep_state(job);
                return;
        }
        at = simref_grad_of(job, put->tensor) + put->first;
        memcpy(ref->p[unit] + at, put->values, put->n * sizeof(float));
        memcpy(ref->m[unit] + at, put->values + put->n, put->n * sizeof(float));
        put_weight(job, put->tensor, ref->image[ref->version % SIM_VERSIONS]);
        keep_state(job);
}

/* ---- verdicts --------------------------------------------------------------------------- */

static uint32_t expected(const struct simjob *job)
{
        const struct simref *ref = &job->ref;
        struct simnan nan;

        if (!ref->refused && simplan_refuse(job, ref->attempt) != AE_WIRE_NONE)
                return AE_VERDICT_REFUSED;
        if (simplan_redo(job, ref->attempt) != AE_WIRE_NONE)
                return AE_VERDICT_REDO;
        return simplan_nan(job, ref->step, &nan) ? AE_VERDICT_SKIPPED : AE_VERDICT_APPLIED;
}

static void check_bad(struct simjob *job, const struct ae_wire_verdict *verdict)
{
        struct simnan nan;

        if (verdict->kind != AE_VERDICT_SKIPPED || !simplan_nan(job, job->ref.step, &nan))
                return;
        if (verdict->bad.rank != nan.rank || verdict->bad.unit != nan.unit ||
            verdict->bad.found != 1)
                simjob_fail(job,
                            "round %" PRIu64
                            " was skipped for rank %u unit %u ('%s'), not for rank %u unit %u",
                            verdict->round, verdict->bad.rank, verdict->bad.unit, verdict->bad.text,
                            nan.rank, nan.unit);
}

/* Overflow memory was full: the text names the unit, whose rank had no room, and for whom it waits,
 * both of that node. */
static bool is_overflow(struct simjob *job, const struct ae_wire_verdict *verdict)
{
        const struct ae_wire_bad *bad = &verdict->bad;
        uint32_t node, rank, other;
        char unit[64];

        if (verdict->kind != AE_VERDICT_REDO || !strstr(bad->text, "overflow"))
                return false;
        if (sscanf(bad->text,
                   "overflow memory of node %u is full: unit '%63[^']' of rank %u waits for rank "
                   "%u",
                   &node, unit, &rank, &other) != 4 ||
            bad->unit >= job->layout->n_units ||
            strcmp(unit, job->layout->units[bad->unit].name) != 0 ||
            rank >= job->params.n_ranks || other >= job->params.n_ranks ||
            job->rank_node[rank] != node || job->rank_node[other] != node)
                simjob_fail(job, "round %" PRIu64 " is to be done again for unit %u: '%s'",
                            verdict->round, bad->unit, bad->text);
        return true;
}

static void check_kind(struct simjob *job, const struct ae_wire_verdict *verdict)
{
        uint32_t kind = expected(job);

        job->ref.calm = is_overflow(job, verdict);
        if (verdict->kind == kind) {
                check_bad(job, verdict);
                return;
        }
        if (verdict->kind == AE_VERDICT_REDO && job->params.tight_overflow && job->ref.calm)
                return;
        simjob_fail(job,
                    "round %" PRIu64
                    " (step %u, attempt %u) ended with verdict %u ('%s'), expected %u",
                    verdict->round, job->ref.step, job->ref.attempt, verdict->kind,
                    verdict->bad.text, kind);
}

static void take_up(struct simjob *job, const struct ae_wire_verdict *verdict)
{
        struct simref *ref = &job->ref;
        bool applied = verdict->kind == AE_VERDICT_APPLIED;

        if (verdict->kind == AE_VERDICT_PUT && ref->next_round == 0)
                job->live_ns = ae_sim_now(job->sim);
        else if (verdict->kind == AE_VERDICT_PUT)
                apply_put(job, verdict);
        else if (!job->params.no_data)
                check_kind(job, verdict);
        if (applied && !job->params.no_data)
                apply(job, verdict);
        else if (applied)
                ref->version++;
        if (verdict->version != ref->version)
                simjob_fail(job,
                            "round %" PRIu64 " leads to version %" PRIu64 ", expected %" PRIu64,
                            verdict->round, verdict->version, ref->version);
        ref->refused = verdict->kind == AE_VERDICT_REFUSED;
        if (verdict->kind == AE_VERDICT_PUT || ref->refused)
                return;
        ref->attempt++;
        ref->step += verdict->kind != AE_VERDICT_REDO;
}

void simref_verdict(struct simjob *job, const struct ae_wire_verdict *verdict)
{
        struct simref *ref = &job->ref;

        if (verdict->round + 8 < ref->next_round || verdict->round > ref->next_round)
                simjob_fail(job, "a verdict of round %" PRIu64 " is shown in round %" PRIu64,
                            verdict->round, ref->next_round);
        if (verdict->round < ref->next_round) {
                if (memcmp(&ref->seen[verdict->round % 8], verdict, sizeof(*verdict)) != 0)
                        simjob_fail(job, "nodes show different verdicts of round %" PRIu64,
                                    verdict->round);
                return;
        }
        ref->seen[verdict->round % 8] = *verdict;
        ref->n_kinds[verdict->kind % 8]++;
        take_up(job, verdict);
        ref->next_round++;
}

/* ---- shards ----------------------------------------------------------------------------- */

static void check_floats(struct simnode *node, const char *what,
                         const struct ae_layout_slice *slice, const float *is, const float *should)
{
        const struct ae_layout *layout = node->job->layout;
        uint64_t i = 0;

        if (memcmp(is, should, slice->n * sizeof(float)) == 0)
                return;
        while (memcmp(&is[i], &should[i], sizeof(float)) == 0)
                i++;
        simjob_fail(node->job,
                    "node %u version %" PRIu64 ": %s of unit %u, element %" PRIu64
                    " of its segment, is %a, should be %a",
                    node->id, node->job->ref.version, what, layout->segments[slice->segment].unit,
                    slice->first + i, (double)is[i], (double)should[i]);
}

static void check_slice(struct simnode *node, const struct ae_job *job, uint32_t s)
{
        const struct simref *ref = &node->job->ref;
        const struct ae_layout_slice *slice = &job->layout->slices[s];
        const struct ae_layout_segment *segment = &job->layout->segments[slice->segment];
        size_t size = ae_dtype_size(segment->dtype);
        const char *image =
                simref_image(node->job, ref->version, segment->unit) + segment->unit_off;
        uint64_t grad = segment->unit_grad_first + slice->first;

        if (memcmp(job->shard.weight + slice->weight_off, image + slice->first * size,
                   slice->n * size) != 0)
                simjob_fail(node->job,
                            "node %u version %" PRIu64 ": weights of a slice of unit %u differ",
                            node->id, ref->version, segment->unit);
        if (!segment->trainable)
                return;
        check_floats(node, "master", slice, job->shard.master + slice->shard_first,
                     ref->p[segment->unit] + grad);
        check_floats(node, "moment 1", slice, job->shard.moment1 + slice->shard_first,
                     ref->m[segment->unit] + grad);
        if (!node->job->params.sgd)
                check_floats(node, "moment 2", slice, job->shard.moment2 + slice->shard_first,
                             ref->v[segment->unit] + grad);
}

void simref_check_shard(struct simnode *node)
{
        const struct ae_job *job = simnode_job(node);

        if (!job || job->state != AE_JOB_LIVE || node->job->params.no_data)
                return;
        if (job->round > node->job->ref.next_round)
                simref_verdict(node->job, &job->verdict);
        if (job->n_applying || node->checked == job->version + 1 ||
            job->version != node->job->ref.version)
                return; /* it lags, and nothing has changed since it was looked at last */
        node->checked = job->version + 1;
        for (uint32_t i = 0; i < job->n_owned; i++)
                check_slice(node, job, job->owned[i].slice);
}

void simref_catch_up(struct simjob *job)
{
        for (uint32_t i = 0; i < job->params.n_nodes; i++) {
                const struct ae_job *core = simnode_job(&job->nodes[i]);

                if (core && core->state == AE_JOB_LIVE && core->round > job->ref.next_round)
                        simref_verdict(job, &core->verdict);
        }
}
