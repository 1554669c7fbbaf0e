/* The host of unikernels: the process around a WebAssembly module, or what a tender is started by.
 *
 *     _host compile --library L --module M --output O --filter F ...    a module to machine code
 *     _host run     --library L --module O --trial T ... -- ARG0 ...    one instance of an app
 *     _host exec    ... -- PROGRAM ARGUMENT...                          another program, confined
 *     _host wasi                                                        the functions a module may import
 *
 * Its arguments come from the driver alone, so nothing is checked twice here. */

#define _GNU_SOURCE
#include "host.h"

#include "api.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MOST_ENVIRONMENT = 128, LARGEST_BLOCK = 32 << 20, TRAPPED = 128 + SIGABRT };

struct options {
    struct confinement confinement;
    const char *library, *module, *trial, *output, *address;
    unsigned port, workers;
    long long memory_bytes, timeout_ms;
    char *env[MOST_ENVIRONMENT + 1];
    char **args;
};

enum option_id {
    CGROUP = 256, USER_NAMESPACE, NETWORK_NAMESPACE, ROOT, BIND, ID, FILTER, PID_FILE, ERRORS, CPU_S,
    ADDRESS_BYTES, LIBRARY, MODULE, TRIAL, OUTPUT, ADDRESS, PORT, WORKERS, MEMORY_BYTES, TIMEOUT_MS, ENV,
};

static const struct option OPTIONS[] = {
    {"cgroup", 1, NULL, CGROUP},
    {"user-namespace", 1, NULL, USER_NAMESPACE},
    {"network-namespace", 1, NULL, NETWORK_NAMESPACE},
    {"root", 1, NULL, ROOT},
    {"bind", 1, NULL, BIND},
    {"id", 1, NULL, ID},
    {"filter", 1, NULL, FILTER},
    {"pid-file", 1, NULL, PID_FILE},
    {"errors", 1, NULL, ERRORS},
    {"cpu-s", 1, NULL, CPU_S},
    {"address-bytes", 1, NULL, ADDRESS_BYTES},
    {"library", 1, NULL, LIBRARY},
    {"module", 1, NULL, MODULE},
    {"trial", 1, NULL, TRIAL},
    {"output", 1, NULL, OUTPUT},
    {"address", 1, NULL, ADDRESS},
    {"port", 1, NULL, PORT},
    {"workers", 1, NULL, WORKERS},
    {"memory-bytes", 1, NULL, MEMORY_BYTES},
    {"timeout-ms", 1, NULL, TIMEOUT_MS},
    {"env", 1, NULL, ENV},
    {NULL, 0, NULL, 0},
};

static void append(const char **list, size_t most, const char *value)
{
    size_t count = 0;
    while (list[count])
        count++;
    if (count + 1 >= most)
        fail("there are more than %zu like %s", most - 1, value);
    list[count] = value;
}

static void take(struct options *options, int option, char *value)
{
    struct confinement *c = &options->confinement;
    switch (option) {
    case CGROUP: append(c->cgroups, MOST_CGROUPS, value); break;
    case USER_NAMESPACE: c->user_namespace = value; break;
    case NETWORK_NAMESPACE: c->network_namespace = value; break;
    case ROOT: c->root = value; break;
    case BIND: append(c->binds, MOST_BINDS, value); break;
    case ID: c->id = strtoul(value, NULL, 10); break;
    case FILTER: c->filter = value; break;
    case PID_FILE: c->pid_file = value; break;
    case ERRORS: open_error_file(value); break;
    case CPU_S: c->cpu_s = atoll(value); break;
    case ADDRESS_BYTES: c->address_bytes = atoll(value); break;
    case LIBRARY: options->library = value; break;
    case MODULE: options->module = value; break;
    case TRIAL: options->trial = value; break;
    case OUTPUT: options->output = value; break;
    case ADDRESS: options->address = value; break;
    case PORT: options->port = atoi(value); break;
    case WORKERS: options->workers = atoi(value); break;
    case MEMORY_BYTES: options->memory_bytes = atoll(value); break;
    case TIMEOUT_MS: options->timeout_ms = atoll(value); break;
    case ENV: append((const char **)options->env, MOST_ENVIRONMENT + 1, value); break;
    default: fail("the driver and the host are of different versions: install Tabane anew");
    }
}

