/* Writes a machine's memory, which stands still, into a file: what was never touched, or is zero, is a hole.
 *
 *     memory PID ADDRESS SIZE FD FILE
 *
 * The machine is the process PID, which has its memory mapped at ADDRESS (hexadecimal), of SIZE bytes, from
 * its descriptor FD. If that is shared memory, it has all of it; if it is what was saved before, mapped
 * privately, then what has changed is in the process alone. FILE is there, and gets that size.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PAGE = 4096, AT_ONCE = 256 };

static const uint64_t IS_THERE = 3ull << 62;    /* in memory, or swapped out: proc_pid_pagemap(5) */
static const char nothing[PAGE];

static void __attribute__((noreturn, format(printf, 1, 2))) die(const char *form, ...)
{
    int problem = errno;
    va_list rest;
    va_start(rest, form);
    vfprintf(stderr, form, rest);
    fprintf(stderr, ": %s\n", strerror(problem));
    exit(1);
}

static int open_of(const char *pid, const char *name)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/%s", pid, name);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        die("cannot open %s", path);
    return file;
}

/* Which pages the file has that is mapped there. */
static void find_in_file(int file, uint64_t size, bool *wanted)
{
    for (off_t data = 0, hole; (uint64_t)data < size; data = hole) {
        data = lseek(file, data, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            return;
        hole = data < 0 ? -1 : lseek(file, data, SEEK_HOLE);
        if (hole < 0)
            die("cannot find what is in the machine's memory");
        for (uint64_t at = data; at < (uint64_t)hole && at < size; at += PAGE)
            wanted[at / PAGE] = true;
    }
}

/* Which pages the process has. */
static void find_in_process(int map, uint64_t address, uint64_t size, bool *wanted)
{
    static uint64_t entries[PAGE];
    for (uint64_t done = 0, pages = size / PAGE; done < pages;) {
        uint64_t count = pages - done < PAGE ? pages - done : PAGE;
        off_t where = (address / PAGE + done) * sizeof *entries;
        long got = pread(map, entries, count * sizeof *entries, where);
        if (got < (long)sizeof *entries)
            die("cannot find what is in the machine's memory");
        for (uint64_t n = 0; n < got / sizeof *entries; n++)
            wanted[done + n] |= (entries[n] & IS_THERE) != 0;
        done += got / sizeof *entries;
    }
}

static void put(int file, const char *data, uint64_t length, uint64_t offset)
{
    while (length) {
        long written = pwrite(file, data, length, offset);
        if (written < 0)
            die("cannot write the machine's memory");
        data += written, offset += written, length -= written;
    }
}

static void copy(int from, uint64_t address, uint64_t first, uint64_t count, int to)
{
    static char data[AT_ONCE * PAGE];
    for (uint64_t have = 0; have < count * PAGE;) {
        long got = pread(from, data + have, count * PAGE - have, address + first * PAGE + have);
        if (got <= 0)
            die("cannot read the machine's memory");
        have += got;
    }
    for (uint64_t n = 0, begin; n < count; n++) {
        for (begin = n; n < count && memcmp(data + n * PAGE, nothing, PAGE); n++)
            ;
        put(to, data + begin * PAGE, (n - begin) * PAGE, (first + begin) * PAGE);
    }
}

int main(int argc, char **argv)
{
    char name[32];
    if (argc != 6)
        die("memory PID ADDRESS SIZE FD FILE");
    uint64_t address = strtoull(argv[2], NULL, 16), size = strtoull(argv[3], NULL, 10), pages = size / PAGE;
    snprintf(name, sizeof name, "fd/%s", argv[4]);
    bool *wanted = calloc(pages, sizeof *wanted);
    int from = open_of(argv[1], "mem"), to = open(argv[5], O_WRONLY | O_CLOEXEC);
    if (!wanted || to < 0 || ftruncate(to, size) < 0)
        die("cannot write %s", argv[5]);
    find_in_file(open_of(argv[1], name), size, wanted);
    find_in_process(open_of(argv[1], "pagemap"), address, size, wanted);
    for (uint64_t at = 0, begin; at < pages; at++) {
        for (begin = at; at < pages && at - begin < AT_ONCE && wanted[at]; at++)
            ;
        if (at > begin)
            copy(from, address, begin, at - begin, to), at--;
    }
    return 0;
}
