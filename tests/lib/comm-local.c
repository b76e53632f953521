/* SPDX-License-Identifier: Apache-2.0 */
/* Groups of threads that exchange through each other's memory; see comm-local.h. */
#include "tests/lib/comm-local.h"

#include "proto/base/clock.h"
#include "proto/base/list.h"
#include "proto/base/status.h"

#include <assert.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct post {
        const char *send;
        const uint64_t *send_len;
        bool here;
};

struct comm_local {
        pthread_mutex_t lock;
        pthread_cond_t turned;
        uint32_t size;
        uint32_t n_here;
        uint64_t turn;    /* counts barriers */
        int fault;        /* status that broke the group */
        char text[256];   /* of the fault */
        uint32_t ranks[COMM_LOCAL_RANKS_MAX];
        struct post posts[COMM_LOCAL_RANKS_MAX];
};

struct member {
        struct ae_comm comm;
        struct comm_local *group;
};

struct comm_local *comm_local_new(const uint32_t *ranks, uint32_t size)
{
        struct comm_local *group = calloc(1, sizeof(*group));
        pthread_condattr_t attr;

        assert(size > 0 && size <= COMM_LOCAL_RANKS_MAX);
        if (!group)
                return NULL;
        group->size = size;
        memcpy(group->ranks, ranks, size * sizeof(*ranks));
        pthread_mutex_init(&group->lock, NULL);
        pthread_condattr_init(&attr);
        pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
        pthread_cond_init(&group->turned, &attr);
        pthread_condattr_destroy(&attr);
        return group;
}

void comm_local_free(struct comm_local *group)
{
        if (!group)
                return;
        pthread_cond_destroy(&group->turned);
        pthread_mutex_destroy(&group->lock);
        free(group);
}

/* With the lock held: the first fault stays. */
static void break_group(struct comm_local *group, int status, const char *text)
{
        if (group->fault == 0) {
                group->fault = status;
                (void)snprintf(group->text, sizeof(group->text), "%s", text);
        }
        pthread_cond_broadcast(&group->turned);
}

/* With the lock held. */
static void break_for_missing(struct comm_local *group)
{
        char text[256];
        size_t len = (size_t)snprintf(text, sizeof(text), "the exchange waited for rank");

        for (uint32_t p = 0; p < group->size && len < sizeof(text); p++) {
                if (!group->posts[p].here)
                        len += (size_t)snprintf(text + len, sizeof(text) - len, " %u",
                                                group->ranks[p]);
        }
        break_group(group, AE_ETIMEDOUT, text);
}

/* Waits until all members are here; returns the group's fault. */
static int barrier(struct comm_local *group, uint32_t position, uint64_t deadline_ns)
{
        const struct timespec until = { .tv_sec = (time_t)(deadline_ns / AE_NS_PER_S),
                                        .tv_nsec = (long)(deadline_ns % AE_NS_PER_S) };
        uint64_t turn;
        int fault;

        pthread_mutex_lock(&group->lock);
        turn = group->turn;
        group->posts[position].here = true;
        if (++group->n_here == group->size) {
                for (uint32_t p = 0; p < group->size; p++)
                        group->posts[p].here = false;
                group->n_here = 0;
                group->turn++;
                pthread_cond_broadcast(&group->turned);
        }
        while (group->turn == turn && group->fault == 0) {
                if (pthread_cond_timedwait(&group->turned, &group->lock, &until) != 0 &&
                    group->turn == turn)
                        break_for_missing(group);
        }
        fault = group->fault;
        if (fault < 0)
                (void)ae_fail(fault, "%s", group->text);
        pthread_mutex_unlock(&group->lock);
        return fault;
}

static uint64_t offset_of(const uint64_t *lens, uint32_t position)
{
        uint64_t off = 0;

        for (uint32_t p = 0; p < position; p++)
                off += lens[p];
        return off;
}

static void take_block(struct member *member, uint32_t from, char *recv, uint64_t recv_len)
{
        struct comm_local *group = member->group;
        const struct post *post = &group->posts[from];
        const uint32_t position = member->comm.position;
        char text[256];

        if (post->send_len[position] == recv_len) {
                if (recv_len > 0)
                        memcpy(recv, post->send + offset_of(post->send_len, position), recv_len);
                return;
        }
        (void)snprintf(text, sizeof(text),
                       "rank %u sends %llu bytes to rank %u, which expects %llu",
                       group->ranks[from], (unsigned long long)post->send_len[position],
                       group->ranks[position], (unsigned long long)recv_len);
        pthread_mutex_lock(&group->lock);
        break_group(group, AE_EMISMATCH, text);
        pthread_mutex_unlock(&group->lock);
}

