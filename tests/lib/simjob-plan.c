/* SPDX-License-Identifier: Apache-2.0 */
/* What the ranks of a simulated job register and do, as pure functions of the seed, so that workers
 * and reference need not tell each other. */
#include "tests/lib/simjob-private.h"

#include <stdio.h>

enum { H_MODEL = 1, H_MICRO, H_SCATTER, H_UNIT, H_PIECE, H_TABLE, H_NARROW, H_NAN, H_REDO, H_REFUSE,
       H_PUT, H_ASK, H_TOKENS, H_NORM, H_COUNT, H_FLOW, H_LEN, H_EP, H_ORDER };

static uint64_t mix(uint64_t z)
{
        z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
        return z ^ z >> 31;
}

uint64_t simplan_hash(const struct simjob *job, uint64_t what, uint64_t a, uint64_t b, uint64_t c,
                      uint64_t d)
{
        const uint64_t step = UINT64_C(0x9e3779b97f4a7c15);
        uint64_t h = mix(job->params.seed + step);

        h = mix(h ^ (what + step));
        h = mix(h ^ (a + 2 * step));
        h = mix(h ^ (b + 3 * step));
        h = mix(h ^ (c + 4 * step));
        return mix(h ^ (d + 5 * step));
}

/* ---- the model -------------------------------------------------------------------------- */

static char *copy_text(const char *text)
{
        char *copy = strdup(text);

        assert_non_null(copy);
        return copy;
}

static Autoep__Tensor *add(Autoep__Model *model, const char *unit, uint32_t dtype, uint64_t n)
{
        Autoep__Tensor *tensor = calloc(1, sizeof(*tensor));
        char name[64];

        assert_non_null(tensor);
        autoep__tensor__init(tensor);
        (void)snprintf(name, sizeof(name), "%s.t%zu", unit, model->n_tensors);
        tensor->name = copy_text(name);
        tensor->unit = copy_text(unit);
        tensor->alias_of = copy_text("");
        tensor->dtype = dtype;
        tensor->tensor_class = AE_CLASS_DENSE;
        tensor->dims = calloc(1, sizeof(*tensor->dims));
        tensor->dims[0] = n;
        tensor->n_dims = 1;
        model->tensors = realloc(model->tensors, (model->n_tensors + 1) * sizeof(Autoep__Tensor *));
        assert_non_null(model->tensors);
        model->tensors[model->n_tensors++] = tensor;
        return tensor;
}

static uint64_t draw_n(const struct simjob *job, uint32_t unit, uint32_t tensor, bool large)
{
        uint64_t h = simplan_hash(job, H_MODEL, 1, unit, tensor, 0);

        if (job->params.huge && unit == 0 && tensor == 0)
                return AE_LOCAL_PIECE_N + 1 + h % 100000;
        if (large && tensor == 0)
                return 100000 + h % 120000;
        if (h % 16 == 0)
                return 0;
        return h % 2 ? 1 + h / 16 % 300 : 1 + h / 16 % 4000;
}

static void add_unit(struct simjob *job, Autoep__Model *model, uint32_t u, const char *name)
{
        uint64_t h = simplan_hash(job, H_MODEL, 2, u, 0, 0);
        bool large = job->params.large_one_in && h % job->params.large_one_in == 0;
        uint32_t n = 1 + (uint32_t)(h >> 8) % 3;

        for (uint32_t t = 0; t < n; t++) {
                bool wide = (h >> (16 + t)) % 4 == 0;
                Autoep__Tensor *tensor = add(model, name, wide ? AE_DTYPE_F32 : AE_DTYPE_BF16,
                                             draw_n(job, u, t, large));

                tensor->group = (uint32_t)(h >> (24 + t)) & 1;
        }
        if ((h >> 32) % 4 == 0)
                add(model, name, AE_DTYPE_BF16, 1 + (h >> 34) % 500)->flags = 1;
        if ((h >> 44) % 3 == 0)
                add(model, name, AE_DTYPE_F32, 8)->tensor_class = AE_CLASS_BUFFER;
}

