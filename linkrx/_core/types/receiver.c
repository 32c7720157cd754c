/* What was received and is not handed over yet, and the ways to hand it over. */
#include "types.h"

#include <string.h>

/* Objects that a delivery needs beside the packet: made once per neighbour and protocol. */
typedef struct {
    uint8_t header[ETHER_HEADER];
    PyObject *remote;
    PyObject *local;
    PyObject *protocol; /* NULL: this place is free */
} Neighbour;

#define NEIGHBOURS 16

typedef struct {
    PyObject_HEAD
    State *state;
    Py_buffer descriptors;  /* what mechanisms report: header words and a table */
    PyObject *claims;       /* a dict; while there is anything in it, somebody receives */
    Framing framing;
    size_t arena_size;
    Owner *arenas[2];       /* made when first needed */
    unsigned current;       /* which one was filled last */
    bool filling;           /* that one is being filled, or describes what is not taken in yet */
    Batch *pending;         /* what is to be handed over, from packet `next` on; or NULL */
    uint32_t next;
    volatile bool stopping;
    bool delivering;
    Packet *delivered;      /* used for one delivery after the other */
    Packet *turns[2];       /* these two for what is asked for packet by packet */
    unsigned turn;
    uint64_t batches, receives;
    uint64_t undelivered, undelivered_bytes; /* packets that drop() gave up */
    Neighbour neighbours[NEIGHBOURS];
} Receiver;

/* Taking in what a mechanism has filled. */

static void forget_pending(Receiver *r)
{
    Batch *b = r->pending;

    r->pending = NULL;
    r->next = 0;
    Py_XDECREF((PyObject *)b);
}

/* A packet that only this receiver has shows nothing from here on. One that somebody else has too is theirs. */
static void let_go(Packet **slot)
{
    if (!*slot)
        return;
    if (Py_REFCNT((PyObject *)*slot) > 1)
        Py_CLEAR(*slot);
    else
        lrx_packet_reset(*slot);
}

static void let_go_of_all(Receiver *r)
{
    let_go(&r->delivered);
    let_go(&r->turns[0]);
    let_go(&r->turns[1]);
}

/* The arena to fill next. One arena is enough, and stays in the cache, for those who hold nothing. Who holds the last batch,
 * as a loop variable does, has two take turns. */
static Owner *arena_of(Receiver *r)
{
    Owner *o = r->arenas[r->current];

    if (r->filling)
        return o;
    let_go_of_all(r);
    if (!o || !lrx_owner_is_free(o)) {
        const unsigned other = o ? !r->current : r->current;

        o = r->arenas[other];
        if (o) {
            switch (lrx_owner_take_back(o)) {
            case TAKEN_NOT:
                return NULL;
            case GIVEN_AWAY:
                r->arenas[other] = NULL;
                Py_DECREF((PyObject *)o);
                o = NULL;
                break;
            case TAKEN_BACK:
                break;
            }
        }
        if (!o)
            o = r->arenas[other] = lrx_owner_new(r->state, r->arena_size);
        if (!o)
            return NULL;
        r->current = other;
    }
    r->filling = true;
    return o;
}

static PyObject *receiver_arena(PyObject *self, PyObject *unused)
{
    PyObject *arena = (PyObject *)arena_of((Receiver *)self);

    (void)unused;
    Py_XINCREF(arena);
    return arena;
}

static PyObject *receiver_take_in(PyObject *self, PyObject *memory)
{
    Receiver *r = (Receiver *)self;
    uint32_t *header = lrx_header_at((uintptr_t)r->descriptors.buf);
    Owner *owner = (Owner *)memory, *arena = r->arenas[r->current];
    uint32_t count, end = header[LRX_END], rows = header[LRX_ROWS];
    struct lrx_columns columns;
    const uint8_t *base;
    Batch *b = NULL;

    if (Py_TYPE(memory) != r->state->owner_type || !r->filling || r->pending || !header[LRX_CLASSIFIED]) {
        PyErr_SetString(PyExc_ValueError, "nothing to take in: fill and classify first");
        return NULL;
    }
    count = header[LRX_CLASSIFIED] - 1;
    if (count > rows || ARENA_START + (uint64_t)end + (uint64_t)rows * LRX_ROW_BYTES > arena->mapped) {
        PyErr_Format(PyExc_ValueError, "the backend reports %u packets that end at byte %u of an arena of %zu", rows, end,
                     arena->mapped);
        return NULL;
    }
    if (count) {
        columns = lrx_columns_at((uintptr_t)arena->memory + ARENA_START + end, rows);
        base = owner == arena ? arena->memory + ARENA_START : owner->memory;
        b = lrx_batch_new(r->state, owner, base, owner == arena ? end : UINT32_MAX, &columns, count, r->framing);
        if (!b)
            return NULL;
    }
    r->pending = b;
    r->next = 0;
    r->batches++;
    r->receives += header[LRX_RECEIVES];
    r->filling = false;
    header[LRX_CLASSIFIED] = 0;
    return PyBool_FromLong(b != NULL);
}

