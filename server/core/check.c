/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a peer may say, when, and to whom: looked at before anything acts on it, so that no message
 * of another daemon meets one of the core's own asserts. Messages to oneself don't pass here. Pure;
 * the core's thread.
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

bool ae_core_jobs_full(const struct ae_core *core)
{
        const struct ae_list *entry;
        uint32_t n = 0;

        for (entry = core->jobs.next; entry != &core->jobs; entry = entry->next)
                n++;
        return n >= AE_WIRE_MAX_JOBS;
}

/* ---- control ---------------------------------------------------------------------------- */

static bool join_fits(const struct ae_core *core, uint32_t node, const Autoep__Join *join)
{
        return ae_core_is_decider(core) && join->job[0] && join->world > 0 &&
               join->world <= AE_WIRE_MAX_WORLD && join->rank < join->world && join->node == node;
}

static bool start_fits(const struct ae_core *core, const struct ae_job *job, uint32_t node,
                       uint32_t id, const Autoep__Start *start)
{
        return node == 0 && !ae_core_is_decider(core) && start->model && start->job[0] &&
               id < AE_WIRE_MAX_JOBS && start->world > 0 && start->world <= AE_WIRE_MAX_WORLD &&
               (!job || (job->state == AE_JOB_FORMING && !job->peers &&
                         job->world == start->world));
}

/* At the decider: each node once, while the job starts. Elsewhere: the decider's word. */
static bool ready_fits(const struct ae_job *job, uint32_t node, const Autoep__Ready *ready)
{
        if (ready->status > 0 || job->state != AE_JOB_STARTING || !job->peers || !job->rank_node)
                return false;
        return ae_core_is_decider(job->core) ? !job->peers[node].ready : node == 0 && job->absent;
}

static bool decide_fits(const struct ae_job *job, uint32_t node, const Autoep__Decide *decide)
{
        if (!ae_core_is_decider(job->core) || !job->absent)
                return false;
        return decide->initial ? job->state == AE_JOB_LOADING && job->rank_node[0] == node
                               : job->state == AE_JOB_LIVE;
}

static bool left_fits(const struct ae_job *job, uint32_t node, const Autoep__Left *left)
{
        return ae_core_is_decider(job->core) && left->rank < job->world &&
               job->members[left->rank].joined && job->members[left->rank].node == node;
}

/* To the decider from the rank's node, and from there to all. */
static bool pause_fits(const struct ae_job *job, uint32_t node, const Autoep__PauseNote *note)
{
        if (note->rank >= job->world || note->seconds > AE_WIRE_PAUSE_MAX_S)
                return false;
        if (!ae_core_is_decider(job->core))
                return node == 0;
        return job->members[note->rank].joined && job->members[note->rank].node == node;
}

static bool of_job_fits(const struct ae_job *job, uint32_t node, uint32_t type,
                        const ProtobufCMessage *message)
{
        bool decider = ae_core_is_decider(job->core);

        switch (type) {
        case AE_CONTROL_OFFER:
                return decider && ((const Autoep__Offer *)message)->model;
        case AE_CONTROL_GRANTS:
                return job->rank_node && !job->peers[node].granted;
        case AE_CONTROL_READY:
                return ready_fits(job, node, (const Autoep__Ready *)message);
        case AE_CONTROL_FAIL:
                return ((const Autoep__Fail *)message)->status < 0;
        case AE_CONTROL_LEFT:
                return left_fits(job, node, (const Autoep__Left *)message);
        case AE_CONTROL_PAUSE_NOTE:
                return pause_fits(job, node, (const Autoep__PauseNote *)message);
        case AE_CONTROL_STAGE:
        case AE_CONTROL_FETCH:
                return job->absent;
        case AE_CONTROL_FETCH_REPLY: /* what was fetched comes as a put, only trouble as this */
                return ((const Autoep__FetchReply *)message)->status < 0;
        case AE_CONTROL_DECIDE:
                return decide_fits(job, node, (const Autoep__Decide *)message);
        case AE_CONTROL_DECIDE_REPLY: /* 0: a node shows the put, which its requester hears */
                return decider || node == 0 || ((const Autoep__DecideReply *)message)->status == 0;
        }
        return type == AE_CONTROL_STAGE_REPLY;
}

