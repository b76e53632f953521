/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hot messages and notes: what a peer of a live job may send, between honest steps of its ranks.
 * The first byte says how it begins.
 */
#include "tests/fuzz/scene.h"

#include "proto/base/num.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
        static scene_deed *const deeds[] = { scene_hot, scene_note, scene_raw, scene_piece,
                                             scene_entry, scene_ask, scene_xsend, scene_tick };
        struct input input = { data, len };
        uint8_t how = input_u8(&input);
        struct scene scene = scene_new(how, 2 + how % 2, true);

        scene_play(&scene, &input, deeds, AE_ARRAY_LEN(deeds));
        return 0;
}
