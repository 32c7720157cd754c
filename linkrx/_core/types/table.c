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
        return t->columns.starts;
    case COLUMN_LENGTHS:
        return t->columns.lengths;
    case COLUMN_WIRE_LENGTHS:
        return t->columns.wire_lengths;
    case COLUMN_INTERFACES:
        return t->columns.interfaces;
    case COLUMN_TIMESTAMPS:
        *format = (char *)formats[2];
        *width = sizeof(int64_t);
        return t->columns.timestamps;
    case COLUMN_PROTOCOLS:
        at = t->columns.protocols;
        break;
    case COLUMN_FLAGS:
        at = t->columns.flags;
        break;
    case COLUMN_VLAN_TCIS:
        at = t->columns.vlan_tcis;
        break;
    case COLUMN_VLAN_TPIDS:
        at = t->columns.vlan_tpids;
        break;
    case COLUMN_LINK_TYPES:
        at = t->columns.link_types;
        break;
    }
    *format = (char *)formats[0];
    *width = sizeof(uint16_t);
    return at;
}

uint32_t *lrx_table_lay_out(Table *t, uint32_t rows)
{
    if (t->laid_out != rows || !rows)
        t->columns = lrx_columns_at(lrx_table_memory(t), rows);
    t->laid_out = rows;
    t->count = rows;
    t->offsets = t->columns.starts = lrx_columns_at(lrx_table_memory(t), rows).starts;
    return (uint32_t *)(lrx_table_memory(t) + (size_t)rows * LRX_ROW_BYTES);
}

Table *lrx_table_new(State *state, uint32_t count)
{
    Table *t = PyObject_NewVar(Table, state->table_type, (Py_ssize_t)((LRX_ROW_BYTES + sizeof *t->offsets) * count));

    if (!t)
        return NULL;
    t->room = count;
    t->laid_out = 0;
    t->column = COLUMN_STARTS;
    lrx_table_lay_out(t, count);
    return t;
}

void lrx_table_skip(Table *t, uint32_t n)
{
    struct lrx_columns *c = &t->columns;

    t->count -= n;
    t->laid_out = 0;
    c->timestamps += n;
    t->offsets += n;
    c->starts += n;
    c->lengths += n;
    c->wire_lengths += n;
    c->interfaces += n;
    c->protocols += n;
    c->flags += n;
    c->vlan_tcis += n;
    c->vlan_tpids += n;
    c->file_types += n;
    c->link_types += n;
    c->addresses += n;
    c->address_lengths += n;
    c->link_headers += n;
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

void lrx_table_copy(Table *t, const struct lrx_columns *from, bool per_packet)
{
    const struct lrx_columns *to = &t->columns;
    const size_t count = (size_t)t->count;

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
