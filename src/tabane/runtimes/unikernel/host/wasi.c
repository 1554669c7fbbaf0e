/* WASI preview 1 for a program that has its arguments, environment, clocks, randomness and three
 * streams, and nothing else: no directory is opened for it, so all that needs one fails as it does for
 * a descriptor that is not open. The numbers and layouts are those of the `wasi_snapshot_preview1`
 * witx. libwasmtime's own WASI would bring a pool of threads and dozens of host calls more. */

#define _GNU_SOURCE
#include "host.h"

#include "api.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

enum {
    OK = 0,
    E_AGAIN = 6,
    E_BADF = 8,
    E_FAULT = 21,
    E_INVAL = 28,
    E_IO = 29,
    E_NOTSUP = 58,
    E_PIPE = 64,
    E_SPIPE = 70,
    TRAP = -1,
};

enum { RIGHT_READ = 2, RIGHT_WRITE = 64, STREAMS = 3, SUBSCRIPTION = 48, EVENT = 32 };
#define RANDOM_PART 256

struct guest {
    uint8_t *base;
    size_t size;
    const char *trap;
};

typedef int (*work_t)(struct run *, struct guest *, const val_t *);

static uint8_t *at(struct guest *guest, int32_t where, uint64_t size)
{
    uint64_t offset = (uint32_t)where;
    return offset + size <= guest->size ? guest->base + offset : NULL;
}

static int put(struct guest *guest, int32_t where, const void *value, size_t size)
{
    uint8_t *target = at(guest, where, size);
    if (!target)
        return E_FAULT;
    memcpy(target, value, size);
    return OK;
}

static int put_u32(struct guest *guest, int32_t where, uint32_t value)
{
    return put(guest, where, &value, sizeof value);
}

static int put_u64(struct guest *guest, int32_t where, uint64_t value)
{
    return put(guest, where, &value, sizeof value);
}

static bool is_open(struct run *run, int32_t fd)
{
    return fd >= 0 && fd < STREAMS && !(run->closed >> fd & 1);
}

/* Arguments and environment */

static int sizes(char **texts, struct guest *guest, const val_t *a)
{
    uint32_t count = 0, bytes = 0;
    for (; texts[count]; count++)
        bytes += strlen(texts[count]) + 1;
    return put_u32(guest, a[0].of.i32, count) ? E_FAULT : put_u32(guest, a[1].of.i32, bytes);
}

static int texts_to(char **texts, struct guest *guest, const val_t *a)
{
    uint32_t pointers = a[0].of.i32, bytes = a[1].of.i32;
    for (; *texts; texts++, pointers += 4) {
        size_t size = strlen(*texts) + 1;
        if (put_u32(guest, pointers, bytes) || put(guest, bytes, *texts, size))
            return E_FAULT;
        bytes += size;
    }
    return OK;
}

static int args_get(struct run *run, struct guest *guest, const val_t *a)
{
    return texts_to(run->args, guest, a);
}

static int args_sizes_get(struct run *run, struct guest *guest, const val_t *a)
{
    return sizes(run->args, guest, a);
}

static int environ_get(struct run *run, struct guest *guest, const val_t *a)
{
    return texts_to(run->env, guest, a);
}

static int environ_sizes_get(struct run *run, struct guest *guest, const val_t *a)
{
    return sizes(run->env, guest, a);
}

/* Clocks, randomness, the end */

static int find_clock(int32_t id, clockid_t *clock)
{
    *clock = id ? CLOCK_MONOTONIC : CLOCK_REALTIME;
    return id == 0 || id == 1 ? OK : E_INVAL; /* those of processors would be host calls more */
}

static int clock_res_get(struct run *run, struct guest *guest, const val_t *a)
{
    (void)run;
    clockid_t clock;
    int refused = find_clock(a[0].of.i32, &clock);
    return refused ? refused : put_u64(guest, a[1].of.i32, 1);
}

static int clock_time_get(struct run *run, struct guest *guest, const val_t *a)
{
    (void)run;
    clockid_t clock;
    struct timespec time;
    if (find_clock(a[0].of.i32, &clock))
        return E_INVAL;
    clock_gettime(clock, &time);
    return put_u64(guest, a[2].of.i32, (uint64_t)time.tv_sec * 1000000000 + time.tv_nsec);
}

