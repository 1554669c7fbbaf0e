/* The inner loops of a hub, on the objects of its Python code (docs/decisions/native-loops.md).
 *
 * A message to N members is N sends and N receives. What lies between two of them is done here for
 * the common case: one reader's outbox that leaves with one send, one acknowledgement that fills a
 * chunk. Whatever else there is, and every error of the other side, goes to the Python code that
 * does the same, before anything was changed. So that code says what is right, and nothing is
 * decided here.
 *
 * Attributes in slots are read where their descriptors say they are: `prepare` looks them up once.
 * References are borrowed until Python code is called; across a call, what is used after it is held.
 * The GIL is held throughout: no call here waits.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

enum { EVENTS = 1024, READ_BYTES = 64 << 10, ACK_BYTES = 20, ACK_ID_AT = 12 };

/* A frame of kind ACK without a name, data or flags, as far as its target. */
static const char PLAIN_ACK[8] = {0, 0, 0, ACK_BYTES - 4, 30, 0, 0, 0};

/* Of one read. All of it is taken out before any other code runs. */
static char chunk[READ_BYTES];

/* Classes, their slots, and functions that are known by sight */

static PyObject *Decoder, *Flusher, *Port, *Relay, *Tally, *Transport, *Wire;

static const struct { PyObject **class; const char *module, *name; } CLASSES[] = {
    {&Decoder, "tabane.middlecon.frames", "Decoder"},
    {&Flusher, "tabane.middlecon.wire", "Flusher"},
    {&Port, "tabane.middlecon.ports", "Port"},
    {&Relay, "tabane.middlecon.relay", "Relay"},
    {&Tally, "tabane.middlecon.tallies", "Tally"},
    {&Transport, "tabane.middlecon.reactor", "Transport"},
    {&Wire, "tabane.middlecon.wire", "Wire"},
};

static struct {
    Py_ssize_t decoder_rest, flusher_planned, flusher_waiting, port_backlog, port_name, port_out,
        port_urgent, port_wake, tally_asking, tally_total, tally_waiting, transport_closing,
        transport_data_received, transport_fd, transport_protocol, transport_rest, wire_congested,
        wire_decoder, wire_flusher, wire_on_ack, wire_open, wire_port, wire_quiet, wire_transport;
} at;

static const struct { PyObject **class; const char *name; Py_ssize_t *offset; } SLOTS[] = {
    {&Decoder, "rest", &at.decoder_rest},
    {&Flusher, "planned", &at.flusher_planned},
    {&Flusher, "waiting", &at.flusher_waiting},
    {&Port, "backlog", &at.port_backlog},
    {&Port, "name", &at.port_name},
    {&Port, "out", &at.port_out},
    {&Port, "urgent", &at.port_urgent},
    {&Port, "wake", &at.port_wake},
    {&Tally, "_asking", &at.tally_asking},
    {&Tally, "_total", &at.tally_total},
    {&Tally, "_waiting", &at.tally_waiting},
    {&Transport, "_closing", &at.transport_closing},
    {&Transport, "_protocol", &at.transport_protocol},
    {&Transport, "_rest", &at.transport_rest},
    {&Transport, "data_received", &at.transport_data_received},
    {&Transport, "fd", &at.transport_fd},
    {&Wire, "_decoder", &at.wire_decoder},
    {&Wire, "_flusher", &at.wire_flusher},
    {&Wire, "_quiet", &at.wire_quiet},
    {&Wire, "congested", &at.wire_congested},
    {&Wire, "on_ack", &at.wire_on_ack},
    {&Wire, "open", &at.wire_open},
    {&Wire, "port", &at.wire_port},
    {&Wire, "transport", &at.wire_transport},
};

static PyObject *wire_wake, *relay_acknowledge;

static const struct { PyObject **class; const char *name; PyObject **function; } FUNCTIONS[] = {
    {&Wire, "wake", &wire_wake},
    {&Relay, "acknowledge", &relay_acknowledge},
};

static PyObject *zero, *no_bytes;
static int prepared;
static PyObject *str_acknowledged, *str_end, *str_fail, *str_join, *str_maybe_end, *str_on_writable,
    *str_pending, *str_plan, *str_write;

static const struct { const char *text; PyObject **name; } NAMES[] = {
    {"acknowledged", &str_acknowledged}, {"end", &str_end},
    {"fail", &str_fail},                 {"join", &str_join},
    {"maybe_end", &str_maybe_end},       {"on_writable", &str_on_writable},
    {"pending", &str_pending},           {"plan", &str_plan},
    {"write", &str_write},
};