/* Handing over. */

/* The objects for the packet that was set last. */
static const Neighbour *neighbour_of(Receiver *r, const Packet *p)
{
    uint8_t header[ETHER_HEADER] = {0};
    unsigned sum = 0;
    Neighbour *n;

    if (p->link_header) {
        memcpy(header, p->frame, ETHER_HEADER);
    } else {
        header[12] = (uint8_t)(p->protocol >> 8);
        header[13] = (uint8_t)p->protocol;
    }
    for (int k = 0; k < ETHER_HEADER; k++)
        sum = sum * 31 + header[k];
    n = &r->neighbours[sum % NEIGHBOURS];
    if (n->protocol && memcmp(n->header, header, ETHER_HEADER) == 0)
        return n;
    Py_CLEAR(n->remote);
    Py_CLEAR(n->local);
    Py_CLEAR(n->protocol);
    memcpy(n->header, header, ETHER_HEADER);
    if (p->link_header) {
        n->remote = PyBytes_FromStringAndSize((const char *)header + ETHER_ADDRESS, ETHER_ADDRESS);
        n->local = PyBytes_FromStringAndSize((const char *)header, ETHER_ADDRESS);
    } else {
        n->remote = Py_None;
        n->local = Py_None;
        Py_INCREF(Py_None);
        Py_INCREF(Py_None);
    }
    if (n->remote && n->local)
        n->protocol = PyLong_FromLong(p->protocol);
    return n->protocol ? n : NULL;
}

static PyObject *call(const State *state, PyObject *deliver, const Neighbour *n, Packet *p)
{
    PyObject *arguments[] = {n->remote, n->local, n->protocol, (PyObject *)p};
    PyObject *result;

    /* `deliver` may receive, and a neighbour may lose its place meanwhile. */
    for (int k = 0; k < 3; k++)
        Py_INCREF(arguments[k]);
    result = state->vectorcall ? state->vectorcall(deliver, arguments, 4, NULL)
                               : PyObject_CallFunctionObjArgs(deliver, arguments[0], arguments[1], arguments[2],
                                                              arguments[3], NULL);
    for (int k = 0; k < 3; k++)
        Py_DECREF(arguments[k]);
    return result;
}

/* The position moves on before each call, so what `deliver` raises costs no packet, and repeats none. */
static PyObject *receiver_deliver(PyObject *self, PyObject *deliver)
{
    Receiver *r = (Receiver *)self;
    Batch *b = r->pending;
    Py_ssize_t delivered = 0;
    PyObject *result;

    if (!b)
        return PyLong_FromLong(0);
    Py_INCREF((PyObject *)b);
    r->delivering = true;
    while (r->pending == b && !r->stopping) {
        Packet *p = lrx_packet_in(r->state, &r->delivered);
        const Neighbour *n;

        if (!p || lrx_packet_set(p, b, r->next) < 0 || !(n = neighbour_of(r, p)))
            goto failed;
        if (++r->next == (uint32_t)b->table->count)
            forget_pending(r);
        Py_INCREF((PyObject *)p);
        result = call(r->state, deliver, n, p);
        delivered++;
        /* Whoever has the packet still has a copy from here on. Without memory for it, it reads in place until the memory is
         * taken back. */
        if (Py_REFCNT((PyObject *)p) > 2 || r->delivered != p) {
            if (result && lrx_packet_own(p) < 0)
                PyErr_Clear();
        }
        Py_DECREF((PyObject *)p);
        if (!result)
            goto failed;
        Py_DECREF(result);
    }
    r->delivering = false;
    Py_DECREF((PyObject *)b);
    return PyLong_FromSsize_t(delivered);

failed:
    r->delivering = false;
    Py_DECREF((PyObject *)b);
    return NULL;
}