static int random_get(struct run *run, struct guest *guest, const val_t *a)
{
    (void)run;
    size_t left = (uint32_t)a[1].of.i32;
    uint8_t *target = at(guest, a[0].of.i32, left);
    if (!target)
        return E_FAULT;
    while (left) {
        ssize_t got = getrandom(target, left < RANDOM_PART ? left : RANDOM_PART, 0);
        if (got < 0 && errno != EINTR)
            return E_IO;
        if (got > 0)
            target += got, left -= got;
    }
    return OK;
}

static int proc_exit(struct run *run, struct guest *guest, const val_t *a)
{
    run->exited = true;
    run->code = a[0].of.i32;
    guest->trap = "it has ended";
    return TRAP;
}

static int nothing(struct run *run, struct guest *guest, const val_t *a)
{
    (void)run, (void)guest, (void)a;
    return OK;
}

static int unsupported(struct run *run, struct guest *guest, const val_t *a)
{
    (void)run, (void)guest, (void)a;
    return E_NOTSUP;
}

/* Streams */

static int bad_descriptor(struct run *run, struct guest *guest, const val_t *a)
{
    (void)run, (void)guest, (void)a;
    return E_BADF;
}

static int of_stream(struct run *run, struct guest *guest, const val_t *a)
{
    (void)guest;
    return is_open(run, a[0].of.i32) ? OK : E_BADF;
}

static int fd_seek(struct run *run, struct guest *guest, const val_t *a)
{
    (void)guest;
    return is_open(run, a[0].of.i32) ? E_SPIPE : E_BADF;
}

static int fd_close(struct run *run, struct guest *guest, const val_t *a)
{
    (void)guest;
    if (!is_open(run, a[0].of.i32))
        return E_BADF;
    run->closed |= 1u << a[0].of.i32;
    return OK;
}

static int fd_fdstat_get(struct run *run, struct guest *guest, const val_t *a)
{
    if (!is_open(run, a[0].of.i32))
        return E_BADF;
    uint64_t stat[3] = {0, a[0].of.i32 ? RIGHT_WRITE : RIGHT_READ, 0};
    return put(guest, a[1].of.i32, stat, sizeof stat);
}

static int fd_filestat_get(struct run *run, struct guest *guest, const val_t *a)
{
    if (!is_open(run, a[0].of.i32))
        return E_BADF;
    uint64_t stat[8] = {0};
    return put(guest, a[1].of.i32, stat, sizeof stat);
}

/* The guest's vector of parts; a negative count is an error. */
static int parts_of(struct guest *guest, const val_t *a, struct iovec *parts)
{
    uint32_t count = a[2].of.i32;
    uint8_t *vector = at(guest, a[1].of.i32, (uint64_t)count * 8);
    if (!vector)
        return -E_FAULT;
    if (count > MOST_PARTS)
        count = MOST_PARTS;
    for (uint32_t n = 0; n < count; n++) {
        uint32_t words[2];
        memcpy(words, vector + n * 8, sizeof words);
        parts[n].iov_base = at(guest, words[0], words[1]);
        parts[n].iov_len = words[1];
        if (!parts[n].iov_base)
            return -E_FAULT;
    }
    return count;
}

static int done(struct run *run, struct guest *guest, int32_t where, ssize_t result)
{
    if (result >= 0)
        return put_u32(guest, where, result);
    if (result == -ETIMEDOUT) {
        run->timed_out = true;
        guest->trap = "its time is up";
        return TRAP;
    }
    return result == -EPIPE ? E_PIPE : E_IO;
}

static int fd_read(struct run *run, struct guest *guest, const val_t *a)
{
    struct iovec parts[MOST_PARTS];
    if (a[0].of.i32 != 0 || !is_open(run, 0))
        return E_BADF;
    int count = parts_of(guest, a, parts), n = 0;
    if (count < 0)
        return -count;
    while (n < count && !parts[n].iov_len)
        n++;
    ssize_t got = n < count ? run->streams->read(run, parts[n].iov_base, parts[n].iov_len) : 0;
    return done(run, guest, a[3].of.i32, got);
}

