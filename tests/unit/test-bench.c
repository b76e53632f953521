/* SPDX-License-Identifier: Apache-2.0 */
/* The parts of autoep-bench that need no cluster: options, rows, tables, the plain programs. */
#include "client/bench/iperf.h"
#include "client/bench/measure.h"
#include "client/bench/options.h"
#include "client/bench/plain-tcp.h"
#include "client/bench/print.h"
#include "client/bench/row.h"
#include "client/bench/wake.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include "tests/lib/test.h"

#include <jansson.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- options ---------------------------------------------------------------------------- */

static char words[512];
static char *argv_of_words[32];

static int parse(const char *line, struct ae_bench_options *ret_options)
{
        int argc = 0;

        assert_true(strlen(line) < sizeof(words));
        strcpy(words, line);
        argv_of_words[argc++] = (char *)"autoep-bench";
        for (char *word = strtok(words, " "); word; word = strtok(NULL, " "))
                argv_of_words[argc++] = word;
        argv_of_words[argc] = NULL;
        return ae_bench_options_parse(argc, argv_of_words, ret_options);
}

static void test_options(void **state)
{
        struct ae_bench_options options;

        (void)state;
        assert_int_equal(parse("", &options), 0);
        for (size_t i = 0; i < AE_BENCH_N_SUITES; i++)
                assert_true(options.suites[i]);
        assert_false(options.json);
        assert_int_equal(options.n_sizes, 0);
        assert_int_equal(options.n_nodes, 0);
        assert_int_equal(parse("gather -o json --quick --nodes 3,1,16 --workers 2 --transport tcp "
                               "--size 4096,64K,2M,1G scatter", &options), 0);
        assert_true(options.suites[AE_BENCH_GATHER] && options.suites[AE_BENCH_SCATTER]);
        assert_false(options.suites[AE_BENCH_KERNELS]);
        assert_true(options.json && options.quick);
        assert_int_equal(options.n_nodes, 3);
        assert_int_equal(options.nodes[0], 3);
        assert_int_equal(options.nodes[1], 1);
        assert_int_equal(options.nodes[2], 16);
        assert_int_equal(options.workers, 2);
        assert_string_equal(options.transport, "tcp");
        assert_int_equal(options.n_sizes, 4);
        assert_int_equal(options.sizes[0], 4096);
        assert_int_equal(options.sizes[1], 64 * AE_KIB);
        assert_int_equal(options.sizes[2], 2 * AE_MIB);
        assert_int_equal(options.sizes[3], AE_GIB);
}

static void test_options_refused(void **state)
{
        static const struct {
                const char *line, *text;
        } cases[] = {
                { "gathers", "unknown suite 'gathers'" },
                { "--nodes 0", "--nodes is '0'" },
                { "--nodes 2x", "--nodes is '2x'" },
                { "--nodes 2,", "--nodes is '2,'" },
                { "--nodes 1,,2", "--nodes is '1,,2'" },
                { "--nodes 17", "--nodes is '17'" }, /* more than the floors' sums have inputs */
                { "--nodes 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1", "--nodes lists more than 16" },
                { "--workers 17", "--workers is '17'" },
                { "--workers -1", "--workers is '-1'" },
                { "--transport verbs", "--transport is 'verbs'" },
                { "-o yaml", "--output is 'yaml'" },
                { "--size 1,", "--size is '1,'" },
                { "--size 64K,", "--size is '64K,'" },
                { "--size 64X", "--size is '64X'" },
                { "--size 99999999999G", "--size is" },
                { "--size", "--size needs a value" },
                { "--fast", "unknown option '--fast'" },
        };
        struct ae_bench_options options;

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(cases); i++) {
                assert_int_equal(parse(cases[i].line, &options), AE_EINVAL);
                if (!strstr(ae_error_text(), cases[i].text))
                        fail_msg("'%s' gives '%s', not '%s'", cases[i].line, ae_error_text(),
                                 cases[i].text);
        }
}

/* ---- rows ------------------------------------------------------------------------------- */

static const struct ae_bench_row sample = {
        .suite = "gather", .name = "fetch, 2 x 1, tcp", .floor_name = "plain TCP",
        .note = "ms: 1, 2", .len = 1 << 20, .unit = AE_BENCH_GBPS, .figure = 2.7, .floor = 3.0,
        .aim = AE_BENCH_AIM_RATIO, .target = 0.9,
};

