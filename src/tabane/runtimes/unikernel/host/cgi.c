/* HTTP/1.x heads and CGI's (RFC 9112, RFC 3875): texts only, no system call. */

#define _GNU_SOURCE
#include "host.h"

#include <ctype.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { BAD_REQUEST = 400, TOO_LARGE = 413, HEAD_TOO_LARGE = 431, NOT_IMPLEMENTED = 501, BAD_VERSION = 505 };

static const char TOKEN[] = "!#$%&'*+-.^_`|~0123456789"
                            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

size_t find_head_end(const char *text, size_t size)
{
    for (const char *at = text; (at = memchr(at, '\n', text + size - at)); at++) {
        size_t next = at + 1 - text;
        if (next < size && text[next] == '\n')
            return next + 1;
        if (next + 1 < size && text[next] == '\r' && text[next + 1] == '\n')
            return next + 2;
    }
    return 0;
}

/* Cuts the next line off `*rest`; without its end. NULL at the empty one. */
static char *next_line(char **rest)
{
    char *line = *rest, *end = strchr(line, '\n');
    if (!end)
        return NULL;
    *rest = end + 1;
    if (end > line && end[-1] == '\r')
        end--;
    *end = 0;
    return *line ? line : NULL;
}

static char *find_variable(struct request *request, const char *name, size_t *index)
{
    size_t length = strlen(name);
    for (size_t n = 0; n < request->count; n++)
        if (!strncmp(request->variables[n], name, length) && request->variables[n][length] == '=') {
            *index = n;
            return request->variables[n] + length + 1;
        }
    return NULL;
}

bool add_variable(struct request *request, const char *name, const char *value)
{
    size_t room = sizeof request->text - request->text_size;
    if (request->count == MOST_VARIABLES)
        return false;
    char *text = request->text + request->text_size;
    size_t length = snprintf(text, room, "%s=%s", name, value);
    if (length >= room)
        return false;
    request->text_size += length + 1;
    request->variables[request->count++] = text;
    request->variables[request->count] = NULL;
    return true;
}

/* A field as HTTP_NAME; one that comes again is added to the first. `Proxy` would become a variable
 * that programs take for their own setting; `Connection` is about this connection only. */
static bool add_field(struct request *request, const char *name, const char *value)
{
    char variable[128] = "HTTP_";
    size_t length = strlen(name), index;
    if (!strcasecmp(name, "Proxy") || !strcasecmp(name, "Connection") || length > sizeof variable - 6)
        return true;
    for (size_t n = 0; n <= length; n++)
        variable[5 + n] = name[n] == '-' ? '_' : (char)toupper((unsigned char)name[n]);
    char *before = find_variable(request, variable, &index);
    if (!before)
        return add_variable(request, variable, value);
    static _Thread_local char joined[MOST_HEAD + 1];
    const char *between = strcasecmp(name, "Cookie") ? ", " : "; ";
    snprintf(joined, sizeof joined, "%s%s%s", before, between, value);
    if (!add_variable(request, variable, joined))
        return false;
    request->variables[index] = request->variables[--request->count];
    request->variables[request->count] = NULL;
    return true;
}

static int unhex(char digit)
{
    return digit <= '9' ? digit - '0' : (digit | 32) - 'a' + 10;
}

/* In place; false: it is none. */
static bool decode_path(char *path)
{
    char *to = path;
    for (; *path; path++, to++) {
        *to = *path;
        if (*path != '%')
            continue;
        if (!isxdigit((unsigned char)path[1]) || !isxdigit((unsigned char)path[2]))
            return false;
        *to = (char)(unhex(path[1]) << 4 | unhex(path[2]));
        if (!*to)
            return false;
        path += 2;
    }
    *to = 0;
    return true;
}

static int read_length(struct request *request, const char *value)
{
    char *end;
    if (!isdigit((unsigned char)*value) || strlen(value) > 18)
        return BAD_REQUEST;
    long long length = strtoll(value, &end, 10);
    if (*end || (request->length && request->length != length))
        return BAD_REQUEST;
    request->length = length;
    return 0;
}

static int take_field(struct request *request, char *line)
{
    char *colon = strchr(line, ':');
    if (!colon || colon == line || strspn(line, TOKEN) != (size_t)(colon - line))
        return BAD_REQUEST;
    *colon = 0;
    char *value = colon + 1 + strspn(colon + 1, " \t"), *end = value + strlen(value);
    while (end > value && strchr(" \t", end[-1]))
        *--end = 0;
    if (!strcasecmp(line, "Content-Length"))
        return read_length(request, value);
    if (!strcasecmp(line, "Transfer-Encoding")) {
        request->chunked = true;
        return strcasecmp(value, "chunked") ? NOT_IMPLEMENTED : 0;
    }
    if (!strcasecmp(line, "Content-Type"))
        return add_variable(request, "CONTENT_TYPE", value) ? 0 : HEAD_TOO_LARGE;
    if (!strcasecmp(line, "Expect"))
        request->expects = !strcasecmp(value, "100-continue");
    return add_field(request, line, value) ? 0 : HEAD_TOO_LARGE;
}

static int take_target(struct request *request, char *target)
{
    bool fits = add_variable(request, "REQUEST_URI", target);
    if (!strncasecmp(target, "http://", 7)) {
        char *path = strchr(target + 7, '/');
        target = path ? path : "/";
    }
    if (*target != '/' && strcmp(target, "*"))
        return BAD_REQUEST;
    char *query = strchr(target, '?');
    if (query)
        *query++ = 0;
    if (!decode_path(target))
        return BAD_REQUEST;
    fits = fits && add_variable(request, "PATH_INFO", target) &&
           add_variable(request, "QUERY_STRING", query ? query : "");
    return fits ? 0 : HEAD_TOO_LARGE;
}

