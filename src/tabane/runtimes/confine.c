/* Starts a program that serves one instance where it can reach nothing else, and waits for its end.
 *
 *     confine OPTION... -- PROGRAM ARGUMENT...
 *
 *     --cgroup FILE         a cgroup.procs to join (once for each hierarchy)
 *     --user FILE, --net FILE   namespaces to enter
 *     --id N                user and group to become there
 *     --root DIRECTORY      an empty one, for the root file system
 *     --ro PATH=SOURCE, --rw PATH=SOURCE   what is in that root, and may it be written
 *     --dev PATH            a device node like that one, which the program may open
 *     --tap FD=NAME         descriptor FD is that network device
 *     --listen FD=PATH      descriptor FD is a unix socket that listens there
 *     --open FD=PATH        descriptor FD is that file, to be read and written
 *     --read FD=PATH        descriptor FD is that file, which cannot be written to by it
 *     --write FD=PATH       descriptor FD is that pipe, to be written; waits until somebody reads it
 *     --copy FD=N           descriptor FD is the same as N, which this program was given
 *     --word FD=PATH        what the program writes to FD, the first 512 bytes, is in that file when
 *                           this process has ended
 *     --pid FILE            gets the program's pid
 *     --preload FILE        a library that the program begins with, as it sees it
 *     --files N, --size N   most descriptors it has open, and bytes of a file it writes
 *     --filter FILE         a compiled seccomp filter for it, which must let it execute and be confined more
 *
 * The program has mount, pid, ipc and uts namespaces of its own, no capabilities and none to gain, and
 * descriptors 0 to 2 and those named. This process stays beside it with no more rights and four system
 * calls, ends as it ends (128 + N: by signal N), and takes it along when it is killed. What goes wrong
 * before is said on stderr, with code 125.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_SHOWN = 64, MAX_GIVEN = 40, WORD_BYTES = 512, REFUSED = 125, FIRST_SPARE = 100 };

struct shown {
    char *path, *source;
    bool writable;
};

struct given {
    int target, file;
};

static struct shown shown[MAX_SHOWN];
static struct given given[MAX_GIVEN];
static int shown_count, given_count;
static char *root, *user, *net, *tap, *word_path, *pid_path, *filter_path, *preload;
static struct sock_filter filter[BPF_MAXINSNS];
static unsigned short filter_length;
static int tap_target, word_target, id, word = -1, word_file = -1, pid_file = -1;
static rlim_t files = 1024, size = RLIM_INFINITY;

static void __attribute__((noreturn, format(printf, 1, 2))) die(const char *form, ...)
{
    int problem = errno;
    va_list rest;
    va_start(rest, form);
    fprintf(stderr, "confine: ");
    vfprintf(stderr, form, rest);
    fprintf(stderr, ": %s\n", strerror(problem));
    exit(REFUSED);
}

/* A descriptor that no target of `--tap` and the like will overwrite. */
static int keep(int file, const char *what)
{
    int kept = file < 0 ? -1 : fcntl(file, F_DUPFD_CLOEXEC, FIRST_SPARE);
    if (kept < 0)
        die("cannot open %s", what);
    close(file);
    return kept;
}

static void give(int target, int file)
{
    if (given_count == MAX_GIVEN)
        die("too many descriptors");
    given[given_count++] = (struct given){target, file};
}

static void join_cgroup(const char *path)
{
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0 || write(file, "0", 1) != 1)
        die("cannot join %s", path);
    close(file);
}

/* By way of its directory's descriptor: a socket's name is short. */
static int listen_at(char *path)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    char *slash = strrchr(path, '/');
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (!slash)
        die("%s is not absolute", path);
    *slash = 0;
    int directory = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    *slash = '/';
    snprintf(at.sun_path, sizeof at.sun_path, "/proc/self/fd/%d%s", directory, slash);
    umask(0177);
    if (directory < 0 || sock < 0 || bind(sock, (struct sockaddr *)&at, sizeof at) < 0 || listen(sock, 4) < 0)
        die("cannot listen at %s", path);
    umask(022);
    close(directory);
    return sock;
}

/* "KEY=VALUE" in two. */
static char *split(char *text)
{
    char *value = strchr(text, '=');
    if (!value)
        die("%s lacks a value", text);
    *value = 0;
    return value + 1;
}

static void show(char *text, bool writable)
{
    if (shown_count == MAX_SHOWN)
        die("too much in the root");
    char *source = split(text);
    shown[shown_count++] = (struct shown){text, source, writable};
}

static void show_device(char *path)
{
    if (shown_count == MAX_SHOWN)
        die("too much in the root");
    shown[shown_count++] = (struct shown){path, path, true};
}

