/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The page that a worker shares with its daemon: entries of any bytes, and any bytes anywhere in
 * it, between honest pieces and steps. The first byte says how it begins.
 */
#include "tests/fuzz/scene.h"

#include "proto/base/num.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
        static scene_deed *const deeds[] = { scene_any_entry, scene_page, scene_entry, scene_piece,
                                             scene_ask, scene_xsend, scene_tick };
        struct input input = { data, len };
        uint8_t how = input_u8(&input);
        struct scene scene = scene_new(how, 1 + how % 2, true);

        scene_play(&scene, &input, deeds, AE_ARRAY_LEN(deeds));
        return 0;
}
