/* SPDX-License-Identifier: Apache-2.0 */
/*
 * autoep-ctl from its command line to its output, against a daemon that a thread plays: it answers
 * one request on a unix socket with what the test put there and notes what it was asked.
 */
#include "client/ctl/ctl.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/control.h"
#include "proto/wire/wire.h"

#include "tests/lib/test.h"

#include <endian.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

struct daemon {
        /* what to answer */
        uint16_t type;       /* 0: hang up at once */
        int status;
        const char *text;
        uint32_t cut;        /* bytes of the answer that are never sent */
        /* what was asked */
        char asked[256];
        uint32_t version; /* that it was asked with */
        pthread_t thread;
        int listener;
        char dir[64];
        char socket[96];
};

static void read_all(int fd, void *ret, size_t len)
{
        for (char *at = ret; len > 0;) {
                ssize_t n = read(fd, at, len);

                if (n <= 0)
                        return;
                at += n;
                len -= (size_t)n;
        }
}

static size_t pack_answer(const struct daemon *daemon, uint8_t **ret_data)
{
        Autoep__CtlReply reply = AUTOEP__CTL_REPLY__INIT;
        Autoep__Error error = AUTOEP__ERROR__INIT;
        ProtobufCMessage *message = &reply.base;

        reply.status = error.status = daemon->status;
        reply.text = error.text = (char *)daemon->text;
        if (daemon->type == AE_CONTROL_ERROR)
                message = &error.base;
        *ret_data = calloc(1, ae_control_size(message) + 1);
        ae_control_pack(message, *ret_data);
        return ae_control_size(message);
}

static void note_request(struct daemon *daemon, int fd)
{
        struct ae_control_frame frame = { 0 };
        uint8_t data[1024];
        ProtobufCMessage *message;
        const Autoep__CtlRequest *request;

        read_all(fd, &frame, sizeof(frame));
        if (le32toh(frame.len) > sizeof(data))
                return;
        read_all(fd, data, le32toh(frame.len));
        if (ae_control_unpack(le16toh(frame.type), data, le32toh(frame.len), &message) < 0)
                return;
        request = (const Autoep__CtlRequest *)message;
        (void)snprintf(daemon->asked, sizeof(daemon->asked), "%s job=%s tensor=%s unit=%s",
                       request->command, request->job, request->tensor, request->unit);
        daemon->version = request->version;
        ae_control_free(message);
}

static void *daemon_main(void *arg)
{
        struct daemon *daemon = arg;
        struct ae_control_frame frame = { .type = htole16(daemon->type) };
        uint8_t *data = NULL;
        size_t len;
        int fd = accept(daemon->listener, NULL, NULL);

        note_request(daemon, fd);
        if (daemon->type) {
                len = pack_answer(daemon, &data);
                frame.len = htole32((uint32_t)len);
                (void)!write(fd, &frame, sizeof(frame));
                (void)!send(fd, data, len - daemon->cut, MSG_NOSIGNAL);
                /* A cut answer stays unfinished until the other side gives up. */
                if (daemon->cut)
                        read_all(fd, &frame, 1);
        }
        free(data);
        close(fd);
        return NULL;
}

static void daemon_start(struct daemon *daemon)
{
        struct sockaddr_un address = { .sun_family = AF_UNIX };

        strcpy(daemon->dir, "/tmp/test-ctl.XXXXXX");
        assert_non_null(mkdtemp(daemon->dir));
        (void)snprintf(daemon->socket, sizeof(daemon->socket), "%s/s", daemon->dir);
        strcpy(address.sun_path, daemon->socket);
        daemon->listener = socket(AF_UNIX, SOCK_STREAM, 0);
        assert_int_equal(bind(daemon->listener, (void *)&address, sizeof(address)), 0);
        assert_int_equal(listen(daemon->listener, 4), 0);
        assert_int_equal(pthread_create(&daemon->thread, NULL, daemon_main, daemon), 0);
}

