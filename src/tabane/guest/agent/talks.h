/* Conversations with the host, and what is said to it (talks.c), as the loop (main.c) needs them. */
#ifndef TALKS_H
#define TALKS_H

#include "agent.h"

enum {
    OUT_BYTES = 4 * SILENCE,
    OUT_FULL = 2 * SILENCE,         /* streams wait then; answers still have room */
    MAX_LINKS = 96,
    LINK_WINDOW = 32768,
    MAX_SERVICES = 8,
    ORPHAN = 1 << 30,               /* in the number of a talk that nobody wants: no host comes so far */
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

struct link {
    uint32_t id;                    /* 0: free */
    int sock;
    uint32_t window;
    bool has_said_all, ends_input, is_shut;
    uint8_t *input;
    size_t input_count;
};

extern struct talk talks[MAX_TALKS];
extern struct link links[MAX_LINKS];
extern int services[MAX_SERVICES];  /* where programs connect; -1: none */
extern uint8_t out[OUT_BYTES];      /* what is said and not sent yet */
extern size_t out_count;
extern bool is_welcomed;            /* a host listens */

void say(uint8_t kind, uint32_t channel, const void *payload, size_t length);
void say_number(uint8_t kind, uint32_t channel, uint32_t value);
void take_frame(uint8_t kind, uint32_t id, const uint8_t *payload, size_t length);
void look_after(struct talk *talk);
void leave(struct talk *talk);
void close_stream(int *stream);
void leave_all(void);

/* links.c */
#define SERVICES_PLACE "/pod/services"
#define SERVICES_SHOWN "/run/tabane"

void open_services(void);
void accept_links(void);
bool has_free_link(void);
void look_after_link(struct link *link);
void take_for_link(uint8_t kind, uint32_t id, const uint8_t *payload, size_t length);
void drop_links(void);

/* ends.c */
struct pump {                       /* a program's output, to the host's log */
    int from, to;
    uint8_t data[MAX_PAYLOAD];
    size_t count;
};

extern struct pump pumps[MAX_CONTAINERS][2];

void fail(const char *form, ...) __attribute__((noreturn, format(printf, 1, 2)));
void open_outputs(void);
void pump_out(struct pump *pump);
void take_end(struct container *container, int status);
int64_t see_to_the_end(void);
bool is_ending(void);
void __attribute__((noreturn)) quietly_reset(void);

#endif