static int local_alltoallv(struct ae_comm *comm, const void *send, const uint64_t *send_len,
                           void *recv, const uint64_t *recv_len, uint64_t deadline_ns)
{
        struct member *member = ae_container_of(comm, struct member, comm);
        struct post *post = &member->group->posts[comm->position];
        int r;

        post->send = send;
        post->send_len = send_len;
        r = barrier(member->group, comm->position, deadline_ns);
        if (r < 0)
                return r;
        for (uint32_t p = 0; p < comm->size; p++) {
                char *to = recv_len[p] > 0 ? (char *)recv + offset_of(recv_len, p) : NULL;

                take_block(member, p, to, recv_len[p]);
        }
        return barrier(member->group, comm->position, deadline_ns);
}

static const struct ae_comm_ops local_ops = { .name = "local", .alltoallv = local_alltoallv };

int comm_local_join(struct comm_local *group, uint32_t position, struct ae_comm **ret_comm)
{
        struct member *member = calloc(1, sizeof(*member));
        int r;

        if (!member)
                return ae_fail(AE_ENOMEM, "cannot join a local group");
        member->group = group;
        r = ae_comm_init(&member->comm, &local_ops, group->ranks, group->size, position);
        if (r < 0) {
                free(member);
                return r;
        }
        *ret_comm = &member->comm;
        return 0;
}

void comm_local_leave(struct ae_comm *comm)
{
        struct member *member;

        if (!comm)
                return;
        member = ae_container_of(comm, struct member, comm);
        ae_comm_deinit(comm);
        free(member);
}

struct world {
        const struct ae_group_topology *topology;
        int (*body)(const struct local_rank *self);
        void *arg;
        uint64_t deadline_ns;
        struct comm_local *ep[COMM_LOCAL_RANKS_MAX], *edp[COMM_LOCAL_RANKS_MAX];
};

struct thread {
        struct world *world;
        pthread_t id;
        uint32_t rank;
        int status;
        char text[512];
};

static int run_body(const struct thread *self)
{
        const struct world *world = self->world;
        const struct ae_group_topology *topology = world->topology;
        struct local_rank me = { .arg = world->arg, .topology = topology, .rank = self->rank,
                                 .deadline_ns = world->deadline_ns };
        int r = comm_local_join(world->ep[ae_group_ep_index(topology, me.rank)],
                                ae_group_ep_rank(topology, me.rank), &me.ep);

        if (r == 0)
                r = comm_local_join(world->edp[ae_group_edp_index(topology, me.rank)],
                                    ae_group_edp_rank(topology, me.rank), &me.edp);
        if (r == 0)
                r = world->body(&me);
        comm_local_leave(me.ep);
        comm_local_leave(me.edp);
        return r;
}

static void *thread_main(void *arg)
{
        struct thread *self = arg;

        self->status = run_body(self);
        (void)snprintf(self->text, sizeof(self->text), "%s", ae_error_text());
        return NULL;
}

static void form_groups(struct world *world)
{
        const struct ae_group_topology *topology = world->topology;
        uint32_t ranks[COMM_LOCAL_RANKS_MAX];

        for (uint32_t g = 0; g < topology->edp_size; g++) {
                for (uint32_t p = 0; p < topology->ep_size; p++)
                        ranks[p] = ae_group_ep_member(topology, g, p);
                world->ep[g] = comm_local_new(ranks, topology->ep_size);
                assert(world->ep[g]);
        }
        for (uint32_t g = 0; g < topology->ep_size; g++) {
                for (uint32_t p = 0; p < topology->edp_size; p++)
                        ranks[p] = ae_group_edp_member(topology, g, p);
                world->edp[g] = comm_local_new(ranks, topology->edp_size);
                assert(world->edp[g]);
        }
}

int local_world_run(const struct ae_group_topology *topology,
                    int (*body)(const struct local_rank *self), void *arg)
{
        struct world world = { .topology = topology, .body = body, .arg = arg,
                               .deadline_ns = ae_now_ns() + 10 * AE_NS_PER_S };
        struct thread threads[COMM_LOCAL_RANKS_MAX];
        int status = 0;

        assert(topology->world <= COMM_LOCAL_RANKS_MAX);
        form_groups(&world);
        for (uint32_t r = 0; r < topology->world; r++) {
                threads[r] = (struct thread){ .world = &world, .rank = r };
                if (pthread_create(&threads[r].id, NULL, thread_main, &threads[r]) != 0)
                        abort();
        }
        for (uint32_t r = 0; r < topology->world; r++) {
                pthread_join(threads[r].id, NULL);
                if (threads[r].status != 0 && status == 0)
                        status = ae_fail(threads[r].status, "rank %u: %s", r, threads[r].text);
        }
        for (uint32_t g = 0; g < COMM_LOCAL_RANKS_MAX; g++) {
                comm_local_free(world.ep[g]);
                comm_local_free(world.edp[g]);
        }
        return status;
}