static void daemon_stop(struct daemon *daemon)
{
        assert_int_equal(pthread_join(daemon->thread, NULL), 0);
        close(daemon->listener);
        unlink(daemon->socket);
        rmdir(daemon->dir);
}

struct result {
        int code;
        char *out, *err;
};

/* Runs "autoep-ctl LINE"; words are divided by blanks. */
static struct result run(const char *line)
{
        struct result result;
        char words[512];
        char *argv[32] = { (char *)"autoep-ctl" };
        int argc = 1;
        size_t out_len, err_len;
        FILE *out = open_memstream(&result.out, &out_len);
        FILE *err = open_memstream(&result.err, &err_len);

        assert_true(strlen(line) < sizeof(words));
        strcpy(words, line);
        for (char *word = strtok(words, " "); word; word = strtok(NULL, " "))
                argv[argc++] = word;
        result.code = (int)ae_ctl_main(argc, argv, out, err);
        fclose(out);
        fclose(err);
        return result;
}

static void result_free(struct result *result)
{
        free(result->out);
        free(result->err);
}

static struct result ask(struct daemon *daemon, const char *line)
{
        struct result result;

        daemon_start(daemon);
        setenv("AUTOEP_SOCKET", daemon->socket, 1);
        result = run(line);
        unsetenv("AUTOEP_SOCKET");
        daemon_stop(daemon);
        return result;
}

static void assert_answer(const char *line, const char *reply, int code, const char *out)
{
        struct daemon daemon = { .type = AE_CONTROL_CTL_REPLY, .text = reply };
        struct result result = ask(&daemon, line);

        assert_string_equal(result.err, "");
        assert_string_equal(result.out, out);
        assert_int_equal(result.code, code);
        result_free(&result);
}

#define STATUS_HEAD                                                                               \
        "{\"schema\":\"autoep.status/1\",\"node\":1,\"n_nodes\":2,\"version\":\"0.1.0\","          \
        "\"transport\":\"tcp\",\"uptime_s\":7512.25,"
#define STATUS_JOB                                                                                \
        "{\"name\":\"moe\",\"state\":\"running\",\"why\":\"\",\"epoch\":1,\"round\":18,"           \
        "\"version\":17,\"world\":4,\"ranks_present\":4,\"waiting\":\"\",\"memory_len\":94371840," \
        "\"budget_len\":null}"

static void status_is_a_page(void **state)
{
        (void)state;
        assert_answer("status",
                      STATUS_HEAD "\"health\":\"ok\",\"why\":\"\",\"memory\":{\"used\":94371840,"
                                  "\"tables\":622592,\"limit\":null},\"jobs\":[" STATUS_JOB "]}",
                      AE_CTL_EXIT_OK,
                      "node       1\n"
                      "nodes      2\n"
                      "version    0.1.0\n"
                      "transport  tcp\n"
                      "uptime     2 h 5 min\n"
                      "health     ok\n"
                      "memory     90.0 MiB\n"
                      "tables     608.0 KiB\n"
                      "\n"
                      "JOB  STATE    EPOCH  ROUND  VERSION  WORLD  PRESENT    MEMORY\n"
                      "moe  running      1     18       17      4        4  90.0 MiB\n");
        assert_answer("status",
                      STATUS_HEAD "\"health\":\"degraded\",\"why\":\"AEP_LOST node 0\","
                                  "\"memory\":{\"used\":0,\"tables\":4096,"
                                  "\"limit\":1024},\"jobs\":[]}",
                      AE_CTL_EXIT_DEGRADED,
                      "node       1\n"
                      "nodes      2\n"
                      "version    0.1.0\n"
                      "transport  tcp\n"
                      "uptime     2 h 5 min\n"
                      "health     degraded\n"
                      "why        AEP_LOST node 0\n"
                      "memory     0 B\n"
                      "tables     4.0 KiB\n"
                      "limit      1.0 KiB\n"
                      "\n"
                      "no jobs\n");
}

