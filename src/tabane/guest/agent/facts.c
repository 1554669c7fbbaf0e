/* What the host asks about the guest. Processes are told as the kernel shows them: who asks parses. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

size_t put_field(uint8_t *into, char tag, const void *data, uint32_t length)
{
    into[0] = tag;
    for (int n = 0; n < 4; n++)
        into[1 + n] = length >> (8 * n);
    memcpy(into + 5, data, length);
    return 5 + length;
}

static size_t put_number(uint8_t *into, char tag, uint64_t value)
{
    uint8_t bytes[8];
    for (int n = 0; n < 8; n++)
        bytes[n] = value >> (8 * n);
    return put_field(into, tag, bytes, sizeof bytes);
}

static uint64_t number_after(const char *path, const char *name)
{
    char text[4096];
    if (read_file(path, text, sizeof text) < 0)
        return 0;
    char *at = strstr(text, name);
    return at ? strtoull(at + strlen(name), NULL, 10) : 0;
}

/* "0::/app/c1/main": the container with that number; nothing for who is in none. */
static size_t put_container(uint8_t *into, const char *pid)
{
    char path[64], text[256], *at;
    snprintf(path, sizeof path, "/proc/%s/cgroup", pid);
    if (read_file(path, text, sizeof text) <= 0 || !(at = strstr(text, "/app/c")))
        return 0;
    size_t number = strtoul(at + strlen("/app/c"), NULL, 10);
    if (number >= order.count)
        return 0;
    return put_field(into, 'k', order.containers[number].name, strlen(order.containers[number].name));
}

static void tell_process(const char *pid)
{
    static uint8_t record[16384];
    char path[64], text[8192];
    long length;
    size_t used = 0;
    snprintf(path, sizeof path, "/proc/%s/stat", pid);
    if ((length = read_file(path, text, 2048)) <= 0)
        return;
    char *after = strrchr(text, ')');
    if (!strcmp(pid, "2") || (after && atoi(after + 4) == 2))
        return;                     /* the kernel's own */
    used += put_field(record + used, 's', text, length);
    snprintf(path, sizeof path, "/proc/%s/status", pid);
    used += put_number(record + used, 'u', number_after(path, "\nUid:\t"));
    used += put_number(record + used, 'g', number_after(path, "\nGid:\t"));
    snprintf(path, sizeof path, "/proc/%s/cmdline", pid);
    if ((length = read_file(path, text, sizeof text)) > 0)
        used += put_field(record + used, 'c', text, length);
    used += put_container(record + used, pid);
    used += put_field(record + used, '.', "", 0);
    for (size_t done = 0; done < used;) {
        long written = write(1, record + done, used - done);
        if (written <= 0)
            _exit(1);
        done += written;
    }
}

int list_processes(const struct program *program)
{
    (void)program;
    DIR *all = opendir("/proc");
    struct dirent *entry;
    uint8_t clock[64];
    char text[128];
    read_file("/proc/uptime", text, sizeof text);
    size_t used = put_number(clock, 'U', strtod(text, NULL) * 1000);
    used += put_number(clock + used, 'T', sysconf(_SC_CLK_TCK));
    if (!all || write(1, clock, used) != (long)used)
        return 1;
    while ((entry = readdir(all)))
        if (isdigit(entry->d_name[0]) && atoi(entry->d_name) != getpid())
            tell_process(entry->d_name);
    closedir(all);
    return 0;
}

/* A line of /proc/net/tcp: "  0: 0100007F:1F90 00000000:0000 0A ...". Of IPv4, sockets of loopback
 * alone take no connection from the host. */
static bool listens_in(const char *path, uint16_t port)
{
    char line[512], address[64];
    unsigned local, state;
    FILE *table = fopen(path, "re");
    bool found = false;
    while (table && !found && fgets(line, sizeof line, table))
        found = sscanf(line, " %*d: %63[0-9A-F]:%x %*[0-9A-F]:%*x %x", address, &local, &state) == 3 &&
                local == port && state == 0x0A && strcmp(address, "0100007F");
    if (table)
        fclose(table);
    return found;
}

bool listens(uint16_t port)
{
    return listens_in("/proc/net/tcp", port) || listens_in("/proc/net/tcp6", port);
}

size_t tell_figures(uint8_t *into)
{
    char text[64] = "0";
    size_t used = 0;
    read_file("/cgroup/app/pids.current", text, sizeof text);
    used += put_number(into + used, 'p', strtoull(text, NULL, 10));
    read_file("/cgroup/app/memory.current", text, sizeof text);
    used += put_number(into + used, 'm', strtoull(text, NULL, 10));
    used += put_number(into + used, 'o', number_after("/cgroup/app/memory.events", "oom_kill "));
    used += put_number(into + used, 'c', number_after("/cgroup/app/cpu.stat", "usage_usec "));
    return used;
}

bool was_out_of_memory(void)
{
    return number_after("/cgroup/app/memory.events", "oom_kill ") > 0;
}

static bool write_number(const char *path, uint64_t value)
{
    char text[32];
    int file = open(path, O_WRONLY | O_CLOEXEC);
    int length = snprintf(text, sizeof text, "%llu", (unsigned long long)value);
    bool done = file >= 0 && write(file, text, length) == length;
    if (file >= 0)
        close(file);
    return done;
}

bool limit(const struct order *limits)
{
    if (limits->memory_bytes && !write_number("/cgroup/app/memory.max", limits->memory_bytes))
        return false;
    return !limits->pids || write_number("/cgroup/app/pids.max", limits->pids);
}

bool is_empty_group(const char *group)
{
    char path[128];
    snprintf(path, sizeof path, "/cgroup/app/%s/cgroup.events", group);
    return number_after(path, "populated ") == 0;
}
