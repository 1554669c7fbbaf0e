/* The least a hub can do: a say goes to all members, their acknowledgements are counted, and the
 * sender gets one receipt. One process, epoll, a TCP connection for each member and sender.
 *
 *     floor_hub PORT
 */

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "floor.h"

enum { SESSIONS = 20000, BUFFER = 1 << 16 };

struct session {
    int fd, index; /* index: its place among the members, or -1 */
    char rest[256];
    size_t rest_size;
};

static struct session *members[SESSIONS], *sender;
static int member_count, waiting;
static uint32_t current;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static uint32_t get_u32(const char *at) {
    uint32_t value;
    return memcpy(&value, at, 4), ntohl(value);
}

static void put(struct session *session, const char *data, size_t size) {
    while (size) {
        ssize_t sent = send(session->fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno == EAGAIN) {
            struct pollfd full = {session->fd, POLLOUT, 0};
            poll(&full, 1, 1000);
        } else if (sent < 0) {
            return; /* it is gone; its socket says so */
        } else {
            data += sent, size -= sent;
        }
    }
}

static void answer(struct session *session, char kind, const char *id) {
    char frame[HEADER] = {0, 0, 0, HEADER - 4, kind};
    memcpy(frame + 5, id, 4);
    put(session, frame, HEADER);
}

static void join(struct session *session, char *frame) {
    if (get_u32(frame + 5)) {
        session->index = member_count;
        members[member_count++] = session;
    }
    answer(session, JOIN, frame + 5);
}

static void act(struct session *session, char *frame, size_t size) {
    switch (frame[4]) {
    case JOIN: join(session, frame); break;
    case SAY:
        sender = session;
        current = get_u32(frame + 5);
        waiting = member_count;
        /* fall through */
    case CAST:
        for (int i = 0; i < member_count; i++) put(members[i], frame, size);
        break;
    case ACK:
        if (get_u32(frame + 5) == current && --waiting == 0) answer(sender, RECEIPT, frame + 5);
        break;
    }
}

static void end(struct session *session) {
    if (session->index >= 0) {
        members[session->index] = members[--member_count];
        members[session->index]->index = session->index;
    }
    close(session->fd);
    free(session);
}

static void read_session(struct session *session) {
    static char data[BUFFER];
    size_t size = session->rest_size, at = 0;
    memcpy(data, session->rest, size);
    ssize_t got = read(session->fd, data + size, BUFFER - size);
    if (got <= 0) {
        end(session);
        return;
    }
    size += got;
    while (size - at >= HEADER && size - at >= 4 + get_u32(data + at)) {
        size_t whole = 4 + get_u32(data + at);
        act(session, data + at, whole);
        at += whole;
    }
    session->rest_size = size - at;
    memcpy(session->rest, data + at, session->rest_size);
}

static void watch(int poller, int fd, struct session *session) {
    struct epoll_event event = {EPOLLIN, {.ptr = session}};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event)) fail("epoll");
}

static void take_in(int poller, int listener) {
    int on = 1, fd = accept(listener, NULL, NULL);
    if (fd < 0) fail("accept");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct session *session = calloc(1, sizeof *session);
    session->fd = fd;
    session->index = -1;
    watch(poller, fd, session);
}

int main(int argc, char **argv) {
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[argc - 1]))};
    struct rlimit files = {SESSIONS, SESSIONS};
    int on = 1, poller = epoll_create1(0), listener = socket(AF_INET, SOCK_STREAM, 0);
    setrlimit(RLIMIT_NOFILE, &files);
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&here, sizeof here)) fail("bind");
    if (listen(listener, 4096)) fail("listen");
    watch(poller, listener, NULL);
    for (;;) {
        struct epoll_event events[1024];
        int count = epoll_wait(poller, events, 1024, -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr) read_session(events[i].data.ptr);
            else take_in(poller, listener);
        }
    }
}
