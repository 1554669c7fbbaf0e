/* sleepers COUNT: has COUNT children that sleep until it ends, says how many there are, and waits. */

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(int count, char **arguments)
{
    int wanted = count > 1 ? atoi(arguments[1]) : 0, made = 0;
    for (; made < wanted; made++) {
        pid_t child = fork();
        if (child < 0) break;
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (;;) pause();
        }
    }
    printf("%d\n", made);
    fflush(stdout);
    for (;;) pause();
}
