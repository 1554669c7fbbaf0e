/* From a process of root's to one that can do next to nothing: into the instance's cgroup, out of the
 * machine's files, into the link's user and network namespaces, without capabilities, and at last with
 * a list of the few system calls that are left. Whatever fails ends the process: there is no weaker
 * way. */

#define _GNU_SOURCE
#include "host.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FAILED = 'F', RUNNING = 'R', EXEC = 'E', LAST_CAPABILITY = 63, OPEN_FILES = 4096, HEAP_BYTES = 16 << 20 };

static int errors = STDERR_FILENO;
static int parent = -1;
static int user_fd = -1, network_fd = -1;

static void tell(char what)
{
    struct iovec one = {&what, 1};
    if (parent >= 0 && writev(parent, &one, 1) < 0)
        _exit(1); /* nobody would know of this process */
}

void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vdprintf(errors, format, arguments);
    va_end(arguments);
    dprintf(errors, "\n");
    tell(FAILED);
    _exit(1);
}

void fail_errno(const char *what, const char *which)
{
    fail("%s %s failed: %s", what, which, strerror(errno));
}

void open_error_file(const char *path)
{
    errors = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (errors < 0) {
        errors = STDERR_FILENO;
        fail_errno("opening", path);
    }
}

void tell_running(void)
{
    tell(RUNNING); /* the pipe stays open: to close it would be a call more */
}

void tell_exec(void)
{
    tell(EXEC);
}

/* The cgroup, and a process of its own */

static void write_file(const char *path, const char *text)
{
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0 || write(file, text, strlen(text)) < 0)
        fail_errno("writing to", path);
    close(file);
}

/* Version 1 moves the one thread there is by `tasks`, for which no other process has to wait. */
static void join_cgroups(struct confinement *what)
{
    char path[4096];
    for (const char **cgroup = what->cgroups; *cgroup; cgroup++) {
        snprintf(path, sizeof path, "%s/tasks", *cgroup);
        if (access(path, F_OK))
            snprintf(path, sizeof path, "%s/cgroup.procs", *cgroup);
        write_file(path, "0");
    }
}

static int open_namespace(const char *path)
{
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (path && file < 0)
        fail_errno("opening", path);
    return file;
}

static void write_pid(const char *path, pid_t pid)
{
    char fresh[4096];
    snprintf(fresh, sizeof fresh, "%s.new", path);
    FILE *file = fopen(fresh, "we");
    if (!file || fprintf(file, "%d", pid) < 0 || fclose(file) || rename(fresh, path))
        fail_errno("writing", path);
}

/* Waits for the child's word; EXEC counts once nothing comes after it. */
static _Noreturn void leave(int child_says, pid_t pid, const char *pid_file)
{
    char word = 0, next;
    while (word != RUNNING && read(child_says, &next, 1) == 1)
        word = next;
    if (word != RUNNING && word != EXEC) {
        if (word != FAILED)
            dprintf(errors, "it ended before it ran\n");
        waitpid(pid, NULL, 0);
        _exit(1);
    }
    write_pid(pid_file, pid);
    _exit(0);
}

void begin(struct confinement *what, bool own_pids)
{
    int pipes[2];
    join_cgroups(what);
    user_fd = open_namespace(what->user_namespace);
    network_fd = open_namespace(what->network_namespace);
    if (unshare(CLONE_NEWIPC | CLONE_NEWUTS | (own_pids ? CLONE_NEWPID : 0)))
        fail_errno("making", "namespaces");
    if (!what->pid_file)
        return;
    if (pipe2(pipes, O_CLOEXEC))
        fail_errno("making", "a pipe");
    pid_t pid = fork();
    if (pid < 0)
        fail_errno("starting", "a process");
    close(pipes[pid ? 1 : 0]);
    if (pid)
        leave(pipes[0], pid, what->pid_file);
    parent = pipes[1];
    if (setsid() < 0)
        fail_errno("making", "a session");
}

/* Files: a tree in memory with nothing but what is bound or made in it */

static void make_directories(char *path)
{
    for (char *slash = path + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        if (mkdir(path, 0755) && errno != EEXIST)
            fail_errno("making", path);
        *slash = '/';
    }
}

/* The device itself, for whoever sees the tree: that is one process. */
static void make_device(const char *target, dev_t device)
{
    if (mknod(target, S_IFCHR | 0666, device) || chmod(target, 0666))
        fail_errno("making", target);
}