static void nodes_tell_who_is_lost(void **state)
{
        static const char reply[] =
                "{\"schema\":\"autoep.nodes/1\",\"nodes\":["
                "{\"id\":0,\"state\":\"self\",\"incarnation\":\"00000000000000ab\","
                "\"address\":\"127.0.0.1:4000\",\"transport\":\"tcp\",\"sent_len\":0,"
                "\"received_len\":0},"
                "{\"id\":10,\"state\":\"%s\",\"incarnation\":null,\"address\":\"127.0.0.1:40001\","
                "\"transport\":\"tcp\",\"sent_len\":1048575,\"received_len\":1047}]}";
        char text[512];

        (void)state;
        (void)snprintf(text, sizeof(text), reply, "up");
        assert_answer("--no-headers nodes", text, AE_CTL_EXIT_OK,
                      " 0  self  00000000000000ab  127.0.0.1:4000   tcp      0 B      0 B\n"
                      "10  up    -                 127.0.0.1:40001  tcp  1.0 MiB  1.0 KiB\n");
        (void)snprintf(text, sizeof(text), reply, "lost");
        assert_answer("nodes -n", text, AE_CTL_EXIT_DEGRADED,
                      " 0  self  00000000000000ab  127.0.0.1:4000   tcp      0 B      0 B\n"
                      "10  lost  -                 127.0.0.1:40001  tcp  1.0 MiB  1.0 KiB\n");
}

static void jobs_show_why_only_when_needed(void **state)
{
        (void)state;
        assert_answer("jobs",
                      "{\"schema\":\"autoep.jobs/1\",\"jobs\":[" STATUS_JOB ",{\"name\":\"b\","
                      "\"state\":\"failed\",\"why\":\"rank 3 was lost\",\"epoch\":2,\"round\":1,"
                      "\"version\":0,\"world\":16,\"ranks_present\":15,\"waiting\":\"rank 3\","
                      "\"memory_len\":512,\"budget_len\":2048}]}",
                      AE_CTL_EXIT_DEGRADED,
                      "JOB  STATE    EPOCH  ROUND  VERSION  WORLD  PRESENT    MEMORY   BUDGET  "
                      "WAITING  WHY\n"
                      "moe  running      1     18       17      4        4  90.0 MiB        -  "
                      "-        -\n"
                      "b    failed       2      1        0     16       15     512 B  2.0 KiB  "
                      "rank 3   rank 3 was lost\n");
}

static void workers_and_units(void **state)
{
        (void)state;
        assert_answer("workers",
                      "{\"schema\":\"autoep.workers/1\",\"job\":\"moe\",\"workers\":[{\"rank\":0,"
                      "\"node\":0,\"pid\":4711,\"uid\":1000,\"state\":\"running\",\"micro\":2,"
                      "\"held_len\":4096,\"hold_len\":65536,\"ring_used\":0,\"ring_len\":33554432},"
                      "{\"rank\":1,\"node\":1,\"pid\":null,\"uid\":null,\"state\":\"missing\"}]}",
                      AE_CTL_EXIT_OK,
                      "RANK  NODE   PID   UID  STATE    MICRO     HELD   ALLOWED  RING-USED      "
                      "RING\n"
                      "   0     0  4711  1000  running      2  4.0 KiB  64.0 KiB        0 B  "
                      "32.0 MiB\n"
                      "   1     1     -     -  missing      -        -         -          -"
                      "         -\n");
        assert_answer("units",
                      "{\"schema\":\"autoep.units/1\",\"job\":\"moe\",\"version\":3,\"units\":["
                      "{\"id\":0,\"name\":\"embed\",\"version\":3,\"cached\":true,\"len\":1536,"
                      "\"segments\":1,\"misses\":0},{\"id\":1,\"name\":\"layer.0\","
                      "\"version\":null,\"cached\":false,\"len\":99,\"segments\":2,"
                      "\"misses\":7}]}",
                      AE_CTL_EXIT_OK,
                      "ID  UNIT     VERSION  CACHED     SIZE  SEGMENTS  MISSES\n"
                      " 0  embed          3  yes     1.5 KiB         1       0\n"
                      " 1  layer.0        -  no         99 B         2       7\n");
}

