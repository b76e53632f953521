/* SPDX-License-Identifier: Apache-2.0 */
/*
 * autoep-ctl: the first byte says which command, or that what follows is a command line. After a
 * command comes the daemon's answer, read and rendered as a table.
 */
#include "tests/fuzz/input.h"
#include "tests/lib/test.h"

#include "client/ctl/ctl.h"
#include "client/ctl/render.h"

#include <stdio.h>
#include <stdlib.h>

#define WORDS_MAX 16

static void render(const struct ae_ctl_command *command, const char *text, bool color)
{
        const struct ae_ctl_style style = { .headers = true, .color = color };
        json_t *reply = NULL;
        char *shown = NULL;
        size_t shown_len;
        FILE *out;

        if (command->local || ae_ctl_reply_parse(command, text, &reply) < 0)
                return;
        out = open_memstream(&shown, &shown_len);
        assert_non_null(out);
        (void)ae_ctl_reply_degraded(command, reply);
        assert_int_equal(ae_ctl_render(command, reply, &style, out), 0);
        assert_int_equal(fclose(out), 0);
        assert_int_equal(strlen(shown), shown_len); /* no NUL gets to the terminal */
        assert_true(color || !strchr(shown, '\033'));
        free(shown);
        json_decref(reply);
}

static void run_line(char *line)
{
        char program[] = "autoep-ctl";
        char *argv[WORDS_MAX + 2] = { program }, *said = NULL;
        size_t said_len;
        int argc = 1;
        enum ae_ctl_exit code;
        FILE *out = open_memstream(&said, &said_len);

        assert_non_null(out);
        for (char *word = strtok(line, " "); word && argc <= WORDS_MAX; word = strtok(NULL, " "))
                argv[argc++] = word;
        code = ae_ctl_main(argc, argv, out, out);
        assert_int_equal(fclose(out), 0);
        assert_true(code == AE_CTL_EXIT_OK || strstr(said, "try: "));
        free(said);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
        struct input input = { data, len };
        uint8_t which = input_u8(&input);
        char *text = input_string(&input, input.len);

        setenv("AUTOEP_SOCKET", "/nonexistent/socket", 1);
        if ((which & 0x7f) < ae_ctl_n_commands)
                render(&ae_ctl_commands[which & 0x7f], text, which & 0x80);
        else
                run_line(text);
        free(text);
        return 0;
}
