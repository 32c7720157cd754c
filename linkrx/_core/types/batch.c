/* The packets of one receive, as columns over one memory. See memory.c for where the frames are. */
#include "types.h"

#include <string.h>

/* Columns as they are shown. */

enum column {
    TIMESTAMPS,
    STARTS,
    LENGTHS,
    WIRE_LENGTHS,
    INTERFACES,
    PROTOCOLS,
    FLAGS,
    VLAN_TCIS,
    VLAN_TPIDS,
};

static void *column_of(const Table *t, int column, char **format, Py_ssize_t *width)
{
    static const struct {
        char format[2];
        uint8_t width;
    } shapes[] = {
        [TIMESTAMPS] = {"q", 8}, [STARTS] = {"I", 4},     [LENGTHS] = {"I", 4}, [WIRE_LENGTHS] = {"I", 4}, [INTERFACES] = {"I", 4},
        [PROTOCOLS] = {"H", 2},  [FLAGS] = {"H", 2},      [VLAN_TCIS] = {"H", 2}, [VLAN_TPIDS] = {"H", 2},
    };
    void *const columns[] = {
        [TIMESTAMPS] = t->timestamps, [STARTS] = t->starts,       [LENGTHS] = t->lengths,
        [WIRE_LENGTHS] = t->wire_lengths, [INTERFACES] = t->interfaces, [PROTOCOLS] = t->protocols,
        [FLAGS] = t->flags,           [VLAN_TCIS] = t->vlan_tcis, [VLAN_TPIDS] = t->vlan_tpids,
    };

    *format = (char *)shapes[column].format;
    *width = shapes[column].width;
    return columns[column];
}

#define ROW (sizeof(int64_t) + 5 * sizeof(uint32_t) + 4 * sizeof(uint16_t))

static void table_lay_out(Table *t, uint32_t count)
{
    t->count = count;
    t->timestamps = (int64_t *)(t + 1);
    t->places = (uint32_t *)(t->timestamps + count);
    t->starts = t->places + count;
    t->lengths = t->starts + count;
    t->wire_lengths = t->lengths + count;
    t->interfaces = t->wire_lengths + count;
    t->protocols = (uint16_t *)(t->interfaces + count);
    t->flags = t->protocols + count;
    t->vlan_tcis = t->flags + count;
    t->vlan_tpids = t->vlan_tcis + count;
}

static Table *table_new(State *state, uint32_t count)
{
    Table *t = PyObject_NewVar(Table, state->table_type, (Py_ssize_t)(ROW * count));

    if (!t)
        return NULL;
    t->room = count;
    t->column = 0;
    table_lay_out(t, count);
    return t;
}

static void table_skip(Table *t, uint32_t n)
{
    t->count -= n;
    t->timestamps += n;
    t->places += n;
    t->starts += n;
    t->lengths += n;
    t->wire_lengths += n;
    t->interfaces += n;
    t->protocols += n;
    t->flags += n;
    t->vlan_tcis += n;
    t->vlan_tpids += n;
}

static int table_getbuffer(PyObject *self, Py_buffer *view, int flags)
{
    Table *t = (Table *)self;
    char *format;
    Py_ssize_t width;
    void *column = column_of(t, t->column, &format, &width);

    if (PyBuffer_FillInfo(view, self, column, t->count * width, 1, flags) < 0)
        return -1;
    view->itemsize = width;
    if (view->format)
        view->format = format;
    if (view->shape)
        view->shape = &t->count; /* FillInfo has set the number of bytes */
    return 0;
}

static void table_dealloc(PyObject *self)
{
    lrx_free(self);
}

static PyType_Slot table_slots[] = {
    {Py_tp_doc, "The columns of one batch."},
    {Py_tp_dealloc, table_dealloc},
    {Py_bf_getbuffer, table_getbuffer},
    {0, NULL},
};

PyType_Spec lrx_table_spec = {
    .name = "linkrx._core._types.Table",
    .basicsize = sizeof(Table),
    .itemsize = 1,
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = table_slots,
};

/* The batch. */

static uint32_t aligned(uint32_t offset)
{
    return (offset + 7u) & ~7u;
}

