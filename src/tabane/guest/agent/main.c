/* The loop: the port to the host, the app's output, conversations, and the end. */
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

enum {
    OUT_BYTES = 4 * SILENCE,
    OUT_FULL = 2 * SILENCE,         /* streams wait then; answers still have room */
    RETRY_MS = 1000,                /* to look whether the host has the port open again */
    FLUSH_MS = 2000,
    LEAVING_POLL_MS = 10,
    LISTEN_FIRST_MS = 2,
    LISTEN_LAST_MS = 25,
};

struct talk {
    uint32_t id;                    /* 0: free */
    pid_t pid;                      /* 0: it waits for a port, or has ended */
    uint16_t port;
    int64_t began, kill_at;         /* kill_at: nobody wants it any more */
    int code;
    bool has_ended, ends_input;
    struct streams streams;
    uint32_t windows[2];
    uint8_t *input;
    size_t input_count;
    char group[32];
};

struct pump {                       /* the app's output, to the host's log */
    int from, to;
    uint8_t data[MAX_PAYLOAD];
    size_t count;
};

static struct talk talks[MAX_TALKS];
static struct pump pumps[2];
static int port = -1, last_word = -1;
static int listener = -1;           /* where the port is a connection on vsock */
static pid_t app;
static bool is_connected;           /* the host has the port open, as far as is known */
static uint8_t out[OUT_BYTES], in[HEADER + MAX_PAYLOAD + 1];
static size_t out_count, in_count, silence;
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

/* What is said to the host */

static void say(uint8_t kind, uint32_t channel, const void *payload, size_t length)
{
    if (out_count + HEADER + length + 1 > sizeof out)
        return;                     /* the host asks more at once than it may: docs/guest-agent.md */
    uint8_t *at = out + out_count;
    at[0] = kind;
    for (int n = 0; n < 4; n++) {
        at[1 + n] = channel >> (8 * n);
        at[5 + n] = length >> (8 * n);
    }
    memcpy(at + HEADER, payload, length);
    at[HEADER + length] = END_MARK;
    out_count += HEADER + length + 1;
}

static void say_number(uint8_t kind, uint32_t channel, uint32_t value)
{
    uint8_t bytes[] = {value, value >> 8, value >> 16, value >> 24};
    say(kind, channel, bytes, sizeof bytes);
}

/* `code`: USAGE, who asked is wrong; BUSY, later it may do; FAULT. */
static void refuse(uint32_t channel, char code, const char *why)
{
    uint8_t text[600];
    int length = snprintf((char *)text, sizeof text, "%c%s", code, why);
    say(REFUSED, channel, text, length < (int)sizeof text ? length : (int)sizeof text - 1);
}

static void flush(void)
{
    long written = write(port, out, out_count);
    if (written > 0) {
        out_count -= written;
        memmove(out, out + written, out_count);
    }
}

/* Conversations */

static struct talk *find_talk(uint32_t id)
{
    for (int n = 0; n < MAX_TALKS; n++)
        if (talks[n].id == id)
            return &talks[n];
    return NULL;
}

static void close_stream(int *stream)
{
    if (*stream >= 0)
        close(*stream);
    *stream = -1;
}

static void close_streams(struct talk *talk)
{
    close_stream(&talk->streams.in);
    close_stream(&talk->streams.out);
    close_stream(&talk->streams.err);
}

static void forget(struct talk *talk)
{
    close_streams(talk);
    free(talk->input);
    if (talk->group[0])
        remove_group(talk->group);
    *talk = (struct talk){0};
}

static void end_talk(struct talk *talk)
{
    say_number(ENDED, talk->id, talk->code);
    forget(talk);
}

/* Hang up, and kill what is there after a while. */
static void leave(struct talk *talk)
{
    if (talk->port) {
        forget(talk);
        return;
    }
    close_streams(talk);
    if (talk->kill_at)
        return;
    if (talk->group[0]) {
        signal_group(talk->group, SIGHUP);
        signal_group(talk->group, SIGCONT);
    } else if (talk->pid) {
        kill(talk->pid, SIGKILL);
    }
    talk->kill_at = now_ms() + HANGUP_MS;
}

