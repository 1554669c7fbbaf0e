/* The containers' output, and the end: with the first of them all others are ended, in reverse of their
 * start, and then the machine. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <unistd.h>

#include "talks.h"

enum { FLUSH_MS = 2000 };

struct pump pumps[MAX_CONTAINERS][2];

static int last_word = -1;
static struct container *first;     /* to end; NULL: all run */
static struct container *asked;     /* to end, latest */
static int64_t kill_at;             /* what runs then */

static bool wait_writable(int file, int64_t until)
{
    struct pollfd one = {.fd = file, .events = POLLOUT};
    int64_t left = until - now_ms();
    return left > 0 && poll(&one, 1, left) > 0 && one.revents & POLLOUT;
}

static void put_all(int file, const void *data, size_t length, int64_t until)
{
    while (length && wait_writable(file, until)) {
        long written = write(file, data, length);
        if (written < 0 && errno != EAGAIN)
            return;
        if (written > 0) {
            data = (const char *)data + written;
            length -= written;
        }
    }
}

/* The kernel would say on the console that it restarts. */
void quietly_reset(void)
{
    int level = open("/proc/sys/kernel/printk", O_WRONLY);
    if (level >= 0 && write(level, "0 0 0 0", 7) < 0)
        dprintf(2, "the kernel goes on talking\n");
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}

/* How it ended, as a line of text. */
static void tell_end(const char *word)
{
    if (last_word < 0)
        last_word = open_port("end");
    if (last_word < 0)
        dprintf(2, "%s", word);
    put_all(last_word, word, strlen(word), now_ms() + FLUSH_MS);
}

static void __attribute__((noreturn)) power_off(void)
{
    release_volumes();
    int64_t until = now_ms() + FLUSH_MS;
    wait_writable(last_word, until);    /* writable again: the host has taken what was written */
    for (size_t n = 0; n < order.count; n++)
        for (int which = 0; which < 2; which++)
            if (pumps[n][which].to > 0)
                wait_writable(pumps[n][which].to, until);
    quietly_reset();
}

void fail(const char *form, ...)
{
    char text[500], word[520];
    va_list rest;
    va_start(rest, form);
    vsnprintf(text, sizeof text, form, rest);
    va_end(rest);
    snprintf(word, sizeof word, "failed %s\n", text);
    tell_end(word);
    power_off();
}

/* Output */

void open_outputs(void)
{
    static const char *const names[] = {"out", "err"};
    char name[16];
    for (size_t n = 0; n < order.count; n++)
        for (int which = 0; which < 2; which++) {
            snprintf(name, sizeof name, "%s%zu", names[which], n + 1);
            pumps[n][which].from = -1;
            pumps[n][which].to = open_port(is_main(&order.containers[n]) ? names[which] : name);
            if (pumps[n][which].to < 0)
                fail("the machine lacks a port to the host");
        }
}

void pump_out(struct pump *pump)
{
    if (!pump->count && pump->from >= 0) {
        long got = read(pump->from, pump->data, sizeof pump->data);
        if (got == 0 || (got < 0 && errno != EAGAIN))
            close_stream(&pump->from);
        pump->count = got > 0 ? got : 0;
    }
    if (pump->count) {
        long written = write(pump->to, pump->data, pump->count);
        if (written > 0) {
            pump->count -= written;
            memmove(pump->data, pump->data + written, pump->count);
        }
    }
}

static void drain(struct pump *pump)
{
    int64_t until = now_ms() + FLUSH_MS;
    long got = pump->count;
    do {
        put_all(pump->to, pump->data, got, until);
        got = read(pump->from, pump->data, sizeof pump->data);
    } while (got > 0 && now_ms() < until);
}

/* Ends */

void take_end(struct container *container, int status)
{
    container->pid = 0;
    container->status = status;
    if (!kill_at && first < container)  /* of those at the same time, the last that was started */
        first = container;
}

static void tell_first_end(void)
{
    char word[128];
    int status = first->status;
    const char *of = is_main(first) ? "" : first->name, *gap = *of ? " " : "";
    if (WIFSIGNALED(status)) {
        bool is_oom = WTERMSIG(status) == SIGKILL && was_out_of_memory();
        snprintf(word, sizeof word, "%s %d%s%s\n", is_oom ? "oom" : "signal", WTERMSIG(status), gap, of);
    } else {
        snprintf(word, sizeof word, "exit %d%s%s\n", WEXITSTATUS(status), gap, of);
    }
    tell_end(word);
    if (order.count > 1 && is_welcomed)
        say(ENDED, 0, word, strlen(word));
}

static struct container *last_running(void)
{
    for (size_t n = order.count; n-- > 0;)
        if (order.containers[n].pid)
            return &order.containers[n];
    return NULL;
}

bool is_ending(void)
{
    return first != NULL;
}

/* Ask one after the other to end; returns how long there is for that, -1: nobody has to. */
int64_t see_to_the_end(void)
{
    if (!first)
        return -1;
    if (!kill_at) {
        kill_at = now_ms() + order.stop_ms + 1;
        tell_first_end();
    }
    struct container *next = last_running();
    if (!next) {
        for (size_t n = 0; n < order.count; n++)
            for (int which = 0; which < 2; which++)
                drain(&pumps[n][which]);
        power_off();
    }
    if (next != asked)
        kill(next->pid, next->stop_signal);
    asked = next;
    int64_t left = kill_at - now_ms();
    if (left <= 0)
        kill_group("");
    return left > 0 ? left : 10;
}
