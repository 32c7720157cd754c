/* Writes packets as records of a capture file into a buffer, for one write(2). */
#include "types.h"

#include <string.h>

#include "../link.inc"

#define BLOCK_ENHANCED 6
#define BLOCK_HEAD 28 /* type, length, interface, time in two halves, captured and original length */
#define BLOCK_TAIL 4  /* the length again */
#define EPB_FLAGS 2   /* an option of four bytes */
#define OUTBOUND 2
#define DIRECTION 12  /* bytes of epb_flags and opt_endofopt */
#define RECORD_HEAD 16 /* pcap: seconds, nanoseconds, captured and original length */

#define SECOND 1000000000

/* LINKTYPE_* */
#define ETHERNET 1
#define RAW 101
#define LINUX_SLL 113
#define LINUX_SLL2 276
#define UNKNOWN UINT32_MAX
#define NO_TIME (UINT32_MAX - 1)

#define TAG_OFFSET 12 /* after both addresses */
#define TAG 4
#define SLL2_HEAD 20
#define PACKET_OUTGOING 4 /* linux/if_packet.h */

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86DD

/* A packet, from a Packet or a row of a Batch. */
typedef struct {
    const uint8_t *frame;
    const uint8_t *address; /* the sender's, if the kernel reported it */
    int64_t timestamp;
    uint32_t length, wire_length, interface, file_type;
    uint16_t flags, protocol, link_type, vlan_tci, vlan_tpid;
    uint8_t link_header, address_length;
} Row;

static void row_of_packet(const Packet *p, Row *row)
{
    *row = (Row){
        .frame = p->frame,
        .address = p->address,
        .timestamp = p->timestamp,
        .length = p->length,
        .wire_length = p->wire_length,
        .interface = p->interface,
        .file_type = p->file_type,
        .flags = p->flags,
        .protocol = p->protocol,
        .link_type = p->link_type,
        .vlan_tci = p->vlan_tci,
        .vlan_tpid = p->vlan_tpid,
        .link_header = p->link_header,
        .address_length = p->address_length,
    };
}

static void row_of_batch(const Batch *b, Py_ssize_t k, Row *row)
{
    const Table *t = b->table;
    const bool per_packet = b->framing.per_packet;

    *row = (Row){
        .frame = b->base + t->offsets[k],
        .timestamp = t->columns.timestamps[k],
        .length = t->columns.lengths[k],
        .wire_length = t->columns.wire_lengths[k],
        .interface = t->columns.interfaces[k],
        .file_type = per_packet ? t->columns.file_types[k] : 0,
        .flags = t->columns.flags[k],
        .protocol = t->columns.protocols[k],
        .link_type = per_packet ? t->columns.link_types[k] : b->framing.link_type,
        .vlan_tci = t->columns.vlan_tcis[k],
        .vlan_tpid = t->columns.vlan_tpids[k],
        .link_header = per_packet ? t->columns.link_headers[k] : b->framing.link_header,
    };
    if (per_packet && !row->link_header) {
        row->address = (const uint8_t *)&t->columns.addresses[k];
        row->address_length = t->columns.address_lengths[k] < LINK_ADDRESS ? t->columns.address_lengths[k] : LINK_ADDRESS;
    }
}

/* The LINKTYPE_* of a packet. A packet without a link header, but with a known protocol, is recorded with LINUX_SLL2, as libpcap
 * does for cooked sockets. A packet of a file that linkrx does not parse keeps the link type of the file. */
static uint32_t link_type_of(const Row *row)
{
    const uint32_t of_file = row->file_type & LRX_FILE_LINK_TYPE;

    if (row->link_header)
        return ETHERNET;
    if (of_file == LINUX_SLL)
        return LINUX_SLL2;
    if (of_file == LINUX_SLL2 || (row->file_type && !row->protocol))
        return of_file;
    if (!row->protocol)
        switch (row->link_type) {
        case 801: /* IEEE 802.11 */
            return 105;
        case 802: /* with a Prism header */
            return 119;
        case 803: /* with a radiotap header */
            return 127;
        case 804: /* IEEE 802.15.4 */
            return 230;
        default:
            return UNKNOWN;
        }
    if (lrx_is_bare_ip(row->link_type) && !row->address_length && !(row->flags & LRX_VLAN) &&
        (row->protocol == ETHERTYPE_IPV4 || row->protocol == ETHERTYPE_IPV6))
        return RAW;
    return LINUX_SLL2;
}

/* The key of a packet's interface in the file: LINKTYPE_* and interface index, or UNKNOWN and ARPHRD_*. */
static uint64_t key_of(const Row *row)
{
    const uint32_t link_type = link_type_of(row);

    return (uint64_t)link_type << 32 | (link_type == UNKNOWN ? row->link_type : row->interface);
}

/* Whether the file can have this time: pcap has 32 bits of seconds since 1970. In pcapng, times before 1970 are very late ones. */
static bool is_time(int64_t time, bool pcapng)
{
    return time >= 0 && (pcapng || time / SECOND <= UINT32_MAX);
}

static uint8_t *word(uint8_t *to, uint32_t value)
{
    memcpy(to, &value, sizeof value);
    return to + sizeof value;
}

static uint8_t *network16(uint8_t *to, uint16_t value)
{
    *to++ = (uint8_t)(value >> 8);
    *to++ = (uint8_t)value;
    return to;
}

static bool is_tagged(const Row *row)
{
    return row->flags & LRX_VLAN && (!row->link_header || row->length >= TAG_OFFSET);
}

/* Bytes that are added to the frame: the tag that the kernel took out, and the header of LINUX_SLL2. */
static uint32_t added(const Row *row)
{
    return (is_tagged(row) ? TAG : 0) + (link_type_of(row) == LINUX_SLL2 ? SLL2_HEAD : 0);
}

