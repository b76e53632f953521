/* SPDX-License-Identifier: Apache-2.0 */
/* The JSON writer, read back with jansson. */
#include "proto/base/json.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include "tests/lib/test.h"

#include <float.h>
#include <jansson.h>
#include <math.h>
#include <string.h>

static void every_kind_of_value(void **state)
{
        struct ae_json json = AE_JSON_INIT;
        char *text;
        size_t len;

        (void)state;
        ae_json_object_begin(&json);
        ae_json_put_string(&json, "schema", "autoep.test/1");
        ae_json_put_u64(&json, "max", UINT64_MAX);
        ae_json_put_i64(&json, "min", INT64_MIN);
        ae_json_put_bool(&json, "yes", true);
        ae_json_put_bool(&json, "no", false);
        ae_json_put_double(&json, "tenth", 0.1);
        ae_json_put_double(&json, "nan", NAN);
        ae_json_put_string(&json, "none", NULL);
        ae_json_key(&json, "list");
        ae_json_array_begin(&json);
        ae_json_u64(&json, 1);
        ae_json_array_begin(&json);
        ae_json_array_end(&json);
        ae_json_object_begin(&json);
        ae_json_object_end(&json);
        ae_json_array_end(&json);
        ae_json_object_end(&json);
        assert_int_equal(ae_json_finish(&json, &text, &len), 0);
        assert_string_equal(text,
                            "{\"schema\":\"autoep.test/1\",\"max\":18446744073709551615,"
                            "\"min\":-9223372036854775808,\"yes\":true,\"no\":false,\"tenth\":0.1,"
                            "\"nan\":null,\"none\":null,\"list\":[1,[],{}]}");
        assert_int_equal(len, strlen(text));
        free(text);
}

/* Writes @string as the one value; the caller frees. */
static char *written(const char *string, size_t len)
{
        struct ae_json json = AE_JSON_INIT;
        char *text = NULL;

        ae_json_string_n(&json, string, len);
        assert_int_equal(ae_json_finish(&json, &text, NULL), 0);
        return text;
}

static void assert_written(const char *string, const char *expected)
{
        char *text = written(string, strlen(string));

        assert_string_equal(text, expected);
        free(text);
}

static void strings_are_escaped(void **state)
{
        (void)state;
        assert_written("a\"b\\c/d", "\"a\\\"b\\\\c/d\"");
        assert_written("\n\r\t\x01\x1b[2J", "\"\\n\\r\\t\\u0001\\u001b[2J\"");
        assert_written("\x7f\xc2\x9b", "\"\\u007f\\u009b\"");
        assert_written("gewicht-\xc3\xa4-\xe2\x82\xac-\xf0\x9f\x90\x8d",
                       "\"gewicht-\xc3\xa4-\xe2\x82\xac-\xf0\x9f\x90\x8d\"");
        assert_written("", "\"\"");
}

#define BAD "\xef\xbf\xbd"

static void ill_formed_utf8_is_replaced(void **state)
{
        (void)state;
        assert_written("a\xff" "b", "\"a" BAD "b\"");
        assert_written("\xc0\xaf", "\"" BAD BAD "\"");                 /* overlong */
        assert_written("\xe0\x80\xaf", "\"" BAD BAD BAD "\"");
        assert_written("\xed\xa0\x80", "\"" BAD BAD BAD "\"");         /* surrogate */
        assert_written("\xf4\x90\x80\x80", "\"" BAD BAD BAD BAD "\""); /* past U+10FFFF */
        assert_written("\xe2\x82", "\"" BAD BAD "\"");                 /* cut */
        assert_written("\xe2\x82" "A", "\"" BAD BAD "A\"");
        assert_written("\x80", "\"" BAD "\"");
}