static int take_first_line(struct request *request, char *line)
{
    char *target = line + strspn(line, TOKEN);
    if (target == line || *target != ' ')
        return BAD_REQUEST;
    *target++ = 0;
    char *version = strchr(target, ' ');
    if (!version)
        return BAD_REQUEST;
    *version++ = 0;
    if (strncmp(version, "HTTP/1.", 7) || !isdigit((unsigned char)version[7]) || version[8])
        return BAD_VERSION;
    request->old = version[7] == '0';
    request->is_head = !strcmp(line, "HEAD");
    if (!add_variable(request, "REQUEST_METHOD", line) ||
        !add_variable(request, "SERVER_PROTOCOL", version))
        return HEAD_TOO_LARGE;
    return take_target(request, target);
}

int parse_request(struct request *request)
{
    char *rest = request->head, *line = next_line(&rest), length[24];
    request->chunked = request->expects = request->old = request->is_head = false;
    request->length = 0;
    int refused = line ? take_first_line(request, line) : BAD_REQUEST;
    while (!refused && (line = next_line(&rest)))
        refused = take_field(request, line);
    if (refused)
        return refused;
    if (request->chunked) {
        if (request->length || request->old)
            return BAD_REQUEST; /* two lengths: somebody in between may take the other */
        request->length = -1;
    } else if (request->length) {
        snprintf(length, sizeof length, "%lld", request->length);
        if (!add_variable(request, "CONTENT_LENGTH", length))
            return HEAD_TOO_LARGE;
    }
    return 0;
}

/* The answer */

static const char *reason_of(int status)
{
    static const struct {
        int status;
        const char *reason;
    } REASONS[] = {
        {200, "OK"},          {201, "Created"},         {202, "Accepted"},
        {204, "No Content"},  {206, "Partial Content"}, {301, "Moved Permanently"},
        {302, "Found"},       {303, "See Other"},       {304, "Not Modified"},
        {307, "Temporary Redirect"},                    {308, "Permanent Redirect"},
        {400, "Bad Request"}, {401, "Unauthorized"},    {403, "Forbidden"},
        {404, "Not Found"},   {405, "Method Not Allowed"},
        {409, "Conflict"},    {410, "Gone"},            {413, "Content Too Large"},
        {429, "Too Many Requests"},                     {431, "Request Header Fields Too Large"},
        {500, "Internal Server Error"},                 {501, "Not Implemented"},
        {503, "Service Unavailable"},                   {504, "Gateway Timeout"},
        {505, "HTTP Version Not Supported"},
    };
    for (size_t n = 0; n < sizeof REASONS / sizeof *REASONS; n++)
        if (REASONS[n].status == status)
            return REASONS[n].reason;
    return "";
}

static bool add_line(struct answer *answer, size_t *size, const char *format, const char *name,
                     const char *value)
{
    int length = snprintf(answer->head + *size, sizeof answer->head - *size, format, name, value);
    *size += length;
    return *size < sizeof answer->head;
}

/* Whether the host says it itself, or it is about this connection only. */
static bool is_hosts_own(const char *name)
{
    static const char *const NAMES[] = {"Connection", "Keep-Alive", "Transfer-Encoding", "Upgrade",
                                        "Status"};
    for (size_t n = 0; n < sizeof NAMES / sizeof *NAMES; n++)
        if (!strcasecmp(name, NAMES[n]))
            return true;
    return false;
}

static bool take_answer_field(struct answer *answer, size_t *size, char *line)
{
    char *colon = strchr(line, ':');
    if (!colon || colon == line || strspn(line, TOKEN) != (size_t)(colon - line))
        return false;
    *colon = 0;
    char *value = colon + 1 + strspn(colon + 1, " \t");
    if (!strcasecmp(line, "Status"))
        answer->status = atoi(value);
    if (!strcasecmp(line, "Location") && answer->status == 200)
        answer->status = 302;
    if (!strcasecmp(line, "Content-Length"))
        answer->has_length = true;
    return is_hosts_own(line) || add_line(answer, size, "%s: %s\r\n", line, value);
}

int make_answer(struct answer *answer, const struct request *request, const char *text, size_t size)
{
    static _Thread_local char copy[MOST_HEAD + 1];
    memcpy(copy, text, size);
    copy[size] = 0;
    char *rest = copy, *line, first[64];
    answer->status = 200;
    answer->has_length = false;
    size_t end = sizeof first;
    memset(answer->head, ' ', end); /* room for the first line, which is known last */
    size_t fields = 0;
    for (; (line = next_line(&rest)); fields++)
        if (!take_answer_field(answer, &end, line))
            return -1;
    if (!fields || answer->status < 200 || answer->status > 599)
        return -1;
    bool empty = answer->status == 204 || answer->status == 304;
    answer->bodiless = request->is_head || empty;
    bool chunks = !answer->has_length && !empty && !request->old;
    if (!add_line(answer, &end, "%s%s\r\n", chunks ? "Transfer-Encoding: chunked\r\n" : "",
                  "Connection: close\r\n"))
        return -1;
    size_t length = snprintf(first, sizeof first, "HTTP/1.1 %d %s\r\n", answer->status,
                             reason_of(answer->status));
    answer->size = end - sizeof first + length;
    memmove(answer->head + length, answer->head + sizeof first, end - sizeof first);
    memcpy(answer->head, first, length);
    return 0;
}