static bool may_be_tied(const Autoep__Tensor *tensor)
{
        return tensor->dims[0] && !tensor->flags && tensor->tensor_class == AE_CLASS_DENSE;
}

static void small_model(struct simjob *job, Autoep__Model *model)
{
        uint64_t h = simplan_hash(job, H_MODEL, 3, 0, 0, 0);
        uint32_t max = job->params.max_units ? job->params.max_units : 6;
        uint32_t n_units = 2 + (uint32_t)(h % (max - 1));
        char name[32];
        size_t first;

        for (uint32_t u = 0; u < n_units; u++) {
                (void)snprintf(name, sizeof(name), "u%u", u);
                add_unit(job, model, u, name);
        }
        if ((h >> 8) % 4 == 0) {
                Autoep__Tensor *tensor = add(model, "frozen", AE_DTYPE_BF16, 700);

                tensor->flags = 1;
        }
        for (first = 0; first < model->n_tensors && !may_be_tied(model->tensors[first]); first++)
                continue;
        if ((h >> 16) % 2 && first < model->n_tensors) {
                const Autoep__Tensor *home = model->tensors[first];
                Autoep__Tensor *tensor = add(model, "tied", home->dtype, home->dims[0]);

                free(tensor->alias_of);
                tensor->alias_of = copy_text(home->name);
        }
}

static void wide_model(const struct simjob *job, Autoep__Model *model)
{
        uint64_t n = (uint64_t)job->params.slices_per_unit * AE_LAYOUT_SLICE_MIN / 2;
        char name[32];

        for (uint32_t u = 0; u < job->params.n_units; u++) {
                (void)snprintf(name, sizeof(name), "u%u", u);
                add(model, name, AE_DTYPE_BF16, n);
        }
}

/* The smallest cache that is not refused on any node, see plan_cache() in memory.c. Where ranks
 * may wait for a step with views in their hands, which the library refuses, there is room for the
 * largest unit also between all of those, wherever they lie. */
static uint64_t least_cache(const struct simjob *job, uint32_t most_local)
{
        uint64_t first = 0;
        uint64_t second = 0;

        for (uint32_t u = 0; u < job->layout->n_units; u++) {
                uint64_t len = ae_align_up(job->layout->units[u].len, 256);

                if (len > first) {
                        second = first;
                        first = len;
                } else if (len > second) {
                        second = len;
                }
        }
        if (job->params.keep_views)
                return ae_align_up((2 * SIM_HELD * most_local + 1) * first, 4096);
        return ae_align_up(first + most_local * (first + second), 4096);
}

static uint32_t most_local(const struct simjob *job)
{
        uint32_t most = 0;

        for (uint32_t node = 0; node < job->params.n_nodes; node++) {
                uint32_t n = 0;

                for (uint32_t r = 0; r < job->params.n_ranks; r++)
                        n += job->rank_node[r] == node;
                most = AE_MAX(most, n);
        }
        return most;
}

/* Any size of EP groups that the world can have. */
static void draw_groups(struct simjob *job, Autoep__Model *model)
{
        uint64_t h = simplan_hash(job, H_EP, 0, 0, 0, 0);

        model->ep_size = 1 + (uint32_t)(h % job->params.n_ranks);
        while (job->params.n_ranks % model->ep_size)
                model->ep_size--;
        model->order = (uint32_t)(h >> 32) & 1;
        assert_int_equal(ae_group_init(job->params.n_ranks, model->ep_size, model->order,
                                       &job->topology), 0);
}

static void settle_model(struct simjob *job, Autoep__Model *model)
{
        struct ae_model borrowed = { .message = model };

        assert_int_equal(ae_model_copy(&borrowed, &job->model), 0);
        assert_int_equal(ae_model_layout(job->model, job->params.n_nodes, &job->layout), 0);
        if (job->params.tight_cache || job->params.keep_views)
                model->cache_len = least_cache(job, most_local(job));
        job->packed_len = ae_control_size(&model->base);
        job->packed = malloc(job->packed_len + 1);
        assert_non_null(job->packed);
        ae_control_pack(&model->base, job->packed);
}

