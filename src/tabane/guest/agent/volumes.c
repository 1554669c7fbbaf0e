/* Volumes: disks that outlive the machine, with the serial numbers `volume0` and so on. Of each file
 * system the directory `data` is what containers see. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "talks.h"

#define DATA "data"

static bool mounted[MAX_VOLUMES];

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

static void show(const char *root, size_t number, const char *path)
{
    char disk[DISK_PATH], whole[32], data[64], target[64];
    snprintf(whole, sizeof whole, "/pod/volume%zu", number);
    if (number >= MAX_VOLUMES || !find_disk(whole + strlen("/pod/"), disk))
        fail("there is no disk for the volume at %s", path);
    if (!mounted[number])
        attach(disk, whole, "ext4", MS_NOSUID | MS_NODEV, "errors=remount-ro");
    mounted[number] = true;
    int volume = open(whole, O_RDONLY | O_DIRECTORY | O_CLOEXEC), place = reach(root, path);
    make_data(volume, place);
    snprintf(data, sizeof data, "%s/" DATA, whole);
    snprintf(target, sizeof target, "/proc/self/fd/%d", place);
    if (mount(data, target, NULL, MS_BIND, NULL) < 0)
        fail("cannot mount a volume on %s: %s", path, strerror(errno));
    close(volume);
    close(place);
}

/* The main container's first: a new volume belongs to whom its image says. */
void mount_volumes(void)
{
    for (size_t n = order.count; n-- > 0;) {
        struct container *container = &order.containers[n];
        for (size_t m = 0; m < container->volumes.count; m++) {
            char *path = strchr(container->volumes.list[m], '=');
            if (!path)
                fail("a volume of the start order has no path");
            show(container->root, strtoul(container->volumes.list[m], NULL, 10), path + 1);
        }
    }
}

/* Nobody writes any more, all that was written is on the disks, and they are marked as clean. What
 * cannot be so is written all the same: its journal then tells the next kernel. */
void release_volumes(void)
{
    char whole[32];
    bool are_there = false;
    for (size_t n = 0; n < MAX_VOLUMES; n++)
        are_there = are_there || mounted[n];
    if (!are_there)
        return;
    kill(-1, SIGKILL);
    while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
        ;
    for (size_t n = 0; n < MAX_VOLUMES; n++) {
        snprintf(whole, sizeof whole, "/pod/volume%zu", n);
        if (!mounted[n] || !mount(NULL, whole, NULL, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL))
            continue;
        dprintf(2, "%s is not closed: %s\n", whole, strerror(errno));
        sync();
    }
}
