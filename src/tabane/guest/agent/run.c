/* Programs in a container, as its user, each in a cgroup of its own, by which all it starts is
 * found again. What is done here between fork and exec is done in the child. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "talks.h"

enum { NOT_EXECUTABLE = 126, NOT_FOUND = 127, OPEN_FILES = 65536 };

static void group_file(char *path, size_t size, const char *group, const char *name)
{
    snprintf(path, size, "/cgroup/app/%s/%s", group, name);
}

static void write_quietly(const char *path, const char *text)
{
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file >= 0) {
        long ignored = write(file, text, strlen(text));
        (void)ignored;
        close(file);
    }
}

void kill_group(const char *group)
{
    char path[128];
    group_file(path, sizeof path, group, "cgroup.kill");
    write_quietly(path, "1");
}

void remove_group(const char *group)
{
    char path[128];
    group_file(path, sizeof path, group, "");
    rmdir(path);
}

void signal_group(const char *group, int number)
{
    char path[128], text[16384];
    group_file(path, sizeof path, group, "cgroup.procs");
    if (read_file(path, text, sizeof text) <= 0)
        return;
    for (char *word = strtok(text, "\n"); word; word = strtok(NULL, "\n"))
        kill(atoi(word), number);
}

void join_group(const char *group)
{
    char path[128];
    group_file(path, sizeof path, group, "cgroup.procs");
    write_quietly(path, "0");
}

bool make_group(const char *group)
{
    char path[128];
    group_file(path, sizeof path, group, "");
    return mkdir(path, 0755) == 0 || errno == EEXIST;
}

bool set_size(int terminal, uint16_t rows, uint16_t columns)
{
    struct winsize size = {.ws_row = rows, .ws_col = columns};
    return ioctl(terminal, TIOCSWINSZ, &size) == 0;
}

/* Those kept are root's; another user loses them with the change of the user, as everywhere. */
bool drop_capabilities(uint64_t kept)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{0}};
    for (int n = 0; prctl(PR_CAPBSET_READ, n) >= 0; n++)
        if (!(kept >> n & 1) && prctl(PR_CAPBSET_DROP, n) < 0)
            return false;
    for (int n = 0; n < 2; n++)
        data[n].effective = data[n].permitted = kept >> (32 * n);
    return syscall(SYS_capset, &header, data) == 0;
}

static void make_directories(const char *path)
{
    char part[4096];
    for (const char *end = strchr(path + 1, '/');; end = strchr(end + 1, '/')) {
        snprintf(part, sizeof part, "%.*s", (int)(end ? end - path : (long)strlen(path)), path);
        mkdir(part, 0755);
        if (!end)
            return;
    }
}

static const struct program *own_of(const struct program *program)
{
    return &program->container->program;
}

/* What says as whom it runs. */
static const struct program *user_of(const struct program *program)
{
    return program->has_user ? program : own_of(program);
}

static const char *cwd_of(const struct program *program)
{
    const char *own = own_of(program)->cwd;
    if (program->cwd && program->cwd[0])
        return program->cwd;
    return own && own[0] ? own : "/";
}

/* What a new process keeps beside 0 to 2 until it is its program: the pipe for news, and a way into its
 * cgroup. */
enum { NEWS = 3, GROUP, SPARE };

/* Into the container, as the user, with no other descriptors than those. Errors are told by their errno;
 * nothing can be undone. */
static int enter(const struct program *program, bool makes_cwd, int news, int procs)
{
    const struct program *user = user_of(program);
    struct rlimit files = {OPEN_FILES, OPEN_FILES}, cores = {0, 0};
    setrlimit(RLIMIT_NOFILE, &files);
    setrlimit(RLIMIT_CORE, &cores);
    umask(022);
    prctl(PR_SET_DUMPABLE, 0);
    if (!enter_spaces(program->container))
        return errno;
    dup3(news, NEWS, O_CLOEXEC);
    dup3(procs, GROUP, O_CLOEXEC);
    close_range(SPARE, ~0u, 0);
    if (makes_cwd)
        make_directories(cwd_of(program));
    if (chdir(cwd_of(program)) < 0)
        return errno;
    if (setgroups(user->groups_count, user->groups) < 0 || setresgid(user->gid, user->gid, user->gid) < 0)
        return errno;
    if (!drop_capabilities(own_of(program)->capabilities) ||
        setresuid(user->uid, user->uid, user->uid) < 0)
        return errno;
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ? errno : 0;
}

static const char *variable(const struct words *env, const char *name)
{
    size_t length = strlen(name);
    for (size_t n = 0; n < env->count; n++)
        if (!strncmp(env->list[n], name, length) && env->list[n][length] == '=')
            return env->list[n] + length + 1;
    return NULL;
}

/* The command's own variables over the container's. */
static void merge(struct words *into, const struct words *own, const struct words *common)
{
    size_t most = common == own ? 0 : common->count;
    into->list = calloc(own->count + most + 1, sizeof *into->list);
    into->count = own->count;
    if (!into->list)
        return;
    if (own->count)
        memcpy(into->list, own->list, own->count * sizeof *own->list);
    for (size_t n = 0; n < most; n++) {
        char name[256];
        snprintf(name, sizeof name, "%.*s", (int)strcspn(common->list[n], "="), common->list[n]);
        if (!variable(own, name))
            into->list[into->count++] = common->list[n];
    }
}