static void compile(struct options *options)
{
    struct confinement *what = &options->confinement;
    int source = open(options->module, O_RDONLY | O_CLOEXEC);
    int target = open(options->output, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (source < 0 || target < 0)
        fail_errno("opening", source < 0 ? options->module : options->output);
    load_filter(what);
    begin(what, false);
    load_library(options->library);
    confine(what);
    install_filter(what);
    compile_module(source, target);
    _exit(0);
}

static ssize_t read_input(struct run *run, void *data, size_t size)
{
    (void)run;
    ssize_t got = read(STDIN_FILENO, data, size);
    return got < 0 ? -errno : got;
}

static ssize_t write_output(struct run *run, const struct iovec *parts, int count)
{
    (void)run;
    ssize_t put;
    while ((put = writev(STDOUT_FILENO, parts, count)) < 0 && errno == EINTR)
        ;
    return put < 0 ? -errno : put;
}

static void on_signal(int number)
{
    _exit(128 + number);
}

/* The first process of a pid namespace is ended by no signal that it does not take. */
static void take_signals(void)
{
    static const int DEADLY[] = {SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGTERM};
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    for (size_t n = 0; n < sizeof DEADLY / sizeof *DEADLY; n++)
        if (sigaction(DEADLY[n], &action, NULL))
            fail_errno("taking", "signals");
}

static _Noreturn void run_program(struct options *options, struct engine *engine)
{
    static const struct streams streams = {read_input, write_output};
    static char why[512], line[640];
    struct run run = {.args = options->args, .env = options->env, .streams = &streams};
    warm_up(engine);
    install_filter(&options->confinement);
    tell_running();
    if (run_module(engine, &run, why, sizeof why))
        _exit(run.code & 0xff);
    struct iovec last = {line, snprintf(line, sizeof line, "tabane: it was ended: %s\n", why)};
    _exit(writev(STDERR_FILENO, &last, 1) < 0 ? TRAPPED : TRAPPED);
}

/* What is freed stays with the process, and every block comes from the one heap. */
static void keep_heap(void)
{
    mallopt(M_ARENA_MAX, 1);
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
    mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK);
}

static void run(struct options *options)
{
    struct confinement *what = &options->confinement;
    struct engine engine;
    unsigned workers = options->port ? options->workers : 1;
    load_filter(what);
    begin(what, true);
    keep_heap();
    load_library(options->library);
    open_engine(&engine, options->module, options->trial, options->memory_bytes, workers);
    confine(what);
    take_signals();
    if (!options->port)
        run_program(options, &engine);
    struct server server = {
        .engine = &engine, .args = options->args, .env = options->env, .workers = workers,
        .timeout_ns = options->timeout_ms * 1000000,
    };
    open_server(&server, options->address, options->port);
    watch_time(&engine);
    serve(&server, what);
}

static void exec(struct options *options)
{
    load_filter(&options->confinement);
    begin(&options->confinement, false);
    confine(&options->confinement);
    tell_exec();
    install_filter(&options->confinement);
    execve(options->args[0], options->args, options->env);
    fail_errno("starting", options->args[0]);
}

int main(int argc, char **argv)
{
    static struct options options;
    int option;
    const char *verb = argc > 1 ? argv[1] : "";
    if (!strcmp(verb, "wasi")) {
        for (size_t n = 0; list_wasi(n); n++)
            puts(list_wasi(n));
        return 0;
    }
    close_range(STDERR_FILENO + 1, ~0u, 0); /* of whoever started it: not for what it runs */
    optind = 2;
    while ((option = getopt_long(argc, argv, "+", OPTIONS, NULL)) != -1)
        take(&options, option, optarg);
    options.args = argv + optind;
    if (!strcmp(verb, "compile"))
        compile(&options);
    if (!strcmp(verb, "run"))
        run(&options);
    if (!strcmp(verb, "exec"))
        exec(&options);
    fail("there is no %s: the verbs are compile, run, exec, wasi", verb);
}
