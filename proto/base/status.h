/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Status codes and the thread's error text.
 *
 * Every fallible function returns int: 0 is fine, a negative code from AE_STATUS_TABLE is fatal to
 * the operation and is passed on unchanged, a positive value is a condition that the module's own
 * header lists and the direct caller handles.
 *
 * The function that decides that something is an error calls ae_fail() once, with a sentence that
 * says what was tried, on what, and the cause. Callers return the code; the outermost layer prints
 * ae_error_text(). The text belongs to the calling thread.
 */
#pragma once

#include <stdarg.h>

/*        name          value  health code        words                                      */
#define AE_STATUS_TABLE(X)                                                                        \
        X(EINVAL,       -1,  "AEP_INVALID",      "invalid argument")                              \
        X(ENOMEM,       -2,  "AEP_NO_MEMORY",    "out of memory")                                 \
        X(ESYS,         -3,  "AEP_SYSTEM",       "a system call failed")                          \
        X(ETIMEDOUT,    -4,  "AEP_DEADLINE",     "the deadline passed")                           \
        X(ELOST,        -5,  "AEP_LOST",         "a rank or node was lost")                       \
        X(EPROTO,       -6,  "AEP_PROTOCOL",     "the peer broke the protocol")                   \
        X(EVERSION,     -7,  "AEP_VERSION",      "protocol versions differ")                      \
        X(EAUTH,        -8,  "AEP_AUTH",         "not allowed")                                   \
        X(EEXIST,       -9,  "AEP_EXISTS",       "already there")                                 \
        X(ENOENT,       -10, "AEP_UNKNOWN",      "no such thing")                                 \
        X(ESTATE,       -11, "AEP_STATE",        "not possible now")                              \
        X(EHELD,        -12, "AEP_HELD",         "views are still held")                          \
        X(EAGAIN,       -13, "AEP_AGAIN",        "no room now, try again")                        \
        X(EBUDGET,      -14, "AEP_BUDGET",       "over the memory budget")                        \
        X(EMISMATCH,    -15, "AEP_MISMATCH",     "ranks or nodes disagree")                       \
        X(EUNSUPPORTED, -16, "AEP_UNSUPPORTED",  "not supported")                                 \
        X(EFORKED,      -17, "AEP_FORKED",       "the handle belongs to the parent process")      \
        X(ECLOSED,      -18, "AEP_CLOSED",       "closed")                                        \
        X(ENONFINITE,   -19, "AEP_NONFINITE",    "a gradient holds NaN or Inf")                   \
        X(EOVERFLOW,    -20, "AEP_OVERFLOW",     "a size is beyond its limit")

enum ae_status {
        AE_OK = 0,
#define AE_STATUS_ENUM(name, value, code, words) AE_##name = value,
        AE_STATUS_TABLE(AE_STATUS_ENUM)
#undef AE_STATUS_ENUM
};

/* Words, health code ("AEP_…") and constant name ("EINVAL") of a status; never NULL. */
const char *ae_status_words(int status);
const char *ae_status_code(int status);
const char *ae_status_name(int status);

/*
 * Notes @format as the thread's error text and returns @status. ae_fail_sys() appends the words of
 * the errno value @err and returns AE_ENOMEM for ENOMEM, otherwise AE_ESYS.
 */
int ae_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3), cold));
int ae_fail_sys(int err, const char *format, ...) __attribute__((format(printf, 2, 3), cold));
int ae_failv(int status, const char *format, va_list args)
        __attribute__((format(printf, 2, 0), cold));

/* The text of the thread's last ae_fail(), "" when there was none; valid until the next one. */
const char *ae_error_text(void);