static Packet *next_packet(Receiver *r)
{
    Packet **slot = &r->turns[r->turn & 1];
    Packet *p = lrx_packet_in(r->state, slot);

    if (!p || lrx_packet_set(p, r->pending, r->next) < 0)
        return NULL;
    r->turn++;
    if (++r->next == (uint32_t)r->pending->table->count)
        forget_pending(r);
    Py_INCREF((PyObject *)p);
    return p;
}

static PyObject *receiver_take_packet(PyObject *self, PyObject *unused)
{
    Receiver *r = (Receiver *)self;

    (void)unused;
    if (!r->pending)
        Py_RETURN_NONE;
    return (PyObject *)next_packet(r);
}

static PyObject *receiver_iternext(PyObject *self)
{
    Receiver *r = (Receiver *)self;

    if (!r->pending || r->stopping || PyDict_Size(r->claims))
        return NULL;
    return (PyObject *)next_packet(r);
}

static PyObject *receiver_iterate(PyObject *self)
{
    Py_INCREF(self);
    return self;
}

static PyObject *receiver_take_batch(PyObject *self, PyObject *unused)
{
    Receiver *r = (Receiver *)self;
    Batch *b = r->pending;

    (void)unused;
    if (!b)
        Py_RETURN_NONE;
    if (r->next)
        lrx_batch_skip(b, r->next);
    r->pending = NULL;
    r->next = 0;
    return (PyObject *)b;
}

static PyObject *receiver_drop(PyObject *self, PyObject *unused)
{
    Receiver *r = (Receiver *)self;
    const Batch *b = r->pending;

    (void)unused;
    if (b) {
        r->undelivered += (uint64_t)b->table->count - r->next;
        for (Py_ssize_t k = r->next; k < b->table->count; k++)
            r->undelivered_bytes += b->table->lengths[k];
        forget_pending(r);
    }
    Py_RETURN_NONE;
}

/* Not named close(): a generator that is closed calls that of what it yields from. */
static PyObject *receiver_release(PyObject *self, PyObject *unused)
{
    Receiver *r = (Receiver *)self;

    (void)unused;
    forget_pending(r);
    let_go_of_all(r);
    r->filling = false;
    for (int k = 0; k < 2; k++) {
        Owner *o = r->arenas[k];

        if (!o)
            continue;
        /* Without memory for copies the arena stays, for as long as somebody reads there. */
        if (lrx_owner_take_back(o) == TAKEN_NOT)
            PyErr_Clear();
        r->arenas[k] = NULL;
        Py_DECREF((PyObject *)o);
    }
    Py_RETURN_NONE;
}

static PyObject *receiver_stop(PyObject *self, PyObject *unused)
{
    (void)unused;
    ((Receiver *)self)->stopping = true;
    Py_RETURN_NONE;
}

/* Attributes. */

static PyObject *receiver_left(PyObject *self, void *unused)
{
    const Receiver *r = (Receiver *)self;

    (void)unused;
    return PyLong_FromSsize_t(r->pending ? r->pending->table->count - r->next : 0);
}

static PyObject *receiver_stopping(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((Receiver *)self)->stopping);
}

static PyObject *receiver_delivering(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((Receiver *)self)->delivering);
}

static PyObject *receiver_count(PyObject *self, void *offset)
{
    return PyLong_FromUnsignedLongLong(*(const uint64_t *)((const char *)self + (uintptr_t)offset));
}

/* Making one. */

/* Receiver(descriptors, rows, arena_size, claims, link_header, vnet, big_endian) */
static PyObject *receiver_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"descriptors", "arena_size", "claims", "link_header", "vnet", "big_endian", NULL};
    State *state = PyType_GetModuleState(type);
    PyObject *descriptors, *claims;
    Py_ssize_t arena_size;
    unsigned link_header, vnet;
    int big_endian;
    Receiver *r;

    if (!state || !PyArg_ParseTupleAndKeywords(args, keywords, "OnO!IIp:Receiver", names, &descriptors, &arena_size,
                                               &PyDict_Type, &claims, &link_header, &vnet, &big_endian))
        return NULL;
    if (arena_size <= ARENA_START || arena_size > UINT32_MAX || (link_header != 0 && link_header != ETHER_HEADER) ||
        (vnet != 0 && (vnet < VNET_HEADER || vnet > UINT16_MAX))) {
        PyErr_SetString(PyExc_ValueError, "no such arena, link header or virtio-net header");
        return NULL;
    }
    r = PyObject_New(Receiver, type);
    if (!r)
        return NULL;
    memset((char *)r + offsetof(Receiver, state), 0, sizeof *r - offsetof(Receiver, state));
    r->state = state;
    if (PyObject_GetBuffer(descriptors, &r->descriptors, PyBUF_WRITABLE) < 0)
        goto refused;
    if (r->descriptors.len < LRX_HEADER_BYTES) {
        PyErr_SetString(PyExc_ValueError, "descriptors begin with a header");
        goto refused;
    }
    Py_INCREF(claims);
    r->claims = claims;
    r->arena_size = (size_t)arena_size;
    r->framing = (Framing){.link_header = (uint8_t)link_header, .big_endian = big_endian != 0, .vnet = vnet};
    return (PyObject *)r;

