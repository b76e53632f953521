/* SPDX-License-Identifier: Apache-2.0 */
/* The fake daemon's life, cache and knobs; its thread is in fake-daemon-serve.c. */
#include "tests/lib/fake-daemon.h"

#include "proto/base/clock.h"
#include "tests/lib/fake-daemon-private.h"

#include <sched.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

void fake_must(bool fine, const char *what)
{
        if (fine)
                return;
        perror(what);
        abort();
}

static void listen_at(struct fake_daemon *d)
{
        struct sockaddr_un address = { .sun_family = AF_UNIX };

        snprintf(d->dir, sizeof(d->dir), "/tmp/autoep-fake-XXXXXX");
        fake_must(mkdtemp(d->dir), "mkdtemp");
        snprintf(d->path, sizeof(d->path), "%s/sock", d->dir);
        memcpy(address.sun_path, d->path, strlen(d->path) + 1);
        d->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        fake_must(bind(d->listener, (struct sockaddr *)&address, sizeof(address)) == 0, "bind");
        fake_must(listen(d->listener, FAKE_WORKERS_MAX) == 0, "listen");
}

struct fake_daemon *fake_daemon_start(const struct fake_config *config)
{
        struct fake_daemon *d = calloc(1, sizeof(*d));

        fake_must(d, "calloc");
        d->config = *config;
        if (!d->config.world)
                d->config.world = 1;
        if (!d->config.slot_len)
                d->config.slot_len = 1024;
        if (!d->config.xout_len)
                d->config.xout_len = 16 * d->config.slot_len;
        if (!d->config.hold_len)
                d->config.hold_len = UINT64_C(1) << 40;
        d->params_fd = -1;
        d->verdict_kind = AE_VERDICT_APPLIED;
        d->control_fd = eventfd(0, EFD_CLOEXEC);
        pthread_mutex_init(&d->lock, NULL);
        listen_at(d);
        fake_must(pthread_create(&d->thread, NULL, fake_serve, d) == 0, "pthread_create");
        return d;
}

static void free_worker(struct fake_worker *w)
{
        for (size_t i = 0; i < w->n_pieces; i++)
                free(w->pieces[i].data);
        free(w->pieces);
        free(w->sends);
        free(w->log);
        if (w->page)
                munmap(w->page, sizeof(*w->page));
        if (w->grad)
                munmap(w->grad, w->grad_len);
        if (w->xout)
                munmap(w->xout, w->xout_len);
        if (w->xin)
                munmap(w->xin, w->xin_len);
        close(w->bell);
        close(w->worker_bell);
        if (w->socket >= 0)
                close(w->socket);
}

void fake_daemon_stop(struct fake_daemon *d)
{
        atomic_store(&d->stop, true);
        fake_poke(d);
        pthread_join(d->thread, NULL);
        for (uint32_t i = 0; i < d->n_workers; i++)
                free_worker(&d->workers[i]);
        if (d->params)
                munmap(d->params, d->params_len);
        if (d->params_fd >= 0)
                close(d->params_fd);
        close(d->listener);
        close(d->control_fd);
        unlink(d->path);
        rmdir(d->dir);
        ae_layout_free(d->layout);
        ae_model_free(d->model);
        free(d->init);
        free(d->put);
        pthread_mutex_destroy(&d->lock);
        free(d);
}

/* ---- waking ----------------------------------------------------------------------------- */

void fake_poke(struct fake_daemon *d)
{
        uint64_t one = 1;

        fake_must(write(d->control_fd, &one, sizeof(one)) == sizeof(one), "write");
}

void fake_wake(struct fake_worker *w)
{
        if (w->page && atomic_load(&w->page->worker_waits)) /* after the change, seq_cst */
                fake_must(send(w->bell, "", 1, MSG_NOSIGNAL | MSG_DONTWAIT) == 1 ||
                                  errno == EAGAIN || errno == EPIPE,
                          "send");
}

void fake_wake_all(struct fake_daemon *d)
{
        for (uint32_t i = 0; i < d->n_workers; i++)
                fake_wake(&d->workers[i]);
}

/* ---- cache ------------------------------------------------------------------------------ */

static uint32_t holds_of(struct fake_daemon *d, uint32_t slot)
{
        uint32_t n = 0;

        for (uint32_t i = 0; i < d->n_workers; i++)
                n += atomic_load(&d->workers[i].page->holds[slot]);
        return n;
}

static bool is_published(const struct fake_daemon *d, uint32_t slot)
{
        for (uint32_t i = 0; i < d->layout->n_units; i++) {
                if (ae_local_entry_slot(atomic_load(&d->units[i])) == slot)
                        return true;
        }
        return false;
}

