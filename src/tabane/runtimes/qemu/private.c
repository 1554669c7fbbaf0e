/* Loaded into QEMU (LD_PRELOAD) when a machine goes on from a checkpoint: its memory is the saved one, of
 * which it has a private copy that is made page by page as they change.
 *
 * QEMU can map a file privately, but opens it for writing all the same, which must not be had: all clones
 * have the file, also those to come. And it leaves out of a stream only what is *shared* memory, so that
 * no clone could be saved in turn. So it is told of shared memory in the file PATH, which is not there:
 * the descriptor SAVED, which cannot be written to, is opened in its place, and mapped privately.
 *
 * Where the file has holes, no page of it is mapped but fresh memory: else what a guest does there would
 * fill the file, page by page. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PATH "/vm/memory"
#define EXPORTED __attribute__((visibility("default")))

enum { SAVED = 60 };

static int memory = -1;

static void *map(void *at, size_t size, int rights, int flags, int file, off_t offset)
{
    return (void *)syscall(SYS_mmap, at, size, rights, flags, file, offset);
}

static int open_it(const char *path, int flags, mode_t mode)
{
    if (strcmp(path, PATH))
        return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    return memory = fcntl(SAVED, F_DUPFD_CLOEXEC, 0);
}

EXPORTED int open64(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return open_it(path, flags, mode);
}

EXPORTED int __open64_2(const char *path, int flags)
{
    return open_it(path, flags, 0);
}

EXPORTED void *mmap64(void *at, size_t size, int rights, int flags, int file, off64_t offset)
{
    if (file < 0 || file != memory || !(flags & MAP_SHARED))
        return map(at, size, rights, flags, file, offset);
    int private = MAP_PRIVATE | MAP_NORESERVE | (flags & MAP_FIXED);
    off_t end = offset + (off_t)size;
    char *place = map(at, size, rights, private | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED)
        return place;
    for (off_t data = offset, hole; data < end; data = hole) {
        data = lseek(file, data, SEEK_DATA);
        if (data < 0 && errno == ENXIO)     /* there is only a hole left */
            break;
        hole = data < 0 ? -1 : lseek(file, data, SEEK_HOLE);
        if (hole < 0)
            return MAP_FAILED;
        hole = hole < end ? hole : end;
        char *where = place + (data - offset);
        if (data < end && map(where, hole - data, rights, private | MAP_FIXED, file, data) == MAP_FAILED)
            return MAP_FAILED;
    }
    return place;
}
