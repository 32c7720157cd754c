/* The type of the receiver: making and releasing one, and the methods and attributes for its subclass in Python. */
#include "hold.h"

#include <string.h>
#include <unistd.h>

/* For the subclass. */

/* _prepare(deliver, descriptors, rows, counters, room, prefix, packet_info, link_header, link_type, per_packet, vnet,
 *          big_endian, interface,
 *          may_hang_up, source, event, epoll, latency, hold_most) */
static PyObject *receiver_prepare(PyObject *self, PyObject *args)
{
    Receiver *r = (Receiver *)self;
    PyObject *deliver, *descriptors, *counters;
    unsigned rows, room, prefix, packet_info, link_header, link_type, per_packet, vnet, interface;
    int big_endian, may_hang_up;

    if (r->prepared) {
        PyErr_SetString(PyExc_ValueError, "_prepare() was called before");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OOIOIIIIIIIpIpiiidI:_prepare", &deliver, &descriptors, &rows, &counters, &room, &prefix,
                          &packet_info, &link_header, &link_type, &per_packet, &vnet, &big_endian, &interface, &may_hang_up, &r->source, &r->event,
                          &r->epoll, &r->latency, &r->hold_most))
        return NULL;
    if (rows == 0 || rows > 1u << 20 || room > 1u << 30 || (link_header != 0 && link_header != ETHER_HEADER) ||
        (vnet != 0 && vnet < VNET_HEADER) || (packet_info != 0 && packet_info != 4) || link_type > UINT16_MAX || per_packet > LRX_PER_PACKET_LINK_TYPE || prefix != vnet + packet_info) {
        PyErr_SetString(PyExc_ValueError, "invalid rows, room, or headers in front of frames");
        return NULL;
    }
    if (PyObject_GetBuffer(descriptors, &r->descriptors, PyBUF_WRITABLE) < 0 ||
        PyObject_GetBuffer(counters, &r->counters, PyBUF_WRITABLE) < 0)
        return NULL;
    if (r->descriptors.len < (Py_ssize_t)(sizeof(struct lrx_report) + (size_t)rows * LRX_ROW_BYTES) ||
        r->counters.len < (Py_ssize_t)(LRX_COUNTERS * sizeof(uint64_t))) {
        PyErr_SetString(PyExc_ValueError, "descriptors or counters are too short");
        return NULL;
    }
    r->rows = r->most = rows;
    r->room = room;
    r->table_rows = rows;
    r->arena_size = ARENA_START + (size_t)lrx_align(room);
    if (r->latency > 0 && lrx_prepare_holding(r) < 0)
        return NULL;
    r->may_hang_up = may_hang_up;
    r->framing = (Framing){
        .link_header = (uint8_t)link_header,
        .per_packet = (uint8_t)per_packet,
        .link_type = (uint16_t)link_type,
        .big_endian = big_endian != 0,
        .vnet = vnet,
    };
    r->classifier = (struct lrx_classifier){
        .descriptors = (uintptr_t)r->descriptors.buf,
        .rows = rows,
        .prefix = prefix,
        .packet_info = packet_info,
        .link_header = link_header,
        .link_type = link_type,
        .per_packet = per_packet,
        .interface = interface,
        .counters = (uintptr_t)r->counters.buf,
    };
    if (!may_hang_up && !r->collected) /* C code that fills classifies as well, while the frames are in the cache */
        report_of(r)->classifier = &r->classifier;
    if (deliver != Py_None) {
        Py_INCREF(deliver);
        r->deliver = deliver;
    }
    if (r->state->process) {
        if (!*r->state->process)
            *r->state->process = getpid();
        r->process = *r->state->process;
    }
    r->prepared = true;
    Py_RETURN_NONE;
}

/* _prepare_sending(one of enum lrx_sends) */
static PyObject *receiver_prepare_sending(PyObject *self, PyObject *how)
{
    Receiver *r = (Receiver *)self;
    const long sends = PyLong_AsLong(how);

    if (PyErr_Occurred())
        return NULL;
    if (!r->prepared || r->framing.vnet > LRX_VNET_MOST || sends < LRX_SENDS_NOTHING || sends > LRX_SENDS_POLLED) {
        PyErr_SetString(PyExc_ValueError, "invalid enum lrx_sends");
        return NULL;
    }
    r->sends = (int)sends;
    Py_RETURN_NONE;
}

