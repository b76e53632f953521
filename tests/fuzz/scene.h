/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Cores of tests/unit/test-core-bed.h under a sequence of deeds: each is a byte that says which,
 * and a few that say how. What a core refuses costs its sender the connection or the session, as in
 * the daemon. At the end all workers go and all cores are freed.
 */
#pragma once

#include "tests/fuzz/input.h"
#include "tests/unit/test-core-bed.h"

struct scene {
        struct bed *bed;
        uint64_t ring_pos[BED_WORKERS_MAX]; /* where the next good piece goes */
        uint64_t xout_pos[BED_WORKERS_MAX];
};

typedef void scene_deed(struct scene *scene, struct input *input);

/* peers: any message, with a head that fits the job or without */
scene_deed scene_hot, scene_raw, scene_control;
/* a put into memory that was granted, with any note */
scene_deed scene_note;
/* workers: entries of their rings with small numbers or of any bytes, bytes anywhere in the page,
 * an honest piece, an honest step request, an honest exchange message, a control message */
scene_deed scene_entry, scene_any_entry, scene_page, scene_piece, scene_ask, scene_xsend;
scene_deed scene_message;
/* workers come and go */
scene_deed scene_hello, scene_register, scene_gone;
/* connections break and come back; time passes; events are worked off */
scene_deed scene_cut, scene_join, scene_tick, scene_step, scene_run;

/* A job that is live, or only nodes that know each other. @how: in one of eight the model is so
 * large that slices are cut over the nodes, which takes ten times as long. */
struct scene scene_new(uint8_t how, uint32_t n_nodes, bool live);
/* Does deeds of the table until the input is used up, then ends the scene. */
void scene_play(struct scene *scene, struct input *input, scene_deed *const *deeds, size_t n_deeds);
