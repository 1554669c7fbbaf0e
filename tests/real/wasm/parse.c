/* Feeds heads to the host's parsers, which are compiled into it with sanitizers: standard input is a
 * sequence of a byte (q: of a request, a: of a program's answer), a 32-bit size, and that many bytes. */

#include "host.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct request request;

static void parse_as_request(const char *text, size_t size)
{
    memcpy(request.head, text, size);
    request.head[size] = 0;
    request.text_size = request.count = 0;
    int refused = parse_request(&request);
    printf("%d", refused);
    for (size_t n = 0; !refused && n < request.count; n++)
        printf("|%s", request.variables[n]);
    putchar('\n');
}

static void parse_as_answer(const char *text, size_t size)
{
    static struct answer answer;
    size_t end = find_head_end(text, size);
    int wrong = end ? make_answer(&answer, &request, text, end) : -1;
    printf("%d %d\n", wrong, wrong ? 0 : answer.status);
}

int main(void)
{
    int kind;
    unsigned size;
    while ((kind = getchar()) != EOF) {
        if (fread(&size, sizeof size, 1, stdin) != 1 || size > MOST_HEAD)
            return 2;
        char *text = malloc(size ? size : 1);
        if (fread(text, 1, size, stdin) != size)
            return 2;
        (kind == 'q' ? parse_as_request : parse_as_answer)(text, size);
        free(text);
    }
    return 0;
}
