/* The packets of one receive: columns, and the memory of the frames. memory.c explains where frames lie. */
#include "types.h"

#include <string.h>

Batch *lrx_batch_new(State *state, uint32_t count, Framing framing)
{
    Batch *b = PyObject_New(Batch, state->batch_type);

    if (!b)
        return NULL;
    memset((char *)b + offsetof(Batch, state), 0, sizeof *b - offsetof(Batch, state));
    b->state = state;
    b->framing = framing;
    b->settled = true;
    b->table = lrx_table_new(state, count);
    if (!b->table) {
        Py_DECREF((PyObject *)b);
        return NULL;
    }
    return b;
}

/* Whether frame k lies in `size` bytes, with its link header and a virtio-net header in front. */
static inline bool is_inside(const Table *t, Framing framing, uint32_t k, uint32_t size)
{
    const uint32_t place = t->offsets[k], length = t->columns.lengths[k];
    const uint32_t header = framing.per_packet ? t->columns.link_headers[k] : framing.link_header;

    return (place >= framing.vnet) & (length >= header) & ((uint64_t)place + length <= size);
}

/* Raise ValueError for the first frame outside, or for too many bytes. */
static void refuse(const Batch *b, uint64_t packed, uint32_t size)
{
    const Table *t = b->table;
    uint32_t k = 0;

    while (k < t->count && is_inside(t, b->framing, k, size))
        k++;
    if (k < t->count)
        PyErr_Format(PyExc_ValueError, "the backend reports packet %u at %u, %u bytes long, in %u bytes of memory", k, t->offsets[k],
                     t->columns.lengths[k], size);
    else
        PyErr_Format(PyExc_ValueError, "the backend reports %u packets with %llu bytes, in %u bytes of memory", k,
                     (unsigned long long)packed, size);
}

int lrx_batch_begin(Batch *b, Owner *owner, const uint8_t *base, uint32_t size, uint32_t rows, uint32_t count)
{
    const Framing framing = b->framing;
    Table *t = b->table;
    uint32_t *compact;
    uint64_t packed = 0; /* frames that overlap could take more than their memory has */
    uint32_t end = 0;
    bool ascending = true, inside = true;

    if (owner->batch) {
        PyErr_SetString(PyExc_BufferError, "another batch still uses this memory: call take_back() first");
        return -1;
    }
    compact = lrx_table_lay_out(t, rows);
    t->count = count;
    for (uint32_t k = 0; k < count; k++) {
        const uint32_t place = t->offsets[k], length = t->columns.lengths[k];

        inside &= is_inside(t, framing, k, size);
        ascending &= place - framing.vnet >= end;
        end = place + length > end ? place + length : end;
        compact[k] = (uint32_t)packed + framing.vnet;
        packed += lrx_align(framing.vnet + length);
    }
    if (!inside || packed > UINT32_MAX) {
        refuse(b, packed, size);
        return -1;
    }
    /* In a ring, `memory` is a copy of the frames, because blocks have other data. In an arena it is a copy if more than half of the
     * memory lies between frames: that is faster than zeroing the gaps, and keeps less memory. It is also a copy if a frame lies before
     * the end of an earlier one, as a short packet after a long one of recvmmsg does: clear_gaps() goes through the memory once. */
    b->apart = !owner->mapped || !ascending || end / 2 > packed;
    if (b->apart && count) {
        t->columns.starts = compact;
        end = compact[count - 1] + t->columns.lengths[count - 1];
    }
    b->settled = b->tidy = false;
    b->size = count ? end : 0;
    b->base = base;
    Py_INCREF((PyObject *)owner);
    b->owner = owner;
    owner->batch = b;
    return 0;
}