static void test_row_line(void **state)
{
        struct ae_bench_row row;
        char line[512], cut[512];

        (void)state;
        assert_int_equal(ae_bench_row_line(&sample, line, sizeof(line)), 0);
        assert_int_equal(ae_bench_row_parse(line, &row), 0);
        assert_string_equal(row.suite, sample.suite);
        assert_string_equal(row.name, sample.name);
        assert_string_equal(row.floor_name, sample.floor_name);
        assert_string_equal(row.note, sample.note);
        assert_int_equal(row.len, sample.len);
        assert_int_equal(row.unit, sample.unit);
        assert_int_equal(row.aim, sample.aim);
        assert_true(row.figure == sample.figure && row.floor == sample.floor);
        assert_true(row.target == sample.target);
        assert_int_equal(ae_bench_row_line(&sample, line, 40), AE_EOVERFLOW);
        assert_int_equal(ae_bench_row_parse("something else", &row), 1);
        assert_int_equal(ae_bench_row_line(&sample, line, sizeof(line)), 0);
        /* every line that is cut short of its last field is refused */
        for (size_t len = strlen("autoep-bench-row\t"); line[len - 1]; len++) {
                (void)snprintf(cut, sizeof(cut), "%.*s", (int)len, line);
                if (strrchr(line, '\t') >= line + len)
                        assert_int_equal(ae_bench_row_parse(cut, &row), AE_EPROTO);
        }
        row = sample;
        row.figure = 0;
        assert_int_equal(ae_bench_row_line(&row, line, sizeof(line)), 0);
        assert_int_equal(ae_bench_row_parse(line, &row), AE_EPROTO);
        strcat(line, "\tmore");
        assert_int_equal(ae_bench_row_parse(line, &row), AE_EPROTO);
}

static void test_ratio(void **state)
{
        struct ae_bench_row row = sample;

        (void)state;
        assert_float_equal(ae_bench_ratio(&row), 0.9, 1e-9);
        row.figure = 2.6;
        assert_true(ae_bench_below(&row));
        row.figure = 2.8;
        assert_false(ae_bench_below(&row));
        row.unit = AE_BENCH_US; /* less is better */
        row.aim = AE_BENCH_AIM_FIGURE;
        row.figure = 40;
        row.floor = 10;
        row.target = 30;
        assert_float_equal(ae_bench_ratio(&row), 0.25, 1e-9);
        assert_true(ae_bench_below(&row));
        row.figure = 30;
        assert_false(ae_bench_below(&row));
        row.aim = AE_BENCH_AIM_NONE;
        row.figure = 4000;
        assert_false(ae_bench_below(&row));
}

/* Every kind of row, the first with the longest texts. */
static void fill_rows(struct ae_bench_rows *rows)
{
        struct ae_bench_row row = sample;

        memset(row.name, 'n', sizeof(row.name) - 1);
        memset(row.floor_name, 'f', sizeof(row.floor_name) - 1);
        for (size_t i = 0; i + 1 < sizeof(row.note); i++)
                row.note[i] = i % 7 ? 'w' : ' ';
        row.len = 1023 * AE_GIB;
        row.figure = row.floor = 123456.7;
        assert_int_equal(ae_bench_rows_add(rows, &row), 0);
        assert_int_equal(ae_bench_rows_add(rows, &sample), 0);
        row = sample;
        row.aim = AE_BENCH_AIM_NONE;
        row.note[0] = '\0';
        strcpy(row.suite, "scatter");
        assert_int_equal(ae_bench_rows_add(rows, &row), 0);
}

static const struct ae_bench_machine machine = {
        .cpu = "avx512", .n_cpus = 224, .llc_len = 105 * AE_MIB, .memory_len = 420 * AE_MIB,
        .quick = true,
};

static void test_table(void **state)
{
        AE_CLEANUP(ae_cleanup_free) char *text = NULL;
        struct ae_bench_rows rows = { 0 };
        size_t len, n_headings = 0;
        FILE *out = open_memstream(&text, &len);

        (void)state;
        assert_non_null(out);
        fill_rows(&rows);
        ae_bench_print_head(&machine, out);
        for (size_t i = 0; i < rows.n; i++) {
                struct ae_bench_rows until = { .items = rows.items, .n = i + 1 };

                ae_bench_print_rows(&until, i, out);
        }
        assert_int_equal(fclose(out), 0);
        assert_non_null(strstr(text, "105 MiB"));
        assert_non_null(strstr(text, "fetch, 2 x 1, tcp"));
        for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
                if (strlen(line) > 100)
                        fail_msg("%zu columns: %s", strlen(line), line);
                n_headings += strstr(line, "which is") != NULL;
        }
        assert_int_equal(n_headings, 2);
        ae_bench_rows_deinit(&rows);
}

