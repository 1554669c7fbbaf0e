/* The parts of the host, and what they know of each other. */

#ifndef TABANE_HOST_H
#define TABANE_HOST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

/* confine.c: becoming a process that can do next to nothing. */

enum { MOST_CGROUPS = 16, MOST_BINDS = 32, MOST_PARTS = 64 };

struct confinement {
    const char *cgroups[MOST_CGROUPS]; /* directories, NULL after the last */
    const char *user_namespace, *network_namespace; /* NULL: stay in one's own */
    const char *root;                  /* directory that a tree in memory is made on */
    const char *binds[MOST_BINDS];     /* SOURCE:TARGET[:rw], NULL after the last;
                                          of a device a node is made */
    unsigned id;                       /* uid and gid, in the user namespace */
    const char *filter;                /* file of a compiled seccomp filter */
    const char *pid_file;              /* where the confined process's pid goes; NULL: nobody asks */
    long long cpu_s, address_bytes;    /* 0: no limit of this process's own */
};

/* Where `fail` writes to, rather than to stderr. */
void open_error_file(const char *path);
/* Joins the cgroups and goes on as a child in namespaces of its own; the caller's process waits until
 * that tells, writes its pid down, and exits. Without a pid file it only joins. */
void begin(struct confinement *what, bool own_pids);
/* Leaves the files, the users and the capabilities of the machine behind. */
void confine(struct confinement *what);
/* Reads the filter, while its file can be seen. */
void load_filter(const struct confinement *what);
/* From now on only the filter's system calls are possible, in all threads. */
void install_filter(const struct confinement *what);
void tell_running(void);
void tell_exec(void);
_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void fail_errno(const char *what, const char *which);

/* engine.c: libwasmtime. */

struct run;

struct streams {
    ssize_t (*read)(struct run *run, void *data, size_t size);
    ssize_t (*write)(struct run *run, const struct iovec *parts, int count);
};

/* One run of the module, in an instance of its own. `read` and `write` (of its streams 0 and 1) give a
 * size or a negative errno, -ETIMEDOUT when its time is up. */
struct run {
    char **args, **env; /* NULL after the last */
    const struct streams *streams;
    void *peer;
    int64_t timeout_ns;  /* 0: it may take as long as it likes */
    int64_t deadline_ns;
    unsigned closed;     /* bit N: it closed its stream N */
    bool exited, timed_out, gone; /* `gone`: nobody reads it any more */
    int code;
};

struct engine {
    void *engine, *module, *ready; /* `ready`: linked, to be instantiated */
    void *trial;                   /* the same of the empty module */
    uint64_t memory_bytes;
};

void load_library(const char *path);
void compile_module(int source, int target);
void open_engine(struct engine *engine, const char *module, const char *trial, uint64_t memory_bytes,
                 unsigned runs);
void warm_up(struct engine *engine);
/* Instantiates and runs it to its end. True: it ended by itself, `run->code` says how. False: it did
 * not, and `why` says that in a sentence's end. */
bool run_module(struct engine *engine, struct run *run, char *why, size_t size);
void watch_time(struct engine *engine);
int64_t now_ns(void);

/* wasi.c: what a module may call. */

void link_wasi(void *linker);
const char *list_wasi(size_t index); /* NAME of each function; NULL after the last */

/* http.c: requests as CGI, each a run of its own. */

struct server {
    struct engine *engine;
    char **args, **env;
    int64_t timeout_ns;
    unsigned workers;
    int listener;
    char name[64];
    unsigned port;
};

void open_server(struct server *server, const char *address, unsigned port);
_Noreturn void serve(struct server *server, struct confinement *what);

/* cgi.c: the texts in between, without any system call. */

enum { MOST_HEAD = 32 << 10, MOST_VARIABLES = 256 };

struct request {
    char head[MOST_HEAD + 1];
    char text[MOST_HEAD * 2]; /* of the variables */
    char *variables[MOST_VARIABLES + 1];
    size_t text_size, count;
    bool is_head, old, chunked, expects;
    long long length; /* of the body; -1 where it is chunked */
};

/* `head` ends with an empty line. Gives 0, or the status to refuse it with. */
int parse_request(struct request *request);
bool add_variable(struct request *request, const char *name, const char *value);

struct answer {
    int status;
    bool has_length, bodiless;
    char head[MOST_HEAD];
    size_t size;
};

/* From a program's header lines (`size` bytes with the empty line) to an answer's. 0, or -1. */
int make_answer(struct answer *answer, const struct request *request, const char *text, size_t size);
/* Where the empty line after a head ends; 0: not yet. */
size_t find_head_end(const char *text, size_t size);

#endif
