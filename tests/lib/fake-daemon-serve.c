/* SPDX-License-Identifier: Apache-2.0 */
/* The fake daemon's thread: sockets, queues, memory. It holds the lock but while it sleeps. */
#include "tests/lib/fake-daemon-private.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define N_SLOTS 64u

/* ---- frames ----------------------------------------------------------------------------- */

static void send_frame(struct fake_worker *w, uint32_t type, const ProtobufCMessage *message,
                       const int *fds, uint32_t n_fds)
{
        union {
                struct cmsghdr align;
                char space[CMSG_SPACE(4 * sizeof(int))];
        } control = { .space = { 0 } };
        struct ae_control_frame frame = { .type = (uint16_t)type,
                                          .len = (uint32_t)ae_control_size(message) };
        uint8_t *body = malloc(frame.len + 1);
        struct iovec iov[2] = { { &frame, sizeof(frame) }, { body, frame.len } };
        struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 2 };

        ae_control_pack(message, body);
        if (n_fds > 0) {
                struct cmsghdr *cmsg;

                msg.msg_control = control.space;
                msg.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
                cmsg = CMSG_FIRSTHDR(&msg);
                cmsg->cmsg_level = SOL_SOCKET;
                cmsg->cmsg_type = SCM_RIGHTS;
                cmsg->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
                memcpy(CMSG_DATA(cmsg), fds, n_fds * sizeof(int));
        }
        /* The worker may be gone; frames are small enough for the socket's buffer. */
        (void)sendmsg(w->socket, &msg, MSG_NOSIGNAL);
        free(body);
}

static void send_error(struct fake_worker *w, uint64_t id, int status, const char *text)
{
        Autoep__Error error = AUTOEP__ERROR__INIT;

        error.id = id;
        error.status = status;
        error.text = (char *)(uintptr_t)text;
        send_frame(w, AE_CONTROL_ERROR, &error.base, NULL, 0);
}

static void send_done(struct fake_daemon *d, struct fake_worker *w, uint64_t id)
{
        Autoep__Done done = AUTOEP__DONE__INIT;

        done.id = id;
        done.version = d->params ? atomic_load(&d->params->job_version) : 0;
        send_frame(w, AE_CONTROL_DONE, &done.base, NULL, 0);
}

/* Reads exactly @len bytes; false at the end. Takes one descriptor. */
static bool read_all(int sock, void *to, size_t len, int *fd)
{
        size_t have = 0;

        while (have < len) {
                union {
                        struct cmsghdr align;
                        char space[CMSG_SPACE(sizeof(int))];
                } control;
                struct iovec iov = { (uint8_t *)to + have, len - have };
                struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1,
                                      .msg_control = control.space,
                                      .msg_controllen = sizeof(control.space) };
                ssize_t n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC);
                struct cmsghdr *cmsg = n > 0 ? CMSG_FIRSTHDR(&msg) : NULL;

                if (n <= 0)
                        return false;
                if (cmsg && cmsg->cmsg_type == SCM_RIGHTS)
                        memcpy(fd, CMSG_DATA(cmsg), sizeof(int));
                have += (size_t)n;
        }
        return true;
}

/* ---- memory ----------------------------------------------------------------------------- */