static void test_json(void **state)
{
        AE_CLEANUP(ae_cleanup_free) char *text = NULL;
        struct ae_bench_rows rows = { 0 };
        FILE *out;
        size_t len;
        json_t *root, *row;

        (void)state;
        out = open_memstream(&text, &len);
        assert_non_null(out);
        fill_rows(&rows);
        assert_int_equal(ae_bench_print_json(&machine, &rows, out), 0);
        assert_int_equal(fclose(out), 0);
        root = json_loads(text, 0, NULL);
        assert_non_null(root);
        assert_string_equal(json_string_value(json_object_get(root, "schema")), "autoep.bench/1");
        assert_int_equal(json_array_size(json_object_get(root, "rows")), 3);
        row = json_array_get(json_object_get(root, "rows"), 1);
        assert_float_equal(json_real_value(json_object_get(row, "ratio")), 0.9, 1e-9);
        assert_string_equal(json_string_value(json_object_get(row, "target_of")), "ratio");
        row = json_array_get(json_object_get(root, "rows"), 2);
        assert_true(json_is_null(json_object_get(row, "target")));
        assert_true(json_is_null(json_object_get(row, "ok")));
        assert_true(json_is_null(json_object_get(row, "note")));
        json_decref(root);
        ae_bench_rows_deinit(&rows);
}

/* ---- measuring -------------------------------------------------------------------------- */

static void test_numbers(void **state)
{
        uint64_t values[] = { 5, 1, 4, 2, 3, 9, 8, 7, 6, 10 };
        uint64_t first, sum = 0;

        (void)state;
        assert_int_equal(ae_bench_percentile(values, 10, 500), 6);
        assert_int_equal(ae_bench_percentile(values, 10, 990), 10);
        assert_int_equal(ae_bench_percentile(values, 10, 0), 1);
        for (uint32_t i = 0; i < 3; i++) {
                uint64_t n = ae_bench_share(1000, i, 3, &first);

                assert_int_equal(first, sum);
                sum += n;
        }
        assert_int_equal(sum, 1000);
        assert_int_equal(ae_bench_share(10, 2, 3, &first), 0);
        assert_true(ae_bench_llc_len() >= 256 * AE_KIB);
}

static void count_up(void *arg, uint32_t index, uint32_t n)
{
        _Atomic uint32_t *counts = arg;

        assert(index < n);
        atomic_fetch_add(&counts[index], 1);
}

static void test_team(void **state)
{
        _Atomic uint32_t a[3] = { 0 }, b[3] = { 0 };
        const struct ae_bench_pair pair = { count_up, count_up, a, b, 4 };
        struct ae_bench_team *team;
        uint64_t a_ns = 0, b_ns = 0;

        (void)state;
        assert_int_equal(ae_bench_team_new(3, &team), 0);
        ae_bench_team_pair(team, &pair, &a_ns, &b_ns);
        ae_bench_team_free(team);
        for (int i = 0; i < 3; i++) {
                assert_int_equal(a[i], 5);
                assert_int_equal(b[i], 5);
        }
        assert_true(a_ns > 0 && b_ns > 0);
}

static void test_plain_tcp(void **state)
{
        struct ae_bench_tcp tcp = { .streams = 2, .n_from = 2, .n_to = 1, .repeats = 2 };
        static const uint64_t lens[] = { 2, 65537, 3 * AE_MIB + 1 };

        (void)state;
        for (size_t i = 0; i < 2 * AE_ARRAY_LEN(lens); i++) {
                uint64_t ns = 0;

                tcp.len = lens[i / 2];
                tcp.both_ways = i % 2;
                assert_int_equal(ae_bench_tcp_run(&tcp, &ns), 0);
                assert_in_range(ns, 1000, 5000000000);
        }
}

static void test_wake(void **state)
{
        uint64_t ns[20];

        (void)state;
        for (int how = AE_BENCH_WAKE_EVENTFD; how <= AE_BENCH_WAKE_FUTEX; how++) {
                memset(ns, 0, sizeof(ns));
                assert_int_equal(ae_bench_wake_run((enum ae_bench_wake)how, 20, 100, ns), 0);
                for (size_t i = 0; i < AE_ARRAY_LEN(ns); i++)
                        assert_in_range(ns[i], 100, 5000000000);
        }
}

static void test_iperf_report(void **state)
{
        (void)state;
        assert_float_equal(ae_bench_iperf_received("{\"sum_sent\":{\"bits_per_second\": 1},"
                                                   "\"sum_received\": {\"seconds\": 2, "
                                                   "\"bits_per_second\":\t8.0e9}}"), 1e9, 1);
        assert_float_equal(ae_bench_iperf_received("{\"error\": \"no\"}"), 0, 0);
        assert_float_equal(ae_bench_iperf_received("{\"sum_received\": {}}"), 0, 0);
        assert_float_equal(ae_bench_iperf_received(""), 0, 0);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_options),
                cmocka_unit_test(test_options_refused),
                cmocka_unit_test(test_row_line),
                cmocka_unit_test(test_ratio),
                cmocka_unit_test(test_table),
                cmocka_unit_test(test_json),
                cmocka_unit_test(test_numbers),
                cmocka_unit_test(test_team),
                cmocka_unit_test(test_plain_tcp),
                cmocka_unit_test(test_wake),
                cmocka_unit_test(test_iperf_report),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