refused:
    Py_DECREF((PyObject *)r);
    return NULL;
}

static void receiver_dealloc(PyObject *self)
{
    Receiver *r = (Receiver *)self;

    forget_pending(r);
    Py_CLEAR(r->delivered);
    Py_CLEAR(r->turns[0]);
    Py_CLEAR(r->turns[1]);
    Py_CLEAR(r->arenas[0]);
    Py_CLEAR(r->arenas[1]);
    for (int k = 0; k < NEIGHBOURS; k++) {
        Py_CLEAR(r->neighbours[k].remote);
        Py_CLEAR(r->neighbours[k].local);
        Py_CLEAR(r->neighbours[k].protocol);
    }
    Py_CLEAR(r->claims);
    PyBuffer_Release(&r->descriptors);
    lrx_free(self);
}

#define COUNT(name, text) {#name, receiver_count, NULL, text, (void *)offsetof(Receiver, name)}

static PyGetSetDef receiver_attributes[] = {
    {"left", receiver_left, NULL, "How many packets wait to be handed over.", NULL},
    {"stopping", receiver_stopping, NULL, "Whether stop() was called.", NULL},
    {"delivering", receiver_delivering, NULL, "Whether deliver() is running.", NULL},
    COUNT(batches, "How often something was taken in."),
    COUNT(receives, "System calls that received it, or blocks of a ring."),
    COUNT(undelivered, "Packets that drop() gave up."),
    COUNT(undelivered_bytes, "Bytes of these."),
    {0},
};

static PyMethodDef receiver_methods[] = {
    {"arena", receiver_arena, METH_NOARGS,
     "arena($self, /)\n--\n\nThe arena to fill now. What is still read there is copied first. Raises MemoryError, and loses nothing."},
    {"take_in", receiver_take_in, METH_O,
     "take_in($self, owner, /)\n--\n\nMake a batch of what the descriptors tell, whose frames lie in memory of `owner`. False: no packet."},
    {"deliver", receiver_deliver, METH_O,
     "deliver($self, deliver, /)\n--\n\nCall deliver(remote, local, protocol, packet) for each packet that waits. Returns how many."},
    {"take_packet", receiver_take_packet, METH_NOARGS, "take_packet($self, /)\n--\n\nThe next packet, or None."},
    {"take_batch", receiver_take_batch, METH_NOARGS, "take_batch($self, /)\n--\n\nAll that waits, or None."},
    {"drop", receiver_drop, METH_NOARGS, "drop($self, /)\n--\n\nGive up what waits, and count it as undelivered."},
    {"stop", receiver_stop, METH_NOARGS, "stop($self, /)\n--\n\nHand nothing over any more. In any thread."},
    {"release", receiver_release, METH_NOARGS, "release($self, /)\n--\n\nGive the memory up. What is held of it is copied."},
    {0},
};

static PyType_Slot receiver_slots[] = {
    {Py_tp_doc, "Receiver(descriptors, arena_size, claims, link_header, vnet, big_endian)\n--\n\n"
                "What was received and is not handed over yet, and the ways to hand it over."},
    {Py_tp_new, receiver_new},
    {Py_tp_dealloc, receiver_dealloc},
    {Py_tp_iter, receiver_iterate},
    {Py_tp_iternext, receiver_iternext},
    {Py_tp_getset, receiver_attributes},
    {Py_tp_methods, receiver_methods},
    {0, NULL},
};

PyType_Spec lrx_receiver_spec = {
    .name = "linkrx._core._types.Receiver",
    .basicsize = sizeof(Receiver),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = receiver_slots,
};