static char **parse(char **at)
{
    for (; *at && strcmp(*at, "--"); at += 2) {
        char *option = at[0], *value = at[1], *more;
        if (!value)
            die("%s lacks a value", option);
        if (!strcmp(option, "--cgroup")) join_cgroup(value);
        else if (!strcmp(option, "--user")) user = value;
        else if (!strcmp(option, "--net")) net = value;
        else if (!strcmp(option, "--id")) id = atoi(value);
        else if (!strcmp(option, "--root")) root = value;
        else if (!strcmp(option, "--ro")) show(value, false);
        else if (!strcmp(option, "--rw")) show(value, true);
        else if (!strcmp(option, "--dev")) show_device(value);
        else if (!strcmp(option, "--tap")) tap = split(value), tap_target = atoi(value);
        else if (!strcmp(option, "--listen")) {
            more = split(value);
            give(atoi(value), keep(listen_at(more), more));
        }
        else if (!strcmp(option, "--open")) {
            more = split(value);
            give(atoi(value), keep(open(more, O_RDWR | O_NOFOLLOW | O_CLOEXEC), more));
        }
        else if (!strcmp(option, "--read")) {
            more = split(value);
            give(atoi(value), keep(open(more, O_RDONLY | O_NOFOLLOW | O_CLOEXEC), more));
        }
        else if (!strcmp(option, "--write")) {
            more = split(value);
            give(atoi(value), keep(open(more, O_WRONLY | O_NOFOLLOW | O_CLOEXEC), more));
        }
        else if (!strcmp(option, "--copy")) {
            more = split(value);
            give(atoi(value), keep(dup(atoi(more)), "a descriptor"));
        }
        else if (!strcmp(option, "--word")) word_path = split(value), word_target = atoi(value);
        else if (!strcmp(option, "--pid")) pid_path = value;
        else if (!strcmp(option, "--preload")) preload = value;
        else if (!strcmp(option, "--files")) files = strtoull(value, NULL, 10);
        else if (!strcmp(option, "--size")) size = strtoull(value, NULL, 10);
        else if (!strcmp(option, "--filter")) filter_path = value;
        else die("unknown option %s", option);
    }
    if (!at[0] || !at[1] || !user || !net || !root)
        die("a program, --user, --net and --root are needed");
    return at + 1;
}

static int open_tap(void)
{
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    int device = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", tap);
    if (device < 0 || ioctl(device, TUNSETIFF, &request) < 0)
        die("cannot open the network device %s", tap);
    return device;
}

static void enter(int space, int kind, const char *path)
{
    if (setns(space, kind) < 0)
        die("cannot enter %s", path);
}

static void make_parents(char *path)
{
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0755);
        *slash = '/';
    }
}

static void attach(const struct shown *one)
{
    char target[4096];
    struct stat found;
    if (lstat(one->source, &found) < 0)
        die("cannot show %s", one->source);
    snprintf(target, sizeof target, "%s%s", root, one->path);
    make_parents(target);
    if (S_ISCHR(found.st_mode)) {    /* the machine's own may be for root alone */
        if (mknod(target, S_IFCHR, found.st_rdev) < 0 || chmod(target, 0666) < 0)
            die("cannot make %s", target);
        return;
    }
    if (S_ISLNK(found.st_mode)) {
        char link[4096];
        long length = readlink(one->source, link, sizeof link - 1);
        link[length < 0 ? 0 : length] = 0;
        if (symlink(link, target) < 0)
            die("cannot make %s", target);
        return;
    }
    bool is_directory = S_ISDIR(found.st_mode);
    if (is_directory ? mkdir(target, 0755) < 0 && errno != EEXIST : mknod(target, S_IFREG | 0644, 0) < 0)
        die("cannot make %s", target);
    unsigned long flags = MS_BIND | MS_REMOUNT | MS_NOSUID | MS_NODEV | (one->writable ? 0 : MS_RDONLY);
    if (mount(one->source, target, NULL, MS_BIND, NULL) < 0 || mount(NULL, target, NULL, flags, NULL) < 0)
        die("cannot show %s", one->source);
}

static void make_root(void)
{
    if (unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS) < 0)
        die("cannot make namespaces");
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        die("cannot make mounts private");
    if (mount("root", root, "tmpfs", MS_NOSUID, "size=64k,mode=0755") < 0)
        die("cannot mount a root on %s", root);
    for (int n = 0; n < shown_count; n++)
        attach(&shown[n]);
    if (chdir(root) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0)
        die("cannot enter the root");
    if (mount(NULL, "/", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID, NULL) < 0 || chdir("/") < 0)
        die("cannot make the root read-only");
}

