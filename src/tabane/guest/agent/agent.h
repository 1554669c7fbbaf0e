/* The agent in a guest: its first process. docs/guest-agent.md describes what it says and hears.
 *
 * main.c   the loop: the port to the host, what comes and goes
 * ends.c   the containers' output, their ends, and the machine's
 * talks.c  conversations with the host
 * links.c  connections of programs to sockets of the node
 * boot.c   modules, disks, network, ports; the order on the start disk
 * clones.c standing still for a checkpoint, and going on as another
 * containers.c  their root file systems and namespaces
 * volumes.c  disks that outlive the machine
 * run.c    programs: the containers' own, and those of conversations
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
    MAX_CONTAINERS = 9,
    MAX_VOLUMES = 8,
    VSOCK_PORT = 1,
    VSOCK_LOGS = 1024,  /* and those after it: two for each container beside the main one */
    DISK_PATH = 300,
};

enum { HELLO = 1, EXEC, PUT, GET, LIST, INPUT, END_INPUT, RESIZE, SIGNAL, CLOSE, GRANT,
       LISTEN, STATS, LIMIT, CLOCK, RESEED, HOLD, RELEASE };
enum { WELCOME = 64, OUTPUT, COMPLAINT, TAKEN, ENDED, ANSWER, REFUSED, BEGUN, DIAL,
       END_OUTPUT };
enum { USAGE = 'u', BUSY = 'b', FAULT = 'f' };

struct words {
    char **list;                    /* NULL, or a NULL after the last */
    size_t count;
};

/* What a start order or a conversation says of a program; what it does not say is its container's. */
struct program {
    struct container *container;
    struct words args, env;
    char *cwd, *path, *where;       /* `where`: a conversation's container, by name */
    bool has_user, has_input, has_terminal, as_named;
    uid_t uid;
    gid_t gid, groups[64];
    size_t groups_count;
    uint64_t capabilities;
    uint16_t rows, columns;
};

/* A root file system with namespaces of its own, and the program that it is there for. */
struct container {
    char *name, *image;             /* `image`: the serial number of its disk */
    struct program program;
    struct words volumes;           /* "NUMBER=PATH": of the disk with the serial number volumeNUMBER */
    uint32_t stop_signal;
    char root[32];                  /* where it is for us */
    int spaces;                     /* the pidfd of the first process in its namespaces */
    pid_t pid;                      /* its program's; 0: none, or it has ended */
    int status;
};

/* The containers in the order of their start: the main one is the last. */
struct order {
    struct container containers[MAX_CONTAINERS];
    size_t count;
    struct program asked;           /* what is said before any container */
    char *hostname;
    uint32_t address, gateway;      /* as on the wire */
    uint8_t gateway_mac[6], mac[6]; /* `mac`: our own, where it is not the device's */
    uint64_t memory_bytes, clock_ns;
    uint32_t pids, stop_ms;
    struct words files;             /* "NAME=text": of /etc */
    struct words services;          /* names of sockets in /run/tabane */
    char *epoch;                    /* of one that goes on as another */
};

extern struct order order;

/* main.c */
int64_t now_ms(void);

/* boot.c */
bool find_disk(const char *serial, char *path);
void attach(const char *source, const char *target, const char *kind, unsigned long flags,
            const char *options);
void boot(void);
void read_order(void);
void configure(void);
void configure_network(void);
bool find_interface(char *name);
bool uses_vsock(void);
int open_port(const char *name);
void write_file(const char *path, const char *text);
long read_file(const char *path, char *into, size_t size);
bool parse_fields(const uint8_t *at, size_t length, struct order *into);
void add_entropy(const uint8_t *seed, size_t length);
void set_clock(uint64_t ns);

/* containers.c */
void make_containers(void);
struct container *find_container(const char *name);
bool enter_spaces(const struct container *container);
size_t number_of(const struct container *container);
bool is_main(const struct container *container);
int reach(const char *root, const char *path);

/* clones.c */
bool hold_programs(void);
void release_programs(const struct order *other);
bool listened(uint16_t port);

/* volumes.c */
void mount_volumes(void);
void release_volumes(void);

/* run.c */
struct streams {
    int in, out, err;               /* our ends; -1: none */
};
void start_program(struct container *container, struct streams *streams);
pid_t start_command(const struct program *program, const char *group, struct streams *streams,
                    char *problem, size_t size);
pid_t start_work(const struct program *program, const char *group, int (*work)(const struct program *),
                 struct streams *streams);
void signal_group(const char *group, int number);
void kill_group(const char *group);
bool make_group(const char *group);
void remove_group(const char *group);
void join_group(const char *group);
bool drop_capabilities(uint64_t kept);
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
void free_program(struct program *program);
size_t put_field(uint8_t *into, char tag, const void *data, uint32_t length);

#endif
