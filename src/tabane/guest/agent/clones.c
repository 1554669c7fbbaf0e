/* Standing still for a checkpoint, and going on, as what was saved or as another: machines that begin from
 * one checkpoint are the same until the host has told each who it is. The programs do not run before. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "talks.h"

#define FREEZE "/cgroup/app/cgroup.freeze"
#define EVENTS "/cgroup/app/cgroup.events"

enum { HOLD_MS = 2000, LISTENS = 10, TIME_WAIT = 6, MAX_CUT = 1024 };

/* False: one of the programs does not stop. */
bool hold_programs(void)
{
    char text[128];
    write_file(FREEZE, "1");
    for (int64_t end = now_ms() + HOLD_MS; now_ms() < end; usleep(200))
        if (read_file(EVENTS, text, sizeof text) > 0 && strstr(text, "frozen 1"))
            return true;
    release_programs();
    return false;
}

void release_programs(void)
{
    write_file(FREEZE, "0");
}

/* Of TCP connections that are not within the machine, as the kernel's table has them. */
static size_t find_connections(const char *path, unsigned long *inodes, size_t most)
{
    char line[512], local[64];
    unsigned state;
    size_t count = 0;
    FILE *table = fopen(path, "re");
    while (table && count < most && fgets(line, sizeof line, table))
        if (sscanf(line, " %*d: %63[0-9A-F]:%*x %*[0-9A-F]:%*x %x %*s %*s %*s %*u %*u %lu", local, &state,
                   &inodes[count]) == 3 &&
            state != LISTENS && state != TIME_WAIT && inodes[count] && strcmp(local + strlen(local) - 8, "0100007F"))
            count++;
    if (table)
        fclose(table);
    return count;
}

/* A socket that is connected to nothing any more: whoever has it is told that its connection was reset. */
static void cut_socket(int process, int number)
{
    struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
    int sock = syscall(SYS_pidfd_getfd, process, number, 0);
    if (sock < 0 || connect(sock, &nowhere, sizeof nowhere) < 0)
        fail("cannot cut a connection: %s", strerror(errno));
    close(sock);
}

static void cut_of_process(const char *pid, const unsigned long *inodes, size_t count)
{
    char path[300], target[64];
    snprintf(path, sizeof path, "/proc/%s/fd", pid);
    DIR *all = opendir(path);
    struct dirent *entry;
    int process = all ? syscall(SYS_pidfd_open, atoi(pid), 0) : -1;
    while (process >= 0 && (entry = readdir(all))) {
        long length = readlinkat(dirfd(all), entry->d_name, target, sizeof target - 1);
        target[length < 0 ? 0 : length] = 0;
        unsigned long inode = strncmp(target, "socket:[", 8) ? 0 : strtoul(target + 8, NULL, 10);
        for (size_t n = 0; inode && n < count; n++)
            if (inodes[n] == inode)
                cut_socket(process, atoi(entry->d_name));
    }
    if (process >= 0)
        close(process);
    if (all)
        closedir(all);
}

/* Connections are of the machine that was saved: nobody answers a copy of it. */
static void cut_connections(void)
{
    static unsigned long inodes[MAX_CUT];
    size_t count = find_connections("/proc/net/tcp", inodes, MAX_CUT);
    count += find_connections("/proc/net/tcp6", inodes + count, MAX_CUT - count);
    DIR *all = count ? opendir("/proc") : NULL;
    struct dirent *entry;
    while (all && (entry = readdir(all)))
        if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9' && atoi(entry->d_name) != getpid())
            cut_of_process(entry->d_name, inodes, count);
    if (all)
        closedir(all);
}

static void write_epoch(int place, const char *epoch)
{
    int file = openat(place, "epoch", O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (file < 0 || dprintf(file, "%s\n", epoch) < 0)
        fail("cannot write the epoch: %s", strerror(errno));
    close(file);
    close(place);
}

static void tell_epoch(const char *epoch)
{
    if (order.services.count)
        return write_epoch(open(SERVICES_PLACE, O_RDONLY | O_DIRECTORY | O_CLOEXEC), epoch);
    for (size_t n = 0; n < order.count; n++)
        write_epoch(reach(order.containers[n].root, SERVICES_SHOWN), epoch);
}

/* Be the machine that `other` tells of. */
void become(const struct order *other)
{
    cut_connections();
    order.hostname = other->hostname;
    order.address = other->address;
    order.gateway = other->gateway;
    memcpy(order.gateway_mac, other->gateway_mac, sizeof order.gateway_mac);
    memcpy(order.mac, other->mac, sizeof order.mac);
    order.clock_ns = other->clock_ns;
    order.files = other->files;
    configure();
    if (!limit(other))
        fail("cannot limit memory and processes: %s", strerror(errno));
    for (size_t n = 0; n < order.count; n++)
        write_etc(order.containers[n].root);
    if (other->epoch)
        tell_epoch(other->epoch);
}