static int leave_mechanism(Receiver *r)
{
    if (lrx_copy_slots(r) < 0)
        return -1;
    r->mechanism = NULL;
    r->reads_memory = false;
    Py_CLEAR(r->slots[0]);
    Py_CLEAR(r->slots[1]);
    return 0;
}

/* _use(address of a struct lrx_mechanism, or 0 for _fill()) */
static PyObject *receiver_use(PyObject *self, PyObject *address)
{
    Receiver *r = (Receiver *)self;
    struct lrx_mechanism *m = PyLong_AsVoidPtr(address);

    if (PyErr_Occurred() || leave_mechanism(r) < 0)
        return NULL;
    if (m && m->slots) {
        for (int slot = 0; slot < 2; slot++) {
            r->slots[slot] = lrx_owner_new(r->state, 0);
            if (!r->slots[slot])
                return NULL;
            r->slots[slot]->guard = (const volatile uint32_t *)m->slots->guard;
        }
        r->reads_memory = true;
        r->latency = 0; /* a ring holds packets back itself, and only its fill knows where the frames lie */
        report_of(r)->classifier = &r->classifier;
    }
    r->mechanism = m;
    Py_RETURN_NONE;
}

static PyObject *receiver_drop(PyObject *self, PyObject *unused)
{
    Receiver *r = (Receiver *)self;

    (void)unused;
    if (r->prepared)
        lrx_drop(r);
    Py_RETURN_NONE;
}

/* Not named close(): Dispatcher has that. */
static PyObject *receiver_release(PyObject *self, PyObject *unused)
{
    Receiver *r = (Receiver *)self;
    bool all = true;

    (void)unused;
    lrx_forget_pending(r);
    lrx_reset_packets(r);
    r->filling = false;
    if (leave_mechanism(r) < 0) {
        PyErr_Clear();
        all = false;
    }
    for (int k = 0; k < 2; k++) {
        /* Without memory for copies, the arena stays while packets or batches read there. */
        if (r->arenas[k] && lrx_owner_take_back(r->arenas[k]) == TAKEN_NOT)
            PyErr_Clear();
        Py_CLEAR(r->arenas[k]);
    }
    return PyBool_FromLong(all);
}