/* The header of LINKTYPE_LINUX_SLL2. For a tagged packet, as in libpcap, its protocol is the TPID, and TCI and EtherType follow. */
static uint8_t *put_sll2(uint8_t *to, const Row *row)
{
    to = network16(to, is_tagged(row) ? row->vlan_tpid : row->protocol);
    to = network16(to, 0);
    to = network16(to, (uint16_t)(row->interface >> 16));
    to = network16(to, (uint16_t)row->interface);
    to = network16(to, row->link_type);
    *to++ = row->flags & LRX_OUTGOING ? PACKET_OUTGOING : 0;
    *to++ = row->address_length;
    memset(to, 0, LINK_ADDRESS);
    if (row->address_length)
        memcpy(to, row->address, row->address_length);
    to += LINK_ADDRESS;
    if (is_tagged(row)) {
        to = network16(to, row->vlan_tci);
        to = network16(to, row->protocol);
    }
    return to;
}

/* The frame as it was on the wire, with the tag that the kernel took out. */
static uint8_t *put_frame(uint8_t *to, const Row *row)
{
    uint32_t head = 0;

    if (link_type_of(row) == LINUX_SLL2) {
        to = put_sll2(to, row);
    } else if (is_tagged(row)) {
        head = TAG_OFFSET;
        memcpy(to, row->frame, head);
        to = network16(to + head, row->vlan_tpid);
        to = network16(to, row->vlan_tci);
    }
    memcpy(to, row->frame + head, row->length - head);
    return to + row->length - head;
}

static uint64_t size_of(const Row *row, bool pcapng)
{
    const uint64_t length = (uint64_t)row->length + added(row);

    if (!pcapng)
        return RECORD_HEAD + length;
    return BLOCK_HEAD + ((length + 3) & ~UINT64_C(3)) + (row->flags & LRX_OUTGOING ? DIRECTION : 0) + BLOCK_TAIL;
}

static uint8_t *put_block(uint8_t *to, const Row *row, uint32_t interface, uint64_t time)
{
    const uint32_t length = row->length + added(row), size = (uint32_t)size_of(row, true);

    to = word(to, BLOCK_ENHANCED);
    to = word(to, size);
    to = word(to, interface);
    to = word(to, (uint32_t)(time >> 32));
    to = word(to, (uint32_t)time);
    to = word(to, length);
    to = word(to, row->wire_length + added(row));
    to = put_frame(to, row);
    for (uint32_t k = length; k % 4; k++)
        *to++ = 0;
    if (row->flags & LRX_OUTGOING) {
        const uint16_t option[] = {EPB_FLAGS, sizeof(uint32_t)};

        memcpy(to, option, sizeof option);
        to = word(to + sizeof option, OUTBOUND);
        to = word(to, 0);
    }
    return word(to, size);
}

static uint8_t *put_record(uint8_t *to, const Row *row, uint64_t time)
{
    to = word(to, (uint32_t)(time / SECOND));
    to = word(to, (uint32_t)(time % SECOND));
    to = word(to, row->length + added(row));
    to = word(to, row->wire_length + added(row));
    return put_frame(to, row);
}

PyObject *lrx_record(PyObject *module, PyObject *args)
{
    const State *state = PyModule_GetState(module);
    Py_ssize_t first, at, count, known = 0;
    Py_buffer keys = {0}, out = {0};
    PyObject *packets, *result = NULL;
    const Batch *b = NULL;
    const Packet *p = NULL;
    unsigned long long missing = 0;
    long long clock;
    int pcapng;

    if (!PyArg_ParseTuple(args, "Ony*w*npL:record", &packets, &first, &keys, &out, &at, &pcapng, &clock))
        return NULL;
    if (Py_TYPE(packets) == state->batch_type)
        b = (const Batch *)packets;
    else if (Py_TYPE(packets) == state->packet_type)
        p = (const Packet *)packets;
    count = b ? b->table->count : 1;
    if (!b && !p) {
        PyErr_Format(PyExc_TypeError, "%R: give a Packet or a Batch", packets);
        goto done;
    }
    if (first < 0 || at < 0 || at > out.len) {
        PyErr_SetString(PyExc_ValueError, "the first packet or the offset is negative, or the offset is beyond the buffer");
        goto done;
    }
    if (b ? !lrx_batch_is_readable(b) : !lrx_packet_is_readable(p))
        goto done;
    for (; first < count; first++) {
        const Py_ssize_t interfaces = keys.len / (Py_ssize_t)sizeof(uint64_t);
        const uint64_t *list = keys.buf;
        uint8_t *to = (uint8_t *)out.buf + at;
        uint64_t key, time;
        Row row;

        if (b)
            row_of_batch(b, first, &row);
        else
            row_of_packet(p, &row);
        time = (uint64_t)(row.flags & LRX_TIMESTAMP ? row.timestamp : clock);
        if (!is_time((int64_t)time, pcapng)) {
            missing = (uint64_t)NO_TIME << 32;
            break;
        }
        key = key_of(&row);
        if (known >= interfaces || list[known] != key) /* most packets have the interface of the last one */
            for (known = 0; known < interfaces && list[known] != key; known++)
                ;
        if (known == interfaces) {
            missing = key;
            break;
        }
        if (size_of(&row, pcapng) > (uint64_t)(out.len - at))
            break;
        at = (pcapng ? put_block(to, &row, (uint32_t)known, time) : put_record(to, &row, time)) - (uint8_t *)out.buf;
    }
    result = Py_BuildValue("nnK", first, at, missing);

done:
    PyBuffer_Release(&keys);
    PyBuffer_Release(&out);
    return result;
}
