/* A file or a tree as a tar stream on stdout. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"
#include "tar.h"

enum { MAX_DEPTH = 200 };

struct piece pieces[MAX_PIECES + 1];

static int code;

static void complain(const char *form, ...)
{
    va_list rest;
    va_start(rest, form);
    vdprintf(2, form, rest);
    va_end(rest);
    dprintf(2, "\n");
    code = 1;
}

void give_up(const char *form, ...)
{
    va_list rest;
    va_start(rest, form);
    vdprintf(2, form, rest);
    va_end(rest);
    dprintf(2, "\n");
    _exit(1);
}

static char waiting[BLOCK];
static size_t waiting_count;

static void flush_out(void)
{
    for (size_t done = 0; done < waiting_count;) {
        long written = write(1, waiting + done, waiting_count - done);
        if (written <= 0)
            _exit(1);
        done += written;
    }
    waiting_count = 0;
}

static void put(const void *data, size_t length)
{
    while (length) {
        size_t part = BLOCK - waiting_count < length ? BLOCK - waiting_count : length;
        memcpy(waiting + waiting_count, data, part);
        waiting_count += part;
        data = (const char *)data + part;
        length -= part;
        if (waiting_count == BLOCK)
            flush_out();
    }
}

static void pad(uint64_t length)
{
    static const char zeros[SECTOR];
    put(zeros, padding(length));
}

static void put_header(struct header *head)
{
    unsigned sum = 0;
    memcpy(head->magic, "ustar", 6);
    memcpy(head->version, "00", 2);
    memset(head->sum, ' ', sizeof head->sum);
    for (size_t n = 0; n < SECTOR; n++)
        sum += ((unsigned char *)head)[n];
    snprintf(head->sum, 7, "%06o", sum & 0777777);
    put(head, SECTOR);
}

static void add_record(char *records, size_t *used, const char *key, const char *value)
{
    size_t body = strlen(key) + strlen(value) + 3, length = body + 1;
    for (size_t digits = 0; digits != length - body;) {
        digits = length - body;
        length = body + snprintf(NULL, 0, "%zu", body + digits);
    }
    *used += sprintf(records + *used, "%zu %s=%s\n", length, key, value);
}

struct entry {
    const char *name, *link;
    char kind;
    uint64_t size;
    int64_t whole;                  /* the size of a file with holes; -1: it has none */
};

static void describe(const struct entry *entry, const struct stat *found)
{
    static char records[4 * PATH_MAX];
    struct header head = {.kind = entry->kind}, more = {.kind = 'x'};
    size_t used = 0;
    char text[64];
    if (found->st_mtim.tv_nsec && found->st_mtim.tv_sec >= 0) {
        snprintf(text, sizeof text, "%lld.%09ld", (long long)found->st_mtim.tv_sec, found->st_mtim.tv_nsec);
        add_record(records, &used, "mtime", text);
    }
    if (entry->whole >= 0) {
        snprintf(text, sizeof text, "%" PRId64, entry->whole);
        add_record(records, &used, "GNU.sparse.major", "1");
        add_record(records, &used, "GNU.sparse.minor", "0");
        add_record(records, &used, "GNU.sparse.name", entry->name);
        add_record(records, &used, "GNU.sparse.realsize", text);
    } else if (strlen(entry->name) >= sizeof head.name) {
        add_record(records, &used, "path", entry->name);
    }
    if (entry->link && strlen(entry->link) >= sizeof head.link)
        add_record(records, &used, "linkpath", entry->link);
    if (entry->size >= 1ull << 33) {
        snprintf(text, sizeof text, "%" PRIu64, entry->size);
        add_record(records, &used, "size", text);
    }
    if (used) {
        strcpy(more.name, "PaxHeaders/entry");
        snprintf(more.mode, 8, "%07o", 0644);
        snprintf(more.size, 12, "%011zo", used);
        put_header(&more);
        put(records, used);
        pad(used);
    }
    strncpy(head.name, entry->whole < 0 ? entry->name : "GNUSparseFile.0/file", sizeof head.name - 1);
    if (entry->link)
        strncpy(head.link, entry->link, sizeof head.link - 1);
    snprintf(head.mode, 8, "%07o", found->st_mode & 07777);
    snprintf(head.uid, 8, "%07o", found->st_uid & 07777777);
    snprintf(head.gid, 8, "%07o", found->st_gid & 07777777);
    snprintf(head.size, 12, "%011llo", entry->size < 1ull << 33 ? (unsigned long long)entry->size : 0);
    snprintf(head.mtime, 12, "%011llo", (unsigned long long)(found->st_mtim.tv_sec < 0 ? 0 : found->st_mtim.tv_sec));
    put_header(&head);
}

/* Where a file with holes has data, and its end; 0: it has none, or too many. */
static size_t find_pieces(int file, const struct stat *found)
{
    size_t count = 0;
    off_t end = 0;
    if (found->st_blocks * SECTOR >= found->st_size)
        return 0;
    while (count < MAX_PIECES) {
        off_t start = lseek(file, end, SEEK_DATA);
        if (start < 0 && errno != ENXIO)
            return 0;
        if (start < 0 || start >= found->st_size) {
            pieces[count++] = (struct piece){found->st_size, 0};
            return count;
        }
        end = lseek(file, start, SEEK_HOLE);
        end = end > found->st_size ? found->st_size : end;
        pieces[count++] = (struct piece){start, end - start};
    }
    return 0;
}

