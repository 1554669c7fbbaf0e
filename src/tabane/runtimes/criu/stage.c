/* Starts a program as root of an instance's user namespace, with nothing of the node's at /tmp but what
 * it is shown, and what it leaves behind in the instance's cgroup.
 *
 *     stage OPTION... -- PROGRAM ARGUMENT...
 *
 *     --cgroup FILE         a cgroup.procs to join (once for each hierarchy)
 *     --user FILE           the user namespace
 *     --net FILE            a network namespace, which is descriptor 5 of the program
 *     --stage DIRECTORY     an empty one, which is covered while the program runs
 *     --show NAME=SOURCE    the file or directory SOURCE is /tmp/NAME; --read-only likewise
 *     --said FILE           gets what the program says; its descriptors 3 and 4 are 1 and 2 as given
 *     --owner N             of what these are, from now on
 *     --hostname NAME       in a UTS namespace of its own
 *     --monotonic N, --boottime N   nanoseconds that these clocks go on from
 *
 * What goes wrong before the program starts is said on stderr, with code 125.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x00000080
#endif

enum { MAX_SHOWN = 64, MAX_CGROUPS = 16, REFUSED = 125, NET_FD = 5 };

struct shown {
    char *name, *source;
    bool writable;
};

static struct {
    char *cgroups[MAX_CGROUPS], *user, *net, *stage, *said, *hostname;
    struct shown shown[MAX_SHOWN];
    int cgroup_count, shown_count;
    long long owner, monotonic, boottime;
    char **program;
} wanted = {.owner = -1, .monotonic = -1, .boottime = -1};

static void __attribute__((noreturn, format(printf, 1, 2))) refuse(const char *format, ...)
{
    int number = errno;
    va_list words;
    va_start(words, format);
    fprintf(stderr, "stage: ");
    vfprintf(stderr, format, words);
    fprintf(stderr, ": %s\n", strerror(number));
    exit(REFUSED);
}

static int must(int result, const char *what)
{
    if (result < 0)
        refuse("%s", what);
    return result;
}

static long long parse_number(const char *text)
{
    char *end;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    if (*end || end == text)
        errno = EINVAL;
    if (errno)
        refuse("%s", text);
    return number;
}

static void show(char *text, bool writable)
{
    char *source = strchr(text, '=');
    errno = EINVAL;
    if (!source || wanted.shown_count == MAX_SHOWN)
        refuse("%s", text);
    *source++ = '\0';
    wanted.shown[wanted.shown_count++] = (struct shown){text, source, writable};
}

static void join_later(char *file)
{
    errno = E2BIG;
    if (wanted.cgroup_count == MAX_CGROUPS)
        refuse("%s", file);
    wanted.cgroups[wanted.cgroup_count++] = file;
}

static void parse(char **words)
{
    for (; words[0] && words[1] && strcmp(words[0], "--"); words += 2) {
        char *option = words[0], *value = words[1];
        if (!strcmp(option, "--cgroup")) join_later(value);
        else if (!strcmp(option, "--user")) wanted.user = value;
        else if (!strcmp(option, "--net")) wanted.net = value;
        else if (!strcmp(option, "--stage")) wanted.stage = value;
        else if (!strcmp(option, "--show")) show(value, true);
        else if (!strcmp(option, "--read-only")) show(value, false);
        else if (!strcmp(option, "--said")) wanted.said = value;
        else if (!strcmp(option, "--owner")) wanted.owner = parse_number(value);
        else if (!strcmp(option, "--hostname")) wanted.hostname = value;
        else if (!strcmp(option, "--monotonic")) wanted.monotonic = parse_number(value);
        else if (!strcmp(option, "--boottime")) wanted.boottime = parse_number(value);
        else errno = EINVAL, refuse("%s", option);
    }
    errno = EINVAL;
    if (!words[0] || !words[1] || !wanted.user || !wanted.net || !wanted.stage || !wanted.said ||
        !wanted.hostname || wanted.owner < 0 || wanted.monotonic < 0 || wanted.boottime < 0)
        refuse("an option or the program is missing");
    wanted.program = words + 1;
}

static void join(const char *file)
{
    int descriptor = must(open(file, O_WRONLY | O_CLOEXEC), file);
    must(write(descriptor, "0", 1), file);
    close(descriptor);
}

/* Descriptors 1 and 2 become the owner's, as engines do it, since the program opens them again. */
static void hand_over(void)
{
    for (int given = 1; given <= 2; given++) {
        must(fchown(given, wanted.owner, wanted.owner), "chown what is written to");
        must(dup2(given, given + 2), "dup");
    }
    int said = must(open(wanted.said, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600), wanted.said);
    must(fchown(said, wanted.owner, wanted.owner), wanted.said);
    must(dup2(said, 1), "dup");
    must(dup2(said, 2), "dup");
}

static void put(const struct shown *what)
{
    char target[4096];
    struct stat found;
    must(stat(what->source, &found), what->source);
    snprintf(target, sizeof target, "%s/%s", wanted.stage, what->name);
    if (S_ISDIR(found.st_mode))
        must(mkdir(target, 0755), target);
    else
        close(must(open(target, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644), target));
    must(mount(what->source, target, NULL, MS_BIND, NULL), what->source);
    if (!what->writable)
        must(mount(NULL, target, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL), what->source);
}

/* In a mount namespace of its own: a file system in memory, with binds, in the place of /tmp. */
static void build(void)
{
    must(unshare(CLONE_NEWNS), "unshare");
    must(mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL), "/");
    must(mount("tmpfs", wanted.stage, "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=16m"), wanted.stage);
    for (int n = 0; n < wanted.shown_count; n++)
        put(&wanted.shown[n]);
    must(mount(wanted.stage, "/tmp", NULL, MS_BIND | MS_REC, NULL), "/tmp");
}

static void go_on(int offsets, const char *name, clockid_t clock, long long inside)
{
    struct timespec now;
    must(clock_gettime(clock, &now), name);
    long long offset = inside - (now.tv_sec * 1000000000LL + now.tv_nsec);
    long long seconds = offset / 1000000000LL, rest = offset % 1000000000LL;
    if (rest < 0)
        seconds--, rest += 1000000000LL;
    must(dprintf(offsets, "%s %lld %lld\n", name, seconds, rest), name);
}

static void enter(int user, int offsets)
{
    must(setns(user, CLONE_NEWUSER), wanted.user);
    must(setgroups(0, NULL), "setgroups");
    must(setgid(0), "setgid");
    must(setuid(0), "setuid");
    must(unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWCGROUP | CLONE_NEWTIME), "unshare");
    must(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "/");
    must(sethostname(wanted.hostname, strlen(wanted.hostname)), wanted.hostname);
    go_on(offsets, "monotonic", CLOCK_MONOTONIC, wanted.monotonic);
    go_on(offsets, "boottime", CLOCK_BOOTTIME, wanted.boottime);
    must(chdir("/tmp"), "/tmp");
}

int main(int count, char **words)
{
    parse(words + (count > 0));
    for (int n = 0; n < wanted.cgroup_count; n++)
        join(wanted.cgroups[n]);
    hand_over();
    must(dup2(must(open(wanted.net, O_RDONLY | O_CLOEXEC), wanted.net), NET_FD), "dup");
    int user = must(open(wanted.user, O_RDONLY | O_CLOEXEC), wanted.user);
    int offsets = must(open("/proc/self/timens_offsets", O_WRONLY | O_CLOEXEC), "time namespaces");
    build();
    enter(user, offsets);
    execv(wanted.program[0], wanted.program);
    refuse("%s", wanted.program[0]);
}