int ae_check_control(const struct ae_core *core, const struct ae_job *job, uint32_t node,
                     const struct ae_wire_head *head, const ProtobufCMessage *message)
{
        const Autoep__JoinReply *reply = (const Autoep__JoinReply *)message;
        bool fits = false;

        if (node == core->options.node)
                return 0;
        if (head->type == AE_CONTROL_JOIN)
                fits = join_fits(core, node, (const Autoep__Join *)message);
        else if (head->type == AE_CONTROL_JOIN_REPLY)
                fits = node == 0 && (reply->status < 0 || reply->job_id < AE_WIRE_MAX_JOBS);
        else if (head->type == AE_CONTROL_START)
                fits = start_fits(core, job, node, head->job, (const Autoep__Start *)message);
        else if (head->type > AE_CONTROL_START)
                fits = !job || job->state >= AE_JOB_FAILED || /* late: nobody acts on it */
                       (head->type == AE_CONTROL_GRANTS && !job->peers) ||
                       of_job_fits(job, node, head->type, message);
        else if (head->type == AE_CONTROL_OFFER)
                fits = !job || of_job_fits(job, node, head->type, message);
        if (fits)
                return 0;
        return ae_fail(AE_EPROTO, "%s from node %u does not fit", ae_control_name(head->type),
                       node);
}

/* ---- hot messages ------------------------------------------------------------------------ */

static bool prepare_fits(const struct ae_job *job, const struct ae_wire_prepare *prepare,
                         size_t len)
{
        if (len < sizeof(*prepare) || prepare->verdict.kind < AE_VERDICT_APPLIED ||
            prepare->verdict.kind > AE_VERDICT_REFUSED ||
            prepare->verdict.ask.n_groups > AE_WIRE_MAX_GROUPS)
                return false;
        if (prepare->head.round != job->round)
                return true; /* late or kept for its time */
        if (prepare->verdict.kind == AE_VERDICT_PUT)
                return !job->put_prepared && (job->committed || job->state == AE_JOB_LOADING);
        return job->state == AE_JOB_LIVE && job->round_state == AE_ROUND_VOTED;
}

/* A put ends a round that nobody has closed; one that is voted on was called off. */
static bool commit_fits(const struct ae_job *job, const struct ae_wire_head *head)
{
        return head->round != job->round || !job->put_prepared ||
               job->round_state <= AE_ROUND_ENDED;
}

static bool xcredit_fits(const struct ae_job *job, uint32_t node,
                         const struct ae_wire_xcredit *credit, size_t len)
{
        return len >= sizeof(*credit) && credit->src < job->world && credit->dst < job->world &&
               job->rank_node[credit->dst] == node;
}

int ae_check_hot(const struct ae_job *job, uint32_t node, const struct ae_wire_head *head,
                 size_t len)
{
        bool fits = job->absent; /* made last: all that hot messages touch is there */

        if (node == job->core->options.node)
                return 0;
        if (head->op == AE_WIRE_WAITING)
                fits = node == 0;
        else if (head->op == AE_WIRE_PREPARE)
                fits = fits && node == 0 &&
                       prepare_fits(job, (const struct ae_wire_prepare *)head, len);
        else if (head->op == AE_WIRE_COMMIT)
                fits = fits && node == 0 && commit_fits(job, head);
        else if (head->op == AE_WIRE_VOTE)
                fits = fits && len >= sizeof(struct ae_wire_vote) &&
                       ((const struct ae_wire_vote *)head)->ask.n_groups <= AE_WIRE_MAX_GROUPS;
        else if (head->op == AE_WIRE_XCREDIT)
                fits = fits && xcredit_fits(job, node, (const struct ae_wire_xcredit *)head, len);
        if (fits)
                return 0;
        return ae_fail(AE_EPROTO, "message %u of %zu bytes from node %u does not fit job '%s'",
                       head->op,
                       len, node, job->name);
}