#define LENGTH(table) (sizeof(table) / sizeof *(table))
#define SLOT(object, offset) (*(PyObject **)((char *)(object) + (offset)))
#define IS(object, class) ((object) != NULL && (PyObject *)Py_TYPE(object) == (class))
#define IS_PORT(object) ((object) != NULL && PyObject_TypeCheck(object, (PyTypeObject *)Port))

static int find_slot(PyObject *class, const char *name, Py_ssize_t *offset)
{
    PyObject *found = PyObject_GetAttrString(class, name);
    if (found == NULL) return -1;
    int fits = Py_IS_TYPE(found, &PyMemberDescr_Type)
        && ((PyMemberDescrObject *)found)->d_member->type == T_OBJECT_EX;
    if (fits) *offset = ((PyMemberDescrObject *)found)->d_member->offset;
    else PyErr_Format(PyExc_TypeError, "%s of %R is no slot", name, class);
    Py_DECREF(found);
    return fits ? 0 : -1;
}

/* Once, when a hub begins: its modules cannot be imported while they import this one. */
static PyObject *prepare(PyObject *module, PyObject *nothing)
{
    (void)module, (void)nothing;
    for (size_t i = 0; i < LENGTH(CLASSES); i++) {
        PyObject *from = PyImport_ImportModule(CLASSES[i].module);
        if (from == NULL) return NULL;
        Py_XSETREF(*CLASSES[i].class, PyObject_GetAttrString(from, CLASSES[i].name));
        Py_DECREF(from);
        if (*CLASSES[i].class == NULL) return NULL;
    }
    for (size_t i = 0; i < LENGTH(SLOTS); i++)
        if (find_slot(*SLOTS[i].class, SLOTS[i].name, SLOTS[i].offset)) return NULL;
    for (size_t i = 0; i < LENGTH(FUNCTIONS); i++) {
        PyObject *function = PyObject_GetAttrString(*FUNCTIONS[i].class, FUNCTIONS[i].name);
        if (function == NULL) return NULL;
        Py_XSETREF(*FUNCTIONS[i].function, function);
    }
    prepared = 1;
    Py_RETURN_NONE;
}

/* `self` of a bound method if its function is that one, else NULL. */
static PyObject *self_of(PyObject *method, PyObject *function)
{
    if (method == NULL || !PyMethod_Check(method) || PyMethod_GET_FUNCTION(method) != function)
        return NULL;
    return PyMethod_GET_SELF(method);
}

/* Whether a call that gives nothing of interest went well: 0, else -1. Takes the reference. */
static int done(PyObject *result)
{
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* The exception that is set is a fault of ours that a wire met: it costs that wire, as in Python. */
static int fail(PyObject *wire)
{
    PyObject *type, *error, *trace;
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return -1;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    if (trace != NULL) PyException_SetTraceback(error, trace);
    Py_INCREF(wire);
    int failed = done(PyObject_CallMethodOneArg(wire, str_fail, error));
    Py_DECREF(wire);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(trace);
    return failed;
}

/* Thousands of members are more than a processor's caches hold, and each has its objects all over the
 * memory. Those of the next ones are asked for early, so that they come during the system calls. */
static void fetch(const PyObject *object, size_t size)
{
    for (size_t from = 0; object != NULL && from < size; from += 64)
        __builtin_prefetch((const char *)object + from);
}

/* Sending */

/* The transport of a wire whose port's outbox may be sent directly, or NULL. */
static PyObject *direct_transport(PyObject *wire)
{
    if (!IS(wire, Wire) || !IS_PORT(SLOT(wire, at.wire_port))) return NULL;
    PyObject *port = SLOT(wire, at.wire_port), *transport = SLOT(wire, at.wire_transport);
    PyObject *out = SLOT(port, at.port_out), *urgent = SLOT(port, at.port_urgent);
    if (SLOT(wire, at.wire_open) != Py_True || SLOT(wire, at.wire_congested) != Py_False
        || !IS(transport, Transport) || SLOT(transport, at.transport_rest) != Py_None
        || SLOT(transport, at.transport_closing) != Py_False || out == NULL || urgent == NULL
        || !PyList_CheckExact(out) || !PyList_CheckExact(urgent) || PyList_GET_SIZE(urgent))
        return NULL;
    return transport;
}

static PyObject *take_all(PyObject *out)
{
    PyObject *data = PyList_GET_SIZE(out) == 1 ? Py_NewRef(PyList_GET_ITEM(out, 0))
                                               : PyObject_CallMethodOneArg(no_bytes, str_join, out);
    if (data != NULL && PyList_SetSlice(out, 0, PyList_GET_SIZE(out), NULL)) Py_CLEAR(data);
    return data;
}

static int fd_of(PyObject *transport)
{
    return (int)PyLong_AsLong(SLOT(transport, at.transport_fd));
}

/* Write out a wire's outbox. 1: done; 0: it is Python's to do; -1: an exception is set. */
static int flush_wire(PyObject *wire)
{
    PyObject *transport = direct_transport(wire);
    if (transport == NULL) return 0;
    PyObject *out = SLOT(SLOT(wire, at.wire_port), at.port_out);
    if (PyList_GET_SIZE(out) == 0) return 1;
    if (!PyBytes_CheckExact(PyList_GET_ITEM(out, 0))) return 0;
    PyObject *data = take_all(out);
    if (data == NULL) return -1;
    Py_ssize_t size = PyBytes_GET_SIZE(data);
    ssize_t sent = send(fd_of(transport), PyBytes_AS_STRING(data), size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent != size) { /* the transport finds out why, and keeps or drops it */
        if (sent > 0) Py_SETREF(data, PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + sent, size - sent));
        Py_INCREF(transport);
        int failed = data == NULL || done(PyObject_CallMethodOneArg(transport, str_write, data));
        Py_DECREF(transport);
        Py_XDECREF(data);
        return failed ? -1 : 1;
    }
    Py_DECREF(data);
    return 1;
}

