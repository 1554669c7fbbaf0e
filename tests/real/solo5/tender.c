/* A stand-in for a solo5 tender: it takes the documented command line, wants what the real one wants of
 * its surroundings, and "runs" a unikernel that does what its first argument says. It lays a seccomp
 * filter over itself before that, as solo5-spt does. */

#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <unistd.h>

static void attach_tap(const char *name)
{
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (device < 0 || ioctl(device, TUNSETIFF, &request))
        errx(1, "Could not attach interface: %s: %s", name, strerror(errno));
}

static void attach_block(const char *path)
{
    char sector[512] = "written by the tender";
    int file = open(path, O_RDWR);
    if (file < 0 || pwrite(file, sector, sizeof sector, 0) != sizeof sector)
        errx(1, "Could not open block device: %s: %s", path, strerror(errno));
}

static void take(const char *option)
{
    const char *value = strchr(option, '=');
    if (!value)
        errx(1, "Invalid option: `%s'", option);
    printf("option %s\n", option);
    if (!strncmp(option, "--net:", 6))
        attach_tap(value + 1);
    else if (!strncmp(option, "--block:", 8))
        attach_block(value + 1);
    else if (strncmp(option, "--net-mac:", 10) && strncmp(option, "--mem=", 6))
        errx(1, "Invalid option: `%s'", option);
}

static void confine(void)
{
    struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {1, &allow};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        err(1, "seccomp");
}

int main(int argc, char **argv)
{
    int n = 1;
    char head[4];
    if (argc > 1 && !strcmp(argv[1], "--version"))
        return puts("solo5-spt tender, version v0.9.0") < 0;
    for (; n < argc && argv[n][0] == '-' && strcmp(argv[n], "--"); n++)
        take(argv[n]);
    if (n + 1 >= argc)
        errx(1, "Missing KERNEL operand");
    int file = open(argv[++n], O_RDONLY);
    if (file < 0 || read(file, head, sizeof head) != sizeof head || memcmp(head, "\177ELF", 4))
        errx(1, "%s: Could not open", argv[n]);
    const char *what = n + 1 < argc ? argv[n + 1] : "";
    if (!strcmp(what, "breaks"))
        errx(1, "%s: Solo5 manifest is invalid", argv[n]);
    for (int own = n + 1; own < argc; own++)
        printf("argument %s\n", argv[own]);
    fflush(stdout);
    if (!strcmp(what, "stays"))
        signal(SIGTERM, SIG_IGN);
    confine();
    if (!strcmp(what, "says") || !strcmp(what, "stays"))
        puts("hello from inside");
    fflush(stdout);
    if (!strcmp(what, "exits"))
        return 3;
    for (size_t size = 1 << 20; !strcmp(what, "eats");)
        memset(malloc(size), 1, size);
    if (strcmp(what, "says"))
        pause();
    return 0;
}