static void *make_memory(uint64_t len, bool seal, int *ret_fd)
{
        int fd = memfd_create("fake", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        void *base;

        fake_must(fd >= 0 && ftruncate(fd, (off_t)len) == 0, "memfd_create");
        if (seal)
                fake_must(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0, "F_ADD_SEALS");
        base = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        fake_must(base != MAP_FAILED, "mmap");
        *ret_fd = fd;
        return base;
}

static void lie_about_page(const struct fake_daemon *d, struct ae_local_page *page)
{
        if (d->config.lie == FAKE_PAGE_MAGIC)
                page->magic = 7;
        if (d->config.lie == FAKE_GRAD_SHORT)
                page->grad_len -= 4096;
}

static void say_hello_ok(struct fake_daemon *d, struct fake_worker *w)
{
        Autoep__HelloOk ok = AUTOEP__HELLO_OK__INIT;
        enum fake_lie lie = d->config.lie;
        int fds[3] = { 0, 0, w->worker_bell };

        w->page = make_memory(sizeof(*w->page), lie != FAKE_PAGE_UNSEALED, &fds[0]);
        w->grad = make_memory(w->grad_len, true, &fds[1]);
        w->page->magic = AE_LOCAL_MAGIC;
        w->page->version = AE_WIRE_VERSION;
        w->page->rank = w->rank;
        w->page->grad_len = w->grad_len;
        lie_about_page(d, w->page);
        ok.version = AE_WIRE_VERSION + (lie == FAKE_HELLO_VERSION);
        ok.node = lie == FAKE_HELLO_NODE ? 5 : 0;
        ok.n_nodes = 1;
        ok.transport = (char *)(uintptr_t)"none";
        ok.page_len = sizeof(*w->page) + (lie == FAKE_PAGE_SHORT ? 8192 : 0);
        ok.grad_len = w->grad_len;
        send_frame(w, AE_CONTROL_HELLO_OK, &ok.base, fds, lie == FAKE_HELLO_NO_FDS ? 0 : 3);
        close(fds[0]);
        close(fds[1]);
}

static void take_hello(struct fake_daemon *d, struct fake_worker *w, const Autoep__Hello *hello)
{
        static const struct ae_control_frame huge = { .len = UINT32_MAX, .type = 2 };
        static const struct ae_control_frame junk = { .len = 8, .type = AE_CONTROL_HELLO_OK };

        w->rank = hello->rank;
        w->reader = hello->reader;
        w->grad_len = AE_MAX(hello->ring_len, AE_LOCAL_RING_MIN);
        if (d->config.lie == FAKE_HELLO_MUTE)
                return;
        if (d->config.lie == FAKE_HELLO_FRAME_HUGE) {
                fake_must(send(w->socket, &huge, sizeof(huge), 0) > 0, "send");
        } else if (d->config.lie == FAKE_HELLO_JUNK) {
                fake_must(send(w->socket, &junk, sizeof(junk), 0) > 0, "send");
                fake_must(send(w->socket, "\xff\xff\xff\xff\xff\xff\xff\xff", 8, 0) > 0, "send");
        } else if (d->config.token && strcmp(d->config.token, hello->token) != 0) {
                send_error(w, 0, AE_EAUTH, "the token of job 'test' is another one");
                shutdown(w->socket, SHUT_WR);
        } else {
                say_hello_ok(d, w);
        }
}

/* ---- registration ----------------------------------------------------------------------- */

static void make_params(struct fake_daemon *d)
{
        uint64_t units_off = ae_align_up(sizeof(struct ae_local_params), 64);
        uint64_t slots_off = units_off + ae_align_up(d->layout->n_units * 8u + 8, 64);
        uint64_t cache_off = ae_align_up(slots_off + N_SLOTS * sizeof(struct ae_local_slot), 4096);

        d->cell_len = 256;
        for (uint32_t i = 0; i < d->layout->n_units; i++)
                d->cell_len = AE_MAX(d->cell_len, ae_align_up(d->layout->units[i].len, 256));
        d->params_len = cache_off + N_SLOTS * d->cell_len;
        d->params = make_memory(d->params_len, true, &d->params_fd);
        d->params->magic = d->config.lie == FAKE_PARAMS_MAGIC ? 7 : AE_LOCAL_MAGIC;
        d->params->version = AE_WIRE_VERSION;
        d->params->n_units = d->layout->n_units + (d->config.lie == FAKE_PARAMS_UNITS);
        d->params->world = d->config.world;
        d->params->units_off = units_off;
        d->params->slots_off = slots_off;
        d->params->n_slots = d->config.lie == FAKE_PARAMS_SLOTS ? 60000 : N_SLOTS;
        d->params->cache_off = cache_off + (d->config.lie == FAKE_PARAMS_OFF ? 1u << 30 : 0);
        d->params->cache_len = N_SLOTS * d->cell_len;
        atomic_store(&d->params->epoch, 1);
        atomic_store(&d->params->round, 1);
        atomic_store(&d->params->state, AE_LOCAL_LIVE);
        d->units = (_Atomic uint64_t *)((uint8_t *)d->params + units_off);
        d->slots = (struct ae_local_slot *)((uint8_t *)d->params + slots_off);
        d->cache = (uint8_t *)d->params + cache_off;
        for (uint32_t i = 0; i < d->layout->n_units; i++)
                atomic_store(&d->units[i], ae_local_entry(0, AE_LOCAL_SLOT_NONE));
}

static void make_exchange(struct fake_daemon *d, struct fake_worker *w, int *xout_fd, int *xin_fd)
{
        uint64_t flows_len = d->config.world * sizeof(w->xin->flows[0]);
        uint64_t slots_off = ae_align_up(sizeof(*w->xin) + flows_len, 64);

        w->xout_len = d->config.xout_len;
        w->xin_len = slots_off + d->config.world * AE_LOCAL_XSLOTS * d->config.slot_len;
        w->xout = make_memory(w->xout_len, true, xout_fd);
        w->xin = make_memory(w->xin_len, true, xin_fd);
        w->xin->magic = AE_LOCAL_MAGIC;
        w->xin->slot_len = d->config.lie == FAKE_XIN_SLOTS ? 1u << 30 : d->config.slot_len;
        w->xin->slots_off = slots_off;
        w->page->xout_len = w->xout_len;
}

static void say_registered(struct fake_daemon *d, struct fake_worker *w)
{
        Autoep__Registered answer = AUTOEP__REGISTERED__INIT;
        uint32_t nodes[FAKE_WORKERS_MAX] = { 0 };
        int fds[3] = { d->params_fd, -1, -1 };

        if (!w->reader)
                make_exchange(d, w, &fds[1], &fds[2]);
        answer.model = d->config.lie == FAKE_REGISTERED_NO_MODEL ? NULL : d->model->message;
        answer.rank = w->rank + (d->config.lie == FAKE_REGISTERED_RANK);
        answer.world = d->config.world;
        answer.n_rank_node = d->config.world;
        answer.rank_node = nodes;
        answer.params_len = d->params_len;
        answer.xout_len = w->xout_len;
        answer.xin_len = w->xin_len;
        answer.hold_len = d->config.hold_len;
        send_frame(w, AE_CONTROL_REGISTERED, &answer.base, fds, w->reader ? 1 : 3);
        if (!w->reader) {
                close(fds[1]);
                close(fds[2]);
        }
        w->registered = false;
}

/* All ranks are there, or a reader is and the job lives: everybody who waits is answered. */
static void answer_registrations(struct fake_daemon *d)
{
        uint32_t n = 0;

        for (uint32_t i = 0; i < d->n_workers; i++)
                n += d->workers[i].registered && !d->workers[i].reader;
        if (atomic_load(&d->holds) & FAKE_HOLD_REGISTER || !d->model ||
            (!d->params && n < d->config.world))
                return;
        if (!d->params)
                make_params(d);
        for (uint32_t i = 0; i < d->n_workers; i++) {
                if (d->workers[i].registered)
                        say_registered(d, &d->workers[i]);
        }
}

static void take_register(struct fake_daemon *d, struct fake_worker *w, Autoep__Register *reg,
                          int fd)
{
        Autoep__Model *message = reg->model;

        if (d->config.register_status < 0) {
                send_error(w, 0, d->config.register_status, "ranks 1, 3 are missing");
                return;
        }
        fake_must(w->rank == 0 || (reg->init_len == 0 && fd < 0), "values of another rank than 0");
        if (message && w->rank == 0 && !d->model) {
                reg->model = NULL;
                fake_must(ae_model_new(message, &d->model) == 0, "ae_model_new");
                fake_must(ae_model_layout(d->model, 1, &d->layout) == 0, "ae_model_layout");
                d->init_len = reg->init_len;
                d->init = malloc(reg->init_len + 1);
                fake_must(reg->init_len == 0 ||
                          pread(fd, d->init, reg->init_len, 0) == (ssize_t)reg->init_len, "pread");
        }
        w->registered = true;
}

/* ---- state ------------------------------------------------------------------------------ */

/* Element i of the answer is 1000 * tensor + 10 * what + first + i, as fp32. */
static void take_get(struct fake_daemon *d, struct fake_worker *w, const Autoep__Get *get, int fd)
{
        off_t off = 0;

        if (d->state_status < 0) {
                send_error(w, get->id, d->state_status, "node 1 has no such state");
                return;
        }
        for (size_t k = 0; k < get->n_items; k++) {
                const Autoep__StateItem *item = get->items[k];

                for (uint64_t i = 0; i < item->n; i++, off += 4) {
                        float value = (float)(1000 * item->tensor + 10 * item->what + item->first +
                                              i);

                        fake_must(pwrite(fd, &value, sizeof(value), off) == sizeof(value),
                                  "pwrite");
                }
        }
        send_done(d, w, get->id);
}

static void take_put(struct fake_daemon *d, struct fake_worker *w, const Autoep__Put *put, int fd)
{
        off_t len = lseek(fd, 0, SEEK_END);

        if (d->state_status < 0) {
                send_error(w, put->id, d->state_status, "the version is another one");
                return;
        }
        free(d->put);
        d->put_len = (uint64_t)len;
        d->put = malloc(d->put_len + 1);
        fake_must(pread(fd, d->put, d->put_len, 0) == len, "pread");
        send_done(d, w, put->id);
}

static void take_message(struct fake_daemon *d, struct fake_worker *w, uint32_t type,
                         ProtobufCMessage *message, int fd)
{
        bool silent = atomic_load(&d->holds) & FAKE_HOLD_STATE;

        if (type == AE_CONTROL_HELLO)
                take_hello(d, w, (Autoep__Hello *)message);
        else if (type == AE_CONTROL_REGISTER)
                take_register(d, w, (Autoep__Register *)message, fd);
        else if (silent)
                return;
        else if (type == AE_CONTROL_GET)
                take_get(d, w, (Autoep__Get *)message, fd);
        else if (type == AE_CONTROL_PUT)
                take_put(d, w, (Autoep__Put *)message, fd);
        else if (type == AE_CONTROL_PAUSE)
                send_done(d, w, ((Autoep__Pause *)message)->id);
        else if (type == AE_CONTROL_LEAVE)
                send_done(d, w, ((Autoep__Leave *)message)->id);
}

static void receive(struct fake_daemon *d, struct fake_worker *w)
{
        AE_CLEANUP(ae_control_free_p) ProtobufCMessage *message = NULL;
        AE_CLEANUP(ae_cleanup_free) uint8_t *body = NULL;
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        struct ae_control_frame frame;

        if (!read_all(w->socket, &frame, sizeof(frame), &fd)) {
                close(w->socket);
                w->socket = -1;
                return;
        }
        body = malloc(frame.len + 1);
        fake_must(read_all(w->socket, body, frame.len, &fd), "recvmsg");
        fake_must(ae_control_unpack(frame.type, body, frame.len, &message) == 0,
                  "ae_control_unpack");
        take_message(d, w, frame.type, message, fd);
}

/* ---- queues ----------------------------------------------------------------------------- */

static void answer_gather(struct fake_daemon *d, struct fake_worker *w,
                          const struct ae_local_sqe *sqe)
{
        bool range = sqe->op == AE_SQ_RANGE;
        uint64_t version = atomic_load(&d->params->job_version);
        uint64_t first = range ? sqe->first : 0;
        uint64_t len = range ? sqe->n : d->layout->units[sqe->unit].len;
        uint32_t slot = fake_fill_slot(d, sqe->unit, version, first, len);
        uint32_t tail = atomic_load(&w->page->cq_tail);
        enum fake_lie lie = d->config.lie;

        d->pins[slot]++;
        d->n_gathers++;
        w->page->cq[tail % AE_LOCAL_CQ_LEN] = (struct ae_local_cqe){
                .token = sqe->token + (lie == FAKE_CQE_TOKEN),
                .status = lie == FAKE_CQE_STATUS ? AE_EBUDGET : 0,
                .slot = lie == FAKE_CQE_SLOT ? N_SLOTS : slot,
                .version = version,
                .off = lie == FAKE_CQE_OFF ? UINT64_MAX - 255 : d->slots[slot].off,
                .len = len,
        };
        if (lie == FAKE_CQE_STATUS)
                ae_local_text_set(&w->page->why, "the cache of node 0 is full");
        atomic_store(&w->page->cq_tail, tail + 1);
}

static void keep_piece(struct fake_worker *w, const struct ae_local_sqe *sqe)
{
        struct fake_piece *piece;
        uint64_t off = sqe->pos % w->grad_len;

        fake_must(off + sqe->len <= w->grad_len, "a piece wraps");
        w->pieces = realloc(w->pieces, (w->n_pieces + 1) * sizeof(*w->pieces));
        piece = &w->pieces[w->n_pieces++];
        piece->sqe = *sqe;
        piece->data = malloc(sqe->len + 1);
        memcpy(piece->data, w->grad + off, sqe->len);
        atomic_store(&w->page->grad_tail, sqe->pos + sqe->len);
}

/* A put that nobody asked this daemon for: it ends the round, and its verdict is not shown. */
static void take_round_for_put(struct fake_daemon *d, uint64_t round)
{
        for (uint32_t i = 0; i < d->n_workers; i++)
                d->workers[i].asked = false;
        atomic_fetch_add(&d->params->job_version, 1);
        atomic_store(&d->params->round, round + 1);
        d->verdict_kind = AE_VERDICT_APPLIED;
        fake_wake_all(d);
}

static void decide(struct fake_daemon *d)
{
        uint64_t round = atomic_load(&d->params->round);
        struct ae_wire_verdict *v = &d->params->verdict;
        enum fake_lie lie = d->config.lie;
        uint32_t n = 0;

        for (uint32_t i = 0; i < d->n_workers; i++)
                n += d->workers[i].asked;
        if (n < d->config.world)
                return;
        if (d->verdict_kind == AE_VERDICT_PUT) {
                take_round_for_put(d, round);
                return;
        }
        *v = (struct ae_wire_verdict){ .kind = lie == FAKE_VERDICT_KIND ? 9 : d->verdict_kind,
                                       .epoch = 1, .bad = d->bad, .norm = 2, .clip = 0.5,
                                       .scale = 0.25, .grad_scale = 0.125,
                                       .round = round + (lie == FAKE_VERDICT_ROUND) };
        for (uint32_t i = 0; i < d->n_workers; i++) {
                struct fake_worker *w = &d->workers[i];

                v->tokens += w->step.tokens;
                v->micro_batches += w->step.micro_batches;
                if (w->rank == 0)
                        v->ask = w->step.ask;
                w->asked = false;
        }
        v->version = atomic_load(&d->params->job_version) + (v->kind == AE_VERDICT_APPLIED);
        atomic_store(&d->params->job_version, v->version);
        atomic_store(&d->params->round, round + 1);
        d->verdict_kind = AE_VERDICT_APPLIED;
        fake_wake_all(d);
}

static struct fake_worker *worker_of(struct fake_daemon *d, uint32_t rank)
{
        for (uint32_t i = 0; i < d->n_workers; i++) {
                if (d->workers[i].rank == rank && !d->workers[i].reader && d->workers[i].xin)
                        return &d->workers[i];
        }
        return NULL;
}

/* Puts a message into its flow if a slot is free. */
static bool deliver(struct fake_daemon *d, const struct fake_worker *from,
                    const struct ae_local_sqe *sqe)
{
        struct fake_worker *to = worker_of(d, sqe->rank);
        uint64_t number, slot;

        if (!to || to->flow_sent[from->rank] - to->flow_acked[from->rank] >= AE_LOCAL_XSLOTS)
                return false;
        number = to->flow_sent[from->rank]++;
        slot = from->rank * AE_LOCAL_XSLOTS + number % AE_LOCAL_XSLOTS;
        memcpy((uint8_t *)to->xin + to->xin->slots_off + slot * d->config.slot_len,
               from->xout + sqe->pos % from->xout_len, sqe->len);
        atomic_store(&to->xin->flows[from->rank].ready[number % AE_LOCAL_XSLOTS], number + 1);
        fake_wake(to);
        return true;
}

/* Per flow in order; the ring is free up to the first message that still waits. */
static void deliver_all(struct fake_daemon *d, struct fake_worker *w)
{
        bool stuck[FAKE_WORKERS_MAX] = { false };
        bool free_so_far = true;
        uint64_t tail = 0;

        for (size_t i = 0; i < w->n_sends; i++) {
                struct fake_message *m = &w->sends[i];

                if (!m->delivered && !stuck[m->sqe.rank])
                        m->delivered = deliver(d, w, &m->sqe);
                stuck[m->sqe.rank] |= !m->delivered;
                free_so_far &= m->delivered;
                if (free_so_far)
                        tail = m->sqe.pos + m->sqe.len;
        }
        if (tail)
                atomic_store(&w->page->xout_tail, tail);
}

static uint32_t hold_of(uint32_t op)
{
        switch (op) {
        case AE_SQ_GATHER:
        case AE_SQ_RANGE:
                return FAKE_HOLD_GATHER;
        case AE_SQ_PIECE:
                return FAKE_HOLD_PIECE;
        case AE_SQ_STEP:
                return FAKE_HOLD_STEP;
        case AE_SQ_XSEND:
                return FAKE_HOLD_XSEND;
        }
        return 0;
}

static void take_sqe(struct fake_daemon *d, struct fake_worker *w, const struct ae_local_sqe *sqe)
{
        w->log = realloc(w->log, (w->n_log + 1) * sizeof(*w->log));
        w->log[w->n_log++] = *sqe;
        if (sqe->op == AE_SQ_GATHER || sqe->op == AE_SQ_RANGE) {
                answer_gather(d, w, sqe);
        } else if (sqe->op == AE_SQ_UNPIN) {
                fake_must(sqe->slot < N_SLOTS && d->pins[sqe->slot] > 0, "an unpin of nothing");
                d->pins[sqe->slot]--;
                d->unpins++;
        } else if (sqe->op == AE_SQ_PIECE) {
                keep_piece(w, sqe);
        } else if (sqe->op == AE_SQ_STEP) {
                fake_must(sqe->token == w->page->step.round, "a step of two rounds");
                w->step = w->page->step;
                w->asked = true;
        } else if (sqe->op == AE_SQ_XSEND) {
                fake_must(sqe->rank < FAKE_WORKERS_MAX &&
                          sqe->pos % w->xout_len + sqe->len <= w->xout_len, "a bad message");
                w->sends = realloc(w->sends, (w->n_sends + 1) * sizeof(*w->sends));
                w->sends[w->n_sends++] = (struct fake_message){ .sqe = *sqe };
        } else if (sqe->op == AE_SQ_XACK) {
                fake_must(sqe->rank < FAKE_WORKERS_MAX && sqe->n <= w->flow_sent[sqe->rank],
                          "a bad acknowledgement");
                w->flow_acked[sqe->rank] = sqe->n;
        }
}

static bool read_queue(struct fake_daemon *d, struct fake_worker *w)
{
        uint32_t holds = atomic_load(&d->holds);
        bool any = false;

        while (w->page && !(holds & FAKE_HOLD_ALL) &&
               w->sq_head != atomic_load(&w->page->sq_tail)) {
                struct ae_local_sqe sqe = w->page->sq[w->sq_head % AE_LOCAL_SQ_LEN];

                if (hold_of(sqe.op) & holds)
                        break;
                take_sqe(d, w, &sqe);
                atomic_store(&w->page->sq_head, ++w->sq_head);
                any = true;
        }
        return any;
}

/* ---- the loop --------------------------------------------------------------------------- */

static void accept_worker(struct fake_daemon *d)
{
        struct fake_worker *w = &d->workers[d->n_workers];
        int bell[2];

        fake_must(d->n_workers < FAKE_WORKERS_MAX, "too many workers");
        w->socket = accept4(d->listener, NULL, NULL, SOCK_CLOEXEC);
        fake_must(w->socket >= 0, "accept4");
        fake_must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, bell) == 0,
                  "socketpair");
        w->bell = bell[0];
        w->worker_bell = bell[1];
        d->n_workers++;
}

