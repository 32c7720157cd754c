/* Packets: making, copying, freeing and pickling them. memory.c has the rule of memory, and packet_type.c the attributes. */
#include "types.h"
#include "../uncached.inc"

#include <string.h>

static void unlink_packet(Packet *p)
{
    Owner *owner = p->owner;

    if (!owner)
        return;
    *p->link = p->next;
    if (p->next)
        p->next->link = p->link;
    p->owner = NULL;
    Py_DECREF((PyObject *)owner);
}

static void link_packet(Packet *p, Owner *owner)
{
    Py_INCREF((PyObject *)owner);
    p->owner = owner;
    p->next = owner->packets;
    p->link = &owner->packets;
    if (p->next)
        p->next->link = &p->next;
    owner->packets = p;
}

bool lrx_packet_is_readable(const Packet *p)
{
    if (p->own || !p->owner || !p->owner->guard || *p->owner->guard)
        return true;
    PyErr_SetString(PyExc_RuntimeError,
                    "this packet lies in a ring of the parent process, and this child was forked without os.fork(): "
                    "fork with os.fork(), or keep packet.copy()");
    return false;
}

Packet *lrx_packet_new(State *state)
{
    Packet *p = PyObject_New(Packet, state->packet_type);

    if (!p)
        return NULL;
    /* Only what lrx_packet_set() may leave: GCC clears a whole packet with `rep stos`, which takes 15 ns. */
    p->owner = NULL;
    p->own = NULL;
    p->frame = NULL;
    p->length = 0;
    p->address_length = p->has_vnet = p->viewing = 0;
    memset(p->address, 0, sizeof p->address);
    return p;
}

void lrx_packet_dealloc(PyObject *self)
{
    Packet *p = (Packet *)self;

    unlink_packet(p);
    Py_XDECREF(p->own);
    lrx_free(self);
}

int lrx_packet_copy_frame(Packet *p)
{
    if (p->own)
        return 0;
    if (!lrx_packet_is_readable(p))
        return -1;
    p->own = PyBytes_FromStringAndSize((const char *)p->frame, p->length);
    if (!p->own)
        return -1;
    if (p->owner)
        p->owner->copied = true;
    p->frame = (const uint8_t *)PyBytes_AsString(p->own);
    return 0;
}

int lrx_packet_own(Packet *p)
{
    if (lrx_packet_copy_frame(p) < 0)
        return -1;
    unlink_packet(p);
    return 0;
}

PyObject *lrx_packet_link_address(const Packet *p)
{
    if (!p->address_length)
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize((const char *)p->address, p->address_length);
}

void lrx_packet_reset(Packet *p)
{
    unlink_packet(p);
    Py_CLEAR(p->own);
    p->frame = NULL;
    p->length = 0;
}

/* Set the columns of sources with `per_packet`. */
static void set_link_layer(Packet *p, const Table *t, uint32_t index)
{
    p->file_type = t->columns.file_types[index];
    p->link_type = t->columns.link_types[index];
    p->link_header = t->columns.link_headers[index];
    if (!p->link_header) {
        p->address_length = t->columns.address_lengths[index] < LINK_ADDRESS ? t->columns.address_lengths[index] : LINK_ADDRESS;
        memcpy(p->address, &t->columns.addresses[index], LINK_ADDRESS);
    }
}

/* Who copies a frame will likely copy the next one too. A block of a ring is not in the processor's cache, and the prefetcher of
 * the hardware stops at each page. So fetch the next frame while Python handles this one. */
static void fetch_next(const Batch *batch, uint32_t index)
{
    const Table *t = batch->table;

    batch->owner->copied = false;
    if (++index < t->count)
        lrx_prefetch((uintptr_t)batch->base + t->offsets[index], t->columns.lengths[index]);
}

int lrx_packet_set(Packet *p, const Batch *batch, uint32_t index)
{
    const Table *t = batch->table;

    Py_CLEAR(p->own);
    p->frame = batch->base + t->offsets[index];
    p->timestamp = t->columns.timestamps[index];
    p->length = t->columns.lengths[index];
    p->wire_length = t->columns.wire_lengths[index];
    p->interface = t->columns.interfaces[index];
    p->protocol = t->columns.protocols[index];
    p->flags = t->columns.flags[index];
    p->vlan_tci = t->columns.vlan_tcis[index];
    p->vlan_tpid = t->columns.vlan_tpids[index];
    p->link_type = batch->framing.link_type;
    p->link_header = batch->framing.link_header;
    p->file_type = 0;
    p->address_length = 0;
    if (batch->framing.per_packet)
        set_link_layer(p, t, index);
    p->has_vnet = 0;
    if (batch->settled) {
        unlink_packet(p);
    } else if (p->owner != batch->owner) {
        unlink_packet(p);
        link_packet(p, batch->owner);
    }
    if (!batch->settled && batch->owner->copied)
        fetch_next(batch, index);
    if (batch->framing.vnet) {
        if (!lrx_packet_is_readable(p))
            return -1;
        memcpy(p->vnet, p->frame - batch->framing.vnet, VNET_HEADER);
        p->has_vnet = batch->framing.big_endian ? 2 : 1;
    }
    return batch->settled ? lrx_packet_own(p) : 0;
}

