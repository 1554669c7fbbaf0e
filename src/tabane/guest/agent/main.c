/* The loop: the port to the host, the app's output, and the end. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"
#include "talks.h"

enum {
    RETRY_MS = 1000,                /* to look whether the host has the port open again */
    FLUSH_MS = 2000,
    LEAVING_POLL_MS = 10,
    LISTEN_FIRST_MS = 2,
    LISTEN_LAST_MS = 25,
};

struct pump {                       /* the app's output, to the host's log */
    int from, to;
    uint8_t data[MAX_PAYLOAD];
    size_t count;
};

static struct pump pumps[2];
static int port = -1, last_word = -1;
static int listener = -1;           /* where the port is a connection on vsock */
pid_t app;
static bool is_connected;           /* the host has the port open, as far as is known */
static uint8_t in[HEADER + MAX_PAYLOAD + 1];
static size_t in_count, silence;
static bool is_in_step;

int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000ll + now.tv_nsec / 1000000;
}

/* The end */

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
static void __attribute__((noreturn)) quietly_reset(void)
{
    int level = open("/proc/sys/kernel/printk", O_WRONLY);
    if (level >= 0 && write(level, "0 0 0 0", 7) < 0)
        dprintf(2, "the kernel goes on talking\n");
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}

/* Tell the host how it ended, as a line of text, and end the machine. */
static void __attribute__((noreturn)) power_off(const char *word)
{
    release_volumes();
    int64_t until = now_ms() + FLUSH_MS;
    if (last_word < 0)
        last_word = open_port("end");
    if (last_word < 0)
        dprintf(2, "%s", word);
    put_all(last_word, word, strlen(word), until);
    int written[] = {last_word, pumps[0].to, pumps[1].to};
    for (int n = 0; n < 3; n++)     /* writable again: the host has taken what was written */
        if (written[n] > 0)
            wait_writable(written[n], until);
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
    power_off(word);
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

static void __attribute__((noreturn)) end_with_app(int status)
{
    char word[64];
    for (int n = 0; n < 2; n++)
        drain(&pumps[n]);
    if (WIFSIGNALED(status)) {
        bool is_oom = WTERMSIG(status) == SIGKILL && was_out_of_memory();
        snprintf(word, sizeof word, "%s %d\n", is_oom ? "oom" : "signal", WTERMSIG(status));
    } else {
        snprintf(word, sizeof word, "exit %d\n", WEXITSTATUS(status));
    }
    power_off(word);
}

/* What is said and heard */

static void flush(void)
{
    long written = write(port, out, out_count);
    if (written > 0) {
        out_count -= written;
        memmove(out, out + written, out_count);
    }
}

static uint32_t number_at(const uint8_t *at)
{
    return at[0] | at[1] << 8 | at[2] << 16 | (uint32_t)at[3] << 24;
}

/* A silence means that a host begins anew, whatever the last one broke off in. */
static void take_byte(uint8_t byte)
{
    silence = byte ? 0 : silence + 1;
    if (silence >= SILENCE) {
        is_in_step = true;
        in_count = 0;
        return;
    }
    if (!is_in_step || (!in_count && !byte))
        return;
    in[in_count++] = byte;
    if (in_count < HEADER)
        return;
    size_t length = number_at(in + 5);
    if (length > MAX_PAYLOAD)
        is_in_step = false;
    if (!is_in_step || in_count < HEADER + length + 1)
        return;
    in_count = 0;
    if (byte == END_MARK)
        take_frame(in[0], number_at(in + 1), in + HEADER, length);
    else
        is_in_step = false;
}

static void lose_host(void);

static void hear(void)
{
    static uint8_t data[MAX_PAYLOAD];
    long got;
    while (out_count <= OUT_FULL && (got = read(port, data, sizeof data)) != 0) {
        if (got < 0 && (errno == EAGAIN || listener < 0))
            return;
        if (got < 0)
            break;
        for (long n = 0; n < got; n++)
            take_byte(data[n]);
    }
    if (listener >= 0 && out_count <= OUT_FULL)
        lose_host();
}

/* The host has closed the port: nobody waits for what was begun. */
static void lose_host(void)
{
    if (listener >= 0)
        close_stream(&port);
    is_connected = false;
    is_in_step = false;
    in_count = out_count = 0;
    for (int n = 0; n < MAX_TALKS; n++)
        if (talks[n].id)
            leave(&talks[n]);
}

/* The loop */

static void reap(void)
{
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        if (pid == app)
            end_with_app(status);
        for (int n = 0; n < MAX_TALKS; n++) {
            if (!talks[n].id || talks[n].pid != pid)
                continue;
            talks[n].pid = 0;
            talks[n].has_ended = true;
            talks[n].code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
        }
    }
}

static void pump_app(struct pump *pump)
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

static int64_t pause_of(const struct talk *talk)
{
    if (talk->kill_at)
        return LEAVING_POLL_MS;
    if (!talk->port)
        return RETRY_MS;
    int64_t pause = (now_ms() - talk->began) / 50;
    return pause < LISTEN_FIRST_MS ? LISTEN_FIRST_MS : pause > LISTEN_LAST_MS ? LISTEN_LAST_MS : pause;
}