uint32_t fake_fill_slot(struct fake_daemon *d, uint32_t unit, uint64_t version, uint64_t first,
                        uint64_t len)
{
        for (uint32_t slot = 0; slot < d->params->n_slots; slot++) {
                uint8_t *to = d->cache + slot * d->cell_len;

                if (d->pins[slot] || is_published(d, slot) || holds_of(d, slot))
                        continue;
                for (uint64_t i = 0; i < len; i++)
                        to[i] = fake_byte(unit, version, first + i);
                d->slots[slot] = (struct ae_local_slot){ .off = slot * d->cell_len, .len = len };
                return slot;
        }
        fake_must(false, "no free slot");
        return 0;
}

/* Puts @entry in the place of the unit's, and overwrites the old slot if nobody has it. */
static bool replace(struct fake_daemon *d, uint32_t unit, uint64_t entry)
{
        uint32_t slot = ae_local_entry_slot(atomic_exchange(&d->units[unit], entry));

        if (slot == AE_LOCAL_SLOT_NONE)
                return true;
        if (d->pins[slot] || holds_of(d, slot))
                return false;
        memset(d->cache + slot * d->cell_len, 0xee, d->slots[slot].len);
        return true;
}

bool fake_withdraw(struct fake_daemon *d, uint32_t unit)
{
        bool gone;

        pthread_mutex_lock(&d->lock);
        gone = replace(d, unit, ae_local_entry(0, AE_LOCAL_SLOT_NONE));
        pthread_mutex_unlock(&d->lock);
        return gone;
}

void fake_publish(struct fake_daemon *d, uint32_t unit, uint64_t version)
{
        uint32_t slot;

        pthread_mutex_lock(&d->lock);
        slot = fake_fill_slot(d, unit, version, 0, d->layout->units[unit].len);
        (void)replace(d, unit, ae_local_entry(version, slot));
        pthread_mutex_unlock(&d->lock);
}

void fake_set_version(struct fake_daemon *d, uint64_t version)
{
        atomic_store(&d->params->job_version, version);
}

uint32_t fake_n_holds(struct fake_daemon *d)
{
        uint32_t n = 0;

        pthread_mutex_lock(&d->lock);
        for (uint32_t slot = 0; slot < d->params->n_slots; slot++)
                n += holds_of(d, slot);
        pthread_mutex_unlock(&d->lock);
        return n;
}

/* ---- knobs ------------------------------------------------------------------------------ */

void fake_set_holds(struct fake_daemon *d, uint32_t holds)
{
        atomic_store(&d->holds, holds);
        fake_poke(d);
}

void fake_sync(struct fake_daemon *d)
{
        for (;;) {
                bool idle = true;

                pthread_mutex_lock(&d->lock);
                for (uint32_t i = 0; i < d->n_workers; i++) {
                        struct fake_worker *w = &d->workers[i];

                        idle &= w->sq_head == atomic_load(&w->page->sq_tail);
                }
                pthread_mutex_unlock(&d->lock);
                if (idle)
                        return;
                fake_poke(d);
                sched_yield();
        }
}

void fake_fail_job(struct fake_daemon *d, int status, const char *why)
{
        pthread_mutex_lock(&d->lock);
        ae_local_text_set(&d->params->why, why);
        d->params->fail_status = status;
        atomic_store(&d->params->state, AE_LOCAL_FAILED);
        fake_wake_all(d);
        pthread_mutex_unlock(&d->lock);
}

void fake_set_verdict(struct fake_daemon *d, enum ae_verdict_kind kind,
                      const struct ae_wire_bad *bad)
{
        pthread_mutex_lock(&d->lock);
        d->verdict_kind = kind;
        d->bad = bad ? *bad : (struct ae_wire_bad){ .found = 0 };
        pthread_mutex_unlock(&d->lock);
}

void fake_set_state_status(struct fake_daemon *d, int status)
{
        pthread_mutex_lock(&d->lock);
        d->state_status = status;
        pthread_mutex_unlock(&d->lock);
}

void fake_grow_pause(struct fake_daemon *d, uint64_t ns)
{
        atomic_fetch_add(&d->params->pause_ns, ns);
}

void fake_begin_pause(struct fake_daemon *d, uint64_t ns)
{
        atomic_store(&d->params->pause_until_ns, ae_now_ns() + ns);
        fake_grow_pause(d, ns);
}

void fake_hang_up(struct fake_daemon *d)
{
        pthread_mutex_lock(&d->lock);
        for (uint32_t i = 0; i < d->n_workers; i++)
                shutdown(d->workers[i].socket, SHUT_RDWR);
        pthread_mutex_unlock(&d->lock);
}

void fake_send_raw(struct fake_daemon *d, const void *data, size_t len)
{
        pthread_mutex_lock(&d->lock);
        for (uint32_t i = 0; i < d->n_workers; i++)
                fake_must(send(d->workers[i].socket, data, len, MSG_NOSIGNAL) == (ssize_t)len,
                          "send");
        pthread_mutex_unlock(&d->lock);
}