Batch *lrx_batch_of_its_size(Batch *b, Batch **spare)
{
    const uint32_t count = (uint32_t)b->table->count;
    Batch *fit;

    if (!b->owner || count >= b->table->room / 2) /* without owner it was copied, before a fork */
        return b;
    fit = lrx_batch_new(b->state, count, b->framing);
    if (!fit)
        return NULL;
    lrx_table_copy(fit->table, &b->table->columns, b->framing.per_packet);
    if (b->apart) {
        fit->table->offsets = lrx_table_lay_out(fit->table, count);
        memcpy(fit->table->offsets, b->table->offsets, count * sizeof *fit->table->offsets);
    }
    fit->settled = false;
    fit->apart = b->apart;
    fit->size = b->size;
    fit->base = b->base;
    fit->owner = b->owner;
    fit->owner->batch = fit;
    b->owner = NULL;
    lrx_batch_give_up(b, spare);
    return fit;
}

void lrx_batch_skip(Batch *b, uint32_t n)
{
    lrx_table_skip(b->table, n);
}

static void leave_owner(Batch *b)
{
    Owner *owner = b->owner;

    b->owner = NULL;
    b->settled = true;
    if (!owner)
        return;
    if (owner->batch == b)
        owner->batch = NULL;
    Py_DECREF((PyObject *)owner);
}

/* Release a batch, or keep it as a spare. A view of a column refers to the table, and a view of the frames to the batch, so one with
 * views is not reused. A copy is not reused either. */
void lrx_batch_give_up(Batch *b, Batch **spare)
{
    if (!*spare && Py_REFCNT((PyObject *)b) == 1 && Py_REFCNT((PyObject *)b->table) == 1 && !b->own) {
        leave_owner(b);
        *spare = b;
    } else {
        Py_DECREF((PyObject *)b);
    }
}

static void batch_dealloc(PyObject *self)
{
    Batch *b = (Batch *)self;

    leave_owner(b);
    Py_XDECREF((PyObject *)b->table);
    Py_XDECREF(b->own);
    lrx_free(self);
}

bool lrx_batch_is_readable(const Batch *b)
{
    if (!b->owner || !b->owner->guard || *b->owner->guard)
        return true;
    PyErr_SetString(PyExc_RuntimeError,
                    "this batch lies in a ring of the parent process, and this child was forked without os.fork(): "
                    "fork with os.fork(), or keep batch.copy()");
    return false;
}

/* The offset of frame k in `memory`, with its virtio-net header. */
static uint32_t begin_of(const Batch *b, Py_ssize_t k)
{
    return b->table->columns.starts[k] - b->framing.vnet;
}

/* Zero the gaps between frames, which lie in ascending order. The gaps have data of other batches, or of frames that are no packets. */
static void clear_gaps(const Batch *b, uint8_t *memory)
{
    const Table *t = b->table;
    uint32_t end = 0;

    for (Py_ssize_t k = 0; k < t->count; k++) {
        if (begin_of(b, k) > end)
            memset(memory + end, 0, begin_of(b, k) - end);
        if (t->columns.starts[k] + t->columns.lengths[k] > end)
            end = t->columns.starts[k] + t->columns.lengths[k];
    }
}

/* A copy of the frames as `memory` shows them, each with its virtio-net header in front. */
static PyObject *copy_frames(const Batch *b)
{
    const Table *t = b->table;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, b->size);
    uint8_t *to;

    if (!bytes)
        return NULL;
    to = (uint8_t *)PyBytes_AsString(bytes);
    clear_gaps(b, to);
    for (Py_ssize_t k = 0; k < t->count; k++)
        memcpy(to + begin_of(b, k), b->base + t->offsets[k] - b->framing.vnet, b->framing.vnet + t->columns.lengths[k]);
    return bytes;
}

int lrx_batch_own(Batch *b)
{
    if (b->own || b->settled)
        return 0;
    if (!lrx_batch_is_readable(b))
        return -1;
    b->own = copy_frames(b);
    if (!b->own)
        return -1;
    b->base = (const uint8_t *)PyBytes_AsString(b->own);
    b->table->offsets = b->table->columns.starts;
    leave_owner(b);
    return 0;
}