static ssize_t write_log(const struct iovec *parts, int count)
{
    ssize_t put;
    while ((put = writev(STDERR_FILENO, parts, count)) < 0 && errno == EINTR)
        ;
    return put < 0 ? -errno : put;
}

static int fd_write(struct run *run, struct guest *guest, const val_t *a)
{
    struct iovec parts[MOST_PARTS];
    int32_t fd = a[0].of.i32;
    if (fd == 0 || !is_open(run, fd))
        return E_BADF;
    int count = parts_of(guest, a, parts);
    if (count < 0)
        return -count;
    bool is_log = fd == STDERR_FILENO;
    ssize_t put = is_log ? write_log(parts, count) : run->streams->write(run, parts, count);
    return done(run, guest, a[3].of.i32, put);
}

/* Waiting */

static int sleep_until(struct run *run, struct guest *guest, int64_t wake_ns)
{
    bool late = run->deadline_ns && wake_ns > run->deadline_ns;
    int64_t until = late ? run->deadline_ns : wake_ns, left;
    while ((left = until - now_ns()) > 0) {
        struct timespec time = {left / 1000000000, left % 1000000000};
        ppoll(NULL, 0, &time, NULL);
    }
    return late ? done(run, guest, 0, -ETIMEDOUT) : OK;
}

/* When a clock's subscription is due, by the monotonic clock. */
static int64_t due_ns(const uint8_t *subscription)
{
    uint32_t id;
    uint64_t timeout;
    uint16_t flags;
    memcpy(&id, subscription + 16, sizeof id);
    memcpy(&timeout, subscription + 24, sizeof timeout);
    memcpy(&flags, subscription + 40, sizeof flags);
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    int64_t now = now_ns(), wait = timeout > INT64_MAX / 4 ? INT64_MAX / 4 : (int64_t)timeout;
    if (!(flags & 1))
        return now + wait;
    return id ? wait : now + wait - ((int64_t)wall.tv_sec * 1000000000 + wall.tv_nsec);
}

/* A stream is always ready: who reads it then waits there. */
static int poll_oneoff(struct run *run, struct guest *guest, const val_t *a)
{
    uint32_t count = a[2].of.i32, events = 0;
    uint8_t *in = at(guest, a[0].of.i32, (uint64_t)count * SUBSCRIPTION);
    uint8_t *out = at(guest, a[1].of.i32, (uint64_t)count * EVENT);
    if (!in || !out || !count)
        return count ? E_FAULT : E_INVAL;
    int64_t first = INT64_MAX;
    bool streams = false;
    for (uint32_t n = 0; n < count; n++) {
        const uint8_t *subscription = in + (size_t)n * SUBSCRIPTION;
        streams |= subscription[8] != 0;
        if (!subscription[8] && due_ns(subscription) < first)
            first = due_ns(subscription);
    }
    int trap = streams ? OK : sleep_until(run, guest, first);
    if (trap)
        return trap;
    for (uint32_t n = 0; n < count; n++) {
        const uint8_t *subscription = in + (size_t)n * SUBSCRIPTION;
        uint8_t event[EVENT] = {0};
        if (!subscription[8] && (streams || due_ns(subscription) > first + 1000000))
            continue;
        memcpy(event, subscription, 8);
        event[10] = subscription[8];
        memcpy(out + (size_t)events++ * EVENT, event, EVENT);
    }
    return put_u32(guest, a[3].of.i32, events);
}

/* What there is: i is an i32, I an i64; each gives an error number but proc_exit. */

