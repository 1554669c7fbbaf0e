/* From the kernel's first program to a machine with disks, ports and a network, and the start order. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "talks.h"

#define MAGIC "TABANE\0\2"
#define MAX_ORDER (1 << 20)

struct order order;

long read_file(const char *path, char *into, size_t size)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return -1;
    size_t have = 0;
    long got;
    while (have < size - 1 && (got = read(file, into + have, size - 1 - have)) > 0)
        have += got;
    close(file);
    into[have] = 0;
    return have;
}

void write_file(const char *path, const char *text)
{
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0 || write(file, text, strlen(text)) < 0)
        fail("cannot write %s into %s: %s", text, path, strerror(errno));
    close(file);
}

void attach(const char *source, const char *target, const char *kind, unsigned long flags,
            const char *options)
{
    if (mkdir(target, 0755) < 0 && errno != EEXIST)
        fail("cannot make %s: %s", target, strerror(errno));
    if (mount(source, target, kind, flags, options) < 0)
        fail("cannot mount %s on %s: %s", source, target, strerror(errno));
}

/* The kernel's command line has virtio_mmio's devices, where no firmware tells them. */
static void load_modules(void)
{
    char names[4096], path[300], options[4096], line[4096];
    options[0] = 0;
    if (read_file("/proc/cmdline", line, sizeof line) > 0)
        for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n"))
            if (!strncmp(word, "virtio_mmio.", 12)) {
                strncat(options, word + 12, sizeof options - strlen(options) - 2);
                strcat(options, " ");
            }
    if (read_file("/modules", names, sizeof names) < 0)
        fail("there is no /modules in the initial file system");
    for (char *name = strtok(names, "\n"); name; name = strtok(NULL, "\n")) {
        snprintf(path, sizeof path, "/lib/%s.ko", name);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        const char *given = strcmp(name, "virtio_mmio") ? "" : options;
        if (file < 0 || (syscall(SYS_finit_module, file, given, 0) < 0 && errno != EEXIST))
            fail("cannot load %s: %s", path, strerror(errno));
        close(file);
    }
}

/* Firecracker has no ports and no names for disks: docs/guest-agent.md says what stands for them. */
bool uses_vsock(void)
{
    static int answer = -1;
    char line[4096];
    if (answer < 0)
        answer = read_file("/proc/cmdline", line, sizeof line) > 0 && strstr(line, "tabane.ports=vsock");
    return answer;
}

/* The disk with that serial number, or in that place; false: there is none. */
bool find_disk(const char *serial, char *path)
{
    static const char *const places[] = {"image0", "layer", "start", "end"};
    if (uses_vsock()) {
        int place = strncmp(serial, "image", 5) ? 0 : atoi(serial + 5) + 3;
        for (int n = 0; n < 4; n++)
            if (!strcmp(serial, places[n]))
                place = n;
        snprintf(path, DISK_PATH, "/dev/vd%c", 'a' + place);
        return !access(path, F_OK);
    }
    char file[300], found[64];
    DIR *disks = opendir("/sys/block");
    struct dirent *entry;
    bool is_there = false;
    while (disks && !is_there && (entry = readdir(disks))) {
        snprintf(file, sizeof file, "/sys/block/%s/serial", entry->d_name);
        if (read_file(file, found, sizeof found) < 0)
            continue;
        found[strcspn(found, "\n")] = 0;
        is_there = !strcmp(found, serial);
        if (is_there)
            snprintf(path, DISK_PATH, "/dev/%s", entry->d_name);
    }
    if (disks)
        closedir(disks);
    return is_there;
}

/* Where the host finds the agent. */
static int listen_on_vsock(void)
{
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = VSOCK_PORT};
    int server = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (server < 0 || bind(server, (void *)&address, sizeof address) < 0 || listen(server, 4) < 0)
        return -1;
    return server;
}

/* The host's place for what a container beside the main one says. */
static int connect_log(unsigned place)
{
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = VSOCK_LOGS + place};
    int sock = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (sock < 0 || connect(sock, (void *)&address, sizeof address) < 0)
        return -1;
    fcntl(sock, F_SETFL, O_NONBLOCK);
    return sock;
}

