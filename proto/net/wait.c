/* SPDX-License-Identifier: Apache-2.0 */
/* The epoll set of an endpoint inside a libuv loop; see wait.h. */
#include "proto/net/wait.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "proto/base/clock.h"
#include "proto/base/status.h"
#include "proto/net/priv.h"

#define BATCH 64

static void on_loop(uv_poll_t *poll, int status, int events)
{
        struct ae_wait *wait = poll->data;

        (void)status; /* an epoll set reports nothing but readable */
        (void)events;
        if (!wait->armed)
                return;
        wait->armed = false;
        wait->wake(wait->user);
}

static void free_poll(uv_handle_t *handle)
{
        free(handle);
}

static int join_loop(struct ae_wait *wait, uv_loop_t *loop)
{
        int r;

        wait->poll = calloc(1, sizeof(*wait->poll));
        if (!wait->poll)
                return ae_fail(AE_ENOMEM, "cannot join the loop: out of memory");
        r = uv_poll_init(loop, wait->poll, wait->epfd);
        if (r < 0) {
                free(wait->poll);
                wait->poll = NULL;
                return ae_fail(AE_ESYS, "cannot join the loop: %s", uv_strerror(r));
        }
        wait->poll->data = wait;
        r = uv_poll_start(wait->poll, UV_READABLE, on_loop);
        if (r < 0)
                return ae_fail(AE_ESYS, "cannot watch an endpoint: %s", uv_strerror(r));
        return 0;
}

static void set_timer(struct ae_wait *wait)
{
        struct ae_deadline *first;
        struct itimerspec when = { 0 };

        if (ae_list_empty(&wait->deadlines))
                return;
        first = ae_list_entry(wait->deadlines.next, struct ae_deadline, link);
        when.it_value.tv_sec = (time_t)(first->due_ns / AE_NS_PER_S);
        when.it_value.tv_nsec = (long)(first->due_ns % AE_NS_PER_S);
        if (timerfd_settime(wait->timer.fd, TFD_TIMER_ABSTIME, &when, NULL) < 0)
                assert(!"a timer takes a valid time");
}

static void on_timer(struct ae_source *source)
{
        struct ae_wait *wait = ae_container_of(source, struct ae_wait, timer);
        uint64_t n_fired, now_ns = ae_now_ns();
        struct ae_deadline *first;

        source->ready = 0;
        if (read(source->fd, &n_fired, sizeof(n_fired)) < 0 && errno != EAGAIN)
                return;
        while (!ae_list_empty(&wait->deadlines)) {
                first = ae_list_entry(wait->deadlines.next, struct ae_deadline, link);
                if (first->due_ns > now_ns)
                        break;
                ae_list_unlink(&first->link);
                first->fire(first);
        }
        set_timer(wait);
}

int ae_wait_open(struct ae_wait *wait, const struct ae_net_options *options)
{
        int fd, r;

        *wait = (struct ae_wait){
                .deadline_ns = options->handshake_ns ? options->handshake_ns : AE_NET_HANDSHAKE_NS,
                .wake = options->wake,
                .user = options->user,
        };
        ae_source_init(&wait->timer, on_timer);
        ae_list_init(&wait->ready);
        ae_list_init(&wait->deadlines);
        wait->epfd = epoll_create1(EPOLL_CLOEXEC);
        if (wait->epfd < 0)
                return ae_fail_sys(errno, "cannot make an epoll set for an endpoint");
        fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
        if (fd < 0) {
                r = ae_fail_sys(errno, "cannot make a timer for an endpoint");
                goto out;
        }
        r = ae_wait_add(wait, &wait->timer, fd);
        if (r < 0)
                goto out;
        if (options->loop)
                r = join_loop(wait, options->loop);
out:
        if (r < 0)
                ae_wait_close(wait);
        return r;
}

void ae_wait_close(struct ae_wait *wait)
{
        if (wait->poll)
                uv_close((uv_handle_t *)wait->poll, free_poll);
        wait->poll = NULL;
        if (wait->epfd < 0)
                return;
        ae_wait_remove(wait, &wait->timer);
        (void)close(wait->epfd); /* nothing to do about a failing close */
        wait->epfd = -1;
}

int ae_wait_add(struct ae_wait *wait, struct ae_source *source, int fd)
{
        struct epoll_event event = {
                .events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                .data.ptr = source,
        };

        assert(source->fd < 0 && fd >= 0);
        if (epoll_ctl(wait->epfd, EPOLL_CTL_ADD, fd, &event) < 0) {
                int err = errno;

                (void)close(fd);
                return ae_fail_sys(err, "cannot watch a descriptor");
        }
        source->fd = fd;
        return 0;
}

void ae_wait_remove(struct ae_wait *wait, struct ae_source *source)
{
        if (source->fd < 0)
                return;
        ae_list_unlink(&source->link);
        /* A child may hold a copy of the descriptor: closing alone would leave it in the set. */
        (void)epoll_ctl(wait->epfd, EPOLL_CTL_DEL, source->fd, NULL);
        (void)close(source->fd);
        source->fd = -1;
        source->ready = 0;
}

void ae_wait_move(struct ae_wait *wait, struct ae_source *from, struct ae_source *to)
{
        struct epoll_event event = {
                .events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                .data.ptr = to,
        };

        assert(from->fd >= 0 && to->fd < 0);
        if (epoll_ctl(wait->epfd, EPOLL_CTL_MOD, from->fd, &event) < 0)
                assert(!"a watched descriptor can be watched by another");
        to->fd = from->fd;
        to->ready = EPOLLIN | EPOLLOUT;
        from->fd = -1;
        from->ready = 0;
        ae_list_unlink(&from->link);
        ae_wait_again(wait, to);
}

void ae_wait_again(struct ae_wait *wait, struct ae_source *source)
{
        if (ae_list_empty(&source->link))
                ae_list_push(&wait->ready, &source->link);
}

void ae_wait_deadline(struct ae_wait *wait, struct ae_deadline *deadline)
{
        bool first = ae_list_empty(&wait->deadlines);

        deadline->due_ns = ae_now_ns() + wait->deadline_ns;
        ae_list_push(&wait->deadlines, &deadline->link);
        if (first)
                set_timer(wait);
}

static void collect(struct ae_wait *wait)
{
        struct epoll_event batch[BATCH];
        int n = epoll_wait(wait->epfd, batch, BATCH, 0);

        for (int i = 0; i < n; i++) {
                struct ae_source *source = batch[i].data.ptr;

                source->ready |= batch[i].events;
                if (source->ready & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
                        source->ready |= EPOLLIN; /* a read says what happened */
                ae_wait_again(wait, source);
        }
}

void ae_wait_round(struct ae_wait *wait)
{
        struct ae_list now = AE_LIST_INIT(now);
        struct ae_list *entry;

        wait->armed = false;
        collect(wait);
        /* What asks to run again does so in the next round; a source may remove any other. */
        while ((entry = ae_list_pop(&wait->ready)))
                ae_list_push(&now, entry);
        while ((entry = ae_list_pop(&now))) {
                struct ae_source *source = ae_list_entry(entry, struct ae_source, link);

                source->run(source);
        }
}

int ae_wait_arm(struct ae_wait *wait)
{
        if (!wait->poll || !ae_list_empty(&wait->ready))
                return 1;
        wait->armed = true;
        return 0;
}
