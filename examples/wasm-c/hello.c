/* An HTTP app in C for class `unikernel`: a CGI program, of which each request is a fresh instance. */

#include <stdio.h>
#include <stdlib.h>

static int served;

int main(void)
{
    const char *query = getenv("QUERY_STRING");
    printf("Content-Type: text/plain\r\n\r\n");
    printf("hello from C: %s %s", getenv("REQUEST_METHOD"), getenv("PATH_INFO"));
    printf("%s%s, request %d of mine\n", *query ? "?" : "", query, ++served);
    return 0;
}