static const struct function {
    const char *name, *takes;
    work_t work;
} FUNCTIONS[] = {
    {"args_get", "ii", args_get},
    {"args_sizes_get", "ii", args_sizes_get},
    {"clock_res_get", "ii", clock_res_get},
    {"clock_time_get", "iIi", clock_time_get},
    {"environ_get", "ii", environ_get},
    {"environ_sizes_get", "ii", environ_sizes_get},
    {"fd_advise", "iIIi", bad_descriptor},
    {"fd_allocate", "iII", bad_descriptor},
    {"fd_close", "i", fd_close},
    {"fd_datasync", "i", of_stream},
    {"fd_fdstat_get", "ii", fd_fdstat_get},
    {"fd_fdstat_set_flags", "ii", of_stream},
    {"fd_fdstat_set_rights", "iII", of_stream},
    {"fd_filestat_get", "ii", fd_filestat_get},
    {"fd_filestat_set_size", "iI", bad_descriptor},
    {"fd_filestat_set_times", "iIIi", bad_descriptor},
    {"fd_pread", "iiiIi", bad_descriptor},
    {"fd_prestat_dir_name", "iii", bad_descriptor},
    {"fd_prestat_get", "ii", bad_descriptor},
    {"fd_pwrite", "iiiIi", bad_descriptor},
    {"fd_read", "iiii", fd_read},
    {"fd_readdir", "iiiIi", bad_descriptor},
    {"fd_renumber", "ii", bad_descriptor},
    {"fd_seek", "iIii", fd_seek},
    {"fd_sync", "i", of_stream},
    {"fd_tell", "ii", fd_seek},
    {"fd_write", "iiii", fd_write},
    {"path_create_directory", "iii", bad_descriptor},
    {"path_filestat_get", "iiiii", bad_descriptor},
    {"path_filestat_set_times", "iiiiIIi", bad_descriptor},
    {"path_link", "iiiiiii", bad_descriptor},
    {"path_open", "iiiiiIIii", bad_descriptor},
    {"path_readlink", "iiiiii", bad_descriptor},
    {"path_remove_directory", "iii", bad_descriptor},
    {"path_rename", "iiiiii", bad_descriptor},
    {"path_symlink", "iiiii", bad_descriptor},
    {"path_unlink_file", "iii", bad_descriptor},
    {"poll_oneoff", "iiii", poll_oneoff},
    {"proc_exit", "i", proc_exit},
    {"proc_raise", "i", unsupported},
    {"random_get", "ii", random_get},
    {"sched_yield", "", nothing},
    {"sock_accept", "iii", bad_descriptor},
    {"sock_recv", "iiiiii", bad_descriptor},
    {"sock_send", "iiiii", bad_descriptor},
    {"sock_shutdown", "ii", bad_descriptor},
};

const char *list_wasi(size_t index)
{
    return index < sizeof FUNCTIONS / sizeof *FUNCTIONS ? FUNCTIONS[index].name : NULL;
}

static void *call(void *env, void *caller, const val_t *args, size_t nargs, val_t *results,
                  size_t nresults)
{
    (void)nargs;
    const struct function *function = env;
    void *context = api.wasmtime_caller_context(caller);
    struct guest guest = {NULL, 0, NULL};
    extern_t memory;
    if (api.wasmtime_caller_export_get(caller, "memory", strlen("memory"), &memory) &&
        memory.kind == EXTERN_MEMORY) {
        guest.base = api.wasmtime_memory_data(context, &memory.of.memory);
        guest.size = api.wasmtime_memory_data_size(context, &memory.of.memory);
    }
    int result = function->work(api.wasmtime_context_get_data(context), &guest, args);
    if (result == TRAP)
        return api.wasmtime_trap_new(guest.trap, strlen(guest.trap));
    if (nresults) {
        results[0].kind = KIND_I32;
        results[0].of.i32 = result;
    }
    return NULL;
}

static void *type_of(const struct function *function)
{
    void *kinds[16], *one = api.wasm_valtype_new(KIND_I32);
    size_t count = strlen(function->takes);
    for (size_t n = 0; n < count; n++)
        kinds[n] = api.wasm_valtype_new(function->takes[n] == 'I' ? KIND_I64 : KIND_I32);
    types_t takes, gives;
    api.wasm_valtype_vec_new(&takes, count, kinds);
    api.wasm_valtype_vec_new(&gives, function->work != proc_exit, &one);
    return api.wasm_functype_new(&takes, &gives);
}

void link_wasi(void *linker)
{
    static const char MODULE[] = "wasi_snapshot_preview1";
    for (size_t n = 0; n < sizeof FUNCTIONS / sizeof *FUNCTIONS; n++) {
        const struct function *f = &FUNCTIONS[n];
        if (api.wasmtime_linker_define_func(linker, MODULE, strlen(MODULE), f->name, strlen(f->name),
                                            type_of(f), call, (void *)f, NULL))
            fail("libwasmtime refuses the function %s", f->name);
    }
}