static void tensors_and_hostile_names(void **state)
{
        (void)state;
        assert_answer("tensors --unit embed",
                      "{\"schema\":\"autoep.tensors/1\",\"job\":\"moe\",\"tensors\":[{\"id\":0,"
                      "\"name\":\"w\",\"unit\":\"embed\",\"dtype\":\"bf16\",\"class\":\"dense\","
                      "\"shape\":[1024,64],\"n\":65536,\"group\":0,\"flags\":[\"frozen\"],"
                      "\"alias_of\":null},{\"id\":1,\"name\":\"\\u001b[2J\\u009b\\u00e4\","
                      "\"unit\":\"embed\",\"dtype\":\"int64\",\"class\":\"buffer\",\"shape\":[],"
                      "\"n\":1,\"group\":null,\"flags\":[],\"alias_of\":\"w\"}]}",
                      AE_CTL_EXIT_OK,
                      "ID  TENSOR  UNIT   DTYPE  CLASS   SHAPE          N  GROUP  FLAGS   "
                      "ALIAS-OF\n"
                      " 0  w       embed  bf16   dense   [1024,64]  65536      0  frozen  -\n"
                      " 1  ?[2J?\xc3\xa4  embed  int64  buffer  []             1      -  -       "
                      "w\n");
}

#define SHARD_TAIL                                                                                \
        "\"version\":5,\"weight_len\":1024,\"master_len\":2048,\"moment1_len\":2048,"              \
        "\"moment2_len\":2048,\"sum_len\":2048}"

static void shards_tell_where_elements_are(void **state)
{
        (void)state;
        assert_answer("shards -n",
                      "{\"schema\":\"autoep.shards/1\",\"job\":\"moe\",\"version\":5,\"shards\":["
                      "{\"node\":0,\"unit\":\"u\",\"segment\":0,\"dtype\":\"bf16\","
                      "\"kind\":\"trainable\",\"first\":0,\"n\":512," SHARD_TAIL "]}",
                      AE_CTL_EXIT_OK,
                      "0  u  0  bf16  trainable  0  512  5  1.0 KiB  2.0 KiB  2.0 KiB  2.0 KiB  "
                      "2.0 KiB\n");
        assert_answer("shards --tensor w",
                      "{\"schema\":\"autoep.shards/1\",\"job\":\"moe\",\"version\":5,"
                      "\"tensor\":\"w\","
                      "\"shards\":[{\"node\":0,\"unit\":\"u\",\"segment\":0,\"dtype\":\"bf16\","
                      "\"kind\":\"trainable\",\"first\":0,\"n\":512,\"from\":[0,0],\"to\":[7,63],"
                      SHARD_TAIL ",{\"node\":1,\"unit\":\"u\",\"segment\":0,\"dtype\":\"bf16\","
                      "\"kind\":\"trainable\",\"first\":512,\"n\":512,\"from\":[8,0],\"to\":[15,"
                      "63],"
                      SHARD_TAIL "]}",
                      AE_CTL_EXIT_OK,
                      "NODE  UNIT  SEGMENT  DTYPE  KIND       FIRST    N  FROM   TO       VERSION  "
                      " "
                      "WEIGHT   MASTER  MOMENT1  MOMENT2      SUM\n"
                      "   0  u           0  bf16   trainable      0  512  [0,0]  [7,63]         5  "
                      "1.0 KiB  2.0 KiB  2.0 KiB  2.0 KiB  2.0 KiB\n"
                      "   1  u           0  bf16   trainable    512  512  [8,0]  [15,63]        5  "
                      "1.0 KiB  2.0 KiB  2.0 KiB  2.0 KiB  2.0 KiB\n");
}