static void drop_rights(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {{0}};
    for (int n = 0; prctl(PR_CAPBSET_READ, n) >= 0; n++)
        if (prctl(PR_CAPBSET_DROP, n) < 0)
            die("cannot drop capability %d", n);
    if (setgroups(0, NULL) < 0 || setresgid(id, id, id) < 0 || setresuid(id, id, id) < 0)
        die("cannot become %d", id);
    if (syscall(SYS_capset, &header, none) < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        die("cannot drop all rights");
}

static void set_limits(void)
{
    struct rlimit open_files = {files, files}, largest = {size, size}, cores = {0, 0};
    if (setrlimit(RLIMIT_NOFILE, &open_files) < 0 || setrlimit(RLIMIT_FSIZE, &largest) < 0 ||
        setrlimit(RLIMIT_CORE, &cores) < 0)
        die("cannot set limits");
}

static void open_own(void)
{
    int ends[2];
    if (word_path) {
        word_file = keep(open(word_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), word_path);
        if (pipe2(ends, O_CLOEXEC) < 0)
            die("cannot make a pipe");
        word = keep(ends[0], "a pipe");
        fcntl(word, F_SETFL, O_NONBLOCK);
        give(word_target, keep(ends[1], "a pipe"));
    }
    if (filter_path) {
        int file = open(filter_path, O_RDONLY | O_CLOEXEC);
        long length = file < 0 ? -1 : read(file, filter, sizeof filter);
        if (length <= 0 || length % sizeof *filter)
            die("cannot read the filter %s", filter_path);
        close(file);
        filter_length = length / sizeof *filter;
    }
    if (pid_path)
        pid_file = keep(open(pid_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), pid_path);
}

static void install(struct sock_filter *list, unsigned short length)
{
    struct sock_fprog program = {length, list};
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0)
        die("cannot give up system calls");
}

/* `alive` is a pipe whose other end goes with this program's parent, also before the kernel was asked
 * to tell of its end. */
static void __attribute__((noreturn)) become(char **program, const int alive[2])
{
    struct pollfd parent = {.fd = alive[0], .events = POLLIN};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(alive[1]);
    if (poll(&parent, 1, 0) != 0)
        _exit(REFUSED);
    setsid();
    for (int n = 0; n < given_count; n++)
        if (dup2(given[n].file, given[n].target) < 0)
            die("cannot pass descriptor %d", given[n].target);
    close_range(FIRST_SPARE, ~0u, CLOSE_RANGE_CLOEXEC);
    if (preload)
        setenv("LD_PRELOAD", preload, 1);
    if (filter_length)
        install(filter, filter_length);
    execv(program[0], program);
    die("cannot execute %s", program[0]);
}

static void tell_pid(pid_t pid)
{
    char text[32];
    int length = snprintf(text, sizeof text, "%d\n", pid);
    if (pid_file >= 0 && write(pid_file, text, length) != length)
        die("cannot write %s", pid_path);
}

#if defined(__x86_64__)
enum { ARCHITECTURE = AUDIT_ARCH_X86_64 };
#elif defined(__aarch64__)
enum { ARCHITECTURE = AUDIT_ARCH_AARCH64 };
#endif

/* What is left to do: wait for the program's end, keep its word, end. Any other call ends this process,
 * and with it the program. */
static void give_up_calls(void)
{
    struct sock_filter list[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 0, 5),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_wait4, 4, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_read, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_write, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    install(list, sizeof list / sizeof *list);
}

static void keep_word(void)
{
    char text[WORD_BYTES];
    long length = word >= 0 ? read(word, text, sizeof text) : 0;
    if (length > 0 && write(word_file, text, length) != length)
        die("cannot write %s", word_path);
}

int main(int argc, char **argv)
{
    int status, alive[2];
    (void)argc;
    char **program = parse(argv + 1);
    open_own();
    int user_space = keep(open(user, O_RDONLY | O_CLOEXEC), user);
    enter(keep(open(net, O_RDONLY | O_CLOEXEC), net), CLONE_NEWNET, net);
    if (tap)
        give(tap_target, keep(open_tap(), "a network device"));
    make_root();
    set_limits();
    enter(user_space, CLONE_NEWUSER, user);
    if (unshare(CLONE_NEWPID) < 0)
        die("cannot make a pid namespace");
    drop_rights();
    pid_t pid = pipe2(alive, O_CLOEXEC) < 0 ? -1 : fork();
    if (pid < 0)
        die("cannot fork");
    if (pid == 0)
        become(program, alive);
    for (int n = 0; n < given_count; n++)
        close(given[n].file);
    close(0);
    close(1);
    tell_pid(pid);
    give_up_calls();
    while (waitpid(pid, &status, 0) < 0)
        ;
    keep_word();
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}
