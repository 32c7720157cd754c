/* The future that a task of an event loop awaits until packets come.
 *
 * An asyncio.Future wakes its task in the event loop's next turn, which costs one more epoll_wait(2), as much as a packet. The
 * loop calls the reader while no task runs, so the task can be woken at once there. This type has only the parts of a future
 * that asyncio.Task uses: `_asyncio_future_blocking`, get_loop(), add_done_callback(), result(), cancel().
 * linkrx/receiving/aio.py has the reader, and linkrx/receiving/plain_async.py the same type in Python. */
#include "types.h"

#include <stddef.h>
#include <structmember.h>

/* Steals the reference to `value`. */
static void replace(PyObject **slot, PyObject *value)
{
    PyObject *before = *slot;

    *slot = value;
    Py_XDECREF(before);
}

/* get_loop(), bound to the loop. */
static PyObject *get_loop(PyObject *loop, PyObject *unused)
{
    (void)unused;
    return Py_NewRef(loop);
}

static PyMethodDef get_loop_method = {"get_loop", get_loop, METH_NOARGS, "The event loop of the task that waits."};

static PyObject *woken_future(PyObject *loop)
{
    PyObject *future = PyObject_CallMethod(loop, "create_future", NULL);
    PyObject *answer = future ? PyObject_CallMethod(future, "set_result", "O", Py_None) : NULL;

    if (!answer)
        Py_CLEAR(future);
    Py_XDECREF(answer);
    return future;
}

static PyObject *waiter_new(PyTypeObject *type, PyObject *args, PyObject *names)
{
    static char *keywords[] = {"dispatcher", "loop", NULL};
    PyObject *receiver, *loop;
    Waiter *w;

    if (!PyArg_ParseTupleAndKeywords(args, names, "OO", keywords, &receiver, &loop))
        return NULL;
    if (!lrx_is_receiver(receiver)) {
        PyErr_SetString(PyExc_TypeError, "give a dispatcher");
        return NULL;
    }
    w = (Waiter *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!w)
        return NULL;
    Py_INCREF(receiver);
    w->receiver = (Receiver *)receiver;
    Py_INCREF(loop);
    w->loop = loop;
    if (!(w->run = PyUnicode_InternFromString("run")) || !(w->context_name = PyUnicode_InternFromString("context")) ||
        !(w->get_loop = PyCFunction_New(&get_loop_method, loop)) || !(w->woken = woken_future(loop))) {
        Py_DECREF((PyObject *)w);
        return NULL;
    }
    return (PyObject *)w;
}

static int waiter_traverse(PyObject *self, visitproc visit, void *arg)
{
    Waiter *w = (Waiter *)self;

    Py_VISIT((PyObject *)Py_TYPE(self));
    Py_VISIT((PyObject *)w->receiver);
    Py_VISIT(w->loop);
    Py_VISIT(w->call);
    Py_VISIT(w->context);
    Py_VISIT(w->failure);
    Py_VISIT(w->get_loop);
    Py_VISIT(w->woken);
    return 0;
}

static int waiter_clear(PyObject *self)
{
    Waiter *w = (Waiter *)self;

    Py_CLEAR(w->loop);
    Py_CLEAR(w->call);
    Py_CLEAR(w->context);
    Py_CLEAR(w->failure);
    Py_CLEAR(w->get_loop);
    Py_CLEAR(w->woken);
    return 0; /* the receiver stays: every method uses it, and it refers to no waiter */
}

static void waiter_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    PyObject_GC_UnTrack(self);
    waiter_clear(self);
    Py_XDECREF((PyObject *)((Waiter *)self)->receiver);
    Py_XDECREF(((Waiter *)self)->run);
    Py_XDECREF(((Waiter *)self)->context_name);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *waiter_self(PyObject *self)
{
    Py_INCREF(self);
    return self;
}

static PyObject *waiter_result(PyObject *self, PyObject *unused)
{
    Waiter *w = (Waiter *)self;
    PyObject *failure = w->failure;

    (void)unused;
    if (!failure)
        return PyBool_FromLong(w->found);
    w->failure = NULL;
    PyErr_SetObject((PyObject *)Py_TYPE(failure), failure);
    Py_DECREF(failure);
    return NULL;
}

