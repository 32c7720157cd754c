/* `async for packet in rx`: the asynchronous iterator. It is its own awaitable. */
#include "types.h"

typedef struct {
    PyObject_HEAD
    Receiver *receiver;
    Waiter *waiter;          /* made by the first wait */
    PyObject *running_loop;  /* asyncio.get_running_loop */
} AsyncPackets;

static AsyncPackets *make(PyTypeObject *type, Receiver *receiver, PyObject *running_loop)
{
    AsyncPackets *a = (AsyncPackets *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);

    if (!a)
        return NULL;
    Py_INCREF((PyObject *)receiver);
    a->receiver = receiver;
    Py_INCREF(running_loop);
    a->running_loop = running_loop;
    return a;
}

static PyObject *packets_new(PyTypeObject *type, PyObject *args, PyObject *names)
{
    static char *keywords[] = {"dispatcher", NULL};
    PyObject *receiver, *asyncio, *running_loop;
    AsyncPackets *a;

    if (!PyArg_ParseTupleAndKeywords(args, names, "O", keywords, &receiver))
        return NULL;
    if (!lrx_is_receiver(receiver)) {
        PyErr_SetString(PyExc_TypeError, "give a dispatcher");
        return NULL;
    }
    asyncio = PyImport_ImportModule("asyncio");
    running_loop = asyncio ? PyObject_GetAttrString(asyncio, "get_running_loop") : NULL;
    a = running_loop ? make(type, (Receiver *)receiver, running_loop) : NULL;
    Py_XDECREF(running_loop);
    Py_XDECREF(asyncio);
    return (PyObject *)a;
}

static int packets_traverse(PyObject *self, visitproc visit, void *arg)
{
    AsyncPackets *a = (AsyncPackets *)self;

    Py_VISIT((PyObject *)Py_TYPE(self));
    Py_VISIT((PyObject *)a->receiver);
    Py_VISIT((PyObject *)a->waiter);
    Py_VISIT(a->running_loop);
    return 0;
}

static int packets_clear(PyObject *self)
{
    Py_CLEAR(((AsyncPackets *)self)->waiter);
    return 0; /* the rest stays, because every method uses it, and it refers to no iterator */
}

static void packets_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    AsyncPackets *a = (AsyncPackets *)self;

    PyObject_GC_UnTrack(self);
    Py_XDECREF((PyObject *)a->waiter);
    Py_XDECREF((PyObject *)a->receiver);
    Py_XDECREF(a->running_loop);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *packets_self(PyObject *self)
{
    Py_INCREF(self);
    return self;
}

/* Whether the waiter's loop is the one that runs in this thread. -1 with an exception if none runs. */
static int is_here(const AsyncPackets *a)
{
    PyObject *loop;

    if (a->waiter->waking == PyThread_get_thread_ident()) /* its reader is waking this task */
        return 1;
    loop = PyObject_CallObject(a->running_loop, NULL); /* calls getpid(2) before CPython 3.12 */
    Py_XDECREF(loop);
    return loop ? loop == a->waiter->loop : -1;
}

/* The waiter. The reader settles it when packets are pending, or reception is over. */
static Waiter *begin_waiting(AsyncPackets *a)
{
    Waiter *w = a->waiter;
    const int here = w ? is_here(a) : 0;
    PyObject *began;

    if (here < 0)
        return NULL;
    if (!here || !w->armed || !w->done || lrx_has_something(a->receiver)) {
        /* Raises Busy if a task waits already. */
        began = PyObject_CallMethod((PyObject *)a->receiver, "_begin_waiting", "O", w ? (PyObject *)w : Py_None);
        if (!began)
            return NULL;
        if (Py_TYPE(began) != a->receiver->state->waiter_type) {
            Py_DECREF(began);
            PyErr_SetString(PyExc_TypeError, "_begin_waiting() gives a Waiter");
            return NULL;
        }
        w = a->waiter;
        a->waiter = (Waiter *)began;
        Py_XDECREF((PyObject *)w);
    }
    Py_CLEAR(a->waiter->failure);
    a->waiter->done = false;
    a->waiter->blocking = 1;
    return a->waiter;
}

/* What a task awaits. If the last task was cancelled and has not gone on yet, another task that takes its place needs an object of its
 * own, because the CancelledError is thrown into this one. */