static PyObject *receiver_copy_held(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (lrx_copy_slots((Receiver *)self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* In C, because in Python an exception of a signal handler could leave it claimed. */
static PyObject *receiver_close_alone(PyObject *self, PyObject *unused)
{
    Receiver *r = (Receiver *)self;
    PyObject *answer;

    (void)unused;
    if (r->claimed)
        Py_RETURN_FALSE;
    r->claimed = r->closed = true;
    r->thread = PyThread_get_thread_ident();
    answer = PyObject_CallMethod(self, "_release_all", NULL);
    r->claimed = false;
    if (!answer)
        return NULL;
    Py_DECREF(answer);
    Py_RETURN_TRUE;
}


/* Attributes. */

static PyObject *receiver_left(PyObject *self, void *unused)
{
    const Receiver *r = (Receiver *)self;

    (void)unused;
    return PyLong_FromSsize_t(r->pending ? r->pending->table->count - r->next : 0);
}

static PyObject *receiver_thread(PyObject *self, void *unused)
{
    const Receiver *r = (Receiver *)self;

    (void)unused;
    if (!r->claimed)
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLong(r->thread);
}

static PyObject *receiver_busy(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(lrx_has_something((Receiver *)self));
}

static PyObject *receiver_was_full(PyObject *self, void *unused)
{
    const Receiver *r = (Receiver *)self;

    (void)unused;
    return PyBool_FromLong(r->prepared && lrx_was_full(r));
}

static PyObject *receiver_flag(PyObject *self, void *offset)
{
    return PyBool_FromLong(*((const bool *)((const char *)self + (uintptr_t)offset)));
}

static int receiver_set_flag(PyObject *self, PyObject *value, void *offset)
{
    const int truth = value ? PyObject_IsTrue(value) : -1;

    if (!value)
        PyErr_SetString(PyExc_AttributeError, "a flag cannot be deleted");
    if (truth < 0)
        return -1;
    *((bool *)((char *)self + (uintptr_t)offset)) = truth != 0;
    return 0;
}

static PyObject *receiver_count(PyObject *self, void *offset)
{
    return PyLong_FromUnsignedLongLong(*(const uint64_t *)((const char *)self + (uintptr_t)offset));
}

/* Making one. */

/* The module state, which the base type has. NULL for a type that is no receiver. */
static State *state_of(PyTypeObject *type)
{
    for (PyTypeObject *base = type; base; base = PyType_GetSlot(base, Py_tp_base)) {
        State *state = PyType_GetFlags(base) & Py_TPFLAGS_HEAPTYPE ? PyType_GetModuleState(base) : NULL;

        if (state && state->receiver_type == base)
            return state;
        PyErr_Clear();
    }
    return NULL;
}

bool lrx_is_receiver(PyObject *o)
{
    return state_of(Py_TYPE(o)) != NULL;
}

static PyObject *receiver_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    State *state = state_of(type);
    Receiver *r;

    (void)args, (void)keywords;
    r = state ? (Receiver *)allocate(type, 0) : NULL;
    if (!state)
        PyErr_SetString(PyExc_TypeError, "no subclass of linkrx's Receiver");
    if (!r)
        return NULL;
    r->state = state;
    r->source = r->event = r->epoll = -1;
    return (PyObject *)r;
}

static int receiver_traverse(PyObject *self, visitproc visit, void *arg)
{
    Receiver *r = (Receiver *)self;

    Py_VISIT((PyObject *)Py_TYPE(self));
    Py_VISIT(r->deliver);
    return 0;
}

static int receiver_clear(PyObject *self)
{
    Receiver *r = (Receiver *)self;

    Py_CLEAR(r->deliver);
    return 0;
}

static void receiver_dealloc(PyObject *self)
{
    Receiver *r = (Receiver *)self;
    PyTypeObject *type = Py_TYPE(self);
    freefunc free = (freefunc)PyType_GetSlot(type, Py_tp_free);

    PyObject_GC_UnTrack(self);
    receiver_clear(self);
    lrx_forget_pending(r);
    Py_CLEAR(r->spare);
    Py_CLEAR(r->filter);
    Py_CLEAR(r->next_filter.program);
    Py_CLEAR(r->delivered);
    Py_CLEAR(r->turns[0]);
    Py_CLEAR(r->turns[1]);
    for (int k = 0; k < 2; k++) {
        Py_CLEAR(r->arenas[k]);
        Py_CLEAR(r->slots[k]);
    }
    for (int k = 0; k < NEIGHBOURS; k++) {
        Py_CLEAR(r->neighbours[k].remote);
        Py_CLEAR(r->neighbours[k].local);
        Py_CLEAR(r->neighbours[k].protocol);
    }
    if (r->descriptors.obj)
        PyBuffer_Release(&r->descriptors);
    if (r->counters.obj)
        PyBuffer_Release(&r->counters);
    PyMem_Free(r->collected);
    free(self);
    Py_DECREF((PyObject *)type);
}

static PyGetSetDef receiver_attributes[] = {
    {"_left", receiver_left, NULL, "The number of pending packets.", NULL},
    {"_thread", receiver_thread, NULL, "The thread that is inside, or None.", NULL},
    {"_has_something", receiver_busy, NULL, "Whether packets, an error or the end wait here, so that the source need not be readable.", NULL},
    {"_was_full", receiver_was_full, NULL, "Whether the last receive may have ended because the batch was full, by rows or by bytes.", NULL},
    {"_stopping", receiver_flag, receiver_set_flag, "Whether stop() was called.", (void *)offsetof(Receiver, stopping)},
    {"_flushing", receiver_flag, receiver_set_flag, "Whether stop(flush=True) was called.",
     (void *)offsetof(Receiver, flushing)},
    {"_delivering", receiver_flag, NULL, "Whether `deliver` is running.", (void *)offsetof(Receiver, delivering)},
    {"_closed", receiver_flag, receiver_set_flag, "Whether calls are refused.", (void *)offsetof(Receiver, closed)},
    {"_leaving", receiver_flag, receiver_set_flag, "_last_left() is to be called when no call is inside.",
     (void *)offsetof(Receiver, leaving)},
    {"_end_follows", receiver_flag, receiver_set_flag, "Whether the end follows the received packets.",
     (void *)offsetof(Receiver, end_follows)},
    {"_ended", receiver_flag, receiver_set_flag, "Whether reception is over.", (void *)offsetof(Receiver, ended)},
    {"_quiet", receiver_flag, receiver_set_flag, "Whether the caller that polls has seen the end: fileno() stays unreadable.",
     (void *)offsetof(Receiver, quiet)},
    {"_link_down", receiver_flag, receiver_set_flag, "Whether the link is down.", (void *)offsetof(Receiver, link_down)},
    {"_source_paused", receiver_flag, receiver_set_flag, "Whether the source is out of the poll set.",
     (void *)offsetof(Receiver, source_paused)},
    {"_looped", receiver_flag, receiver_set_flag, "Whether an event loop of this process watches it.",
     (void *)offsetof(Receiver, looped)},
    {"_polled", receiver_flag, receiver_set_flag, "Whether fileno() is polled.", (void *)offsetof(Receiver, polled)},
    {"_readable", receiver_flag, receiver_set_flag, "Whether the event is set, which makes fileno() readable: packets wait here.",
     (void *)offsetof(Receiver, readable)},
    {"_sent", receiver_count, NULL, "Frames that were sent.", (void *)offsetof(Receiver, sent)},
    {"_batches", receiver_count, NULL, "Batches that were received.", (void *)offsetof(Receiver, batches)},
    {"_receives", receiver_count, NULL, "System calls that received, or blocks of a ring.",
     (void *)offsetof(Receiver, receives)},
    {"_waits", receiver_count, NULL, "Calls that slept.", (void *)offsetof(Receiver, waits)},
    {"_undelivered", receiver_count, NULL, "Packets that _drop() dropped.", (void *)offsetof(Receiver, undelivered)},
    {"_undelivered_bytes", receiver_count, NULL, "Bytes of these.", (void *)offsetof(Receiver, undelivered_bytes)},
    {0},
};

#define FAST(function) (PyCFunction)(void (*)(void))function

static PyMethodDef receiver_methods[] = {
    {"dispatch", FAST(lrx_receiver_dispatch), METH_FASTCALL | METH_KEYWORDS,
     "dispatch($self, /, timeout=None)\n--\n\n"
     "Wait for packets, receive one batch and deliver it in order.\n\n"
     "Waits for `timeout` seconds at most; None is no limit. Returns True, also if nothing came in time: call again. Returns\n"
     "False after the end of reception: `end` says why. Raises the exceptions of `deliver`; the next call then begins with the\n"
     "next packet. Raises Busy while another call receives, Closed after close(), and OSError for kernel errors that linkrx\n"
     "cannot handle."},
    {"run", FAST(lrx_receiver_run), METH_VARARGS | METH_KEYWORDS,
     "run($self, /, *, count=None, duration=None)\n--\n\n"
     "`dispatch()` until the end of reception, or `count` packets were delivered, or `duration` seconds have passed.\n\n"
     "Returns the `End`, or None if a limit was reached. The next call then goes on with the next packet, also in the middle\n"
     "of a batch. A duration holds under load: it is checked after each packet. Raises what `dispatch` raises, and TypeError\n"
     "or ValueError for an invalid limit, such as count=0."},
    {"drain", lrx_receiver_drain, METH_NOARGS,
     "drain($self, /)\n--\n\nReceive without waiting, and deliver at most one batch. Returns the number of packets."},
    {"recv", FAST(lrx_receiver_recv), METH_FASTCALL | METH_KEYWORDS,
     "recv($self, /, timeout=None)\n--\n\n"
     "The next packet.\n\nRaises TimeoutError after `timeout` seconds without a packet, and Ended after the end of reception."},
    {"send", lrx_receiver_send, METH_O,
     "send($self, frame, /)\n--\n\n"
     "Send one frame through the source. Any thread may call it, also while another one receives.\n\n"
     "`frame` is bytes or another buffer, link header included. A packet is sent as it was on the wire, `tagged()`, with its\n"
     "virtio-net header if the source has one. Never waits: raises BlockingIOError if the queue is full. Raises\n"
     "UnsupportedSource for a source that cannot send (a pipe, a cooked, unbound or unconnected socket), ValueError for a\n"
     "packet that needs a virtio-net header on a source without one (an unfinished checksum, a super-packet), Closed, and\n"
     "OSError for kernel errors, such as ENETDOWN, EMSGSIZE, and EINVAL for a frame that is too short."},
    {"send_batch", lrx_receiver_send_batch, METH_O,
     "send_batch($self, frames, /)\n--\n\n"
     "Send the frames of a batch or an iterable, in order, as `send` does. Returns how many the kernel accepted.\n\n"
     "That is fewer if the queue becomes full, 0 if it is full at once, and fewer if a frame is refused. If the first frame is\n"
     "refused, this raises as `send` does; otherwise the next call, which begins with that frame, raises.\n\n"
     "An exception of a signal handler propagates; `stats().sent` counts the frames that were sent before it."},
    {"_prepare_sending", receiver_prepare_sending, METH_O, "Set the system call that sends: one of enum lrx_sends."},
    {"_next_batch", lrx_receiver_next_batch, METH_VARARGS,
     "_next_batch($self, timeout, until, /)\n--\n\n"
     "The next batch. None at the end, after `timeout` seconds without a batch, and after the time `until`."},
    {"_poll", lrx_receiver_poll, METH_NOARGS,
     "_poll($self, /)\n--\n\nReceive without waiting. Whether packets are pending, or reception is over."},
    {"_hold_back", lrx_receiver_hold_back, METH_NOARGS,
     "_hold_back($self, /)\n--\n\nReceive what is in the queue, and hold it back. True: hand over what is held back now."},
    {"_take", lrx_receiver_take, METH_NOARGS, "_take($self, /)\n--\n\nA pending packet, or None."},
    {"_prepare", receiver_prepare, METH_VARARGS, "Set up the receiver for a source."},
    {"_use", receiver_use, METH_O, "_use($self, mechanism, /)\n--\n\nFill with this struct lrx_mechanism, or, with 0, by _fill()."},
    {"_set_filter", lrx_receiver_set_filter, METH_VARARGS,
     "_set_filter($self, program, tags, seconds, /)\n--\n\n"
     "Run a program of struct sock_filter, or the programs of a capture file, on received and on pending packets. Empty: none.\n"
     "With `seconds` of 0 or more it ends when the queue was empty, but not within these seconds. False: another thread is\n"
     "inside; call _exchange_filter() until it returns True."},
    {"_exchange_filter", lrx_receiver_exchange_filter, METH_NOARGS,
     "_exchange_filter($self, /)\n--\n\nWhether the filter is replaced, or will be before the next delivery. False: the receiving thread was woken."},
    {"_drop", receiver_drop, METH_NOARGS, "_drop($self, /)\n--\n\nDrop the pending packets, and count them."},
    {"_release", receiver_release, METH_NOARGS,
     "_release($self, /)\n--\n\nRelease all memory. Packets and batches that are held are copied. False: there was no memory for some."},
    {"_copy_held", receiver_copy_held, METH_NOARGS,
     "_copy_held($self, /)\n--\n\nCopy packets and batches out of memory that a child process will not have."},
    {"_close_alone", receiver_close_alone, METH_NOARGS,
     "_close_alone($self, /)\n--\n\nClose, and call _release_all(), unless a call is inside. False: one is."},
    {0},
};

static PyType_Slot receiver_slots[] = {
    {Py_tp_doc, "The part of a dispatcher that runs once per packet or once per wake-up."},
    {Py_tp_new, receiver_new},
    {Py_tp_dealloc, receiver_dealloc},
    {Py_tp_traverse, receiver_traverse},
    {Py_tp_clear, receiver_clear},
    {Py_tp_iter, lrx_receiver_iterate},
    {Py_tp_iternext, lrx_receiver_next},
    {Py_tp_getset, receiver_attributes},
    {Py_tp_methods, receiver_methods},
    {0, NULL},
};

PyType_Spec lrx_receiver_spec = {
    .name = "linkrx._core._types.Receiver",
    .basicsize = sizeof(Receiver),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = receiver_slots,
};
