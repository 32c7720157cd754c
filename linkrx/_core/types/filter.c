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
    t->timestamps[to] = t->timestamps[from];
    t->offsets[to] = t->offsets[from];
    t->starts[to] = t->starts[from];
    t->lengths[to] = t->lengths[from];
    t->wire_lengths[to] = t->wire_lengths[from];
    t->interfaces[to] = t->interfaces[from];
    t->protocols[to] = t->protocols[from];
    t->flags[to] = t->flags[from];
    t->vlan_tcis[to] = t->vlan_tcis[from];
    t->vlan_tpids[to] = t->vlan_tpids[from];
    t->file_types[to] = t->file_types[from];
    t->link_types[to] = t->link_types[from];
    t->addresses[to] = t->addresses[from];
    t->address_lengths[to] = t->address_lengths[from];
    t->link_headers[to] = t->link_headers[from];
}

/* Remove the pending packets that the filter rejects. */
static void filter_pending(Receiver *r)
{
    Batch *b = r->pending;
    Table *t = b->table;
    uint64_t *counters = r->counters.buf;
    const Framing framing = b->framing;
    Py_ssize_t n = r->next;

    for (Py_ssize_t k = n; k < t->count; k++) {
        const uint32_t link_header = framing.per_packet ? t->link_headers[k] : framing.link_header;
        const struct lrx_filtered packet = {
            .frame = b->base + t->offsets[k],
            .length = t->lengths[k],
            .wire_length = t->wire_lengths[k],
            .link_header = link_header,
            .link_type = framing.per_packet ? t->link_types[k] : framing.link_type,
            .protocol = framing.per_packet ? t->protocols[k] : 0,
            .file_type = framing.per_packet ? t->file_types[k] : 0,
            .interface = t->interfaces[k],
            .outgoing = t->flags[k] & LRX_OUTGOING,
            .tagged = t->flags[k] & LRX_VLAN,
            .vlan_tci = t->vlan_tcis[k],
            .vlan_tpid = t->vlan_tpids[k],
        };
        const uint32_t before = t->lengths[k], kept = lrx_filter_run(&r->classifier.filter, &packet);

        counters[LRX_BYTES] -= before - kept;
        if (kept < link_header || !kept) {
            counters[LRX_BYTES] -= kept;
            counters[LRX_PACKETS]--;
            counters[kept ? LRX_RUNTS : LRX_FILTERED]++;
            continue;
        }
        move_row(t, n, k);
        if (kept < before) {
            counters[LRX_CUT] += !(t->flags[n] & LRX_TRUNCATED);
            t->lengths[n] = kept;
            t->flags[n] |= LRX_TRUNCATED;
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

    if (!PyArg_ParseTuple(args, "Opd:_set_filter", &program, &tags, &seconds))
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
