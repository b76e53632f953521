/* SPDX-License-Identifier: Apache-2.0 */
/* The cases of the conformance suite, by file. X(name): a test function of the bed. */
#pragma once

#include "tests/net/bed.h"

#define CONNECT_CASES(X)                                                                          \
        X(up_with_hellos)                                                                         \
        X(version_differs)                                                                        \
        X(cluster_differs)                                                                        \
        X(node_is_another)                                                                        \
        X(nobody_listens)                                                                         \
        X(bad_addresses)                                                                          \
        X(bad_options)                                                                            \
        X(allocations_fail)                                                                       \
        X(sixteen_peers)                                                                          \
        X(close_with_outstanding)                                                                 \
        X(close_before_up)                                                                        \
        X(death_with_outstanding)                                                                 \
        X(dead_connection_is_inert)                                                               \
        X(last_words_arrive)                                                                      \
        X(close_drops_what_is_queued)                                                             \
        X(connector_gives_up)                                                                     \
        X(endpoint_close_with_all_alive)                                                          \
        X(no_descriptor_growth)

#define DATA_CASES(X)                                                                             \
        X(msgs_of_all_sizes)                                                                      \
        X(msgs_in_order)                                                                          \
        X(msgs_back_pressure)                                                                     \
        X(msg_stays_until_next_poll)                                                              \
        X(put_of_64_mib)                                                                          \
        X(put_of_64_mib_private)                                                                  \
        X(put_of_nothing)                                                                         \
        X(puts_both_ways)                                                                         \
        X(puts_back_pressure)                                                                     \
        X(msgs_and_puts_back_pressure)                                                            \
        X(put_larger_than_in_flight)                                                              \
        X(any_number_of_streams)                                                                  \
        X(put_source_checked)                                                                     \
        X(ranges_come_and_go)

#define GRANT_CASES(X)                                                                            \
        X(revoked_before_put)                                                                     \
        X(revoked_during_put)                                                                     \
        X(revoked_during_private_put)                                                             \
        X(revoked_before_notify_is_handed_out)                                                    \
        X(slots_are_used_again)                                                                   \
        X(key_never_granted)                                                                      \
        X(put_outside_its_grant)                                                                  \
        X(put_overflows_its_grant)                                                                \
        X(key_of_another_connection)                                                              \
        X(revoke_of_unknown_key)

#define WAKE_CASES(X)                                                                             \
        X(arm_says_busy)                                                                          \
        X(what_came_before_arm)                                                                   \
        X(sleeps_only_when_all_is_done)                                                           \
        X(wakes_from_the_loop_alone)                                                              \
        X(ping_pong_by_wake)                                                                      \
        X(two_threads)

#define ATTACK_CASES(X)                                                                           \
        X(attack_random_bytes)                                                                    \
        X(attack_silence)                                                                         \
        X(attack_crowd)                                                                           \
        X(no_descriptor_for_a_guest)                                                              \
        X(guests_that_hang_up_in_the_queue)                                                       \
        X(attack_bad_frames)                                                                      \
        X(attack_hang_up_midway)                                                                  \
        X(attack_data_stream_hangs_up_first)                                                      \
        X(attack_stream_runs_ahead)

#define DECLARE_CASE(name) void name(void **state);
CONNECT_CASES(DECLARE_CASE)
DATA_CASES(DECLARE_CASE)
GRANT_CASES(DECLARE_CASE)
WAKE_CASES(DECLARE_CASE)
ATTACK_CASES(DECLARE_CASE)
