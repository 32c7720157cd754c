/* The type of packets: a read-only buffer of the frame, with its metadata. */
#include "types.h"

#include <string.h>

/* Access to bytes without a copy of the whole frame. */

static Py_ssize_t packet_length(PyObject *self)
{
    return ((Packet *)self)->length;
}

static int packet_true(PyObject *self)
{
    (void)self;
    return 1;
}

static PyObject *out_of_range(const Packet *p, Py_ssize_t offset, int size)
{
    if (size == 1)
        PyErr_Format(PyExc_IndexError, "byte %zd of a frame of %u bytes", offset, p->length);
    else
        PyErr_Format(PyExc_IndexError, "%d bytes at %zd of a frame of %u bytes", size, offset, p->length);
    return NULL;
}

/* The address of `size` bytes at `offset`; a negative offset counts from the end. NULL with an exception if they are not there. */
static const uint8_t *bytes_at(const Packet *p, Py_ssize_t offset, int size)
{
    Py_ssize_t at = offset < 0 ? offset + (Py_ssize_t)p->length : offset;

    if (at < 0 || at > (Py_ssize_t)p->length - size) {
        out_of_range(p, offset, size);
        return NULL;
    }
    return lrx_packet_is_readable(p) ? p->frame + at : NULL;
}

static PyObject *packet_item(PyObject *self, Py_ssize_t index)
{
    const uint8_t *at;

    if (index < 0) /* CPython has added the length already */
        return out_of_range((Packet *)self, index - ((Packet *)self)->length, 1);
    at = bytes_at((Packet *)self, index, 1);
    return at ? PyLong_FromLong(*at) : NULL;
}

/* As PyNumber_AsSsize_t(), which costs twice as much for an int. */
static Py_ssize_t index_of(PyObject *number)
{
    if (PyLong_CheckExact(number)) {
        const Py_ssize_t index = PyLong_AsSsize_t(number);

        if (index != -1 || !PyErr_Occurred())
            return index;
        PyErr_Clear(); /* OverflowError: IndexError follows */
    }
    return PyNumber_AsSsize_t(number, PyExc_IndexError);
}

static PyObject *packet_slice(const Packet *p, PyObject *slice)
{
    Py_ssize_t start, stop, step, count;
    PyObject *bytes;
    char *to;

    if (PySlice_Unpack(slice, &start, &stop, &step) < 0)
        return NULL;
    /* No Python code can run after this, so the frame does not move. */
    count = PySlice_AdjustIndices(p->length, &start, &stop, step);
    if (!lrx_packet_is_readable(p))
        return NULL;
    if (step == 1)
        return PyBytes_FromStringAndSize((const char *)p->frame + start, count);
    bytes = PyBytes_FromStringAndSize(NULL, count);
    if (!bytes)
        return NULL;
    to = PyBytes_AsString(bytes);
    for (Py_ssize_t k = 0; k < count; k++)
        to[k] = (char)p->frame[start + k * step];
    return bytes;
}

static PyObject *packet_subscript(PyObject *self, PyObject *key)
{
    Packet *p = (Packet *)self;
    Py_ssize_t index;
    const uint8_t *at;

    if (PySlice_Check(key))
        return packet_slice(p, key);
    index = index_of(key);
    if (index == -1 && PyErr_Occurred())
        return NULL;
    at = bytes_at(p, index, 1);
    return at ? PyLong_FromLong(*at) : NULL;
}

static PyObject *packet_u16(PyObject *self, PyObject *offset)
{
    Py_ssize_t index = index_of(offset);
    const uint8_t *at;

    if (index == -1 && PyErr_Occurred())
        return NULL;
    at = bytes_at((Packet *)self, index, 2);
    return at ? PyLong_FromLong(at[0] << 8 | at[1]) : NULL;
}

static PyObject *packet_u32(PyObject *self, PyObject *offset)
{
    Py_ssize_t index = index_of(offset);
    const uint8_t *at;

    if (index == -1 && PyErr_Occurred())
        return NULL;
    at = bytes_at((Packet *)self, index, 4);
    return at ? PyLong_FromUnsignedLong((uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3]) : NULL;
}

static PyObject *address(PyObject *self, int offset)
{
    Packet *p = (Packet *)self;

    if (!p->link_header && offset)
        return lrx_packet_link_address(p);
    if (!p->link_header)
        Py_RETURN_NONE;
    if (!lrx_packet_is_readable(p))
        return NULL;
    return PyBytes_FromStringAndSize((const char *)p->frame + offset, ETHER_ADDRESS);
}

