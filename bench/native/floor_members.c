/* Members and a sender of the floor's hub. */

#include "members.h"

#include "floor.h"

static void send_frame(struct session *session, char kind, uint32_t id, size_t size) {
    char frame[HEADER + MESSAGE];
    put_u32(frame, HEADER - 4 + size);
    frame[4] = kind;
    put_u32(frame + 5, id);
    memcpy(frame + HEADER, message, size);
    put(session, frame, HEADER + size);
}

static void greet(struct session *session) { send_frame(session, JOIN, session->number > 0, 0); }
static void say(struct session *sender, uint32_t id) { send_frame(sender, SAY, id, MESSAGE); }
static void cast(struct session *sender) { send_frame(sender, CAST, 0, MESSAGE); }

static size_t take(struct session *session, char *data, size_t size) {
    if (size < HEADER || size < 4 + get_u32(data)) return 0;
    uint32_t id = get_u32(data + 5);
    switch (data[4]) {
    case JOIN: ready_count++; break;
    case SAY: send_frame(session, ACK, id, 0); break;
    case CAST: delivered++; break;
    case RECEIPT: if (id == current) acknowledged = member_count; break;
    }
    return 4 + get_u32(data);
}