/* Whatever bytes come in, jansson accepts what comes out, and well-formed text comes back. */
static void random_bytes_give_valid_json(void **state)
{
        uint32_t seed = 12345;
        char bytes[64];

        (void)state;
        for (int round = 0; round < 5000; round++) {
                size_t len = (size_t)round % sizeof(bytes);
                char *text;
                json_t *read;

                for (size_t i = 0; i < len; i++) {
                        seed = seed * 1664525u + 1013904223u;
                        bytes[i] = (char)(seed >> 24);
                }
                text = written(bytes, len);
                read = json_loads(text, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
                if (!read)
                        fail_msg("jansson refuses %s", text);
                json_decref(read);
                free(text);
        }
}

static void doubles_come_back(void **state)
{
        static const double values[] = { 0.0,     -0.0,        1.0 / 3.0, 1e300,  5e-324,
                                         DBL_MAX, DBL_EPSILON, 123456.75, -2.5e-7 };

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(values); i++) {
                struct ae_json json = AE_JSON_INIT;
                char *text;
                json_t *read;
                double back;

                ae_json_array_begin(&json);
                ae_json_double(&json, values[i]);
                ae_json_array_end(&json);
                assert_int_equal(ae_json_finish(&json, &text, NULL), 0);
                read = json_loads(text, 0, NULL);
                back = json_number_value(json_array_get(read, 0));
                if (back != values[i])
                        fail_msg("%.17g was read back as %.17g", values[i], back);
                json_decref(read);
                free(text);
        }
}

static void a_long_text_grows(void **state)
{
        struct ae_json json = AE_JSON_INIT;
        char *text;
        size_t len;
        json_t *read, *last;

        (void)state;
        ae_json_array_begin(&json);
        for (uint64_t i = 0; i < 20000; i++) {
                ae_json_object_begin(&json);
                ae_json_put_u64(&json, "i", i);
                ae_json_put_string(&json, "name", "layer.\"0\"");
                ae_json_object_end(&json);
        }
        ae_json_array_end(&json);
        assert_int_equal(ae_json_finish(&json, &text, &len), 0);
        read = json_loadb(text, len, 0, NULL);
        assert_int_equal(json_array_size(read), 20000);
        last = json_array_get(read, 19999);
        assert_int_equal(json_integer_value(json_object_get(last, "i")), 19999);
        assert_string_equal(json_string_value(json_object_get(last, "name")), "layer.\"0\"");
        json_decref(read);
        free(text);
}

static void a_writer_is_used_again(void **state)
{
        struct ae_json json = AE_JSON_INIT;
        char *text;

        (void)state;
        ae_json_array_begin(&json);
        ae_json_deinit(&json); /* half-built */
        ae_json_deinit(&json);
        ae_json_i64(&json, -5);
        assert_int_equal(ae_json_finish(&json, &text, NULL), 0);
        assert_string_equal(text, "-5");
        free(text);
        ae_json_null(&json);
        assert_int_equal(ae_json_finish(&json, &text, NULL), 0);
        assert_string_equal(text, "null");
        free(text);
}

/* The failure that stuck is what finish reports, whatever was written after it. */
static void the_first_failure_sticks(void **state)
{
        struct ae_json json = AE_JSON_INIT;
        char *text = NULL;

        (void)state;
        ae_json_array_begin(&json);
        json.status = AE_ENOMEM;
        ae_json_string(&json, "lost");
        ae_json_array_end(&json);
        assert_int_equal(ae_json_finish(&json, &text, NULL), AE_ENOMEM);
        assert_null(text);
        assert_null(json.data);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(every_kind_of_value),
                cmocka_unit_test(strings_are_escaped),
                cmocka_unit_test(ill_formed_utf8_is_replaced),
                cmocka_unit_test(random_bytes_give_valid_json),
                cmocka_unit_test(doubles_come_back),
                cmocka_unit_test(a_long_text_grows),
                cmocka_unit_test(a_writer_is_used_again),
                cmocka_unit_test(the_first_failure_sticks),
        };

        return cmocka_run_group_tests_name("json", tests, NULL, NULL);
}