Packet *lrx_packet_in(State *state, Packet **slot)
{
    Packet *p = *slot;

    if (p && Py_REFCNT((PyObject *)p) > 1) {
        if (lrx_packet_own(p) < 0)
            return NULL;
        Py_CLEAR(*slot);
        p = NULL;
    }
    if (!p)
        *slot = p = lrx_packet_new(state);
    return p;
}

/* Pickles. */

PyObject *lrx_packet_reduce(PyObject *self, PyObject *unused)
{
    Packet *p = (Packet *)self;
    PyObject *packets, *restore, *result;

    (void)unused;
    if (lrx_packet_own(p) < 0)
        return NULL;
    packets = PyImport_ImportModule("linkrx.packets");
    if (!packets)
        return NULL;
    restore = PyObject_GetAttrString(packets, "restore_packet");
    Py_DECREF(packets);
    if (!restore)
        return NULL;
    result = Py_BuildValue("N(iOLIIHHHHHNiiNI)", restore, 1, p->own, (long long)p->timestamp, p->wire_length, p->interface,
                           p->protocol, p->flags, p->vlan_tci, p->vlan_tpid, p->link_type,
                           PyBytes_FromStringAndSize((const char *)p->address, p->address_length), p->link_header,
                           p->has_vnet,
                           PyBytes_FromStringAndSize((const char *)p->vnet, p->has_vnet ? VNET_HEADER : 0), p->file_type);
    return result;
}

/* The state of packet_reduce() without its version, which restore_packet() of linkrx/packets/__init__.py has checked. */
PyObject *lrx_packet_restore(PyObject *module, PyObject *args)
{
    State *state = PyModule_GetState(module);
    /* Signed, because PyArg_ParseTuple() does not check unsigned numbers for overflow. */
    long long timestamp, wire_length, interface, protocol, flags, tci, tpid, link_type, link_header, has_vnet, file_type;
    PyObject *frame, *vnet, *address;
    Packet *p;

    if (!PyArg_ParseTuple(args, "SLLLLLLLLSLLSL:restore_packet", &frame, &timestamp, &wire_length, &interface, &protocol,
                          &flags, &tci, &tpid, &link_type, &address, &link_header, &has_vnet, &vnet, &file_type)) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return NULL;
        PyErr_Clear();
        goto damaged;
    }
    if (!PyBytes_CheckExact(frame) || PyBytes_Size(frame) < link_header || PyBytes_Size(frame) > UINT32_MAX ||
        (link_header != 0 && link_header != ETHER_HEADER) || has_vnet < 0 || has_vnet > 2 ||
        PyBytes_Size(vnet) != (has_vnet ? VNET_HEADER : 0) || ((protocol | flags | tci | tpid | link_type) & ~UINT16_MAX) ||
        PyBytes_Size(address) > (link_header ? 0 : LINK_ADDRESS) ||
        ((wire_length | interface | file_type) & ~(long long)UINT32_MAX))
        goto damaged;
    p = lrx_packet_new(state);
    if (!p)
        return NULL;
    Py_INCREF(frame);
    p->own = frame;
    p->frame = (const uint8_t *)PyBytes_AsString(frame);
    p->length = (uint32_t)PyBytes_Size(frame);
    p->timestamp = timestamp;
    p->wire_length = (uint32_t)wire_length;
    p->interface = (uint32_t)interface;
    p->file_type = (uint32_t)file_type;
    p->protocol = (uint16_t)protocol;
    p->flags = (uint16_t)flags;
    p->vlan_tci = (uint16_t)tci;
    p->vlan_tpid = (uint16_t)tpid;
    p->link_type = (uint16_t)link_type;
    p->address_length = (uint8_t)PyBytes_Size(address);
    memcpy(p->address, PyBytes_AsString(address), p->address_length);
    p->link_header = (uint8_t)link_header;
    p->has_vnet = (uint8_t)has_vnet;
    memcpy(p->vnet, PyBytes_AsString(vnet), (size_t)PyBytes_Size(vnet));
    return (PyObject *)p;

damaged:
    PyErr_SetString(PyExc_ValueError, "this is no packet that linkrx has pickled");
    return NULL;
}
