/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The daemon's settings: where each comes from and what wins, and for everything that is refused a
 * text that names the setting and the place it was set.
 */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char file_path[] = "/tmp/autoep-test-config-XXXXXX";

static void write_file(const char *text)
{
        FILE *file = fopen(file_path, "we");

        assert_non_null(file);
        assert_true(fputs(text, file) >= 0);
        assert_int_equal(fclose(file), 0);
}

/* Reads with these flags, at most 9. */
static int read_with(struct ae_config *config, const char *const *flags)
{
        char *argv[12] = { (char *)(uintptr_t)"autoepd" };
        int argc = 1;

        for (; flags[argc - 1]; argc++)
                argv[argc] = (char *)(uintptr_t)flags[argc - 1];
        return ae_config_read(config, argc, argv);
}

#define READ(config, ...) read_with((config), (const char *const[]){ __VA_ARGS__, NULL })

#define assert_refused(status, words, ...)                                                        \
        do {                                                                                      \
                struct ae_config config_;                                                         \
                                                                                                  \
                assert_int_equal(READ(&config_, __VA_ARGS__), (status));                          \
                if (!strstr(ae_error_text(), (words)))                                            \
                        fail_msg("'%s' does not say '%s'", ae_error_text(), (words));             \
                ae_config_free(&config_);                                                         \
        } while (0)

static int make_file(void **state)
{
        int fd = mkstemp(file_path);

        (void)state;
        if (fd < 0)
                return -1;
        return close(fd);
}

static int remove_file(void **state)
{
        (void)state;
        return unlink(file_path);
}

static void test_defaults(void **state)
{
        struct ae_config config;

        (void)state;
        assert_int_equal(READ(&config, "--dev"), 0);
        assert_true(config.dev);
        assert_int_equal(config.node, 0);
        assert_string_equal(config.peers, "");
        assert_string_equal(config.socket, "/run/autoep/autoepd.sock");
        assert_string_equal(config.transport, "tcp");
        assert_int_equal(config.log_level, AE_LOG_INFO);
        assert_true(config.memory > AE_MIB);
        assert_true(config.threads >= 1 && config.threads <= 256);
        assert_int_equal(config.n_peers, 1);
        assert_string_equal(config.peer_list[0], "");
        ae_config_free(&config);
}

static void test_file(void **state)
{
        struct ae_config config;

        (void)state;
        write_file(
                "# a daemon\n; another remark\n\n[autoepd]\n"
                "node = 1\n  socket=/tmp/a b.sock  \npeers = h:1, h:2\tand:3 ; the third is new\n"
                "memory=2G\nlog_level = debug\ndev = yes\nthreads=3\ntransport = shm\n");
        assert_int_equal(READ(&config, "--config", file_path), 0);
        assert_true(config.dev);
        assert_int_equal(config.node, 1);
        assert_string_equal(config.socket, "/tmp/a b.sock");
        assert_string_equal(config.transport, "shm");
        assert_int_equal(config.memory, 2 * AE_GIB);
        assert_int_equal(config.threads, 3);
        assert_int_equal(config.log_level, AE_LOG_DEBUG);
        assert_int_equal(config.n_peers, 3);
        assert_string_equal(config.peer_list[0], "h:1");
        assert_string_equal(config.peer_list[1], "h:2");
        assert_string_equal(config.peer_list[2], "and:3");
        ae_config_free(&config);
}

static void test_precedence(void **state)
{
        struct ae_config config;

        (void)state;
        write_file("dev=yes\nthreads=3\nsocket=/file\ntransport=file\nmemory=1M\n");
        setenv("AUTOEPD_SOCKET", "/env", 1);
        setenv("AUTOEPD_TRANSPORT", "env", 1);
        setenv("AUTOEPD_MEMORY", "2M", 1);
        setenv("AUTOEPD_LOG_LEVEL", "error", 1);
        assert_int_equal(READ(&config, "--transport", "shm", "--config", file_path), 0);
        assert_int_equal(config.threads, 3);
        assert_int_equal(config.memory, 2 * AE_MIB);
        assert_string_equal(config.socket, "/env");
        assert_string_equal(config.transport, "shm");
        assert_int_equal(config.log_level, AE_LOG_ERROR);
        ae_config_free(&config);
        unsetenv("AUTOEPD_TRANSPORT");
        assert_refused(AE_EINVAL, "'file' is neither tcp nor shm", "--config", file_path);
        setenv("AUTOEPD_TRANSPORT", "tcp", 1);
        assert_int_equal(READ(&config, "--config", file_path, "--log-level=warn"), 0);
        assert_int_equal(config.log_level, AE_LOG_WARN);
        ae_config_free(&config);
        setenv("AUTOEPD_MEMORY", "much", 1);
        assert_refused(AE_EINVAL, "AUTOEPD_MEMORY: memory: 'much'", "--dev");
        unsetenv("AUTOEPD_MEMORY");
        unsetenv("AUTOEPD_SOCKET");
        unsetenv("AUTOEPD_TRANSPORT");
        unsetenv("AUTOEPD_LOG_LEVEL");
}

