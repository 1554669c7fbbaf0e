/* Members and a sender that speak MQTT 3.1.1 with QoS 0 or 1: each member publishes to the sender's
 * topic, and the sender counts. With QoS 1 every hop is confirmed too. */

#include "members.h"

enum { CONNACK = 0x20, PUBLISH = 0x30, PUBACK = 0x40, SUBACK = 0x90, KEEPALIVE_S = 65535 };

static void greet(struct session *session) {
    char name[32], packet[64] = "\x10\0\0\4MQTT\4\2\xff\xff";
    int size = snprintf(name, sizeof name, "%d-%d", getpid(), session->number);
    packet[1] = 12 + size;
    put_u16(packet + 12, size);
    memcpy(packet + 14, name, size);
    put(session, packet, 14 + size);
}

static void subscribe(struct session *session, const char *topic) {
    char packet[64] = "\x82\0\0\1";
    size_t size = strlen(topic);
    packet[1] = 5 + size;
    put_u16(packet + 4, size);
    memcpy(packet + 6, topic, size);
    packet[6 + size] = qos;
    put(session, packet, 7 + size);
}

static void publish(struct session *session, const char *topic, int with_qos, size_t size) {
    static uint16_t id;
    char packet[MESSAGE + 32];
    size_t at = 4, topic_size = strlen(topic);
    put_u16(packet + 2, topic_size);
    memcpy(packet + at, topic, topic_size), at += topic_size;
    if (with_qos) put_u16(packet + at, ++id ? id : ++id), at += 2;
    memcpy(packet + at, message, size), at += size;
    packet[0] = PUBLISH | with_qos << 1;
    packet[1] = at - 2;
    put(session, packet, at);
}

static void say(struct session *sender, uint32_t id) { (void)id, publish(sender, "said", qos, MESSAGE); }
static void cast(struct session *sender) { publish(sender, "cast", 0, MESSAGE); }

/* All packets here are short enough for one or two bytes of length. */
static size_t measure(const char *data, size_t size, size_t *head) {
    if (size < 3) return 0;
    *head = data[1] & 0x80 ? 3 : 2;
    size_t whole = *head + (data[1] & 0x7f) + (*head == 3 ? data[2] * 128 : 0);
    return size < whole ? 0 : whole;
}

static void on_publish(struct session *session, const char *data, size_t head) {
    const char *topic = data + head + 2;
    if (data[0] & 2) {
        char confirmation[4] = {PUBACK, 2};
        memcpy(confirmation + 2, topic + get_u16(data + head), 2);
        put(session, confirmation, 4);
    }
    if (session->number == 0) acknowledged++;
    else if (!memcmp(topic, "said", 4)) publish(session, "acknowledged", qos, 0);
    else delivered++;
}

static size_t take(struct session *session, char *data, size_t size) {
    size_t head, whole = measure(data, size, &head);
    if (!whole) return 0;
    switch (data[0] & 0xf0) {
    case CONNACK:
        if (data[3]) die("the broker refuses with code %d", data[3]);
        if (session->number) subscribe(session, "said"), subscribe(session, "cast");
        else subscribe(session, "acknowledged");
        break;
    case SUBACK:
        session->stage++;
        ready_count += session->stage == (session->number ? 2 : 1);
        break;
    case PUBLISH: on_publish(session, data, head); break;
    }
    return whole;
}
