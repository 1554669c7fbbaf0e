/* Conversations: what the host asks for, what becomes of it, and what is said about it. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "talks.h"

struct talk talks[MAX_TALKS];
uint8_t out[OUT_BYTES];
size_t out_count;
bool is_welcomed;

/* What is said to the host */

void say(uint8_t kind, uint32_t channel, const void *payload, size_t length)
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

void say_number(uint8_t kind, uint32_t channel, uint32_t value)
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

/* Conversations */

static struct talk *find_talk(uint32_t id)
{
    for (int n = 0; n < MAX_TALKS; n++)
        if (talks[n].id == id)
            return &talks[n];
    return NULL;
}

void close_stream(int *stream)
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
    if (!(talk->id & ORPHAN))
        say_number(ENDED, talk->id, talk->code);
    forget(talk);
}

/* Hang up, and kill what is there after a while. */
void leave(struct talk *talk)
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

/* Whoever began them has gone: the next host hears nothing of them, and has numbers of its own. */
void leave_all(void)
{
    is_welcomed = false;
    for (struct talk *talk = talks; talk < talks + MAX_TALKS; talk++) {
        if (talk->id)
            leave(talk);
        if (talk->id)
            talk->id |= ORPHAN;
    }
    drop_links();
}

static void look_after_leaving(struct talk *talk)
{
    bool is_over = talk->has_ended && (!talk->group[0] || is_empty_group(talk->group));
    if (is_over)
        end_talk(talk);
    else if (now_ms() >= talk->kill_at && talk->group[0])
        kill_group(talk->group);
}

static void begin_talk(struct talk *talk, uint8_t kind, struct program *program)
{
    static uint32_t started;
    char problem[512] = "the guest cannot fork";
    uint32_t id = talk->id;
    if (kind != LIST)
        snprintf(talk->group, sizeof talk->group, "c%zu/talk%u", number_of(program->container), ++started);
    if (kind == EXEC) {
        talk->pid = start_command(program, talk->group, &talk->streams, problem, sizeof problem);
    } else {
        program->has_input = kind == PUT;
        talk->pid = start_work(program, kind == LIST ? NULL : talk->group,
                               kind == PUT ? unpack : kind == GET ? pack : list_processes, &talk->streams);
    }
    if (talk->pid > 0)
        return say(BEGUN, id, "", 0);
    forget(talk);
    refuse(id, !strncmp(problem, "workdir", 7) ? USAGE : BUSY, problem);
}

static void start_talk(uint8_t kind, uint32_t id, const uint8_t *payload, size_t length)
{
    static struct order wanted;
    struct talk *talk = find_talk(0);
    struct program *program = &wanted.asked;
    wanted = (struct order){0};
    if (!talk || find_talk(id) || !id)
        return refuse(id, BUSY, "the guest has too many conversations: end some");
    if (!parse_fields(payload, length, &wanted) || wanted.count || (kind == EXEC && !program->args.count))
        refuse(id, FAULT, "the guest does not understand the order");
    else if (!(program->container = find_container(program->where)))
        refuse(id, USAGE, "the instance has no such container");
    else {
        *talk = (struct talk){.id = id, .windows = {WINDOW, WINDOW}, .streams = {-1, -1, -1}};
        begin_talk(talk, kind, program);
    }
    free_program(program);
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

void look_after(struct talk *talk)
{
    if (talk->port && (listened(talk->port) || listens(talk->port))) {
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
    leave_all();
    is_welcomed = true;
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
    order.memory_bytes = limits.memory_bytes ? limits.memory_bytes : order.memory_bytes;
    order.pids = limits.pids ? limits.pids : order.pids;
    say(ANSWER, id, "", 0);
}

static void hold(uint32_t id)
{
    if (is_ending() || !hold_programs())
        return refuse(id, BUSY, is_ending() ? "its program has ended" : "one of its programs does not stop");
    say(ANSWER, id, "", 0);
}

/* Without a payload: as before. */
static void release(uint32_t id, const uint8_t *payload, size_t length)
{
    static struct order other;
    other = (struct order){0};
    if (length && (!parse_fields(payload, length, &other) || other.count || !other.hostname))
        return refuse(id, FAULT, "the guest does not understand who it is");
    release_programs(length ? &other : NULL);
    say(ANSWER, id, "", 0);
}

static void take_call(uint8_t kind, uint32_t id, const uint8_t *payload, size_t length)
{
    uint8_t figures[256];
    uint64_t ns = 0;
    if (kind == STATS)
        return say(ANSWER, id, figures, tell_figures(figures));
    if (kind == HOLD)
        return hold(id);
    if (kind == RELEASE)
        return release(id, payload, length);
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

/* To the main program, which all others follow; a KILL is for all of them at once. */
static void signal_program(uint32_t number)
{
    const struct container *container = &order.containers[order.count - 1];
    if (number == SIGKILL)
        kill_group("");
    else if (container->pid)
        kill(container->pid, number);
}

void take_frame(uint8_t kind, uint32_t id, const uint8_t *payload, size_t length)
{
    struct talk *talk = id ? find_talk(id) : NULL;
    uint32_t number = 0;
    if (id >> 31)
        return take_for_link(kind, id, payload, length);
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
            signal_program(number);
        return;
    default:
        return take_call(kind, id, payload, length);
    }
}
