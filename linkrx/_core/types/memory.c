/* The rule of memory.
 *
 * A packet never changes while it is referenced. Frames are read in place, in the arena or in a ring's block. Before that memory
 * is used again, every packet and batch that still refers to it gets a copy:
 *
 * - Each packet that reads in place is in its owner's list. lrx_owner_take_back() walks the list, and copies.
 * - A batch that is referenced is copied as a whole, unless there is a view of the arena through its `memory`. Then the batch
 *   keeps the arena, and the receiver makes another.
 * - `bytes`, `data`, `frame` and every other view of a packet refer to the packet's own copy. So only a batch's `memory` points
 *   into an arena, and nothing points into a ring.
 *
 * C reads reference counts here, and only those of objects of these types. It holds the GIL meanwhile. Between the reading of a
 * count and the action no Python code can run: the allocations are of `bytes`, which do not start the garbage collector, and the
 * released objects refer to no Python object.
 *
 * The types take no part in garbage collection, because they refer to leaves only. A packet in a reference cycle dies with the
 * rest of the cycle, and its memory is released by its reference count.
 */
#define _GNU_SOURCE
#include "types.h"

#include <sys/mman.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* asm-generic/mman-common.h, Linux 5.14 */
#endif
#define PAGE_LEAST 4096

/* The part that is populated at once. The first touch of a page costs 1.5 us, of a populated one 14 ns. Behind it there is room
 * for one large frame. */
#define POPULATED (512 * 1024)

static void populate(uint8_t *memory, size_t size)
{
    size_t most = size < POPULATED ? size : POPULATED;

    if (madvise(memory, most, MADV_POPULATE_WRITE) < 0)
        for (size_t at = 0; at < most; at += PAGE_LEAST) /* an older kernel */
            *(volatile uint8_t *)(memory + at) = 0;
}

/* Frames start ARENA_START bytes after the start of the mapping. If the kernel copies to the first 32 bytes of a page, the copy can
 * take four times as long: on an AMD EPYC 22 us instead of 6 for 65,535 bytes. */
Owner *lrx_owner_new(State *state, size_t size)
{
    Owner *o = PyObject_New(Owner, state->owner_type);

    if (!o)
        return NULL;
    o->memory = NULL;
    o->mapped = 0;
    o->cursor = ARENA_START;
    o->guard = NULL;
    o->packets = NULL;
    o->batch = NULL;
    o->exporting_view = false;
    o->copied = false;
    if (size) {
        void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        if (memory == MAP_FAILED) {
            Py_DECREF((PyObject *)o);
            PyErr_Format(PyExc_MemoryError, "an arena of %zu bytes for received frames: mmap(2) found no memory", size);
            return NULL;
        }
        o->memory = memory;
        o->mapped = size;
        populate(o->memory, size);
    }
    return o;
}

static void owner_dealloc(PyObject *self)
{
    Owner *o = (Owner *)self;

    /* No packet and no batch refers to it: each would hold a reference. */
    if (o->mapped)
        munmap(o->memory, o->mapped);
    lrx_free(self);
}

bool lrx_owner_is_free(const Owner *o)
{
    return !o->packets && !o->batch;
}

int lrx_owner_copy_packets(Owner *o)
{
    while (o->packets) {
        Packet *p = o->packets;

        if (lrx_packet_own(p) < 0)
            return -1;
    }
    return 0;
}

enum taken lrx_owner_take_back(Owner *o)
{
    Batch *b;

    if (lrx_owner_copy_packets(o) < 0)
        return TAKEN_NOT;
    b = o->batch;
    if (!b)
        return TAKEN_BACK;
    if (b->exports) {
        b->settled = true;
        o->batch = NULL;
        return GIVEN_AWAY;
    }
    return lrx_batch_own(b) < 0 ? TAKEN_NOT : TAKEN_BACK;
}

/* For mechanisms in Python that fill an arena. Such a view is not counted, because users never get one. */
static int owner_getbuffer(PyObject *self, Py_buffer *view, int flags)
{
    Owner *o = (Owner *)self;

    if (!o->exporting_view) {
        PyErr_SetString(PyExc_BufferError, "use arena.view");
        view->obj = NULL;
        return -1;
    }
    return PyBuffer_FillInfo(view, self, o->memory, (Py_ssize_t)o->mapped, 0, flags);
}