static PyObject *packet_remote(PyObject *self, void *unused)
{
    (void)unused;
    return address(self, ETHER_ADDRESS);
}

static PyObject *packet_local(PyObject *self, void *unused)
{
    (void)unused;
    return address(self, 0);
}

/* Access that copies the frame first. */

PyObject *lrx_packet_tobytes(PyObject *self, PyObject *unused)
{
    Packet *p = (Packet *)self;

    (void)unused;
    if (lrx_packet_copy_frame(p) < 0)
        return NULL;
    Py_INCREF(p->own);
    return p->own;
}

/* Views refer to the bytes and not to the packet, which may be used again while they live. PyMemoryView_FromBuffer() would not
 * keep the bytes, and a slice of a view is a second view: so the part is noted where packet_getbuffer() finds it. */
enum part { WHOLE, LINK_HEADER, DATA };

static int packet_getbuffer(PyObject *self, Py_buffer *view, int flags)
{
    Packet *p = (Packet *)self;
    uint32_t first = 0, last = p->length;

    view->obj = NULL;
    if (lrx_packet_copy_frame(p) < 0)
        return -1;
    if (p->viewing == LINK_HEADER)
        last = p->link_header;
    else if (p->viewing == DATA)
        first = p->link_header;
    return PyBuffer_FillInfo(view, p->own, (void *)(p->frame + first), last - first, 1, flags);
}

static PyObject *packet_view(PyObject *self, void *part)
{
    Packet *p = (Packet *)self;
    PyObject *view;
    const int collects = PyGC_Disable(); /* a finalizer may make a view of this very packet */

    p->viewing = (uintptr_t)part & 3;
    view = PyMemoryView_FromObject(self);
    p->viewing = WHOLE;
    if (collects)
        PyGC_Enable();
    return view;
}

static Py_hash_t packet_hash(PyObject *self)
{
    if (lrx_packet_copy_frame((Packet *)self) < 0)
        return -1;
    return PyObject_Hash(((Packet *)self)->own);
}

static PyObject *packet_compare(PyObject *self, PyObject *other, int how)
{
    Packet *p = (Packet *)self;
    Py_buffer view;
    bool equal;

    if (how != Py_EQ && how != Py_NE)
        Py_RETURN_NOTIMPLEMENTED;
    if (Py_TYPE(other) == Py_TYPE(self)) {
        Packet *q = (Packet *)other;

        if (p->length == q->length && (!lrx_packet_is_readable(p) || !lrx_packet_is_readable(q)))
            return NULL;
        equal = p->length == q->length && memcmp(p->frame, q->frame, p->length) == 0;
    } else if (PyObject_CheckBuffer(other)) {
        if (PyObject_GetBuffer(other, &view, PyBUF_SIMPLE) < 0) {
            if (!PyErr_ExceptionMatches(PyExc_BufferError) && !PyErr_ExceptionMatches(PyExc_ValueError) &&
                !PyErr_ExceptionMatches(PyExc_TypeError))
                return NULL; /* of a buffer that is written in Python, such as Ctrl-C */
            PyErr_Clear(); /* not in one piece, or released: not equal, as for bytes */
            Py_RETURN_NOTIMPLEMENTED;
        }
        /* A buffer written in Python may have run anything: look only now. */
        if ((Py_ssize_t)p->length == view.len && !lrx_packet_is_readable(p)) {
            PyBuffer_Release(&view);
            return NULL;
        }
        equal = (Py_ssize_t)p->length == view.len && memcmp(p->frame, view.buf, p->length) == 0;
        PyBuffer_Release(&view);
    } else {
        Py_RETURN_NOTIMPLEMENTED;
    }
    return PyBool_FromLong(equal == (how == Py_EQ));
}

static int packet_contains(PyObject *self, PyObject *thing)
{
    if (lrx_packet_copy_frame((Packet *)self) < 0)
        return -1;
    return PySequence_Contains(((Packet *)self)->own, thing);
}

