/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The core as a state machine: workers come and go, nodes lose each other, messages stay under way
 * while others arrive, peers and workers say what they like. The first byte says how it begins.
 */
#include "tests/fuzz/scene.h"

#include "proto/base/num.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
        static scene_deed *const deeds[] = {
                scene_hello, scene_register, scene_gone, scene_message, scene_control, scene_hot,
                scene_note, scene_entry, scene_piece, scene_ask, scene_xsend, scene_cut, scene_join,
                scene_tick, scene_step, scene_run,
        };
        struct input input = { data, len };
        uint8_t how = input_u8(&input);
        struct scene scene = scene_new(how, 2 + (how & 1), how & 2);

        scene.bed->stopped = how & 4;
        scene_play(&scene, &input, deeds, AE_ARRAY_LEN(deeds));
        return 0;
}