static int batch_getbuffer(PyObject *self, Py_buffer *view, int flags)
{
    Batch *b = (Batch *)self;

    view->obj = NULL;
    if (!b->viewing) {
        PyErr_SetString(PyExc_TypeError, "a bytes-like object is required, not 'linkrx.Batch': its frames are in `memory`");
        return -1;
    }
    if (!b->own && (!b->owner || b->apart) && lrx_batch_own(b) < 0)
        return -1;
    if (b->own)
        return PyBuffer_FillInfo(view, b->own, (void *)b->base, b->size, 1, flags);
    if (!b->tidy) {
        clear_gaps(b, (uint8_t *)b->base);
        b->tidy = true;
    }
    if (PyBuffer_FillInfo(view, self, (void *)b->base, b->size, 1, flags) < 0)
        return -1;
    b->exports++;
    return 0;
}

static void batch_releasebuffer(PyObject *self, Py_buffer *view)
{
    (void)view;
    ((Batch *)self)->exports--;
}

static PyObject *batch_memory(PyObject *self, void *unused)
{
    PyObject *view;

    (void)unused;
    ((Batch *)self)->viewing++;
    view = PyMemoryView_FromObject(self);
    ((Batch *)self)->viewing--;
    return view;
}

static PyObject *batch_column(PyObject *self, void *which)
{
    Batch *b = (Batch *)self;
    const int collects = PyGC_Disable(); /* a finalizer may make a view of another column */
    PyObject *view;

    /* A new view each time, because the caller may release it. */
    b->table->column = (enum column)(uintptr_t)which;
    if (b->table->column == COLUMN_LINK_TYPES && !b->framing.per_packet)
        for (Py_ssize_t k = 0; k < b->table->count; k++)
            b->table->columns.link_types[k] = b->framing.link_type;
    view = PyMemoryView_FromObject((PyObject *)b->table);
    if (collects)
        PyGC_Enable();
    return view;
}

static Py_ssize_t batch_length(PyObject *self)
{
    return ((Batch *)self)->table->count;
}

static PyObject *packet_of(Batch *b, uint32_t index)
{
    Packet *p = lrx_packet_new(b->state);

    if (p && lrx_packet_set(p, b, index) < 0)
        Py_CLEAR(p);
    return (PyObject *)p;
}

static PyObject *batch_item(PyObject *self, Py_ssize_t index)
{
    Batch *b = (Batch *)self;

    if (index < 0 || index >= b->table->count) {
        PyErr_Format(PyExc_IndexError, "packet %zd of a batch of %zd", index, b->table->count);
        return NULL;
    }
    return packet_of(b, (uint32_t)index);
}

static PyObject *batch_subscript(PyObject *self, PyObject *key)
{
    Batch *b = (Batch *)self;
    Py_ssize_t index = PyNumber_AsSsize_t(key, NULL); /* clips integers that are too large */
    const Py_ssize_t count = b->table->count;

    if (index == -1 && PyErr_Occurred())
        return NULL;
    if (index < -count || index >= count) {
        PyErr_Format(PyExc_IndexError, "packet %R of a batch of %zd", key, count);
        return NULL;
    }
    return packet_of(b, (uint32_t)(index < 0 ? index + count : index));
}

static PyObject *batch_frames(PyObject *self, PyObject *unused)
{
    Batch *b = (Batch *)self;
    const Py_ssize_t count = b->table->count;
    PyObject *list;

    (void)unused;
    list = PyList_New(count); /* this may run the garbage collector, whose finalizers may make the batch copy its frames */
    if (!list)
        return NULL;
    if (!lrx_batch_is_readable(b)) {
        Py_DECREF(list);
        return NULL;
    }
    for (Py_ssize_t k = 0; k < count; k++) {
        PyObject *frame =
            PyBytes_FromStringAndSize((const char *)b->base + b->table->offsets[k], b->table->columns.lengths[k]);

        if (!frame) {
            Py_DECREF(list);
            return NULL;
        }
        PyList_SetItem(list, k, frame);
    }
    return list;
}