static void fetch_wire(PyObject *wires, Py_ssize_t next)
{
    PyObject *wire = next + 2 < PyList_GET_SIZE(wires) ? PyList_GET_ITEM(wires, next + 2) : NULL;
    fetch(wire, 192);
    wire = next + 1 < PyList_GET_SIZE(wires) ? PyList_GET_ITEM(wires, next + 1) : NULL;
    if (IS(wire, Wire)) {
        fetch(SLOT(wire, at.wire_transport), 128);
        fetch(SLOT(wire, at.wire_port), 128);
    }
    wire = next < PyList_GET_SIZE(wires) ? PyList_GET_ITEM(wires, next) : NULL;
    if (IS(wire, Wire) && IS_PORT(SLOT(wire, at.wire_port)))
        fetch(SLOT(SLOT(wire, at.wire_port), at.port_out), 64);
}

PyDoc_STRVAR(flush_doc, "flush(wires) -> those that were left for Python");

static PyObject *flush(PyObject *module, PyObject *wires)
{
    (void)module;
    if (!PyList_CheckExact(wires)) return PyErr_Format(PyExc_TypeError, "wires are a list");
    PyObject *left = PyList_New(0);
    for (Py_ssize_t i = 0; left != NULL && i < PyList_GET_SIZE(wires); i++) {
        PyObject *wire = PyList_GET_ITEM(wires, i);
        if (prepared) fetch_wire(wires, i + 1);
        int result = prepared ? flush_wire(wire) : 0;
        if (result < 0) result = fail(wire) ? -1 : 1;
        if (result < 0 || (result == 0 && PyList_Append(left, wire))) Py_CLEAR(left);
    }
    return left;
}

/* Call `wake` of a port, whose outbox gets its first frame. */
static int wake(PyObject *port)
{
    PyObject *call = SLOT(port, at.port_wake), *wire = self_of(call, wire_wake);
    PyObject *flusher = IS(wire, Wire) ? SLOT(wire, at.wire_flusher) : NULL;
    if (IS(flusher, Flusher) && PyList_CheckExact(SLOT(flusher, at.flusher_waiting))) {
        if (PyList_Append(SLOT(flusher, at.flusher_waiting), wire)) return -1;
        if (SLOT(flusher, at.flusher_planned) == Py_True) return 0;
        return done(PyObject_CallMethodNoArgs(flusher, str_plan));
    }
    Py_INCREF(call);
    int failed = done(PyObject_CallNoArgs(call));
    Py_DECREF(call);
    return failed;
}

PyDoc_STRVAR(fan_out_doc, "fan_out(ports, frame, limit) -> those with more than `limit` waiting");

