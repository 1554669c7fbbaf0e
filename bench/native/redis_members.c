/* Members and a sender that speak Redis' RESP 3, in which one connection can listen and publish:
 * each member publishes into the sender's channel, and the sender counts. Replies to PUBLISH are
 * switched off. */

#include "members.h"

static const char acknowledgement[] = "*3\r\n$7\r\nPUBLISH\r\n$12\r\nacknowledged\r\n$0\r\n\r\n";

static void put_text(struct session *session, const char *text) { put(session, text, strlen(text)); }

static void greet(struct session *session) {
    put_text(session, "*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n*3\r\n$6\r\nCLIENT\r\n$5\r\nREPLY\r\n$3\r\nOFF\r\n");
    put_text(session, session->number ? "*3\r\n$9\r\nSUBSCRIBE\r\n$4\r\nsaid\r\n$4\r\ncast\r\n"
                                      : "*2\r\n$9\r\nSUBSCRIBE\r\n$12\r\nacknowledged\r\n");
}

static void tell(struct session *sender, const char *where) {
    char text[160];
    snprintf(text, sizeof text, "*3\r\n$7\r\nPUBLISH\r\n$4\r\n%s\r\n$%d\r\n%s\r\n", where, MESSAGE, message);
    put_text(sender, text);
}

static void say(struct session *sender, uint32_t id) { (void)id, tell(sender, "said"); }
static void cast(struct session *sender) { tell(sender, "cast"); }

/* The size of the value at the start of data, or 0 if it has not come whole. */
static size_t measure(const char *data, size_t size) {
    char *end = memchr(data, '\n', size);
    if (!end) return 0;
    size_t at = end + 1 - data;
    long count = atol(data + 1);
    if (*data == '$') return size < at + count + 2 ? 0 : at + count + 2;
    if (*data == '%') count *= 2;
    else if (*data != '>' && *data != '*') count = 0;
    while (count-- > 0) {
        size_t inner = measure(data + at, size - at);
        if (!inner) return 0;
        at += inner;
    }
    return at;
}

static int begins(const char *data, const char *word) { return !memcmp(data, word, strlen(word)); }

static size_t take(struct session *session, char *data, size_t size) {
    size_t whole = measure(data, size);
    if (!whole) return 0;
    if (*data == '-') die("Redis says: %.*s", (int)whole, data);
    if (begins(data, ">3\r\n$7\r\nmessage")) {
        if (session->number == 0) acknowledged++;
        else if (begins(data + 17, "$4\r\nsaid")) put(session, acknowledgement, sizeof acknowledgement - 1);
        else delivered++;
    } else if (begins(data, ">3\r\n$9\r\nsubscribe")) {
        session->stage++;
        ready_count += session->stage == (session->number ? 2 : 1);
    }
    return whole;
}
