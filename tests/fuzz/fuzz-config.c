/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The daemon's settings. The first line is flags, divided by blanks; the rest is the configuration
 * file.
 */
#include "tests/fuzz/input.h"
#include "tests/lib/test.h"

#include "server/config.h"

#include "proto/base/status.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define FLAGS_MAX 16

/* @ret_words: the line, cut into words; argv points into it. */
static int split_flags(struct input *input, char **argv, char **ret_words)
{
        const uint8_t *end = memchr(input->data, '\n', input->len);
        size_t len = end ? (size_t)(end - input->data) : input->len;
        size_t newline = 1;
        int n = 0;

        *ret_words = input_string(input, len);
        (void)input_take(input, &newline);
        for (char *word = strtok(*ret_words, " "); word && n < FLAGS_MAX; word = strtok(NULL, " "))
                argv[n++] = word;
        return n;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
        struct input input = { data, len };
        char path[64], program[] = "autoepd", flag[] = "--config", *words = NULL;
        char *argv[FLAGS_MAX + 4] = { program, flag, path };
        struct ae_config config;
        int fd, argc, r;

        if (len == 0)
                return 0;
        argc = 3 + split_flags(&input, argv + 3, &words);
        fd = memfd_create("config", MFD_CLOEXEC);
        assert_true(fd >= 0);
        assert_int_equal(write(fd, input.data, input.len), input.len);
        (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        r = ae_config_read(&config, argc, argv);
        if (r == 0) {
                assert_true(config.n_peers >= 1 && config.n_peers <= AE_CONFIG_PEERS_MAX);
                assert_true(config.node < config.n_peers);
                for (uint32_t i = 0; i < config.n_peers; i++)
                        assert_non_null(config.peer_list[i]);
                assert_non_null(config.socket);
                assert_non_null(config.transport);
        }
        if (r < 0)
                assert_true(strlen(ae_error_text()) > 0);
        ae_config_free(&config);
        close(fd);
        free(words);
        return 0;
}
