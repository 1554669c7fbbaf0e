/* The containers of the machine: each has a root file system of its own, an image under what is written
 * to it, and pid, mount, ipc and cgroup namespaces, which a first process of ours holds. They share the
 * network and the machine's name.
 *
 * Here all of it is below /pod, which no container sees: the first process moves its container's root
 * out of there, lets go of the rest, and makes it the namespace's. Programs join the namespaces. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/bpf.h>
#include <linux/openat2.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include "talks.h"

enum { OWN_SPACES = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC };

static const char *const hidden[] = {"/pod", "/cgroup", "/dev", "/sys", "/proc"};

size_t number_of(const struct container *container)
{
    return container - order.containers;
}

bool is_main(const struct container *container)
{
    return number_of(container) == order.count - 1;
}

/* By its name; NULL: the main one. */
struct container *find_container(const char *name)
{
    if (!name || !*name)
        return &order.containers[order.count - 1];
    for (size_t n = 0; n < order.count; n++)
        if (!strcmp(order.containers[n].name, name))
            return &order.containers[n];
    return NULL;
}

static int open_inside(int root, const char *path)
{
    struct open_how how = {.flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};
    return syscall(SYS_openat2, root, path, &how, sizeof how);
}

/* The directory that who has this root calls `path`, made where it is not there. The image's links lead
 * nowhere but into the image. */
int reach(const char *root_path, const char *path)
{
    char part[4096];
    int root = open(root_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC), above = dup(root);
    snprintf(part, sizeof part, "%s", path);
    for (char *slash = part; slash; *slash = '/') {
        char *name = slash + 1;
        slash = strchr(name, '/');
        if (slash)
            *slash = 0;
        int next = open_inside(root, part);
        if (next < 0 && errno == ENOENT && !mkdirat(above, name, 0755))
            next = open_inside(root, part);
        if (next < 0)
            fail("cannot make the directory %s: %s", part, strerror(errno));
        close(above);
        above = next;
        if (!slash)
            break;
    }
    close(root);
    return above;
}

static void make_node(const char *root, const char *name, mode_t mode, int major, int minor)
{
    char path[64];
    snprintf(path, sizeof path, "%s/dev/%s", root, name);
    if (mknod(path, S_IFCHR | mode, makedev(major, minor)) < 0 || chmod(path, mode) < 0)
        fail("cannot make %s: %s", path, strerror(errno));
}

static void attach_below(const char *root, const char *name, const char *kind, unsigned long flags,
                         const char *options)
{
    char target[64];
    snprintf(target, sizeof target, "%s/%s", root, name);
    attach(kind, target, kind, flags, options);
}