static void experts_groups_stats(void **state)
{
        (void)state;
        assert_answer("experts",
                      "{\"schema\":\"autoep.experts/1\",\"job\":\"moe\",\"ep_size\":4,\"experts\":["
                      "{\"unit\":\"l0\",\"tensor\":\"l0.up\",\"expert\":12,\"ranks\":[0,4,5,8,9,"
                      "10],"
                      "\"tokens\":77}]}",
                      AE_CTL_EXIT_OK,
                      "UNIT  TENSOR  EXPERT  RANKS       TOKENS\n"
                      "l0    l0.up       12  0,4,5,8-10      77\n");
        assert_answer("groups",
                      "{\"schema\":\"autoep.groups/1\",\"job\":\"moe\",\"world\":8,\"ep_size\":4,"
                      "\"order\":\"e+d\",\"groups\":[{\"kind\":\"ep\",\"index\":0,"
                      "\"ranks\":[0,1,2,3]},{\"kind\":\"edp\",\"index\":1,\"ranks\":[1,5]}]}",
                      AE_CTL_EXIT_OK,
                      "KIND  INDEX  RANKS\n"
                      "ep        0  0-3\n"
                      "edp       1  1,5\n");
        assert_answer("stats",
                      "{\"schema\":\"autoep.stats/1\",\"node\":0,"
                      "\"stats\":[{\"name\":\"gather_bytes\","
                      "\"value\":3221225472,\"unit\":\"bytes\",\"help\":\"put.\"},"
                      "{\"name\":\"rounds\","
                      "\"value\":3000000,\"unit\":\"count\",\"help\":\"begun.\"},"
                      "{\"name\":\"apply\","
                      "\"value\":0.25,\"unit\":\"seconds\",\"help\":\"spent.\"}]}",
                      AE_CTL_EXIT_OK,
                      "NAME            VALUE  HELP\n"
                      "gather_bytes  3.0 GiB  put.\n"
                      "rounds        3000000  begun.\n"
                      "apply          0.25 s  spent.\n");
}

static void json_is_verbatim(void **state)
{
        static const char reply[] = "{\"schema\":\"autoep.jobs/1\",  \"jobs\":[], \"new\": 1.50}";
        static const char failed[] =
                "{\"schema\":\"autoep.jobs/1\",\"jobs\":[{\"state\":\"failed\"}]}\n";

        (void)state;
        assert_answer("-o json jobs", reply, AE_CTL_EXIT_OK,
                      "{\"schema\":\"autoep.jobs/1\",  \"jobs\":[], \"new\": 1.50}\n");
        assert_answer("--output=json jobs", failed, AE_CTL_EXIT_DEGRADED, failed);
}

static void the_question_is_sent(void **state)
{
        struct daemon daemon = { .type = AE_CONTROL_CTL_REPLY,
                                 .text = "{\"schema\":\"autoep.shards/1\",\"shards\":[]}" };
        struct result result = ask(&daemon, "-j moe shards -t layer.0.w --unit=layer.0");

        (void)state;
        assert_string_equal(daemon.asked, "shards job=moe tensor=layer.0.w unit=layer.0");
        assert_int_equal(daemon.version, AE_WIRE_VERSION);
        assert_string_equal(result.out, "no shards\n");
        result_free(&result);
}

static void assert_error(struct result result, int code, const char *err)
{
        const char *try = strchr(result.err, '\n');

        assert_int_equal(result.code, code);
        assert_string_equal(result.out, "");
        if (!strstr(result.err, err))
                fail_msg("'%s' isn't in '%s'", err, result.err);
        assert_non_null(try);
        assert_int_equal(strncmp(try, "\ntry: ", 6), 0); /* two lines, no more */
        assert_string_equal(strchr(try + 1, '\n'), "\n");
        result_free(&result);
}

