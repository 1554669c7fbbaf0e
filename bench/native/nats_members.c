/* Members and a sender that speak NATS: what is said carries the sender's inbox, each member
 * publishes to it, and the sender counts. */

#include "members.h"

static const char opening[] =
    "CONNECT {\"verbose\":false,\"pedantic\":false,\"lang\":\"c\",\"version\":\"1\"}\r\n";
static const char acknowledgement[] = "PUB inbox 0\r\n\r\n";

static void put_text(struct session *session, const char *text) { put(session, text, strlen(text)); }

static void greet(struct session *session) {
    char text[256];
    const char *subscriptions = session->number ? "SUB said 1\r\nSUB cast 2\r\n" : "SUB inbox 3\r\n";
    snprintf(text, sizeof text, "%s%sPING\r\n", opening, subscriptions);
    put_text(session, text);
}

static void tell(struct session *sender, const char *where) {
    char text[128];
    snprintf(text, sizeof text, "PUB %s %d\r\n%s\r\n", where, MESSAGE, message);
    put_text(sender, text);
}

static void say(struct session *sender, uint32_t id) { (void)id, tell(sender, "said inbox"); }
static void cast(struct session *sender) { tell(sender, "cast"); }

/* "MSG subject sid [reply] size", or another word. Returns what it is followed by, or -1. */
static long payload(const char *line, size_t size) {
    if (memcmp(line, "MSG ", 4)) return -1;
    while (line[size - 1] != ' ') size--;
    return atol(line + size) + 2;
}

static size_t take(struct session *session, char *data, size_t size) {
    char *end = memchr(data, '\n', size);
    if (!end) return 0;
    size_t line = end + 1 - data;
    long more = payload(data, line);
    if (more >= 0) {
        if (size < line + more) return 0;
        if (session->number == 0) acknowledged++;
        else if (!memcmp(data + 4, "said", 4)) put(session, acknowledgement, sizeof acknowledgement - 1);
        else delivered++;
        return line + more;
    }
    if (!memcmp(data, "PONG", 4)) ready_count++;
    else if (!memcmp(data, "PING", 4)) put_text(session, "PONG\r\n");
    else if (!memcmp(data, "-ERR", 4)) die("NATS says: %.*s", (int)line, data);
    return line;
}
