/* Greets the agent over vsock from inside, as the host does from outside: twice, as the next host does. */
#include <linux/vm_sockets.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { SILENCE = 32768, HELLO = 1, WELCOME = 64, END_MARK = 0xA5, PAYLOAD = 18, FRAME = 9 + PAYLOAD + 1 };

static int greet(uint8_t mark)
{
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_LOCAL, .svm_port = 1};
    static uint8_t said[SILENCE + FRAME], heard[SILENCE + FRAME];
    uint8_t *hello = said + SILENCE, *welcome = heard + SILENCE;
    int agent = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (agent < 0 || connect(agent, (void *)&address, sizeof address) < 0)
        return perror("no agent"), -1;
    hello[0] = HELLO;
    hello[5] = PAYLOAD;
    hello[9] = 1;                   /* the protocol's version */
    memset(hello + 11, mark, 16);
    hello[FRAME - 1] = END_MARK;
    for (size_t sent = 0; sent < sizeof said;)
        sent += write(agent, said + sent, sizeof said - sent);
    for (size_t got = 0; got < sizeof heard;) {
        long more = read(agent, heard + got, sizeof heard - got);
        if (more <= 0)
            return perror("no welcome"), -1;
        got += more;
    }
    if (welcome[0] != WELCOME || memcmp(welcome + 9, hello + 9, PAYLOAD))
        return printf("not a welcome, but %d\n", welcome[0]), -1;
    return agent;
}

int main(void)
{
    int first = greet(1), second = greet(2);
    char none;
    if (first < 0 || second < 0)
        return 1;
    printf("welcome twice, and the first has %s\n", read(first, &none, 1) == 0 ? "gone" : "stayed");
    return 7;
}
