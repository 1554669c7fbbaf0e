/* What a program inside an instance tries, to find out what it may.
 *
 *     inside euid          its effective user id: of a set-user-id copy of it, what it gained
 *     inside forks         how many processes it could start, of 500
 *     inside files DIR     how many files it can make there, of 5,000; then it removes them
 *     inside eat MIB       takes so much memory; ended by the kernel when it may not have it */

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST_FORKS = 500, MOST_FILES = 5000, PAGE = 4096 };

static int count_forks(void)
{
    static pid_t children[MOST_FORKS];
    int count = 0;
    while (count < MOST_FORKS && (children[count] = fork()) >= 0) {
        if (children[count] == 0)
            for (;;)
                pause();
        count++;
    }
    for (int n = 0; n < count; n++)
        kill(children[n], SIGKILL);
    for (int n = 0; n < count; n++)
        waitpid(children[n], NULL, 0);
    return count;
}

static int count_files(void)
{
    char name[16];
    int count = 0, file;
    for (; count < MOST_FILES; count++) {
        snprintf(name, sizeof name, "many%d", count);
        if ((file = open(name, O_WRONLY | O_CREAT | O_EXCL, 0600)) < 0)
            break;
        close(file);
    }
    for (int n = 0; n < count; n++) {
        snprintf(name, sizeof name, "many%d", n);
        unlink(name);
    }
    return count;
}

static int eat(size_t bytes)
{
    volatile char *food = malloc(bytes);
    for (size_t at = 0; food && at < bytes; at += PAGE)
        food[at] = 1;
    return food ? 0 : 1;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "euid"))
        return printf("%d\n", (int)geteuid()) < 0;
    if (!strcmp(what, "forks"))
        return printf("%d\n", count_forks()) < 0;
    if (!strcmp(what, "files") && argc > 2)
        return chdir(argv[2]) < 0 || printf("%d\n", count_files()) < 0;
    if (!strcmp(what, "eat") && argc > 2)
        return eat((size_t)atoi(argv[2]) << 20);
    return 2;
}
