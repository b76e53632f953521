/* SPDX-License-Identifier: Apache-2.0 */
/* Listening, and guests until their hello is in; see door.h. */
#include "proto/net/door.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "proto/base/cleanup.h"
#include "proto/base/status.h"
#include "proto/net/priv.h"

void ae_door_retry(struct ae_door *door)
{
        door->starved = false;
        if (door->listener.fd >= 0)
                ae_wait_again(door->wait, &door->listener);
}

static void see_off(struct ae_guest *guest)
{
        struct ae_door *door = guest->door;

        assert(door->n_guests > 0);
        ae_wait_remove(door->wait, &guest->source);
        ae_list_unlink(&guest->deadline.link);
        ae_list_unlink(&guest->link);
        ae_list_push(&door->gone, &guest->link);
        door->n_guests--;
        ae_door_retry(door);
}

static const struct ae_net_hello nobody;

/* @who: what it said, as far as that is known. */
static void refuse(struct ae_guest *guest, int status, const char *text,
                   const struct ae_net_hello *who)
{
        struct ae_door *door = guest->door;

        door->stats->refused++;
        snprintf(guest->text, sizeof(guest->text), "refused an incoming connection: %s", text);
        ae_evq_push(door->events,
                    &(struct ae_net_event){ .kind = AE_NET_EV_REFUSED, .status = status,
                                            .hello = *who, .text = guest->text }, 0);
        see_off(guest);
}

/* Says who we are to a peer that we refuse, so that it can name the difference too. */
static void answer(struct ae_guest *guest)
{
        struct ae_hello hello = { .kind = guest->door->kind_a, .who = guest->door->self };
        uint8_t frame[AE_HELLO_SIZE];

        ae_hello_encode(&hello, frame);
        /* Best effort: a fresh socket has room for 64 bytes, and a dead one doesn't matter. */
        (void)!send(guest->source.fd, frame, sizeof(frame), MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void greet(struct ae_guest *guest)
{
        struct ae_door *door = guest->door;
        struct ae_hello hello = { .kind = 0 };
        int r;

        r = ae_hello_decode(guest->hello, door->kind_a, door->kind_b, &hello);
        if (r == 0)
                r = ae_hello_compare(&door->self, &hello.who);
        if (r == 0)
                r = door->greet(door, guest, &hello);
        if (r == 0) {
                see_off(guest);
                return;
        }
        if (r == AE_EVERSION || r == AE_EMISMATCH)
                answer(guest);
        refuse(guest, r, ae_error_text(), &hello.who);
}

static void on_guest(struct ae_source *source)
{
        struct ae_guest *guest = ae_container_of(source, struct ae_guest, source);
        ssize_t n;

        n = recv(source->fd, guest->hello + guest->n_hello,
                 sizeof(guest->hello) - guest->n_hello, MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return;
        if (n < 0)
                return refuse(guest, AE_ELOST, strerror(errno), &nobody);
        if (n == 0)
                return refuse(guest, AE_ELOST, "it closed before its hello was complete", &nobody);
        guest->n_hello += (uint32_t)n;
        if (guest->n_hello == sizeof(guest->hello))
                greet(guest);
        else
                ae_wait_again(guest->door->wait, source);
}

static void on_late(struct ae_deadline *deadline)
{
        struct ae_guest *guest = ae_container_of(deadline, struct ae_guest, deadline);

        refuse(guest, AE_ETIMEDOUT, "it said no hello within the deadline", &nobody);
}

/* Takes over @fd. A socket that cannot be set up is closed: its peer sees that. */
static void let_in(struct ae_door *door, int fd)
{
        AE_CLEANUP(ae_cleanup_close) int owned = fd;
        AE_CLEANUP(ae_cleanup_free) struct ae_guest *guest = NULL;

        if (door->admit(owned) < 0)
                return;
        guest = calloc(1, sizeof(*guest));
        if (!guest || ae_evq_reserve(door->events, 1) < 0)
                return;
        guest->door = door;
        guest->deadline.fire = on_late;
        ae_source_init(&guest->source, on_guest);
        if (ae_wait_add(door->wait, &guest->source, ae_steal_fd(&owned)) < 0) {
                ae_evq_release(door->events, 1);
                return;
        }
        ae_wait_deadline(door->wait, &guest->deadline);
        ae_list_push(&door->guests, &guest->link);
        door->n_guests++;
        guest = NULL; /* the door owns it */
}

/* The set is edge-triggered: what is left in the queue shows by itself only with the next guest. */
static void cannot_accept(struct ae_door *door, int error)
{
        if (error == EAGAIN)
                return;
        if (error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM)
                door->starved = true; /* who comes waits, until there is room again */
        else
                ae_wait_again(door->wait, &door->listener); /* that one is gone; others may wait */
}

static void on_listener(struct ae_source *source)
{
        struct ae_door *door = ae_container_of(source, struct ae_door, listener);

        while (door->n_guests < AE_NET_PENDING_MAX) {
                int fd = accept4(source->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

                if (fd < 0)
                        return cannot_accept(door, errno);
                let_in(door, fd);
        }
}

void ae_door_init(struct ae_door *door)
{
        ae_source_init(&door->listener, on_listener);
        ae_list_init(&door->guests);
        ae_list_init(&door->gone);
}

int ae_door_open(struct ae_door *door, int fd)
{
        return ae_wait_add(door->wait, &door->listener, fd);
}

void ae_door_reap(struct ae_door *door)
{
        struct ae_list *entry;

        while ((entry = ae_list_pop(&door->gone))) {
                ae_evq_release(door->events, 1);
                free(ae_list_entry(entry, struct ae_guest, link));
        }
}

void ae_door_close(struct ae_door *door)
{
        ae_wait_remove(door->wait, &door->listener);
        while (!ae_list_empty(&door->guests))
                see_off(ae_list_entry(door->guests.next, struct ae_guest, link));
        ae_door_reap(door);
}
