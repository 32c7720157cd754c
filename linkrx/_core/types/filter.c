/* The filter that linkrx runs, and its replacement during reception.
 *
 * The thread that has the claim replaces the filter: between two deliveries, and before each receive. Pending packets are filtered
 * again. Attaching a filter in the kernel does not affect queued packets. For those, linkrx runs the filter too, until a fill finds
 * nothing and all packets from before must have been readable. */
#include "types.h"

#include <string.h>
#include <unistd.h>

static void move_row(Table *t, Py_ssize_t to, Py_ssize_t from)
{
    const struct lrx_columns *c = &t->columns;

    c->timestamps[to] = c->timestamps[from];
    t->offsets[to] = t->offsets[from];
    c->starts[to] = c->starts[from];
    c->lengths[to] = c->lengths[from];
    c->wire_lengths[to] = c->wire_lengths[from];
    c->interfaces[to] = c->interfaces[from];
    c->protocols[to] = c->protocols[from];
    c->flags[to] = c->flags[from];
    c->vlan_tcis[to] = c->vlan_tcis[from];
    c->vlan_tpids[to] = c->vlan_tpids[from];
    c->file_types[to] = c->file_types[from];
    c->link_types[to] = c->link_types[from];
    c->addresses[to] = c->addresses[from];
    c->address_lengths[to] = c->address_lengths[from];
    c->link_headers[to] = c->link_headers[from];
}

/* Remove the pending packets that the filter rejects. */
static void filter_pending(Receiver *r)
{
    Batch *b = r->pending;
    Table *t = b->table;
    const struct lrx_columns *c = &t->columns;
    uint64_t *counters = r->counters.buf;
    const Framing framing = b->framing;
    Py_ssize_t n = r->next;

    for (Py_ssize_t k = n; k < t->count; k++) {
        const uint32_t link_header = framing.per_packet ? c->link_headers[k] : framing.link_header;
        const struct lrx_filtered packet = {
            .frame = b->base + t->offsets[k],
            .length = c->lengths[k],
            .wire_length = c->wire_lengths[k],
            .link_header = link_header,
            .link_type = framing.per_packet ? c->link_types[k] : framing.link_type,
            .protocol = framing.per_packet ? c->protocols[k] : 0,
            .file_type = framing.per_packet ? c->file_types[k] : 0,
            .interface = c->interfaces[k],
            .outgoing = c->flags[k] & LRX_OUTGOING,
            .tagged = c->flags[k] & LRX_VLAN,
            .vlan_tci = c->vlan_tcis[k],
            .vlan_tpid = c->vlan_tpids[k],
        };
        const uint32_t before = c->lengths[k], kept = lrx_filter_run(&r->classifier.filter, &packet);

        counters[LRX_BYTES] -= before - kept;
        if (kept < link_header || !kept) {
            counters[LRX_BYTES] -= kept;
            counters[LRX_PACKETS]--;
            counters[kept ? LRX_RUNTS : LRX_FILTERED]++;
            continue;
        }
        move_row(t, n, k);
        if (kept < before) {
            counters[LRX_CUT] += !(c->flags[n] & LRX_TRUNCATED);
            c->lengths[n] = kept;
            c->flags[n] |= LRX_TRUNCATED;
        }
        n++;
    }
    t->count = n;
    if (n == (Py_ssize_t)r->next)
        lrx_forget_pending(r);
}

int lrx_exchange_filter(Receiver *r)
{
    /* Classified frames must be in a batch before they can be filtered. */
    if (!r->pending && report_of(r)->classified && lrx_take_in(r) == FAILED)
        return -1;
    Py_XDECREF(r->filter);
    r->filter = r->next_filter.program;
    r->next_filter.program = NULL;
    r->classifier.filter = r->next_filter.filter;
    r->filter_until = r->next_filter.until;
    r->exchanging = false;
    if (r->pending && r->filter)
        filter_pending(r);
    lrx_set_readable(r); /* clears the event that woke the receiving thread */
    return 0;
}

void lrx_end_filter(Receiver *r)
{
    r->filter_until = 0;
    r->classifier.filter = (struct lrx_filter){0};
    Py_CLEAR(r->filter);
}

/* Make a filter of a program (bytes), or of the programs of a capture file (FilePrograms). Returns 0 for an empty program, which lets
 * everything pass, 1 for another, or -1 with an exception. */
static int filter_of(PyObject *program, struct lrx_filter *filter)
{
    PyObject *address;
    Py_ssize_t size;
    char *code;

    *filter = (struct lrx_filter){0};
    if (!PyBytes_Check(program)) {
        address = PyObject_GetAttrString(program, "address");
        if (!address)
            return -1;
        filter->files = PyLong_AsVoidPtr(address);
        Py_DECREF(address);
        return PyErr_Occurred() ? -1 : 1;
    }
    if (PyBytes_AsStringAndSize(program, &code, &size) < 0)
        return -1;
    filter->program = (const struct lrx_instruction *)(const void *)code;
    if (size == 0) {
        filter->program = NULL;
        return 0;
    }
    if (size % sizeof(struct lrx_instruction) || size > (Py_ssize_t)(LRX_FILTER_MOST * sizeof(struct lrx_instruction)) ||
        lrx_filter_check(filter->program, (uint32_t)((size_t)size / sizeof(struct lrx_instruction)))) {
        PyErr_SetString(PyExc_ValueError, "the program is invalid");
        return -1;
    }
    return 1;
}

/* _set_filter(program, tags, seconds): see the stub. */
PyObject *lrx_receiver_set_filter(PyObject *self, PyObject *args)
{
    Receiver *r = (Receiver *)self;
    struct lrx_filter filter;
    PyObject *program, *before;
    double seconds;
    int tags, is_one;

    if (!lrx_check_prepared(r) || !PyArg_ParseTuple(args, "Opd:_set_filter", &program, &tags, &seconds))
        return NULL;
    is_one = filter_of(program, &filter);
    if (is_one < 0)
        return NULL;
    filter.tags = tags != 0;
    before = r->next_filter.program;
    if (is_one)
        Py_INCREF(program);
    r->next_filter.program = is_one ? program : NULL;
    r->next_filter.filter = filter;
    r->next_filter.until = seconds < 0 ? 0 : lrx_now() + seconds;
    r->exchanging = true;
    Py_XDECREF(before);
    return lrx_receiver_exchange_filter(self, NULL);
}

/* Returns whether the filter is replaced, or will be before the next delivery. */
PyObject *lrx_receiver_exchange_filter(PyObject *self, PyObject *unused)
{
    Receiver *r = (Receiver *)self;
    const uint64_t one = 1;

    (void)unused;
    if (r->exchanging && !r->closed) {
        if (!r->claimed) {
            if (lrx_exchange_filter(r) < 0)
                return NULL;
        } else if (r->thread != PyThread_get_thread_ident()) {
            const ssize_t done = write(r->event, &one, sizeof one); /* wake the receiving thread */

            (void)done;
            Py_RETURN_FALSE;
        }
    }
    Py_RETURN_TRUE;
}
