/* N members and a sender in one process: what the programs of all protocols share.
 *
 *     PROGRAM PORT-OR-PATH N [QOS]
 *
 * Each session has a connection of its own. Once all are open, "ready" is printed. Then each line
 * on stdin is an order, and the answer to it one line of nanoseconds:
 *
 *     say COUNT MILLISECONDS          of each say, until all members have acknowledged
 *     cast BURST COUNT MILLISECONDS   of each burst of messages, until all members have all of them
 *
 * An order ends after COUNT, or when the time is up. At the end of stdin the program ends.
 * A protocol brings `greet`, `take`, `say` and `cast`.
 */

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { MESSAGE = 64, WARM_UP = 2, PATIENCE_MS = 20000, BUFFER = 1 << 18 };

struct session {
    int fd;
    int number; /* 0 is the sender, members count from 1 */
    int stage;  /* of its opening; what that means is the protocol's own */
    uint32_t room;
    char *rest; /* the beginning of a message that has not come whole */
    size_t rest_size;
};

static int member_count, qos;
static int ready_count, acknowledged, delivered;
static uint32_t current; /* the id of the say under way */
static char message[MESSAGE + 1] = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/* After connecting: send what opens a session. */
static void greet(struct session *session);
/* Act on one message of the server and return its size; 0 if it has not come whole. */
static size_t take(struct session *session, char *data, size_t size);
static void say(struct session *sender, uint32_t id);
static void cast(struct session *sender);

static void die(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vfprintf(stderr, format, values);
    va_end(values);
    fputc('\n', stderr);
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void put_u16(char *at, uint16_t value) { value = htons(value), memcpy(at, &value, 2); }
static void put_u32(char *at, uint32_t value) { value = htonl(value), memcpy(at, &value, 4); }
static uint16_t get_u16(const char *at) { uint16_t value; return memcpy(&value, at, 2), ntohs(value); }
static uint32_t get_u32(const char *at) { uint32_t value; return memcpy(&value, at, 4), ntohl(value); }

/* Send all of it now; a full socket is waited for. */
static void put(struct session *session, const void *data, size_t size) {
    const char *at = data;
    while (size) {
        ssize_t sent = write(session->fd, at, size);
        if (sent > 0) {
            at += sent, size -= sent;
        } else if (errno == EAGAIN) {
            struct pollfd full = {session->fd, POLLOUT, 0};
            if (poll(&full, 1, PATIENCE_MS) == 0) die("the server does not read");
        } else {
            die("write: %s", strerror(errno));
        }
    }
}

static void read_session(struct session *session) {
    static char data[BUFFER];
    size_t size = session->rest_size, at = 0, taken;
    memcpy(data, session->rest, size);
    ssize_t got = read(session->fd, data + size, BUFFER - size);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) die("session %d ended: %s", session->number, got ? strerror(errno) : "closed");
    size += got;
    while (at < size && (taken = take(session, data + at, size - at))) at += taken;
    session->rest_size = size - at;
    if (session->rest_size) {
        session->rest = realloc(session->rest, session->rest_size);
        memcpy(session->rest, data + at, session->rest_size);
    }
}

static struct session *sessions;
static int poller;

/* Act on what has come. Returns whether there is an order on stdin. */
static int turn(void) {
    struct epoll_event events[1024];
    int ordered = 0, count = epoll_wait(poller, events, 1024, PATIENCE_MS);
    for (int i = 0; i < count; i++) {
        if (events[i].data.ptr) read_session(events[i].data.ptr);
        else ordered = 1;
    }
    return ordered;
}

static void watch(int fd, struct session *session) {
    struct epoll_event event = {EPOLLIN, {.ptr = session}};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event)) die("epoll: %s", strerror(errno));
}

static int dial(const char *where) {
    struct sockaddr_un path = {.sun_family = AF_UNIX};
    struct sockaddr_in port = {.sin_family = AF_INET, .sin_port = htons(atoi(where))};
    int is_unix = where[0] == '/', on = 1;
    port.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    strncpy(path.sun_path, where, sizeof path.sun_path - 1);
    int fd = socket(is_unix ? AF_UNIX : AF_INET, SOCK_STREAM, 0);
    struct sockaddr *address = is_unix ? (struct sockaddr *)&path : (struct sockaddr *)&port;
    if (connect(fd, address, is_unix ? sizeof path : sizeof port)) die("%s: %s", where, strerror(errno));
    if (!is_unix) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    return fd;
}

static void open_sessions(const char *where) {
    sessions = calloc(member_count + 1, sizeof *sessions);
    for (int number = member_count; number >= 0; number--) { /* the sender is the last */
        struct session *session = &sessions[number];
        session->number = number;
        session->fd = dial(where);
        watch(session->fd, session);
        greet(session);
        /* No more than a few at a time, so that no server's backlog overflows. */
        while (ready_count + 64 < member_count - number) turn();
        if (number == 1) while (ready_count < member_count) turn();
    }
    while (ready_count <= member_count) turn();
}

static int64_t say_once(uint32_t id) {
    int64_t began = now_ns();
    acknowledged = 0;
    current = id;
    say(sessions, id);
    while (acknowledged < member_count) {
        turn();
        if (now_ns() - began > PATIENCE_MS * 1000000LL)
            die("%d of %d acknowledged in time", acknowledged, member_count);
    }
    return now_ns() - began;
}

static int64_t cast_burst(int burst) {
    int64_t began = now_ns();
    delivered = 0;
    for (int i = 0; i < burst; i++) cast(sessions);
    while (delivered < burst * member_count) {
        turn();
        if (now_ns() - began > PATIENCE_MS * 1000000LL)
            die("%d of %d messages delivered in time", delivered, burst * member_count);
    }
    return now_ns() - began;
}

static void obey(const char *order) {
    static uint32_t id;
    int count, milliseconds, burst = 0;
    if (sscanf(order, "say %d %d", &count, &milliseconds) != 2 &&
        sscanf(order, "cast %d %d %d", &burst, &count, &milliseconds) != 3)
        die("not an order: %s", order);
    int64_t end = 0;
    for (int done = -WARM_UP; done < count && (done <= 0 || now_ns() < end); done++) {
        if (done == 0) end = now_ns() + milliseconds * 1000000LL;
        int64_t took = burst ? cast_burst(burst) : say_once(++id);
        if (done >= 0) printf("%lld ", (long long)took);
    }
    printf("\n");
    fflush(stdout);
}

int main(int argc, char **argv) {
    if (argc < 3) die("usage: %s PORT-OR-PATH MEMBERS [QOS]", argv[0]);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    member_count = atoi(argv[2]);
    qos = argc > 3 ? atoi(argv[3]) : 0;
    poller = epoll_create1(0);
    open_sessions(argv[1]);
    watch(0, NULL);
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        char order[64];
        if (!turn()) continue;
        ssize_t size = read(0, order, sizeof order - 1);
        if (size <= 0) return 0;
        order[size] = 0;
        obey(order);
    }
}
