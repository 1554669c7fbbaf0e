/* A tar stream from stdin into a directory. A file is written under another name and then renamed. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"
#include "tar.h"

enum { MAX_EXTENSION = 1 << 20 };

struct description {
    char *path, *link;
    int64_t size, whole, mtime;
    long mtime_ns;
    bool is_sparse;
};

struct final {
    struct final *next;
    struct timespec mtime;
    mode_t mode;
    char path[];
};

static bool take(void *into, size_t length)
{
    for (size_t have = 0; have < length;) {
        long got = read(0, (char *)into + have, length - have);
        if (got <= 0)
            return false;
        have += got;
    }
    return true;
}

static void must_take(void *into, size_t length)
{
    if (!take(into, length))
        give_up("that is no tar archive, or a broken one: it breaks off");
}

static void skip(uint64_t length)
{
    static char block[BLOCK];
    while (length) {
        size_t part = length < BLOCK ? length : BLOCK;
        must_take(block, part);
        length -= part;
    }
}

static int64_t parse_number(const char *field, size_t length)
{
    int64_t value = 0;
    if (field[0] & 0x80) {
        for (size_t n = 1; n < length; n++)
            value = value << 8 | (unsigned char)field[n];
        return value;
    }
    for (size_t n = 0; n < length && field[n]; n++)
        if (field[n] >= '0' && field[n] <= '7')
            value = value << 3 | (field[n] - '0');
        else if (field[n] != ' ')
            give_up("that is no tar archive, or a broken one: a number is none");
    return value;
}

static void check_sum(const struct header *head)
{
    unsigned sum = 0;
    for (size_t n = 0; n < SECTOR; n++)
        sum += n >= offsetof(struct header, sum) && n < offsetof(struct header, sum) + 8 ? ' '
            : ((const unsigned char *)head)[n];
    if ((unsigned)parse_number(head->sum, 8) != sum)
        give_up("that is no tar archive, or a broken one: a header's sum is wrong");
}

static char *take_text(uint64_t size)
{
    if (size > MAX_EXTENSION)
        give_up("the archive describes an entry in %" PRIu64 " bytes: too many", size);
    char *text = calloc(1, size + 1);
    must_take(text, size);
    skip(padding(size));
    return text;
}

static void parse_mtime(struct description *what, const char *value)
{
    char *point;
    what->mtime = strtoll(value, &point, 10);
    long scale = 100000000;
    if (*point == '.')
        for (point++; *point >= '0' && *point <= '9' && scale; point++, scale /= 10)
            what->mtime_ns += (*point - '0') * scale;
}

static void parse_records(char *text, uint64_t size, struct description *what)
{
    for (char *at = text, *end = text + size; at < end;) {
        char *key, *value;
        unsigned long length = strtoul(at, &key, 10);
        if (length < 5 || at + length > end || *key != ' ' || !(value = strchr(key, '=')))
            give_up("that is no tar archive, or a broken one: a PAX header is none");
        at[length - 1] = 0;
        *value++ = 0;
        key++;
        if (!strcmp(key, "path") || !strcmp(key, "GNU.sparse.name"))
            what->path = value;
        else if (!strcmp(key, "linkpath"))
            what->link = value;
        else if (!strcmp(key, "size"))
            what->size = strtoll(value, NULL, 10);
        else if (!strcmp(key, "GNU.sparse.realsize"))
            what->whole = strtoll(value, NULL, 10);
        else if (!strcmp(key, "GNU.sparse.major"))
            what->is_sparse = true;
        else if (!strcmp(key, "mtime"))
            parse_mtime(what, value);
        at += length;
    }
}

static const char *new_name;        /* what the archive's one tree is called */
static char *first;

/* Where an entry goes, below the working directory; empty: that itself. */
static char *place(const char *name)
{
    char *copy = strdup(name), *result = calloc(1, strlen(name) + NAME_MAX + 2), *state;
    size_t count = 0;
    if (name[0] == '/')
        give_up("the archive has an entry outside of it: %.60s", name);
    for (char *part = strtok_r(copy, "/", &state); part; part = strtok_r(NULL, "/", &state)) {
        if (!strcmp(part, "."))
            continue;
        if (!strcmp(part, ".."))
            give_up("the archive has an entry outside of it: %.60s", name);
        if (new_name && count == 0) {
            if (!first)
                first = strdup(part);
            if (strcmp(first, part) && *first)
                give_up("the archive has more than %s: %.60s", first, name);
            if (*first)
                part = (char *)new_name;
        }
        strcat(strcat(result, count++ ? "/" : ""), part);
    }
    if (new_name && !count) {
        first = first ? first : strdup("");
        strcpy(result, new_name);
    } else if (new_name && !*first) {
        char *below = calloc(1, strlen(name) + NAME_MAX + 2);
        sprintf(below, "%s/%s", new_name, result);
        result = below;
    }
    free(copy);
    return result;
}

