/* HTTP/1.x in front of a program that speaks CGI: each request is a fresh instance of the module, its
 * body the program's input, what the program writes the answer. One thread for each request that may
 * go on at the same time; a connection has one request. All sockets are non-blocking, and every wait is
 * one for the program's own time, which begins anew whenever it has written something. */

#define _GNU_SOURCE
#include "host.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BACKLOG = 1024, CHUNK_LINE = 64, STACK_BYTES = 2 << 20, DRAIN_BYTES = 256 << 10 };
#define LINGER_NS 1000000000LL
#define REFUSED_LINGER_NS 50000000LL

/* One connection, and what is known of its request and answer. */
struct exchange {
    struct server *server;
    struct run run;
    struct request request;
    struct answer answer;
    int socket;
    size_t have, used;  /* of the request's head buffer: filled, taken */
    long long left;     /* of the body or of this chunk; -1: a chunk's size comes next */
    bool body_ended, failed;
    char text[MOST_HEAD]; /* of the program's header lines, until they end */
    size_t text_size;
    bool begun;         /* the answer's head is on its way */
};

static atomic_int active;
static atomic_bool stopping;

static void on_term(int number)
{
    (void)number;
    if (!atomic_load(&active))
        _exit(128 + SIGTERM);
    atomic_store(&stopping, true);
}

