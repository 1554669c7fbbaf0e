/* Members and a sender that speak middlecon's protocol (docs/protocol.md). */

#include "members.h"

enum { HEADER = 20, JOINS_AS_MEMBER = 1, MORE = 1 };
enum {
    HELLO = 1, WELCOME = 2, ERROR = 3, PING = 5, PONG = 6, JOIN = 10, SYNCED = 16,
    SAY = 20, ASK = 21, CAST = 22, SEND = 23, CALL = 24, ACK = 30, RECEIPT = 33,
};

static int counted; /* acknowledgements in the parts of a receipt so far */

static size_t encode(char *frame, int kind, int flags, uint32_t to, uint32_t id, uint32_t value,
                     const char *name, const char *data, size_t size) {
    size_t name_size = strlen(name);
    put_u32(frame, HEADER - 4 + name_size + size);
    frame[4] = kind;
    frame[5] = flags;
    put_u16(frame + 6, name_size);
    put_u32(frame + 8, to);
    put_u32(frame + 12, id);
    put_u32(frame + 16, value);
    memcpy(frame + HEADER, name, name_size);
    memcpy(frame + HEADER + name_size, data, size);
    return HEADER + name_size + size;
}

/* The magic and HELLO: a map of two fixed strings, the rest is as a hub assumes it. */
static void greet(struct session *session) {
    char hello[64], bytes[128] = "\xffmc1", name[16];
    int name_size = snprintf(name, sizeof name, "c%d-%d", getpid() % 10000, session->number);
    int size = snprintf(hello, sizeof hello, "\x82\xa4name%c%s\xa8instance%c%s",
                        0xa0 | name_size, name, 0xa0 | name_size, name);
    put(session, bytes, 4 + encode(bytes + 4, HELLO, 0, 0, 0, 0, "", hello, size));
}

static void send_frame(struct session *session, int kind, int flags, uint32_t id, const char *name) {
    char frame[64];
    put(session, frame, encode(frame, kind, flags, 0, id, 0, name, "", 0));
}

static void tell(struct session *sender, int kind, uint32_t id, uint32_t timeout_ms) {
    char frame[HEADER + MESSAGE];
    put(sender, frame, encode(frame, kind, 0, sender->room, id, timeout_ms, "", message, MESSAGE));
}

static void say(struct session *sender, uint32_t id) { counted = 0, tell(sender, SAY, id, 10000); }
static void cast(struct session *sender) { tell(sender, CAST, 0, 0); }

/* A receipt is an array that begins with the array of those who acknowledged. */
static void count_receipt(const char *data, int flags) {
    unsigned char head = data[1];
    counted += head == 0xdd ? get_u32(data + 2) : head == 0xdc ? get_u16(data + 2) : head & 15;
    if (flags & MORE) return;
    if (counted != member_count) die("the receipt has %d of %d members", counted, member_count);
    acknowledged = counted;
}

static size_t take(struct session *session, char *data, size_t size) {
    if (session->stage == 0) {
        if (size < 4) return 0;
        session->stage = 1;
        return 4; /* the hub's magic */
    }
    if (size < HEADER || size < 4 + get_u32(data)) return 0;
    size_t whole = 4 + get_u32(data);
    uint32_t id = get_u32(data + 12);
    char *body = data + HEADER + get_u16(data + 6);
    switch (data[4]) {
    case WELCOME: send_frame(session, JOIN, session->number ? JOINS_AS_MEMBER : 0, 1, "room"); break;
    case ERROR: die("the hub says: %.*s", (int)(data + whole - body), body); break;
    case PING: send_frame(session, PONG, 0, 0, ""); break;
    case JOIN: session->room = get_u32(data + 8); break;
    case SYNCED: ready_count++; break;
    case SAY: case ASK: case SEND: case CALL: send_frame(session, ACK, 0, id, ""); break;
    case CAST: delivered++; break;
    case RECEIPT: if (id == current) count_receipt(body, data[5]); break;
    }
    return whole;
}
