/* How many processes there are and what memory they use, read from a k2i's unix socket.
 *
 *     cc -o total total.c
 *     k2i --unix /tmp/k2i.sock &
 *     ./total /tmp/k2i.sock
 *
 * k2i does the sum: it is asked for one group of all processes, and answers
 * {"processes":[{"dc":"","count":212,"rss_kib":4711}],...}. Exit code 1: it did not.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

enum { ANSWER_BYTES = 1 << 16, TIMEOUT_S = 10 };

static const char REQUEST[] =
    "GET /v2/processes?group=dc&sum=rss_kib HTTP/1.0\r\nHost: localhost\r\n\r\n";

static _Noreturn void fail(const char *what, const char *why)
{
    fprintf(stderr, "total: %s: %s\n", what, why);
    exit(1);
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval timeout = {.tv_sec = TIMEOUT_S};
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (strlen(path) >= sizeof address.sun_path)
        fail(path, "longer than a unix socket's path may be");
    strcpy(address.sun_path, path);
    if (sock < 0 || setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) ||
        connect(sock, (struct sockaddr *)&address, sizeof address))
        fail(path, strerror(errno));
    return sock;
}

/* All that comes until the other side closes, as it does with HTTP/1.0. */
static void read_answer(int sock, char *answer)
{
    size_t length = 0;
    ssize_t got;

    while ((got = read(sock, answer + length, ANSWER_BYTES - 1 - length)) > 0)
        length += (size_t)got;
    if (got < 0)
        fail("no answer", strerror(errno));
    answer[length] = '\0';
}

static long long number_after(const char *text, const char *name)
{
    const char *place = strstr(text, name);

    if (place == NULL)
        fail("the answer lacks", name);
    return strtoll(place + strlen(name), NULL, 10);
}

int main(int argc, char **argv)
{
    static char answer[ANSWER_BYTES];
    const char *body;
    int sock;

    if (argc != 2) {
        fputs("usage: total SOCKET\n", stderr);
        return 2;
    }
    sock = connect_to(argv[1]);
    if (write(sock, REQUEST, sizeof REQUEST - 1) != (ssize_t)sizeof REQUEST - 1)
        fail(argv[1], strerror(errno));
    read_answer(sock, answer);
    close(sock);
    if (strncmp(answer, "HTTP/1.1 200 ", 13) != 0)
        fail(argv[1], "no answer of k2i's");
    body = strstr(answer, "\r\n\r\n");
    if (body == NULL)
        fail(argv[1], "the answer was cut off");
    printf("%lld processes, %lld MiB\n", number_after(body, "\"count\":"),
           number_after(body, "\"rss_kib\":") / 1024);
    return 0;
}