static void the_daemon_says_no(void **state)
{
        struct daemon unknown = { .type = AE_CONTROL_CTL_REPLY, .status = AE_ENOENT,
                                  .text = "no job 'x'; there is 'moe'" };
        struct daemon denied = { .type = AE_CONTROL_ERROR, .status = AE_EAUTH, .text = "uid 7" };
        struct daemon other = { .type = AE_CONTROL_CTL_REPLY,
                                .text = "{\"schema\":\"autoep.jobs/2\"}" };
        struct daemon broken = { .type = AE_CONTROL_CTL_REPLY, .text = "{\"schema\":" };
        struct daemon strange = { .type = AE_CONTROL_HELLO };

        (void)state;
        assert_error(ask(&unknown, "jobs"), AE_CTL_EXIT_FAILED, "no job 'x'; there is 'moe'\n");
        assert_error(ask(&denied, "jobs"), AE_CTL_EXIT_DENIED, "the daemon says: uid 7\n");
        assert_error(ask(&other, "jobs"), AE_CTL_EXIT_FAILED, "schema 'autoep.jobs/2'");
        assert_error(ask(&broken, "-o json jobs"), AE_CTL_EXIT_FAILED, "isn't JSON");
        assert_error(ask(&strange, "jobs"), AE_CTL_EXIT_FAILED, "type 1 (HELLO)");
}

static void nobody_answers(void **state)
{
        struct daemon mute = { .type = AE_CONTROL_CTL_REPLY, .text = "{\"schema\":1}", .cut = 5 };
        struct daemon gone = { 0 };

        (void)state;
        assert_error(ask(&mute, "-T 0.05 jobs"), AE_CTL_EXIT_UNREACHABLE, "did not answer in time");
        assert_error(ask(&gone, "jobs"), AE_CTL_EXIT_UNREACHABLE, "hung up");
        assert_error(run("--socket /nowhere/s jobs"), AE_CTL_EXIT_UNREACHABLE,
                     "there is no socket /nowhere/s");
}

static void usage_errors(void **state)
{
        static const struct {
                const char *line, *err;
        } rows[] = {
                { "", "no command given" },
                { "stauts", "unknown command 'stauts'" },
                { "status extra", "'status' takes no argument 'extra'" },
                { "nodes --job x", "'nodes' takes no --job" },
                { "groups --tensor x", "'groups' takes no --tensor" },
                { "jobs --frobnicate", "unknown option '--frobnicate'" },
                { "jobs -x", "unknown option '-x'" },
                { "jobs --job", "--job needs a value: NAME" },
                { "jobs -n=1 -o yaml", "unknown option '-='" },
                { "jobs --no-headers=1", "--no-headers takes no value" },
                { "jobs -o yaml", "unknown output 'yaml'" },
                { "jobs --timeout -1", "timeout '-1'" },
                { "jobs --timeout 5x", "timeout '5x'" },
                { "completion fish", "no completion for shell 'fish'" },
                { "completion", "no completion for shell ''" },
        };

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(rows); i++)
                assert_error(run(rows[i].line), AE_CTL_EXIT_USAGE, rows[i].err);
}

static char *slurp(const char *path)
{
        FILE *file = fopen(path, "r");
        char *text = calloc(1, 65536);
        size_t len;

        if (!file)
                fail_msg("cannot open %s", path);
        len = fread(text, 1, 65535, file);
        assert_true(len > 0 && len < 65535);
        fclose(file);
        return text;
}

__attribute__((format(printf, 3, 4)))
static void assert_has(const char *text, const char *file, const char *format, ...)
{
        char want[512];
        va_list args;

        va_start(args, format);
        (void)vsnprintf(want, sizeof(want), format, args);
        va_end(args);
        if (!strstr(text, want))
                fail_msg("%s lacks '%s'", file, want);
}

static void local_commands_follow_the_tables(void **state)
{
        struct result help = run("--help"), version = run("version"), same = run("-V");
        struct result bash = run("completion bash");

        (void)state;
        assert_int_equal(help.code, AE_CTL_EXIT_OK);
        assert_string_equal(version.out, same.out);
        assert_int_equal(strncmp(version.out, "autoep-ctl 0.", 13), 0);
        for (size_t i = 0; i < ae_ctl_n_commands; i++) {
                assert_has(help.out, "help", "  %s ", ae_ctl_commands[i].name);
                assert_has(bash.out, "completion", "%s", ae_ctl_commands[i].name);
        }
        for (size_t i = 0; i < AE_CTL_N_OPTIONS; i++) {
                assert_has(help.out, "help", "--%s", ae_ctl_options[i].word);
                assert_has(bash.out, "completion", "--%s", ae_ctl_options[i].word);
        }
        result_free(&help);
        result_free(&version);
        result_free(&same);
        result_free(&bash);
}