static void test_unknown(void **state)
{
        (void)state;
        write_file("dev=yes\nthread=3\n");
        assert_refused(AE_EINVAL, "unknown setting 'thread'", "--config", file_path);
        assert_refused(AE_EINVAL, file_path, "--config", file_path);
        write_file("[client]\ndev=yes\n");
        assert_refused(AE_EINVAL, "unknown section [client]", "--config", file_path);
        write_file("dev=yes\nnonsense\n");
        assert_refused(AE_EINVAL, "line 2", "--config", file_path);
        write_file("dev=maybe\n");
        assert_refused(AE_EINVAL, "'maybe' is neither yes nor no", "--config", file_path);
        write_file("dev=yes\nlog_level=loud\n");
        assert_refused(AE_EINVAL, "log_level", "--config", file_path);
        assert_refused(AE_ESYS, "/nonexistent/f", "--config", "/nonexistent/f");
        assert_refused(AE_EINVAL, "--help", "--dev", "--treads", "3");
        assert_refused(AE_EINVAL, "what is 'word'", "--dev", "word");
}

static void test_numbers(void **state)
{
        static const char *const bad[] = { "", "x", "-1", " -1", "+-1", "3x", "0x10", "1.5", "3 4",
                                           "99999999999999999999", "4294967296", "1K" };
        static const char *const bad_bytes[] = { "", "-1", " -1", "1X", "1KK", "1KiBx", "K", "1 K",
                                                 "16777216T", "18446744073709551615K", "1Ki",
                                                 "18446744073709551616" };
        static const struct {
                const char *text;
                uint64_t want;
        } good[] = {
                { "1", 1 }, { "7k", 7 * AE_KIB }, { "7K", 7 * AE_KIB }, { "7KB", 7 * AE_KIB },
                { "7KiB", 7 * AE_KIB }, { "5M", 5 * AE_MIB }, { "3g", 3 * AE_GIB },
                { "2T", 2048 * AE_GIB }, { "16777215T", UINT64_C(16777215) << 40 },
                { "18446744073709551615", UINT64_MAX },
        };

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(bad); i++)
                assert_refused(AE_EINVAL, "flag: threads:", "--dev", "--threads", bad[i]);
        for (size_t i = 0; i < AE_ARRAY_LEN(bad_bytes); i++)
                assert_refused(AE_EINVAL, "flag: memory:", "--dev", "--memory", bad_bytes[i]);
        for (size_t i = 0; i < AE_ARRAY_LEN(good); i++) {
                struct ae_config config;

                assert_int_equal(READ(&config, "--dev", "--memory", good[i].text), 0);
                assert_int_equal(config.memory, good[i].want);
                ae_config_free(&config);
        }
        assert_refused(AE_EINVAL, "257 are more than 256", "--dev", "--threads", "257");
}

static void test_peers(void **state)
{
        char *many = malloc(3 * AE_CONFIG_PEERS_MAX + 8);

        (void)state;
        assert_non_null(many);
        assert_refused(AE_EINVAL, "node 2 is not among the 2 peers", "--dev", "--peers", "a:1,b:2",
                       "--node", "2");
        assert_refused(AE_EINVAL, "node 1 is not among the 1 peers", "--dev", "--node", "1");
        many[0] = '\0';
        for (uint32_t i = 0; i <= AE_CONFIG_PEERS_MAX; i++)
                strcpy(many + 2 * i, "a,");
        assert_refused(AE_EINVAL, "more than 1024 nodes", "--dev", "--peers", many);
        free(many);
}

/* A long list of peers in a file: one setting, one line, nothing cut. */
static void test_long_line(void **state)
{
        char *text = malloc(4096 + 64);
        size_t len = (size_t)sprintf(text, "dev = yes\npeers = ");
        struct ae_config config;
        uint32_t n = 0;

        (void)state;
        for (; len < 4096; n++)
                len += (size_t)sprintf(text + len, "%s10.0.%u.%u:7000", n ? "," : "", n / 256,
                                       n % 256);
        strcpy(text + len, "\nnode = 5\n");
        write_file(text);
        assert_int_equal(READ(&config, "--config", file_path), 0);
        assert_int_equal(config.n_peers, n);
        assert_string_equal(config.peer_list[n - 1] + strlen(config.peer_list[n - 1]) - 5, ":7000");
        assert_int_equal(config.node, 5);
        ae_config_free(&config);
        free(text);
}

static void test_no_newline_at_end(void **state)
{
        struct ae_config config;

        (void)state;
        write_file("dev = yes\r\nthreads = 7");
        assert_int_equal(READ(&config, "--config", file_path), 0);
        assert_int_equal(config.threads, 7);
        ae_config_free(&config);
}

static void test_printed(void **state)
{
        struct ae_config config;

        (void)state;
        assert_int_equal(READ(&config, "--dev", "--check-config"), 1);
        ae_config_free(&config);
        assert_refused(AE_EINVAL, "node 9", "--dev", "--check-config", "--node", "9");
        assert_refused(AE_EINVAL, "'sim' is neither", "--dev", "--check-config", "--transport",
                       "sim");
        assert_int_equal(READ(&config, "--help"), 1);
        ae_config_free(&config);
        assert_int_equal(READ(&config, "--version"), 1);
        ae_config_free(&config);
}

static void test_without_dev(void **state)
{
        (void)state;
        assert_refused(AE_EUNSUPPORTED, "--dev", "--threads", "1");
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_defaults),  cmocka_unit_test(test_file),
                cmocka_unit_test(test_precedence), cmocka_unit_test(test_unknown),
                cmocka_unit_test(test_numbers),   cmocka_unit_test(test_peers),
                cmocka_unit_test(test_long_line), cmocka_unit_test(test_no_newline_at_end),
                cmocka_unit_test(test_printed),   cmocka_unit_test(test_without_dev),
        };

        return cmocka_run_group_tests(tests, make_file, remove_file);
}
