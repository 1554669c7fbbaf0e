/* The program of the conformance suite: its first argument says what it does. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LINUX_ENOMEM = 12 }; /* WASI numbers it otherwise */

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "waits"))
        sleep(1000);
    if (!strcmp(what, "says"))
        puts("hello from inside");
    if (!strcmp(what, "exits"))
        return 3;
    if (!strcmp(what, "stays")) {
        fputs("hello from inside\n", stderr);
        for (volatile unsigned turns = 0;; turns++)
            ;
    }
    for (char *volatile kept; !strcmp(what, "eats");)
        if (!(kept = malloc(1 << 20)))
            return LINUX_ENOMEM;
    return 0;
}