/* `await waiter`: yields the waiter, and returns its result when the task is woken. */
static PySendResult waiter_send(PyObject *self, PyObject *unused, PyObject **result)
{
    Waiter *w = (Waiter *)self;

    (void)unused;
    if (!w->done) {
        w->blocking = 1;
        *result = waiter_self(self);
        return PYGEN_NEXT;
    }
    *result = waiter_result(self, NULL);
    return *result ? PYGEN_RETURN : PYGEN_ERROR;
}

static PyObject *waiter_next(PyObject *self)
{
    PyObject *result;

    switch (waiter_send(self, Py_None, &result)) {
    case PYGEN_NEXT:
        return result;
    case PYGEN_RETURN:
        PyErr_SetObject(PyExc_StopIteration, result);
        Py_DECREF(result);
        return NULL;
    default:
        return NULL;
    }
}

/* The methods of a future that asyncio.Task calls. */

static PyObject *waiter_add_done_callback(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    const Py_ssize_t named = names ? PyTuple_Size(names) : 0;
    Waiter *w = (Waiter *)self;
    PyObject *name = named ? PyTuple_GetItem(names, 0) : NULL;

    if (count != 1 || named > 1 || (name && name != w->context_name && PyUnicode_CompareWithASCIIString(name, "context") != 0)) {
        PyErr_SetString(PyExc_TypeError, "add_done_callback() takes a function, and context=");
        return NULL;
    }
    Py_INCREF(args[0]);
    replace(&w->call, args[0]);
    Py_XINCREF(named ? args[1] : NULL);
    replace(&w->context, named ? args[1] : NULL);
    Py_RETURN_NONE;
}

static PyObject *waiter_done(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(((Waiter *)self)->done);
}

/* Wake the task, at once or in the loop's next turn. `result` is a bool, or an exception for the task. The task looks at the future
 * for an exception only. An asyncio.Future is read at once, but the result() of another type is called, and CPython 3.11 looks that
 * up by a string that it makes for each call. So without an exception the task gets a future that is done. */
static PyObject *settle(Waiter *w, PyObject *result, bool at_once)
{
    PyObject *call = w->call, *context = w->context, *answer = NULL, *self = (PyObject *)w;

    if (PyBool_Check(result)) {
        w->found = result == Py_True;
    } else if (!PyExceptionInstance_Check(result)) {
        PyErr_SetString(PyExc_TypeError, "a waiter is settled with a bool or an exception");
        return NULL;
    } else {
        Py_INCREF(result);
        replace(&w->failure, result);
    }
    w->done = true;
    w->call = w->context = NULL;
    if (!call || (!w->loop && !(at_once && context)))
        answer = waiter_self(Py_None); /* no task waits */
    else if (at_once && context) {
        w->waking = PyThread_get_thread_ident();
        answer = PyObject_CallMethodObjArgs(context, w->run, call, w->woken && !w->failure ? w->woken : self, NULL);
        w->waking = 0;
    } else {
        PyObject *call_soon = PyObject_GetAttrString(w->loop, "call_soon");
        PyObject *args = PyTuple_Pack(2, call, self);
        PyObject *names = context ? Py_BuildValue("{sO}", "context", context) : PyDict_New();

        w->scheduled = true;
        if (call_soon && args && names)
            answer = PyObject_Call(call_soon, args, names);
        Py_XDECREF(call_soon);
        Py_XDECREF(args);
        Py_XDECREF(names);
    }
    Py_XDECREF(call);
    Py_XDECREF(context);
    if (!answer)
        return NULL;
    Py_DECREF(answer);
    Py_RETURN_NONE;
}

static PyObject *waiter_settle(PyObject *self, PyObject *result)
{
    return settle((Waiter *)self, result, false);
}

static PyObject *waiter_settle_at_once(PyObject *self, PyObject *result)
{
    return settle((Waiter *)self, result, true);
}