static PyObject *fan_out(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    if (count != 3 || !prepared) return PyErr_Format(PyExc_TypeError, "fan_out is not ready");
    PyObject *frame = arguments[1], *ports = PyObject_GetIter(arguments[0]), *port;
    long long limit = PyLong_AsLongLong(arguments[2]);
    PyObject *slow = ports == NULL || PyErr_Occurred() ? NULL : PyList_New(0);
    while (slow != NULL && (port = PyIter_Next(ports)) != NULL) {
        int failed = 1;
        PyObject *out = IS_PORT(port) ? SLOT(port, at.port_out) : NULL;
        if (out == NULL || !PyList_CheckExact(out))
            PyErr_SetString(PyExc_TypeError, "frames go to ports");
        else if (PyLong_AsLongLong(SLOT(port, at.port_backlog)) > limit)
            failed = PyList_Append(slow, port);
        else if (PyList_GET_SIZE(out) || !wake(port))
            failed = PyList_Append(SLOT(port, at.port_out), frame);
        Py_DECREF(port);
        if (failed) Py_CLEAR(slow);
    }
    Py_XDECREF(ports);
    if (PyErr_Occurred()) Py_CLEAR(slow);
    return slow;
}

/* Receiving */

/* Count an acknowledgement of the message `id` by `port`. 1: done; 0: Python's to do; -1: error. */
static int count_ack(PyObject *acknowledge, PyObject *port, uint32_t id)
{
    PyObject *relay = self_of(acknowledge, relay_acknowledge);
    if (!IS(relay, Relay)) return 0;
    PyObject *pending = PyObject_GetAttr(relay, str_pending), *key = PyLong_FromUnsignedLong(id);
    PyObject *tally = NULL, *names = NULL;
    int result = pending == NULL || key == NULL ? -1 : 0;
    if (!result && PyDict_CheckExact(pending)) tally = PyDict_GetItemWithError(pending, key);
    if (!result && PyErr_Occurred()) result = -1;
    if (!IS(tally, Tally) || SLOT(tally, at.tally_asking) != Py_False) goto end;
    Py_INCREF(tally);
    PyObject *waiting = SLOT(tally, at.tally_waiting);
    names = PyObject_GetAttr(SLOT(tally, at.tally_total), str_acknowledged);
    if (names == NULL) result = -1;
    else if (PySet_Check(waiting) && PyList_CheckExact(names)) result = PySet_Discard(waiting, port);
    if (result == 1) {
        if (PyList_Append(names, SLOT(port, at.port_name))) result = -1;
        else if (PySet_GET_SIZE(waiting) == 0
                 && done(PyObject_CallMethodNoArgs(tally, str_maybe_end))) result = -1;
    }
    Py_DECREF(tally);
end:
    Py_XDECREF(names);
    Py_XDECREF(pending);
    Py_XDECREF(key);
    return result;
}

/* Take a chunk that is one plain acknowledgement, and all there is. 1: done; 0: no; -1: error. */
static int take_ack(PyObject *transport, ssize_t size)
{
    if (size != ACK_BYTES || memcmp(chunk, PLAIN_ACK, sizeof PLAIN_ACK)) return 0;
    PyObject *wire = SLOT(transport, at.transport_protocol);
    if (SLOT(transport, at.transport_closing) != Py_False || !IS(wire, Wire)
        || !IS_PORT(SLOT(wire, at.wire_port))) return 0;
    PyObject *decoder = SLOT(wire, at.wire_decoder);
    if (!IS(decoder, Decoder) || SLOT(decoder, at.decoder_rest) != no_bytes) return 0;
    if (SLOT(wire, at.wire_quiet) != zero) {
        PyObject *old = SLOT(wire, at.wire_quiet);
        SLOT(wire, at.wire_quiet) = Py_NewRef(zero);
        Py_XDECREF(old);
    }
    const unsigned char *id = (const unsigned char *)chunk + ACK_ID_AT;
    return count_ack(SLOT(wire, at.wire_on_ack), SLOT(wire, at.wire_port),
                     (uint32_t)id[0] << 24 | (uint32_t)id[1] << 16 | (uint32_t)id[2] << 8 | id[3]);
}

/* End a transport, for the reason in `errno` or because the other side closed (0). */
static int end(PyObject *transport, int number)
{
    PyObject *error = !number ? Py_NewRef(Py_None)
        : PyObject_CallFunction(PyExc_OSError, "is", number, strerror(number));
    if (error == NULL) return -1;
    int failed = done(PyObject_CallMethodOneArg(transport, str_end, error));
    Py_DECREF(error);
    return failed;
}