static void look_after_leaving(struct talk *talk)
{
    bool is_over = talk->has_ended && (!talk->group[0] || is_empty_group(talk->group));
    if (is_over)
        end_talk(talk);
    else if (now_ms() >= talk->kill_at && talk->group[0])
        kill_group(talk->group);
}

static void start_talk(uint8_t kind, uint32_t id, const uint8_t *payload, size_t length)
{
    static struct order wanted;
    static uint32_t started;
    char problem[512] = "the guest cannot fork";
    struct talk *talk = find_talk(0);
    struct program *program = &wanted.app;
    wanted = (struct order){0};
    if (!talk || find_talk(id) || !id)
        return refuse(id, BUSY, "the guest has too many conversations: end some");
    if (!parse_fields(payload, length, &wanted) || (kind == EXEC && !program->args.count))
        return refuse(id, FAULT, "the guest does not understand the order");
    *talk = (struct talk){.id = id, .windows = {WINDOW, WINDOW}, .streams = {-1, -1, -1}};
    if (kind != LIST)
        snprintf(talk->group, sizeof talk->group, "talk%u", ++started);
    if (kind == EXEC) {
        talk->pid = start_command(program, talk->group, &talk->streams, problem, sizeof problem);
    } else {
        program->has_input = kind == PUT;
        talk->pid = start_work(program, kind == LIST ? NULL : talk->group,
                               kind == PUT ? unpack : kind == GET ? pack : list_processes, &talk->streams);
    }
    for (struct words *words = &program->args; words <= &program->env; words++)
        for (size_t n = 0; n < words->count; n++)
            free(words->list[n]);
    free(program->cwd);
    free(program->path);
    if (talk->pid > 0)
        return say(BEGUN, id, "", 0);
    forget(talk);
    refuse(id, !strncmp(problem, "workdir", 7) ? USAGE : BUSY, problem);
}

static void pump_input(struct talk *talk)
{
    if (talk->input_count && talk->streams.in >= 0) {
        long written = write(talk->streams.in, talk->input, talk->input_count);
        if (written < 0 && errno == EAGAIN)
            return;
        if (written < 0) {
            close_stream(&talk->streams.in);
        } else {
            talk->input_count -= written;
            memmove(talk->input, talk->input + written, talk->input_count);
            say_number(TAKEN, talk->id, written);
        }
    }
    if (talk->streams.in < 0 && talk->input_count) {
        say_number(TAKEN, talk->id, talk->input_count);
        talk->input_count = 0;
    }
    if (talk->ends_input && !talk->input_count)
        close_stream(&talk->streams.in);
}

static void take_input(struct talk *talk, const uint8_t *payload, size_t length)
{
    if (!talk->input)
        talk->input = malloc(WINDOW);
    if (!talk->input || talk->input_count + length > WINDOW)
        return leave(talk);
    memcpy(talk->input + talk->input_count, payload, length);
    talk->input_count += length;
    pump_input(talk);
}

/* Read what there is and may be sent; true: there is no more just now. */
static bool pump_output(struct talk *talk, int which)
{
    uint8_t data[MAX_PAYLOAD];
    int *stream = which ? &talk->streams.err : &talk->streams.out;
    while (*stream >= 0) {
        if (out_count > OUT_FULL || !talk->windows[which])
            return false;
        size_t most = talk->windows[which] < sizeof data ? talk->windows[which] : sizeof data;
        long got = read(*stream, data, most);
        if (got < 0 && errno == EAGAIN)
            return true;
        if (got <= 0) {
            close_stream(stream);
            return true;
        }
        talk->windows[which] -= got;
        say(which ? COMPLAINT : OUTPUT, talk->id, data, got);
    }
    return true;
}