/* Columns that a copy has as well. */
static void copy_columns(Table *to, const struct lrx_columns *from)
{
    const size_t count = (size_t)to->count;

    memcpy(to->timestamps, from->timestamps, count * sizeof *to->timestamps);
    memcpy(to->starts, from->starts, count * sizeof *to->starts);
    memcpy(to->lengths, from->lengths, count * sizeof *to->lengths);
    memcpy(to->wire_lengths, from->wire_lengths, count * sizeof *to->wire_lengths);
    memcpy(to->interfaces, from->interfaces, count * sizeof *to->interfaces);
    memcpy(to->protocols, from->protocols, count * sizeof *to->protocols);
    memcpy(to->flags, from->flags, count * sizeof *to->flags);
    memcpy(to->vlan_tcis, from->vlan_tcis, count * sizeof *to->vlan_tcis);
    memcpy(to->vlan_tpids, from->vlan_tpids, count * sizeof *to->vlan_tpids);
}

static Batch *batch_new(State *state, const struct lrx_columns *columns, uint32_t count, Framing framing)
{
    Batch *b = PyObject_New(Batch, state->batch_type);

    if (!b)
        return NULL;
    memset((char *)b + offsetof(Batch, state), 0, sizeof *b - offsetof(Batch, state));
    b->state = state;
    b->framing = framing;
    b->table = table_new(state, count);
    if (!b->table) {
        Py_DECREF((PyObject *)b);
        return NULL;
    }
    copy_columns(b->table, columns);
    return b;
}

Batch *lrx_batch_new(State *state, Owner *owner, const uint8_t *base, uint32_t size, const struct lrx_columns *columns,
                     uint32_t count, Framing framing, Batch **spare)
{
    Batch *b = *spare;
    Table *t;
    uint32_t end = 0;

    if (owner->batch) {
        PyErr_SetString(PyExc_BufferError, "another batch reads here still: take_back() first");
        return NULL;
    }
    if (b && b->table->room >= count) {
        *spare = NULL;
        b->settled = b->tidy = false;
        table_lay_out(b->table, count);
        copy_columns(b->table, columns);
    } else {
        b = batch_new(state, columns, count, framing);
    }
    if (!b)
        return NULL;
    t = b->table;
    memcpy(t->places, t->starts, count * sizeof *t->places);
    for (uint32_t k = 0; k < count; k++) {
        const uint32_t place = t->places[k], length = t->lengths[k];

        if (place < framing.vnet || length < framing.link_header || length > size || place > size - length) {
            PyErr_Format(PyExc_ValueError, "the backend reports packet %u at %u, %u bytes long, in %u bytes of memory", k,
                         place, length, size);
            Py_DECREF((PyObject *)b);
            return NULL;
        }
        if (!owner->mapped) /* a ring: `memory` will be a copy, without what else is in the blocks */
            t->starts[k] = aligned(end) + framing.vnet;
        if (t->starts[k] + length > end)
            end = t->starts[k] + length;
    }
    b->size = end;
    b->base = base;
    Py_INCREF((PyObject *)owner);
    b->owner = owner;
    owner->batch = b;
    return b;
}

void lrx_batch_skip(Batch *b, uint32_t n)
{
    table_skip(b->table, n);
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

/* A view of a column refers to the table, one of the frames to the batch, and a copy is not used again. */
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
    for (int column = 0; column < COLUMNS; column++)
        Py_XDECREF(b->columns[column]);
    Py_XDECREF((PyObject *)b->table);
    Py_XDECREF(b->own);
    lrx_free(self);
}

static bool readable(const Batch *b)
{
    if (!b->owner || !b->owner->guard || *b->owner->guard)
        return true;
    PyErr_SetString(PyExc_RuntimeError,
                    "this batch lies in a ring of the parent process, and this child was forked without os.fork(): "
                    "fork with os.fork(), or keep batch.copy()");
    return false;
}

/* Where frame k begins in `memory`, with the virtio-net header in front of it. */
static uint32_t begin_of(const Batch *b, Py_ssize_t k)
{
    return b->table->starts[k] - b->framing.vnet;
}