/* The loop calls this when the dispatcher is readable: Reader.ready() in C. */
static PyObject *waiter_ready(PyObject *self, PyObject *unused)
{
    Waiter *w = (Waiter *)self;
    PyObject *found, *answer, *type, *trace;

    (void)unused;
    if (!w->armed || w->done || w->receiver->latency > 0)
        return PyObject_CallMethod((PyObject *)w->receiver, "_ready", NULL);
    found = lrx_receiver_poll((PyObject *)w->receiver, NULL);
    if (found == Py_False)
        return found;
    if (!found) {
        PyErr_Fetch(&type, &found, &trace);
        PyErr_NormalizeException(&type, &found, &trace);
        if (trace)
            PyException_SetTraceback(found, trace);
        Py_XDECREF(type);
        Py_XDECREF(trace);
    }
    answer = settle(w, found, true);
    Py_DECREF(found);
    return answer;
}

static PyObject *waiter_cancel(PyObject *self, PyObject *args, PyObject *names)
{
    static char *keywords[] = {"msg", NULL};
    Waiter *w = (Waiter *)self;
    PyObject *message = Py_None, *asyncio, *cancelled, *answer;

    if (!PyArg_ParseTupleAndKeywords(args, names, "|O", keywords, &message))
        return NULL;
    if (w->done)
        Py_RETURN_FALSE;
    asyncio = PyImport_ImportModule("asyncio");
    if (!asyncio)
        return NULL;
    cancelled = PyObject_CallMethod(asyncio, "CancelledError", message == Py_None ? NULL : "(O)", message);
    Py_DECREF(asyncio);
    if (!cancelled)
        return NULL;
    answer = settle(w, cancelled, false);
    Py_DECREF(cancelled);
    if (!answer)
        return NULL;
    Py_DECREF(answer);
    answer = PyObject_CallMethod((PyObject *)w->receiver, "_stop_waiting", NULL);
    if (!answer)
        return NULL;
    Py_DECREF(answer);
    Py_RETURN_TRUE;
}

#define CALLABLE(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef waiter_methods[] = {
    {"add_done_callback", CALLABLE(waiter_add_done_callback), METH_FASTCALL | METH_KEYWORDS,
     "add_done_callback($self, call, /, *, context=None)\n--\n\nSet the callback that wakes the task."},
    {"done", waiter_done, METH_NOARGS, "done($self, /)\n--\n\nWhether no task waits, or the task was or will be woken."},
    {"result", waiter_result, METH_NOARGS, "result($self, /)\n--\n\nWhether packets came. Raises the exception for the task, if there is one."},
    {"cancel", CALLABLE(waiter_cancel), METH_VARARGS | METH_KEYWORDS,
     "cancel($self, /, msg=None)\n--\n\nEnd the wait of a task that is cancelled. False if no task waits."},
    {"ready", waiter_ready, METH_NOARGS,
     "ready($self, /)\n--\n\nThe event loop calls this when the dispatcher is readable."},
    {"settle", waiter_settle, METH_O,
     "settle($self, result, /)\n--\n\nWake the task in the loop's next turn, with a bool or an exception."},
    {"settle_at_once", waiter_settle_at_once, METH_O,
     "settle_at_once($self, result, /)\n--\n\nWake the task now. For callbacks of the event loop only: no task may be running."},
    {0},
};

static PyMemberDef waiter_members[] = {
    {"_asyncio_future_blocking", T_BOOL, offsetof(Waiter, blocking), 0, NULL},
    {"get_loop", T_OBJECT_EX, offsetof(Waiter, get_loop), READONLY, "The method get_loop()."},
    {"armed", T_BOOL, offsetof(Waiter, armed), 0, "Whether the reader is registered, and will settle this waiter."},
    {0},
};

static PyType_Slot waiter_slots[] = {
    {Py_tp_doc, "Waiter(dispatcher, loop)\n--\n\nThe future that a task of an event loop awaits until packets come."},
    {Py_tp_new, waiter_new},
    {Py_tp_dealloc, waiter_dealloc},
    {Py_tp_traverse, waiter_traverse},
    {Py_tp_clear, waiter_clear},
    {Py_tp_methods, waiter_methods},
    {Py_tp_members, waiter_members},
    {Py_am_await, waiter_self},
    {Py_am_send, waiter_send},
    {Py_tp_iter, waiter_self},
    {Py_tp_iternext, waiter_next},
    {0, NULL},
};

PyType_Spec lrx_waiter_spec = {
    .name = "linkrx._core._types.Waiter",
    .basicsize = sizeof(Waiter),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = waiter_slots,
};
