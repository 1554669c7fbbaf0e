/* Requests at a constant rate: what they wait when they are not asked to wait their turn.
 *
 *     steady PORT CONNECTIONS REQUESTS-PER-SECOND MILLISECONDS
 *
 * Request k is due at k / rate, on connection k modulo CONNECTIONS, whatever became of the ones before;
 * its time counts from when it was due, not from when it could be sent. (A client that waits for an
 * answer before it asks again asks less of a server that is stuck, and does not see how many would have
 * waited: coordinated omission.) Of one connection, requests are sent one after the other, as HTTP/1.1
 * clients do. What was due in the first tenth of the time does not count.
 *
 * Says one line: how many answers counted, and of their nanoseconds the median, the 90th, 99th and
 * 99.9th percentile and the maximum.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ANSWER_SIZE = 1 << 14, EVENTS = 256 };
static const int64_t SECOND = 1000000000, PATIENCE = 10 * SECOND;

struct connection {
    int fd;
    int64_t begun;   /* how many requests it has sent, */
    int64_t due;     /* and how many were due */
    int is_waiting;  /* for an answer */
    size_t size;
    char answer[ANSWER_SIZE];
};

static struct connection *connections;
static int64_t count, rate, first_due, counts_from;
static int64_t *taken, taken_count, waiting;
static char request[128];

static void die(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vfprintf(stderr, format, values);
    va_end(values);
    fputc('\n', stderr);
    exit(1);
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * SECOND + time.tv_nsec;
}

static int64_t due_at(int64_t number) {
    return first_due + (int64_t)((double)number * SECOND / rate);
}

static void open_connection(struct connection *connection, int port, int poller) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct epoll_event wanted = {.events = EPOLLIN, .data.ptr = connection};
    int yes = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connection->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(connection->fd, (struct sockaddr *)&address, sizeof address))
        die("connect: %s", strerror(errno));
    setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    fcntl(connection->fd, F_SETFL, O_NONBLOCK);
    if (epoll_ctl(poller, EPOLL_CTL_ADD, connection->fd, &wanted))
        die("epoll_ctl: %s", strerror(errno));
}

static void send_next(struct connection *connection) {
    ssize_t size = strlen(request);
    if (connection->is_waiting || connection->begun == connection->due) return;
    if (write(connection->fd, request, size) != size) die("write: %s", strerror(errno));
    connection->is_waiting = 1;
    connection->begun++;
}

/* The size of the answer in the buffer, or 0 if it is not whole. */
static size_t whole_answer(struct connection *connection) {
    char *data = connection->answer, *end, *length;
    data[connection->size] = 0;
    if (!(end = strstr(data, "\r\n\r\n"))) return 0;
    if (strncmp(data, "HTTP/1.1 200", 12)) die("the answer is: %.200s", data);
    length = strcasestr(data, "\r\ncontent-length:");
    if (!length || length > end) die("the answer has no length: %.200s", data);
    size_t size = end + 4 - data + strtoul(length + 17, NULL, 10);
    if (connection->size > size) die("there is something behind an answer");
    return connection->size == size ? size : 0;
}

static void take(struct connection *connection) {
    size_t room = ANSWER_SIZE - 1 - connection->size;
    ssize_t size = read(connection->fd, connection->answer + connection->size, room);
    if (size < 0 && errno == EAGAIN) return;
    if (size <= 0) die("the connection ended: %s", size ? strerror(errno) : "closed");
    connection->size += size;
    if (!whole_answer(connection)) return;
    int64_t due = due_at((connection->begun - 1) * count + (connection - connections));
    if (due >= counts_from) taken[taken_count++] = now() - due;
    connection->size = 0;
    connection->is_waiting = 0;
    waiting--;
    send_next(connection);
}

static void wait_until(int poller, int64_t moment) {
    struct epoll_event events[EVENTS];
    int64_t left = moment - now();
    if (left < 0) left = 0;
    struct timespec time = {left / SECOND, left % SECOND};
    int ready = epoll_pwait2(poller, events, EVENTS, &time, NULL);
    for (int index = 0; index < ready; index++) take(events[index].data.ptr);
}

static int compare(const void *left, const void *right) {
    int64_t one = *(const int64_t *)left, other = *(const int64_t *)right;
    return (one > other) - (one < other);
}

int main(int argument_count, char **arguments) {
    if (argument_count != 5) die("steady PORT CONNECTIONS REQUESTS-PER-SECOND MILLISECONDS");
    int port = atoi(arguments[1]), poller = epoll_create1(0);
    count = atoi(arguments[2]);
    rate = atoi(arguments[3]);
    int64_t total = rate * atoll(arguments[4]) / 1000, next = 0;
    if (count < 1 || total < 100) die("that is not enough to measure");
    connections = calloc(count, sizeof *connections);
    taken = calloc(total, sizeof *taken);
    snprintf(request, sizeof request, "GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n", port);
    prctl(PR_SET_TIMERSLACK, 1);
    for (int64_t index = 0; index < count; index++)
        open_connection(&connections[index], port, poller);
    first_due = now() + SECOND / 100;
    counts_from = due_at(total / 10);
    while (next < total || waiting) {
        for (; next < total && due_at(next) <= now(); next++, waiting++) {
            connections[next % count].due++;
            send_next(&connections[next % count]);
        }
        int64_t last = due_at(total) + PATIENCE;
        if (now() > last) die("%lld requests got no answer", (long long)waiting);
        wait_until(poller, next < total ? due_at(next) : last);
    }
    qsort(taken, taken_count, sizeof *taken, compare);
    printf("%lld", (long long)taken_count);
    static const double shares[] = {0.5, 0.9, 0.99, 0.999, 1};
    for (int index = 0; index < 5; index++)
        printf(" %lld", (long long)taken[(int64_t)(shares[index] * (taken_count - 1))]);
    printf("\n");
    return 0;
}