static void the_manual_follows_the_tables(void **state)
{
        const char *page = SOURCE_ROOT "/client/ctl/autoep-ctl.1.scd";
        AE_CLEANUP(ae_cleanup_free) char *text = slurp(page);
        char head[128];

        (void)state;
        for (size_t i = 0; i < ae_ctl_n_commands; i++) {
                const struct ae_ctl_command *command = &ae_ctl_commands[i];

                (void)snprintf(head, sizeof(head), "*%s*%s%s", command->name,
                               command->argument ? " " : "",
                               command->argument ? command->argument : "");
                assert_has(text, page, "\n%s\n\t%s\n", head, command->help);
        }
        for (size_t i = 0; i < AE_CTL_N_OPTIONS; i++) {
                const struct ae_ctl_option *option = &ae_ctl_options[i];

                (void)snprintf(head, sizeof(head), "*-%c*, *--%s*%s%s%s", option->letter,
                               option->word, option->argument ? " _" : "",
                               option->argument ? option->argument : "",
                               option->argument ? "_" : "");
                assert_has(text, page, "\n%s\n\t%s\n", head, option->help);
        }
#define EXIT_IN_MANUAL(name, value, words) assert_has(text, page, "\n*%s*\n\t%s\n", #value, words);
        AE_CTL_EXIT_TABLE(EXIT_IN_MANUAL)
#undef EXIT_IN_MANUAL
}

static void assert_columns(const char *section, const char *command,
                           const struct ae_ctl_column *columns, size_t n)
{
        for (size_t i = 0; i < n; i++) {
                char head[32];

                (void)snprintf(head, sizeof(head), "%.*s", (int)strcspn(columns[i].key, "."),
                               columns[i].key);
                assert_has(section, command, "\n| `%s` |", head);
        }
}

static void the_schema_has_every_column(void **state)
{
        const char *page = SOURCE_ROOT "/client/ctl/SCHEMA.md";
        AE_CLEANUP(ae_cleanup_free) char *text = slurp(page);

        (void)state;
        for (size_t i = 0; i < ae_ctl_n_commands; i++) {
                const struct ae_ctl_command *command = &ae_ctl_commands[i];
                AE_CLEANUP(ae_cleanup_free) char *section = NULL;
                char head[64];
                const char *at, *end;

                if (command->local)
                        continue;
                (void)snprintf(head, sizeof(head), "\n## %s\n\n`%s`", command->name,
                               command->schema);
                at = strstr(text, head);
                if (!at)
                        fail_msg("%s lacks '%s'", page, head);
                end = strstr(at + 1, "\n## ");
                section = end ? strndup(at, (size_t)(end - at)) : strdup(at);
                assert_columns(section, command->name, command->fields, command->n_fields);
                if (command->n_fields == 0)
                        assert_columns(section, command->name, command->columns,
                                       command->n_columns);
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(status_is_a_page),
                cmocka_unit_test(nodes_tell_who_is_lost),
                cmocka_unit_test(jobs_show_why_only_when_needed),
                cmocka_unit_test(workers_and_units),
                cmocka_unit_test(tensors_and_hostile_names),
                cmocka_unit_test(shards_tell_where_elements_are),
                cmocka_unit_test(experts_groups_stats),
                cmocka_unit_test(json_is_verbatim),
                cmocka_unit_test(the_question_is_sent),
                cmocka_unit_test(the_daemon_says_no),
                cmocka_unit_test(nobody_answers),
                cmocka_unit_test(usage_errors),
                cmocka_unit_test(local_commands_follow_the_tables),
                cmocka_unit_test(the_manual_follows_the_tables),
                cmocka_unit_test(the_schema_has_every_column),
        };

        return cmocka_run_group_tests_name("ctl", tests, NULL, NULL);
}