static void make_mount_point(const char *target, bool is_directory)
{
    int made = is_directory ? mkdir(target, 0755) : open(target, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
    if (made < 0 && errno != EEXIST)
        fail_errno("making", target);
    if (made > 0)
        close(made);
}

static void bind_one(const char *root, const char *text)
{
    char copy[8192], target[8192];
    snprintf(copy, sizeof copy, "%s", text);
    char *source = strtok(copy, ":"), *inside = strtok(NULL, ":"), *how = strtok(NULL, ":");
    struct stat found;
    if (!source || !inside || stat(source, &found))
        fail_errno("finding", text);
    snprintf(target, sizeof target, "%s%s", root, inside);
    make_directories(target);
    if (S_ISCHR(found.st_mode)) {
        make_device(target, found.st_rdev);
        return;
    }
    make_mount_point(target, S_ISDIR(found.st_mode));
    unsigned long flags = MS_BIND | MS_REMOUNT | MS_NOSUID | MS_NODEV | (how ? 0 : MS_RDONLY);
    if (mount(source, target, NULL, MS_BIND, NULL) || mount(NULL, target, NULL, flags, NULL))
        fail_errno("binding", text);
}

static void leave_files(struct confinement *what)
{
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
        fail_errno("parting from", "the machine's mounts");
    if (mount("tmpfs", what->root, "tmpfs", MS_NOSUID, "mode=755,size=64k,nr_inodes=256"))
        fail_errno("mounting on", what->root);
    umask(022);
    for (const char **bind = what->binds; *bind; bind++)
        bind_one(what->root, *bind);
    if (mount(NULL, what->root, NULL, MS_REMOUNT | MS_NOSUID | MS_RDONLY, "size=64k,nr_inodes=256"))
        fail_errno("sealing", what->root);
    if (chdir(what->root) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
        fail_errno("changing to", what->root);
}

/* Users and what they may */

static void drop_capabilities(void)
{
    for (int capability = 0; capability <= LAST_CAPABILITY; capability++)
        if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) && errno != EINVAL)
            fail_errno("dropping", "capabilities");
}

static void give_up_users(unsigned id)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2] = {{0}};
    if (setgroups(0, NULL) || setresgid(id, id, id) || setresuid(id, id, id))
        fail_errno("becoming", "an ordinary user");
    if (syscall(SYS_capset, &header, none))
        fail_errno("dropping", "capabilities");
}

static void limit(int which, rlim_t most)
{
    struct rlimit limits;
    if (getrlimit(which, &limits))
        fail_errno("reading", "limits");
    if (limits.rlim_max == RLIM_INFINITY || limits.rlim_max > most)
        limits.rlim_max = most;
    limits.rlim_cur = limits.rlim_max;
    if (setrlimit(which, &limits))
        fail_errno("setting", "limits");
}

void confine(struct confinement *what)
{
    leave_files(what);
    if (user_fd >= 0 && setns(user_fd, CLONE_NEWUSER))
        fail_errno("joining", "the user namespace");
    if (network_fd >= 0 && setns(network_fd, CLONE_NEWNET))
        fail_errno("joining", "the network namespace");
    if (network_fd < 0 && unshare(CLONE_NEWNET))
        fail_errno("making", "a network namespace");
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_NOFILE, OPEN_FILES);
    if (what->cpu_s)
        limit(RLIMIT_CPU, what->cpu_s);
    if (what->address_bytes)
        limit(RLIMIT_AS, what->address_bytes);
    drop_capabilities();
    give_up_users(what->id);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        fail_errno("giving up", "new privileges");
    close(user_fd);
    close(network_fd);
}

/* System calls. The file must be read before the files are left behind. */

static struct sock_fprog program;

static void read_filter(const char *path)
{
    static struct sock_filter filter[BPF_MAXINSNS];
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = file < 0 ? -1 : read(file, filter, sizeof filter);
    if (size <= 0 || size % sizeof *filter)
        fail_errno("reading", path);
    close(file);
    program = (struct sock_fprog){size / sizeof *filter, filter};
}

void load_filter(const struct confinement *what)
{
    read_filter(what->filter);
}

/* So much is there from now on: to ask for more would be a system call. Untouched, it costs nothing. */
static void reserve_heap(void)
{
    void *volatile heap = malloc(HEAP_BYTES); /* volatile, or the compiler leaves the two out */
    free(heap);
}

void install_filter(const struct confinement *what)
{
    if (!program.len)
        fail("%s was not loaded", what->filter);
    reserve_heap();
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program))
        fail_errno("installing", what->filter);
}
