/* Delivers packets. */
#include "types.h"

#include <string.h>

void lrx_forget_pending(Receiver *r)
{
    Batch *b = r->pending;

    r->pending = NULL;
    r->next = 0;
    if (b)
        lrx_batch_give_up(b, &r->spare);
}

/* Reset a packet that only the receiver refers to. Give up the reference to any other. */
static void reset_packet(Packet **slot)
{
    if (!*slot)
        return;
    if (Py_REFCNT((PyObject *)*slot) > 1)
        Py_CLEAR(*slot);
    else
        lrx_packet_reset(*slot);
}

void lrx_reset_packets(Receiver *r)
{
    reset_packet(&r->delivered);
    reset_packet(&r->turns[0]);
    reset_packet(&r->turns[1]);
}

static void step(Receiver *r)
{
    if (++r->next == (uint32_t)r->pending->table->count)
        lrx_forget_pending(r);
}

/* The arguments of `deliver` for a packet. */
static const Neighbour *neighbour_of(Receiver *r, const Packet *p)
{
    const uint32_t kind = p->protocol | (uint32_t)p->link_header << 16 | (uint32_t)p->address_length << 24;
    uint64_t first, second = 0;
    Neighbour *n;

    if (!lrx_packet_is_readable(p))
        return NULL;
    if (p->link_header) {
        memcpy(&first, p->frame, sizeof first);
        memcpy(&second, p->frame + ETHER_HEADER - sizeof second, sizeof second);
    } else {
        memcpy(&first, p->address, sizeof first);
        first = p->address_length ? first : 0;
    }
    n = &r->neighbours[((first ^ second ^ kind) * UINT64_C(0x9E3779B97F4A7C15)) >> 60]; /* of NEIGHBOURS */
    if (n->protocol && n->first == first && n->second == second && n->kind == kind)
        return n;
    Py_CLEAR(n->remote);
    Py_CLEAR(n->local);
    Py_CLEAR(n->protocol);
    n->first = first;
    n->second = second;
    n->kind = kind;
    if (p->link_header) {
        n->remote = PyBytes_FromStringAndSize((const char *)p->frame + ETHER_ADDRESS, ETHER_ADDRESS);
        n->local = PyBytes_FromStringAndSize((const char *)p->frame, ETHER_ADDRESS);
    } else {
        n->remote = lrx_packet_link_address(p);
        n->local = Py_None;
        Py_INCREF(Py_None);
    }
    if (n->remote && n->local)
        n->protocol = PyLong_FromLong(p->protocol);
    return n->protocol ? n : NULL;
}

/* The neighbour keeps its arguments meanwhile: it changes with the claim held only, and a nested call does not get that. */
static PyObject *call(const Receiver *r, const Neighbour *n, Packet *p)
{
    PyObject *arguments[] = {n->remote, n->local, n->protocol, (PyObject *)p};

    return r->state->vectorcall ? r->state->vectorcall(r->deliver, arguments, 4, NULL)
                                : PyObject_CallFunctionObjArgs(r->deliver, arguments[0], arguments[1], arguments[2],
                                                               arguments[3], NULL);
}

/* The position moves on before each call, so an exception of `deliver` neither loses nor repeats a packet. */
Py_ssize_t lrx_deliver(Receiver *r, Py_ssize_t most, int64_t deadline)
{
    Batch *b = r->pending;
    Py_ssize_t delivered = 0;
    bool failed = false;

    Py_INCREF((PyObject *)b);
    r->delivering = true;
    while (r->pending == b && !r->stopping && !r->exchanging && delivered < most) {
        Packet *p = lrx_packet_in(r->state, &r->delivered);
        const Neighbour *n;
        PyObject *result;

        failed = !p || lrx_packet_set(p, b, r->next) < 0 || !(n = neighbour_of(r, p));
        if (failed)
            break;
        step(r);
        Py_INCREF((PyObject *)p);
        result = call(r, n, p);
        delivered++;
        /* A packet that is still referenced gets its copy now. If there is no memory for it, or `deliver` has raised and its
         * frame is part of the traceback, the packet reads in place until the memory is taken back. */
        if (result && Py_REFCNT((PyObject *)p) > 2 && lrx_packet_own(p) < 0)
            PyErr_Clear();
        Py_DECREF((PyObject *)p);
        failed = !result;
        if (failed)
            break;
        Py_DECREF(result);
        if (deadline && lrx_coarse_now() >= deadline)
            break;
    }
    r->delivering = false;
    if (!r->pending)
        lrx_batch_give_up(b, &r->spare);
    else
        Py_DECREF((PyObject *)b);
    return failed ? -1 : delivered;
}

Packet *lrx_next_packet(Receiver *r)
{
    Packet *p = lrx_packet_in(r->state, &r->turns[r->turn & 1]);

    if (!p || lrx_packet_set(p, r->pending, r->next) < 0)
        return NULL;
    r->turn++;
    step(r);
    Py_INCREF((PyObject *)p);
    return p;
}

Batch *lrx_take_batch(Receiver *r)
{
    Batch *b = r->pending;

    if (r->next) {
        /* `memory` has zeroes instead of the packets that were delivered before. */
        lrx_reset_packets(r);
        if (b->owner && b->owner->mapped && lrx_owner_copy_packets(b->owner) < 0)
            return NULL;
    }
    b = lrx_batch_of_its_size(b, &r->spare);
    if (!b)
        return NULL;
    lrx_batch_skip(b, r->next);
    r->pending = NULL;
    r->next = 0;
    return b;
}

/* Frames that are classified, and not in a batch yet. */
static void drop_classified(Receiver *r)
{
    struct lrx_report *report = report_of(r);
    const uint32_t count = report->classified - 1, rows = report->rows;

    r->undelivered += count;
    if (r->spare && count <= rows && rows <= r->table_rows) {
        const struct lrx_columns columns = lrx_columns_at(lrx_table_memory(r->spare->table), rows);

        for (uint32_t k = 0; k < count; k++)
            r->undelivered_bytes += columns.lengths[k];
    }
    r->batches++;
    r->receives += report->receives;
    r->filling = false;
    report->classified = 0;
}

/* Drop the pending packets, and count them. Nothing in here can fail. */
void lrx_drop(Receiver *r)
{
    const Batch *b = r->pending;

    if (!b) {
        if (report_of(r)->classified)
            drop_classified(r);
        return;
    }
    r->undelivered += (uint64_t)b->table->count - r->next;
    for (Py_ssize_t k = r->next; k < b->table->count; k++)
        r->undelivered_bytes += b->table->columns.lengths[k];
    lrx_forget_pending(r);
}