static int take_chunk(PyObject *transport)
{
    int fd = fd_of(transport);
    if (fd < 0) return 0; /* it ended in this round */
    ssize_t size = recv(fd, chunk, sizeof chunk, MSG_DONTWAIT);
    if (size < 0) return errno == EAGAIN || errno == EINTR ? 0 : end(transport, errno);
    if (size == 0) return end(transport, 0);
    int taken = take_ack(transport, size);
    if (taken) return taken < 0 ? fail(SLOT(transport, at.transport_protocol)) : 0;
    PyObject *data_received = SLOT(transport, at.transport_data_received);
    PyObject *data = PyBytes_FromStringAndSize(chunk, size);
    if (data == NULL) return -1;
    Py_INCREF(data_received);
    int failed = done(PyObject_CallOneArg(data_received, data));
    Py_DECREF(data_received);
    Py_DECREF(data);
    return failed;
}

/* Whose descriptor that is: a new reference, or NULL, maybe with an exception. */
static PyObject *find(PyObject *transports, int fd)
{
    PyObject *key = PyLong_FromLong(fd);
    PyObject *transport = key == NULL ? NULL : PyDict_GetItemWithError(transports, key);
    Py_XDECREF(key);
    if (transport == NULL || IS(transport, Transport)) return Py_XNewRef(transport);
    return PyErr_Format(PyExc_TypeError, "%R is no transport", transport);
}

static int take_event(const struct epoll_event *event, PyObject *transport)
{
    if (event->events & EPOLLOUT && done(PyObject_CallMethodNoArgs(transport, str_on_writable)))
        return -1;
    return event->events & ~EPOLLOUT ? take_chunk(transport) : 0;
}

/* What is in the way of one event, and in that of the one after it. */
static void fetch_protocols(PyObject **transports, int next, int ready)
{
    PyObject *transport = next + 1 < ready ? transports[next + 1] : NULL;
    if (transport != NULL) fetch(SLOT(transport, at.transport_protocol), 192);
    transport = next < ready ? transports[next] : NULL;
    PyObject *wire = transport != NULL ? SLOT(transport, at.transport_protocol) : NULL;
    if (!IS(wire, Wire)) return;
    fetch(SLOT(wire, at.wire_decoder), 64);
    fetch(SLOT(wire, at.wire_port), 128);
}

PyDoc_STRVAR(take_in_doc, "take_in(epoll_fd, transports, accept) -> how many were ready");

static PyObject *take_in(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    (void)module;
    if (count != 3 || !prepared || !PyDict_CheckExact(arguments[1]))
        return PyErr_Format(PyExc_TypeError, "take_in is not ready");
    int poller = (int)PyLong_AsLong(arguments[0]), failed = 0;
    if (PyErr_Occurred()) return NULL;
    struct epoll_event events[EVENTS];
    PyObject *transports[EVENTS];
    int ready = epoll_wait(poller, events, EVENTS, 0);
    if (ready < 0 && errno != EINTR) return PyErr_SetFromErrno(PyExc_OSError);
    for (int i = 0; i < ready; i++) {
        transports[i] = find(arguments[1], events[i].data.fd);
        failed |= transports[i] == NULL && PyErr_Occurred();
    }
    for (int i = 0; i < ready && !failed; i++) {
        fetch_protocols(transports, i + 1, ready);
        if (transports[i] != NULL) failed = take_event(&events[i], transports[i]);
        else failed = done(PyObject_CallFunction(arguments[2], "i", events[i].data.fd));
    }
    for (int i = 0; i < ready; i++) Py_XDECREF(transports[i]);
    return failed ? NULL : PyLong_FromLong(ready < 0 ? 0 : ready);
}

static PyMethodDef functions[] = {
    {"prepare", prepare, METH_NOARGS, "prepare(): look up the classes; before that, nothing is done."},
    {"flush", flush, METH_O, flush_doc},
    {"fan_out", (PyCFunction)(void (*)(void))fan_out, METH_FASTCALL, fan_out_doc},
    {"take_in", (PyCFunction)(void (*)(void))take_in, METH_FASTCALL, take_in_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "tabane.middlecon._native", "The inner loops of a hub.", -1, functions,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
    for (size_t i = 0; i < LENGTH(NAMES); i++)
        if ((*NAMES[i].name = PyUnicode_InternFromString(NAMES[i].text)) == NULL) return NULL;
    zero = PyLong_FromLong(0);
    no_bytes = PyBytes_FromString("");
    return zero == NULL || no_bytes == NULL ? NULL : PyModule_Create(&definition);
}
