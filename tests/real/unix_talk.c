/* unix_talk PATH: what it is given goes to the unix socket there, and what comes from it to stdout. Each
 * side ends what it says for itself; with `-` after the path, this side leaves the end to the other.
 *
 * unix_talk PATH COUNT: connects so often, says "x" and nothing more on each, and what comes from all. */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int pass(int from, int to)
{
    static char data[65536];
    long got = read(from, data, sizeof data);
    for (long done = 0, written; done < got; done += written)
        if ((written = write(to, data + done, got - done)) <= 0)
            return -1;
    return got > 0;
}

static int dial(const char *path)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    int sock = socket(AF_UNIX, SOCK_STREAM, 0);
    snprintf(at.sun_path, sizeof at.sun_path, "%s", path);
    if (sock < 0 || connect(sock, (void *)&at, sizeof at) < 0)
        exit((perror(path), 2));
    return sock;
}

static int talk_often(const char *path, int count)
{
    int socks[1024];
    for (int n = 0; n < count && n < 1024; n++)
        socks[n] = dial(path);
    for (int n = 0; n < count && n < 1024; n++) {
        if (write(socks[n], "x", 1) != 1)
            return perror("write"), 2;
        shutdown(socks[n], SHUT_WR);
        while (pass(socks[n], 1) > 0)
            ;
        close(socks[n]);
    }
    return 0;
}

int main(int argc, char **argv)
{
    int stays = argc > 2 && !strcmp(argv[2], "-");
    if (argc > 2 && !stays)
        return talk_often(argv[1], atoi(argv[2]));
    int sock = dial(argc > 1 ? argv[1] : "");
    struct pollfd both[] = {{.fd = 0, .events = POLLIN}, {.fd = sock, .events = POLLIN}};
    while (both[1].fd >= 0) {
        poll(both, 2, -1);
        if (both[0].fd >= 0 && both[0].revents && pass(0, sock) <= 0) {
            if (!stays)
                shutdown(sock, SHUT_WR);
            both[0].fd = -1;
        }
        if (both[1].revents && pass(sock, 1) <= 0)
            both[1].fd = -1;
    }
    return 0;
}