void simplan_model(struct simjob *job)
{
        const struct simjob_params *params = &job->params;
        Autoep__Model *model = calloc(1, sizeof(*model));

        assert_non_null(model);
        autoep__model__init(model);
        if (params->no_data)
                wide_model(job, model);
        else
                small_model(job, model);
        model->optimizer = params->sgd ? AE_OPT_SGD : AE_OPT_ADAMW;
        model->grad_wire = params->narrow_wire ? AE_DTYPE_BF16 : AE_DTYPE_F32;
        model->slots = params->slots ? params->slots : 2;
        model->slot_len = params->no_data ? 0 : 65536;
        model->exchange_len = 4096; /* gives SIM_XSLOT_LEN, the least */
        model->sum_group = simplan_hash(job, H_MODEL, 4, 0, 0, 0) % 4 == 0;
        if (!params->no_data)
                model->overflow_len = !params->tight_overflow ? UINT64_C(64) << 20 :
                                      params->huge ? 2 * AE_LOCAL_PIECE_LEN : 65536;
        draw_groups(job, model);
        settle_model(job, model);
        ae_control_free(&model->base);
        job->n_uses = calloc(job->layout->n_units, sizeof(*job->n_uses));
        ae_layout_count_uses(job->layout, job->n_uses);
        for (uint32_t t = 0; t < job->layout->n_tensors; t++) {
                const struct ae_layout_tensor *tensor = &job->layout->tensors[t];

                if (tensor->class == AE_CLASS_BUFFER)
                        job->n_counts += (uint32_t)tensor->n;
                if (tensor->home == t)
                        job->init_len +=
                                tensor->n * (tensor->frozen || tensor->class == AE_CLASS_BUFFER ?
                                                     ae_dtype_size(tensor->dtype) :
                                                     sizeof(float));
        }
}

/* ---- a step ----------------------------------------------------------------------------- */

uint32_t simplan_n_micro(const struct simjob *job, uint32_t step, uint32_t rank)
{
        return job->params.no_data ?
                       1 :
                       1 + (uint32_t)(simplan_hash(job, H_MICRO, step, rank, 0, 0) % 3);
}

bool simplan_scatters(const struct simjob *job, uint32_t step, uint32_t rank, uint32_t micro,
                      uint32_t unit, uint32_t use)
{
        if (job->params.no_data)
                return true;
        if (job->layout->units[unit].n_grad == 0 ||
            simplan_hash(job, H_UNIT, step, unit, 0, 0) % 10 == 0)
                return false;
        return simplan_hash(job, H_SCATTER, step, rank, micro, unit * 8 + use) % 8 < 6;
}

bool simplan_piece(const struct simjob *job, uint32_t step, uint32_t rank, uint32_t micro,
                   uint32_t unit, uint32_t use, uint32_t k, struct simpiece *ret_piece)
{
        uint64_t at = 0;
        uint64_t end = job->layout->units[unit].n_grad;

        if (use > 0) {
                uint32_t alias = ae_layout_use_tensor(job->layout, unit, use);

                at = simref_grad_of(job, job->layout->tensors[alias].home);
                end = at + job->layout->tensors[alias].n;
        }
        for (uint32_t i = 0; at < end; i++) {
                uint64_t h = simplan_hash(job, H_PIECE, (uint64_t)step << 32 | rank, micro,
                                          unit * 8 + use, i);
                uint64_t cell_end = (at / AE_LOCAL_PIECE_N + 1) * AE_LOCAL_PIECE_N;
                uint64_t n = (cell_end < end ? cell_end : end) - at;

                n = AE_MIN(n, (uint64_t)AE_LOCAL_PIECE_N);
                if (i < 3 && h % 3 == 0)
                        n = 1 + h / 8 % n;
                if (i == k) {
                        *ret_piece = (struct simpiece){ at, n, i > 0 && (h >> 40) % 8 == 0 };
                        return true;
                }
                at += n;
        }
        return false;
}

