/* An HTTP app for tests: the path says what it does. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
static int served;

static void show_all(int argc, char **argv)
{
    for (int n = 1; n < argc; n++)
        printf("arg %s\n", argv[n]);
    for (char **entry = environ; *entry; entry++)
        puts(*entry);
}

int main(int argc, char **argv)
{
    const char *path = getenv("PATH_INFO");
    char body[4096];
    if (!strcmp(path, "/loop"))
        for (volatile unsigned turns = 0;; turns++)
            ;
    if (!strcmp(path, "/sleep"))
        sleep(1000);
    if (!strcmp(path, "/trap"))
        __builtin_trap();
    if (!strcmp(path, "/exit"))
        return 7;
    if (!strcmp(path, "/silent"))
        return 0;
    if (!strcmp(path, "/junk"))
        return puts("no header lines\n") < 0;
    for (char *volatile kept = body; kept && !strcmp(path, "/eat");)
        if (!(kept = malloc(1 << 20)))
            return 12;
    if (!strcmp(path, "/missing"))
        printf("Status: 404 Not Found\r\n");
    if (!strcmp(path, "/moved"))
        return printf("Location: /elsewhere\r\n\r\n") < 0;
    printf("Content-Type: text/plain\r\n\r\n");
    if (!strcmp(path, "/env"))
        show_all(argc, argv);
    if (!strcmp(path, "/file"))
        printf("%s\n", fopen("/etc/passwd", "r") ? "opened" : "refused");
    if (!strcmp(path, "/random"))
        printf("%d\n", getentropy(body, 32));
    if (!strcmp(path, "/clock"))
        printf("%lld\n", (long long)time(NULL));
    if (!strcmp(path, "/stream")) {
        printf("first\n");
        fflush(stdout);
        usleep(50000);
        printf("second\n");
    }
    if (!strcmp(path, "/cut")) {
        fflush(stdout);
        __builtin_trap();
    }
    size_t total = 0, got;
    if (!strcmp(path, "/count")) {
        while ((got = fread(body, 1, sizeof body, stdin)))
            total += got;
        printf("%zu\n", total);
    }
    if (!strcmp(path, "/echo"))
        while ((got = fread(body, 1, sizeof body, stdin)))
            fwrite(body, 1, got, stdout);
    if (!strcmp(path, "/"))
        printf("request %d\n", ++served);
    fprintf(stderr, "served %s\n", path);
    return 0;
}
