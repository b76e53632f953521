/* SPDX-License-Identifier: Apache-2.0 */
/* Reads text and deals it out. The main thread. */
#include "client/examples/moe-lm/text.h"

#include "client/examples/moe-lm/random.h"
#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define HELD_OUT_PART 20      /* one in so many bytes */
#define HELD_OUT_WINDOWS 64   /* at most so many are evaluated */
#define FILES_MAX 4096

/* Files by device and inode, so that a link to one of them isn't read again. */
struct seen {
        dev_t device[FILES_MAX];
        ino_t inode[FILES_MAX];
        size_t n;
};

static bool first_time(struct seen *seen, const struct stat *info)
{
        for (size_t i = 0; i < seen->n; i++) {
                if (seen->device[i] == info->st_dev && seen->inode[i] == info->st_ino)
                        return false;
        }
        if (seen->n < FILES_MAX) {
                seen->device[seen->n] = info->st_dev;
                seen->inode[seen->n++] = info->st_ino;
        }
        return true;
}

static int append_bytes(struct lm_text *text, int fd, const char *path, size_t len)
{
        uint8_t *bytes;
        size_t done = 0;

        if (len > LM_TEXT_MAX - text->n)
                return ae_fail(AE_EOVERFLOW, "cannot read %s: with it the text is more than %zu "
                               "MiB", path, LM_TEXT_MAX >> 20);
        bytes = realloc(text->bytes, text->n + len + 1);
        if (!bytes)
                return ae_fail_sys(ENOMEM, "cannot read %s", path);
        text->bytes = bytes;
        while (done < len) {
                ssize_t got = read(fd, bytes + text->n + done, len - done);

                if (got < 0)
                        return ae_fail_sys(errno, "cannot read %s", path);
                if (got == 0)
                        break;
                done += (size_t)got;
        }
        text->n += done;
        return 0;
}

static int append_file(struct lm_text *text, struct seen *seen, const char *path)
{
        AE_CLEANUP(ae_cleanup_close) int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        struct stat info;

        if (fd < 0)
                return ae_fail_sys(errno, "cannot open %s", path);
        if (fstat(fd, &info) < 0)
                return ae_fail_sys(errno, "cannot look at %s", path);
        if (!S_ISREG(info.st_mode) || !first_time(seen, &info))
                return 0;
        return append_bytes(text, fd, path, (size_t)info.st_size);
}

static int append_folder(struct lm_text *text, struct seen *seen, const char *path)
{
        struct dirent **entries = NULL;
        char name[PATH_MAX];
        int r = 0, n = scandir(path, &entries, NULL, alphasort);

        if (n < 0)
                return ae_fail_sys(errno, "cannot list %s", path);
        for (int i = 0; i < n; i++) {
                if (r == 0 && entries[i]->d_name[0] != '.') {
                        snprintf(name, sizeof(name), "%s/%s", path, entries[i]->d_name);
                        r = append_file(text, seen, name);
                }
                free(entries[i]);
        }
        free(entries);
        return r;
}

static int append_path(struct lm_text *text, struct seen *seen, const char *path)
{
        struct stat info;

        if (stat(path, &info) < 0)
                return ae_fail(AE_ENOENT, "cannot train on %s: %s", path, strerror(errno));
        return S_ISDIR(info.st_mode) ? append_folder(text, seen, path)
                                     : append_file(text, seen, path);
}

int lm_text_open(struct lm_text *text, const char *const *paths, size_t n, size_t seq)
{
        AE_CLEANUP(ae_cleanup_free) struct seen *seen = calloc(1, sizeof(*seen));
        int r = 0;

        *text = (struct lm_text){ 0 };
        if (!seen)
                return ae_fail_sys(ENOMEM, "cannot read text");
        for (size_t i = 0; r == 0 && i < n; i++)
                r = append_path(text, seen, paths[i]);
        text->n_train = text->n - text->n / HELD_OUT_PART;
        if (r == 0 && text->n / HELD_OUT_PART < seq + 1)
                r = ae_fail(AE_EINVAL, "cannot train on %zu bytes of text: sequences of %zu need "
                            "at least %zu", text->n, seq, (seq + 1) * HELD_OUT_PART);
        if (r < 0)
                lm_text_deinit(text);
        return r;
}

