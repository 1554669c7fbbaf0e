/* What pack.c and unpack.c share: POSIX's tar format with PAX headers, holes as GNU's sparse format 1.0.
 * Both run as the user in the app's root, so no path leads anywhere else. Modes and times are kept,
 * owners are not. */
#ifndef TAR_H
#define TAR_H

#include <stdint.h>
#include <stddef.h>
#include <sys/types.h>

enum { SECTOR = 512, MAX_PIECES = 16384, BLOCK = 65536 };

struct header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], sum[8], kind, link[100];
    char magic[6], version[2], user[32], group[32], major[8], minor[8], prefix[155], rest[12];
};

struct piece {                      /* of a file with holes */
    off_t start, length;
};

extern struct piece pieces[MAX_PIECES + 1];

/* What is missing to a whole number of sectors. */
static inline size_t padding(uint64_t length)
{
    return -length % SECTOR;
}

/* Say so, and end with code 1. */
void give_up(const char *form, ...) __attribute__((noreturn, format(printf, 1, 2)));

#endif