static PyObject *owner_view(PyObject *self, void *unused)
{
    Owner *o = (Owner *)self;
    PyObject *view;

    (void)unused;
    if (!o->mapped) {
        PyErr_SetString(PyExc_BufferError, "this memory belongs to a ring");
        return NULL;
    }
    o->exporting_view = true;
    view = PyMemoryView_FromObject(self);
    o->exporting_view = false;
    return view;
}

static PyObject *owner_address(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromVoidPtr(((Owner *)self)->memory);
}

static int owner_set_address(PyObject *self, PyObject *value, void *unused)
{
    Owner *o = (Owner *)self;
    void *address;

    (void)unused;
    if (!value || o->mapped) {
        PyErr_SetString(PyExc_AttributeError, "the address of an arena cannot be set");
        return -1;
    }
    if (!lrx_owner_is_free(o)) {
        PyErr_SetString(PyExc_BufferError, "packets or batches still read here: call take_back() first");
        return -1;
    }
    address = PyLong_AsVoidPtr(value);
    if (PyErr_Occurred())
        return -1;
    o->memory = address;
    return 0;
}

static PyObject *owner_limit(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(((Owner *)self)->mapped);
}

static PyObject *owner_cursor(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(((Owner *)self)->cursor);
}

static PyObject *owner_held(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(!lrx_owner_is_free((Owner *)self));
}

static PyObject *owner_take_back(PyObject *self, PyObject *unused)
{
    Owner *o = (Owner *)self;
    enum taken taken;

    (void)unused;
    taken = lrx_owner_take_back(o);
    if (taken == TAKEN_NOT)
        return NULL;
    return PyBool_FromLong(taken == TAKEN_BACK);
}

/* Owner(size=0, guard=0) */
static PyObject *owner_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"size", "guard", NULL};
    Py_ssize_t size = 0;
    PyObject *guard = NULL;
    State *state = PyType_GetModuleState(type);
    void *word = NULL;
    Owner *o;

    if (!state || !PyArg_ParseTupleAndKeywords(args, keywords, "|nO:Owner", names, &size, &guard))
        return NULL;
    if (guard && !(word = PyLong_AsVoidPtr(guard)) && PyErr_Occurred())
        return NULL;
    if (size < 0 || (size > 0 && size <= ARENA_START) || size > UINT32_MAX) {
        PyErr_Format(PyExc_ValueError, "size=%zd: an arena has more than %d bytes, and less than 4 GiB", size, ARENA_START);
        return NULL;
    }
    o = lrx_owner_new(state, (size_t)size);
    if (o)
        o->guard = word;
    return (PyObject *)o;
}

static PyGetSetDef owner_attributes[] = {
    {"address", owner_address, owner_set_address, "The address of the memory. It can be set for the memory of a ring.", NULL},
    {"cursor", owner_cursor, NULL, "The offset in an arena at which the next frame is to be, in bytes.", NULL},
    {"held", owner_held, NULL, "Whether a batch or a packet still reads here.", NULL},
    {"limit", owner_limit, NULL, "Bytes of an arena.", NULL},
    {"view", owner_view, NULL, "A writable memoryview of an arena, for mechanisms written in Python.", NULL},
    {0},
};

static PyMethodDef owner_methods[] = {
    {"take_back", owner_take_back, METH_NOARGS,
     "take_back($self, /)\n--\n\n"
     "Copy the packets and batches that still read here. False: a view of the arena exists, so it must not be reused.\n\n"
     "Raises MemoryError; then nothing has changed."},
    {0},
};

static PyType_Slot owner_slots[] = {
    {Py_tp_doc, "Owner(size=0, guard=0)\n--\n\n"
                "The memory of frames: an arena of `size` bytes, or the memory of a ring if `size` is 0.\n\n"
                "`guard` is the address of a word that is 0 in a child where the ring is not mapped."},
    {Py_tp_new, owner_new},
    {Py_tp_dealloc, owner_dealloc},
    {Py_tp_getset, owner_attributes},
    {Py_tp_methods, owner_methods},
    {Py_bf_getbuffer, owner_getbuffer},
    {0, NULL},
};

PyType_Spec lrx_owner_spec = {
    .name = "linkrx._core._types.Owner",
    .basicsize = sizeof(Owner),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = owner_slots,
};
