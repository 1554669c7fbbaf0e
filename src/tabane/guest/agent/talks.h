/* Conversations with the host, and what is said to it (talks.c), as the loop (main.c) needs them. */
#ifndef TALKS_H
#define TALKS_H

#include "agent.h"

enum {
    OUT_BYTES = 4 * SILENCE,
    OUT_FULL = 2 * SILENCE,         /* streams wait then; answers still have room */
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

extern struct talk talks[MAX_TALKS];
extern uint8_t out[OUT_BYTES];      /* what is said and not sent yet */
extern size_t out_count;
extern pid_t app;                   /* its program */

void take_frame(uint8_t kind, uint32_t id, const uint8_t *payload, size_t length);
void look_after(struct talk *talk);
void leave(struct talk *talk);
void close_stream(int *stream);

#endif
