/* The loop: the port to the host, and what comes and goes. */
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

static int port = -1;
static int listener = -1;           /* where the port is a connection on vsock */
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

/* Zeros between frames, of which a host that begins anew sends many: as `take_byte`, eight at a time. */
static size_t take_zeros(const uint8_t *at, size_t length)
{
    static const uint8_t zeros[8];
    size_t taken = 0;
    while (!in_count && length - taken >= sizeof zeros && !memcmp(at + taken, zeros, sizeof zeros)) {
        taken += sizeof zeros;
        silence += sizeof zeros;
        is_in_step = is_in_step || silence >= SILENCE;
    }
    return taken;
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
        for (long n = 0; n < got; n++) {
            n += take_zeros(data + n, got - n);
            if (n < got)
                take_byte(data[n]);
        }
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
    leave_all();
}

/* The loop */

static void reap(void)
{
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        for (size_t n = 0; n < order.count; n++)
            if (order.containers[n].pid == pid)
                take_end(&order.containers[n], status);
        for (int n = 0; n < MAX_TALKS; n++) {
            if (!talks[n].id || talks[n].pid != pid)
                continue;
            talks[n].pid = 0;
            talks[n].has_ended = true;
            talks[n].code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
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

static void add_links(struct pollfd *all, int *count, bool has_room)
{
    bool takes_more = is_welcomed && has_room && has_free_link();
    for (int n = 0; n < MAX_SERVICES; n++)
        add(all, count, services[n], takes_more ? POLLIN : 0);
    for (struct link *link = links; link < links + MAX_LINKS; link++) {
        bool says_more = has_room && link->window && !link->has_said_all;
        if (link->id)
            add(all, count, link->sock, (says_more ? POLLIN : 0) | (link->input_count ? POLLOUT : 0));
    }
}

static void wait_for_something(int signals, int64_t pause)
{
    static struct pollfd all[3 + 4 * MAX_CONTAINERS + 3 * MAX_TALKS + MAX_SERVICES + MAX_LINKS];
    int count = 0, ports = -1;
    bool has_room = out_count <= OUT_FULL;
    if (!is_connected && listener < 0 && (pause < 0 || pause > RETRY_MS))
        pause = RETRY_MS;
    add(all, &count, signals, POLLIN);
    add(all, &count, listener, POLLIN);
    if (is_connected) {
        ports = count;
        add(all, &count, port, (has_room ? POLLIN : 0) | (out_count ? POLLOUT : 0));
    }
    for (size_t n = 0; n < order.count; n++)
        for (struct pump *pump = pumps[n]; pump < pumps[n] + 2; pump++) {
            add(all, &count, pump->from, pump->count ? 0 : POLLIN);
            add(all, &count, pump->to, pump->count ? POLLOUT : 0);
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
    add_links(all, &count, has_room);
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
    for (int64_t pause = -1;; pause = see_to_the_end()) {
        if (out_count && is_connected)
            flush();
        wait_for_something(signals, pause);
        while (read(signals, told, sizeof told) > 0)
            ;
        reap();
        if (listener >= 0)
            accept_host();
        else if (!is_connected)
            is_connected = is_host_there();
        if (is_connected)
            hear();
        for (size_t n = 0; n < order.count; n++)
            for (int which = 0; which < 2; which++)
                pump_out(&pumps[n][which]);
        for (struct talk *talk = talks; talk < talks + MAX_TALKS; talk++)
            if (talk->id)
                look_after(talk);
        if (is_welcomed)
            accept_links();
        for (struct link *link = links; link < links + MAX_LINKS; link++)
            if (link->id)
                look_after_link(link);
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

static void open_host(void)
{
    port = open_port("agent");
    if (port < 0)
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
    read_order();
    open_outputs();
    open_host();
    configure();
    make_containers();
    for (size_t n = 0; n < order.count; n++) {
        start_program(&order.containers[n], &streams);
        pumps[n][0].from = streams.out;
        pumps[n][1].from = streams.err;
    }
    run(signals);
}