/* Exactly as much as was announced, whatever becomes of the file. */
static bool send_piece(int file, off_t start, off_t length)
{
    static char block[BLOCK];
    bool whole = true;
    while (length > 0) {
        size_t wanted = length < BLOCK ? length : BLOCK;
        long got = pread(file, block, wanted, start);
        if (got <= 0) {
            memset(block, 0, wanted);
            whole = false;
            got = wanted;
        }
        put(block, got);
        start += got;
        length -= got;
    }
    return whole;
}

static void pack_file(const char *name, int file)
{
    static char data[4 << 20];
    struct stat found;
    struct entry entry = {.name = name, .kind = '0', .whole = -1};
    fstat(file, &found);
    if (!found.st_size) {           /* also those of /proc, which say so */
        size_t have = 0;
        long got;
        while (have < sizeof data && (got = read(file, data + have, sizeof data - have)) > 0)
            have += got;
        entry.size = have;
        describe(&entry, &found);
        put(data, have);
        pad(have);
        return;
    }
    size_t count = find_pieces(file, &found);
    bool whole = true;
    if (!count) {
        entry.size = found.st_size;
        describe(&entry, &found);
        whole = send_piece(file, 0, found.st_size);
    } else {
        size_t plan = snprintf(data, sizeof data, "%zu\n", count);
        for (size_t n = 0; n < count; n++) {
            plan += sprintf(data + plan, "%lld\n%lld\n", (long long)pieces[n].start, (long long)pieces[n].length);
            entry.size += pieces[n].length;
        }
        memset(data + plan, 0, padding(plan));
        plan += padding(plan);
        entry.size += plan;
        entry.whole = found.st_size;
        describe(&entry, &found);
        put(data, plan);
        for (size_t n = 0; n < count; n++)
            whole = send_piece(file, pieces[n].start, pieces[n].length) && whole;
    }
    pad(entry.size);
    if (!whole)
        complain("%s could not be read to its end: the rest is zeros", name);
}

static dev_t packed_device;

static void pack_directory(const char *name, int directory, int depth);

static void pack_entry(const char *name, const char *base, int directory, int depth)
{
    char link[PATH_MAX];
    struct stat found;
    if (fstatat(directory, base, &found, AT_SYMLINK_NOFOLLOW) < 0)
        return complain("%s: %s", name, strerror(errno));
    if (S_ISLNK(found.st_mode)) {
        long length = readlinkat(directory, base, link, sizeof link - 1);
        if (length < 0)
            return complain("%s: %s", name, strerror(errno));
        link[length] = 0;
        return describe(&(struct entry){.name = name, .link = link, .kind = '2', .whole = -1}, &found);
    }
    if (!S_ISDIR(found.st_mode) && !S_ISREG(found.st_mode))
        return complain("%s is neither a file nor a directory: left out", name);
    if (S_ISDIR(found.st_mode) && found.st_dev != packed_device)
        return complain("%s is another file system: left out", name);
    int file = openat(directory, base, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (file < 0)
        return complain("%s: %s", name, strerror(errno));
    if (S_ISDIR(found.st_mode))
        pack_directory(name, file, depth + 1);
    else
        pack_file(name, file);
    close(file);
}

static void pack_directory(const char *name, int directory, int depth)
{
    struct stat found;
    struct dirent **all;
    char *path = malloc(strlen(name) + 2 + 256 + 1);
    fstat(directory, &found);
    sprintf(path, "%s/", name);
    describe(&(struct entry){.name = path, .kind = '5', .whole = -1}, &found);
    int count = depth < MAX_DEPTH ? scandirat(directory, ".", &all, NULL, alphasort) : 0;
    if (depth >= MAX_DEPTH)
        complain("%s is more than %d directories deep: left out", name, MAX_DEPTH);
    else if (count < 0)
        complain("%s: %s", name, strerror(errno));
    for (int n = 0; n < count; n++) {
        if (strcmp(all[n]->d_name, ".") && strcmp(all[n]->d_name, "..")) {
            sprintf(path, "%s/%s", name, all[n]->d_name);
            pack_entry(path, all[n]->d_name, directory, depth);
        }
        free(all[n]);
    }
    if (count > 0)
        free(all);
    free(path);
}

static const char *base_of(const char *path)
{
    static char copy[PATH_MAX];
    snprintf(copy, sizeof copy, "%s", path);
    for (size_t n = strlen(copy); n && copy[n - 1] == '/'; n--)
        copy[n - 1] = 0;
    char *slash = strrchr(copy, '/');
    const char *base = slash ? slash + 1 : copy;
    return !*base || !strcmp(base, "..") ? "." : base;
}

int pack(const struct program *program)
{
    static const char zeros[2 * SECTOR];
    struct stat found;
    const char *path = program->path;
    if (stat(path, &found) < 0)
        give_up("%s: %s", path, strerror(errno));
    if (!S_ISDIR(found.st_mode) && !S_ISREG(found.st_mode))
        give_up("%s is neither a file nor a directory", path);
    int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (file < 0)
        give_up("%s: %s", path, strerror(errno));
    packed_device = found.st_dev;
    if (S_ISDIR(found.st_mode))
        pack_directory(base_of(path), file, 0);
    else
        pack_file(base_of(path), file);
    put(zeros, sizeof zeros);
    flush_out();
    return code;
}
