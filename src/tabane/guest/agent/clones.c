/* Standing still for a checkpoint, and going on, as what was saved or as another: machines that begin from
 * one checkpoint are the same until the host has told each who it is. The programs do not run before.
 *
 * What comes first after a checkpoint costs most, above all where the processor is emulated. So all that
 * can be done before is: which connections there are is known then, the files that will differ are open and
 * have been written to just now, and of the network only the address is another. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#undef MAX_LINKS                    /* of the kernel's headers */
#include "talks.h"

#define FREEZE "/cgroup/app/cgroup.freeze"
#define EVENTS "/cgroup/app/cgroup.events"

enum { HOLD_MS = 2000, LISTENS = 10, TIME_WAIT = 6, MAX_CUT = 256, MAX_PORTS = 32, MAX_FILES = 4,
       EPOCH_BYTES = 36 };

/* A connection to elsewhere, by the descriptor that a program has of it. */
static struct { int process, number; } cuts[MAX_CUT];
static size_t cut_count;

/* Where programs listened when they were held. */
static uint16_t ports[MAX_PORTS];
static size_t port_count;

/* A file that differs in each machine; -1: there is none. */
static int etc[MAX_CONTAINERS][MAX_FILES], epochs[MAX_CONTAINERS];
static bool is_first_epoch, is_held;

/* Sockets */

/* Of TCP connections that are not within the machine, as the kernel's table has them; and the ports where
 * such can be made. */
static size_t find_connections(const char *path, unsigned long *inodes, size_t most)
{
    char line[512], local[64];
    unsigned port, state;
    unsigned long inode;
    size_t count = 0;
    FILE *table = fopen(path, "re");
    while (table && count < most && fgets(line, sizeof line, table)) {
        if (sscanf(line, " %*d: %63[0-9A-F]:%x %*[0-9A-F]:%*x %x %*s %*s %*s %*u %*u %lu", local, &port, &state,
                   &inode) != 4 ||
            !strcmp(local + strlen(local) - 8, "0100007F"))
            continue;
        if (state == LISTENS && port_count < MAX_PORTS)
            ports[port_count++] = port;
        else if (state != LISTENS && state != TIME_WAIT && inode)
            inodes[count++] = inode;
    }
    if (table)
        fclose(table);
    return count;
}

/* Known of a clone without looking, once: its programs have only just begun to run. */
bool listened(uint16_t port)
{
    bool found = false;
    for (size_t n = 0; n < port_count; n++)
        found = found || ports[n] == port;
    port_count = 0;
    return found;
}

static void find_cuts_of(const char *pid, const unsigned long *inodes, size_t count)
{
    char path[300], target[64];
    snprintf(path, sizeof path, "/proc/%s/fd", pid);
    DIR *all = opendir(path);
    struct dirent *entry;
    while (all && (entry = readdir(all))) {
        long length = readlinkat(dirfd(all), entry->d_name, target, sizeof target - 1);
        target[length < 0 ? 0 : length] = 0;
        unsigned long inode = strncmp(target, "socket:[", 8) ? 0 : strtoul(target + 8, NULL, 10);
        for (size_t n = 0; inode && n < count && cut_count < MAX_CUT; n++)
            if (inodes[n] == inode) {
                cuts[cut_count].process = syscall(SYS_pidfd_open, atoi(pid), 0);
                cuts[cut_count++].number = atoi(entry->d_name);
            }
    }
    if (all)
        closedir(all);
}

static void find_cuts(void)
{
    static unsigned long inodes[MAX_CUT];
    size_t count = find_connections("/proc/net/tcp", inodes, MAX_CUT);
    count += find_connections("/proc/net/tcp6", inodes + count, MAX_CUT - count);
    DIR *all = count ? opendir("/proc") : NULL;
    struct dirent *entry;
    while (all && (entry = readdir(all)))
        if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9' && atoi(entry->d_name) != getpid())
            find_cuts_of(entry->d_name, inodes, count);
    if (all)
        closedir(all);
}

