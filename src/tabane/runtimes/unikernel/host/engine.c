/* libwasmtime: compiling a module, and running it in a fresh instance each time.
 *
 * All that an instance needs is laid out ahead (the pooling allocator, one place for each run at a
 * time), so that after the start no memory is mapped. Its time is watched by the epoch: a timer that
 * counts the process's own processor time makes the module look at the clock, so that one that waits or
 * does nothing costs nothing. */

#define _GNU_SOURCE
#include "host.h"

#include "api.h"

#include <dlfcn.h>
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { TICK_US = 10000, MOST_TABLE_ELEMENTS = 200000, KEEP_RESIDENT = 256 << 10, PAGE = 64 << 10 };

struct api api;

void load_library(const char *path)
{
    void *library = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
    if (!library)
        fail("libwasmtime cannot be loaded: %s", dlerror());
#define LOOK_UP(result, name, arguments)                                                           \
    if (!(*(void **)&api.name = dlsym(library, #name)))                                            \
        fail("%s has no %s: it is of another version", path, #name);
    API(LOOK_UP)
#undef LOOK_UP
}

int64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* The last line of an error or trap, which has its cause; it is given back. */
static void say(char *why, size_t size, void *error, void (*message)(void *, bytes_t *),
                void (*give_back)(void *))
{
    bytes_t text;
    message(error, &text);
    size_t end = text.size;
    while (end && strchr(" \n", text.data[end - 1]))
        end--;
    char *line = memrchr(text.data, '\n', end), *from = line ? line + 1 : text.data;
    while (from < text.data + end && *from == ' ')
        from++;
    snprintf(why, size, "%.*s", (int)(text.data + end - from), from);
    api.wasm_byte_vec_delete(&text);
    give_back(error);
}

static void check(void *error, const char *what)
{
    char why[512];
    if (!error)
        return;
    say(why, sizeof why, error, api.wasmtime_error_message, api.wasmtime_error_delete);
    fail("%s: %s", what, why);
}

/* What the compiled code depends on is the same for both. */
static void *new_config(void)
{
    void *config = api.wasm_config_new();
    api.wasmtime_config_epoch_interruption_set(config, true);
    api.wasmtime_config_parallel_compilation_set(config, false);
    api.wasmtime_config_memory_init_cow_set(config, false);
    return config;
}

void compile_module(int source, int target)
{
    struct stat found;
    if (fstat(source, &found))
        fail_errno("reading", "the module");
    void *text = mmap(NULL, found.st_size, PROT_READ, MAP_PRIVATE, source, 0), *module;
    if (text == MAP_FAILED)
        fail_errno("reading", "the module");
    void *engine = api.wasm_engine_new_with_config(new_config());
    check(api.wasmtime_module_new(engine, text, found.st_size, &module), "it is no valid module");
    bytes_t code;
    check(api.wasmtime_module_serialize(module, &code), "it cannot be kept");
    for (size_t put = 0; put < code.size;) {
        ssize_t some = write(target, code.data + put, code.size - put);
        if (some <= 0)
            fail_errno("writing", "the compiled module");
        put += some;
    }
}

static void *new_pool(uint64_t memory_bytes, unsigned runs)
{
    void *pool = api.wasmtime_pooling_allocation_config_new();
    api.wasmtime_pooling_allocation_config_total_core_instances_set(pool, runs);
    api.wasmtime_pooling_allocation_config_total_memories_set(pool, runs);
    api.wasmtime_pooling_allocation_config_total_tables_set(pool, runs * 4);
    api.wasmtime_pooling_allocation_config_max_tables_per_module_set(pool, 4);
    api.wasmtime_pooling_allocation_config_total_stacks_set(pool, 0); /* each would be a call */
    api.wasmtime_pooling_allocation_config_total_gc_heaps_set(pool, 0);
    api.wasmtime_pooling_allocation_config_table_elements_set(pool, MOST_TABLE_ELEMENTS);
    api.wasmtime_pooling_allocation_config_max_memory_size_set(pool, memory_bytes / PAGE * PAGE);
    api.wasmtime_pooling_allocation_config_linear_memory_keep_resident_set(pool, KEEP_RESIDENT);
    return pool;
}

static void *load_module(struct engine *engine, const char *path, void **module)
{
    void *linker = api.wasmtime_linker_new(engine->engine), *ready;
    check(api.wasmtime_module_deserialize_file(engine->engine, path, module), "loading it failed");
    link_wasi(linker);
    check(api.wasmtime_linker_instantiate_pre(linker, *module, &ready), "it cannot be linked");
    return ready;
}

void open_engine(struct engine *engine, const char *module, const char *trial, uint64_t memory_bytes,
                 unsigned runs)
{
    void *config = new_config(), *empty;
    api.wasmtime_pooling_allocation_strategy_set(config, new_pool(memory_bytes, runs));
    engine->engine = api.wasm_engine_new_with_config(config);
    engine->memory_bytes = memory_bytes;
    engine->ready = load_module(engine, module, &engine->module);
    engine->trial = load_module(engine, trial, &empty);
}

static void *on_epoch(void *context, void *data, uint64_t *delta, uint8_t *kind)
{
    (void)context;
    struct run *run = data;
    *delta = 1;
    *kind = 0;
    run->timed_out = run->deadline_ns && now_ns() >= run->deadline_ns;
    return run->timed_out ? api.wasmtime_error_new("its time is up") : NULL;
}

static bool end(struct run *run, void *error, void *trap, char *why, size_t size)
{
    if (trap)
        say(why, size, trap, api.wasm_trap_message, api.wasm_trap_delete);
    if (error)
        say(why, size, error, api.wasmtime_error_message, api.wasmtime_error_delete);
    return run->exited || (!trap && !error);
}

static bool run_ready(struct engine *engine, void *ready, struct run *run, char *why, size_t size)
{
    void *store = api.wasmtime_store_new(engine->engine, run, NULL), *trap = NULL;
    void *context = api.wasmtime_store_context(store);
    api.wasmtime_store_epoch_deadline_callback(store, on_epoch, run, NULL);
    api.wasmtime_context_set_epoch_deadline(context, 1);
    if (run->timeout_ns)
        run->deadline_ns = now_ns() + run->timeout_ns;
    instance_t instance;
    extern_t start;
    void *error = api.wasmtime_instance_pre_instantiate(ready, context, &instance, &trap);
    if (!error && !trap) {
        if (api.wasmtime_instance_export_get(context, &instance, "_start", strlen("_start"), &start) &&
            start.kind == EXTERN_FUNC)
            error = api.wasmtime_func_call(context, &start.of.func, NULL, 0, NULL, 0, &trap);
        else
            error = api.wasmtime_error_new("it has no function _start");
    }
    bool ended = end(run, error, trap, why, size);
    api.wasmtime_store_delete(store);
    return ended;
}

bool run_module(struct engine *engine, struct run *run, char *why, size_t size)
{
    return run_ready(engine, engine->ready, run, why, size);
}

/* The first run of a thread sets up what it needs of the kernel: have that done before the filter. */
void warm_up(struct engine *engine)
{
    char why[512];
    struct run run = {0};
    if (!run_ready(engine, engine->trial, &run, why, sizeof why))
        fail("a trial run failed: %s", why);
}

static void *ticking;

static void on_tick(int number)
{
    (void)number;
    api.wasmtime_engine_increment_epoch(ticking);
}

void watch_time(struct engine *engine)
{
    struct sigaction action = {.sa_handler = on_tick, .sa_flags = SA_RESTART | SA_ONSTACK};
    struct itimerval timer = {{0, TICK_US}, {0, TICK_US}};
    ticking = engine->engine;
    if (sigaction(SIGPROF, &action, NULL) || setitimer(ITIMER_PROF, &timer, NULL))
        fail_errno("setting", "the timer");
}