static int open_stand_in(const char *name)
{
    char path[DISK_PATH];
    if (!strcmp(name, "agent"))
        return listen_on_vsock();
    if (name[0] && name[1] && name[2] && name[3])     /* "out1", "err1" */
        return connect_log(2 * (atoi(name + 3) - 1) + (name[0] == 'e'));
    if (strcmp(name, "end"))
        return open("/dev/console", O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    return find_disk(name, path) ? open(path, O_WRONLY | O_SYNC | O_CLOEXEC) : -1;
}

/* A port is announced some moments after its device. */
int open_port(const char *name)
{
    if (uses_vsock())
        return open_stand_in(name);
    char file[300], found[64], path[300];
    for (int64_t end = now_ms() + 5000; now_ms() < end; usleep(500)) {
        DIR *ports = opendir("/sys/class/virtio-ports");
        struct dirent *entry;
        int port = -1;
        while (ports && port < 0 && (entry = readdir(ports))) {
            snprintf(file, sizeof file, "/sys/class/virtio-ports/%s/name", entry->d_name);
            if (read_file(file, found, sizeof found) < 0)
                continue;
            found[strcspn(found, "\n")] = 0;
            snprintf(path, sizeof path, "/dev/%s", entry->d_name);
            if (!strcmp(found, name))
                port = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
        }
        if (ports)
            closedir(ports);
        if (port >= 0)
            return port;
    }
    return -1;
}

static char *keep(const uint8_t *at, size_t length)
{
    char *text = malloc(length + 1);
    if (!text)
        fail("out of memory");
    memcpy(text, at, length);
    text[length] = 0;
    return text;
}

static bool add_word(struct words *words, const uint8_t *at, size_t length)
{
    if (words->count >= ARGS)
        return false;
    char **list = realloc(words->list, (words->count + 2) * sizeof *list);
    if (!list)
        fail("out of memory");
    words->list = list;
    list[words->count++] = keep(at, length);
    list[words->count] = NULL;
    return true;
}

static void free_words(struct words *words)
{
    for (size_t n = 0; n < words->count; n++)
        free(words->list[n]);
    free(words->list);
}

void free_program(struct program *program)
{
    free_words(&program->args);
    free_words(&program->env);
    free(program->cwd);
    free(program->path);
    free(program->where);
}

/* A name begins another; what follows is of it. */
static bool add_container(struct order *into, const uint8_t *at, size_t length)
{
    if (into->count == MAX_CONTAINERS)
        return false;
    struct container *container = &into->containers[into->count++];
    container->name = keep(at, length);
    container->image = "image0";
    container->stop_signal = SIGTERM;
    container->program.container = container;
    return true;
}

static bool parse_of_container(char tag, const uint8_t *at, size_t length, struct container *container)
{
    if (tag == 'v')
        return add_word(&container->volumes, at, length);
    if (tag == 'I')
        container->image = keep(at, length);
    else
        container->stop_signal = at[0];
    return true;
}

static uint64_t number(const uint8_t *at, size_t length)
{
    uint64_t value = 0;
    for (size_t n = 0; n < length && n < 8; n++)
        value |= (uint64_t)at[n] << (8 * n);
    return value;
}

static bool parse_field(char tag, const uint8_t *at, size_t length, struct order *into)
{
    struct container *container = into->count ? &into->containers[into->count - 1] : NULL;
    struct program *program = container ? &container->program : &into->asked;
    uint64_t value = number(at, length);
    switch (tag) {
    case 'a': return add_word(&program->args, at, length);
    case 'e': return add_word(&program->env, at, length);
    case 'f': return add_word(&into->files, at, length);
    case 'x': return add_word(&into->services, at, length);
    case 'N': return add_container(into, at, length);
    case 'v': case 'I': case 'S':
        return container && length && parse_of_container(tag, at, length, container);
    case 'k': program->where = keep(at, length); return true;
    case 'T': into->stop_ms = value; return true;
    case 'w': program->cwd = keep(at, length); return true;
    case 'p': program->path = keep(at, length); return true;
    case 'h': into->hostname = keep(at, length); return true;
    case 'u': program->uid = value; program->has_user = true; return true;
    case 'g': program->gid = value; return true;
    case 'G':
        if (program->groups_count >= 64)
            return false;
        program->groups[program->groups_count++] = value;
        return true;
    case 'c': program->capabilities = value; return true;
    case 'i': program->has_input = true; return true;
    case 'n': program->as_named = true; return true;
    case 't':
        program->has_terminal = true;
        program->rows = value;
        program->columns = value >> 16;
        return true;
    case 'A': memcpy(&into->address, at, length < 4 ? length : 4); return true;
    case 'R': memcpy(&into->gateway, at, length < 4 ? length : 4); return true;
    case 'M': memcpy(into->gateway_mac, at, length < 6 ? length : 6); return true;
    case 'H': memcpy(into->mac, at, length < 6 ? length : 6); return true;
    case 'E': into->epoch = keep(at, length); return true;
    case 'm': into->memory_bytes = value; return true;
    case 'P': into->pids = value; return true;
    case 'C': into->clock_ns = value; return true;
    case 's': add_entropy(at, length); return true;
    default: return true;           /* of a newer host */
    }
}

bool parse_fields(const uint8_t *at, size_t length, struct order *into)
{
    while (length >= 5) {
        size_t size = number(at + 1, 4);
        if (size > length - 5 || !parse_field(at[0], at + 5, size, into))
            return false;
        at += 5 + size;
        length -= 5 + size;
    }
    return length == 0;
}

void read_order(void)
{
    char path[DISK_PATH];
    uint8_t head[12];
    if (!find_disk("start", path))
        fail("there is no disk with a start order");
    int disk = open(path, O_RDONLY | O_CLOEXEC);
    if (disk < 0 || read(disk, head, sizeof head) != sizeof head || memcmp(head, MAGIC, 8))
        fail("the start order on %s is none", path);
    size_t length = number(head + 8, 4), have = 0;
    uint8_t *text = malloc(length);
    if (length > MAX_ORDER || !text)
        fail("the start order has %zu bytes: too many", length);
    long got;
    while (have < length && (got = read(disk, text + have, length - have)) > 0)
        have += got;
    close(disk);
    if (have < length || !parse_fields(text, length, &order) || !order.count)
        fail("the start order breaks off or has no container");
    for (size_t n = 0; n < order.count; n++)
        if (!order.containers[n].program.args.count)
            fail("the start order has a container without a command");
    free(text);
}

void add_entropy(const uint8_t *seed, size_t length)
{
    static struct { struct rand_pool_info info; uint8_t data[64]; } pool;
    static int device = -1;
    if (device < 0)
        device = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    if (length > sizeof pool.data)
        length = sizeof pool.data;
    pool.info.entropy_count = length * 8;
    pool.info.buf_size = length;
    memcpy(pool.info.buf, seed, length);
    if (!ioctl(device, RNDADDENTROPY, &pool))
        ioctl(device, RNDRESEEDCRNG);
}

void set_clock(uint64_t ns)
{
    struct timespec wall = {ns / 1000000000, ns % 1000000000};
    clock_settime(CLOCK_REALTIME, &wall);
}

static void control(int sock, unsigned long request, void *argument, const char *what)
{
    if (ioctl(sock, request, argument) < 0 && errno != EEXIST)
        fail("cannot %s: %s", what, strerror(errno));
}

bool find_interface(char *name)
{
    DIR *all = opendir("/sys/class/net");
    struct dirent *entry;
    name[0] = 0;
    while (all && (entry = readdir(all)))
        if (entry->d_name[0] != '.' && strcmp(entry->d_name, "lo"))
            snprintf(name, IFNAMSIZ, "%s", entry->d_name);
    if (all)
        closedir(all);
    return name[0];
}

static void put_address(struct sockaddr *into, uint32_t address)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = address};
    memcpy(into, &at, sizeof at);
}

