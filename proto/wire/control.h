/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Framing of the protobuf control messages. On a unix socket each message is struct
 * ae_control_frame and then the packed message; between daemons it follows struct ae_wire_head.
 * Caps are checked before unpacking (length) and after (counts, names); protobuf-c has no limits of
 * its own, and the schema nests nothing in itself. Pure but for allocation.
 */
#pragma once

#include "control.pb-c.h"

#include <stddef.h>
#include <stdint.h>

#define AE_CONTROL_FRAME_MAX (64u << 20) /* bytes of one packed message */
#define AE_CONTROL_LIST_MAX (2u * 65536u) /* items of a list in one, twice the tensors of a job */
#define AE_CONTROL_FDS_MAX 4

/*           name          type  protobuf-c name  */
#define AE_CONTROL_TABLE(X)                                                                       \
        X(HELLO,         1,  hello,        Hello)                                                 \
        X(HELLO_OK,      2,  hello_ok,     HelloOk)                                               \
        X(REGISTER,      3,  register,     Register)                                              \
        X(REGISTERED,    4,  registered,   Registered)                                            \
        X(GET,           5,  get,          Get)                                                   \
        X(PUT,           6,  put,          Put)                                                   \
        X(PAUSE,         7,  pause,        Pause)                                                 \
        X(LEAVE,         8,  leave,        Leave)                                                 \
        X(DONE,          9,  done,         Done)                                                  \
        X(ERROR,         10, error,        Error)                                                 \
        X(CTL_REQUEST,   11, ctl_request,  CtlRequest)                                            \
        X(CTL_REPLY,     12, ctl_reply,    CtlReply)                                              \
        X(JOIN,          20, join,         Join)                                                  \
        X(JOIN_REPLY,    21, join_reply,   JoinReply)                                             \
        X(OFFER,         22, offer,        Offer)                                                 \
        X(START,         23, start,        Start)                                                 \
        X(GRANTS,        24, grants,       Grants)                                                \
        X(READY,         25, ready,        Ready)                                                 \
        X(STAGE,         26, stage,        Stage)                                                 \
        X(STAGE_REPLY,   27, stage_reply,  StageReply)                                            \
        X(DECIDE,        28, decide,       Decide)                                                \
        X(DECIDE_REPLY,  29, decide_reply, DecideReply)                                           \
        X(FETCH,         30, fetch,        Fetch)                                                 \
        X(FETCH_REPLY,   31, fetch_reply,  FetchReply)                                            \
        X(FAIL,          32, fail,         Fail)                                                  \
        X(LEFT,          33, left,         Left)                                                  \
        X(PAUSE_NOTE,    34, pause_note,   PauseNote)

enum ae_control_type {
#define AE_CONTROL_ENUM(name, value, lower, message) AE_CONTROL_##name = value,
        AE_CONTROL_TABLE(AE_CONTROL_ENUM)
#undef AE_CONTROL_ENUM
};

/* In front of each message on a unix socket; little-endian. */
struct ae_control_frame {
        uint32_t len;  /* bytes of the packed message behind it */
        uint16_t type; /* enum ae_control_type */
        uint16_t zero;
};

/* Name of a type for messages; "unknown" for others. */
const char *ae_control_name(uint32_t type);

/* The packed size, and the packing of a message into @ret of at least that size. */
size_t ae_control_size(const ProtobufCMessage *message);
void ae_control_pack(const ProtobufCMessage *message, uint8_t *ret);

/*
 * Unpacks @data as a message of @type and checks it: AE_EPROTO for an unknown type or field, a
 * malformed or oversized message, a string longer than a name may be, too many items. The caller
 * frees it with ae_control_free().
 */
int ae_control_unpack(uint32_t type, const void *data, size_t len, ProtobufCMessage **ret_message);
/* NULL is fine; returns NULL. */
ProtobufCMessage *ae_control_free(ProtobufCMessage *message);
static inline void ae_control_free_p(ProtobufCMessage **message)
{
        ae_control_free(*message);
}
