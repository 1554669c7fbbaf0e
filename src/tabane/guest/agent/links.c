/* Connections of programs to sockets of the node. They connect to one of ours; what they say there is
 * carried to the host, which knows what it stands for, and what comes from there to them. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "talks.h"

enum { FIRST_LINK = 1u << 31, BACKLOG = 64 };

struct link links[MAX_LINKS];
int services[MAX_SERVICES] = {[0 ... MAX_SERVICES - 1] = -1};

static int listen_at(const char *name)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    snprintf(at.sun_path, sizeof at.sun_path, SERVICES_PLACE "/%s", name);
    if (sock < 0 || bind(sock, (void *)&at, sizeof at) < 0 || chmod(at.sun_path, 0666) < 0 ||
        listen(sock, BACKLOG) < 0)
        fail("cannot listen at %s: %s", at.sun_path, strerror(errno));
    return sock;
}

/* The same sockets in each container: who they are is the instance. */
void open_services(void)
{
    unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    char target[64];
    if (!order.services.count)
        return;
    if (order.services.count > MAX_SERVICES)
        fail("the start order has more sockets than there can be");
    attach("services", SERVICES_PLACE, "tmpfs", flags, "size=64k,mode=0755");
    for (size_t n = 0; n < order.services.count; n++)
        services[n] = listen_at(order.services.list[n]);
    for (size_t n = 0; n < order.count; n++) {
        int place = reach(order.containers[n].root, SERVICES_SHOWN);
        snprintf(target, sizeof target, "/proc/self/fd/%d", place);
        if (mount(SERVICES_PLACE, target, NULL, MS_BIND, NULL) < 0)
            fail("cannot show %s: %s", SERVICES_SHOWN, strerror(errno));
        close(place);
        place = reach(order.containers[n].root, SERVICES_SHOWN);
        snprintf(target, sizeof target, "/proc/self/fd/%d", place);
        if (mount(NULL, target, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | flags, NULL) < 0)
            fail("cannot show %s: %s", SERVICES_SHOWN, strerror(errno));
        close(place);
    }
}

static struct link *find_link(uint32_t id)
{
    for (int n = 0; n < MAX_LINKS; n++)
        if (links[n].id == id)
            return &links[n];
    return NULL;
}

bool has_free_link(void)
{
    return find_link(0) != NULL;
}

static void forget_link(struct link *link)
{
    close(link->sock);
    free(link->input);
    *link = (struct link){0};
}

static void end_link(struct link *link)
{
    say_number(ENDED, link->id, 0);
    forget_link(link);
}

/* Nobody carries them any more: the programs find them closed. */
void drop_links(void)
{
    for (int n = 0; n < MAX_LINKS; n++)
        if (links[n].id)
            forget_link(&links[n]);
}

void accept_links(void)
{
    static uint32_t latest;
    for (size_t n = 0; n < order.services.count; n++)
        for (struct link *link; out_count <= OUT_FULL && (link = find_link(0));) {
            int sock = accept4(services[n], NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
            if (sock < 0)
                break;
            do
                latest = (latest + 1) | FIRST_LINK;
            while (find_link(latest));
            *link = (struct link){.id = latest, .sock = sock, .window = LINK_WINDOW};
            say(DIAL, link->id, order.services.list[n], strlen(order.services.list[n]));
        }
}

/* False: it is broken, and forgotten. */
static bool pump_in(struct link *link)
{
    if (link->input_count) {
        long written = send(link->sock, link->input, link->input_count, MSG_NOSIGNAL);
        if (written < 0 && errno != EAGAIN) {
            end_link(link);
            return false;
        }
        if (written > 0) {
            link->input_count -= written;
            memmove(link->input, link->input + written, link->input_count);
            say_number(TAKEN, link->id, written);
        }
    }
    if (link->ends_input && !link->input_count && !link->is_shut) {
        shutdown(link->sock, SHUT_WR);
        link->is_shut = true;
    }
    return true;
}

void look_after_link(struct link *link)
{
    uint8_t data[MAX_PAYLOAD];
    if (!pump_in(link))
        return;
    while (!link->has_said_all && link->window && out_count <= OUT_FULL) {
        long got = read(link->sock, data, link->window < sizeof data ? link->window : sizeof data);
        if (got < 0 && errno == EAGAIN)
            break;
        link->has_said_all = got <= 0;
        link->window -= got > 0 ? got : 0;
        say(got > 0 ? OUTPUT : END_OUTPUT, link->id, data, got > 0 ? got : 0);
    }
    if (link->has_said_all && link->is_shut)
        end_link(link);
}

void take_for_link(uint8_t kind, uint32_t id, const uint8_t *payload, size_t length)
{
    struct link *link = find_link(id);
    uint32_t value = 0;
    if (!link || !id)
        return;                     /* it was ended when the host said that */
    memcpy(&value, payload, length < 4 ? length : 4);
    if (kind == CLOSE)
        return end_link(link);
    if (kind == END_INPUT)
        link->ends_input = true;
    else if (kind == GRANT && length == 5)
        link->window += value;
    if (kind != INPUT || link->is_shut)
        return;
    if (!link->input)
        link->input = malloc(LINK_WINDOW);
    if (!link->input || link->input_count + length > LINK_WINDOW)
        return end_link(link);
    memcpy(link->input + link->input_count, payload, length);
    link->input_count += length;
    pump_in(link);
}