static PyObject *packets_await(PyObject *self)
{
    AsyncPackets *a = (AsyncPackets *)self;

    return a->waiter && a->waiter->scheduled ? (PyObject *)make(Py_TYPE(self), a->receiver, a->running_loop) : packets_self(self);
}

/* The task goes on. */
static void go_on(AsyncPackets *a)
{
    if (a->waiter)
        a->waiter->scheduled = false;
}

/* A pending packet, StopAsyncIteration, or the waiter. */
static PySendResult packets_send(PyObject *self, PyObject *unused, PyObject **result)
{
    AsyncPackets *a = (AsyncPackets *)self;
    Receiver *r = a->receiver;
    PyObject *packet;
    Waiter *w;

    (void)unused;
    *result = NULL;
    go_on(a);
    packet = lrx_receiver_take((PyObject *)r, NULL);
    if (!packet)
        return PYGEN_ERROR;
    if (packet != Py_None) {
        *result = packet;
        return PYGEN_RETURN;
    }
    Py_DECREF(packet);
    if (r->ended) {
        PyErr_SetNone(PyExc_StopAsyncIteration);
        return PYGEN_ERROR;
    }
    w = begin_waiting(a);
    if (!w)
        return PYGEN_ERROR;
    *result = packets_self((PyObject *)w);
    return PYGEN_NEXT;
}

static PyObject *packets_next(PyObject *self)
{
    PyObject *result;

    switch (packets_send(self, Py_None, &result)) {
    case PYGEN_NEXT:
        return result;
    case PYGEN_RETURN:
        PyErr_SetObject(PyExc_StopIteration, result); /* a packet is neither a tuple nor an exception */
        Py_DECREF(result);
        return NULL;
    default:
        return NULL;
    }
}

/* An exception is thrown into the coroutine that waits here: end its wait. */

static PyObject *packets_close(PyObject *self, PyObject *unused)
{
    AsyncPackets *a = (AsyncPackets *)self;

    (void)unused;
    go_on(a);
    if (a->waiter)
        a->waiter->done = true;
    Py_RETURN_NONE;
}

static PyObject *packets_throw(PyObject *self, PyObject *args)
{
    PyObject *type, *value = NULL, *trace = NULL;

    if (!PyArg_ParseTuple(args, "O|OO", &type, &value, &trace))
        return NULL;
    Py_DECREF(packets_close(self, NULL));
    if (PyExceptionInstance_Check(type))
        PyErr_SetObject((PyObject *)Py_TYPE(type), type);
    else if (PyExceptionClass_Check(type))
        PyErr_SetObject(type, value);
    else
        PyErr_SetString(PyExc_TypeError, "throw() takes an exception");
    return NULL;
}

static PyObject *packets_aclose(PyObject *self, PyObject *unused)
{
    PyObject *aio = PyImport_ImportModule("linkrx.receiving.aio");
    PyObject *coroutine = aio ? PyObject_CallMethod(aio, "nothing_to_close", NULL) : NULL;

    (void)self;
    (void)unused;
    Py_XDECREF(aio);
    return coroutine;
}

static PyMethodDef packets_methods[] = {
    {"aclose", packets_aclose, METH_NOARGS, "aclose($self, /)\n--\n\nNothing is to be closed. contextlib.aclosing() awaits this."},
    {"close", packets_close, METH_NOARGS, "close($self, /)\n--\n\nEnd the wait of a coroutine that is closed."},
    {"throw", packets_throw, METH_VARARGS,
     "throw($self, type, value=None, trace=None, /)\n--\n\nEnd the wait, and raise an exception in the coroutine."},
    {0},
};

static PyType_Slot packets_slots[] = {
    {Py_tp_doc, "AsyncPackets(dispatcher)\n--\n\nThe asynchronous iterator of a dispatcher."},
    {Py_tp_new, packets_new},
    {Py_tp_dealloc, packets_dealloc},
    {Py_tp_traverse, packets_traverse},
    {Py_tp_clear, packets_clear},
    {Py_tp_methods, packets_methods},
    {Py_am_aiter, packets_self},
    {Py_am_anext, packets_self},
    {Py_am_await, packets_await},
    {Py_am_send, packets_send},
    {Py_tp_iter, packets_self},
    {Py_tp_iternext, packets_next},
    {0, NULL},
};

PyType_Spec lrx_async_packets_spec = {
    .name = "linkrx._core._types.AsyncPackets",
    .basicsize = sizeof(AsyncPackets),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, /* no base: CPython's subclasses do not inherit am_send */
    .slots = packets_slots,
};