/* As in a container: a few devices, no disk and no port among them. */
static void make_devices(const char *root, const char *layer)
{
    static const char *const links[][2] = {{"/proc/self/fd", "fd"}, {"pts/ptmx", "ptmx"},
        {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"}};
    char path[64], target[64];
    attach_below(root, "dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "size=64k,mode=0755");
    make_node(root, "null", 0666, 1, 3);
    make_node(root, "zero", 0666, 1, 5);
    make_node(root, "full", 0666, 1, 7);
    make_node(root, "random", 0666, 1, 8);
    make_node(root, "urandom", 0666, 1, 9);
    make_node(root, "tty", 0666, 5, 0);
    for (size_t n = 0; n < sizeof links / sizeof *links; n++) {
        snprintf(path, sizeof path, "%s/dev/%s", root, links[n][1]);
        if (symlink(links[n][0], path) < 0)
            fail("cannot make %s: %s", path, strerror(errno));
    }
    attach_below(root, "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "ptmxmode=0666,mode=0620,gid=5");
    snprintf(path, sizeof path, "%s/shm", layer);
    snprintf(target, sizeof target, "%s/dev/shm", root);
    if (mkdir(path, 01777) < 0 || chmod(path, 01777) < 0)
        fail("cannot make %s: %s", path, strerror(errno));
    attach(path, target, NULL, MS_BIND, NULL);
}

static void write_etc(const char *root)
{
    char etc[64];
    struct stat found;
    snprintf(etc, sizeof etc, "%s/etc", root);
    if (lstat(etc, &found) < 0 && mkdir(etc, 0755) < 0)
        fail("cannot make /etc: %s", strerror(errno));
    if (!lstat(etc, &found) && !S_ISDIR(found.st_mode))
        fail("the image's /etc is not a directory: make it one");
    int directory = open(etc, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (size_t n = 0; n < order.files.count; n++) {
        char *text = strchr(order.files.list[n], '='), name[256];
        if (!text)
            fail("a file of the start order has no name");
        snprintf(name, sizeof name, "%.*s", (int)(text - order.files.list[n]), order.files.list[n]);
        text++;
        unlinkat(directory, name, 0);
        int file = openat(directory, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
        if (file < 0 || write(file, text, strlen(text)) != (long)strlen(text))
            fail("cannot write /etc/%s: %s", name, strerror(errno));
        fchmod(file, 0644);
        close(file);
    }
    close(directory);
}

/* An image that several containers have is mounted once. */
static void mount_image(const char *serial, char *target, size_t size)
{
    char disk[DISK_PATH];
    snprintf(target, size, "/pod/%s", serial);
    if (!access(target, F_OK))
        return;
    if (!find_disk(serial, disk))
        fail("there is no disk with the image %s", serial);
    attach(disk, target, "ext4", MS_RDONLY | MS_NODEV, "noload");
}

static void make_root(struct container *container)
{
    char image[64], layer[32], up[48], work[48], options[256];
    struct stat top;
    mount_image(container->image, image, sizeof image);
    snprintf(container->root, sizeof container->root, "/pod/c%zu", number_of(container));
    snprintf(layer, sizeof layer, "/pod/layer/c%zu", number_of(container));
    snprintf(up, sizeof up, "%s/up", layer);
    snprintf(work, sizeof work, "%s/work", layer);
    if (stat(image, &top) < 0 || mkdir(layer, 0711) < 0 || mkdir(work, 0700) < 0 || mkdir(up, 0700) < 0)
        fail("the disk for what is written is not fresh: %s", strerror(errno));
    if (chown(up, top.st_uid, top.st_gid) < 0 || chmod(up, top.st_mode & 07777) < 0)
        fail("cannot prepare %s: %s", layer, strerror(errno));
    snprintf(options, sizeof options, "lowerdir=%s,upperdir=%s,workdir=%s", image, up, work);
    attach("overlay", container->root, "overlay", MS_NODEV | MS_NOSUID, options);
    attach_below(container->root, "sys", "sysfs", MS_NOSUID | MS_NOEXEC | MS_NODEV | MS_RDONLY, NULL);
    make_devices(container->root, layer);
    write_etc(container->root);
}

/* Leave nothing but the container's root in the namespace. Returns what failed. */
static const char *take_root(const char *root)
{
    char proc[64];
    snprintf(proc, sizeof proc, "%s/proc", root);
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        return "make mounts private";
    mkdir(proc, 0755);
    if (mount("proc", proc, "proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL) < 0)
        return "mount /proc";
    if (mount(root, "/root", NULL, MS_MOVE, NULL) < 0)
        return "move the root";
    for (size_t n = 0; n < sizeof hidden / sizeof *hidden; n++)
        if (umount2(hidden[n], MNT_DETACH) < 0)
            return "let go of what is not its own";
    if (chdir("/root") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        return "enter the root";
    return NULL;
}

static const char *let_go(void)
{
    int nothing = open("/dev/null", O_RDWR);
    for (int n = 0; n < 3; n++)
        if (dup2(nothing, n) < 0)
            return "open /dev/null";
    close(nothing);
    return drop_capabilities(0) ? NULL : "drop capabilities";
}

static const char *take_spaces(const struct container *container)
{
    char group[32];
    const char *problem;
    snprintf(group, sizeof group, "c%zu", number_of(container));
    join_group(group);              /* the root that the namespace shows */
    if (unshare(CLONE_NEWCGROUP) < 0)
        return "make a cgroup namespace";
    strcat(group, "/init");
    join_group(group);
    problem = take_root(container->root);
    return problem ? problem : let_go();
}

/* The first process in the namespaces: what loses its parent there becomes its child. `tell` is told
 * what fails. */
static void __attribute__((noreturn)) hold_spaces(const struct container *container, int tell)
{
    enum { TELL = 3 };
    sigset_t wanted;
    prctl(PR_SET_DUMPABLE, 0);
    dup2(tell, TELL);
    close_range(TELL + 1, ~0u, 0);
    const char *problem = take_spaces(container);
    if (problem) {
        dprintf(TELL, "%s: %s", problem, strerror(errno));
        _exit(1);
    }
    close(TELL);
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGCHLD);
    sigprocmask(SIG_SETMASK, &wanted, NULL);
    for (;;) {
        sigwaitinfo(&wanted, NULL);
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
    }
}

static void make_spaces(struct container *container)
{
    int said[2];
    char group[32], problem[256];
    snprintf(group, sizeof group, "c%zu", number_of(container));
    bool has_groups = make_group(group);
    snprintf(group, sizeof group, "c%zu/init", number_of(container));
    if (!has_groups || !make_group(group) || pipe2(said, O_CLOEXEC) < 0)
        fail("cannot make what a container needs: %s", strerror(errno));
    pid_t pid = syscall(SYS_clone, OWN_SPACES | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0)
        hold_spaces(container, said[1]);
    close(said[1]);
    long got = pid < 0 ? 0 : read(said[0], problem, sizeof problem - 1);
    close(said[0]);
    if (got > 0)
        fail("a container cannot %.*s", (int)got, problem);
    container->spaces = pid < 0 ? -1 : syscall(SYS_pidfd_open, pid, 0);
    if (container->spaces < 0)
        fail("cannot make a container's namespaces: %s", strerror(errno));
}

/* Whose root it has then; what it forks afterwards is in the pid namespace, too. */
bool enter_spaces(const struct container *container)
{
    return setns(container->spaces, OWN_SPACES | CLONE_NEWCGROUP) == 0;
}

/* Whatever capabilities they have, what is in containers opens no disk and no port to the host: of
 * devices, those of memory (1: null, zero, random), terminals (5, and 136 of /dev/pts) alone. */
static void deny_devices(void)
{
    enum { R0, R1, R2, R3, MAJOR = offsetof(struct bpf_cgroup_dev_ctx, major),
           TYPE = offsetof(struct bpf_cgroup_dev_ctx, access_type) };
    struct bpf_insn list[] = {
        {BPF_LDX | BPF_MEM | BPF_W, R2, R1, TYPE, 0},
        {BPF_ALU | BPF_AND | BPF_K, R2, 0, 0, 0xffff},
        {BPF_LDX | BPF_MEM | BPF_W, R3, R1, MAJOR, 0},
        {BPF_ALU64 | BPF_MOV | BPF_K, R0, 0, 0, 1},
        {BPF_JMP | BPF_JNE | BPF_K, R2, 0, 3, BPF_DEVCG_DEV_CHAR},
        {BPF_JMP | BPF_JEQ | BPF_K, R3, 0, 3, 1},
        {BPF_JMP | BPF_JEQ | BPF_K, R3, 0, 2, 5},
        {BPF_JMP | BPF_JEQ | BPF_K, R3, 0, 1, 136},
        {BPF_ALU64 | BPF_MOV | BPF_K, R0, 0, 0, 0},
        {BPF_JMP | BPF_EXIT, 0, 0, 0, 0},
    };
    union bpf_attr load = {.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE, .insns = (uintptr_t)list,
                           .insn_cnt = sizeof list / sizeof *list, .license = (uintptr_t)"GPL"};
    int program = syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof load);
    int group = open("/cgroup/app", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    union bpf_attr attach_it = {.target_fd = group, .attach_bpf_fd = program,
                                .attach_type = BPF_CGROUP_DEVICE};
    if (program < 0 || group < 0 || syscall(SYS_bpf, BPF_PROG_ATTACH, &attach_it, sizeof attach_it) < 0)
        fail("cannot keep containers from devices: %s", strerror(errno));
    close(program);
    close(group);
}

static void make_groups(void)
{
    attach("cgroup", "/cgroup", "cgroup2", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL);
    write_file("/cgroup/cgroup.subtree_control", "+memory +pids");
    if (mkdir("/cgroup/app", 0755) < 0)
        fail("cannot make a cgroup: %s", strerror(errno));
    write_file("/proc/sys/vm/overcommit_memory", "1");  /* who takes too much is killed, not refused */
    if (!limit(&order))
        fail("cannot limit memory and processes: %s", strerror(errno));
    deny_devices();
}

void make_containers(void)
{
    char layer[DISK_PATH];
    attach("pod", "/pod", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0711");
    if (!find_disk("layer", layer))
        fail("there is no disk for what is written");
    attach(layer, "/pod/layer", "ext4", MS_NOATIME | MS_NODEV, "errors=remount-ro");
    if (mkdir("/root", 0700) < 0 && errno != EEXIST)
        fail("cannot make /root: %s", strerror(errno));
    for (size_t n = 0; n < order.count; n++)
        make_root(&order.containers[n]);
    mount_volumes();
    open_services();
    make_groups();
    for (size_t n = 0; n < order.count; n++)
        make_spaces(&order.containers[n]);
}
