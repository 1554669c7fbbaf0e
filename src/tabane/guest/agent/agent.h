/* The agent in a guest: its first process. docs/guest-agent.md describes what it says and hears.
 *
 * main.c   the loop: the port to the host, the app's output, the end
 * talks.c  conversations with the host
 * boot.c   modules, disks, mounts, network, as the order on the start disk says
 * volumes.c  disks that outlive the machine
 * run.c    programs: the app's own, and those of conversations
 * pack.c   files out; unpack.c: files in
 * facts.c  what the host asks: processes, sockets that listen, figures, clock, entropy
 *
 * One thread, which never blocks for long; all that may take time is done in a child.
 */
#ifndef AGENT_H
#define AGENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum {
    VERSION = 1,
    MAX_PAYLOAD = 16384,
    HEADER = 9,
    END_MARK = 0xA5,
    SILENCE = 32768,   /* zero bytes in a row that no frame can contain: a connection begins */
    WINDOW = 65536,    /* bytes of a stream under way that nobody has taken */
    MAX_TALKS = 32,
    NONCE = 16,
    HANGUP_MS = 2000,  /* from HUP to KILL */
    ARGS = 4096,       /* words of a command or its environment */
    VSOCK_PORT = 1,
    DISK_PATH = 300,
};

enum { HELLO = 1, EXEC, PUT, GET, LIST, INPUT, END_INPUT, RESIZE, SIGNAL, CLOSE, GRANT,
       LISTEN, STATS, LIMIT, CLOCK, RESEED };
enum { WELCOME = 64, OUTPUT, COMPLAINT, TAKEN, ENDED, ANSWER, REFUSED, BEGUN, DIAL,
       END_OUTPUT };
enum { USAGE = 'u', BUSY = 'b', FAULT = 'f' };

struct words {
    char *list[ARGS + 1];
    size_t count;
};

/* What a start order or a conversation says of a program; what it does not say is the app's own. */
struct program {
    struct words args, env;
    char *cwd, *path;
    bool has_user, has_input, has_terminal, as_named;
    uid_t uid;
    gid_t gid, groups[64];
    size_t groups_count;
    uint64_t capabilities;
    uint16_t rows, columns;
};

struct order {
    struct program app;
    char *hostname;
    uint32_t address, gateway;      /* as on the wire */
    uint8_t gateway_mac[6];
    uint64_t memory_bytes, clock_ns;
    uint32_t pids;
    struct words files;             /* "NAME=text": of /etc */
    struct words volumes;           /* where the app sees them, in the order of their disks */
};

extern struct order order;

/* main.c */
void fail(const char *form, ...) __attribute__((noreturn, format(printf, 1, 2)));
int64_t now_ms(void);

/* boot.c */
bool find_disk(const char *serial, char *path);
void attach(const char *source, const char *target, const char *kind, unsigned long flags,
            const char *options);
void boot(void);
void prepare_app(void);
bool uses_vsock(void);
int open_port(const char *name);
void write_file(const char *path, const char *text);
long read_file(const char *path, char *into, size_t size);
bool parse_fields(const uint8_t *at, size_t length, struct order *into);
void add_entropy(const uint8_t *seed, size_t length);
void set_clock(uint64_t ns);

/* volumes.c */
void mount_volumes(void);
void release_volumes(void);

/* run.c */
struct streams {
    int in, out, err;               /* our ends; -1: none */
};
pid_t start_app(struct streams *streams);
pid_t start_command(const struct program *program, const char *group, struct streams *streams,
                    char *problem, size_t size);
pid_t start_work(const struct program *program, const char *group, int (*work)(const struct program *),
                 struct streams *streams);
void signal_group(const char *group, int number);
void kill_group(const char *group);
void remove_group(const char *group);
bool set_size(int terminal, uint16_t rows, uint16_t columns);

/* pack.c, unpack.c */
int pack(const struct program *program);
int unpack(const struct program *program);

/* facts.c */
int list_processes(const struct program *program);
bool listens(uint16_t port);
size_t tell_figures(uint8_t *into);
bool was_out_of_memory(void);
bool limit(const struct order *limits);
bool is_empty_group(const char *group);
size_t put_field(uint8_t *into, char tag, const void *data, uint32_t length);

#endif
