/* Volumes: disks that outlive the machine, with the serial numbers `volume0` and so on. Of each file
 * system the directory `data` is what the app sees. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"

#define DATA "data"

static size_t mounted;

static void name_volume(char *name, size_t number)
{
    sprintf(name, "/volume%zu", number);
}

static int open_inside(int root, const char *path)
{
    struct open_how how = {.flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};
    return syscall(SYS_openat2, root, path, &how, sizeof how);
}

/* The directory that the app calls `path`, made where it is not there. The image's links lead nowhere
 * but into the image. */
static int reach(const char *path)
{
    char part[4096];
    int root = open("/app", O_RDONLY | O_DIRECTORY | O_CLOEXEC), above = dup(root);
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
            fail("cannot make a volume's directory %s: %s", part, strerror(errno));
        close(above);
        above = next;
        if (!slash)
            break;
    }
    close(root);
    return above;
}

/* New, it belongs to whom the image's directory does. The name is there only for what is complete. */
static void make_data(int volume, int like)
{
    struct stat found;
    if (!fstatat(volume, DATA, &found, AT_SYMLINK_NOFOLLOW)) {
        if (!S_ISDIR(found.st_mode))
            fail("what a volume has is no directory");
        return;
    }
    if (fstat(like, &found) < 0 || (mkdirat(volume, DATA ".new", 0700) < 0 && errno != EEXIST) ||
        fchownat(volume, DATA ".new", found.st_uid, found.st_gid, AT_SYMLINK_NOFOLLOW) < 0 ||
        fchmodat(volume, DATA ".new", found.st_mode & 07777, 0) < 0 ||
        renameat(volume, DATA ".new", volume, DATA) < 0)
        fail("cannot prepare a volume: %s", strerror(errno));
}

void mount_volumes(void)
{
    char disk[DISK_PATH], whole[32], data[64], target[64];
    for (size_t n = 0; n < order.volumes.count; n++) {
        const char *path = order.volumes.list[n];
        name_volume(whole, n);
        if (!find_disk(whole + 1, disk))
            fail("there is no disk for the volume at %s", path);
        attach(disk, whole, "ext4", MS_NOSUID | MS_NODEV, "errors=remount-ro");
        mounted++;
        int volume = open(whole, O_RDONLY | O_DIRECTORY | O_CLOEXEC), place = reach(path);
        make_data(volume, place);
        snprintf(data, sizeof data, "%s/" DATA, whole);
        snprintf(target, sizeof target, "/proc/self/fd/%d", place);
        if (mount(data, target, NULL, MS_BIND, NULL) < 0)
            fail("cannot mount a volume on %s: %s", path, strerror(errno));
        close(volume);
        close(place);
    }
}

/* Nobody writes any more, all that was written is on the disks, and they are marked as clean. What
 * cannot be so is written all the same: its journal then tells the next kernel. */
void release_volumes(void)
{
    char whole[32];
    if (!mounted)
        return;
    kill(-1, SIGKILL);
    while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
        ;
    for (size_t n = 0; n < mounted; n++) {
        name_volume(whole, n);
        if (mount(NULL, whole, NULL, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL) == 0)
            continue;
        dprintf(2, "the volume at %s is not closed: %s\n", order.volumes.list[n], strerror(errno));
        sync();
    }
}