void lm_text_deinit(struct lm_text *text)
{
        free(text->bytes);
        *text = (struct lm_text){ 0 };
}

int lm_dealt_init(struct lm_dealt *dealt, const struct lm_deal *deal)
{
        const size_t n = (size_t)deal->n_seqs * deal->seq;

        *dealt = (struct lm_dealt){ 0 };
        dealt->bytes = calloc(2, n);
        dealt->seq_first = calloc((size_t)deal->n_seqs + 1, sizeof(*dealt->seq_first));
        if (!dealt->bytes || !dealt->seq_first) {
                lm_dealt_deinit(dealt);
                return ae_fail_sys(ENOMEM, "cannot make room for batches of %zu tokens", n);
        }
        dealt->batch = (struct lm_batch){ .tokens = dealt->bytes, .targets = dealt->bytes + n,
                                          .seq_first = dealt->seq_first };
        return 0;
}

void lm_dealt_deinit(struct lm_dealt *dealt)
{
        free(dealt->bytes);
        free(dealt->seq_first);
        *dealt = (struct lm_dealt){ 0 };
}

static void add_sequence(const struct lm_deal *deal, size_t from, size_t len,
                         struct lm_dealt *dealt)
{
        struct lm_batch *batch = &dealt->batch;
        uint8_t *targets = dealt->bytes + (size_t)deal->n_seqs * deal->seq;

        assert(from + len + 1 <= deal->text->n && batch->n_seqs < deal->n_seqs);
        memcpy(dealt->bytes + batch->n_tokens, deal->text->bytes + from, len);
        memcpy(targets + batch->n_tokens, deal->text->bytes + from + 1, len);
        batch->n_tokens += len;
        dealt->seq_first[++batch->n_seqs] = batch->n_tokens;
}

/* Sequences for a rank: all, or with --uneven shares that go round, one of them none. */
static uint32_t n_seqs_of(const struct lm_deal *deal, const struct lm_turn *turn)
{
        uint64_t share;

        if (!deal->uneven || deal->world == 1)
                return deal->n_seqs;
        share = (turn->rank + turn->micro + turn->step) % deal->world;
        return (uint32_t)ae_div_up(deal->n_seqs * share, deal->world - 1);
}

/*
 * Sequences are numbered through micro-batches and ranks, so that the same ones make up a step
 * however it is divided among them.
 */
void lm_deal_train(const struct lm_deal *deal, const struct lm_turn *turn, struct lm_dealt *dealt)
{
        const uint64_t key = lm_random_key(deal->seed, "sequence");
        const uint64_t first = ((turn->step * deal->accumulate + turn->micro) * deal->world +
                                turn->rank) * deal->n_seqs;
        const uint32_t n = n_seqs_of(deal, turn);

        dealt->batch.n_tokens = dealt->batch.n_seqs = 0;
        for (uint32_t i = 0; i < n; i++) {
                const uint64_t random = lm_random(key, first + i);
                const size_t from = random % (deal->text->n_train - deal->seq);
                const size_t cut = deal->uneven ? (random >> 40) % (deal->seq / 2) : 0;

                add_sequence(deal, from, deal->seq - cut, dealt);
        }
}

uint64_t lm_deal_held_out(const struct lm_deal *deal, uint64_t round, uint32_t rank,
                          struct lm_dealt *dealt)
{
        const struct lm_text *text = deal->text;
        const uint64_t n = AE_MIN((text->n - text->n_train - 1) / deal->seq,
                                  (size_t)HELD_OUT_WINDOWS);
        const uint64_t first = (round * deal->world + rank) * deal->n_seqs;

        dealt->batch.n_tokens = dealt->batch.n_seqs = 0;
        for (uint64_t w = first; w < first + deal->n_seqs && w < n; w++)
                add_sequence(deal, text->n_train + w * deal->seq, deal->seq, dealt);
        return ae_div_up(n, (uint64_t)deal->n_seqs * deal->world);
}