static void set_up(int sock, struct ifreq *request)
{
    request->ifr_flags = IFF_UP | IFF_RUNNING;
    control(sock, SIOCSIFFLAGS, request, "set an interface up");
}

/* The gateway is on the link, and its hardware address is known: nobody has to ask for it. */
void configure_network(void)
{
    int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {.ifr_name = "lo"};
    set_up(sock, &request);
    if (order.address) {
        struct rtentry route = {.rt_flags = RTF_UP | RTF_HOST};
        struct arpreq neighbour = {.arp_flags = ATF_PERM | ATF_COM};
        if (!find_interface(request.ifr_name))
            fail("there is no network interface");
        put_address(&request.ifr_addr, order.address);
        control(sock, SIOCSIFADDR, &request, "set the address");
        put_address(&request.ifr_addr, 0xffffffff);
        control(sock, SIOCSIFNETMASK, &request, "set the netmask");
        set_up(sock, &request);
        route.rt_dev = request.ifr_name;
        put_address(&route.rt_dst, order.gateway);
        put_address(&route.rt_genmask, 0xffffffff);
        control(sock, SIOCADDRT, &route, "add the route to the gateway");
        put_address(&route.rt_dst, 0);
        put_address(&route.rt_genmask, 0);
        put_address(&route.rt_gateway, order.gateway);
        route.rt_flags = RTF_UP | RTF_GATEWAY;
        control(sock, SIOCADDRT, &route, "add the default route");
        put_address(&neighbour.arp_pa, order.gateway);
        neighbour.arp_ha.sa_family = ARPHRD_ETHER;
        memcpy(neighbour.arp_ha.sa_data, order.gateway_mac, 6);
        strcpy(neighbour.arp_dev, request.ifr_name);
        control(sock, SIOCSARP, &neighbour, "add the neighbour");
    }
    close(sock);
    write_file("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
}

void boot(void)
{
    attach("proc", "/proc", "proc", 0, NULL);
    attach("sys", "/sys", "sysfs", 0, NULL);
    if (mount("dev", "/dev", "devtmpfs", 0, NULL) < 0 && errno != EBUSY)
        fail("cannot mount /dev: %s", strerror(errno));
    load_modules();
}

void configure(void)
{
    if (order.clock_ns)             /* of the moment before the machine began */
        set_clock(order.clock_ns + now_ms() * 1000000);
    if (order.hostname && sethostname(order.hostname, strlen(order.hostname)) < 0)
        fail("cannot be called %s: %s", order.hostname, strerror(errno));
    configure_network();
}