uint32_t simplan_table(const struct simjob *job, uint32_t step, uint32_t rank, uint32_t micro,
                       uint32_t unit, uint32_t use)
{
        return (uint32_t)(simplan_hash(job, H_TABLE, step, rank, micro, unit * 8 + use) & 0xffff);
}

uint32_t simplan_power(uint64_t i)
{
        return (uint32_t)(i * 7 >> 2 & 31);
}

bool simplan_is_narrow(const struct simjob *job, uint32_t step, uint32_t rank, uint32_t unit)
{
        return simplan_hash(job, H_NARROW, step, rank, unit, 0) % 2;
}

bool simplan_nan(const struct simjob *job, uint32_t step, struct simnan *ret_nan)
{
        uint64_t h = simplan_hash(job, H_NAN, step, 0, 0, 0);
        struct simpiece piece;

        if (!job->params.nan || h % 3 != 0)
                return false;
        ret_nan->rank = (uint32_t)((h >> 8) % job->params.n_ranks);
        ret_nan->micro = (uint32_t)((h >> 24) % simplan_n_micro(job, step, ret_nan->rank));
        ret_nan->unit = (uint32_t)((h >> 32) % job->layout->n_units);
        ret_nan->use = (uint32_t)((h >> 40) % job->n_uses[ret_nan->unit]);
        if (!simplan_scatters(job, step, ret_nan->rank, ret_nan->micro, ret_nan->unit,
                              ret_nan->use) ||
            !simplan_piece(job, step, ret_nan->rank, ret_nan->micro, ret_nan->unit, ret_nan->use, 0,
                           &piece))
                return false;
        ret_nan->element = piece.first;
        for (uint32_t i = 0; i < job->ref.n_gaps; i++) {
                const struct simgap *gap = &job->ref.gaps[i];

                if (gap->unit == ret_nan->unit && piece.first >= gap->first &&
                    piece.first - gap->first < gap->n)
                        return false;
        }
        return true;
}

static uint32_t pick(const struct simjob *job, bool on, uint64_t what, uint32_t attempt)
{
        uint64_t h = simplan_hash(job, what, attempt, 0, 0, 0);

        return on && h % 3 == 0 ? (uint32_t)((h >> 8) % job->params.n_ranks) : AE_WIRE_NONE;
}

uint32_t simplan_redo(const struct simjob *job, uint32_t attempt)
{
        return pick(job, job->params.redo, H_REDO, attempt);
}

uint32_t simplan_refuse(const struct simjob *job, uint32_t attempt)
{
        return pick(job, job->params.refuse && job->params.n_ranks > 1, H_REFUSE, attempt);
}

uint32_t simplan_put(const struct simjob *job, uint32_t attempt)
{
        return pick(job, job->params.puts, H_PUT, attempt);
}

void simplan_ask(const struct simjob *job, uint32_t step, struct ae_wire_ask *ret_ask)
{
        static const double norms[] = { 0, 1.0, 1e-3, 1e6 };
        uint64_t h = simplan_hash(job, H_ASK, step, 0, 0, 0);

        memset(ret_ask, 0, sizeof(*ret_ask));
        ret_ask->scale = h % 3 == 0 ? 0.125 : 0;
        ret_ask->use_tokens = h % 3 == 1;
        ret_ask->max_norm = norms[(h >> 8) % AE_ARRAY_LEN(norms)];
        ret_ask->balance_rate = (h >> 12) % 2 ? 0.001 : 0;
        ret_ask->n_groups = 2;
        ret_ask->absent_groups = (h >> 16) % 4 == 0 ? 2 : 0;
        for (uint32_t g = 0; g < 2; g++)
                ret_ask->hyper[g] = (struct ae_wire_hyper){ .lr = 1e-3 * (1 + step) / (1 + g),
                                                            .beta1 = 0.9, .beta2 = 0.95,
                                                            .eps = 1e-8, .weight_decay = 0.1 * g };
}