/* As a shell looks it up. Returns the errno. */
static int execute(char **args, const struct words *env)
{
    const char *paths = variable(env, "PATH");
    char path[4096];
    int problem = ENOENT;
    if (strchr(args[0], '/')) {
        execve(args[0], args, (char **)env->list);
        return errno;
    }
    for (const char *at = paths ? paths : "/bin"; *at; at += strcspn(at, ":"), at += *at == ':') {
        snprintf(path, sizeof path, "%.*s/%s", (int)strcspn(at, ":"), at, args[0]);
        execve(path, args, (char **)env->list);
        if (errno != ENOENT && errno != ENOTDIR)
            problem = errno;
    }
    return problem;
}

static void say_no_program(const char *name, const struct words *env, int problem)
{
    const char *paths = variable(env, "PATH");
    if (problem != ENOENT && problem != ENOTDIR)
        dprintf(2, "%s: cannot be executed\n", name);
    else if (strchr(name, '/') || !paths)
        dprintf(2, "%s: not found\n", name);
    else
        dprintf(2, "%s: not found (looked in %s)\n", name, paths);
}

static void reset_signals(void)
{
    sigset_t none;
    sigemptyset(&none);
    for (int n = 1; n < NSIG; n++)
        signal(n, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

struct ends {
    int in, out, err;               /* the program's; out and err may be the same */
};

static void close_ends(struct ends *ends)
{
    close(ends->in);
    if (ends->err != ends->out)
        close(ends->err);
    close(ends->out);
}

static bool open_pipes(struct ends *ends, struct streams *streams, bool has_input, uid_t owner)
{
    int in[2] = {-1, -1}, out[2], err[2];
    if (has_input ? pipe2(in, O_CLOEXEC) < 0 : (in[0] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
        return false;
    if (pipe2(out, O_CLOEXEC) < 0 || pipe2(err, O_CLOEXEC) < 0)
        return false;
    *ends = (struct ends){in[0], out[1], err[1]};
    *streams = (struct streams){in[1], out[0], err[0]};
    int ours[] = {streams->in, streams->out, streams->err};
    for (int n = 0; n < 3; n++)
        if (ours[n] >= 0)
            fcntl(ours[n], F_SETFL, O_NONBLOCK);
    int theirs[] = {ends->out, ends->err, has_input ? ends->in : ends->out};
    for (int n = 0; n < 3; n++)     /* who may then open them by name, as /dev/stderr */
        if (fchown(theirs[n], owner, -1) < 0)
            return false;
    return true;
}

static bool open_terminal(struct ends *ends, struct streams *streams, const struct program *program)
{
    char path[64];
    int unlock = 0, number;
    const char *root = program->container->root;
    snprintf(path, sizeof path, "%s/dev/pts/ptmx", root);
    int master = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (master < 0 || ioctl(master, TIOCSPTLCK, &unlock) < 0 || ioctl(master, TIOCGPTN, &number) < 0)
        return false;
    snprintf(path, sizeof path, "%s/dev/pts/%d", root, number);
    int slave = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0 || !set_size(master, program->rows, program->columns))
        return false;
    if (fchown(slave, user_of(program)->uid, 5) < 0)
        return false;
    *ends = (struct ends){slave, slave, slave};
    *streams = (struct streams){dup(master), master, -1};
    fcntl(streams->in, F_SETFD, FD_CLOEXEC);
    return streams->in >= 0;
}

static void take_ends(const struct ends *ends)
{
    dup2(ends->in, 0);
    dup2(ends->out, 1);
    dup2(ends->err, 2);
    close_range(3, ~0u, CLOSE_RANGE_CLOEXEC);
}

/* What is told of a new process until it is its program: over a pipe, by it and by who begins it. */
struct news {
    enum { BORN, NO_ENTRY, NO_BIRTH, NO_PROGRAM } what;
    int value;                      /* its pid, or an errno */
};

struct birth {
    const struct program *program;
    const char *group;
    bool makes_cwd, says_why;
    struct words env;
    int (*work)(const struct program *);    /* NULL: the program is executed */
    struct news news;               /* BORN, or why not */
    int problem;                    /* of its program; 0: none */
};

static void tell(int pipe, int what, int value)
{
    struct news news = {what, value};
    long ignored = write(pipe, &news, sizeof news);
    (void)ignored;
}

/* It goes into its cgroup itself: who begins it there would be held up by the limit of processes. */
static void __attribute__((noreturn)) live(const struct birth *birth)
{
    const struct program *program = birth->program;
    if (write(GROUP, "0", 1) != 1)
        _exit(NOT_EXECUTABLE);
    close(GROUP);
    setsid();
    if (program->has_terminal)
        ioctl(0, TIOCSCTTY, 0);
    if (birth->work) {
        close(NEWS);
        _exit(birth->work(program));
    }
    int problem = execute(program->args.list, &birth->env);
    if (birth->says_why)
        say_no_program(program->args.list[0], &birth->env, problem);
    tell(NEWS, NO_PROGRAM, problem);
    _exit(problem == ENOENT || problem == ENOTDIR ? NOT_FOUND : NOT_EXECUTABLE);
}

/* Goes into the container's namespaces and gives up all rights that its programs do not have, still
 * where none of them sees it. Only then it has a sibling, which is in the pid namespace, too. */
static void __attribute__((noreturn)) bear(const struct birth *birth, const struct ends *ends, int pipe)
{
    char path[128];
    group_file(path, sizeof path, birth->group, "cgroup.procs");
    int news = fcntl(pipe, F_DUPFD_CLOEXEC, 10);
    int procs = fcntl(open(path, O_WRONLY | O_CLOEXEC), F_DUPFD_CLOEXEC, 10);
    take_ends(ends);
    reset_signals();
    int problem = enter(birth->program, birth->makes_cwd, news, procs);
    if (problem) {
        tell(fcntl(news, F_GETFD) < 0 ? NEWS : news, NO_ENTRY, problem);
        _exit(0);
    }
    pid_t pid = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0)
        live(birth);
    tell(NEWS, pid < 0 ? NO_BIRTH : BORN, pid < 0 ? errno : pid);
    _exit(0);
}

/* Returns its pid; -1: `birth` has why there is none. */
static pid_t launch(struct birth *birth, const struct ends *ends)
{
    int said[2];
    struct news news;
    birth->news = (struct news){NO_BIRTH, ENOMEM};
    merge(&birth->env, &birth->program->env, &own_of(birth->program)->env);
    if (!birth->env.list || pipe2(said, O_CLOEXEC) < 0)
        return -1;
    pid_t helper = fork();
    if (helper == 0)
        bear(birth, ends, said[1]);
    close(said[1]);
    while (helper > 0 && read(said[0], &news, sizeof news) == sizeof news)
        if (news.what == NO_PROGRAM)
            birth->problem = news.value;
        else
            birth->news = news;
    close(said[0]);
    free(birth->env.list);
    if (helper > 0)
        waitpid(helper, NULL, 0);
    return birth->news.what == BORN ? birth->news.value : -1;
}

/* What is said of it is of which container, where there are several. */
static void __attribute__((noreturn)) fail_to_start(const struct container *container, const char *what,
                                                    const char *which, int problem)
{
    const char *name = is_main(container) ? "" : container->name;
    fail("%s%s%scannot %s %s: %s", *name ? "container " : "", name, *name ? ": " : "", what, which,
         strerror(problem));
}

void start_program(struct container *container, struct streams *streams)
{
    struct ends ends;
    char group[32];
    const struct program *program = &container->program;
    struct birth birth = {.program = program, .group = group, .makes_cwd = true};
    snprintf(group, sizeof group, "c%zu/main", number_of(container));
    if (!make_group(group) || !open_pipes(&ends, streams, false, program->uid))
        fail_to_start(container, "make", "what the program needs", errno);
    container->pid = launch(&birth, &ends);
    close_ends(&ends);
    if (birth.news.what == NO_ENTRY)
        fail_to_start(container, "enter", cwd_of(program), birth.news.value);
    if (birth.news.what == NO_BIRTH)
        fail_to_start(container, "start", "a process", birth.news.value);
    if (birth.problem)
        fail_to_start(container, "execute", program->args.list[0], birth.problem);
}

pid_t start_command(const struct program *program, const char *group, struct streams *streams,
                    char *problem, size_t size)
{
    struct ends ends;
    struct birth birth = {.program = program, .group = group, .says_why = true};
    bool opened = make_group(group) && (program->has_terminal
        ? open_terminal(&ends, streams, program)
        : open_pipes(&ends, streams, program->has_input, user_of(program)->uid));
    if (!opened) {
        snprintf(problem, size, "the guest has no room for a command: %s", strerror(errno));
        return -1;
    }
    pid_t pid = launch(&birth, &ends);
    close_ends(&ends);
    if (birth.news.what == NO_ENTRY)
        snprintf(problem, size, "workdir: there is no directory %s in the instance", cwd_of(program));
    else if (pid < 0)
        snprintf(problem, size, "the guest cannot fork: %s", strerror(birth.news.value));
    return pid;
}

/* `group`: none, for what is to be done where we are. */
pid_t start_work(const struct program *program, const char *group, int (*work)(const struct program *),
                 struct streams *streams)
{
    struct ends ends;
    struct program rooted = *program;
    struct birth birth = {.program = &rooted, .group = group, .work = work};
    rooted.cwd = "/";
    if ((group && !make_group(group)) || !open_pipes(&ends, streams, program->has_input, 0))
        return -1;
    pid_t pid = group ? launch(&birth, &ends) : fork();
    if (pid == 0) {
        take_ends(&ends);
        close_range(3, ~0u, 0);     /* no program follows, with which they would go */
        reset_signals();
        _exit(work(program));
    }
    close_ends(&ends);
    return pid;
}
