/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Texts in shared memory under their sequence lock, and the words of unit entries. The hammering of
 * one text by two threads is left out under the thread sanitizer: a reader of a sequence lock races
 * with the writer by design and throws away what it read, which the sanitizer cannot know.
 */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/wire/local.h"

#include <pthread.h>
#include <string.h>

#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#endif
#endif
#ifndef UNDER_TSAN
#define UNDER_TSAN 0
#endif

#define N_WRITES 200000

static void test_round_trip(void **state)
{
        struct ae_local_text text = { .seq = 0 };
        char got[sizeof(text.text)];
        char longest[sizeof(text.text) + 100];

        (void)state;
        ae_local_text_get(&text, got);
        assert_string_equal(got, "");
        ae_local_text_set(&text, "round 3 waits for rank 5");
        ae_local_text_get(&text, got);
        assert_string_equal(got, "round 3 waits for rank 5");
        ae_local_text_set(&text, "");
        ae_local_text_get(&text, got);
        assert_string_equal(got, "");
        memset(longest, 'x', sizeof(longest) - 1);
        longest[sizeof(longest) - 1] = '\0';
        ae_local_text_set(&text, longest);
        ae_local_text_get(&text, got);
        assert_int_equal(strlen(got), sizeof(text.text) - 1);
        assert_memory_equal(got, longest, sizeof(text.text) - 1);
        assert_int_equal(atomic_load(&text.seq) % 2, 0);
}

/* A writer died in the middle: readers give up instead of showing half a text; the next writer
 * puts it right. */
static void test_abandoned(void **state)
{
        struct ae_local_text text = { .seq = 0 };
        char got[sizeof(text.text)] = "before";

        (void)state;
        ae_local_text_set(&text, "whole");
        atomic_fetch_add(&text.seq, 1);
        ae_local_text_get(&text, got);
        assert_string_equal(got, "");
        ae_local_text_set(&text, "whole again");
        ae_local_text_get(&text, got);
        assert_string_equal(got, "whole again");
}

/* Whatever stands in the memory, what is read ends. */
static void test_unterminated(void **state)
{
        struct ae_local_text text = { .seq = 0 };
        char got[sizeof(text.text)];

        (void)state;
        memset(text.text, 'y', sizeof(text.text));
        ae_local_text_get(&text, got);
        assert_int_equal(strlen(got), sizeof(text.text) - 1);
}

static void test_seq_wraps(void **state)
{
        struct ae_local_text text = { .seq = UINT32_MAX - 1 };
        char got[sizeof(text.text)];

        (void)state;
        ae_local_text_set(&text, "last");
        ae_local_text_get(&text, got);
        assert_string_equal(got, "last");
        assert_int_equal(atomic_load(&text.seq), 0);
}

/* Text number i: one letter, i-dependent length, so that a mixture of two shows. */
static void make_text(uint32_t i, char *ret_text)
{
        size_t n = 1 + (i * 37u) % (sizeof(((struct ae_local_text *)0)->text) - 1);

        memset(ret_text, 'a' + (int)(i % 26), n);
        ret_text[n] = '\0';
}

struct hammer {
        struct ae_local_text text;
        _Atomic bool stop;
};

static void *write_texts(void *user)
{
        struct hammer *hammer = user;
        char text[sizeof(hammer->text.text) + 1];

        for (uint32_t i = 0; i < N_WRITES; i++) {
                make_text(i, text);
                ae_local_text_set(&hammer->text, text);
        }
        atomic_store(&hammer->stop, true);
        return NULL;
}

static bool is_mixed(const char *text)
{
        size_t n = strlen(text);

        for (size_t i = 1; i < n; i++) {
                if (text[i] != text[0])
                        return true;
        }
        return false;
}

static void test_hammer(void **state)
{
        static struct hammer hammer;
        char got[sizeof(hammer.text.text)];
        char last[sizeof(hammer.text.text) + 1];
        uint32_t n_mixed = 0;
        uint32_t n_read = 0;
        pthread_t writer;

        (void)state;
        if (UNDER_TSAN)
                skip();
        assert_int_equal(pthread_create(&writer, NULL, write_texts, &hammer), 0);
        while (!atomic_load(&hammer.stop)) {
                ae_local_text_get(&hammer.text, got);
                n_mixed += is_mixed(got);
                n_read += got[0] != '\0';
        }
        pthread_join(writer, NULL);
        assert_int_equal(n_mixed, 0);
        assert_true(n_read > 0);
        ae_local_text_get(&hammer.text, got);
        make_text(N_WRITES - 1, last);
        assert_string_equal(got, last);
}

static void test_entries(void **state)
{
        static const uint64_t versions[] = { 0, 1, UINT32_MAX, AE_LOCAL_VERSION_ANY };
        static const uint32_t slots[] = { 0, 1, AE_LOCAL_SLOTS_MAX - 1, AE_LOCAL_SLOT_NONE };

        (void)state;
        for (size_t v = 0; v < AE_ARRAY_LEN(versions); v++) {
                for (size_t s = 0; s < AE_ARRAY_LEN(slots); s++) {
                        uint64_t entry = ae_local_entry(versions[v], slots[s]);

                        assert_int_equal(ae_local_entry_version(entry), versions[v]);
                        assert_int_equal(ae_local_entry_slot(entry), slots[s]);
                }
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_round_trip),   cmocka_unit_test(test_abandoned),
                cmocka_unit_test(test_unterminated), cmocka_unit_test(test_seq_wraps),
                cmocka_unit_test(test_hammer),       cmocka_unit_test(test_entries),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