static PyObject *packet_copy(PyObject *self, PyObject *unused)
{
    const Packet *p = (Packet *)self;
    Packet *copy;

    (void)unused;
    if (lrx_packet_own((Packet *)self) < 0)
        return NULL;
    copy = PyObject_New(Packet, Py_TYPE(self));
    if (!copy)
        return NULL;
    memcpy((char *)copy + offsetof(Packet, owner), (const char *)p + offsetof(Packet, owner),
           sizeof *p - offsetof(Packet, owner));
    Py_INCREF(copy->own);
    return (PyObject *)copy;
}

static PyObject *packet_deepcopy(PyObject *self, PyObject *memo)
{
    (void)memo;
    return packet_copy(self, NULL);
}

static PyObject *headers_of(PyObject *self)
{
    State *state = PyType_GetModuleState(Py_TYPE(self));

    /* Not when the module is loaded: linkrx.packets loads it. */
    if (state && !state->headers) {
        PyObject *headers = PyImport_ImportModule("linkrx.packets.headers");

        if (headers && !state->headers)
            state->headers = headers;
        else
            Py_XDECREF(headers);
    }
    return state ? state->headers : NULL;
}

/* Rare methods are in linkrx/packets/headers.py, which the pure Python packet uses, too. */
static PyObject *by_headers(PyObject *self, const char *function)
{
    PyObject *headers = headers_of(self);

    return headers ? PyObject_CallMethod(headers, function, "O", self) : NULL;
}

static PyObject *packet_tagged(PyObject *self, PyObject *unused)
{
    (void)unused;
    return ((Packet *)self)->flags & LRX_VLAN ? by_headers(self, "tagged") : lrx_packet_tobytes(self, NULL);
}

static PyObject *packet_repr(PyObject *self)
{
    return by_headers(self, "describe");
}

/* Metadata. */

static PyObject *packet_protocol(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLong(((Packet *)self)->protocol);
}

static PyObject *packet_wire_length(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(((Packet *)self)->wire_length);
}

static PyObject *packet_interface(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(((Packet *)self)->interface);
}

static PyObject *packet_link_type(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLong(((Packet *)self)->link_type);
}

static PyObject *packet_flag(PyObject *self, void *flag)
{
    return PyBool_FromLong(((Packet *)self)->flags & (uintptr_t)flag);
}

static PyObject *packet_timestamp(PyObject *self, void *unused)
{
    (void)unused;
    if (!(((Packet *)self)->flags & LRX_TIMESTAMP))
        Py_RETURN_NONE;
    return PyLong_FromLongLong(((Packet *)self)->timestamp);
}

static PyObject *packet_vlan(PyObject *self, void *unused)
{
    const Packet *p = (Packet *)self;
    PyObject *headers;

    (void)unused;
    if (!(p->flags & LRX_VLAN))
        Py_RETURN_NONE;
    headers = headers_of(self);
    return headers ? PyObject_CallMethod(headers, "Vlan", "HH", p->vlan_tpid, p->vlan_tci) : NULL;
}

static PyObject *packet_vnet(PyObject *self, void *unused)
{
    const Packet *p = (Packet *)self;
    PyObject *headers, *vnet, *header;

    (void)unused;
    if (!p->has_vnet)
        Py_RETURN_NONE;
    headers = headers_of(self);
    if (!headers)
        return NULL;
    vnet = PyBytes_FromStringAndSize((const char *)p->vnet, VNET_HEADER);
    if (!vnet)
        return NULL;
    header = PyObject_CallMethod(headers, "vnet_of", "OiO", vnet, p->has_vnet == 2, self);
    Py_DECREF(vnet);
    return header;
}

