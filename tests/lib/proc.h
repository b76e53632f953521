/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Real processes for tests: autoepd daemons of one cluster in a directory of their own, and what
 * can be read about any process in /proc. All children die with the test. The test's thread;
 * everything asserts, with the daemon's log in the message, and nothing waits without a deadline.
 * $AUTOEPD is the daemon's path.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PROC_NODES_MAX 4

struct proc_daemon {
        pid_t pid;    /* 0: not running */
        bool stopped; /* by SIGSTOP */
        char socket[96], log[96], peer[96];
};

struct proc_bed {
        char dir[64];
        const char *transport; /* "tcp" or "shm" */
        const char *preload;   /* NULL, or LD_PRELOAD of the daemons; borrowed */
        const char *flags[8];  /* further flags of the daemons, up to NULL; borrowed */
        uint32_t n_nodes;
        char peers[512];
        struct proc_daemon daemons[PROC_NODES_MAX];
};

/* Directory, sockets and free ports; starts nothing. */
void proc_bed_init(struct proc_bed *bed, uint32_t n_nodes, const char *transport);
/* Kills what still runs and removes the directory. */
void proc_bed_deinit(struct proc_bed *bed);

/* Starts node @node and waits until it serves. */
void proc_daemon_start(struct proc_bed *bed, uint32_t node);
void proc_daemon_start_all(struct proc_bed *bed);
/* Sends @signal; SIGSTOP and SIGCONT return at once, others when the daemon is gone. Returns its
 * wait status, 0 for SIGSTOP and SIGCONT. */
int proc_daemon_signal(struct proc_bed *bed, uint32_t node, int signal);
bool proc_daemon_alive(struct proc_bed *bed, uint32_t node);
/* Asserts that the node's log has @text by now or within @ms. */
void proc_daemon_await_log(struct proc_bed *bed, uint32_t node, const char *text, int ms);
bool proc_daemon_log_has(const struct proc_bed *bed, uint32_t node, const char *text);
/* The first line of the log with @text, from there on; asserts. */
void proc_daemon_log_line(const struct proc_bed *bed, uint32_t node, const char *text, char *ret,
                          size_t size);
/* Prints the logs to stderr. */
void proc_bed_show(const struct proc_bed *bed);

/* Runs @argv to its end within @ms; stdout and stderr to @output (cut). Returns the exit code, 128
 * + signal when a signal ended it. */
int proc_run(const char *const *argv, int ms, char *output, size_t size);
const char *proc_autoepd(void);

struct proc_stat {
        long n_fds, n_threads, rss_kib, anon_kib; /* rss: with shared memory that was touched */
};
struct proc_stat proc_stat_of(pid_t pid);

uint64_t proc_now_ms(void);
/* How long this thread could have run and had no processor, in all; 0 where the kernel doesn't say
 * (/proc/thread-self/schedstat). */
uint64_t proc_starved_ns(void);
void proc_sleep_ms(int ms);
/* Child @pid has ended within @ms: its wait status; asserts. */
int proc_wait(pid_t pid, int ms);
/* In a child after fork(): it gets SIGKILL when its parent dies. */
void proc_die_with_parent(pid_t parent);
