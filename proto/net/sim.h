/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A deterministic network and clock inside one process, for tests: the sim transport's endpoints
 * live in a struct ae_sim, which is passed as ae_net_options.loop. Everything that happens comes
 * out of one queue of events in virtual time, and every choice (latency, order, how puts tear,
 * what is lost) out of one generator, so that a seed replays a run. One thread owns all of it.
 *
 * Delays are drawn per msg and per piece of a put: puts overtake each other and msgs, and pieces of
 * one put land in any order; only at its NOTIFY are all there. Msgs of one connection keep their
 * order. What is lost breaks the connection, as it does with the reliable transports.
 */
#pragma once

#include "proto/net/net.h"

struct ae_sim;

struct ae_sim_params {
        uint64_t latency_min_ns, latency_max_ns; /* one way; both 0: 5 to 50 µs */
        uint64_t ns_per_kib;                     /* added per KiB of a msg or put */
        uint32_t pieces_max;     /* a put lands in 1 to this many pieces; 0: 4; at most 8 */
        uint32_t early_done_ppm; /* puts whose PUT_DONE comes before their bytes have landed */
        uint32_t loss_ppm;       /* msgs and puts that break their connection instead */
        uint64_t cut_ns;         /* a partition this long breaks connections; 0: 10 s */
        bool no_data;            /* puts move no bytes: memory is addresses alone, never touched */
};

struct ae_sim_timer {
        void *event;
        uint64_t seq;
};

/* @params: NULL for the defaults. AE_ENOMEM. */
int ae_sim_new(uint64_t seed, const struct ae_sim_params *params, struct ae_sim **ret_sim);
/* Every endpoint has been closed. NULL is fine. Returns NULL. */
struct ae_sim *ae_sim_free(struct ae_sim *sim);

uint64_t ae_sim_now(const struct ae_sim *sim);
/* From the run's generator: using it is part of what a seed replays. */
uint64_t ae_sim_random(struct ae_sim *sim);

/* Runs the next event, moving the clock to it. False: there is none. */
bool ae_sim_step(struct ae_sim *sim);
/* Runs all events up to @until_ns and leaves the clock there. */
void ae_sim_run(struct ae_sim *sim, uint64_t until_ns);

/* Calls @fn(@user) out of ae_sim_step() in @delay_ns. @ret_timer may be NULL. Aborts when out of
 * memory, as everything that runs inside the simulation does. */
void ae_sim_after(struct ae_sim *sim, uint64_t delay_ns, void (*fn)(void *user), void *user,
                  struct ae_sim_timer *ret_timer);
/* Harmless after it has run. */
void ae_sim_cancel(struct ae_sim *sim, struct ae_sim_timer *timer);

/* Traffic between the two is held back until healed; cut_ns later their connections break. For the
 * tests of what the simulated network promises of a pair; simulated jobs place theirs. */
void ae_sim_partition(struct ae_net *a, struct ae_net *b);
void ae_sim_heal(struct ae_net *a, struct ae_net *b);
/* The same for many: only endpoints in one group reach each other. All begin in group 0. */
void ae_sim_place(struct ae_net *net, uint32_t group);
/*
 * The process behind @net dies: nothing more comes out of it, what it hasn't copied of its puts
 * never lands, and peers see DOWN. Its owner may only ae_net_close() it.
 */
void ae_sim_kill(struct ae_net *net);
