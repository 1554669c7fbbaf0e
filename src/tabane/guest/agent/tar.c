/* Files as a tar stream: POSIX's format with PAX headers, holes as GNU's sparse format 1.0. Both ways
 * run as the user in the app's root, so no path leads anywhere else. Modes and times are kept, owners
 * are not. A file is written under another name and then renamed. */
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
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"

enum { SECTOR = 512, MAX_EXTENSION = 1 << 20, MAX_PIECES = 16384, MAX_DEPTH = 200, BLOCK = 65536 };

struct header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], sum[8], kind, link[100];
    char magic[6], version[2], user[32], group[32], major[8], minor[8], prefix[155], rest[12];
};

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

static void give_up(const char *form, ...)
{
    va_list rest;
    va_start(rest, form);
    vdprintf(2, form, rest);
    va_end(rest);
    dprintf(2, "\n");
    _exit(1);
}

/* Packing */

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

/* What is missing to a whole number of sectors. */
static size_t padding(uint64_t length)
{
    return -length % SECTOR;
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

struct piece {
    off_t start, length;
};

static struct piece pieces[MAX_PIECES + 1];

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

/* Unpacking */

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
    return code;
}