/* Whoever has the socket is told that its connection was reset: nobody answers a copy of it. */
static void cut(int process, int number)
{
    struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
    int sock = syscall(SYS_pidfd_getfd, process, number, 0);
    if (sock >= 0 && connect(sock, &nowhere, sizeof nowhere) < 0)
        fail("cannot cut a connection: %s", strerror(errno));
    close_stream(&sock);
}

/* Files */

static const char *text_of(const struct words *files, size_t n)
{
    const char *text = strchr(files->list[n], '=');
    return text ? text + 1 : "";
}

static void put(int file, const char *text, size_t length)
{
    if (pwrite(file, text, length, 0) != (long)length)
        fail("cannot write who this machine is: %s", strerror(errno));
}

/* What is not there as it was, the program has changed: it is left alone. */
static int open_etc(const char *root, const char *name, size_t length)
{
    char path[128];
    snprintf(path, sizeof path, "%s/etc/%.*s", root, (int)length, name);
    return open(path, O_WRONLY | O_NOFOLLOW | O_CLOEXEC);
}

static int open_epoch(int place)
{
    is_first_epoch = faccessat(place, "epoch", F_OK, 0) < 0;
    int file = openat(place, "epoch", O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (file < 0)
        fail("cannot make a file for the epoch: %s", strerror(errno));
    if (is_first_epoch)
        put(file, "00000000-0000-0000-0000-000000000000\n", EPOCH_BYTES + 1);
    close(place);
    return file;
}

static int open_place(size_t n)
{
    return order.services.count ? open(SERVICES_PLACE, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
                                : reach(order.containers[n].root, SERVICES_SHOWN);
}

static void open_files(void)
{
    for (size_t n = 0; n < order.count; n++) {
        for (size_t i = 0; i < MAX_FILES; i++)
            etc[n][i] = -1;
        for (size_t i = 0; i < order.files.count && i < MAX_FILES; i++) {
            const char *line = order.files.list[i], *text = text_of(&order.files, i);
            etc[n][i] = open_etc(order.containers[n].root, line, strcspn(line, "="));
            if (etc[n][i] >= 0)
                put(etc[n][i], text, strlen(text));
        }
        epochs[n] = n && order.services.count ? -1 : open_epoch(open_place(n));
    }
}

static void close_files(bool is_clone)
{
    for (size_t n = 0; n < order.count; n++) {
        for (size_t i = 0; i < MAX_FILES; i++)
            close_stream(&etc[n][i]);
        if (epochs[n] >= 0 && is_first_epoch && !is_clone) {
            int place = open_place(n);
            unlinkat(place, "epoch", 0);
            close(place);
        }
        close_stream(&epochs[n]);
    }
}

/* As long as before, at least: a line that is empty does no harm, and to cut a file off takes longer. */
static void rewrite(int file, const char *before, const char *now)
{
    char text[4096];
    size_t old = strlen(before), new = strlen(now), length = old > new ? old : new;
    if (file < 0 || !strcmp(before, now) || length > sizeof text)
        return;
    memset(text, '\n', length);
    memcpy(text, now, new);
    put(file, text, length);
}

static void write_files(const struct order *other)
{
    for (size_t n = 0; n < order.count; n++) {
        for (size_t i = 0; i < order.files.count && i < other->files.count && i < MAX_FILES; i++)
            rewrite(etc[n][i], text_of(&order.files, i), text_of(&other->files, i));
        if (epochs[n] >= 0 && other->epoch && strlen(other->epoch) == EPOCH_BYTES)
            put(epochs[n], other->epoch, EPOCH_BYTES);
    }
}

/* The network */

static int network = -1;            /* to the kernel, about it */
static unsigned device;             /* its number; 0: there is none */

static void open_network(void)
{
    char name[IFNAMSIZ];
    if (network < 0)
        network = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    device = find_interface(name) ? if_nametoindex(name) : 0;
}

struct address_message {
    struct nlmsghdr head;
    struct ifaddrmsg address;
    struct rtattr attribute;
    uint32_t value;
};

static struct address_message about_address(int kind, int device, uint32_t address)
{
    return (struct address_message){
        .head = {sizeof(struct address_message), kind, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE, 1, 0},
        .address = {.ifa_family = AF_INET, .ifa_prefixlen = 32, .ifa_index = device},
        .attribute = {RTA_LENGTH(sizeof address), IFA_LOCAL},
        .value = address,
    };
}

static void ask_kernel(int sock, struct address_message message, const char *what)
{
    struct { struct nlmsghdr head; struct nlmsgerr told; char more[128]; } answer;
    if (send(sock, &message, sizeof message, 0) < 0 || recv(sock, &answer, sizeof answer, 0) < 0)
        fail("cannot %s: %s", what, strerror(errno));
    if (answer.head.nlmsg_type != NLMSG_ERROR || answer.told.error)
        fail("cannot %s: %s", what, strerror(-answer.told.error));
}

static void change_mac(void)
{
    struct ifreq request = {.ifr_hwaddr.sa_family = ARPHRD_ETHER};
    int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    memcpy(request.ifr_hwaddr.sa_data, order.mac, sizeof order.mac);
    if (find_interface(request.ifr_name) && ioctl(sock, SIOCSIFHWADDR, &request) < 0)
        fail("cannot set the hardware address: %s", strerror(errno));
    close(sock);
}

/* The routes name no address, and stay as long as there is one. */
static void change_address(uint32_t before, uint32_t now)
{
    if (before == now || !device)
        return;
    ask_kernel(network, about_address(RTM_NEWADDR, device, now), "set the address");
    ask_kernel(network, about_address(RTM_DELADDR, device, before), "give up the old address");
}

/* All together */

/* False: one of the programs does not stop. */
bool hold_programs(void)
{
    char text[128];
    release_programs(NULL);
    write_file(FREEZE, "1");
    is_held = true;
    for (int64_t end = now_ms() + HOLD_MS; now_ms() < end; usleep(200))
        if (read_file(EVENTS, text, sizeof text) > 0 && strstr(text, "frozen 1")) {
            find_cuts();
            open_files();
            open_network();
            return true;
        }
    write_file(FREEZE, "0");
    is_held = false;
    return false;
}

static bool is_other(const struct order *other)
{
    return memcmp(other->mac, order.mac, sizeof order.mac) || other->gateway != order.gateway ||
           memcmp(other->gateway_mac, order.gateway_mac, sizeof order.gateway_mac);
}

/* Be the machine that `other` tells of. */
static void become(const struct order *other)
{
    for (size_t n = 0; n < cut_count; n++)
        cut(cuts[n].process, cuts[n].number);
    write_files(other);
    if (other->memory_bytes != order.memory_bytes || other->pids != order.pids)
        if (!limit(other))
            fail("cannot limit memory and processes: %s", strerror(errno));
    bool is_elsewhere = is_other(other);
    uint32_t before = order.address;
    order.hostname = other->hostname;
    order.address = other->address;
    order.gateway = other->gateway;
    memcpy(order.gateway_mac, other->gateway_mac, sizeof order.gateway_mac);
    memcpy(order.mac, other->mac, sizeof order.mac);
    order.files = other->files;
    order.memory_bytes = other->memory_bytes;
    order.pids = other->pids;
    set_clock(other->clock_ns);
    if (sethostname(order.hostname, strlen(order.hostname)) < 0)
        fail("cannot be called %s: %s", order.hostname, strerror(errno));
    change_address(before, order.address);
    if (is_elsewhere) {
        change_mac();
        configure_network();
    }
}

/* NULL: they go on in the machine that they were in. */
void release_programs(const struct order *other)
{
    if (!is_held)
        return;
    if (other)
        become(other);
    else
        port_count = 0;
    for (size_t n = 0; n < cut_count; n++)
        close_stream(&cuts[n].process);
    cut_count = 0;
    close_files(other);
    is_held = false;
    write_file(FREEZE, "0");
}