static PyObject *batch_copy(PyObject *self, PyObject *unused)
{
    Batch *b = (Batch *)self, *copy;
    const Table *t = b->table;
    PyObject *own;

    (void)unused;
    if (b->own) {
        own = b->own;
        Py_INCREF(own);
    } else if (!lrx_batch_is_readable(b) || !(own = copy_frames(b))) {
        return NULL;
    }
    copy = lrx_batch_new(b->state, (uint32_t)t->count, b->framing);
    if (!copy) {
        Py_DECREF(own);
        return NULL;
    }
    lrx_table_copy(copy->table, &t->columns, b->framing.per_packet);
    copy->own = own;
    copy->base = (const uint8_t *)PyBytes_AsString(own);
    copy->size = b->size;
    return (PyObject *)copy;
}

static PyObject *batch_repr(PyObject *self)
{
    const Table *t = ((Batch *)self)->table;
    uint64_t bytes = 0;

    for (Py_ssize_t k = 0; k < t->count; k++)
        bytes += t->columns.lengths[k];
    return PyUnicode_FromFormat("<Batch of %zd packets, %llu bytes>", t->count, (unsigned long long)bytes);
}

#define COLUMN(name, which, text) {name, batch_column, NULL, text, (void *)(uintptr_t)which}

static PyGetSetDef batch_attributes[] = {
    {"memory", batch_memory, NULL,
     "The frames, as a read-only memoryview: memory[starts[i] : starts[i] + lengths[i]] is frame i.", NULL},
    COLUMN("starts", COLUMN_STARTS, "The offset of each frame in `memory` (uint32)."),
    COLUMN("lengths", COLUMN_LENGTHS, "Bytes of each frame, link header included (uint32)."),
    COLUMN("wire_lengths", COLUMN_WIRE_LENGTHS,
           "The length of each frame before it was cut, if the kernel reports it (uint32)."),
    COLUMN("interfaces", COLUMN_INTERFACES, "The index of the interface of each packet, on packet sockets; else 0 (uint32)."),
    COLUMN("timestamps", COLUMN_TIMESTAMPS, "The time at which the kernel received each frame: nanoseconds since 1970, or 0 (int64)."),
    COLUMN("protocols", COLUMN_PROTOCOLS, "The EtherType of each packet (uint16)."),
    COLUMN("flags", COLUMN_FLAGS, "The `Flags` of each packet (uint16)."),
    COLUMN("vlan_tcis", COLUMN_VLAN_TCIS, "The tag that the kernel took out of each frame with Flags.VLAN (uint16)."),
    COLUMN("vlan_tpids", COLUMN_VLAN_TPIDS, "The EtherType of that tag (uint16)."),
    COLUMN("link_types", COLUMN_LINK_TYPES, "The ARPHRD_* number of the device of each packet; 1: Ethernet (uint16)."),
    {0},
};

static PyMethodDef batch_methods[] = {
    {"frames", batch_frames, METH_NOARGS, "frames($self, /)\n--\n\nAll frames, each as bytes, in a list."},
    {"copy", batch_copy, METH_NOARGS, "copy($self, /)\n--\n\nThe same packets, in memory of their own."},
    {0},
};

static PyType_Slot batch_slots[] = {
    {Py_tp_doc,
     "Packets received together. Index and iteration give packets; the columns have one element for each.\n\n"
     "All columns, and `memory`, are read-only memoryviews in native formats. Nothing of a batch ever changes, however\n"
     "long it is kept. Give copy().memory to a call that reads later, such as send() with MSG_ZEROCOPY."},
    {Py_tp_dealloc, batch_dealloc},
    {Py_tp_repr, batch_repr},
    {Py_tp_iter, lrx_batch_iterate},
    {Py_tp_getset, batch_attributes},
    {Py_tp_methods, batch_methods},
    {Py_sq_length, batch_length},
    {Py_sq_item, batch_item},
    {Py_mp_length, batch_length},
    {Py_mp_subscript, batch_subscript},
    {Py_bf_getbuffer, batch_getbuffer},
    {Py_bf_releasebuffer, batch_releasebuffer},
    {0, NULL},
};

PyType_Spec lrx_batch_spec = {
    .name = "linkrx.Batch",
    .basicsize = sizeof(Batch),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = batch_slots,
};