static bool look_at_all(struct fake_daemon *d)
{
        bool any = false;

        for (uint32_t i = 0; i < d->n_workers; i++) {
                if (read_queue(d, &d->workers[i])) {
                        any = true;
                        fake_wake(&d->workers[i]);
                }
        }
        for (uint32_t i = 0; i < d->n_workers; i++)
                deliver_all(d, &d->workers[i]);
        if (d->params)
                decide(d);
        answer_registrations(d);
        if (any)
                fake_wake_all(d);
        return any;
}

static void set_sleeping(struct fake_daemon *d, uint32_t sleeping)
{
        for (uint32_t i = 0; i < d->n_workers; i++) {
                if (d->workers[i].page)
                        atomic_store(&d->workers[i].page->daemon_sleeps, sleeping);
        }
}

static void drain(int fd)
{
        char rings[512];

        (void)!read(fd, rings, sizeof(rings)); /* non-blocking, or known to be readable */
}

static void sleep_and_receive(struct fake_daemon *d)
{
        struct pollfd fds[2 + 2 * FAKE_WORKERS_MAX] = { { d->listener, POLLIN, 0 },
                                                        { d->control_fd, POLLIN, 0 } };
        uint32_t n = d->n_workers;

        for (uint32_t i = 0; i < n; i++) {
                fds[2 + 2 * i] = (struct pollfd){ d->workers[i].socket, POLLIN, 0 };
                fds[3 + 2 * i] = (struct pollfd){ d->workers[i].bell, POLLIN, 0 };
        }
        pthread_mutex_unlock(&d->lock);
        fake_must(poll(fds, 2 + 2 * n, -1) > 0, "poll");
        pthread_mutex_lock(&d->lock);
        if (fds[1].revents)
                drain(d->control_fd);
        for (uint32_t i = 0; i < n; i++) {
                if (fds[3 + 2 * i].revents)
                        drain(d->workers[i].bell);
                if (fds[2 + 2 * i].revents && d->workers[i].socket >= 0)
                        receive(d, &d->workers[i]);
        }
        if (fds[0].revents)
                accept_worker(d);
}

void *fake_serve(void *arg)
{
        struct fake_daemon *d = arg;

        pthread_mutex_lock(&d->lock);
        while (!atomic_load(&d->stop)) {
                set_sleeping(d, 1);
                if (!look_at_all(d))
                        sleep_and_receive(d);
                set_sleeping(d, 0);
        }
        pthread_mutex_unlock(&d->lock);
        return NULL;
}
