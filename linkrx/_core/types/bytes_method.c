/* What bytes(packet) calls.
 *
 * bytes() asks the packet for its bound method `__bytes__`, calls it once and frees it. Making and freeing a built-in method takes
 * 28 of the 61 ns that bytes(packet) takes, because the garbage collector tracks it. The method here refers to a packet only, so
 * the collector need not track it. And the memory of the last one is used for the next. */
#include "types.h"

#include <structmember.h>

/* Py_TPFLAGS_HAVE_VECTORCALL, and the bit of PY_VECTORCALL_ARGUMENTS_OFFSET: the limited API has both since CPython 3.12. */
#define HAVE_VECTORCALL (1UL << 11)
#define ARGUMENTS_OFFSET ((size_t)1 << (8 * sizeof(size_t) - 1))

typedef struct {
    PyObject_HEAD
    PyObject *(*vectorcall)(PyObject *, PyObject *const *, size_t, PyObject *);
    PyObject *packet;
} BytesMethod;

static PyObject *call(PyObject *self, bool has_arguments)
{
    if (has_arguments) {
        PyErr_SetString(PyExc_TypeError, "Packet.__bytes__() takes no arguments");
        return NULL;
    }
    return lrx_packet_tobytes(((BytesMethod *)self)->packet, NULL);
}

static PyObject *method_vectorcall(PyObject *self, PyObject *const *arguments, size_t count, PyObject *names)
{
    (void)arguments;
    return call(self, (count & ~ARGUMENTS_OFFSET) || (names && PyTuple_Size(names)));
}

static PyObject *method_call(PyObject *self, PyObject *arguments, PyObject *names)
{
    return call(self, PyTuple_Size(arguments) || (names && PyDict_Size(names)));
}

PyObject *lrx_bytes_method(PyObject *packet, void *unused)
{
    State *state = PyType_GetModuleState(Py_TYPE(packet));
    PyObject *spare = state->spare_method;
    BytesMethod *m;

    (void)unused;
    state->spare_method = NULL;
    m = (BytesMethod *)(spare ? PyObject_Init(spare, state->bytes_method_type)
                              : PyObject_New(PyObject, state->bytes_method_type));
    if (!m)
        return NULL;
    m->vectorcall = method_vectorcall;
    Py_INCREF(packet);
    m->packet = packet;
    return (PyObject *)m;
}

static void method_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    State *state = PyType_GetModuleState(type);

    Py_DECREF(((BytesMethod *)self)->packet);
    if (!state->spare_method)
        state->spare_method = self;
    else
        PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

static PyMemberDef method_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(BytesMethod, vectorcall), READONLY, NULL},
    {"__self__", T_OBJECT_EX, offsetof(BytesMethod, packet), READONLY, NULL},
    {0},
};

static PyType_Slot method_slots[] = {
    {Py_tp_doc, "The frame as bytes."},
    {Py_tp_dealloc, method_dealloc},
    {Py_tp_call, method_call},
    {Py_tp_members, method_members},
    {0, NULL},
};

PyType_Spec lrx_bytes_method_spec = {
    .name = "linkrx._core._types.BytesMethod",
    .basicsize = sizeof(BytesMethod),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION | HAVE_VECTORCALL,
    .slots = method_slots,
};