static void look_after(struct talk *talk)
{
    if (talk->port && listens(talk->port)) {
        say(ANSWER, talk->id, "", 0);
        forget(talk);
    } else if (talk->kill_at) {
        look_after_leaving(talk);
    } else if (!talk->port) {
        pump_input(talk);
        bool has_ended = talk->has_ended;
        bool is_dry = pump_output(talk, 0);
        is_dry = pump_output(talk, 1) && is_dry;
        if (has_ended && is_dry)
            end_talk(talk);
    }
}

/* What the host says */

static void welcome(const uint8_t *nonce, size_t length)
{
    uint8_t answer[2 + NONCE] = {VERSION & 0xff, VERSION >> 8};
    if (length < 2 + NONCE)
        return;
    for (int n = 0; n < MAX_TALKS; n++)
        if (talks[n].id)
            leave(&talks[n]);
    memcpy(answer + 2, nonce + 2, NONCE);
    memset(out, 0, SILENCE);
    out_count = SILENCE;
    say(WELCOME, 0, answer, sizeof answer);
}

static void listen_for(uint32_t id, uint16_t wanted)
{
    struct talk *talk = find_talk(0);
    if (!talk || !id)
        return refuse(id, BUSY, "the guest has too many conversations: end some");
    *talk = (struct talk){.id = id, .port = wanted, .began = now_ms(), .streams = {-1, -1, -1}};
}

static void set_limits(uint32_t id, const uint8_t *payload, size_t length)
{
    static struct order limits;
    limits = (struct order){0};
    if (!parse_fields(payload, length, &limits) || !limit(&limits))
        return refuse(id, FAULT, "the guest's kernel refuses these limits");
    say(ANSWER, id, "", 0);
}

static void take_call(uint8_t kind, uint32_t id, const uint8_t *payload, size_t length)
{
    uint8_t figures[256];
    uint64_t ns = 0;
    if (kind == STATS)
        return say(ANSWER, id, figures, tell_figures(figures));
    if (kind == LIMIT)
        return set_limits(id, payload, length);
    if (kind == LISTEN && length == 2)
        return listen_for(id, payload[0] | payload[1] << 8);
    if (kind == CLOCK && length == 8) {
        memcpy(&ns, payload, sizeof ns);
        set_clock(ns);
        return say(ANSWER, id, "", 0);
    }
    if (kind == RESEED) {
        add_entropy(payload, length);
        return say(ANSWER, id, "", 0);
    }
    refuse(id, FAULT, "the guest does not know what that means");
}

static void take_for_talk(uint8_t kind, struct talk *talk, const uint8_t *payload, size_t length)
{
    uint32_t value = 0;
    memcpy(&value, payload, length < 4 ? length : 4);
    if (kind == CLOSE)
        leave(talk);
    else if (talk->kill_at || talk->port)
        return;
    else if (kind == INPUT)
        take_input(talk, payload, length);
    else if (kind == END_INPUT)
        talk->ends_input = true;
    else if (kind == RESIZE)
        set_size(talk->streams.out, value, value >> 16);
    else if (kind == SIGNAL && talk->pid)
        kill(talk->pid, value);
    else if (kind == GRANT && length == 5)
        talk->windows[payload[4] & 1] += value;
}

static void take_frame(uint8_t kind, uint32_t id, const uint8_t *payload, size_t length)
{
    struct talk *talk = id ? find_talk(id) : NULL;
    uint32_t number = 0;
    switch (kind) {
    case HELLO:
        return welcome(payload, length);
    case EXEC: case PUT: case GET: case LIST:
        return start_talk(kind, id, payload, length);
    case INPUT: case END_INPUT: case RESIZE: case CLOSE: case GRANT:
        if (talk)
            take_for_talk(kind, talk, payload, length);
        return;
    case SIGNAL:
        memcpy(&number, payload, length < 4 ? length : 4);
        if (talk)
            take_for_talk(kind, talk, payload, length);
        else if (!id)
            kill(app, number);
        return;
    default:
        return take_call(kind, id, payload, length);
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
