/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The conformance suite of the transports: what net.h promises, checked on the transport that the
 * command line names. The cases stand in cases-*.c.
 */
#include "tests/net/conformance.h"

#include <stdio.h>
#include <string.h>

#define CASE(name) cmocka_unit_test_setup_teardown(name, bed_setup, bed_teardown),

int main(int argc, char **argv)
{
        static const struct CMUnitTest all[] = {
                CONNECT_CASES(CASE)
                DATA_CASES(CASE)
                GRANT_CASES(CASE)
                WAKE_CASES(CASE)
                ATTACK_CASES(CASE)
        };

        if (argc < 2 || !ae_net_find(argv[1])) {
                fprintf(stderr, "usage: %s TRANSPORT [CASE], one of %s\n", argv[0],
                        ae_net_names());
                return 2;
        }
        bed_transport = argv[1];
        if (argc > 2)
                cmocka_set_test_filter(argv[2]);
        return cmocka_run_group_tests_name(argv[1], all, NULL, NULL);
}