static void add(struct pollfd *all, int *count, int file, short events)
{
    if (file >= 0 && events)
        all[(*count)++] = (struct pollfd){.fd = file, .events = events};
}

static void wait_for_something(int signals)
{
    struct pollfd all[9 + 3 * MAX_TALKS];
    int count = 0, ports = -1;
    int64_t pause = is_connected || listener >= 0 ? -1 : RETRY_MS;
    bool has_room = out_count <= OUT_FULL;
    add(all, &count, signals, POLLIN);
    add(all, &count, listener, POLLIN);
    if (is_connected) {
        ports = count;
        add(all, &count, port, (has_room ? POLLIN : 0) | (out_count ? POLLOUT : 0));
    }
    for (int n = 0; n < 2; n++) {
        add(all, &count, pumps[n].from, pumps[n].count ? 0 : POLLIN);
        add(all, &count, pumps[n].to, pumps[n].count ? POLLOUT : 0);
    }
    for (struct talk *talk = talks; talk < talks + MAX_TALKS; talk++) {
        if (!talk->id)
            continue;
        add(all, &count, talk->streams.in, talk->input_count ? POLLOUT : 0);
        add(all, &count, talk->streams.out, has_room && talk->windows[0] ? POLLIN : 0);
        add(all, &count, talk->streams.err, has_room && talk->windows[1] ? POLLIN : 0);
        if (talk->port || talk->kill_at)
            pause = pause < 0 || pause_of(talk) < pause ? pause_of(talk) : pause;
    }
    poll(all, count, pause);
    if (ports >= 0 && count > ports && all[ports].revents & POLLHUP)
        lose_host();
}

/* Whoever connected last is the host. */
static void accept_host(void)
{
    for (int next; (next = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
        lose_host();
        port = next;
        is_connected = true;
    }
}

static bool is_host_there(void)
{
    struct pollfd one = {.fd = port, .events = POLLIN};
    poll(&one, 1, 0);
    return !(one.revents & POLLHUP);
}

static void run(int signals)
{
    struct signalfd_siginfo told[16];
    for (;;) {
        wait_for_something(signals);
        while (read(signals, told, sizeof told) > 0)
            ;
        reap();
        if (listener >= 0)
            accept_host();
        else if (!is_connected)
            is_connected = is_host_there();
        if (is_connected)
            hear();
        for (int n = 0; n < 2; n++)
            pump_app(&pumps[n]);
        for (struct talk *talk = talks; talk < talks + MAX_TALKS; talk++)
            if (talk->id)
                look_after(talk);
        if (out_count && is_connected)
            flush();
    }
}

static int watch_signals(void)
{
    sigset_t wanted;
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGCHLD);
    sigaddset(&wanted, SIGIO);
    sigprocmask(SIG_BLOCK, &wanted, NULL);
    signal(SIGPIPE, SIG_IGN);
    return signalfd(-1, &wanted, SFD_NONBLOCK | SFD_CLOEXEC);
}

static void open_ports(void)
{
    last_word = open_port("end");
    pumps[0].to = open_port("out");
    pumps[1].to = open_port("err");
    port = open_port("agent");
    if (last_word < 0 || pumps[0].to < 0 || pumps[1].to < 0 || port < 0)
        fail("the machine lacks a port to the host");
    if (uses_vsock()) {
        listener = port;
        port = -1;
        return;
    }
    fcntl(port, F_SETOWN, getpid());
    fcntl(port, F_SETFL, fcntl(port, F_GETFL) | O_ASYNC);
}

/* Run on a host, it tells how fast the processor's counter goes, which an emulated machine has nothing
 * to measure by. */
static int64_t ticks_per_ms(void)
{
    struct timespec pause = {0, 20000000}, began, ended;
    clock_gettime(CLOCK_MONOTONIC, &began);
    uint64_t first = __builtin_ia32_rdtsc();
    nanosleep(&pause, NULL);
    uint64_t last = __builtin_ia32_rdtsc();
    clock_gettime(CLOCK_MONOTONIC, &ended);
    double ms = (ended.tv_sec - began.tv_sec) * 1e3 + (ended.tv_nsec - began.tv_nsec) / 1e6;
    return (last - first) / ms;
}

static bool is_trial(void)
{
    char line[4096];
    return read_file("/proc/cmdline", line, sizeof line) > 0 && strstr(line, "tabane.trial");
}

int main(void)
{
    struct streams streams;
    if (getpid() != 1) {
        printf("%lld\n", (long long)ticks_per_ms());
        return 0;
    }
    boot();
    if (is_trial()) {
        dprintf(1, "tabane: this machine runs\n");
        quietly_reset();
    }
    int signals = watch_signals();
    open_ports();
    prepare_app();
    app = start_app(&streams);
    pumps[0].from = streams.out;
    pumps[1].from = streams.err;
    run(signals);
}
