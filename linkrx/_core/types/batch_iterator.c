/* Iteration over a batch. Two packets take turns, because a loop variable still refers to the last one when the next is made. */
#include "types.h"

typedef struct {
    PyObject_HEAD
    Batch *batch; /* NULL after the end */
    Py_ssize_t next;
    Packet *turns[2];
} BatchIterator;

PyObject *lrx_batch_iterate(PyObject *self)
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
    {"__length_hint__", iterator_hint, METH_NOARGS, "__length_hint__($self, /)\n--\n\nThe number of packets that are left."},
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