static void failed(const char *name)
{
    if (errno == ENOSPC || errno == EDQUOT)
        give_up("%s: there is no space left", name);
    give_up("%s: %s", name, strerror(errno));
}

static void make_parents(char *path, const char *name)
{
    for (char *slash = strchr(path, '/'); slash; slash = strchr(slash + 1, '/')) {
        struct stat found;
        *slash = 0;
        if (mkdir(path, 0755) < 0 && (errno != EEXIST || stat(path, &found) < 0))
            failed(name);
        *slash = '/';
    }
}

/* A name beside `path` that nobody has. */
static char *name_beside(const char *path)
{
    uint64_t number;
    char *result = malloc(strlen(path) + 40);
    const char *slash = strrchr(path, '/');
    if (getrandom(&number, sizeof number, 0) != sizeof number)
        give_up("no random number: %s", strerror(errno));
    sprintf(result, "%.*s.tabane-%016" PRIx64, slash ? (int)(slash + 1 - path) : 0, path, number);
    return result;
}

static void check_replaceable(const char *path, const char *name)
{
    struct stat there;
    if (lstat(path, &there) < 0)
        return;
    errno = EISDIR;
    if (S_ISDIR(there.st_mode))
        failed(name);
    if (!S_ISREG(there.st_mode) && !S_ISLNK(there.st_mode))
        give_up("%s is there and no file: it is not replaced", name);
}

static void take_piece(int file, off_t start, int64_t length, const char *name, const char *fresh)
{
    static char block[BLOCK];
    while (length > 0) {
        size_t part = length < BLOCK ? length : BLOCK;
        if (!take(block, part)) {
            unlink(fresh);
            give_up("the archive breaks off in the middle of a file");
        }
        for (size_t done = 0; done < part;) {
            long written = pwrite(file, block + done, part - done, start + done);
            if (written < 0) {
                int problem = errno;
                unlink(fresh);
                errno = problem;
                failed(name);
            }
            done += written;
        }
        start += part;
        length -= part;
    }
}

/* The numbers before the data of a file with holes; returns how many bytes they are. */
static int64_t take_plan(size_t *count)
{
    char block[SECTOR + 1], digits[32];
    size_t used = 0, wanted = 1, have = 0;
    int64_t taken = 0;
    while (have < wanted) {
        must_take(block, SECTOR);
        taken += SECTOR;
        for (size_t n = 0; n < SECTOR && have < wanted; n++) {
            if (block[n] != '\n') {
                if (used >= sizeof digits - 1 || block[n] < '0' || block[n] > '9')
                    give_up("the archive breaks off, or its plan of a file is none");
                digits[used++] = block[n];
                continue;
            }
            digits[used] = 0;
            used = 0;
            int64_t value = strtoll(digits, NULL, 10);
            if (have == 0) {
                *count = value;
                if (value > MAX_PIECES)
                    give_up("the archive has a file of %" PRId64 " pieces: too many", value);
                wanted = 1 + 2 * value;
            } else if (have % 2) {
                pieces[(have - 1) / 2].start = value;
            } else {
                pieces[(have - 1) / 2].length = value;
            }
            have++;
        }
    }
    return taken;
}