/* Zeroes where no frame is: what an arena holds there is of other batches, or of frames that were skipped. */
static void clear_gaps(const Batch *b, uint8_t *memory)
{
    const Table *t = b->table;
    uint32_t end = 0;

    for (Py_ssize_t k = 0; k < t->count; k++) {
        if (begin_of(b, k) > end)
            memset(memory + end, 0, begin_of(b, k) - end);
        if (t->starts[k] + t->lengths[k] > end)
            end = t->starts[k] + t->lengths[k];
    }
}

/* The frames as they lie in `memory`, each with its virtio-net header in front. */
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
        memcpy(to + begin_of(b, k), b->base + t->places[k] - b->framing.vnet, b->framing.vnet + t->lengths[k]);
    return bytes;
}

int lrx_batch_own(Batch *b)
{
    if (b->own || b->settled)
        return 0;
    if (!readable(b))
        return -1;
    b->own = copy_frames(b);
    if (!b->own)
        return -1;
    b->base = (const uint8_t *)PyBytes_AsString(b->own);
    b->table->places = b->table->starts;
    leave_owner(b);
    return 0;
}

static int batch_getbuffer(PyObject *self, Py_buffer *view, int flags)
{
    Batch *b = (Batch *)self;

    view->obj = NULL;
    if (!b->own && (!b->owner || !b->owner->mapped) && lrx_batch_own(b) < 0)
        return -1; /* a ring's: `memory` is a copy */
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
    (void)unused;
    return PyMemoryView_FromObject(self);
}

