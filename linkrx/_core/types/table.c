/* The columns of a batch, and their buffers for Python. */
#include "types.h"

#include <string.h>

/* A column, its format, and the bytes of one element. */
static void *column_of(const Table *t, enum column column, char **format, Py_ssize_t *width)
{
    static const char formats[][2] = {"H", "I", "q"};
    void *at = NULL;

    *format = (char *)formats[1];
    *width = sizeof(uint32_t);
    switch (column) {
    case COLUMN_STARTS:
        return t->starts;
    case COLUMN_LENGTHS:
        return t->lengths;
    case COLUMN_WIRE_LENGTHS:
        return t->wire_lengths;
    case COLUMN_INTERFACES:
        return t->interfaces;
    case COLUMN_TIMESTAMPS:
        *format = (char *)formats[2];
        *width = sizeof(int64_t);
        return t->timestamps;
    case COLUMN_PROTOCOLS:
        at = t->protocols;
        break;
    case COLUMN_FLAGS:
        at = t->flags;
        break;
    case COLUMN_VLAN_TCIS:
        at = t->vlan_tcis;
        break;
    case COLUMN_VLAN_TPIDS:
        at = t->vlan_tpids;
        break;
    case COLUMN_LINK_TYPES:
        at = t->link_types;
        break;
    }
    *format = (char *)formats[0];
    *width = sizeof(uint16_t);
    return at;
}

#define ROW (sizeof(int64_t) + sizeof(uint64_t) + 6 * sizeof(uint32_t) + 5 * sizeof(uint16_t) + 2)

void lrx_table_lay_out(Table *t, uint32_t count)
{
    t->count = count;
    t->timestamps = (int64_t *)(t + 1);
    t->addresses = (uint64_t *)(t->timestamps + count);
    t->offsets = (uint32_t *)(t->addresses + count);
    t->starts = t->offsets + count;
    t->lengths = t->starts + count;
    t->wire_lengths = t->lengths + count;
    t->interfaces = t->wire_lengths + count;
    t->file_types = t->interfaces + count;
    t->protocols = (uint16_t *)(t->file_types + count);
    t->flags = t->protocols + count;
    t->vlan_tcis = t->flags + count;
    t->vlan_tpids = t->vlan_tcis + count;
    t->link_types = t->vlan_tpids + count;
    t->address_lengths = (uint8_t *)(t->link_types + count);
    t->link_headers = t->address_lengths + count;
}

Table *lrx_table_new(State *state, uint32_t count)
{
    Table *t = PyObject_NewVar(Table, state->table_type, (Py_ssize_t)(ROW * count));

    if (!t)
        return NULL;
    t->room = count;
    t->column = COLUMN_STARTS;
    lrx_table_lay_out(t, count);
    return t;
}

void lrx_table_skip(Table *t, uint32_t n)
{
    t->count -= n;
    t->timestamps += n;
    t->offsets += n;
    t->starts += n;
    t->lengths += n;
    t->wire_lengths += n;
    t->interfaces += n;
    t->protocols += n;
    t->flags += n;
    t->vlan_tcis += n;
    t->vlan_tpids += n;
    t->file_types += n;
    t->link_types += n;
    t->addresses += n;
    t->address_lengths += n;
    t->link_headers += n;
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
        view->shape = &t->count; /* elements; PyBuffer_FillInfo has set bytes */
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

/* Copy the columns of a table, without offsets. */
void lrx_table_copy(Table *to, const struct lrx_columns *from, bool per_packet)
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
    if (!per_packet)
        return;
    memcpy(to->file_types, from->file_types, count * sizeof *to->file_types);
    memcpy(to->link_types, from->link_types, count * sizeof *to->link_types);
    memcpy(to->addresses, from->addresses, count * sizeof *to->addresses);
    memcpy(to->address_lengths, from->address_lengths, count);
    memcpy(to->link_headers, from->link_headers, count);
}