static void take_file(const struct header *head, const struct description *what, char *path)
{
    char *fresh = name_beside(path);
    struct timespec times[2] = {{what->mtime, what->mtime_ns}, {what->mtime, what->mtime_ns}};
    check_replaceable(path, what->path);
    int file = open(fresh, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (file < 0)
        failed(what->path);
    off_t size = what->is_sparse ? what->whole : what->size;
    int64_t used = what->size;
    if (what->is_sparse) {
        size_t count = 0;
        used = take_plan(&count);
        for (size_t n = 0; n < count; n++) {
            if (pieces[n].start < 0 || pieces[n].length > size - pieces[n].start)
                give_up("%.60s: a piece of it is beyond its end", what->path);
            take_piece(file, pieces[n].start, pieces[n].length, what->path, fresh);
            used += pieces[n].length;
        }
    } else {
        take_piece(file, 0, what->size, what->path, fresh);
    }
    skip(padding(used));
    bool done = ftruncate(file, size) == 0 && fchmod(file, parse_number(head->mode, 8) & 07777) == 0 &&
                futimens(file, times) == 0 && rename(fresh, path) == 0;
    int problem = errno;
    unlink(fresh);
    errno = problem;
    if (!done)
        failed(what->path);
    close(file);
    free(fresh);
}

static void take_link(const struct description *what, char *path, bool is_hard)
{
    char *fresh = name_beside(path);
    struct timespec times[2] = {{what->mtime, what->mtime_ns}, {what->mtime, what->mtime_ns}};
    check_replaceable(path, what->path);
    if (is_hard ? link(place(what->link), fresh) < 0 : symlink(what->link, fresh) < 0)
        failed(what->path);
    if (!is_hard)
        utimensat(AT_FDCWD, fresh, times, AT_SYMLINK_NOFOLLOW);
    if (rename(fresh, path) < 0)
        failed(what->path);
    unlink(fresh);
    free(fresh);
}

static void take_directory(const struct header *head, const struct description *what, char *path,
                           struct final **finals)
{
    struct stat found;
    if (!*path)
        path = ".";
    if (mkdir(path, 0700) < 0 && (errno != EEXIST || stat(path, &found) < 0 || !S_ISDIR(found.st_mode)))
        failed(what->path);
    struct final *final = malloc(sizeof *final + strlen(path) + 1);
    *final = (struct final){*finals, {what->mtime, what->mtime_ns}, parse_number(head->mode, 8) & 07777};
    strcpy(final->path, path);
    *finals = final;
}

static void take_entry(const struct header *head, const struct description *what, struct final **finals)
{
    char *path = place(what->path);
    make_parents(path, what->path);
    if (head->kind == '5')
        take_directory(head, what, path, finals);
    else if (!*path)
        skip(what->size + padding(what->size));
    else if (head->kind == '0' || head->kind == 0 || head->kind == '7')
        take_file(head, what, path);
    else if (head->kind == '1' || head->kind == '2')
        take_link(what, path, head->kind == '1');
    else
        give_up("%.60s is a device or a pipe: none is made", what->path);
    free(path);
}

/* What was there before, and is another's, stays as it was. */
static void make_final(struct final *finals)
{
    for (; finals; finals = finals->next) {
        struct timespec times[2] = {finals->mtime, finals->mtime};
        if (chmod(finals->path, finals->mode) == 0)
            utimensat(AT_FDCWD, finals->path, times, 0);
    }
}

static bool is_zero(const void *block)
{
    static const char zeros[SECTOR];
    return !memcmp(block, zeros, SECTOR);
}

static void take_all(void)
{
    struct header head;
    struct final *finals = NULL;
    struct description what = {.size = -1, .whole = -1};
    char name[260], link[101];
    while (take(&head, SECTOR) && !is_zero(&head)) {
        check_sum(&head);
        uint64_t size = parse_number(head.size, 12);
        if (head.kind == 'x' || head.kind == 'g' || head.kind == 'X') {
            char *text = take_text(size);
            if (head.kind != 'g')
                parse_records(text, size, &what);
            continue;
        }
        if (head.kind == 'L' || head.kind == 'K') {
            *(head.kind == 'L' ? &what.path : &what.link) = take_text(size);
            continue;
        }
        if (head.kind == 'S')
            give_up("the archive has a file with holes in an old way: make it --posix");
        bool has_prefix = !memcmp(head.magic, "ustar", 6) && head.prefix[0];
        snprintf(name, sizeof name, "%.155s%s%.100s", has_prefix ? head.prefix : "", has_prefix ? "/" : "", head.name);
        snprintf(link, sizeof link, "%.100s", head.link);
        what.path = what.path ? what.path : name;
        what.link = what.link ? what.link : link;
        what.size = what.size < 0 ? (int64_t)size : what.size;
        what.mtime = what.mtime ? what.mtime : parse_number(head.mtime, 12);
        take_entry(&head, &what, &finals);
        what = (struct description){.size = -1, .whole = -1};
    }
    make_final(finals);
}

int unpack(const struct program *program)
{
    static char target[PATH_MAX];
    struct stat found;
    snprintf(target, sizeof target, "%s", program->path);
    bool is_directory = stat(target, &found) == 0 && S_ISDIR(found.st_mode);
    if (program->as_named && !is_directory) {
        char *slash = strrchr(target, '/');
        if (slash && !slash[1])
            give_up("%s: there is no such directory", target);
        new_name = slash ? slash + 1 : target;
        if (slash)
            *slash = 0;
    }
    const char *directory = *target ? target : "/";
    if (chdir(directory) < 0)
        give_up("%s: %s", directory, strerror(errno));
    take_all();
    char rest[4096];                /* to its end, so that who writes is not held up */
    while (read(0, rest, sizeof rest) > 0)
        ;
    return 0;
}