static PyObject *batch_column(PyObject *self, void *which)
{
    Batch *b = (Batch *)self;
    const int column = (int)(uintptr_t)which;
    PyObject *view = b->columns[column];

    if (!view) {
        const int collects = PyGC_Disable(); /* a finalizer may make a view of another column */

        b->table->column = column;
        view = PyMemoryView_FromObject((PyObject *)b->table);
        if (collects)
            PyGC_Enable();
        if (!view)
            return NULL;
        b->columns[column] = view;
    }
    Py_INCREF(view);
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
    Py_ssize_t index = PyNumber_AsSsize_t(key, NULL); /* beyond all bounds: the largest or the least */
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
    list = PyList_New(count); /* the collector may run in here, and whatever it runs may take the memory back */
    if (!list)
        return NULL;
    if (!readable(b)) {
        Py_DECREF(list);
        return NULL;
    }
    for (Py_ssize_t k = 0; k < count; k++) {
        PyObject *frame =
            PyBytes_FromStringAndSize((const char *)b->base + b->table->places[k], b->table->lengths[k]);

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
    struct lrx_columns from;
    PyObject *own;

    (void)unused;
    if (b->own) {
        own = b->own;
        Py_INCREF(own);
    } else if (!readable(b) || !(own = copy_frames(b))) {
        return NULL;
    }
    from = (struct lrx_columns){
        .timestamps = t->timestamps,
        .starts = t->starts,
        .lengths = t->lengths,
        .wire_lengths = t->wire_lengths,
        .interfaces = t->interfaces,
        .protocols = t->protocols,
        .flags = t->flags,
        .vlan_tcis = t->vlan_tcis,
        .vlan_tpids = t->vlan_tpids,
    };
    copy = batch_new(b->state, &from, (uint32_t)t->count, b->framing);
    if (!copy) {
        Py_DECREF(own);
        return NULL;
    }
    copy->table->places = copy->table->starts;
    copy->own = own;
    copy->base = (const uint8_t *)PyBytes_AsString(own);
    copy->size = b->size;
    copy->settled = true;
    return (PyObject *)copy;
}

static PyObject *batch_repr(PyObject *self)
{
    const Table *t = ((Batch *)self)->table;
    uint64_t bytes = 0;

    for (Py_ssize_t k = 0; k < t->count; k++)
        bytes += t->lengths[k];
    return PyUnicode_FromFormat("<Batch of %zd packets, %llu bytes>", t->count, (unsigned long long)bytes);
}

/* Iteration: two packets take turns, for who asks for the next one has the last one in a variable still. */

typedef struct {
    PyObject_HEAD
    Batch *batch; /* NULL behind the end */
    Py_ssize_t next;
    Packet *turns[2];
} BatchIterator;

static PyObject *batch_iterate(PyObject *self)
{
    BatchIterator *i = PyObject_New(BatchIterator, ((Batch *)self)->state->batch_iterator_type);

    if (!i)
        return NULL;
    Py_INCREF(self);
    i->batch = (Batch *)self;
    i->next = 0;
    i->turns[0] = i->turns[1] = NULL;
    return (PyObject *)i;
}

static PyObject *iterator_next(PyObject *self)
{
    BatchIterator *i = (BatchIterator *)self;
    Batch *b = i->batch;
    Packet *p;

    if (!b)
        return NULL;
    if (i->next == b->table->count) {
        i->batch = NULL;
        Py_DECREF((PyObject *)b);
        return NULL;
    }
    p = lrx_packet_in(b->state, &i->turns[i->next & 1]);
    if (!p || lrx_packet_set(p, b, (uint32_t)i->next) < 0)
        return NULL;
    i->next++;
    Py_INCREF((PyObject *)p);
    return (PyObject *)p;
}

static void iterator_dealloc(PyObject *self)
{
    BatchIterator *i = (BatchIterator *)self;

    Py_XDECREF((PyObject *)i->batch);
    Py_XDECREF((PyObject *)i->turns[0]);
    Py_XDECREF((PyObject *)i->turns[1]);
    lrx_free(self);
}

static PyObject *iterator_self(PyObject *self)
{
    Py_INCREF(self);
    return self;
}

static PyObject *iterator_hint(PyObject *self, PyObject *unused)
{
    const BatchIterator *i = (BatchIterator *)self;

    (void)unused;
    return PyLong_FromSsize_t(i->batch ? i->batch->table->count - i->next : 0);
}

static PyMethodDef iterator_methods[] = {
    {"__length_hint__", iterator_hint, METH_NOARGS, "__length_hint__($self, /)\n--\n\nHow many packets are to come."},
    {0},
};

static PyType_Slot iterator_slots[] = {
    {Py_tp_doc, "The packets of a batch, in order."},
    {Py_tp_dealloc, iterator_dealloc},
    {Py_tp_iter, iterator_self},
    {Py_tp_iternext, iterator_next},
    {Py_tp_methods, iterator_methods},
    {0, NULL},
};

PyType_Spec lrx_batch_iterator_spec = {
    .name = "linkrx._core._types.BatchIterator",
    .basicsize = sizeof(BatchIterator),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = iterator_slots,
};

#define COLUMN(name, which, text) {name, batch_column, NULL, text, (void *)(uintptr_t)which}

static PyGetSetDef batch_attributes[] = {
    {"memory", batch_memory, NULL,
     "The frames, as a read-only memoryview: memory[starts[i] : starts[i] + lengths[i]] is frame i.", NULL},
    COLUMN("starts", STARTS, "Where each frame starts in `memory` (uint32)."),
    COLUMN("lengths", LENGTHS, "Bytes of each frame, link header included (uint32)."),
    COLUMN("wire_lengths", WIRE_LENGTHS,
           "Bytes of each frame before anything cut it, where the kernel tells it (uint32)."),
    COLUMN("interfaces", INTERFACES, "The index of the interface of each packet, on packet sockets; else 0 (uint32)."),
    COLUMN("timestamps", TIMESTAMPS, "When the kernel received each frame: nanoseconds since 1970, or 0 (int64)."),
    COLUMN("protocols", PROTOCOLS, "The EtherType of each packet (uint16)."),
    COLUMN("flags", FLAGS, "The `Flags` of each packet (uint16)."),
    COLUMN("vlan_tcis", VLAN_TCIS, "The tag that the kernel took out of each frame with Flags.VLAN (uint16)."),
    COLUMN("vlan_tpids", VLAN_TPIDS, "The EtherType of that tag (uint16)."),
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
     "long it is kept. What the kernel is still to read, as with MSG_ZEROCOPY, is given a copy()."},
    {Py_tp_dealloc, batch_dealloc},
    {Py_tp_repr, batch_repr},
    {Py_tp_iter, batch_iterate},
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