uint64_t simplan_tokens(const struct simjob *job, uint32_t step, uint32_t rank)
{
        return 1 + simplan_hash(job, H_TOKENS, step, rank, 0, 0) % 100;
}

double simplan_expert_norm2(const struct simjob *job, uint32_t step, uint32_t rank)
{
        return (double)(simplan_hash(job, H_NORM, step, rank, 0, 0) % 5);
}

uint32_t simplan_n_counts(const struct simjob *job, uint32_t step)
{
        return simplan_hash(job, H_COUNT, step, 0, 0, 0) % 4 ? job->n_counts : 0;
}

uint64_t simplan_count(const struct simjob *job, uint32_t step, uint32_t rank, uint32_t i)
{
        return simplan_hash(job, H_COUNT, step, rank, i, 1) % 50;
}

uint32_t simplan_n_messages(const struct simjob *job, uint32_t attempt, uint32_t src, uint32_t dst)
{
        uint64_t h = simplan_hash(job, H_FLOW, attempt, src, dst, 0);

        if (!job->params.exchange || src == dst || h % 6 != 0)
                return 0;
        return 1 + (uint32_t)((h >> 8) % ((h >> 16) % 8 == 0 ? 7 : 2));
}

uint32_t simjob_misordered(const struct simjob *job)
{
        return (uint32_t)(simplan_hash(job, H_ORDER, 0, 0, 0, 0) % job->params.n_ranks);
}

/* One of those that both are in. */
static uint32_t draw_group(const struct simjob *job, uint32_t attempt, uint32_t src, uint32_t dst)
{
        const struct ae_group_topology *t = &job->topology;
        uint64_t h = simplan_hash(job, H_ORDER, 1, attempt, src, dst);

        if (job->params.misorder || h % 3 == 0)
                return 2;
        if (ae_group_ep_index(t, src) == ae_group_ep_index(t, dst))
                return 0;
        return ae_group_edp_index(t, src) == ae_group_edp_index(t, dst) ? 1 : 2;
}

/* Two exchanges a round in each kind of groups, each about something else. */
struct ae_local_xhead simplan_header(const struct simjob *job, uint32_t attempt, uint32_t src,
                                     uint32_t dst, bool later, uint32_t len)
{
        uint32_t group = draw_group(job, attempt, src, dst);
        uint64_t seq = 2 * (uint64_t)attempt + later;
        uint32_t index = group == 0 ? ae_group_ep_index(&job->topology, src)
                       : group == 1 ? ae_group_edp_index(&job->topology, src) : 0;
        uint64_t h = simplan_hash(job, H_ORDER, 2, seq, group, index);

        return (struct ae_local_xhead){
                .magic = AE_LOCAL_MAGIC, .group = (uint8_t)group, .kind = (uint8_t)(h % 4),
                .src = (uint16_t)src, .dst = (uint16_t)dst,
                .id = (uint32_t)(h >> 8 & 0xff) +
                      (job->params.misorder && src == simjob_misordered(job)),
                .len = len - (uint32_t)sizeof(struct ae_local_xhead), .seq = seq, .round = attempt,
                .block_len = len, .total = h >> 16 & 0xffff,
        };
}

uint32_t simplan_message_len(const struct simjob *job, uint32_t src, uint32_t dst, uint64_t seq)
{
        uint64_t h = simplan_hash(job, H_LEN, src, dst, seq, 0);
        uint32_t head = (uint32_t)sizeof(struct ae_local_xhead);

        if (job->params.wild) /* a quarter as long as may be */
                return (h >> 32) % 4 ? head + (uint32_t)(h % (SIM_XSLOT_LEN - head + 1))
                                     : SIM_XSLOT_LEN;
        return head + (uint32_t)(h % 400);
}

uint8_t simplan_message_byte(uint32_t src, uint32_t dst, uint64_t seq, uint32_t i)
{
        return (uint8_t)(src * 31 + dst * 17 + seq * 7 + i);
}
