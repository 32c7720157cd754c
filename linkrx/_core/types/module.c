/* The module and its types. There are no globals: everything is in the state of the module. */
#define _GNU_SOURCE
#include "types.h"

#include <dlfcn.h>
#include <sys/mman.h>

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);

    if (type && PyModule_AddType(module, (PyTypeObject *)type) < 0)
        Py_CLEAR(type);
    return (PyTypeObject *)type;
}

#define PROCESS_PAGE 4096

static void map_process(State *state)
{
    void *page = mmap(NULL, PROCESS_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (page == MAP_FAILED)
        return;
    if (madvise(page, PROCESS_PAGE, MADV_WIPEONFORK) < 0)
        munmap(page, PROCESS_PAGE);
    else
        state->process = page;
}

static void module_free(void *module)
{
    State *state = PyModule_GetState(module);

    if (state)
        PyObject_Free(state->spare_method);
    if (state && state->process)
        munmap((void *)state->process, PROCESS_PAGE);
}

static int execute(PyObject *module)
{
    State *state = PyModule_GetState(module);

    *(void **)&state->vectorcall = dlsym(RTLD_DEFAULT, "PyObject_Vectorcall");
    map_process(state);
    state->owner_type = add_type(module, &lrx_owner_spec);
    state->table_type = add_type(module, &lrx_table_spec);
    state->packet_type = add_type(module, &lrx_packet_spec);
    state->batch_type = add_type(module, &lrx_batch_spec);
    state->batch_iterator_type = add_type(module, &lrx_batch_iterator_spec);
    state->receiver_type = add_type(module, &lrx_receiver_spec);
    state->bytes_method_type = add_type(module, &lrx_bytes_method_spec);
    state->waiter_type = add_type(module, &lrx_waiter_spec);
    state->async_packets_type = add_type(module, &lrx_async_packets_spec);
    if (!state->owner_type || !state->table_type || !state->packet_type || !state->batch_type ||
        !state->batch_iterator_type || !state->receiver_type || !state->waiter_type ||
        !state->async_packets_type || !state->bytes_method_type)
        return -1;
    return PyModule_AddStringConstant(module, "SOURCES", LRX_SOURCES);
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);

    Py_VISIT((PyObject *)state->owner_type);
    Py_VISIT((PyObject *)state->table_type);
    Py_VISIT((PyObject *)state->packet_type);
    Py_VISIT((PyObject *)state->batch_type);
    Py_VISIT((PyObject *)state->batch_iterator_type);
    Py_VISIT((PyObject *)state->receiver_type);
    Py_VISIT((PyObject *)state->waiter_type);
    Py_VISIT((PyObject *)state->async_packets_type);
    Py_VISIT((PyObject *)state->bytes_method_type);
    Py_VISIT(state->headers);
    return 0;
}

static int clear(PyObject *module)
{
    State *state = PyModule_GetState(module);

    Py_CLEAR(state->owner_type);
    Py_CLEAR(state->table_type);
    Py_CLEAR(state->packet_type);
    Py_CLEAR(state->batch_type);
    Py_CLEAR(state->batch_iterator_type);
    Py_CLEAR(state->receiver_type);
    Py_CLEAR(state->waiter_type);
    Py_CLEAR(state->async_packets_type);
    Py_CLEAR(state->bytes_method_type);
    Py_CLEAR(state->headers);
    return 0;
}

static PyMethodDef functions[] = {
    {"record", lrx_record, METH_VARARGS, "Records of a capture file for packets: see types.h."},
    {"restore_packet", lrx_packet_restore, METH_VARARGS, "A packet from the values of its pickle after the version."},
    {0},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "linkrx._core._types",
    .m_doc = "The types that Python touches once per packet.",
    .m_size = sizeof(State),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__types(void)
{
    return PyModuleDef_Init(&definition);
}