void open_server(struct server *server, const char *address, unsigned port)
{
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct sigaction term = {.sa_handler = on_term, .sa_flags = SA_RESTART | SA_ONSTACK};
    int yes = 1;
    if (!inet_aton(address, &where.sin_addr))
        fail("%s is no address", address);
    snprintf(server->name, sizeof server->name, "%s", address);
    server->port = port;
    server->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(server->listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    setsockopt(server->listener, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    if (bind(server->listener, (struct sockaddr *)&where, sizeof where))
        fail_errno("binding to", address);
    signal(SIGPIPE, SIG_IGN);
    sigaction(SIGTERM, &term, NULL);
}

/* The socket */

/* 0, or -ETIMEDOUT. */
static int wait_for(struct exchange *x, short events, int64_t deadline_ns)
{
    struct pollfd one = {x->socket, events, 0};
    for (;;) {
        int64_t left = deadline_ns - now_ns();
        if (left <= 0)
            return -ETIMEDOUT;
        struct timespec time = {left / 1000000000, left % 1000000000};
        int found = ppoll(&one, 1, &time, NULL);
        if (found > 0)
            return 0;
        if (found < 0 && errno != EINTR)
            return -errno;
    }
}

static ssize_t receive(struct exchange *x, void *data, size_t size, int64_t deadline_ns)
{
    for (;;) {
        ssize_t got = read(x->socket, data, size);
        if (got >= 0)
            return got;
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN)
            return -errno;
        int late = wait_for(x, POLLIN, deadline_ns);
        if (late)
            return late;
    }
}

/* All of it: 0, or a negative errno. */
static int send_all(struct exchange *x, struct iovec *parts, int count, int64_t deadline_ns)
{
    while (count) {
        if (!parts->iov_len) {
            parts++, count--;
            continue;
        }
        ssize_t put = writev(x->socket, parts, count);
        if (put < 0 && errno == EAGAIN) {
            int late = wait_for(x, POLLOUT, deadline_ns);
            if (late)
                return late;
        } else if (put < 0 && errno != EINTR) {
            x->run.gone = true;
            return -EPIPE;
        }
        for (; put > 0 && count; parts++, count--) {
            size_t some = (size_t)put < parts->iov_len ? (size_t)put : parts->iov_len;
            parts->iov_base = (char *)parts->iov_base + some;
            parts->iov_len -= some;
            put -= some;
            if (parts->iov_len)
                break;
        }
    }
    return 0;
}

/* The body */

/* What came with the head, then what comes. */
static ssize_t take(struct exchange *x, char *data, size_t size)
{
    size_t ahead = x->have - x->used;
    if (!ahead)
        return receive(x, data, size, x->run.deadline_ns);
    if (size > ahead)
        size = ahead;
    memcpy(data, x->request.head + x->used, size);
    x->used += size;
    return size;
}

/* A line of the chunked coding, without its end; -EPROTO where it is none. */
static int take_line(struct exchange *x, char *line, size_t size)
{
    for (size_t n = 0; n < size; n++) {
        ssize_t got = take(x, line + n, 1);
        if (got <= 0)
            return got ? (int)got : -EPROTO;
        if (line[n] == '\n') {
            line[n && line[n - 1] == '\r' ? n - 1 : n] = 0;
            return 0;
        }
    }
    return -EPROTO;
}

static int next_chunk(struct exchange *x)
{
    char line[CHUNK_LINE], *end;
    int wrong = x->left ? 0 : take_line(x, line, sizeof line); /* the end of the one before */
    if (!wrong)
        wrong = take_line(x, line, sizeof line);
    if (wrong)
        return wrong;
    if (!strspn(line, "0123456789abcdefABCDEF") || strspn(line, "0123456789abcdefABCDEF") > 15)
        return -EPROTO;
    x->left = strtoll(line, &end, 16);
    if (*end && *end != ';' && *end != ' ')
        return -EPROTO;
    while (!x->left) { /* the last one: trailers up to an empty line */
        wrong = take_line(x, line, sizeof line);
        if (wrong || !*line) {
            x->body_ended = true;
            return wrong;
        }
    }
    return 0;
}

static int go_on(struct exchange *x)
{
    if (!x->request.expects || x->have > x->used)
        return 0;
    struct iovec part = {"HTTP/1.1 100 Continue\r\n\r\n", 25};
    x->request.expects = false;
    return send_all(x, &part, 1, x->run.deadline_ns);
}

static ssize_t read_body(struct run *run, void *data, size_t size)
{
    struct exchange *x = run->peer;
    int wrong = x->body_ended ? 0 : go_on(x);
    if (!wrong && !x->body_ended && x->request.chunked && x->left <= 0)
        wrong = next_chunk(x);
    if (wrong || x->body_ended)
        return wrong;
    ssize_t got = take(x, data, size < (size_t)x->left ? size : (size_t)x->left);
    if (got <= 0)
        return got ? got : -EIO; /* it broke off */
    x->left -= got;
    x->body_ended = !x->left && !x->request.chunked;
    return got;
}

/* The answer */

static int send_body(struct exchange *x, struct iovec *head, const struct iovec *parts, int count)
{
    struct iovec all[MOST_PARTS + 8];
    char line[CHUNK_LINE];
    size_t size = 0;
    int n = 0;
    if (head)
        all[n++] = *head;
    for (int part = 0; part < count; part++)
        size += parts[part].iov_len;
    bool chunks = !x->answer.has_length && !x->request.old;
    if (size && !x->answer.bodiless) {
        if (chunks)
            all[n++] = (struct iovec){line, snprintf(line, sizeof line, "%zx\r\n", size)};
        memcpy(all + n, parts, count * sizeof *parts);
        n += count;
        if (chunks)
            all[n++] = (struct iovec){"\r\n", 2};
    }
    return send_all(x, all, n, x->run.deadline_ns);
}

/* The program's header lines, and what of its first words follows them. */
static int begin_answer(struct exchange *x)
{
    size_t end = find_head_end(x->text, x->text_size);
    if (!end) {
        x->failed = x->text_size == sizeof x->text;
        return x->failed ? -EIO : 0;
    }
    if (make_answer(&x->answer, &x->request, x->text, end)) {
        x->failed = true;
        return -EIO;
    }
    struct iovec head = {x->answer.head, x->answer.size};
    struct iovec rest = {x->text + end, x->text_size - end};
    x->begun = true;
    return send_body(x, &head, &rest, 1);
}

static ssize_t write_answer(struct run *run, const struct iovec *parts, int count)
{
    struct exchange *x = run->peer;
    ssize_t taken = 0;
    int wrong = 0;
    if (x->begun) {
        for (int n = 0; n < count; n++)
            taken += parts[n].iov_len;
        wrong = send_body(x, NULL, parts, count);
    } else {
        for (int n = 0; n < count && x->text_size < sizeof x->text; n++) {
            size_t room = sizeof x->text - x->text_size;
            size_t some = parts[n].iov_len < room ? parts[n].iov_len : room;
            memcpy(x->text + x->text_size, parts[n].iov_base, some);
            x->text_size += some;
            taken += some;
        }
        wrong = begin_answer(x);
    }
    if (!wrong && run->timeout_ns)
        run->deadline_ns = now_ns() + run->timeout_ns;
    return wrong ? wrong : taken;
}

static const struct streams STREAMS = {read_body, write_answer};

static void refuse(struct exchange *x, int status, const char *why)
{
    char text[1024];
    x->request.old = true; /* no chunks */
    size_t size = snprintf(text, sizeof text, "Status: %d\nContent-Type: text/plain\n"
                           "Content-Length: %zu\n\n%s\n", status, strlen(why) + 1, why);
    x->begun = true;
    if (size >= sizeof text || make_answer(&x->answer, &x->request, text, find_head_end(text, size)))
        return;
    struct iovec parts[] = {{x->answer.head, x->answer.size}, {(char *)why, strlen(why)}, {"\n", 1}};
    send_all(x, parts, x->request.is_head ? 1 : 3, now_ns() + LINGER_NS);
}

/* How a run ended that gave no whole answer. Once an answer has begun, that it is cut off must show. */
static void say_failure(struct exchange *x, const char *why)
{
    char text[768];
    snprintf(text, sizeof text, "tabane: a request failed: %s\n", why);
    struct iovec line = {text, strlen(text)};
    if (writev(STDERR_FILENO, &line, 1) < 0 || x->begun || x->run.gone)
        return;
    snprintf(text, sizeof text, "The program gave no answer: %s", why);
    refuse(x, x->run.timed_out ? 504 : 500, text);
}

static void finish(struct exchange *x, bool ended, const char *why)
{
    char text[64];
    if (!ended)
        say_failure(x, why);
    else if (x->failed)
        say_failure(x, "it wrote no header lines as CGI has them");
    else if (!x->begun && x->run.code) {
        snprintf(text, sizeof text, "it exited with code %d", x->run.code);
        say_failure(x, text);
    } else if (!x->begun)
        say_failure(x, "it wrote no header lines");
    else if (!x->answer.has_length && !x->answer.bodiless && !x->request.old) {
        struct iovec last = {"0\r\n\r\n", 5};
        send_all(x, &last, 1, x->run.deadline_ns);
    }
}

/* A request */

static int read_head(struct exchange *x, int64_t deadline_ns)
{
    while (!(x->used = find_head_end(x->request.head, x->have))) {
        if (x->have == MOST_HEAD)
            return 431;
        ssize_t got = receive(x, x->request.head + x->have, MOST_HEAD - x->have, deadline_ns);
        if (got <= 0)
            return -1;
        x->have += got;
    }
    return 0;
}

static bool add_variables(struct exchange *x, const char *peer)
{
    char port[8];
    struct request *request = &x->request;
    snprintf(port, sizeof port, "%u", x->server->port);
    request->text_size = request->count = 0;
    for (char **env = x->server->env; *env && request->count < MOST_VARIABLES; env++)
        request->variables[request->count++] = *env;
    return add_variable(request, "GATEWAY_INTERFACE", "CGI/1.1") &&
           add_variable(request, "SERVER_SOFTWARE", "tabane") &&
           add_variable(request, "SERVER_NAME", x->server->name) &&
           add_variable(request, "SERVER_PORT", port) &&
           add_variable(request, "SCRIPT_NAME", "") && add_variable(request, "REMOTE_ADDR", peer);
}

/* What of the request is still on its way is read, or closing would take the answer with it. */
static void drain(struct exchange *x)
{
    static _Thread_local char nothing[4096];
    ssize_t got = 1;
    x->run.deadline_ns = now_ns() + LINGER_NS;
    if (x->request.expects || x->run.gone)
        return;
    for (size_t n = 0; got > 0 && !x->body_ended && n < DRAIN_BYTES; n += got)
        got = read_body(&x->run, nothing, sizeof nothing);
}

/* The same where nobody knows how much there is. */
static void drop_input(struct exchange *x)
{
    char nothing[4096];
    for (size_t n = 0; n < DRAIN_BYTES; n += sizeof nothing)
        if (receive(x, nothing, sizeof nothing, now_ns() + REFUSED_LINGER_NS) <= 0)
            return;
}

static void answer(struct exchange *x, const char *peer)
{
    char why[512] = "";
    x->have = x->used = x->text_size = 0;
    x->begun = x->failed = x->body_ended = false;
    x->request.length = 0;
    x->run = (struct run){x->server->args, x->request.variables, &STREAMS, x,
                          x->server->timeout_ns, 0, 0, false, false, false, 0};
    int refused = read_head(x, now_ns() + x->server->timeout_ns);
    if (refused < 0)
        return;
    x->request.head[x->have] = 0;
    char kept = x->request.head[x->used];
    x->request.head[x->used] = 0;
    if (!refused && strlen(x->request.head) != x->used)
        refused = 400;
    if (!refused)
        refused = add_variables(x, peer) ? parse_request(&x->request) : 431;
    x->request.head[x->used] = kept;
    x->left = x->request.chunked ? -1 : x->request.length;
    x->body_ended = !x->request.length;
    if (refused) {
        refuse(x, refused, "This is no request that can be answered.");
        drop_input(x);
        return;
    }
    bool ended = run_module(x->server->engine, &x->run, why, sizeof why);
    finish(x, ended, why);
    drain(x);
}

static _Noreturn void serve_for_ever(struct exchange *x)
{
    for (;;) {
        struct sockaddr_in peer = {0};
        socklen_t size = sizeof peer;
        char text[INET_ADDRSTRLEN] = "";
        x->socket = accept4(x->server->listener, (struct sockaddr *)&peer, &size,
                            SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (x->socket < 0)
            continue;
        atomic_fetch_add(&active, 1);
        if (!atomic_load(&stopping)) {
            inet_ntop(AF_INET, &peer.sin_addr, text, sizeof text);
            answer(x, text);
        }
        close(x->socket);
        if (atomic_fetch_sub(&active, 1) == 1 && atomic_load(&stopping))
            _exit(128 + SIGTERM);
    }
}

static struct exchange *new_exchange(struct server *server)
{
    struct exchange *x = calloc(1, sizeof *x);
    if (!x)
        fail("there is not enough memory for %u requests at a time", server->workers);
    x->server = server;
    warm_up(server->engine);
    return x;
}

static sem_t warm, go;

static void *work(void *server)
{
    struct exchange *x = new_exchange(server);
    sem_post(&warm);
    while (sem_wait(&go))
        ;
    serve_for_ever(x);
}

_Noreturn void serve(struct server *server, struct confinement *what)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sem_init(&warm, 0, 0);
    sem_init(&go, 0, 0);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    for (unsigned n = 1; n < server->workers; n++)
        if (pthread_create(&thread, &attributes, work, server))
            fail("there can be no %u threads: raise the app's pids", server->workers);
    struct exchange *x = new_exchange(server);
    for (unsigned n = 1; n < server->workers; n++)
        while (sem_wait(&warm))
            ;
    if (listen(server->listener, BACKLOG))
        fail_errno("listening at", server->name);
    install_filter(what);
    tell_running();
    for (unsigned n = 1; n < server->workers; n++)
        sem_post(&go);
    serve_for_ever(x);
}
