/* Copies what a machine says of one of its containers to stdout and stderr, until it has said all.
 *
 *     relay OPTION... OUT ERR
 *
 *     --cgroup FILE   a cgroup.procs to join (once for each hierarchy)
 *     --id N          user and group to become
 *
 * OUT and ERR are pipes that are there, or where unix sockets are to listen, each for one connection.
 * What is left to it then are the system calls for copying. What goes wrong before is said on stderr,
 * with code 125.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

enum { REFUSED = 125, BLOCK = 65536 };

static void __attribute__((noreturn)) die(const char *what, const char *which)
{
    fprintf(stderr, "relay: cannot %s %s: %s\n", what, which, strerror(errno));
    exit(REFUSED);
}

static void join_cgroup(const char *path)
{
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0 || write(file, "0", 1) != 1)
        die("join", path);
    close(file);
}

static void become(int id)
{
    for (int n = 0; prctl(PR_CAPBSET_READ, n) >= 0; n++)
        if (prctl(PR_CAPBSET_DROP, n) < 0)
            die("drop", "capabilities");
    if (setgroups(0, NULL) < 0 || setresgid(id, id, id) < 0 || setresuid(id, id, id) < 0 ||
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        die("become", "the app's user");
}

/* By way of its directory's descriptor: a socket's name is short. */
static int listen_at(char *path)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    char *slash = strrchr(path, '/');
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    *slash = 0;
    int directory = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    *slash = '/';
    snprintf(at.sun_path, sizeof at.sun_path, "/proc/self/fd/%d%s", directory, slash);
    umask(0177);
    if (directory < 0 || sock < 0 || bind(sock, (struct sockaddr *)&at, sizeof at) < 0 || listen(sock, 1) < 0)
        die("listen at", path);
    close(directory);
    return sock;
}

static bool is_pipe(const char *path)
{
    struct stat found;
    return stat(path, &found) == 0 && S_ISFIFO(found.st_mode);
}

/* A pipe is opened once it has a writer. */
static int open_place(char *path)
{
    int file = is_pipe(path) ? open(path, O_RDONLY | O_CLOEXEC) : listen_at(path);
    if (file < 0)
        die("open", path);
    return file;
}

#if defined(__x86_64__)
enum { ARCHITECTURE = AUDIT_ARCH_X86_64, POLL = SYS_poll };
#elif defined(__aarch64__)
enum { ARCHITECTURE = AUDIT_ARCH_AARCH64, POLL = SYS_ppoll };
#endif

static void give_up_calls(void)
{
    struct sock_filter list[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 0, 7),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, POLL, 6, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_read, 5, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_write, 4, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_accept4, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_close, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof list / sizeof *list, list};
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0)
        die("give up", "system calls");
}

/* False: there is no more. */
static bool copy(int from, int to)
{
    static char block[BLOCK];
    long got = read(from, block, sizeof block);
    for (long done = 0, written; done < got; done += written)
        if ((written = write(to, block + done, got - done)) <= 0)
            return false;
    return got > 0;
}

int main(int argc, char **argv)
{
    struct pollfd places[2];
    bool listens[2];
    int at = 1;
    for (; at + 3 < argc && argv[at][0] == '-'; at += 2) {
        if (!strcmp(argv[at], "--cgroup"))
            join_cgroup(argv[at + 1]);
        else
            become(atoi(argv[at + 1]));
    }
    if (argc - at != 2)
        die("do without", "two places");
    for (int n = 0; n < 2; n++) {
        listens[n] = !is_pipe(argv[at + n]);
        places[n] = (struct pollfd){.fd = open_place(argv[at + n]), .events = POLLIN};
    }
    give_up_calls();
    while (places[0].fd >= 0 || places[1].fd >= 0) {
        if (poll(places, 2, -1) < 0)
            return REFUSED;
        for (int n = 0; n < 2; n++) {
            if (places[n].fd < 0 || !places[n].revents)
                continue;
            if (listens[n]) {
                int next = accept4(places[n].fd, NULL, NULL, SOCK_CLOEXEC);
                close(places[n].fd);
                places[n].fd = next;
                listens[n] = false;
            } else if (!copy(places[n].fd, 1 + n)) {
                close(places[n].fd);
                places[n].fd = -1;
            }
        }
    }
    return 0;
}