static PyGetSetDef packet_attributes[] = {
    {"__bytes__", lrx_bytes_method, NULL, "The frame as bytes.", NULL},
    {"frame", packet_view, NULL, "The bytes as received, link header included: a read-only memoryview.", (void *)WHOLE},
    {"link_header", packet_view, NULL,
     "The Ethernet header, 14 bytes, or empty if there is none: a read-only memoryview.", (void *)LINK_HEADER},
    {"data", packet_view, NULL, "The bytes after the link header: a read-only memoryview.", (void *)DATA},
    {"protocol", packet_protocol, NULL,
     "The EtherType that the kernel reports, or that of the Ethernet header. Without either, 0x0800 or 0x86DD by the IP\n"
     "version, and 0 for frames that are not IP.", NULL},
    {"remote", packet_remote, NULL,
     "The source MAC address, 6 bytes. Without an Ethernet header, the sender's link address that the kernel reports, or None.", NULL},
    {"local", packet_local, NULL, "The destination MAC address, 6 bytes, or None without Ethernet.", NULL},
    {"wire_length", packet_wire_length, NULL,
     "Bytes of the frame before it was cut, if the kernel reports them; else the bytes that were kept.", NULL},
    {"interface", packet_interface, NULL,
     "The index of the interface that the frame came through, on packet sockets; else 0.", NULL},
    {"link_type", packet_link_type, NULL,
     "The type of the device that the frame came through: ARPHRD_* of linux/if_arp.h. 1: Ethernet.", NULL},
    {"truncated", packet_flag, NULL, "Whether the frame was cut: `wire_length` is the length before that, if the kernel reports it.", (void *)LRX_TRUNCATED},
    {"outgoing", packet_flag, NULL, "Whether this host sent the frame; only ever True with outgoing=True.",
     (void *)LRX_OUTGOING},
    {"checksum_unfinished", packet_flag, NULL,
     "Whether the transport checksum is unfinished, because the sender left it to a device that the frame has not passed.",
     (void *)LRX_CHECKSUM_UNFINISHED},
    {"timestamp_ns", packet_timestamp, NULL,
     "Nanoseconds since 1970 at which the kernel received the frame, or None without timestamps=True.", NULL},
    {"vlan", packet_vlan, NULL, "The VLAN tag that the kernel took out of the frame, as Vlan(tpid, tci), or None.", NULL},
    {"vnet", packet_vnet, NULL, "The virtio-net header in front of the frame, or None if the source has none.",
     NULL},
    {0},
};

static PyMethodDef packet_methods[] = {
    {"tobytes", lrx_packet_tobytes, METH_NOARGS, "tobytes($self, /)\n--\n\nThe frame as bytes."},
    {"u16", packet_u16, METH_O,
     "u16($self, offset, /)\n--\n\nThe two bytes at an offset into the frame, as a big-endian number.\n\n"
     "A negative offset counts from the end. Raises IndexError if there are no two."},
    {"u32", packet_u32, METH_O,
     "u32($self, offset, /)\n--\n\nThe four bytes at an offset into the frame, as a big-endian number.\n\n"
     "A negative offset counts from the end. Raises IndexError if there are no four."},
    {"tagged", packet_tagged, METH_NOARGS,
     "tagged($self, /)\n--\n\nThe frame as it was on the wire: with the VLAN tag that the kernel took out put back."},
    {"copy", packet_copy, METH_NOARGS, "copy($self, /)\n--\n\nThe same packet, in memory of its own."},
    {"__copy__", packet_copy, METH_NOARGS, "__copy__($self, /)\n--\n\nThe same packet, in memory of its own."},
    {"__deepcopy__", packet_deepcopy, METH_O,
     "__deepcopy__($self, memo, /)\n--\n\nThe same packet, in memory of its own."},
    {"__reduce__", lrx_packet_reduce, METH_NOARGS, "__reduce__($self, /)\n--\n\nFor pickle and copy."},
    {0},
};

static PyType_Slot packet_slots[] = {
    {Py_tp_doc, "One received frame and its metadata. It never changes, however long it is kept.\n\n"
                "A packet is a read-only buffer of its frame: `packet[23]` is an int, `packet[12:14]` is bytes, and len(),\n"
                "bytes(), struct.unpack_from() and socket.send() take it. It compares equal to any buffer of the same bytes.\n"
                "A packet that is kept costs its own bytes."},
    {Py_tp_dealloc, lrx_packet_dealloc},
    {Py_tp_repr, packet_repr},
    {Py_tp_hash, packet_hash},
    {Py_tp_richcompare, packet_compare},
    {Py_tp_iter, PySeqIter_New},
    {Py_tp_getset, packet_attributes},
    {Py_tp_methods, packet_methods},
    {Py_nb_bool, packet_true},
    {Py_sq_length, packet_length},
    {Py_sq_item, packet_item},
    {Py_sq_contains, packet_contains},
    {Py_mp_length, packet_length},
    {Py_mp_subscript, packet_subscript},
    {Py_bf_getbuffer, packet_getbuffer},
    {0, NULL},
};

PyType_Spec lrx_packet_spec = {
    .name = "linkrx.Packet",
    .basicsize = sizeof(Packet),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = packet_slots,
};
